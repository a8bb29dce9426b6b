"""Rendered rows -> packs: order, groups, prompts."""
