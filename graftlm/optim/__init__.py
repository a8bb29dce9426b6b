"""Optimizers that stand in for AdamW."""
