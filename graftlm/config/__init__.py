"""Configs: frozen dataclasses that check themselves, read from YAML, the command line and Python."""
