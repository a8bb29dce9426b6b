"""Whole runs of losses that compare answers: what they leave, and what they refuse."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import graftlm
from graftlm.config.schema import build
from graftlm.errors import RecipeError
from graftlm.recipe import Recipe, read_recipe
from tests.errors import raises
from tests.training.test_resume import same, stopping_after
from tests.training.together import together

pytestmark = pytest.mark.usefixtures("without_pictures")

PAIRS = {"margin", "accuracy", "chosen_log_prob", "rejected_log_prob", "chosen_likelier"}
FEEDBACK = {"chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob"}


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    prompts = [f"Say how parcel {n} goes." for n in range(14)]
    rows = [{"prompt": a, "chosen": f"on its way {n}", "rejected": f"no idea {n}"} for n, a in enumerate(prompts)]
    return written(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def feedback(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": f"Say how parcel {n} goes.",
            "completion": "on its way" if n % 3 else "no idea",
            "label": bool(n % 3),
        }
        for n in range(14)
    ]
    return written(tmp_path / "feedback.jsonl", rows)


def recipe(base: Path, rows: Path, loss: Any, **sections: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 4},
        "delta": {"method": "lora", "r": 4},
        "loss": loss,
        "train": {"steps": 6, "batch_rows": 4, "seed": 3, "learning_rate": 0.01},
        "report": {"samples": 2, "answers": 2, "max_new_tokens": 4},
    }
    for name, changes in sections.items():
        tree[name] = {**tree[name], **changes}
    return build(Recipe, tree, source="test")


def count_steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["dpo", "dpop", "simpo", "orpo", "cpo", {"name": "dpo", "link": "ipo"}])
def test_pairs(base_folder: Path, pairs: Path, tmp_path: Path, loss: Any) -> None:
    result = graftlm.train(recipe(base_folder, pairs, loss), tmp_path / "out")
    steps = count_steps(tmp_path / "out")
    assert all(step.keys() >= PAIRS for step in steps)
    found = result.summary["held_out"]["objective"]
    assert found["base"].keys() == found["tuned"].keys() == {"loss", *PAIRS}
    assert found["tuned"]["loss"] < found["base"]["loss"]
    assert found["tuned"]["margin"] > found["base"]["margin"]
    if recipe(base_folder, pairs, loss).loss.needs_reference:
        assert steps[0]["margin"] == 0.0
        assert steps[0]["accuracy"] == 0.5
        assert (found["base"]["margin"], found["base"]["accuracy"]) == (0.0, 0.5)
        assert found["tuned"]["accuracy"] == 1.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "chosen likelier" in page


@pytest.mark.parametrize("loss", ["kto", "dro", {"name": "sppo", "eta": 20.0}])
def test_feedback_and_pairs_as_feedback(
    base_folder: Path, pairs: Path, feedback: Path, tmp_path: Path, loss: Any
) -> None:
    for name, rows in (("pairs", pairs), ("feedback", feedback)):
        result = graftlm.train(recipe(base_folder, rows, loss), tmp_path / name)
        steps = count_steps(tmp_path / name)
        assert all(step.keys() & FEEDBACK for step in steps)
        assert steps[0].get("chosen_reward", 0.0) == steps[0].get("rejected_reward", 0.0) == 0.0
        found = result.summary["held_out"]["objective"]["tuned"]
        assert found["chosen_reward"] > found["rejected_reward"]


@pytest.mark.slow
def test_how_a_run_is_packed_changes_nothing(base_folder: Path, pairs: Path, feedback: Path, tmp_path: Path) -> None:
    cases: list[tuple[Path, str, list[dict[str, dict[str, Any]]]]] = [
        (pairs, "dpo", [{}, {"train": {"pack_tokens": 60}}, {"train": {"prefix_sharing": False}}]),
        (feedback, "kto", [{}, {"train": {"pack_tokens": 30}}, {"data": {"pack": False}}]),
        (feedback, "dro", [{}, {"train": {"pack_tokens": 30}}]),
    ]
    for rows, loss, ways in cases:
        adapters = []
        for number, changes in enumerate(ways):
            sections = {"train": {"learning_rate": 1e-3, **changes.get("train", {})}, "data": changes.get("data", {})}
            out = tmp_path / f"{loss}-{number}"
            graftlm.train(recipe(base_folder, rows, loss, **sections), out)
            adapters.append((load_file(out / "adapter_model.safetensors"), count_steps(out)))
        for adapter, steps in adapters[1:]:
            for key, tensor in adapters[0][0].items():
                assert torch.allclose(adapter[key], tensor, rtol=1e-3, atol=5e-5), (loss, key)
            for mine, wanted in zip(steps, adapters[0][1], strict=True):
                assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


def test_two_runs_are_the_same_bytes(base_folder: Path, pairs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        graftlm.train(recipe(base_folder, pairs, "kto"), tmp_path / name)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other


@pytest.mark.parametrize("loss", ["dro", "kto"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    base_folder: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """The value head and its optimizer too: else the losses would part."""
    made = recipe(base_folder, feedback, loss, train={"save_every": 2}, delta={"dropout": 0.2})
    graftlm.train(made, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        graftlm.train(made, tmp_path / "out", resume=True)
    graftlm.train(made, tmp_path / "out", resume=True)
    same(tmp_path / "out", tmp_path / "whole")


def test_the_reference_may_be_an_adapter(base_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """A policy that starts as its base is compared with an adapter that is not: the margin is minus the adapter's."""
    graftlm.train(recipe(base_folder, pairs, "dpo"), tmp_path / "first")
    loss = {"name": "dpo", "reference": str(tmp_path / "first")}
    result = graftlm.train(recipe(base_folder, pairs, loss), tmp_path / "second")
    steps, found = count_steps(tmp_path / "second"), result.summary["held_out"]["objective"]
    assert steps[0]["margin"] < -0.01
    first = json.loads((tmp_path / "first" / "summary.json").read_text())["held_out"]["objective"]["tuned"]
    assert found["base"]["margin"] == pytest.approx(-first["margin"], rel=1e-4)
    assert found["tuned"]["margin"] > found["base"]["margin"]
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert one.keys() == other.keys(), "the reference is no part of what is saved"


def test_a_run_says_whether_the_policy_starts_as_its_reference(base_folder: Path, pairs: Path, tmp_path: Path) -> None:
    outputs = []
    for name, loss in (("first", "dpo"), ("second", {"name": "dpo", "reference": str(tmp_path / "first")})):
        console = Console(file=io.StringIO(), width=200)
        graftlm.train(recipe(base_folder, pairs, loss), tmp_path / name, console=console)
        outputs.append(console.file.getvalue())  # type: ignore[attr-defined]
    assert "margin before the first step: 0, so the policy starts as its reference" in outputs[0]
    assert "before the first step the policy is not its reference: margin -" in outputs[1]


def test_pretraining_is_supervised_training_of_raw_text(base_folder: Path, tmp_path: Path) -> None:
    rows = written(
        tmp_path / "text.jsonl", [{"text": f"the user asks and the assistant answers {n}"} for n in range(9)]
    )
    adapters = []
    for loss in ("pretraining", "supervised"):
        graftlm.train(recipe(base_folder, rows, loss, report={"answers": 0}), tmp_path / loss)
        adapters.append((tmp_path / loss / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


# What is refused -------------------------------------------------------------------------------------------------


def test_rows_without_what_the_loss_needs_are_refused_by_file_and_line(
    base_folder: Path, feedback: Path, pairs: Path, tmp_path: Path
) -> None:
    plain = written(tmp_path / "plain.jsonl", [{"prompt": f"a {n}", "completion": "b"} for n in range(9)])
    cases = [
        (plain, "dpo", r"plain.jsonl:1: no rejected answer[\s\S]*`chosen` and `rejected`"),
        (feedback, "simpo", r"feedback.jsonl:1 and 13 more places: no rejected answer[\s\S]*loss `kto`"),
        (plain, "kto", r"plain.jsonl:1: nobody says whether[\s\S]*`label`"),
        (plain, "pretraining", r"plain.jsonl:1: a conversation is no raw text"),
        (plain, "policy-gradient", r"plain.jsonl:1: no rewards"),
    ]
    for rows, loss, message in cases:
        with raises("data/rows-unfit-for-loss", match=message):
            graftlm.train(recipe(base_folder, rows, loss), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("loss: dpoo", r"recipe.yaml:3: loss: unknown loss 'dpoo'. Did you mean 'dpo'"),
        ("loss: {name: dpo, bta: 0.1}", r"recipe.yaml:3: loss.bta: unknown key. Did you mean 'beta'\?"),
        ("loss: {beta: 0.1}", r"recipe.yaml:3: loss: give its name too"),
        ("loss: {name: dpo, link: cubic}", r"recipe.yaml:3: loss.link: .*'sigmoid'"),
        ("loss: kto\ntrain: {batch_rows: 1}", r"needs answers to other prompts of a step"),
        ("loss: {name: dpo, beta: -1}", r"recipe.yaml:3: loss.beta: .*greater than 0"),
    ],
)
def test_a_loss_that_is_none_is_refused_with_its_line(lines: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"base: smollm2\ndata: {{train: rows.jsonl}}\n{lines}\n")
    with pytest.raises(RecipeError, match=message):
        read_recipe(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mask": "everything"}, "compares answers and nothing else"),
        ({"prompt_weight": 0.5}, "compares answers and nothing else"),
        ({"pack": False}, "sees two answers in one pass"),
    ],
)
def test_what_a_comparison_cannot_do_is_refused(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, tmp_path / "rows.jsonl", "dpo", data=data)


@pytest.mark.parametrize(
    ("policy", "says"),
    [("neftune", "it adds noise .* loss dpo"), ("i-lora", "ties the hidden states .* loss dpo")],
)
def test_what_a_reference_does_not_go_with(policy: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"base: smollm2\ndata: {{train: rows.jsonl}}\nloss: dpo\ncallbacks: [{policy}]\n")
    with pytest.raises(RecipeError, match=says):
        read_recipe(file)


def test_a_name_is_a_loss_with_its_defaults(tmp_path: Path) -> None:
    by_name = recipe(tmp_path, tmp_path / "rows.jsonl", "dpo")
    assert by_name == recipe(tmp_path, tmp_path / "rows.jsonl", {"name": "dpo"})
    assert by_name.loss.name == "dpo"
    changed = tmp_path / "recipe.yaml"
    changed.write_text("base: smollm2\ndata: {train: rows.jsonl}\nloss: {name: dpo}\n")
    assert read_recipe(changed, ["loss.beta=0.5"]).loss.beta == 0.5  # type: ignore[attr-defined]


# On several ranks ------------------------------------------------------------------------------------------------


def summary_of(base: Path, rows: Path, loss: str, out: Path, shard: str) -> dict[str, Any]:
    found: dict[str, Any] = graftlm.train(recipe(base, rows, loss, train={"shard": shard}), out).summary
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "shard"), [("dpo", "none"), ("kto", "fsdp")])
def test_a_run_on_two_ranks_is_that_of_one(
    base_folder: Path, pairs: Path, tmp_path: Path, loss: str, shard: str
) -> None:
    one = summary_of(base_folder, pairs, loss, tmp_path / "one", "none")
    two, _ = together(2, summary_of, base_folder, pairs, loss, tmp_path / "two", shard)
    for side, wanted in one["held_out"]["objective"].items():
        assert two["held_out"]["objective"][side] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    for mine, wanted in zip(count_steps(tmp_path / "two"), count_steps(tmp_path / "one"), strict=True):
        assert {k: mine[k] for k in ("loss", "chosen_log_prob")} == pytest.approx(
            {k: wanted[k] for k in ("loss", "chosen_log_prob")}, rel=1e-4
        )
