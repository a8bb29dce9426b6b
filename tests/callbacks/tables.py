"""All that acts between steps, optimizers included, and how tests make it."""

from collections.abc import Sequence
from typing import Any

from graftlm.callbacks import CALLBACKS
from graftlm.optim import OPTIMIZERS
from graftlm.optim.adamw import AdamW, AdamWConfig
from graftlm.training.callback import Callback, CallbackConfig, Optimizer

TABLE = {**OPTIMIZERS, **CALLBACKS}


def make(configs: Sequence[CallbackConfig]) -> list[Any]:
    return [TABLE[config.name].callback(config) for config in configs]


def with_optimizer(chosen: Sequence[Callback]) -> list[Callback]:
    """These callbacks, and AdamW before them where no optimizer is among them."""
    return list(chosen) if any(isinstance(each, Optimizer) for each in chosen) else [AdamW(AdamWConfig()), *chosen]


def section(config: CallbackConfig) -> dict[str, Any]:
    """The section of a recipe that names it."""
    return {"optimizer": config} if config.name in OPTIMIZERS else {"callbacks": (config,)}


def is_fused(callback: Callback) -> bool:
    return isinstance(callback, Optimizer) and callback.fused
