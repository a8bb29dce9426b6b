"""Prompts -> answers."""
