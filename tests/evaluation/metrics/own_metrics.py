"""A metric as a user writes it."""

from typing import Any


def known(said: Any) -> float:
    return float(said.log_prob if hasattr(said, "log_prob") else said.text in said.references)
