"""Answers that follow a grammar: valid whatever a random model would say, in any company."""

import json
import re
import sys
from typing import Any

import jsonschema
import pytest
import torch

from graftlm.generation.engine import Engine
from graftlm.generation.grammar import CompiledGrammar, Grammar, GrammarCompiler, mask_logits
from graftlm.generation.requests import Generation, Request
from graftlm.generation.sampling import Sampling
from graftlm.testing import tiny_model, tiny_tokenizer
from tests.architectures import build
from tests.errors import raises

pytest.importorskip("llguidance")

STOP = (2, 0)
PROMPT = [7, 30, 12]
PLACE = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    {"enum": ["yes", "no", 3, None]},
    {"type": "string", "maxLength": 12},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 4},
    PLACE,
    {"type": "array", "items": {"$ref": "#/$defs/place"}, "minItems": 2, "maxItems": 2, "$defs": {"place": PLACE}},
    {"anyOf": [{"type": "string", "pattern": "^[a-c]{2,5}$"}, {"type": "integer", "minimum": -5, "maximum": 5}]},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 8}, "at": PLACE},
        "required": ["name"],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def model() -> Any:
    """Of more ids than its tokenizer has, as padded vocabularies are."""
    return tiny_model(vocab_size=333, initializer_range=0.3)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), STOP)


def asked(grammar: CompiledGrammar | None, seed: int, count: int = 200, temperature: float = 1.0) -> Request:
    return Request(PROMPT, count, Sampling(temperature, seed=seed), stop_ids=STOP, grammar=grammar)


def text(answer: Generation) -> str:
    return str(tiny_tokenizer().decode(answer.answer_ids))


def test_every_answer_is_valid_by_its_schema_and_ends_by_itself(model: Any, compiler: GrammarCompiler) -> None:
    grammars = [compiler.compile(Grammar.json_schema(schema)) for schema in SCHEMAS]
    requests = [asked(grammar, seed) for grammar in grammars for seed in range(4)]
    for number, answer in Engine(model).run(requests):
        assert answer.finish == "stop"
        found = json.loads(text(answer))
        jsonschema.validate(found, SCHEMAS[number // 4])
        assert text(answer) == json.dumps(found, ensure_ascii=False) or "\\" in text(answer), "in one line"


def test_other_requests_of_a_batch_are_as_without_it(model: Any, compiler: GrammarCompiler) -> None:
    alone = [answer.ids for _, answer in sorted(Engine(model).run([asked(None, n, 20) for n in range(3)]))]
    grammar = compiler.compile(Grammar.json_schema(PLACE))
    both = [asked(grammar, 9), *(asked(None, n, 20) for n in range(3)), asked(grammar, 10, temperature=0)]
    found = dict(Engine(model).run(both))
    assert [found[n].ids for n in (1, 2, 3)] == alone
    jsonschema.validate(json.loads(text(found[4])), PLACE)


def test_what_a_stop_id_ends_is_complete_by_the_grammar(model: Any, compiler: GrammarCompiler) -> None:
    """Some answers go on as long as they can, and some are ended where they may be."""
    grammar = compiler.compile(Grammar.regex("(ab){2,30}"))
    push = Sampling(1.0, logit_bias=((STOP[0], 4.0),))
    requests = Request(PROMPT, 80, push, STOP, grammar=grammar).several(12)
    found = [answer for _, answer in Engine(model).run(requests)]
    assert all(re.fullmatch("(ab){2,30}", text(answer)) and answer.finish == "stop" for answer in found)
    assert any(answer.ids[-1] == STOP[0] and answer.answer_ids[-1:] != [STOP[0]] for answer in found)


def test_an_answer_that_is_cut_off_is_a_beginning(model: Any, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Grammar.json_schema(PLACE))
    ((_, answer),) = Engine(model).run([asked(grammar, 0, count=4)])
    assert answer.finish == "length"
    assert text(answer).startswith('{"x"')


def test_regex_choice_and_lark(model: Any, compiler: GrammarCompiler) -> None:
    given = {
        Grammar.regex("[0-9]{3}-[a-f]{2}"): "[0-9]{3}-[a-f]{2}",
        Grammar.choice(['say "no"', "yes\n", "ja"]): '(say "no"|yes\n|ja)',
        Grammar.lark('start: "<" num ">" <[1]>\nnum: /[0-9]{1,3}/'): "<[0-9]{1,3}>",
    }
    requests = [asked(compiler.compile(grammar), seed) for grammar in given for seed in range(3)]
    for number, answer in Engine(model).run(requests):
        assert re.fullmatch([*given.values()][number // 3], str(tiny_tokenizer().decode(answer.answer_ids, True)))
        assert (1 in answer.ids) == (number >= 6), "a token is named by its id"


def test_any_json_object(model: Any, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Grammar.json_object())
    answers = [answer for _, answer in Engine(model).run([asked(grammar, seed, 60) for seed in range(8)])]
    assert all(text(answer).startswith("{") for answer in answers)
    ended = [answer for answer in answers if answer.finish == "stop"]
    assert ended
    assert all(isinstance(json.loads(text(answer)), dict) for answer in ended)


def test_a_model_that_transformers_runs_follows_grammars_too(compiler: GrammarCompiler) -> None:
    engine = Engine(build("mamba"))
    assert engine.reason
    for _, answer in engine.run([asked(compiler.compile(Grammar.json_schema(PLACE)), seed) for seed in range(2)]):
        jsonschema.validate(json.loads(text(answer)), PLACE)


def test_a_mask_of_fewer_and_of_more_ids_than_the_tokenizer_has(compiler: GrammarCompiler) -> None:
    for size in (290, 300, 301, 340):
        logits = torch.zeros(3, size)
        first, second = (compiler.compile(Grammar.regex(text)).matcher() for text in "ab")
        mask_logits(logits, [first, None, second])
        a, b = tiny_tokenizer().convert_tokens_to_ids(["a", "b"])
        assert torch.isfinite(logits).nonzero().tolist() == [[0, a], *([1, n] for n in range(size)), [2, b]]
        mask_logits(logits[1:2], [second])
        assert torch.isfinite(logits[1]).nonzero().tolist() == [[b]]


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    schema = Grammar.json_schema(PLACE)
    assert compiler.compile(schema) is compiler.compile(Grammar.json_schema(dict(PLACE)))


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "#/properties/a/uniqueItems"),
        ({"anyOf": [{"type": "string"}, {"not": {"type": "null"}}]}, "#/anyOf/1/not"),
        ({"type": "strin"}, "strin"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "anyOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/nope"}, "/nope"),
    ],
)
def test_what_of_a_schema_is_not_supported_is_named(
    compiler: GrammarCompiler, schema: dict[str, Any], names: str
) -> None:
    with raises("request/unsupported-schema", match=re.escape(names)):
        compiler.compile(Grammar.json_schema(schema))


def test_wrong_grammars_are_refused_with_their_place(compiler: GrammarCompiler) -> None:
    with raises("request/invalid-grammar", match="unclosed group"):
        compiler.compile(Grammar.regex("(a"))
    with raises("request/invalid-grammar", match="nowhere"):
        compiler.compile(Grammar.lark("start: nowhere"))
    with raises("request/no-schema"):
        Grammar.json_schema([1])  # type: ignore[arg-type]
    with raises("request/no-choice"):
        Grammar.choice([])


def test_a_limit_of_the_grammar_ends_its_own_request_alone(model: Any, compiler: GrammarCompiler) -> None:
    grammar, engine = compiler.compile(Grammar.json_schema(PLACE)), Engine(model)
    bad, good = engine.submit(asked(grammar, 0)), engine.submit(asked(grammar, 1))
    engine._take_turn(bad)
    (matcher,) = (one.chooser.matcher for one in engine._running if one.generation is bad)
    assert matcher is not None
    assert not matcher.bits()[-1] >> (298 % 32) & 1
    matcher._state.consume_token(298)
    jsonschema.validate(json.loads(text(engine.wait(good))), PLACE)
    with raises("request/grammar-too-complex"):
        engine.wait(bad)


def test_stop_ids_that_the_grammar_does_not_know_are_refused(model: Any, compiler: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match="compiled for"):
        Engine(model).submit(Request(PROMPT, 4, stop_ids=[5], grammar=compiler.compile(Grammar.regex("a"))))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with raises("request/missing-package", match=re.escape("pip install 'graftlm[serve]'")):
        GrammarCompiler(tiny_tokenizer(), STOP)


def test_a_tokenizer_that_cannot_be_read_is_named() -> None:
    with raises("request/unsupported-tokenizer"):
        GrammarCompiler(object(), STOP)
