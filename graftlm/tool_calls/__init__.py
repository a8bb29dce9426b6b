"""Calls of tools in answers: how families of models write them, and grammars that force them."""
