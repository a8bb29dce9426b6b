"""Runs that were made: compared, drawn, swept."""
