"""Deltas put together: into a base, and with each other into one adapter."""
