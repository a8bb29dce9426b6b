"""Frozen dataclasses <-> YAML and `key=value`, read by pydantic.

A config class stands beside the class that it configures and carries `@config`. It checks itself wherever it is
made: from YAML, from the command line or in Python. Reading is strict: an unknown key, a key given twice, a wrong
type or a value out of range is an error that names file, line, key and what is near.
"""

import ast
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import dataclass_transform  # in typing from Python 3.11 on; pydantic brings it

from graftlm.config.explain import UNKNOWN, explain
from graftlm.config.trees import Key, Tree
from graftlm.errors import RecipeError

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


def build(cls: type[T], tree: Tree, *, source: str, lines: Mapping[Key, int] | None = None) -> T:
    """A config from a plain tree. Errors name `source`, the line of the key in `lines`, and the nearest known key."""
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        found = [explain(cls, tree, e, source, lines or {}) for e in error.errors(include_url=False)]
        # pydantic reports an error for every member of a union: keep those of the member whose type fits.
        nearer = {key[:depth] for key, _, _ in found for depth in range(len(key))}
        nearer |= {key for key, kind, _ in found if not kind.endswith("_type")}
        problems = [text for key, kind, text in found if not (kind.endswith("_type") and key in nearer)]
        message = "\n".join(dict.fromkeys(problems))
        if any(kind in UNKNOWN for _, kind, _ in found):
            raise RecipeError(message, code="unknown-key") from None
        raise RecipeError(message, code="invalid-value") from None


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
        json_schema = super().dataclass_schema(schema)
        lineage: tuple[type, ...] = schema["cls"].__mro__
        for parent in filter(is_dataclass, reversed(lineage)):
            for name, text in _field_docs(parent).items():
                if name in json_schema["properties"]:  # a ClassVar is none
                    json_schema["properties"][name]["description"] = text
        return json_schema


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
