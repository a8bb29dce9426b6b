"""Fields of requests -> how tokens are chosen."""

from collections.abc import Mapping
from typing import Any

from graftlm.errors import nearest
from graftlm.generation.grammar import Grammar
from graftlm.generation.sampling import Sampling
from graftlm.serve.errors import invalid, object_of
from graftlm.serve.protocol import OpenAISampled, Sampled

MOST_STOPS = 16


def sampling_of(body: Sampled) -> Sampling:
    """Without fields the temperature is 1, as OpenAI and Anthropic have it.

    At temperature 0 the likeliest token is chosen, and it is among the likeliest however many top_k, top_p and min_p
    leave.
    """
    temperature = 1.0 if body.temperature is None else float(body.temperature)
    given: dict[str, Any] = {}
    if temperature > 0:
        given = {"top_k": max(0, body.top_k or 0), "top_p": 1.0 if body.top_p is None else float(body.top_p)}
        if isinstance(body, OpenAISampled):
            given["min_p"] = float(body.min_p or 0.0)
    if isinstance(body, OpenAISampled):
        given["repetition_penalty"] = 1.0 if body.repetition_penalty is None else float(body.repetition_penalty)
        given["presence_penalty"] = float(body.presence_penalty or 0.0)
        given["frequency_penalty"] = float(body.frequency_penalty or 0.0)
        given["logit_bias"] = _bias(body.logit_bias or {})
    try:
        return Sampling(temperature, **given)
    except ValueError as error:
        raise invalid(str(error), "temperature") from None


def _bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    if wrong := [token for token in given if not (token.isascii() and token.isdigit() and len(token) < 10)]:
        raise invalid(f"logit_bias: {wrong[0]!r:.60} is no token id", "logit_bias")
    return tuple((int(token), float(bias)) for token, bias in given.items())


def grammar_of(given: Any, field: str = "response_format") -> Grammar | None:
    """What `response_format` of chat, or `text.format` of responses, wants an answer to be."""
    form = object_of(given, field)
    kind = form.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_object()
    if kind != "json_schema":
        near = nearest(str(kind), ["text", "json_object", "json_schema"])
        raise invalid(f"{field}.type is {kind!r:.60}. {near}", field)
    schema = (object_of(form.get("json_schema"), f"{field}.json_schema") or form).get("schema")
    if not isinstance(schema, Mapping):
        raise invalid(f"{field} has no schema: {{type: json_schema, json_schema: {{name, schema}}}}", field)
    return Grammar.json_schema(schema)


def stops_of(stop: str | list[str] | None, field: str = "stop") -> tuple[str, ...]:
    """The texts that end an answer."""
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in found:
        raise invalid("an empty text would end every answer before its first character", field)
    if len(found) > MOST_STOPS:
        raise invalid(f"{len(found)} texts end the answer, {MOST_STOPS} is the most", field)
    return found
