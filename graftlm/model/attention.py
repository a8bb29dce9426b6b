"""Which function of transformers' attention interface a model attends by."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def attending_by(model: Any, name: str) -> Iterator[None]:
    """Inside, the model attends by the function that transformers' AttentionInterface has under this name; outside, as
    it did before."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    for config, _ in before:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
