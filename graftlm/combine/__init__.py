"""Deltas put together: into a base, and (to come) with each other."""
