"""For tests, ours and other packages': tiny models and tokenizers, and in `contract` what every method must keep."""

from graftlm.testing.tiny import save_tiny_base, tiny_model, tiny_tokenizer

__all__ = ["save_tiny_base", "tiny_model", "tiny_tokenizer"]
