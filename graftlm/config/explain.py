"""What pydantic finds wrong in a config, as an error with file, line, key and the nearest known name."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from graftlm.config.trees import Key, Tree, dotted
from graftlm.errors import nearest


def explain(cls: type, tree: Tree, error: Any, source: str, lines: Mapping[Key, int]) -> tuple[Key, str, str]:
    """One pydantic error: its key, its kind, and `file:line: key: what, what is near`."""
    key, owner = _locate(cls, tree, error["loc"])
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    where = source if line is None else "command line" if line == 0 else f"{source}:{line}"
    if error["type"] in UNKNOWN:
        if (instead := getattr(owner, "REPLACED", {}).get(str(key[-1]))) is not None:
            instead = instead(error["input"]) if callable(instead) else instead
            return key, error["type"], f"{where}: {dotted(key)}: this key was replaced by {instead}"
        if (instead := getattr(cls, "OTHER_NAMES", {}).get(str(key[-1]).lower().replace("-", "_"))) is not None:
            return key, error["type"], f"{where}: {dotted(key)}: unknown key. Here it is {instead}"
        known = [f.name for f in fields(owner)] if is_dataclass(owner) else []
        homes = [home for home in _homes(cls, str(key[-1])) if home != dotted(key)]
        if 0 < len(homes) <= MOST_HOMES:
            return key, error["type"], f"{where}: {dotted(key)}: unknown key. Here it is {' or '.join(homes)}"
        return key, error["type"], f"{where}: {dotted(key)}: unknown key. {nearest(str(key[-1]), known)}"
    if error["type"] in ("missing", "missing_argument"):
        return key, error["type"], f"{where}: {dotted(key)}: this key has no default and must be given"
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        tag = error["ctx"]["discriminator"].strip("'")
        known = _tags(cls, tree, error["loc"], tag)
        if error["type"] == "union_tag_not_found":
            value = ", ".join(map(str, error["input"])) if isinstance(error["input"], dict) else error["input"]
            which = f"say which: `{tag}: NAME` beside {value}. {nearest('', known)}"
            return key, error["type"], f"{where}: {dotted(key)}.{tag}: {which}"
        name = str(error["ctx"]["tag"])
        return key, error["type"], f"{where}: {dotted(key)}.{tag}: {name!r} is unknown. {nearest(name, known)}"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    suffix = f" (given: {value!r})" if not isinstance(value, dict | list | tuple) else ""
    return key, error["type"], f"{where}: {dotted(key) or 'the recipe'}: {message}{suffix}"


UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
"""Kinds of pydantic errors that an unknown key has."""
MOST_HOMES = 3
"""A key that more sections have says nothing of which is meant."""


def _homes(cls: type, name: str, prefix: str = "") -> list[str]:
    """The dotted keys of a config, and of the configs in it, that end with this name."""
    hints, found = get_type_hints(cls), list[str]()
    for each in fields(cls):
        if each.name == name:
            found.append(f"{prefix}{name}")
        if get_origin(hints[each.name]) is not Mapping:  # whose keys are names that the user chose
            inner = filter(is_dataclass, _members(hints[each.name]))
            found += [home for member in inner for home in _homes(member, name, f"{prefix}{each.name}.")]
    return list(dict.fromkeys(found))


def _tags(cls: type, tree: Tree, loc: Sequence[str | int], tag: str) -> list[str]:
    """The names that the config at `loc` may have under its key `tag`: pydantic says them when it meets another one."""
    tree = copy.deepcopy(tree)
    inner: Any = tree
    for part in loc:
        if not (isinstance(part, int) and isinstance(inner, dict)):  # one entry, where a list of them may be given
            inner = inner[part]
    inner[tag] = ""
    try:
        TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            if each["type"] == "union_tag_invalid" and each["loc"] == tuple(loc):
                return re.findall(r"'([^']+)'", each["ctx"]["expected_tags"])
    return []


def _locate(cls: type, tree: Tree, loc: Sequence[str | int]) -> tuple[Key, object]:
    """Split pydantic's location into keys that the user wrote and the class that owns the last of them.

    Pydantic mixes the names of union members into its locations; a part that is no key of the tree is one of those.
    """
    key: list[str | int] = []
    owner: object = cls
    node: object = tree
    for index, part in enumerate(loc):
        is_key = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if is_key or (index == len(loc) - 1 and is_dataclass(_member(owner, part) or owner) and _is_field(owner, part)):
            key.append(part)
            node = node[part] if is_key else None  # type: ignore[index]
            if index < len(loc) - 1:
                cls_of_owner = _without_none(owner)
                owner = get_type_hints(cls_of_owner).get(str(part), owner) if is_dataclass(cls_of_owner) else owner
        else:
            owner = _member(owner, part) or owner
    return tuple(key), _only_dataclass(owner)


def _without_none(annotation: object) -> object:
    """T of `T | None`; anything else as it is."""
    inner = get_args(annotation)
    return inner[0] if len(inner) == 2 and inner[1] is type(None) else annotation


def _is_field(owner: object, part: str | int) -> bool:
    only = _only_dataclass(owner)
    return is_dataclass(only) and part in {f.name for f in fields(only)}


def _members(annotation: object) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in get_args(annotation):
        yield from _members(argument)


def _member(annotation: object, part: str | int) -> type | None:
    """The dataclass of a union that pydantic calls `part`: by its class name, or by the value of its tag."""
    for member in _members(annotation):
        tags = {f.default for f in fields(member) if isinstance(f.default, str)} if is_dataclass(member) else set()
        if is_dataclass(member) and (member.__name__ == part or part in tags):
            return member
    return None


def _only_dataclass(annotation: object) -> object:
    found = [m for m in _members(annotation) if is_dataclass(m)]
    return found[0] if found else annotation
