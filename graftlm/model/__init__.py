"""Plumbing: modules, dtypes, files. Knows no method by name."""
