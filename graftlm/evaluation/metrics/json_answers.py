"""Answers that are JSON.

json_valid    1 where the answer is JSON and nothing else
json_schema   1 where it is, and it is valid by the row's field `schema` (JSON Schema, draft 2020-12 unless it names
              another one), as jsonschema has it
json_match    1 where it equals a reference as JSON: spaces and the order of keys do not count, types do
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from graftlm.config.schema import config
from graftlm.errors import DataError, RecipeError
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, field_of, references, scores


@config
class JsonValidConfig(MetricConfig):
    name: Literal["json_valid"] = "json_valid"


@config
class JsonSchemaConfig(MetricConfig):
    name: Literal["json_schema"] = "json_schema"


@config
class JsonMatchConfig(MetricConfig):
    name: Literal["json_match"] = "json_match"


class NoJson(ValueError):
    """A text that is no JSON."""


def read(text: str) -> Any:
    """The value that a text is; NoJson where it is none. Python's NaN and Infinity are no JSON."""
    try:
        return json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise NoJson(str(error)) from None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def json_valid(answer: str) -> float:
    try:
        read(answer)
    except NoJson:
        return 0.0
    return 1.0


def json_schema(answer: str, schema: Any, where: str = "") -> float:
    """RecipeError where jsonschema is not installed; DataError for what is no schema."""
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from jsonschema_specifications import REGISTRY
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise RecipeError(
            "metric 'json_schema': jsonschema is not installed here: pip install 'graftlm[eval]'",
            code="missing-package",
        ) from None
    schema = _parsed(schema)
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise DataError(f"{where}: `schema` is no JSON Schema: {error.message:.200}", code="invalid-schema") from None
    try:
        # with a registry of its own, so that a `$ref` is not fetched from the network
        return float(kind(schema, registry=REGISTRY).is_valid(read(answer)))
    except NoJson:
        return 0.0
    except Unresolvable as error:
        raise DataError(
            f"{where}: `schema` refers to {error.ref!r}, which is not in it: write it there under `$defs`",
            code="invalid-schema",
        ) from None


def _parsed(schema: Any) -> Any:
    """A schema; one that stands in a row as text is read."""
    if isinstance(schema, str):
        try:
            return read(schema)
        except NoJson:
            return schema
    return schema


def json_match(answer: str, wanted: Sequence[str]) -> float:
    try:
        found = json.dumps(read(answer), sort_keys=True)
    except NoJson:
        return 0.0
    return float(any(found == json.dumps(read(each), sort_keys=True) for each in wanted))


def _valid(config: JsonValidConfig, items: Sequence[Answer]) -> Array:
    return scores([json_valid(item.text) for item in items])


def _by_schema(config: JsonSchemaConfig, items: Sequence[Answer]) -> Array:
    return scores([json_schema(item.text, field_of(item, "schema", config.name), item.where) for item in items])


def _match(config: JsonMatchConfig, items: Sequence[Answer]) -> Array:
    for item in items:
        for each in references(item, config.name):
            if not json_valid(each):
                raise DataError(
                    f"{item.where}: metric 'json_match' compares JSON, and the row's answer is none: {each!r:.100}",
                    code="reference-not-json",
                )
    return scores([json_match(item.text, item.references) for item in items])


ROWS = {
    "json_valid": MetricRow(JsonValidConfig, (Answer,), _valid),
    "json_schema": MetricRow(JsonSchemaConfig, (Answer,), _by_schema),
    "json_match": MetricRow(JsonMatchConfig, (Answer,), _match),
}
