"""Plain trees of a config: dotted keys, and what differs between two."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Tree = dict[str, Any]


Key = tuple[str | int, ...]


def flat(tree: object, prefix: str = "") -> dict[str, Any]:
    """A tree by its dotted keys; lists and empty mappings are values."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two trees, a line each: `train.steps: 50 -> 100`."""
    was, now = flat(before), flat(after)
    keys = [key for key in dict.fromkeys((*was, *now)) if was.get(key) != now.get(key)]
    return [f"{key}: {_as_json(was.get(key))} -> {_as_json(now.get(key))}" for key in keys]


def _as_json(value: object) -> str:
    return "(not there)" if value is None else json.dumps(value)


def dotted(key: Sequence[str | int]) -> str:
    return ".".join(map(str, key))
