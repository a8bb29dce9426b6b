"""Answers by a JSON schema: how many are valid, and what following a schema costs.

python benchmarks/constrained/run.py              both, then result.json
python benchmarks/constrained/run.py --schemas 5  a look, without a result
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm import load_base  # noqa: E402
from graftlm.data.sources.formats import Message  # noqa: E402
from graftlm.generation.answer import chat_renderer  # noqa: E402
from graftlm.generation.engine import Engine  # noqa: E402
from graftlm.generation.grammar import Grammar, GrammarCompiler, Matcher  # noqa: E402
from graftlm.generation.requests import Generation, Request  # noqa: E402
from graftlm.generation.sampling import Sampling  # noqa: E402
from graftlm.hub.stopping import all_stop_ids  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
NAMES = ("name", "city", "color", "price", "count", "tags", "email", "born", "open", "items", "owner", "code", "unit")


def schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random schema whose values are bounded: maxLength, maxItems, minimum and maximum; an object at the top."""
    leaves = ("string", "string", "enum", "integer", "boolean", "pattern", "date", "nullable", "const")
    kind = "object" if depth == 0 else chance.choice(leaves + ("array", "object") * (depth < 3))
    if kind == "object":
        names = chance.sample(NAMES, chance.randrange(1, 5))
        return {
            "type": "object",
            "properties": {name: schema(chance, depth + 1) for name in names},
            "required": names if chance.random() < 0.7 else names[:1],
            "additionalProperties": False,
        }
    if kind == "array":
        least = chance.randrange(3)
        return {"type": "array", "items": schema(chance, depth + 2), "minItems": least, "maxItems": least + 2}
    return {
        "string": {"type": "string", "maxLength": chance.choice([1, 8, 30])},
        "enum": {"enum": chance.sample(["red", "green", "blue", 1, 2.5, None, True], 3)},
        "integer": {"type": "integer", "minimum": -chance.randrange(100), "maximum": chance.randrange(5000)},
        "boolean": {"type": "boolean"},
        "pattern": {"type": "string", "pattern": chance.choice(["^[A-Z]{2}-[0-9]{3}$", "^(a|b|cd){1,4}$"])},
        "date": {"type": "string", "format": "date"},
        "nullable": {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 2, "maxLength": 12}]},
        "const": {"const": chance.choice(["fixed", 7, False])},
    }[kind]


class Asking:
    """Requests for answers by schemas."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.renderer = chat_renderer(model, tokenizer)
        self.stop_ids = all_stop_ids(model, self.renderer.stop_ids)
        self.compiler = GrammarCompiler(self.renderer.tokenizer, self.stop_ids)

    def requests(self, one: dict[str, Any], count: int) -> list[Request]:
        text = f"Make up an example as JSON, by this JSON schema: {json.dumps(one)}"
        ids = self.renderer.prompt([Message("user", text)]).tolist()
        grammar = self.compiler.compile(Grammar.json_schema(one))
        first = Request(ids, CONFIG["max_new_tokens"], Sampling(1.0), self.stop_ids, grammar=grammar)
        return first.several(count)

    def is_valid(self, answer: Generation, one: dict[str, Any]) -> bool:
        try:
            jsonschema.validate(json.loads(self.renderer.decode(answer.answer_ids)), one)
        except (ValueError, jsonschema.ValidationError) as error:
            print("invalid:", answer.finish, error, json.dumps(one), self.renderer.decode(answer.ids), flush=True)
            return False
        return True


def validity(model: Any, asking: Asking, schemas: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[Generation]]:
    requests = [request for one in schemas for request in asking.requests(one, CONFIG["samples"])]
    answers = dict(Engine(model, max_requests=CONFIG["max_requests"]).run(requests))
    valid = [asking.is_valid(answer, schemas[number // CONFIG["samples"]]) for number, answer in answers.items()]
    lengths = [len(answer.ids) for answer in answers.values()]
    found = {"answers": len(valid), "valid": sum(valid), "tokens": {"sum": sum(lengths), "most": max(lengths)}}
    return found, [answers[number] for number in range(len(requests))]


def speed(model: Any, answers: Sequence[Generation], at_a_time: int, rounds: int) -> dict[str, Any]:
    """Seconds of the same answers, and of as many tokens without a grammar."""
    engine = Engine(model, max_requests=at_a_time)
    constrained = [answer.request for answer in answers]
    lengths = {number: len(answer.ids) for number, answer in engine.run(constrained)}  # others in another company
    free = [replace(one, grammar=None, stop_ids=(), max_new_tokens=lengths[n]) for n, one in enumerate(constrained)]
    took: dict[str, list[float]] = {"constrained": [], "free": []}
    for number in range(rounds + 1):  # the first is a warm-up
        for name, requests in (("constrained", constrained), ("free", free)):
            started = time.perf_counter()
            tokens = sum(len(answer.ids) for _, answer in engine.run(requests))
            seconds = time.perf_counter() - started
            assert tokens == sum(lengths.values())
            if number:
                took[name].append(seconds)
    ratios = [a / b for a, b in zip(took["constrained"], took["free"], strict=True)]
    return {
        "tokens": tokens,
        "seconds": {name: [round(each, 3) for each in some] for name, some in took.items()},
        "ratio": round(statistics.median(ratios), 3),
    }


def masks(answers: Sequence[Generation]) -> dict[str, float]:
    """Microseconds until a worker of the grammars has found out what may come next, over all tokens of the answers."""
    took = []
    for answer in answers:
        assert answer.request.grammar is not None
        matcher: Matcher = answer.request.grammar.matcher()
        matcher.bits()
        for token in answer.ids:
            started = time.perf_counter()
            matcher.take(token)
            matcher.bits()
            took.append(1e6 * (time.perf_counter() - started))
    took.sort()
    return {
        name: round(took[int(at * (len(took) - 1))]) for name, at in (("median", 0.5), ("p99", 0.99), ("most", 1.0))
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemas", type=int, default=CONFIG["schemas"])
    count = parser.parse_args().schemas
    torch.set_num_threads(CONFIG["threads"])
    model, tokenizer = load_base(CONFIG["base"], dtype=CONFIG["dtype"])
    asking = Asking(model, tokenizer)
    schemas = [schema(random.Random(number)) for number in range(count)]
    found, answers = validity(model, asking, schemas)
    print(found, flush=True)
    found["mask_microseconds"] = masks(answers)
    print(found["mask_microseconds"], flush=True)
    some = answers[: CONFIG["samples"] * CONFIG["speed"]["schemas"]]
    for at_a_time in CONFIG["speed"]["requests"]:
        part = some[:: CONFIG["samples"]] if at_a_time == 1 else some
        found[f"speed_at_{at_a_time}"] = speed(model, part, at_a_time, CONFIG["speed"]["rounds"])
        print(at_a_time, found[f"speed_at_{at_a_time}"], flush=True)
    if count == CONFIG["schemas"]:
        write_result(__file__, {"config": CONFIG, "found": found})


if __name__ == "__main__":
    main()
