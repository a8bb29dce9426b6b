"""`start_from`: a run that continues an adapter. Its tensors are the start; optimizer and schedule begin anew."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.folder import WEIGHTS, sha256_of
from graftlm.config.schema import to_tree
from graftlm.config.trees import differences
from graftlm.deltas import METHODS
from graftlm.deltas.base import DeltaConfig
from graftlm.errors import AdapterError, RecipeError, numbered


def read_start(folder: str) -> Adapter:
    """The adapter that a run continues. Raises AdapterError where it is none of ours, or needs a state that is lost."""
    adapter = Adapter.read(Path(folder).expanduser())
    if adapter.config is None:
        raise AdapterError(
            f"start_from: {folder} has no graftlm.json: another tool wrote it. Load it with graftlm.load_adapter, save "
            "it with graftlm.save_adapter, and start from that folder",
            code="no-own-config",
        )
    if needs := METHODS[adapter.config.method].delta.callbacks:
        raise AdapterError(
            f"start_from: {folder} is of {adapter.config.method}, which is trained with the callback "
            f"{' or '.join(needs)}: what that remembers is not in an adapter. A run that was stopped goes on with "
            "--resume",
            code="not-continuable",
        )
    return adapter


def check_delta(adapter: Adapter, delta: DeltaConfig) -> None:
    """Raise RecipeError where the recipe's `delta` is not that of the adapter which the run continues."""
    if found := differences(to_tree(adapter.config), to_tree(delta)):
        raise RecipeError(
            f"delta is not that of the adapter in start_from, {adapter.where}:\n"
            f"{numbered([f'delta.{line}' for line in found])}\nLeave delta out: it is then the adapter's",
            code="other-delta",
        )


def start_digest(folder: str | None) -> str | None:
    """SHA-256 of the tensors of the adapter that a run continues; None where there is none."""
    file = None if folder is None else Path(folder).expanduser() / WEIGHTS
    return sha256_of(file) if file is not None and file.is_file() else None


def about_start(adapter: Adapter) -> Mapping[str, Any]:
    """What summary.json says of it."""
    return {"base_fingerprint": (adapter.base or {}).get("digest"), "held_out": adapter.metrics.get("held_out")}
