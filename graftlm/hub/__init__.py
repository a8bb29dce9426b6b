"""Bases and tokenizers by name: loading, fingerprints, sketches without weights."""
