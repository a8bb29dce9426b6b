"""Passes through a model: packed forward passes, recomputation, statistics, and the proof of packing."""
