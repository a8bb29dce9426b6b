"""An adapter of one base made anew for another base, from rows that it makes itself.

Trans-LoRA: Wang et al. 2024, arXiv:2405.17258: the rows of `synthesis.py`, then distillation by sequences,

    min over the target's adapter of  mean over (x, y) of  -log p_{target + adapter}(y | x)

which is training (`graftlm.run.train`) on rows of text. So the tokenizers may differ, and so may method and rank.

    OUT.rows.jsonl      the rows
    OUT.rows.json       what they were made with, and what was left out
    OUT/                the run on the target; its transfer.json is a copy of these facts
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.folder import CONFIG, WEIGHTS, check_new_folder, sha256_of, sha256_of_bytes
from graftlm.adapters.load import attach_adapter, load_named_base
from graftlm.config.schema import build, to_tree
from graftlm.config.source import lay_over
from graftlm.data.sources.convert import write_lines
from graftlm.errors import AdapterError, BaseModelError, OutputError, numbered
from graftlm.files import sync, whole
from graftlm.hub.fingerprint import Fingerprint, difference, fingerprint
from graftlm.hub.load import load_base
from graftlm.library.entry import entry_of
from graftlm.library.synthesis import Seed, SynthesisConfig, SyntheticRow, synthesize
from graftlm.lock import only_writer
from graftlm.recipe import Recipe
from graftlm.run import Result, train
from graftlm.system import return_freed_memory
from graftlm.training.checkpoints import FOLDER, UNFINISHED
from graftlm.training.run_folder import KEPT

TRANSFER = "transfer.json"
NAME = "default"
"""The name under which the source's adapter is on its base."""
RANK = 16
"""Of the target's LoRA where the source has no rank."""
EPOCHS = 3.0


class Made(NamedTuple):
    """The rows of a transfer."""

    rows: Path
    facts: dict[str, Any]
    """What they were made with (`settings`, `source`), and what became of the questions (`counts`)."""
    reused: bool
    """Whether they were there already."""


def transfer(
    adapter: str | Path,
    to: str,
    seeds: Sequence[Seed],
    out: str | Path,
    *,
    base: str | None = None,
    synthesis: SynthesisConfig | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    network: bool = False,
) -> Result:
    """Train an adapter for the base `to` on rows that `adapter` makes on its own base, into the folder `out`.

    `base`: where the adapter's base is, by default by the name that the adapter has for it. `overrides`: `key=value`
    over the recipe of the run. Rows that were made with the same settings are used again; with `resume` the run goes on
    from its last checkpoint. Returns what the run leaves. Raises BaseModelError where `to` is the adapter's own base,
    OutputError where something would be lost, DataError where no rows can be made, and what `train` raises.
    """
    adapter, out = Path(adapter), Path(out)
    recipe = recipe_for(adapter, to, out, overrides, network=network)
    made = make_rows(adapter, recipe, seeds, out, base=base, synthesis=synthesis, overwrite=overwrite, resume=resume)
    return train_on(made, recipe, out, overwrite=overwrite, resume=resume)


def make_rows(
    adapter: Path,
    recipe: Recipe,
    seeds: Sequence[Seed],
    out: Path,
    *,
    base: str | None = None,
    synthesis: SynthesisConfig | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Made:
    """The rows for a run into `out`: written, or those that are there already, if they have the same settings."""
    synthesis = synthesis or SynthesisConfig()
    if not resume and not (out / FOLDER / UNFINISHED).is_file():  # of an unfinished run `train` says more
        check_new_folder(out, overwrite=overwrite, keep=KEPT)  # before anything takes its time
    settings = _settings(adapter, seeds, synthesis)
    reused = _is_made(out, settings, overwrite=overwrite)
    target = fingerprint(load_base(recipe.base, network=recipe.network).model)
    return_freed_memory()
    if not reused:
        with only_writer(_rows_of(out)):
            rows, facts = _made(adapter, base, target, seeds, synthesis, recipe.network, progress)
            _write(out, rows, {"settings": settings, **facts})
    facts = json.loads(_facts_of(out).read_text(encoding="utf-8"))
    if facts["source"]["fingerprint"] == target.digest:
        raise _same_base(adapter)
    return Made(_rows_of(out), facts, reused)


def train_on(
    made: Made,
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    console: Console | None = None,
) -> Result:
    """The run on the target."""
    result = train(recipe, out, overwrite=overwrite, resume=resume, console=console)
    with whole(out / TRANSFER) as draft:
        draft.write_text(json.dumps(made.facts, indent=1) + "\n", encoding="utf-8")
    return result


def recipe_for(adapter: Path, to: str, out: Path, overrides: Sequence[str], *, network: bool = False) -> Recipe:
    """The run on the target: LoRA on all linear layers, of the largest rank of the source."""
    r = max(entry_of(adapter).ranks, default=RANK)
    tree: dict[str, Any] = {
        "base": to,
        "data": {"train": str(_rows_of(out)), "held_out": 0.1},
        "delta": {"method": "lora", "r": r, "alpha": 2.0 * r},
        "train": {"epochs": EPOCHS},
        "network": network,
    }
    keys = lay_over(tree, overrides)
    if ("train", "steps") in keys and ("train", "epochs") not in keys:
        del tree["train"]["epochs"]
    return build(Recipe, tree, source="the recipe of the transfer")


def _rows_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.rows.jsonl")


def _facts_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.rows.json")


# The rows -----------------------------------------------------------------------------------------------------------


def _settings(adapter: Path, seeds: Sequence[Seed], synthesis: SynthesisConfig) -> dict[str, Any]:
    """What decides about the rows."""
    return {
        "adapter": {file: sha256_of(adapter / file) for file in (CONFIG, WEIGHTS) if (adapter / file).is_file()},
        "seeds": sha256_of_bytes(json.dumps(seeds).encode()),
        **to_tree(synthesis),
    }


def _is_made(out: Path, settings: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether the rows of these settings are there, whole; OutputError where others would be lost."""
    rows, facts = _rows_of(out), _facts_of(out)
    if not rows.exists() and not facts.exists():
        return False
    differ = ["they are not the ones that were written, or their facts are gone"]
    try:
        known = json.loads(facts.read_text(encoding="utf-8"))
        if known["rows"] == sha256_of(rows):
            before = known["settings"]
            differ = [f"{key} was {before.get(key)!r}" for key in settings if before.get(key) != settings[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if differ and not overwrite:
        raise OutputError(
            f"{rows} has rows that were made otherwise:\n{numbered(differ)}\nSay --overwrite to make them anew, or "
            "choose another folder",
            code="other-rows",
        )
    return not differ


def _made(
    adapter: Path,
    base: str | None,
    target: Fingerprint,
    seeds: Sequence[Seed],
    synthesis: SynthesisConfig,
    network: bool,
    progress: Callable[[int, int], None],
) -> tuple[list[SyntheticRow], dict[str, Any]]:
    """The rows, and the facts about them. The source's base is in memory in here alone."""
    source = Adapter.read(adapter)
    named = (source.base or {}).get("name") or source.peft_config.get("base_model_name_or_path")
    if base is None and not named:
        raise AdapterError(f"{adapter} does not name its base: say which it is (--base)", code="no-base-named")
    if base is not None:
        model, tokenizer = load_base(base, network=network)
    else:
        model, tokenizer = load_named_base(str(named), str(adapter), network=network)
    if not difference(fingerprint(model).to_json(), target):
        raise _same_base(adapter)
    attach_adapter(model, source, name=NAME)
    rows, counts = synthesize(model, tokenizer, seeds, synthesis, adapters=(NAME,), progress=progress)
    made = {"source": {"base": named or base, "fingerprint": fingerprint(model).digest}, "counts": asdict(counts)}
    del model
    return_freed_memory()
    return rows, made


def _same_base(adapter: Path) -> BaseModelError:
    return BaseModelError(
        f"--to is the base of {adapter} already: there is nothing to transfer. Use the adapter as it is",
        code="same-base",
    )


def _write(out: Path, rows: Sequence[SyntheticRow], facts: dict[str, Any]) -> None:
    """The rows, then the facts, which have their digest: rows without facts are rows of a process that died."""
    _facts_of(out).unlink(missing_ok=True)
    with whole(_rows_of(out)) as draft:
        write_lines(draft, (row.to_fields() for row in rows))
        sync(draft)
    facts = {**facts, "rows": sha256_of(_rows_of(out))}
    with whole(_facts_of(out)) as draft:
        draft.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        sync(draft)
