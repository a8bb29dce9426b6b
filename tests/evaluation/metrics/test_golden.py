"""Metrics are those of other implementations, whose values `tests/golden/make_metrics.py` wrote down."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftlm.evaluation.metrics import METRICS, Answer, Choice, Likelihood, metric_of
from graftlm.evaluation.metrics.cider import cider
from graftlm.evaluation.metrics.ifeval import loose_forms
from graftlm.evaluation.metrics.instructions import follows
from graftlm.evaluation.metrics.json_answers import json_schema
from graftlm.evaluation.metrics.meteor import meteor
from graftlm.evaluation.metrics.nist import counts_of, information, value
from graftlm.evaluation.metrics.tool_calls import Call, loose, same_calls, wanted_calls
from graftlm.evaluation.metrics.words import stem

FOLDER = Path(__file__).parents[2] / "golden" / "metrics"


def golden(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def measured(entry: Any, items: list[Any]) -> tuple[float, list[float]]:
    """(the value of a metric, its score of each item where it has one)."""
    config = metric_of(entry, "test")
    row = METRICS[config.name]
    parts = row.parts(config, items)
    return float(row.value(parts.sum(0))), parts[:, 0].tolist()


TEXTS = golden("texts")
ITEMS = [Answer(answer, tuple(refs)) for answer, refs in TEXTS["inputs"]]
SPLIT = [(answer.lower().split(), [ref.lower().split() for ref in refs]) for answer, refs in TEXTS["inputs"]]


@pytest.mark.parametrize("name", ["bleu", "chrf", "chrf++", "ter"])
def test_sums_of_an_item_s_counts_make_sacrebleu_s_corpus_score(name: str) -> None:
    wanted = TEXTS["corpus"]
    assert measured(name, ITEMS)[0] == pytest.approx(wanted[name], abs=1e-9)
    one = [Answer(item.text, item.references[:1]) for item in ITEMS]
    assert measured(name, one)[0] == pytest.approx(wanted[f"{name}, one reference"], abs=1e-9)


def test_nist_is_nltk_s() -> None:
    info = information([refs for _, refs in SPLIT])
    sums = np.sum([counts_of(answer, refs, info) for answer, refs in SPLIT], axis=0)
    assert float(value(sums)) == pytest.approx(TEXTS["nist"], abs=1e-9)


def test_meteor_is_nltk_s_without_wordnet() -> None:
    assert [meteor(answer, refs) for answer, refs in SPLIT] == pytest.approx(TEXTS["meteor"], abs=1e-12)
    assert len(set(TEXTS["meteor"])) > 8


def test_cider_is_that_of_the_coco_evaluation() -> None:
    found = cider([answer for answer, _ in SPLIT], [refs for _, refs in SPLIT])
    assert found == pytest.approx(TEXTS["cider"], abs=1e-9)


def test_stems_are_porter_s() -> None:
    wanted = TEXTS["stems"]
    assert {word: stem(word) for word in wanted} == wanted
    assert len(wanted) > 80


def test_token_f1_and_rouge_l() -> None:
    assert measured("token_f1", ITEMS)[1] == pytest.approx(TEXTS["token_f1"])
    ascii_only = [n for n, item in enumerate(ITEMS) if (item.text + "".join(item.references)).isascii()]
    found = measured("rouge_l", [ITEMS[n] for n in ascii_only])[1]
    assert found == pytest.approx([TEXTS["rouge_l"][n] for n in ascii_only])


@pytest.mark.parametrize("options", TEXTS["exact_match"])
def test_exact_match_with_every_option_of_lm_eval(options: str) -> None:
    given = json.loads(options)
    regexes, switches = given.pop("regexes_to_ignore"), given
    entry = {"name": "exact_match", **switches, "regexes_to_ignore": regexes}
    assert measured(entry, ITEMS)[1] == TEXTS["exact_match"][options]


def test_exact_match_of_squad_is_equality_of_its_normal_form() -> None:
    found = measured({"name": "exact_match", "normalize": "squad"}, ITEMS)[1]
    assert found == TEXTS["squad_exact"]
    assert 0 < sum(found) < len(found)


CHOICES = golden("choices")


@pytest.fixture(scope="module")
def choices() -> list[Choice]:
    return [
        Choice(tuple(each["lls"]), tuple(each["choices"]), (each["gold"],), tuple(each["unconditional"]))
        for each in CHOICES["items"]
    ]


@pytest.mark.parametrize("name", ["acc", "acc_norm", "acc_bytes", "acc_mutual_info"])
def test_multiple_choice_is_lm_eval_s(name: str, choices: list[Choice]) -> None:
    wanted = CHOICES["per item"]
    assert measured(name, choices)[1] == wanted[name]
    assert all(wanted[name] != wanted[other] for other in wanted if other != name), "the cases tell them apart"


@pytest.mark.parametrize("name", ["brier_score", "mcc"])
def test_brier_and_matthews_are_lm_eval_s(name: str, choices: list[Choice]) -> None:
    assert measured(name, choices)[0] == pytest.approx(CHOICES["totals"][name], abs=1e-12)


def test_correlations_are_scipy_s_and_scikit_learn_s() -> None:
    labels = CHOICES["labels"]
    items = [Answer(said, (wanted,)) for said, wanted in labels["pairs"]]
    assert measured("mcc", items)[0] == pytest.approx(labels["mcc"], abs=1e-12)
    numbers = CHOICES["numbers"]
    items = [Answer(str(x), (str(y),)) for x, y in zip(numbers["x"], numbers["y"], strict=True)]
    assert len(set(numbers["x"])) < len(numbers["x"]), "there are ties"
    for name in ("pearson", "spearman"):
        assert measured(name, items)[0] == pytest.approx(numbers[name], abs=1e-9)


@pytest.mark.parametrize("name", ["word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity"])
def test_perplexities_are_lm_eval_s(name: str) -> None:
    rolling = CHOICES["rolling"]
    items = [Likelihood(log_prob, 3, text) for text, log_prob in rolling["texts"]]
    assert measured(name, items)[0] == pytest.approx(rolling[name], rel=1e-12)


INSTRUCTIONS = golden("instructions")


@pytest.mark.parametrize("number", range(len(INSTRUCTIONS["checks"])))
def test_instructions_are_verified_as_by_lm_eval(number: int) -> None:
    check = INSTRUCTIONS["checks"][number]
    for answer, strict, loose_ in zip(INSTRUCTIONS["responses"], check["strict"], check["loose"], strict=True):
        fields = {"instruction_id_list": [check["name"]], "kwargs": [check["arguments"]]}
        item = [Answer(answer, fields=fields)]
        assert measured("prompt_level_strict_acc", item)[0] == strict, answer
        assert measured("prompt_level_loose_acc", item)[0] == loose_, answer
    assert len({*check["strict"]}) == 2, "the cases tell right from wrong"


def test_schemas_are_those_of_jsonschema() -> None:
    found = golden("schemas")
    assert [json_schema(answer, found["schema"]) for answer in found["answers"]] == found["valid"]


@pytest.mark.parametrize("number", range(len(golden("tool_calls")["cases"])))
def test_calls_are_compared_as_by_bfcl(number: int) -> None:
    case = golden("tool_calls")["cases"][number]
    calls = [Call(name, arguments) for each in case["calls"] for name, arguments in each.items()]
    assert same_calls(calls, wanted_calls(case["wanted"], "test"), loose) == case["valid"]


def test_the_forms_of_the_loose_check_are_those_of_its_code() -> None:
    """Eight, and an instruction is followed if one of them does."""
    forms = loose_forms("a\n*b*\nc")
    assert forms == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]
    assert any(follows("detectable_format:json_format", form, {}) for form in loose_forms('intro\n{"a": 1}'))
