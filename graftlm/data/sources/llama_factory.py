"""LLaMA-Factory's dataset_info.json: an entry with its columns, tags and ranking -> a Part.

Read for their meaning: LLaMA-Factory `data/README.md` and `src/llamafactory/data/{parser,converter}.py`.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from graftlm.data.sources.fields import read_all
from graftlm.data.sources.messages import MEDIA, Fields, RowError, listed, read_text
from graftlm.data.sources.other_trainers import Part, column, on_hub, only
from graftlm.errors import DataError, nearest

_ENTRY = ("file_name", "hf_hub_url", "formatting", "ranking", "columns", "tags", "split", "subset")
_ENTRY_CANNOT = {
    "folder": "name a file of rows instead",
    "num_samples": "list the source in `data.train` with a `cap`",
}
_ELSEWHERE = {
    "ms_hub_url": "only files and data sets of the Hugging Face hub are read",
    "om_hub_url": "only files and data sets of the Hugging Face hub are read",
    "cloud_file_name": "only files and data sets of the Hugging Face hub are read",
    "script_url": "no code that comes with data is run",
}
"""Other places where the same rows are to be had."""
_MEDIA = dict.fromkeys(MEDIA, "only text can be trained on")
_COLUMNS = {
    "alpaca": ("prompt", "query", "response", "history", "system", "tools", "chosen", "rejected", "kto_tag"),
    "sharegpt": ("messages", "system", "tools", "chosen", "rejected", "kto_tag"),
}
_COLUMNS["openai"] = _COLUMNS["sharegpt"]
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_TAGS = {
    "sharegpt": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    },
    "openai": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function_call",
        "system_tag": "system",
    },
}


def part(file: Path, name: str) -> Part:
    """The entry `name` of a dataset_info.json; its files lie beside it."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}", code="unreadable-file") from None
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON: {error}", code="invalid-json") from None
    if not isinstance(tree, dict) or not isinstance(tree.get(name), dict):
        names = tree if isinstance(tree, dict) else ()
        raise DataError(f"{file}: describes no data set {name!r}. {nearest(name, names)}", code="no-such-data-set")
    entry, where = tree[name], f"{file}: {name}"
    here = (*_ENTRY, *_ELSEWHERE) if entry.get("hf_hub_url") else _ENTRY
    only(entry, here, _ENTRY_CANNOT | _ELSEWHERE if here is _ENTRY else _ENTRY_CANNOT, where)
    form = entry.get("formatting", "alpaca")
    if form not in _COLUMNS:
        raise DataError(
            f"{where}: formatting: {form!r} is not known. {nearest(str(form), _COLUMNS)}", code="unknown-format"
        )
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    only(columns, _COLUMNS[form], _MEDIA, f"{where}: columns")
    columns = {key: column for key, column in columns.items() if column}
    if form == "alpaca":
        only(tags, (), {}, f"{where}: tags")
        columns = columns or _ALPACA
        reshape: Callable[[Fields], Fields] = partial(_from_alpaca, columns)
    else:
        only(tags, tuple(_TAGS[form]), {}, f"{where}: tags")
        usual = "messages" if form == "openai" else "conversations"
        columns = {"messages": usual, **columns}
        reshape = partial(_from_sharegpt, columns, _TAGS[form] | tags)
    split = entry.get("split") or "train"
    if entry.get("hf_hub_url"):
        path = on_hub(entry["hf_hub_url"], entry.get("subset"), split)
    elif not entry.get("file_name"):
        raise DataError(f"{where}: file_name or hf_hub_url is needed", code="missing-key")
    elif split != "train" or entry.get("subset"):
        raise DataError(f"{where}: split and subset cannot be honoured: a file has none", code="unsupported-setting")
    else:
        path = str(file.parent / entry["file_name"])
    if entry.get("ranking"):
        if missing := {"chosen", "rejected"} - columns.keys():
            raise DataError(f"{where}: ranking needs the column {sorted(missing)[0]!r}", code="missing-key")
        return Part(path, "preference", reshape)
    if "kto_tag" in columns:
        return Part(path, "feedback", reshape)
    if form == "alpaca" and "response" not in columns:
        return Part(path, "text", reshape)
    return Part(path, "alpaca" if form == "alpaca" else "sharegpt", reshape)


def _beside(columns: Mapping[str, str], row: Fields) -> dict[str, Any]:
    """What both formattings have beside the conversation, by our names."""
    names = {"system": "system", "tools": "tools", "kto_tag": "label"}
    return {ours: column(row, columns[theirs]) for theirs, ours in names.items() if theirs in columns}


def _from_alpaca(columns: Mapping[str, str], row: Fields) -> Fields:
    """Prompt and query stand on two lines, as they do there; with no column but the prompt it is raw text."""
    names = [columns[key] for key in ("prompt", "query") if key in columns]
    if columns is _ALPACA and "input" not in row:  # nobody said that there is one
        names.remove("input")
    texts = [read_text({name: column(row, name)}, name, default="") for name in names]
    question = "\n".join(part for part in texts if part)
    if not {"response", "chosen"} & columns.keys():
        return {"text": question}
    found = _beside(columns, row) | {"instruction": question}
    others = {"response": "output", "chosen": "chosen", "rejected": "rejected", "history": "history"}
    return found | {ours: column(row, columns[theirs]) for theirs, ours in others.items() if theirs in columns}


def _from_sharegpt(columns: Mapping[str, str], tags: Mapping[str, str], row: Fields) -> Fields:
    """A system message in the list goes before the column, as it does there."""
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "function_call",
        tags["system_tag"]: "system",
    }

    def renamed(turn: Any, where: str) -> dict[str, Any]:
        if not isinstance(turn, Mapping):
            raise RowError(f"{where} must be a message, this is {turn!r:.60}")
        role = read_text(turn, tags["role_tag"])
        if role not in roles:
            near = nearest(role, roles)
            raise RowError(f"{where}: {tags['role_tag']} is {role!r}, which is none of the tags. {near}")
        rest = {
            key: value for key, value in read_all(turn).items() if key not in (tags["role_tag"], tags["content_tag"])
        }
        return rest | {"role": roles[role], "content": turn.get(tags["content_tag"])}

    name = columns["messages"]
    turns = [renamed(turn, f"{name}[{index}]") for index, turn in enumerate(listed(row, name, "message"))]
    found = _beside(columns, row) | {"conversations": turns}
    if turns[0]["role"] == "system":
        found.pop("system", None)
    for key in {"chosen", "rejected"} & columns.keys():
        found[key] = renamed(column(row, columns[key]), columns[key])
    return found
