"""Recipes as files and `key=value` strings: YAML with the line of every key, and overrides."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from graftlm.config.schema import build
from graftlm.config.trees import Key, Tree, dotted
from graftlm.errors import RecipeError, nearest

T = TypeVar("T")


def read(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The config that a YAML file and then `key=value` strings describe; raises RecipeError with file and line."""
    tree, lines = read_tree(path)
    for key in lay_over(tree, overrides):
        lines[key] = 0
        for depth in range(1, len(key)):
            lines.setdefault(key[:depth], 0)
    return build(cls, tree, source=str(path), lines=lines)


def read_tree(path: Path) -> tuple[Tree, dict[Key, int]]:
    """The mapping in a YAML file and the line of each of its keys; raises RecipeError with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        there = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such recipe. {nearest(str(path), there)}", code="no-such-recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}", code="unreadable-recipe") from None
    return parse_yaml(text, str(path))


def lay_over(tree: Tree, overrides: Sequence[str]) -> list[Key]:
    """Put the values of `key=value` strings into a tree, in place; returns their keys.

    The entries of a list are counted from 0 (`callbacks.0.ratio=4`), and a part of a key that holds dots is quoted
    (`delta.patterns."self_attn.q_proj".r=4`).
    """
    return [_put(tree, key, value) for key, value in map(_parse_override, overrides)]


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-4 as a string, for want of a dot; people who write a learning rate mean a number."""


Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+0123456789":
    Loader.yaml_implicit_resolvers.setdefault(_first, []).append(
        ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"))
    )


def parse_yaml(text: str, source: str) -> tuple[Tree, dict[Key, int]]:
    """A mapping and the line (from 1) of each of its keys. A key that is given twice is an error, not the last one."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}", code="invalid-yaml") from None
    finally:
        loader.dispose()
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{source}: a recipe is a mapping of keys to values, this is a {type(tree).__name__}", code="not-a-mapping"
        )
    lines: dict[Key, int] = {}
    for key, line in _key_lines(node, (), source):
        if key in lines:
            raise RecipeError(
                f"{source}:{line}: {dotted(key)} was already given in line {lines[key]}", code="repeated-key"
            )
        lines[key] = line
    return tree, lines


def _key_lines(
    node: yaml.Node | None, prefix: Key, source: str, around: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[Key, int]]:
    if node is not None and any(node is each for each in around):
        raise RecipeError(
            f"{source}:{node.start_mark.line + 1}: {dotted(prefix)} is an alias of what it is in, so it never ends",
            code="endless-alias",
        )
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), key.start_mark.line + 1
            yield from _key_lines(value, (*prefix, key.value), source, (*around, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _key_lines(value, (*prefix, index), source, (*around, node))


_PART = re.compile(r"""(?:"([^"]+)"|'([^']+)'|([^.="']+))([.=])""")
"""A part of an override's key, bare or in quotation marks, and what comes after it."""


def _parse_override(text: str) -> tuple[tuple[str, ...], object]:
    key, at, after = list[str](), 0, "."
    while after == "." and (part := _PART.match(text, at)):
        key.append(next(filter(None, part.groups())))
        at, after = part.end(), part[4]
    if after != "=":
        raise RecipeError(
            f"{text!r}: write an override as key=value, for example train.steps=100; a part of the key that holds a "
            "dot is quoted",
            code="malformed-override",
        )
    try:
        return tuple(key), yaml.load(text[at:], Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r}: the value is not valid YAML: {error}", code="invalid-yaml") from None


SHORT = {
    "base": "name",
    "loss": "name",
    "optimizer": "name",
    "callbacks": "name",
    "data.train": "path",
    "data.held_out": "path",
}
"""Keys whose value may be a text alone, and the key inside that the text stands for."""


LISTS = ("data.train", "callbacks", "regularisers", "select")
"""Keys whose value may be one entry or a list of them."""


def _put(tree: Tree, key: Sequence[str], value: object) -> Key:
    """Put a value into the tree; the key as it is there, with numbers for the entries of lists."""
    real: list[str | int] = []
    holder: Any = {"": tree}
    last: str | int = ""
    for part in key:
        inner, name = holder[last], ".".join(each for each in real if isinstance(each, str))
        if part.isdecimal() and name in LISTS and isinstance(inner, str | dict):
            inner = holder[last] = [inner]
        elif isinstance(inner, str) and name in SHORT:
            inner = holder[last] = {SHORT[name]: inner}
        elif inner is None:
            inner = holder[last] = {}
        if isinstance(inner, list):
            if not part.isdecimal():
                raise RecipeError(
                    f"{dotted(key)}: {name} is a list: write which entry, as in {dotted((*real, 0))}.{part}",
                    code="list-without-index",
                )
            if int(part) >= len(inner):
                raise RecipeError(
                    f"{dotted(key)}: {dotted(real)} has {len(inner)} entries, which are counted from 0",
                    code="index-out-of-range",
                )
            holder, last = inner, int(part)
        elif isinstance(inner, dict):
            inner.setdefault(part, None)
            holder, last = inner, part
        else:
            raise RecipeError(
                f"{dotted(key)}: {dotted(real)} is {inner!r}, so it has no keys inside", code="no-nested-keys"
            )
        real.append(last)
    holder[last] = value
    return tuple(real)
