"""Adapters over one base, behind the APIs that clients know."""
