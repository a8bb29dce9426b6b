"""What every metric of the table keeps, and what single ones are beyond the values of others."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftlm.evaluation.metrics import METRICS, Answer, Choice, Likelihood, MetricRow, Outcome, metric_of, shown_name
from graftlm.evaluation.metrics.choice import EceConfig, ece, ece_parts
from graftlm.evaluation.metrics.gestalt import gestalt
from graftlm.evaluation.metrics.instructions import INSTRUCTIONS, follows, sentences
from graftlm.evaluation.metrics.tool_calls import Call, calls_in
from graftlm.evaluation.metrics.words import squad_text, tokens
from graftlm.evaluation.task import OUTCOMES
from tests.errors import raises

FILE = Path(__file__).with_name("own_metrics.py")
FIELDS: dict[str, Any] = {
    "schema": {"type": "array"},
    "calls": [{"name": "f", "arguments": {"a": 1}}],
    "instructions": [{"name": "punctuation:no_comma"}, {"name": "codi:length", "at_most": 30}],
    "choices": ["2.5", "-1", "12", "7"],
    "group": "add/1",
}
NUMBERS = ("2.5", "-1", "12", "7")
SENTENCES = (
    "the cat sat on the mat today",
    "a dog runs over the green hill",
    "nobody knows where birds sleep at night",
    "seven of them came back home again",
)
JSON = ('[{"a": 1}]', "[1, 2]", "[true]", '["x"]')
CALLS = ('{"name": "f", "arguments": {"a": 1}}', "f(a=1)", "[f(a=1.0)]", '<tool_call>{"name":"f","arguments":{"a":1}}')
OTHERS = {"chrf", "chrf++", "bleu", "ter", "nist", "meteor", "cider"}


def entry(name: str) -> Any:
    return {"python": f"{FILE}:known"} if name == "python" else name


def perfect(name: str) -> list[Outcome]:
    """Items whose answers could not be better."""
    kind = METRICS[name].outcomes[-1]
    if kind is Answer or name == "python":
        texts = SENTENCES if name in OTHERS else NUMBERS
        texts = JSON if name.startswith("json") else CALLS if name.startswith("tool") else texts
        return [Answer(text, (text,), fields=FIELDS, where=f"f:{n}") for n, text in enumerate(texts)]
    if kind is Choice:
        return [
            Choice(tuple(0.0 if c == n % 3 else -800.0 for c in range(3)), ("a", "bb", "ccc"), (n % 3,), (-1.0,) * 3)
            for n in range(4)
        ]
    return [Likelihood(0.0, 3, text, greedy=True) for text in SENTENCES]


def imperfect(name: str) -> list[Outcome]:
    """The same items with other answers."""
    draw = random.Random(name)
    found: list[Outcome] = []
    for number, item in enumerate(perfect(name)):
        if isinstance(item, Answer):
            text = (*SENTENCES, *NUMBERS, "f(a=2)", "{")[(number * 5 + 3) % 10]
            text = text if number else "one, two, " + item.text
            found.append(replace(item, text=NUMBERS[number - 1] if name in ("pearson", "spearman") else text))
        elif isinstance(item, Choice):
            found.append(replace(item, log_probs=tuple(draw.uniform(-9, -1) for _ in item.texts)))
        else:
            found.append(replace(item, log_prob=draw.uniform(-30, -1), greedy=False))
    return found


def value(name: str, items: Sequence[Outcome]) -> float:
    config = metric_of(entry(name), "test")
    row = METRICS[config.name]
    parts = row.parts(config, items)
    assert parts.shape[0] == len(items)
    assert np.isfinite(parts).all()
    return float(row.value(parts.sum(0)))


@pytest.mark.parametrize("name", METRICS)
def test_perfect_answers_have_the_best_value(name: str) -> None:
    row, found = METRICS[name], value(name, perfect(name))
    other = value(name, imperfect(name))
    if name in ("nist", "meteor", "cider", "python"):  # even a reference itself is below the bound
        assert found <= row.high
    else:
        assert found == pytest.approx(row.best, abs=1e-12)
    assert row.low <= other <= row.high
    assert found > other if row.higher_is_better else found < other


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_items_changes_nothing(name: str) -> None:
    items = imperfect(name)
    shuffled = [items[n] for n in (2, 0, 3, 1)]
    assert value(name, shuffled) == pytest.approx(value(name, items), abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_values_of_many_sums_are_those_of_each(name: str) -> None:
    """What the bootstrap hands over: sums [draws, k]."""
    config = metric_of(entry(name), "test")
    row = METRICS[config.name]
    parts = row.parts(config, [*imperfect(name), *perfect(name)])
    sums = np.stack([parts.sum(0), parts[:4].sum(0) + parts[2:7].sum(0), 2 * parts[1:].sum(0)])
    one_by_one = [float(row.value(each)) for each in sums]
    assert row.value(sums).tolist() == pytest.approx(one_by_one, nan_ok=True)


def test_a_mean_is_the_mean_of_its_items() -> None:
    for name, row in METRICS.items():
        if row.per_item:
            items = imperfect(name)
            config = metric_of(entry(name), "test")
            parts = row.parts(config, items)
            defined = parts[parts[:, 1] == 1, 0]
            assert value(name, items) == pytest.approx(float(defined.mean()))


def test_configs_have_the_names_of_the_table() -> None:
    for name, row in METRICS.items():
        given = {"function": "metrics.py:f"} if name == "python" else {}
        assert row.config(**given).name == name  # type: ignore[call-arg]
        assert row.low < row.high


def test_the_page_has_a_row_for_every_metric() -> None:
    page = (FILE.parents[3] / "docs" / "how-to" / "evaluate.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (\S+) to (\S+) \| (\w+) \| ([^|]+) \|", page, re.M)
    kinds = {kind: name for name, kind in OUTCOMES.items()}

    def said(row: MetricRow) -> tuple[str, ...]:
        ends = (f"{end:g}" if np.isfinite(end) else "-" for end in (row.low, row.high))
        better = "higher" if row.higher_is_better else "lower"
        of = ", ".join(kinds[each] for each in row.outcomes)
        return of, *ends, better, "mean of rows" if row.per_item else "of the corpus"

    assert {name: tuple(cells) for name, *cells in shown} == {name: said(row) for name, row in METRICS.items()}


# Single ones ---------------------------------------------------------------------------------------------------------


def test_exact_match_takes_the_last_match_and_any_alias() -> None:
    metric = {"name": "exact_match", "take": "#### (.*)"}
    items = [Answer("#### 3\n#### 4", ("so #### 4",)), Answer("4", ("#### 4",)), Answer("#### 4", ("#### 3", "#### 4"))]
    config = metric_of(metric, "test")
    assert METRICS["exact_match"].parts(config, items)[:, 0].tolist() == [1, 0, 1]


def test_texts_by_hand() -> None:
    assert squad_text("The  Answer, an apple!") == "answer apple"
    assert tokens("It's 3.5!") == ["it", "'", "s", "3", ".", "5", "!"]
    f1 = METRICS["set_f1"]
    config = metric_of({"name": "set_f1", "separator": ";"}, "test")
    items = [Answer("Red; blue ;blue", ("blue; green",)), Answer("", ("",)), Answer("a", ("b", " A "))]
    assert f1.parts(config, items)[:, 0].tolist() == [0.5, 1.0, 1.0]
    assert gestalt("abcd", "bcde") == 0.75
    assert gestalt("x" * 300 + "abc", "abc" + "x" * 300) > 0.9, "no character is ignored for being frequent"


def test_calibration_by_a_plain_function() -> None:
    draw = random.Random(0)
    items = [
        Choice(tuple(draw.uniform(-3, 0) for _ in range(3)), ("a", "b", "c"), (draw.randrange(3),)) for _ in range(200)
    ]
    parts = ece_parts(EceConfig(bins=10), items)
    wanted = 0.0
    for low in range(10):
        inside = [i for i in items if low / 10 < i.probabilities.max() <= (low + 1) / 10]
        if inside:
            right = sum(i.best in i.gold for i in inside) / len(inside)
            sure = sum(float(i.probabilities.max()) for i in inside) / len(inside)
            wanted += len(inside) / len(items) * abs(right - sure)
    assert float(ece(parts.sum(0))) == pytest.approx(wanted)
    assert wanted > 0.02
    nll = -np.mean([np.log(i.probabilities[i.gold[0]]) for i in items])
    assert value("choice_nll", items) == pytest.approx(nll)


def test_several_right_choices() -> None:
    item = Choice((-1.0, -1.0, -5.0), ("a", "b", "c"), (0, 1))
    assert value("acc", [item]) == value("acc_norm", [item]) == 1
    assert value("brier_score", [item]) == pytest.approx(0, abs=0.01)
    assert value("choice_nll", [item]) == pytest.approx(-np.log(item.probabilities[:2].sum()))


def test_tokens_and_nats() -> None:
    items = [Likelihood(-6.0, 2, "ab"), Likelihood(-2.0, 2, "c")]
    assert value("nats_per_token", items) == 2
    assert value("token_perplexity", items) == pytest.approx(np.exp(2))
    assert value("acc", items) == 0


def test_numbers_that_are_none_count_as_said() -> None:
    items = [Answer("1", ("1",)), Answer("no idea", ("2",)), Answer("3", ("3",))]
    config = metric_of({"name": "pearson", "otherwise": 2.0}, "test")
    parts = METRICS["pearson"].parts(config, items)
    assert float(METRICS["pearson"].value(parts.sum(0))) == pytest.approx(1)
    flat = [replace(item, text="5") for item in items]
    assert np.isnan(value("pearson", flat))


FORMS = {
    '{"name": "f", "arguments": {"a": 1}}': [Call("f", {"a": 1})],
    '[{"name": "f", "parameters": {}}, {"g": {"x": [1]}}]': [Call("f", {}), Call("g", {"x": [1]})],
    '{"function": {"name": "f", "arguments": "{\\"a\\": 1}"}}': [Call("f", {"a": 1})],
    '{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}': [Call("f", {}), Call("g", {})],
    '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>': [Call("f", {"a": "b"})],
    '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "b"}}]': [Call("f", {"a": "b"})],
    "[geo.f(a=(1, 2), b={'c': None}), g()]": [Call("geo.f", {"a": [1, 2], "b": {"c": None}}), Call("g", {})],
    "f(1)": [],
    "f(a=__import__('os'))": [],
    "I would call f": [],
    "": [],
    "(" * 5000: [],
}


@pytest.mark.parametrize("text", FORMS, ids=range(len(FORMS)))
def test_calls_are_read_in_each_form(text: str) -> None:
    assert calls_in(text) == FORMS[text]


def test_true_is_no_one_and_numbers_are_equal_by_value() -> None:
    def right(said: str, wanted: Any, **options: Any) -> float:
        item = [Answer(said, fields={"calls": wanted})]
        config = metric_of({"name": "tool_calls", **options}, "test")
        return float(METRICS["tool_calls"].parts(config, item)[0, 0])

    one = [{"name": "f", "arguments": {"a": 1, "b": ["x, y"]}}]
    assert right("f(a=1.0, b=['x, y'])", one)
    assert not right("f(a=True, b=['x, y'])", one)
    assert not right("f(a=1, b=['X y'])", one)
    assert right("f(a=1, b=['X y'])", one, strings="loose")
    assert not right("f(a=1)", one)
    assert right("no call is wanted", [])
    # the first call fits both, the second only one: every order is tried
    several = [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}]
    assert right("[f(a=1), f(a=2)]", several)
    assert not right("[f(a=2), f(a=2)]", several)


def test_sentences_end_where_a_reader_ends_them() -> None:
    assert sentences("Mr. Fox, e.g. this one, met J. Doe. Then? \"Yes!\" It cost 3.5 dollars... And more") == [
        "Mr. Fox, e.g. this one, met J. Doe.",
        "Then?",
        '"Yes!"',
        "It cost 3.5 dollars...",
        "And more",
    ]  # fmt: skip


def test_codi_s_kinds() -> None:
    assert follows("codi:keyword", "Red foxes", {"include": ["fox"], "exclude": ["wolf"]})
    assert not follows("codi:keyword", "Red foxes and wolves", {"include": ["fox"], "exclude": ["wol"]})
    assert follows("codi:length", "one two three", {"at_least": 2, "at_most": 3})
    assert not follows("codi:length", "one two three", {"equal": 2})
    assert {name.partition(":")[0] for name in INSTRUCTIONS} >= {"codi", "keywords", "length_constraints"}


def test_a_share_of_instructions_is_over_all_rows_together() -> None:
    both = [{"name": "punctuation:no_comma"}, {"name": "change_case:english_lowercase"}]
    items = [Answer("a, b", fields={"instructions": both}), Answer("A", fields={"instructions": both[:1]})]
    assert value("inst_level_strict_acc", items) == pytest.approx(2 / 3)
    assert value("prompt_level_strict_acc", items) == 0.5
    assert value("prompt_level_strict_acc", [replace(items[1], text=" ")]) == 0, "an empty answer follows nothing"


def test_json_is_compared_as_json() -> None:
    items = [Answer('{"b":2, "a":1}', ('{"a": 1, "b": 2}',)), Answer("1.0", ("1",)), Answer("NaN", ("1", "2"))]
    parts = METRICS["json_match"].parts(metric_of("json_match", "test"), items)
    assert parts[:, 0].tolist() == [1, 0, 0]


def test_a_function_of_the_user_s(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(said):\n    return None if said.text == '?' else float(len(said.text))\n"
        "def broken(said):\n    return 1 / 0\n"
        "def endless(said):\n    return float('inf')\n"
    )
    config = metric_of({"python": f"{file}:score", "higher_is_better": False}, "test")
    items = [Answer("abc", where="f:1"), Answer("?"), Answer("a")]
    row = METRICS["python"]
    assert float(row.value(row.parts(config, items).sum(0))) == 2
    assert shown_name(config) == "score"
    with raises("data/metric-function-failed", match=r"failed on f:1: line 4: ZeroDivisionError"):
        row.parts(metric_of({"python": f"{file}:broken"}, "test"), items)
    with raises("data/metric-function-failed", match="returned inf for f:1"):
        row.parts(metric_of({"python": f"{file}:endless"}, "test"), items)
    with raises("recipe/no-such-function", match="Did you mean 'score'"):
        row.parts(metric_of({"python": f"{file}:scor"}, "test"), items)


# Errors --------------------------------------------------------------------------------------------------------------


def test_what_a_metric_lacks_is_said_with_the_row() -> None:
    bare = Answer("x", where="f:7")
    for name in ("exact_match", "rouge_l", "cider", "pearson", "task_score"):
        with raises("data/no-reference-answer", match="f:7"):
            value(name, [bare])
    for name in ("json_schema", "tool_calls", "nearest_choice"):
        with raises("data/no-such-field", match="f:7"):
            value(name, [replace(bare, references=("x",))])
    with raises("data/no-instructions", match="f:7"):
        value("inst_level_loose_acc", [bare])
    with raises("data/not-a-number", match="f:7.*'x'"):
        value("spearman", [replace(bare, references=("x",))])
    with raises("data/reference-not-json"):
        value("json_match", [replace(bare, references=("x",))])
    with raises("data/invalid-calls", match="f:7"):
        value("tool_calls", [replace(bare, fields={"calls": [{"f": {"a": 1}}]})])
    with raises("data/empty-choice", match="choice 1"):
        value("acc_norm", [Choice((-1.0, -2.0), ("a", ""), (0,))])


def test_schemas_that_are_none_or_lie_elsewhere_are_refused() -> None:
    for schema in ({"type": "no such type"}, {"$ref": "https://example.com/schema.json"}, {"$ref": "#/$defs/none"}):
        with raises("data/invalid-schema", match="f:7"):
            value("json_schema", [Answer("[]", fields={"schema": json.dumps(schema)}, where="f:7")])


def test_instructions_that_are_not_known_are_refused_with_the_nearest() -> None:
    with raises("data/no-such-instruction", match="keywords:existence"):
        follows("keyword:existence", "x", {})
    with raises("data/no-such-instruction", match="language:response_language"):
        follows("language:response_language", "x", {"language": "de"})
    with raises("data/invalid-instruction", match="num_word"):
        follows("length_constraints:number_words", "x", {"num_word": 3, "relation": "at least"})
    with raises("data/invalid-instruction", match="Did you mean 'at least'"):
        follows("length_constraints:number_words", "x", {"num_words": 3, "relation": "atleast"})
    with raises("data/invalid-instruction", match="at_least"):
        follows("codi:length", "x", {})


def test_metrics_that_are_not_known_are_refused() -> None:
    with raises("recipe/no-such-metric", match="tasks.yaml: .*Did you mean 'exact_match'"):
        metric_of("exact_mach", "tasks.yaml")
    with raises("recipe/unknown-key", match="ignore_case"):
        metric_of({"name": "exact_match", "ignore_cas": True}, "tasks.yaml")
    with raises("recipe/invalid-value", match=r"metrics.py:score"):
        metric_of({"python": "metrics.score"}, "tasks.yaml")
