"""Frozen dataclasses <-> YAML and `key=value`, read by pydantic.

A config class stands beside the class that it configures and carries `@config`. It checks itself wherever it is
made: from YAML, from the command line or in Python. Reading is strict: an unknown key, a key given twice, a wrong
type or a value out of range is an error that names file, line, key and what is near.
"""

import ast
import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import dataclass_transform  # in typing from Python 3.11 on; pydantic brings it

from graftlm.errors import RecipeError, nearest

Tree = dict[str, Any]
Key = tuple[str | int, ...]
T = TypeVar("T")


def expression(text: str) -> str:
    """The text; ValueError where it is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return text


Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=0)]
PositiveCount = Annotated[int, Strict(), Field(gt=0)]
Rate = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
PositiveRate = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Strict(), Field(ge=0, le=1)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1)]
Pattern = Annotated[str, AfterValidator(expression)]
"""A regular expression of Python's."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that refuses unknown keys, wrong types and values out of range."""
    return pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)  # type: ignore[return-value]


def read(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The config that a YAML file and then `key=value` strings describe; raises RecipeError with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        there = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such recipe. {nearest(str(path), there)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from None
    tree, lines = parse_yaml(text, str(path))
    for key in lay_over(tree, overrides):
        lines[key] = 0
        for depth in range(1, len(key)):
            lines.setdefault(key[:depth], 0)
    return build(cls, tree, source=str(path), lines=lines)


def lay_over(tree: Tree, overrides: Sequence[str]) -> list[Key]:
    """Put the values of `key=value` strings into a tree, in place; returns their keys.

    The entries of a list are counted from 0 (`policies.0.ratio=4`), and a part of a key that holds dots is quoted
    (`delta.patterns."self_attn.q_proj".r=4`).
    """
    return [_put(tree, key, value) for key, value in map(_parse_override, overrides)]


def build(cls: type[T], tree: Tree, *, source: str, lines: Mapping[Key, int] | None = None) -> T:
    """A config from a plain tree. Errors name `source`, the line of the key in `lines`, and the nearest known key."""
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        found = [_explain(cls, tree, e, source, lines or {}) for e in error.errors(include_url=False)]
        # What is of another kind than one member of a union wants is of the kind that another wants, and wrong there.
        nearer = {key[:depth] for key, _, _ in found for depth in range(len(key))}
        nearer |= {key for key, kind, _ in found if not kind.endswith("_type")}
        problems = [said for key, kind, said in found if not (kind.endswith("_type") and key in nearer)]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from None


def to_tree(value: object) -> Tree:
    """The plain tree (dicts, lists, strings, numbers) that `build` reads back to an equal config."""
    tree: Tree = TypeAdapter(type(value)).dump_python(value, mode="json")
    return tree


def to_yaml(value: object) -> str:
    """The written form of a config: every key, defaults included, in the order of its class."""
    return yaml.safe_dump(to_tree(value), sort_keys=False, allow_unicode=True)


def json_schema(cls: type) -> str:
    """The JSON Schema of a config class, from which editors complete and check recipes."""
    return json.dumps(TypeAdapter(cls).json_schema(schema_generator=_WithDocs), indent=2) + "\n"


class _WithDocs(GenerateJsonSchema):
    """Describes each field by the string under it.

    Pydantic would do so too (`use_attribute_docstrings`), but for each class when it is made, which takes as long as
    all other imports of this package together.
    """

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        made = super().dataclass_schema(schema)
        lineage: tuple[type, ...] = schema["cls"].__mro__
        for parent in filter(is_dataclass, reversed(lineage)):
            for name, text in _field_docs(parent).items():
                if name in made["properties"]:  # a ClassVar is none
                    made["properties"][name]["description"] = text
        return made


def _field_docs(cls: type) -> dict[str, str]:
    """The strings that stand under the fields of a class, in its source; none where it has no source."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    (node,) = ast.parse(dedent(source)).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(under.value.value)
        for field, under in pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(under, ast.Expr) and isinstance(under.value, ast.Constant) and isinstance(under.value.value, str)
    }


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
    return [f"{key}: {_said(was.get(key))} -> {_said(now.get(key))}" for key in keys]


def _said(value: object) -> str:
    return "(not there)" if value is None else json.dumps(value)


# YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-4 as a string, for want of a dot; people who write a learning rate mean a number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).append(
        ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"))
    )


def parse_yaml(text: str, source: str) -> tuple[Tree, dict[Key, int]]:
    """A mapping and the line (from 1) of each of its keys. A key that is given twice is an error, not the last one."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    finally:
        loader.dispose()
    if not isinstance(tree, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of keys to values, this is a {type(tree).__name__}")
    lines: dict[Key, int] = {}
    for key, line in _key_lines(node, (), source):
        if key in lines:
            raise RecipeError(f"{source}:{line}: {_dotted(key)} was already given in line {lines[key]}")
        lines[key] = line
    return tree, lines


def _key_lines(
    node: yaml.Node | None, prefix: Key, source: str, around: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[Key, int]]:
    if node is not None and any(node is each for each in around):
        raise RecipeError(
            f"{source}:{node.start_mark.line + 1}: {_dotted(prefix)} is an alias of what it is in, so it never ends"
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
            "dot is quoted"
        )
    try:
        return tuple(key), yaml.load(text[at:], _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r}: the value is not valid YAML: {error}") from None


SHORT = {"base": "name", "loss": "name", "policies": "name", "data.train": "path", "data.held_out": "path"}
"""Keys whose value may be a text alone, and the key inside that the text stands for."""

LISTS = ("data.train", "policies", "regularisers", "select")
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
                    f"{_dotted(key)}: {name} is a list: write which entry, as in {_dotted((*real, 0))}.{part}"
                )
            if int(part) >= len(inner):
                raise RecipeError(f"{_dotted(key)}: {_dotted(real)} has {len(inner)} entries, which are counted from 0")
            holder, last = inner, int(part)
        elif isinstance(inner, dict):
            inner.setdefault(part, None)
            holder, last = inner, part
        else:
            raise RecipeError(f"{_dotted(key)}: {_dotted(real)} is {inner!r}, so it has no keys inside")
        real.append(last)
    holder[last] = value
    return tuple(real)


# Errors ----------------------------------------------------------------------------------------------------------


def _explain(cls: type, tree: Tree, error: Any, source: str, lines: Mapping[Key, int]) -> tuple[Key, str, str]:
    """One pydantic error: its key, its kind, and `file:line: key: what, what is near`."""
    key, owner = _locate(cls, tree, error["loc"])
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    where = source if line is None else "command line" if line == 0 else f"{source}:{line}"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if (instead := getattr(owner, "REPLACED", {}).get(str(key[-1]))) is not None:
            return key, error["type"], f"{where}: {_dotted(key)}: this key was replaced by {instead}"
        if (instead := getattr(cls, "OTHER_NAMES", {}).get(str(key[-1]).lower().replace("-", "_"))) is not None:
            return key, error["type"], f"{where}: {_dotted(key)}: unknown key. Here it is {instead}"
        known = [f.name for f in fields(owner)] if is_dataclass(owner) else []
        homes = [home for home in _homes(cls, str(key[-1])) if home != _dotted(key)]
        if 0 < len(homes) <= MOST_HOMES:
            return key, error["type"], f"{where}: {_dotted(key)}: unknown key. Here it is {' or '.join(homes)}"
        return key, error["type"], f"{where}: {_dotted(key)}: unknown key. {nearest(str(key[-1]), known)}"
    if error["type"] in ("missing", "missing_argument"):
        return key, error["type"], f"{where}: {_dotted(key)}: this key has no default and must be given"
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        tag = error["ctx"]["discriminator"].strip("'")
        known = _tags(cls, tree, error["loc"], tag)
        if error["type"] == "union_tag_not_found":
            given = ", ".join(map(str, error["input"])) if isinstance(error["input"], dict) else error["input"]
            which = f"say which: `{tag}: NAME` beside {given}. {nearest('', known)}"
            return key, error["type"], f"{where}: {_dotted(key)}.{tag}: {which}"
        name = str(error["ctx"]["tag"])
        return key, error["type"], f"{where}: {_dotted(key)}.{tag}: {name!r} is unknown. {nearest(name, known)}"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (given: {given!r})" if not isinstance(given, dict | list | tuple) else ""
    return key, error["type"], f"{where}: {_dotted(key) or 'the recipe'}: {message}{shown}"


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
                owner = get_type_hints(owner).get(str(part), owner) if is_dataclass(owner) else owner
        else:
            owner = _member(owner, part) or owner
    return tuple(key), _only_dataclass(owner)


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


def _dotted(key: Sequence[str | int]) -> str:
    return ".".join(map(str, key))
