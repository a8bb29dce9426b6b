"""Tasks and their evaluation: several adapters in one pass are each alone, order and batches change nothing, and a run
that was killed goes on to the same JSON."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.deltas.lora import LoraConfig
from graftlm.deltas.prefix import PrefixConfig
from graftlm.evaluation import evaluate as evaluating
from graftlm.evaluation.asking import asked_models, questions
from graftlm.evaluation.evaluate import evaluate
from graftlm.evaluation.results import Evaluation
from graftlm.evaluation.task import Task, TaskConfig, filled, read_task
from graftlm.evaluation.task_file import tasks_of_builtin
from graftlm.generation import engine as engine_module
from graftlm.model.attach import attach
from graftlm.model.modes import activate, deltas_only
from graftlm.testing import tiny_model, tiny_tokenizer
from graftlm.testing.deltas import move
from tests.architectures import build
from tests.errors import raises
from tests.generation.adapters import spread

COLORS = ("red", "green", "blue", "black")


def rows(folder: Path, count: int = 10, name: str = "rows.jsonl") -> str:
    file = folder / name
    with open(file, "w") as out:
        for n in range(count):
            row = {
                "subject": f"thing number {n} of the long list that every question begins with",
                "color": COLORS[n * 7 % 4],
                "options": COLORS[: 2 + n % 3] if n * 7 % 4 < 2 + n % 3 else COLORS,
                "aliases": [COLORS[n * 7 % 4], f"a {COLORS[n * 7 % 4]} one"],
                "group": n // 2,
            }
            out.write(json.dumps(row) + "\n")
    return str(file)


ASKS = ("What color has {subject}?", "{subject}: its color?")


def some_tasks(folder: Path, count: int = 10) -> list[Task]:
    source = rows(folder, count)
    configs = {
        "said": TaskConfig(
            rows=source, prompt=ASKS, answer="{aliases}", max_new_tokens=6, metrics=("gestalt", "exact_match", "chrf")
        ),
        "chosen": TaskConfig(
            rows=source,
            kind="choice",
            prompt=ASKS[0],
            choices="{options}",
            answer="{color}",
            chat=False,
            metrics=("acc", "acc_norm", "acc_mutual_info", "brier_score", "ece", "mcc"),
        ),
        "read": TaskConfig(
            rows=source, kind="likelihood", prompt="", answer="{subject} is {color}", metrics=("bits_per_byte", "acc")
        ),
    }
    return [read_task(name, config) for name, config in configs.items()]


@pytest.fixture(scope="module")
def model() -> Any:
    made = spread(tiny_model())
    attach(made, LoraConfig(r=4, alpha=8), name="a", seed=1)
    attach(made, LoraConfig(r=2, alpha=8), name="b", seed=2)
    attach(made, PrefixConfig(p=3), name="p", seed=3)
    move(made, scale=0.5, seed=5)
    activate(made)
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    return some_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def together(model: Any, tokenizer: Any, tasks: list[Task]) -> Evaluation:
    return evaluate(model, tokenizer, tasks, adapters=["a", "b", "p"])


def numbers(found: Evaluation, model: str) -> Iterator[tuple[str, Any]]:
    for (task, number), entry in sorted(found.entries.items()):
        for outcome in entry[model]:
            yield f"{task} {number}", outcome


def check_same(one: Evaluation, other: Evaluation, model: str, its: str | None = None) -> None:
    pairs = list(zip(numbers(one, model), numbers(other, its or model), strict=True))
    assert pairs
    for (where, a), (_, b) in pairs:
        assert a.keys() == b.keys()
        for key in a:
            if isinstance(a[key], list | float):
                assert b[key] == pytest.approx(a[key], abs=1e-4, rel=2e-6), where
            elif not a["near_tie"]:
                assert a[key] == b[key], where


# Invariants ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "a", "b", "p"])
def test_several_adapters_in_one_pass_give_the_outcomes_of_each_alone(
    name: str, model: Any, tokenizer: Any, tasks: list[Task], together: Evaluation
) -> None:
    alone = evaluate(model, tokenizer, tasks, adapters=[] if name == "base" else [name], base=name == "base")
    assert list(alone.models) == [name]
    check_same(together, alone, name)
    others = [numbers(together, each) for each in together.models if each != name]
    for other in others:
        assert [each for _, each in other] != [each for _, each in numbers(together, name)], "they differ at all"


def test_choices_have_the_log_probabilities_of_a_plain_forward_pass(
    model: Any, tokenizer: Any, tasks: list[Task], together: Evaluation
) -> None:
    task = tasks[1]
    for number, item in enumerate(task.items):
        for choice, found in zip(item.choices, together.entries["chosen", number]["a"][0]["log_probs"], strict=True):
            text = item.prompts[0][0].content
            ids, begin = tokenizer(f"{text} {choice}")["input_ids"], len(tokenizer(text)["input_ids"])
            with deltas_only(model, "a"), torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            wanted = sum(float(logs[at - 1, ids[at]]) for at in range(begin, len(ids)))
            assert found == pytest.approx(wanted, abs=1e-4)
            alone = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with deltas_only(model, "a"), torch.no_grad():
                logs = model(torch.tensor([[tokenizer.bos_token_id, *alone]])).logits[0].log_softmax(-1)
            wanted = sum(float(logs[at, token]) for at, token in enumerate(alone))
            there = together.entries["chosen", number]["a"][0]["unconditional"]
            assert there[item.choices.index(choice)] == pytest.approx(wanted, abs=1e-4)


def test_a_text_by_itself_is_read_after_the_token_that_begins_texts(
    model: Any, tokenizer: Any, tasks: list[Task], together: Evaluation
) -> None:
    for number, item in enumerate(tasks[2].items):
        ids = tokenizer(item.references[0], add_special_tokens=False)["input_ids"]
        with deltas_only(model, "b"), torch.no_grad():
            logs = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0].log_softmax(-1)
        found = together.entries["read", number]["b"][0]
        assert found["log_prob"] == pytest.approx(sum(float(logs[n, i]) for n, i in enumerate(ids)), abs=1e-3)
        assert found["tokens"] == len(ids)


@pytest.mark.parametrize(
    "chunk", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
)
def test_the_size_of_a_batch_changes_nothing(
    chunk: int, model: Any, tokenizer: Any, tasks: list[Task], together: Evaluation
) -> None:
    found = evaluate(model, tokenizer, tasks, adapters=["a", "b", "p"], chunk=chunk)
    for name in together.models:
        check_same(together, found, name)


def test_the_order_of_rows_and_tasks_changes_nothing(
    model: Any, tokenizer: Any, tasks: list[Task], together: Evaluation
) -> None:
    order = [7, 3, 9, 0, 4, 1, 8, 2, 6, 5]
    mixed = [replace(task, items=[task.items[n] for n in order]) for task in reversed(tasks)]
    found = evaluate(model, tokenizer, mixed, adapters=["b", "a", "p"])
    back = {(task, order[number]): entry for (task, number), entry in found.entries.items()}
    for name in together.models:
        check_same(together, replace(found, entries=back), name)
    mine, theirs = (each.to_json()["tasks"] for each in (together, found))
    for task, model_name, metric in together.measured:
        one, other = (each[task][model_name][metric] for each in (mine, theirs))
        assert other["value"] == pytest.approx(one["value"], abs=1e-4)


def test_prompts_of_choices_are_computed_once_for_each_model(
    model: Any, tokenizer: Any, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, plain = list[int](), engine_module.pass_over

    def counted(copy: Any, pieces: Any) -> Any:
        computed.append(sum(len(piece.ids) for piece in pieces))
        return plain(copy, pieces)

    task = replace(tasks[1], metrics=tasks[1].metrics[:2])
    models = asked_models(model, tokenizer, {"base": {}, "a": {"a": 1.0}})
    asked = list(questions(task, models, range(10)))
    whole = sum(len(request.ids) for question in asked for request in question.requests)
    monkeypatch.setattr(engine_module, "pass_over", counted)
    evaluate(model, tokenizer, [task], adapters=["a"])
    assert sum(computed) < 0.6 * whole


class _Killed(Exception):
    pass


@pytest.mark.parametrize(
    "after",
    [
        4,
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(6, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_json(
    after: int, model: Any, tokenizer: Any, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"adapters": ["a", "b"], "chunk": 4}
    wanted = json.dumps(evaluate(model, tokenizer, tasks, **how).to_json())
    plain, calls = evaluating.answers, [0]

    def killed(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise _Killed
        return plain(*given)

    file = tmp_path / "eval.json.journal"
    monkeypatch.setattr(evaluating, "answers", killed)
    with pytest.raises(_Killed):
        evaluate(model, tokenizer, tasks, journal=file, **how)
    monkeypatch.setattr(evaluating, "answers", plain)
    with open(file, "ab") as out:
        out.write(b'{"task": "said", "item": 9, "fou')  # a line that was cut off
    found = evaluate(model, tokenizer, tasks, journal=file, **how)
    assert json.dumps(found.to_json()) == wanted
    again = evaluate(model, tokenizer, tasks, journal=file, **how)
    assert json.dumps(again.to_json()) == wanted


def test_a_whole_journal_asks_nothing_again(
    model: Any, tokenizer: Any, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "journal"
    first = evaluate(model, tokenizer, tasks[:1], journal=file)
    monkeypatch.setattr(evaluating, "answers", None)
    other = replace(tasks[0], metrics=tasks[0].metrics[:1])
    assert list(evaluate(model, tokenizer, [other], journal=file).to_json()["metrics"]) == ["gestalt"]
    assert evaluate(model, tokenizer, tasks[:1], journal=file).to_json() == first.to_json()


def test_the_journal_of_something_else_is_refused(
    model: Any, tokenizer: Any, tasks: list[Task], tmp_path: Path
) -> None:
    file = tmp_path / "journal"
    evaluate(model, tokenizer, tasks[2:], journal=file)
    changed = replace(tasks[2], items=[*tasks[2].items[:-1], tasks[2].items[0]])
    for given in ({"tasks": [changed]}, {"adapters": ["a"]}, {"chunk": 3}):
        with raises("output/other-evaluation"):
            evaluate(model, tokenizer, **{"tasks": tasks[2:], "journal": file, **given})  # type: ignore[arg-type]
    file.write_text("no journal\n")
    with raises("output/not-a-journal"):
        evaluate(model, tokenizer, tasks[2:], journal=file)


# Results -------------------------------------------------------------------------------------------------------------


def test_results_have_intervals_comparisons_and_the_best_and_worst_template(together: Evaluation) -> None:
    found = json.loads(json.dumps(together.to_json(), allow_nan=False))
    for task, model_name, metric in together.measured:
        one = found["tasks"][task][model_name][metric]
        assert set(one) >= {"value", "low", "high", "n"}
        assert one["n"] == 10
        assert one["low"] <= one["value"] <= one["high"]
        about = found["metrics"][metric]
        assert about["low"] <= one["value"]
        assert about["high"] is None or one["value"] <= about["high"]
    said = found["tasks"]["said"]["a"]["gestalt"]["templates"]
    assert len(said["values"]) == 2
    assert said["worst"] == min(said["values"])
    assert found["tasks"]["said"]["a"]["gestalt"]["value"] == pytest.approx(sum(said["values"]) / 2)
    assert "templates" not in found["tasks"]["chosen"]["a"]["acc"]
    assert len(found["comparisons"]) == 3 * (3 + 6 + 2)
    firsts = [each for each in found["comparisons"] if each["p_holm"] is not None]
    assert {(each["task"], each["metric"]) for each in firsts} == {
        ("said", "gestalt"), ("chosen", "acc"), ("read", "bits_per_byte")
    }  # fmt: skip
    for each in found["comparisons"]:
        assert 0 < each["p"] <= (each["p_holm"] or 1)
        assert each["detectable"] is None or each["detectable"] >= 0
        values = [found["tasks"][each["task"]][name][each["metric"]]["value"] for name in (each["adapter"], "base")]
        assert each["difference"]["value"] == pytest.approx(values[0] - values[1], abs=1e-9)


def test_rows_of_a_group_are_drawn_together(model: Any, tokenizer: Any, tasks: list[Task]) -> None:
    """With one group there is no interval; with as many as rows a rate has Wilson's."""
    task = replace(tasks[1], metrics=tasks[1].metrics[:1])
    alone = replace(task, items=[replace(item, group=None) for item in task.items])
    one = replace(task, items=[replace(item, group="x") for item in task.items])
    made = {
        name: evaluate(model, tokenizer, [each], adapters=["a"]).to_json()
        for name, each in {"alone": alone, "one": one, "two": task}.items()
    }
    values = {name: each["tasks"]["chosen"]["a"]["acc"] for name, each in made.items()}
    assert values["one"]["low"] is None
    assert values["alone"]["low"] != values["two"]["low"]
    assert made["alone"]["comparisons"][0]["test"] == "McNemar"
    assert made["two"]["comparisons"][0]["test"] == "paired randomization"
    assert made["one"]["comparisons"][0]["verdict"] == "no difference found"


def test_rows_that_rounding_may_decide_are_named(model: Any, tokenizer: Any, tasks: list[Task]) -> None:
    """Two choices that are the same text are as likely."""
    task = tasks[1]
    same = replace(task.items[0], choices=("red", "red", "green"), gold=(0,))
    found = evaluate(model, tokenizer, [replace(task, items=[same, *task.items[1:]])]).to_json()
    near = found["answers"]["chosen"]["base"]["near_ties"]
    log_probs = evaluate(model, tokenizer, [replace(task, items=[same])]).entries["chosen", 0]["base"][0]["log_probs"]
    assert (same.where in near) == (max(log_probs) == pytest.approx(log_probs[0], abs=1e-4))
    assert log_probs[0] == pytest.approx(log_probs[1], abs=1e-6)


def test_what_rounding_may_decide_depends_on_the_dtype(tokenizer: Any, tasks: list[Task]) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        flat = tiny_model()
        flat.get_output_embeddings().weight.data.mul_(0.1)  # margins of about 0.03 nats
        made = evaluate(flat.to(dtype), tokenizer, tasks[:1]).to_json()
        found[dtype] = made["tie"], len(made["answers"]["said"]["base"]["near_ties"])
    assert found[torch.float32][0] == 1e-4
    assert found[torch.bfloat16][0] == 0.1
    assert found[torch.bfloat16][1] > found[torch.float32][1]


def test_rows_of_adapters_may_have_weights(model: Any, tokenizer: Any, tasks: list[Task]) -> None:
    found = evaluate(model, tokenizer, tasks[2:], adapters={"both": {"a": 0.5, "b": 1.0}, "a": ["a"], "none": {}})
    assert list(found.models) == ["base", "both", "a", "none"]
    values = {name: found.measured["read", name, "bits_per_byte"].value for name in found.models}
    assert values["none"] == pytest.approx(values["base"], abs=1e-6)
    assert len({round(value, 4) for value in values.values()}) == 3


def test_a_model_that_transformers_runs_is_evaluated_too(tokenizer: Any, tasks: list[Task]) -> None:
    found = evaluate(build("mamba"), tokenizer, tasks)
    assert math.isfinite(found.measured["chosen", "base", "brier_score"].value)


# Tasks ---------------------------------------------------------------------------------------------------------------


def test_shots_stand_before_every_question_in_its_own_template(tmp_path: Path) -> None:
    shots = {"rows": rows(tmp_path, 5, "shots.jsonl"), "count": 2}
    given: dict[str, Any] = {"rows": rows(tmp_path), "prompt": ASKS, "answer": "{color}", "shots": shots}
    (first, *_) = read_task("t", TaskConfig(**given, system="Be short.")).items
    for prompt, template in zip(first.prompts, ASKS, strict=True):
        assert [message.role for message in prompt] == ["system", *("user", "assistant") * 2, "user"]
        begin, _, end = template.partition("{subject}")
        assert all(m.content.startswith(begin) and m.content.endswith(end) for m in prompt if m.role == "user")
        assert {m.content for m in prompt if m.role == "assistant"} <= set(COLORS)
    (raw, *_) = read_task("t", TaskConfig(**given, chat=False)).items
    ((text,),) = raw.prompts[:1]
    blocks = text.content.split("\n\n")
    assert len(blocks) == 3
    assert all(block.rpartition("? ")[2] in COLORS for block in blocks[:2])


def test_rows_of_conversations_are_tasks_without_a_prompt(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    file = tmp_path / "chat.jsonl"
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    file.write_text(
        "".join(json.dumps({"messages": [{"role": "system", "content": f"{n}"}, *said]}) + "\n" for n in "ab")
    )
    task = read_task("t", TaskConfig(rows=str(file), max_new_tokens=3))
    assert [item.references for item in task.items] == [("yes",), ("yes",)]
    assert [message.role for message in task.items[0].prompts[0]] == ["system", "user"]
    assert evaluate(model, tokenizer, [task]).to_json()["answers"]["t"]["base"]["n"] == 2


def test_builtin_tasks_are_scored_as_they_are(model: Any, tokenizer: Any) -> None:
    (config,) = tasks_of_builtin("builtin:tasks/add").values()
    task = read_task("add", replace(config, limit=5, max_new_tokens=2))
    assert len(task.items) == 5
    assert len({item.group for item in task.items}) > 1
    found = evaluate(model, tokenizer, [task])
    assert found.to_json()["tasks"]["add"]["base"]["task_score"]["value"] == 0
    assert len(tasks_of_builtin("builtin:tasks")) > 15
    with raises("data/no-such-data-set", match="Did you mean"):
        tasks_of_builtin("builtin:tasks/ad")


def test_answers_of_choices_are_numbers_or_texts(tmp_path: Path) -> None:
    def gold(answer: Any, choices: Sequence[str] = ("4", "1", "7")) -> tuple[int, ...]:
        file = tmp_path / "rows.json"
        file.write_text(json.dumps([{"q": "?", "a": answer, "c": choices}]))
        config = TaskConfig(rows=str(file), kind="choice", prompt="{q}", answer="{a}", choices="{c}")
        return read_task("t", config).items[0].gold

    assert gold(1) == (1,)
    assert gold("1") == (1,)
    assert gold("4") == (0,)
    assert gold("2") == (2,)
    assert gold([0, "7"]) == (0, 2)
    with raises("data/answer-not-a-choice", match="'x'"):
        gold("x")
    with raises("data/too-few-choices"):
        gold(0, ["only"])


def test_stop_texts_end_answers_and_do_not_stand_in_them(model: Any, tokenizer: Any, tasks: list[Task]) -> None:
    config = replace(tasks[0].config, prompt=ASKS[0], max_new_tokens=12)
    plain = evaluate(model, tokenizer, [replace(read_task("said", config), metrics=tasks[0].metrics)])
    texts = [plain.entries["said", n]["base"][0]["text"] for n in range(10)]
    longest = max(texts, key=len)
    stop = longest[len(longest) // 2 :][:2]
    stopped = evaluate(model, tokenizer, [read_task("said", replace(config, stop=(stop,)))])
    for number, text in enumerate(texts):
        assert stopped.entries["said", number]["base"][0]["text"] == text.partition(stop)[0].strip()


def test_braces() -> None:
    assert filled("{{{a}}} {b}", {"a": 1, "b": ["x"]}, "f:1") == '{1} ["x"]'


# Errors --------------------------------------------------------------------------------------------------------------


def test_what_a_task_lacks_is_refused(tmp_path: Path) -> None:
    source = rows(tmp_path)
    with raises("data/no-such-field", match="rows.jsonl:1: no field 'colour'.*'color'"):
        read_task("t", TaskConfig(rows=source, prompt="{subject}", answer="{colour}"))
    with raises("recipe/metric-of-another-kind", match="'acc_norm' does not measure"):
        read_task("t", TaskConfig(rows=source, prompt="{subject}", answer="{color}", metrics=("acc_norm",)))
    with raises("recipe/repeated-metric", match="'gestalt' twice"):
        read_task("t", TaskConfig(rows=source, prompt="{subject}", metrics=("gestalt", "gestalt")))
    labels = ({"name": "gestalt", "label": "alike"}, "gestalt")
    assert len(read_task("t", TaskConfig(rows=source, prompt="{subject}", metrics=labels)).metrics) == 2
    with raises("data/too-few-shots"):
        read_task("t", TaskConfig(rows=source, prompt="{subject}", answer="", shots={"rows": source, "count": 99}))
    for wrong in (
        {"kind": "choice", "prompt": "x", "answer": "y"},
        {"answer": "y"},
        {"prompt": ()},
        {"prompt": "x", "chat": False, "system": "s"},
        {"kind": "likelihood", "prompt": "x", "answer": "y", "stop": ("z",)},
    ):
        with pytest.raises(ValueError, match=r"kind|prompt|stop|system|choices"):
            TaskConfig(rows=source, **wrong)  # type: ignore[arg-type]


def test_models_are_named_once(model: Any, tokenizer: Any, tasks: list[Task]) -> None:
    with raises("target/repeated-model-name", match="'base'"):
        evaluate(model, tokenizer, tasks, adapters={"base": ["a"]})
    with raises("target/no-model-named"):
        evaluate(model, tokenizer, tasks, base=False)
    with raises("target/no-such-delta"):
        evaluate(model, tokenizer, tasks, adapters=["c"])
