"""Axolotl's `datasets:`: entries with their mappings, roles, and weights of turns and characters -> Parts.

Read for their meaning: Axolotl `src/axolotl/utils/schemas/datasets.py`, `docs/dataset-formats/conversation.qmd` and
`src/axolotl/prompt_strategies/chat_template.py`. Two things are not as there: `alpaca` stands for the rows alone, which
the base's own template renders; and what ends a question is not trained where the question is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from graftlm.config.source import parse_yaml
from graftlm.data.sources.messages import ROLES, Fields, RowError, listed, read_text
from graftlm.data.sources.other_trainers import Part, as_it_is, column, on_hub, only
from graftlm.errors import DataError, RecipeError, nearest

_DATASET = (
    *(
        "path",
        "type",
        "name",
        "split",
        "ds_type",
        "data_files",
        "field",
        "field_messages",
        "field_system",
        "field_tools",
    ),
    *("field_thinking", "message_property_mappings", "message_field_role", "message_field_content", "roles"),
    *("roles_to_train", "message_field_training", "message_field_training_detail", "drop_system_message"),
    *("train_on_eos", "train_on_eot", "chat_template"),
)
_OWN_TEMPLATE = "rows are rendered by the base's template: give `base: {template: FILE.jinja}` and remove it here"
_DATASET_CANNOT = {
    "chat_template_jinja": _OWN_TEMPLATE,
    "template_thinking_key": "thoughts go to templates as reasoning_content",
    "split_thinking": "put thoughts into a field of their own (field_thinking)",
    "conversation": "the template is the base's own",
    "revision": "fetch that revision and name its file",
    "trust_remote_code": "no code that comes with data is run",
    "shards": "list the source in `data.train` with a `cap`",
    "shards_idx": "list the source in `data.train` with a `cap`",
    "preprocess_shards": "rows are read one by one",
    **dict.fromkeys(("field_human", "field_model"), "use message_property_mappings"),
    **dict.fromkeys(("logprobs_field", "temperature"), "only supervised data sets are read"),
    **dict.fromkeys(("input_format", "input_transform"), "rows are read as they are"),
}
_TYPES = ("chat_template", "sharegpt", "alpaca", "completion")
_USUAL_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_DEFAULT_TEMPLATE = "tokenizer_default"


@dataclass(frozen=True)
class _Turns:
    """How Axolotl's entry reads a conversation."""

    messages: str
    system: str
    tools: str
    properties: Mapping[str, str]
    roles: Mapping[str, str]
    trained: frozenset[str] | None
    training: str | None
    detail: str | None
    drop_system: bool


def is_axolotl(path: str | Path) -> bool:
    """Whether a YAML file has Axolotl's `datasets:` and not our `data:`."""
    try:
        tree, _ = parse_yaml(Path(path).expanduser().read_text(encoding="utf-8-sig"), str(path))
    except (OSError, ValueError, RecipeError):
        return False
    return "datasets" in tree and "data" not in tree


def parts(file: Path) -> list[Part]:
    """The files of all entries of `datasets:`, in their order."""
    try:
        tree, _ = parse_yaml(file.read_text(encoding="utf-8-sig"), str(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}", code="unreadable-file") from None
    entries = tree.get("datasets")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        near = nearest("datasets", map(str, tree))
        raise DataError(f"{file}: a .yaml file of data has Axolotl's list `datasets:`. {near}", code="no-datasets-list")
    if tree.get("train_on_inputs"):
        raise DataError(
            f"{file}: train_on_inputs: true cannot be honoured: set `data.mask: everything`, and remove it",
            code="unsupported-setting",
        )
    notes = []
    for key in ("chat_template", "chat_template_jinja", "default_system_message"):
        if tree.get(key) and not str(tree[key]).startswith(_DEFAULT_TEMPLATE):
            notes.append(f"{key}: {tree[key]!r:.60} is not used: {_OWN_TEMPLATE}")
    found = []
    for index, entry in enumerate(entries):
        where = f"{file}: datasets[{index}]"
        format, reshape = _entry(entry, where)
        for path in _files(entry, file.parent, where):
            found.append(Part(path, format, reshape, tuple(notes)))
            notes = []
    return found


def _entry(entry: Mapping[str, Any], where: str) -> tuple[str, Callable[[Fields], Fields]]:
    """The format and the renaming of one entry."""
    kind = entry.get("type")
    if kind is None:
        only(entry, _DATASET, _DATASET_CANNOT, where)  # it may be there, misspelt
    kind = "alpaca" if str(kind).startswith("alpaca:") else kind  # after the colon comes what stands around the rows
    if kind not in _TYPES:
        raise DataError(f"{where}: type: {kind!r:.60} is not read. Known: {', '.join(_TYPES)}", code="unknown-format")
    only(entry, _DATASET, _DATASET_CANNOT, where)
    template = entry.get("chat_template") or _DEFAULT_TEMPLATE
    if not str(template).startswith(_DEFAULT_TEMPLATE):
        raise DataError(
            f"{where}: chat_template: {template!r:.60} cannot be honoured: {_OWN_TEMPLATE}", code="unsupported-setting"
        )
    for key in ("train_on_eos", "train_on_eot"):
        if entry.get(key, "turn") not in ("turn", None):
            problem = f"{key}: {entry[key]!r} cannot be honoured"
            raise DataError(
                f"{where}: {problem}: what ends an answer is trained with the answer", code="unsupported-setting"
            )
    if kind in ("alpaca", "completion"):
        only(entry, ("path", "type", "name", "split", "ds_type", "data_files", "field", *_DATASET_CANNOT), {}, where)
        if kind == "alpaca":
            return "alpaca", as_it_is
        field = entry.get("field") or "text"
        return "text", lambda row: {"text": column(row, field)}
    return "messages", partial(_from_turns, _turns(entry, kind, where))


def _turns(entry: Mapping[str, Any], kind: str, where: str) -> _Turns:
    names = {"role": "from", "content": "value"} if kind == "sharegpt" else {"role": "role", "content": "content"}
    legacy = {"role": entry.get("message_field_role"), "content": entry.get("message_field_content")}
    names |= {key: value for key, value in legacy.items() if value}
    names |= {"reasoning_content": entry.get("field_thinking") or "reasoning_content"}
    names |= entry.get("message_property_mappings") or {}
    for name in names.keys() - {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "tool", "name"}:
        raise DataError(
            f"{where}: message_property_mappings: {name}: a message has no such property here",
            code="unknown-message-property",
        )
    roles = dict(_USUAL_ROLES)
    if entry.get("roles"):
        roles = {source: target for target, sources in entry["roles"].items() for source in sources}
        for target in set(roles.values()) - set(ROLES):
            raise DataError(
                f"{where}: roles: {target}: there is no such role. {nearest(target, ROLES)}", code="unknown-role"
            )
    training, detail = entry.get("message_field_training"), entry.get("message_field_training_detail")
    trained = None
    if "roles_to_train" in entry:
        roles_to_train = entry["roles_to_train"] or []
        if not roles_to_train and not training and not detail:
            raise DataError(
                f"{where}: roles_to_train is empty, and no message_field_training says what is trained. For the last "
                "answer alone remove it, and set `data.mask: last-turn`",
                code="no-trained-roles",
            )
        trained = frozenset(roles.get(role, role) for role in roles_to_train)
        for role in trained - set(ROLES):
            raise DataError(
                f"{where}: roles_to_train: {role}: there is no such role. {nearest(role, roles)}", code="unknown-role"
            )
    messages = entry.get("field_messages") or ("conversations" if kind == "sharegpt" else "messages")
    system, tools = entry.get("field_system") or "system", entry.get("field_tools") or "tools"
    drop = bool(entry.get("drop_system_message"))
    return _Turns(messages, system, tools, names, roles, trained, training, detail, drop)


def _from_turns(how: _Turns, row: Fields) -> Fields:
    found = []
    for index, turn in enumerate(listed(row, how.messages, "message")):
        where = f"{how.messages}[{index}]"
        if not isinstance(turn, Mapping):
            raise RowError(f"{where} must be a mapping, this is {turn!r:.60}")
        message = {key: turn[key] for key in ("tool_calls", "tool_call_id", "name") if turn.get(key) is not None}
        message |= {name: turn[key] for name, key in how.properties.items() if turn.get(key) is not None}
        key = how.properties["role"]
        role = read_text(turn, key)
        if role not in how.roles and role not in ROLES:
            raise RowError(f"{where}: {key} is {role!r}, which is no role. {nearest(role, how.roles)}")
        message["role"] = how.roles.get(role, role)
        found.append(message | _training(how, turn, message, where))
    if found[0]["role"] == "system" and how.drop_system:
        del found[0]
    system = row.get(how.system) if not how.drop_system else None
    beside = {"tools": row.get(how.tools)}
    if system and found and found[0]["role"] != "system":
        beside["system"] = system
    return beside | {"messages": found}


def _training(how: _Turns, turn: Fields, message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The weight of a turn, and of its characters: begin_offset to end_offset, both included; what no range covers is
    not trained. A turn with its own answer to the question does not ask roles_to_train."""
    flag = turn.get(how.training) if how.training else None
    detail = turn.get(how.detail) if how.detail else None
    if flag is not None:
        if not isinstance(flag, bool):
            raise RowError(f"{where}: {how.training} must be true or false, this is {flag!r:.60}")
    elif detail is not None:
        flag = bool(detail)
    elif how.trained is None:
        return {}
    else:
        flag = message["role"] in how.trained
    if not flag or not detail:
        return {"weight": float(flag)}
    text = message.get("content")
    if not isinstance(text, str):
        raise RowError(f"{where}: {how.detail} needs a text, this is {text!r:.60}")
    spans, end = [], 0
    for one in sorted(listed(turn, str(how.detail)), key=_begin):
        begin, last, train = (one.get(key) for key in ("begin_offset", "end_offset", "train"))
        if not isinstance(begin, int) or not isinstance(last, int) or not isinstance(train, bool):
            raise RowError(f"{where}: {how.detail}: begin_offset, end_offset and train are needed, this is {one!r:.80}")
        if not end <= begin <= last < len(text):
            raise RowError(
                f"{where}: {how.detail}: {begin} to {last} is out of range or twice in it: the text has {len(text)} "
                "characters, counted from 0, and both ends are included"
            )
        spans += [[end, begin, 0.0]] if begin > end else []
        spans.append([begin, last + 1, float(train)])
        end = last + 1
    spans += [[end, len(text), 0.0]] if end < len(text) else []
    return {"weight": 1.0, "spans": spans}


def _begin(one: Any) -> int:
    if not isinstance(one, Mapping) or not isinstance(one.get("begin_offset"), int):
        raise RowError(f"a range needs begin_offset, end_offset and train, this is {one!r:.80}")
    return int(one["begin_offset"])


def _files(entry: Mapping[str, Any], folder: Path, where: str) -> list[str]:
    """The files of an entry: as they are named, or beside the description; else it is a data set of the hub."""
    path, data_files = entry.get("path"), entry.get("data_files")
    if not isinstance(path, str):
        raise DataError(f"{where}: path is needed", code="missing-key")
    names = [data_files] if isinstance(data_files, str) else list(data_files or ())
    split = entry.get("split") or "train"
    if names and not Path(path).suffix and not (Path(path).is_dir() or (folder / path).is_dir()):
        pass  # `path: json` names a reader, not a place
    elif names:
        names = [str(Path(path) / name) for name in names]
    elif Path(path).suffix or Path(path).exists() or path.count("/") != 1:
        names = [path]
    else:
        return [on_hub(path, entry.get("name"), split)]
    if split != "train" or entry.get("name"):
        raise DataError(f"{where}: split and name cannot be honoured: a file has none", code="unsupported-setting")
    return [name if Path(name).exists() or not (folder / name).exists() else str(folder / name) for name in names]
