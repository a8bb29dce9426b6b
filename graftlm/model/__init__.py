"""Deltas in a transformers model: layers of the base, sites, hosts, attaching. Knows no method by name."""
