"""What a run depends on beside its recipe: rows, files, chat template, base, and what a loss compares with.

The record stands in every checkpoint (`state.json`). `--resume` compares it with what is there now. Files are known by
their contents and bases by their weights, so a folder that was moved is the same folder.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.data.batches.pack import Example, Group
from graftlm.data.batches.prompts import PromptExample
from graftlm.data.sources.parts import content_hash
from graftlm.data.sources.source import DataConfig, SourceConfig
from graftlm.hub.fingerprint import Fingerprint, difference, fingerprint
from graftlm.losses import LossConfig
from graftlm.training.start_from import start_digest
from graftlm.training.teacher import TEACHER, adapters_compared_with

Record = dict[str, Any]
Items = Sequence[Example | Group]

OTHER_ROWS = {"inner_rows": "rows of the inner validation split", "statistics_rows": "rows for statistics"}
"""The names of row sources other than the training rows."""


def record(
    data: DataConfig,
    loss: LossConfig,
    model: Any,
    tokenizer: Any,
    items: Items,
    others: Mapping[str, Items],
    *,
    began: str,
    start_from: str | None = None,
) -> Record:
    """The record of a run that began then (local time, ISO 8601), as JSON can say it; `others` are rows beside those
    that it trains on, by a key of OTHER_ROWS."""
    template = tokenizer.chat_template
    teacher = model.__dict__.get(TEACHER)
    return {
        "rows": digest(items),
        **{key: digest(rows) if rows else None for key, rows in others.items()},
        "sources": [content_hash(path) for path in paths(data)],
        "template": hashlib.sha256(str(template).encode()).hexdigest(),
        "began": began,
        "base": fingerprint(model).to_json(),
        "teacher": None if teacher is None else fingerprint(teacher).to_json(),
        "adapters": adapters_compared_with(loss),
        "start_from": start_digest(start_from),
    }


def paths(data: DataConfig) -> list[str]:
    """The sources of a run: those of training rows, of held-out rows, and of the inner validation split."""
    held_out = data.held_out
    others = [source for source in (held_out, data.inner_rows) if isinstance(source, str | SourceConfig)]
    return [source.path if isinstance(source, SourceConfig) else source for source in (*data.sources(), *others)]


def changes(saved: Mapping[str, Any], here: Mapping[str, Any], data: DataConfig) -> list[str]:
    """What is no longer what it was, a line each, with old and new digest and the likely causes."""
    found = []
    if saved["rows"] != here["rows"]:
        causes = [
            f"{path} was edited: {_short(old)} -> {_short(new)}"
            for path, old, new in zip(paths(data), saved["sources"], here["sources"], strict=False)
            if old != new
        ]
        if saved["template"] != here["template"]:
            causes.append(
                f"the chat template is another one: {_short(saved['template'])} -> {_short(here['template'])}"
            )
        if not causes:
            causes.append(
                "files and chat template are the same: the tokenizer, or the version of graftlm, is another one"
            )
        found.append(f"training rows: {_short(saved['rows'])} -> {_short(here['rows'])}; {'; '.join(causes)}")
    for key, what in OTHER_ROWS.items():
        old, new = saved.get(key, here.get(key)), here.get(key)  # earlier versions have no such record
        if old != new:
            found.append(f"{what}: {_short(old)} -> {_short(new)}; their source was edited")
    for key in ("base", "teacher"):
        old, new = saved[key], here[key]
        if (old is None) != (new is None):
            found.append(f"{key}: {'there was none' if old is None else 'there is none'}")
        elif old is not None and (why := difference(old, Fingerprint(new["tensors"], new["config"]))):
            found.append(f"{key}: {_short(old['digest'])} -> {_short(new['digest'])}; {why}")
    if (old := saved.get("start_from")) != (new := here["start_from"]):
        found.append(f"the adapter in start_from: {_short(old)} -> {_short(new)}; its weights were written anew")
    if saved["adapters"] != here["adapters"]:
        old, new = (", ".join(map(_short, each["adapters"])) or "none" for each in (saved, here))
        found.append(f"adapters that the loss compares with: {old} -> {new}; their weights were written anew")
    return found


def with_moved_paths(
    began: Mapping[str, Any], tree: Mapping[str, Any], saved: Mapping[str, Any], data: DataConfig
) -> Any:
    """The recipe that a run began with, with the paths of `tree` for sources and the adapter in `start_from` whose
    contents are those of the record, and for a base in a folder: what it holds is compared when it is loaded."""
    began = {**began, "data": dict(began["data"])}
    same = saved.get("sources") == (now := [content_hash(path) for path in paths(data)]) and None not in now
    here = tree["data"]
    for key in ("train", "held_out", "inner_rows"):
        if same and _without_paths(began["data"].get(key)) == _without_paths(here.get(key)):
            began["data"][key] = here.get(key)
    if Path(_name(tree["base"])).is_dir() and _options(began["base"]) == _options(tree["base"]):
        began["base"] = tree["base"]
    if saved.get("start_from") is not None and start_digest(tree.get("start_from")) == saved["start_from"]:
        began["start_from"] = tree["start_from"]
    return began


def _without_paths(sources: Any) -> Any:
    if isinstance(sources, str):
        return {}
    if isinstance(sources, Mapping):
        return {key: value for key, value in sources.items() if key != "path"}
    return [_without_paths(each) for each in sources] if isinstance(sources, list) else sources


def _name(base: Any) -> str:
    return str(base if isinstance(base, str) else base["name"])


def _options(base: Any) -> Any:
    return {} if isinstance(base, str) else {key: value for key, value in base.items() if key != "name"}


def _short(digest: str | None) -> str:
    return "(unknown)" if digest is None else digest.removeprefix("sha256:")[:12]


def digest(items: Items) -> str:
    """SHA-256 of all rows as they are trained on, in their order."""
    summed = hashlib.sha256()
    for item in items:
        if isinstance(item, Group):
            summed.update(repr((item.scores, item.pairs, *((item.numbers,) if item.numbers else ()))).encode())
        for example in item.answers:
            summed.update(len(example).to_bytes(8, "little"))
            summed.update(example.ids.tobytes())
            summed.update(example.weights.tobytes())
            if isinstance(example, PromptExample):
                summed.update(repr(example.reference).encode("utf-8", "surrogatepass"))
    return summed.hexdigest()
