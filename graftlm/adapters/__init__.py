"""Adapters on disk: read, written, in the layout of PEFT, exported."""
