"""graftlm: teach a frozen language model new behaviour through a small, removable delta.

The public names, on one screen. Each is imported when it is first used, so `import graftlm` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graftlm.system import require_supported_platform

__version__ = "0.1.0"

if TYPE_CHECKING:
    from graftlm.adapters.adapter import Adapter as Adapter
    from graftlm.adapters.export.export import export as export
    from graftlm.adapters.export.lint import lint as lint
    from graftlm.adapters.load import attach_adapter as attach_adapter
    from graftlm.adapters.load import load_adapter as load_adapter
    from graftlm.adapters.save import save_adapter as save_adapter
    from graftlm.data.quality.rendered_row import render as render
    from graftlm.data.sources.load import load_rows as load_rows
    from graftlm.data.sources.source import DataConfig as DataConfig
    from graftlm.data.sources.source import SourceConfig as SourceConfig
    from graftlm.deltas import METHODS as METHODS
    from graftlm.deltas.inits import INITS as INITS
    from graftlm.deltas.lora import LoraConfig as LoraConfig
    from graftlm.generation.answer import answer as answer
    from graftlm.generation.generate import generate as generate
    from graftlm.hub.config import BaseConfig as BaseConfig
    from graftlm.hub.load import load_base as load_base
    from graftlm.hub.quantize_base import quantize as quantize
    from graftlm.model.attach import attach as attach
    from graftlm.model.attach import detach as detach
    from graftlm.model.modes import activate as activate
    from graftlm.model.modes import by_row as by_row
    from graftlm.model.modes import deltas_off as deltas_off
    from graftlm.model.state_dict import merged_state as merged_state
    from graftlm.passes.packing_check import check_packing as check_packing
    from graftlm.passes.statistics import collect as collect
    from graftlm.recipe import Recipe as Recipe
    from graftlm.recipe import ReportConfig as ReportConfig
    from graftlm.recipe import read_recipe as read_recipe
    from graftlm.rows import rows_report as rows_report
    from graftlm.run import train as train
    from graftlm.training.config import TrainConfig as TrainConfig

_HOME = {
    "Adapter": "graftlm.adapters.adapter",
    "BaseConfig": "graftlm.hub.config",
    "DataConfig": "graftlm.data.sources.source",
    "INITS": "graftlm.deltas.inits",
    "LoraConfig": "graftlm.deltas.lora",
    "METHODS": "graftlm.deltas",
    "Recipe": "graftlm.recipe",
    "ReportConfig": "graftlm.recipe",
    "SourceConfig": "graftlm.data.sources.source",
    "TrainConfig": "graftlm.training.config",
    "activate": "graftlm.model.modes",
    "answer": "graftlm.generation.answer",
    "attach": "graftlm.model.attach",
    "attach_adapter": "graftlm.adapters.load",
    "by_row": "graftlm.model.modes",
    "check_packing": "graftlm.passes.packing_check",
    "collect": "graftlm.passes.statistics",
    "deltas_off": "graftlm.model.modes",
    "detach": "graftlm.model.attach",
    "export": "graftlm.adapters.export.export",
    "generate": "graftlm.generation.generate",
    "lint": "graftlm.adapters.export.lint",
    "load_adapter": "graftlm.adapters.load",
    "load_base": "graftlm.hub.load",
    "load_rows": "graftlm.data.sources.load",
    "merged_state": "graftlm.model.state_dict",
    "quantize": "graftlm.hub.quantize_base",
    "read_recipe": "graftlm.recipe",
    "render": "graftlm.data.quality.rendered_row",
    "rows_report": "graftlm.rows",
    "save_adapter": "graftlm.adapters.save",
    "train": "graftlm.run",
}
"""Name -> its module."""

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 (the names are strings)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        require_supported_platform()
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'graftlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
