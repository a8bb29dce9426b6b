"""POLICIES: what acts between steps (rank allocation, merge-and-restart, projections). None is in this version."""

POLICIES: dict[str, object] = {}
