"""A whole run on a tiny base: what it leaves, that it can be repeated, and that nothing is lost when it goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import graftlm
import graftlm.optim.adamw as adamw_module
import graftlm.training.phases as phases
from graftlm.adapters.folder import adapters_in
from graftlm.adapters.load import load_adapter
from graftlm.config.schema import build
from graftlm.deltas import METHODS
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.config import BaseConfig
from graftlm.hub.fingerprint import fingerprint
from graftlm.hub.load import load_base
from graftlm.hub.tokenizer import load_tokenizer
from graftlm.model.registry import hosts
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe, read_recipe
from graftlm.testing import save_tiny_base
from graftlm.testing.deltas import logits
from graftlm.training.trainer import Trainer
from tests.errors import raises

SUMMARY = {
    "held_out": {"rouge_l": {"base", "tuned"}, "loss_nats": {"base", "tuned"}},
    "train": {"tokens_per_s", "supervised_tokens", "steps", "wall_s", "peak_rss_gib"},
}


def recipe(base: Path, rows: Path, **changes: Any) -> Recipe:
    tree = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 4},
        "delta": {"method": "lora", "r": 4},
        "train": {"steps": 4, "batch_rows": 4, "seed": 3},
        "report": {"samples": 2, "max_new_tokens": 6},
    }
    for key, value in changes.items():
        section, _, name = key.partition("_")
        tree[section][name] = value
    return build(Recipe, tree, source="test")


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_the_whole_folder(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    result = graftlm.train(recipe(base_folder, rows), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "graftlm.json", "chat_template.jinja", "tokenizer.json",
        "recipe.yaml", "metrics.jsonl", "summary.json", "report.html", "README.md", "held_out.jsonl",
    }  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == result.summary
    for section, keys in SUMMARY.items():
        assert summary[section].keys() >= set(keys)
    assert summary["seed"] == 3
    assert summary["base_fingerprint"].startswith("sha256:")
    assert summary["train"]["steps"] == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["supervised_tokens"] for line in lines) == summary["train"]["supervised_tokens"]
    assert not list(tmp_path.glob(".*partial*")), "no temporary folder is left"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page
    for fetching in ("src=", "<link", "<script", "url(http", "@import"):
        assert fetching not in page, "the report fetches nothing"


def test_the_delta_learns_and_the_summary_says_so(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    trained = recipe(base_folder, rows, train_steps=30, train_learning_rate=0.02)
    summary = graftlm.train(trained, tmp_path / "out").summary
    loss = summary["held_out"]["loss_nats"]
    assert loss["tuned"] < loss["base"] - 0.05
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        graftlm.train(recipe(base_folder, rows, train_seed=seed, delta_dropout=0.1), tmp_path / name)
    assert adapter(tmp_path / "a") == adapter(tmp_path / "b")
    assert adapter(tmp_path / "a") != adapter(tmp_path / "c")


def test_the_recipe_in_the_folder_repeats_the_run(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    graftlm.train(recipe(base_folder, rows), tmp_path / "a")
    graftlm.train(tmp_path / "a" / "recipe.yaml", tmp_path / "b")
    assert adapter(tmp_path / "a") == adapter(tmp_path / "b")
    assert (tmp_path / "a" / "recipe.yaml").read_text() == (tmp_path / "b" / "recipe.yaml").read_text()


def test_pack_size_and_packing_itself_change_nothing(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    adapters = []
    for name, changes in (("a", {}), ("b", {"train_pack_tokens": 60}), ("c", {"data_pack": False})):
        graftlm.train(recipe(base_folder, rows, **changes), tmp_path / name)
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for other in adapters[1:]:
        for key, tensor in adapters[0].items():
            # Adam divides by the size of the gradient, so an element whose gradient is rounding noise moves freely.
            assert torch.allclose(other[key], tensor, rtol=1e-3, atol=2e-5), key


def test_the_batch_with_the_most_tokens_comes_first(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    graftlm.train(recipe(base_folder, rows, train_steps=5), tmp_path / "out")
    tokens = [json.loads(line)["tokens"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert tokens[0] == max(tokens)


def test_an_existing_folder_is_kept_unless_overwrite(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    graftlm.train(recipe(base_folder, rows), out)
    (out / "precious").write_text("x")
    with raises("output/already-exists", match="--overwrite"):
        graftlm.train(recipe(base_folder, rows), out)
    assert (out / "precious").read_text() == "x"
    graftlm.train(recipe(base_folder, rows), out, overwrite=True)
    assert not (out / "precious").exists()
    assert adapter(out)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"delta_targets": ("nothing",)}, "target/no-layer-matches"),
        ({"data_held_out": 1000}, "data/held-out-too-large"),
        ({"data_train": "no.jsonl"}, "data/no-such-file"),
    ],
)
def test_bad_input_loses_nothing_that_was_there(
    changes: dict[str, Any], code: str, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    graftlm.train(recipe(base_folder, rows), tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with raises(code):
        graftlm.train(recipe(base_folder, rows, **changes), tmp_path / "out", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_a_failure_while_measuring_leaves_the_adapter(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr("graftlm.results.evaluate", fails)
    with pytest.raises(RuntimeError):
        graftlm.train(recipe(base_folder, rows), tmp_path / "out")
    model, _ = graftlm.load_base(str(base_folder), dtype="float32")
    graftlm.load_adapter(model, tmp_path / "out")


def test_a_model_that_cannot_be_packed_is_refused_with_the_remedy(rows: Path, tmp_path: Path) -> None:
    config = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
    base = save_tiny_base(tmp_path / "bloom", **config)
    with raises("training/cannot-pack", match="pack: false"):
        graftlm.train(recipe(base, rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = graftlm.train(recipe(base, rows, data_pack=False), tmp_path / "out").summary
    assert summary["train"]["steps"] == 4
    for file in ("report.html", "README.md"):
        assert (
            "generated by transformers: none of its layers calls attention" in (tmp_path / "out" / file).read_text()
        ), "and it is said"


@pytest.mark.slow
def test_ctrl_c_in_mid_training_saves_what_was_done_and_says_so(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(Path(__file__).parents[1].joinpath("graftlm/recipes/quickstart.yaml").read_text())
    tree |= {"base": str(base_folder), "data": {"train": str(rows), "held_out": 2}}
    tree["train"] = {"steps": 100_000, "batch_rows": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "graftlm", "train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not any(
        f.stat().st_size > 200 for f in tmp_path.glob("out/checkpoints/metrics.jsonl")
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "--resume goes on from there" in " ".join(output.split())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert summary["train"]["steps"] == len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    model, _ = graftlm.load_base(str(base_folder))
    graftlm.load_adapter(model, tmp_path / "out")


STUCK = """
import sys, time
from pathlib import Path
from graftlm.cli import main
from graftlm.training.objective import Objective

part, calls = Objective.part, []

def stuck(*arguments):
    calls.append(None)
    if len(calls) == 3:
        Path(sys.argv[-1], "stuck").touch()
        time.sleep(600)
    return part(*arguments)

Objective.part = stuck
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_in_mid_step_and_what_was_saved_stays(
    number: signal.Signals, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    tree = {"base": str(base_folder), "data": {"train": str(rows), "held_out": 2}, "report": {"answers": 0}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree | {"train": {"steps": 4, "batch_rows": 2, "save_every": 2}}))
    out = tmp_path / "out"
    command = [sys.executable, "-c", STUCK, "train", str(tmp_path / "r.yaml"), "--out", str(out)]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not (out / "stuck").exists():
        time.sleep(0.01)
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)  # the first asks for the end of the step, which does not come
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert not (out / "adapter_model.safetensors").exists()
    (out / "stuck").unlink()
    assert graftlm.train(read_recipe(tmp_path / "r.yaml"), out, resume=True).summary["train"]["steps"] == 4


def test_held_out_questions_are_not_trained_on(base_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "doubles.jsonl"
    lines = [json.dumps({"prompt": f"q{n % 6}", "completion": f"a {n}"}) for n in range(24)]
    file.write_text("\n".join(lines))
    data = prepare_data(recipe(base_folder, file), graftlm.load_base(str(base_folder)).tokenizer)
    trained = {example.where for example in data.examples}
    held_out = {row.messages[0].content for row in data.held_out_rows}
    for number, line in enumerate(lines, start=1):
        assert not (f"{file}:{number}" in trained and json.loads(line)["prompt"] in held_out)
    assert len(data.held_out_rows) == 4


# Several deltas --------------------------------------------------------------------------------------------------


def several(base: Path, rows: Path, **train: Any) -> Recipe:
    tree = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 4},
        "deltas": {
            "low": {"method": "lora", "r": 4},
            "biases": {"method": "bitfit"},
            "adapters": {"method": "houlsby", "r": 4},
            "before": {"method": "prefix", "p": 3},
        },
        "train": {"steps": 8, "batch_rows": 2, "seed": 3, **train},
        "report": {"samples": 0, "answers": 0},
    }
    return build(Recipe, tree, source="test")


def test_several_deltas_are_trained_together_and_each_is_an_adapter(
    base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    result = graftlm.train(several(base_folder, rows), tmp_path / "out")
    folders = adapters_in(tmp_path / "out")
    assert list(folders) == ["low", "biases", "adapters", "before"], "in the order in which they act"
    trained = logits(result.model)
    model = graftlm.load_base(BaseConfig(name=str(base_folder), dtype="float32")).model
    for name, folder in folders.items():
        load_adapter(model, folder, name=name)
        assert (folder / "README.md").is_file()
    assert torch.equal(logits(model), trained), "the adapters together are the model that was trained"
    with raises("output/already-exists"):
        graftlm.train(several(base_folder, rows), tmp_path / "out")
    graftlm.train(several(base_folder, rows), tmp_path / "out", overwrite=True)


def test_in_turn_each_delta_learns_for_its_share_of_the_steps_and_then_rests(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving: list[set[str]] = []
    real = Trainer.step

    def watched(trainer: Trainer) -> Any:
        names = trainer.setup.deltas
        before = {n: [p.detach().clone() for p in every(trainer.model, n)] for n in names}
        step = real(trainer)
        now = {n: every(trainer.model, n) for n in names}
        moving.append({n for n in names if any(not torch.equal(a, b) for a, b in zip(before[n], now[n], strict=True))})
        return step

    def every(model: Any, name: str) -> list[Any]:
        return [p for host in hosts(model).values() if name in host.deltas for p in host.deltas[name].parameters()]

    monkeypatch.setattr(Trainer, "step", watched)
    graftlm.train(several(base_folder, rows, in_turn=True), tmp_path / "out")
    assert moving == [{name} for name in ("low", "biases", "adapters", "before") for _ in range(2)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


def test_a_delta_and_several_at_once_are_refused(rows: Path) -> None:
    with raises("recipe/invalid-value", match="give delta, or several by name in deltas, not both"):
        build(Recipe, {"data": {"train": str(rows)}, "delta": {"method": "lora"}, "deltas": {"a": {"method": "lora"}}},
              source="test")  # fmt: skip
    assert build(Recipe, {"data": {"train": str(rows)}}, source="test").delta == LoraConfig()


def test_the_learning_rate_is_the_method_s_own_unless_the_recipe_says_another(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["bitfit"].delta, "learning_rate", 0.125)
    groups: list[list[float]] = []
    real = adamw_module.adamw

    def watched(made: Any, **settings: Any) -> Any:
        made = list(made)
        groups.append([rate for _, rate in made])
        return real(made, **settings)

    monkeypatch.setattr(adamw_module, "adamw", watched)
    graftlm.train(several(base_folder, rows, steps=1), tmp_path / "a")
    graftlm.train(several(base_folder, rows, steps=1, learning_rate=1e-3), tmp_path / "b")
    assert groups[0][:2] == [METHODS["lora"].delta.learning_rate, 0.125]
    assert groups[1] == [1e-3] * 4


@pytest.mark.parametrize("init", ["lora-ga", "eva"])
def test_an_init_that_wants_statistics_gets_them_from_the_training_rows(
    base_folder: Path, rows: Path, tmp_path: Path, init: str
) -> None:
    result = graftlm.train(recipe(base_folder, rows, delta_init=init), tmp_path / "out")
    model = graftlm.load_base(BaseConfig(name=str(base_folder), dtype="float32")).model
    load_adapter(model, tmp_path / "out")
    assert torch.equal(logits(model), logits(result.model))
    again = graftlm.train(recipe(base_folder, rows, delta_init=init), tmp_path / "again")
    assert adapter(tmp_path / "out") == adapter(tmp_path / "again")
    assert again.summary["train"]["steps"] == 4


@pytest.mark.parametrize("init", ["zero", "loftq", "lq-lora", "quailora"])
def test_a_quantized_base_is_trained_on_and_stays_the_same_base(
    init: str, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    result = graftlm.train(recipe(base_folder, rows, base_quantization="nf4", delta_init=init), tmp_path / "out")
    assert result.summary["base_fingerprint"] == fingerprint(load_base(str(base_folder), dtype="float32").model).digest
    again = load_base(str(base_folder), dtype="float32", quantization="nf4").model
    load_adapter(again, tmp_path / "out")
    assert torch.equal(logits(again), logits(result.model))
    B = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for key, tensor in B.items() if "lora_B" in key)


def test_checkpointing_changes_no_byte_that_matters(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    lines = []
    for name, on in (("a", False), ("b", True)):
        graftlm.train(recipe(base_folder, rows, train_checkpointing=on), tmp_path / name)
        lines.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is allowed")
def test_offloading_on_a_cpu_is_refused_with_the_reason(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    with raises("training/gpu-only-setting", match="train.offload"):
        graftlm.train(recipe(base_folder, rows, train_offload=True), tmp_path / "out")


@pytest.mark.parametrize("by", ["length", "hard"])
def test_a_curriculum_is_what_is_trained_on(by: str, base_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "graded.jsonl"
    lines = [
        {"prompt": "q", "group": f"{n}", "completion": "a " * (1 + 5 * n % 12) + "b", "hard": (7 * n) % 12}
        for n in range(12)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = {
        "base": str(base_folder),
        "data": {"train": str(file), "order": {"by": by}},
        "train": {"epochs": 2, "batch_rows": 3},
    }
    made = build(Recipe, tree, source="test")
    data = prepare_data(made, load_tokenizer(made.base))
    plan = phases.make_batches(made.train, data.examples, data.curriculum)
    order = [int(data.examples[i].where.rpartition(":")[2]) - 1 for step in plan for i in step]
    keys = [lines[n]["hard"] if by == "hard" else len(lines[n]["completion"]) for n in order]
    assert keys[:12] == sorted(keys[:12])
    assert keys[12:] == sorted(keys[12:])
    assert graftlm.train(made, tmp_path / "out").summary["train"]["steps"] == 8
