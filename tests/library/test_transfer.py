"""Transfer: the rows are the adapter's own and the same each time, and the target learns from them."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from typer.testing import CliRunner

import graftlm.display.pages as pages
from graftlm import DataConfig, LoraConfig, Recipe, TrainConfig, cli, train
from graftlm.adapters.adapter import Adapter
from graftlm.adapters.export.export import export
from graftlm.adapters.load import load_adapter
from graftlm.data.chat.render import Renderer
from graftlm.generation.answer import chat_renderer
from graftlm.generation.engine import Engine
from graftlm.hub.load import load_base
from graftlm.library import synthesis
from graftlm.library import transfer as module
from graftlm.library.synthesis import Counts, Seed, SynthesisConfig, SyntheticRow, read_seeds, request_for, synthesize
from graftlm.library.transfer import TRANSFER, recipe_for, transfer
from graftlm.model.attach import detach
from graftlm.recipe import ReportConfig
from graftlm.testing import save_tiny_base
from tests.errors import raises
from tests.training.test_resume import stopping_after

SMALL = SynthesisConfig(rows=8, tries=50, shots=2, question_tokens=12, answer_tokens=8, temperature=0.6)
QUICK = ("report.answers=0", "train.learning_rate=1e-2", "train.epochs=4", "train.batch_rows=4", "train.kernels=torch")
OTHER = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)


def trained(out: Path, base: Path, rows: list[dict[str, str]], steps: int) -> Any:
    file = out.with_name(f"{out.name}.rows.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        base=str(base),
        data=DataConfig(train=str(file)),
        delta=LoraConfig(r=8),
        train=TrainConfig(steps=steps, learning_rate=2e-2, save_every=1000, kernels="torch"),
        report=ReportConfig(answers=0, samples=0),
    )
    drawn = {"figure": lambda *_, **__: (MagicMock(), MagicMock()), "svg": lambda _: "<svg></svg>"}
    with patch.multiple(pages, **drawn):
        return train(recipe, out)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that writes questions, an adapter of it that answers them, its rows, and a target of other sizes, tokens
    and template."""
    folder = tmp_path_factory.mktemp("transfer")
    seeds = [Seed(f"question {n}") for n in range(24)]
    asked = [request_for(random.Random(n).sample(seeds, 2)) for n in range(48)]
    writer = [{"prompt": text, "completion": f"question {n}"} for n, text in enumerate(asked)]
    result = trained(folder / "writer", save_tiny_base(folder / "random", initializer_range=0.3), writer, 40)
    export(result.model, folder / "base", to="merged", tokenizer=result.tokenizer)
    rows = [{"prompt": seed.question, "completion": "the answer"} for seed in seeds]
    trained(folder / "source", folder / "base", rows, 20)
    fresh = [{"prompt": f"question {n}", "completion": "?"} for n in range(24, 36)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fresh))
    target = save_tiny_base(
        folder / "target", seed=5, hidden_size=48, num_hidden_layers=3, initializer_range=0.3, template=OTHER
    )
    file = target / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["merges"] = []  # every token of text is one byte: longer rows, and other ids
    file.write_text(json.dumps(tree))
    return folder


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "BATCH", 12)
    monkeypatch.setattr(synthesis, "JUDGES", 8)


@pytest.fixture
def source(work: Path) -> tuple[Any, Any]:
    model, tokenizer = load_base(str(work / "base"), dtype="float32")
    load_adapter(model, work / "source")
    return model, tokenizer


def seeds_of(work: Path) -> list[Seed]:
    return read_seeds(work / "rows.jsonl", None)


def made(source: tuple[Any, Any], work: Path, config: SynthesisConfig = SMALL) -> tuple[list[SyntheticRow], Any]:
    return synthesize(*source, seeds_of(work), config, adapters=("default",))


def test_rows_are_the_same_for_the_same_seed(source: tuple[Any, Any], work: Path) -> None:
    rows, counts = made(source, work)
    again, _ = made(source, work)
    assert rows == again
    assert len(rows) == counts.kept == SMALL.rows
    assert len({row.seed.question for row in rows}) == SMALL.rows
    other, _ = made(source, work, replace(SMALL, seed=1))
    assert {row.seed.question for row in rows} != {row.seed.question for row in other}
    fewer, _ = made(source, work, replace(SMALL, rows=2))
    assert fewer == rows[:2]


@torch.no_grad()
def test_an_answer_is_the_greedy_one_and_its_figure_the_mean_log_probability(
    source: tuple[Any, Any], work: Path
) -> None:
    model, tokenizer = source
    renderer = chat_renderer(model, tokenizer)
    (stop,) = renderer.stop_ids
    for row in made(source, work, replace(SMALL, rows=3))[0]:
        ids = [int(each) for each in renderer.prompt(row.seed.messages())]
        start, figures = len(ids), []
        while ids[-1] != stop or len(ids) == start:
            log_probs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(log_probs.argmax()))
            figures.append(float(log_probs.max()))
        assert renderer.decode(ids[start:]).strip() == row.answer
        assert row.log_prob == pytest.approx(sum(figures) / len(figures), rel=1e-4)


def test_the_filter_leaves_out_what_is_less_sure_than_any_seed(source: tuple[Any, Any], work: Path) -> None:
    config = replace(SMALL, rows=6, temperature=1.0)
    every, unfiltered = made(source, work, replace(config, filter=False))
    kept, counts = made(source, work, config)
    assert unfiltered.threshold is None
    assert unfiltered.filtered == 0
    assert counts.filtered > 0, "else the test shows nothing"
    wanted = [row for row in every if row.log_prob >= counts.threshold]
    assert [row for row in kept if row in every] == wanted
    assert min(row.log_prob for row in kept) >= counts.threshold


def test_questions_come_from_the_bare_base(source: tuple[Any, Any], work: Path) -> None:
    model, tokenizer = source
    engine, renderer, seeds = Engine(model, prepack=False), Renderer(tokenizer), seeds_of(work)

    def questions() -> list[Seed]:
        return list(synthesis._questions(engine, renderer, seeds, SMALL, range(8), Counts()))

    before = questions()
    assert before
    detach(model)
    assert questions() == before


def test_seeds_are_questions_that_stand_by_themselves(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "a"}
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, turn, {"role": "assistant", "content": "b"}]},
        {"messages": [turn, {"role": "assistant", "content": "b"}, turn, {"role": "assistant", "content": "c"}]},
        {"messages": [turn, {"role": "assistant", "content": "d"}]},
        {"messages": [turn, {"role": "assistant", "content": "e"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_seeds(tmp_path / "rows.jsonl", None) == [Seed("a", "Be brief."), Seed("a")]
    (tmp_path / "prompts.txt").write_text("one\n\n two \none\n")
    assert read_seeds(None, tmp_path / "prompts.txt") == [Seed("one"), Seed("two")]
    (tmp_path / "prompts.txt").write_text("\n")
    with raises("data/no-prompts"):
        read_seeds(None, tmp_path / "prompts.txt")
    with raises("data/unreadable-file"):
        read_seeds(None, tmp_path / "nope.txt")
    assert "Request: one\n\nRequest: two" in request_for([Seed("one"), Seed("two")])
    row = SyntheticRow(Seed("a", "Be brief."), "b", -1.0).to_fields()
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


def test_answers_that_do_not_end_are_named(source: tuple[Any, Any], work: Path) -> None:
    with raises("data/no-complete-answers", match="1 tokens"):
        made(source, work, replace(SMALL, answer_tokens=1))
    with raises("data/no-rows-left", match="answers did not end"):
        made(source, work, replace(SMALL, answer_tokens=1, filter=False, rows=2))


# The run on the target ----------------------------------------------------------------------------------------------


def test_the_target_learns_what_the_source_answers_and_a_stopped_run_goes_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pictures: None
) -> None:
    known: dict[str, Any] = {"base": str(work / "base"), "synthesis": SMALL}
    options = (*QUICK, "train.save_every=1")
    whole = transfer(
        work / "source", str(work / "target"), seeds_of(work), tmp_path / "whole", overrides=options, **known
    )
    loss = whole.summary["held_out"]["loss_nats"]
    assert loss["tuned"] < loss["base"] - 0.5
    adapter = Adapter.read(tmp_path / "whole")
    assert adapter.config == recipe_for(work / "source", str(work / "target"), tmp_path / "whole", QUICK).delta
    assert adapter.config.r == 8  # type: ignore[attr-defined]
    facts = json.loads((tmp_path / "whole" / TRANSFER).read_text())
    assert facts["counts"]["kept"] == SMALL.rows
    assert facts["source"]["fingerprint"] == Adapter.read(work / "source").base["digest"]  # type: ignore[index]

    where = (work / "source", str(work / "target"), seeds_of(work), tmp_path / "parts")
    with monkeypatch.context() as patched:
        stopping_after(2, patched)
        stopped = transfer(*where, overrides=options, **known)
    assert stopped.summary["interrupted"]
    with monkeypatch.context() as patched:
        patched.setattr(module, "synthesize", lambda *_, **__: pytest.fail("the rows are there"))
        with raises("output/unfinished-run"):
            transfer(*where, overrides=options, **known)
        transfer(*where, overrides=options, resume=True, **known)
    assert (tmp_path / "parts.rows.jsonl").read_bytes() == (tmp_path / "whole.rows.jsonl").read_bytes()
    parts = Adapter.read(tmp_path / "parts")
    assert all(torch.equal(parts.tensors[key], t) for key, t in adapter.tensors.items())


def test_rows_of_other_settings_are_not_taken_for_these(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train", lambda recipe, out, **_: out.mkdir())
    monkeypatch.setattr(module, "synthesize", lambda *_, **__: ([SyntheticRow(Seed("q"), "a", -1.0)], Counts()))
    where = (work / "source", str(work / "target"), seeds_of(work), tmp_path / "out")
    known: dict[str, Any] = {"base": str(work / "base")}
    transfer(*where, synthesis=SMALL, **known)
    with raises("output/already-exists"):
        transfer(*where, synthesis=SMALL, **known)
    (tmp_path / "out" / TRANSFER).unlink()
    (tmp_path / "out").rmdir()
    with raises("output/other-rows", match="seed was 0"):
        transfer(*where, synthesis=replace(SMALL, seed=3), **known)
    (tmp_path / "out.rows.jsonl").write_text("{}\n")
    with raises("output/other-rows"):
        transfer(*where, synthesis=SMALL, **known)
    transfer(*where, synthesis=SMALL, overwrite=True, **known)
    assert "assistant" in (tmp_path / "out.rows.jsonl").read_text()


def test_the_own_base_is_refused_before_and_after_rows_are_made(work: Path, tmp_path: Path) -> None:
    with raises("base/same-base"):
        transfer(work / "source", str(work / "base"), seeds_of(work), tmp_path / "out", base=str(work / "base"))
    assert not list(tmp_path.glob("out*"))


def test_the_base_of_the_adapter_is_found_by_its_name_or_asked_for(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = (work / "source", str(work / "target"), seeds_of(work), tmp_path / "out")
    with raises("base/no-such-base", match="--base"):
        transfer(*where)
    tensors, stored = Adapter.read(work / "source").tensors, {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    Adapter(tensors, {**stored, "target_modules": "all-linear"}).write(tmp_path / "nameless")
    with raises("adapter/no-base-named", match="--base"):
        transfer(tmp_path / "nameless", *where[1:])


def test_the_command_transfers(work: Path, tmp_path: Path, without_pictures: None) -> None:
    arguments = ["transfer", str(work / "source"), "--to", str(work / "target"), "--out", str(tmp_path / "out")]
    arguments += ["--base", str(work / "base"), "--count", "3", "--answer-tokens", "8", "--no-filter"]
    (tmp_path / "prompts.txt").write_text("question 1\nquestion 2\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "report.answers=0", "train.steps=1", "train.kernels=torch"]
    done = CliRunner().invoke(cli.app, arguments + options)
    assert done.exit_code == 0, done.output
    assert "3 rows in" in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    for wrong in ([], ["--rows", "rows.jsonl", "--prompts", "prompts.txt"]):
        assert CliRunner().invoke(cli.app, arguments + wrong).exit_code == 2
