"""A teacher is the base, an adapter on it or another base: what the policy is held to; and nothing else changes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftlm
from graftlm.adapters.save import save_adapter
from graftlm.config.schema import build
from graftlm.data.batches.pack import Example, Pack, pack
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import RecipeError
from graftlm.hub.load import load_base
from graftlm.losses.distillation import DistillationConfig
from graftlm.model.attach import attach
from graftlm.model.registry import hosts, trainable
from graftlm.model.state_dict import base_parameters
from graftlm.passes.forward import hidden_states
from graftlm.passes.packed_attention import packed_attention
from graftlm.passes.recompute import recomputed_layers
from graftlm.recipe import Recipe
from graftlm.testing import save_tiny_base, tiny_model
from graftlm.testing.deltas import move, perturbed
from graftlm.training.checkpoints import FACTS
from graftlm.training.objective import Objective
from graftlm.training.teacher import REFERENCE, TEACHER, adapters_compared_with, add_teacher
from tests.errors import raises
from tests.training.test_objective import answered, moved, same, step
from tests.training.test_resume import same as same_run
from tests.training.test_resume import stopping_after

pytestmark = pytest.mark.usefixtures("without_pictures")

KINDS = ("forward", "reverse", "jsd")


def examples(count: int = 4) -> list[Example]:
    return [answer for group in answered(count) for answer in group.answers]


def rows_alone(model: Any, teacher: Any, rows: list[Example], kind: str, T: float) -> Tensor:
    """The mean divergence over supervised tokens, row by row from the models' own logits, with a gradient."""
    total, count = torch.zeros(()), 0.0
    for row in rows:
        ids, weights = torch.from_numpy(row.ids.astype("int64"))[None], torch.from_numpy(row.weights)[1:]
        p = (model(ids).logits[0, :-1] / T).softmax(-1)
        with torch.no_grad():
            q = (teacher(ids).logits[0, :-1] / T).softmax(-1)
        m = (p + q) / 2
        found = {
            "forward": (q * (q / p).log()).sum(-1),
            "reverse": (p * (p / q).log()).sum(-1),
            "jsd": ((q * (q / m).log()).sum(-1) + (p * (p / m).log()).sum(-1)) / 2,
        }
        total, count = total + (weights * found[kind]).sum(), count + float(weights.sum())
    return T**2 * total / count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])
def test_a_pack_is_its_rows_alone(kind: Any, architecture: str) -> None:
    """With a soft cap and with a scale on the logits; packed, and with shared beginnings."""
    scale = {"logit_scale": 2.0} if architecture == "cohere" else {}
    model, rows = perturbed("lora", tiny_model(architecture, **scale)), examples()
    teacher = tiny_model(architecture, seed=5, hidden_size=48, **scale)
    model.__dict__[TEACHER] = teacher
    wanted = rows_alone(model, teacher, rows, kind, 1.5)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    for p in trainable(model).values():
        p.grad = None
    options = {"divergence": kind, "temperature": 1.5, "teacher": "another/base"}
    found = step(model, "distillation", options, pack(rows, 60, share=True))
    same((found[0], found[1], {}), (float(wanted.detach()), gradients, {}), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("lm_head",)])
def test_a_fresh_delta_is_its_base_and_learns_nothing_from_it(kind: Any, targets: tuple[str, ...]) -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=4, targets=targets))
    loss, gradients, metrics = step(model, "distillation", {"divergence": kind}, pack(examples(), 90, share=True))
    assert abs(loss) <= 1e-6
    assert metrics["divergence"] == pytest.approx(loss)
    assert gradients
    assert all(float(g.abs().max()) <= 1e-6 for g in gradients.values())


def test_a_delta_on_the_head_and_recomputed_layers_give_the_same() -> None:
    model = tiny_model()
    model.__dict__[TEACHER] = tiny_model(seed=5)
    move(attach(model, LoraConfig(r=4, targets=("lm_head", "q_proj", "v_proj"))))
    rows, options = examples(), {"teacher": "another/base", "divergence": "jsd"}
    wanted = rows_alone(model, model.__dict__[TEACHER], rows, "jsd", 1.0)
    found = step(model, "distillation", options, pack(rows, 60))
    assert found[0] == pytest.approx(float(wanted.detach()), rel=2e-5)
    with recomputed_layers(model):
        same(step(model, "distillation", options, pack(rows, 60)), found, 1e-5)


def test_a_step_towards_the_teacher_comes_nearer_to_it() -> None:
    model, parts = moved(), pack(examples(), 90, share=True)
    for kind in KINDS:
        options = {"teacher": "another/base", "divergence": kind}
        before, gradients, _ = step(model, "distillation", options, parts)
        with torch.no_grad():
            for name, p in trainable(model).items():
                p.sub_(1e-3 * gradients[name])
        assert step(model, "distillation", options, parts)[0] < before


def test_an_adapter_teaches_the_base_that_it_is_on(base_folder: Path, tmp_path: Path) -> None:
    other = load_base(str(base_folder)).model
    move(attach(other, LoraConfig(r=2)), scale=0.3)
    save_adapter(other, tmp_path / "adapter")
    model = load_base(str(base_folder)).model
    objective = Objective(DistillationConfig(teacher=str(tmp_path / "adapter")))
    objective.add_reference(model)
    assert REFERENCE in model.graft_attachment.configs
    perturbed("lora", model)
    assert not any(".reference." in name for name in trainable(model))
    (part,) = pack(examples(1), 1000)
    (made,) = objective.comparisons(model, part)
    other.eval()
    with torch.no_grad():
        wanted = other.get_output_embeddings()(hidden_states(other, part)[part.hidden_rows])
    assert torch.equal(made.logits(slice(0, 3)), wanted[:3])
    assert {name for host in hosts(model).values() for name in host.active} == {"default"}


# Another base ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("larger") / "larger", seed=5, hidden_size=48, num_hidden_layers=3)


def test_a_teacher_is_no_part_of_the_model(base_folder: Path, larger: Path) -> None:
    model = load_base(str(base_folder)).model
    before, names = [*model.named_parameters()], {*base_parameters(model)}
    config = DistillationConfig(teacher=str(larger), teacher_dtype="float32")
    add_teacher(model, config, base=str(base_folder), network=False)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before]
    assert {*base_parameters(model)} == names
    teacher = model.__dict__[TEACHER]
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert adapters_compared_with(config) == []
    add_teacher(model, config, base=str(base_folder), network=False)
    assert model.__dict__[TEACHER] is teacher, "it is loaded once"


def test_a_teacher_that_cannot_be_compared_with_is_refused(base_folder: Path, larger: Path, tmp_path: Path) -> None:
    def refused(teacher: Path, code: str, message: str | None = None) -> None:
        model = load_base(str(base_folder)).model
        with raises(code, match=message):
            add_teacher(model, DistillationConfig(teacher=str(teacher)), base=str(base_folder), network=False)
        assert TEACHER not in model.__dict__

    padded = save_tiny_base(tmp_path / "padded", vocab_size=320)
    refused(padded, "training/teacher-width-differs", "320 logits and this base 300")
    shutil.copytree(larger, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tree))
    refused(
        tmp_path / "other",
        "training/teacher-vocabulary-differs",
        "another vocabulary than the recipe's base(.|\n)*2 tokens differ(.|\n)*same family",
    )
    refused(tmp_path / "nowhere", "base/no-such-base")


# Whole runs ------------------------------------------------------------------------------------------------------


def recipe(base: Path, rows: Path, loss: dict[str, Any], **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 4},
        "delta": {"method": "lora", "r": 4},
        "loss": {"name": "distillation", **loss},
        "train": {"steps": 6, "batch_rows": 4, "pack_tokens": 64, "seed": 3, "save_every": 2, "learning_rate": 0.01},
        "report": {"samples": 1, "answers": 1, "max_new_tokens": 2},
    }
    return build(Recipe, tree | changes, source="test")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_a_larger_teacher_resumes_and_notices_another(
    base_folder: Path, larger: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = {"teacher": str(larger), "teacher_dtype": "float32", "supervised_weight": 0.5, "temperature": 2.0}
    wanted = recipe(base_folder, rows, loss)
    graftlm.train(wanted, tmp_path / "whole")
    seen = lines(tmp_path / "whole")
    assert all(line.keys() >= {"divergence", "supervised_loss"} for line in seen)
    for line in seen:
        assert line["loss"] == pytest.approx(0.5 * line["supervised_loss"] + 0.5 * 4 * line["divergence"], rel=1e-6)
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        graftlm.train(wanted, tmp_path / "parts")
    assert json.loads(next((tmp_path / "parts").rglob(FACTS)).read_text())["teacher"]["digest"].startswith("sha256:")
    larger_moved = larger.rename(larger.with_name("kept"))
    save_tiny_base(larger, seed=6, hidden_size=48, num_hidden_layers=3)
    with raises("training/dependencies-changed", match=r"teacher: \w+ -> \w+; \d+ of \d+ weights differ"):
        graftlm.train(wanted, tmp_path / "parts", resume=True)
    shutil.rmtree(larger)
    larger_moved.rename(larger)
    graftlm.train(wanted, tmp_path / "parts", resume=True)
    same_run(tmp_path / "parts", tmp_path / "whole")


def test_an_adapter_on_the_teacher_makes_another_teacher(
    base_folder: Path, larger: Path, rows: Path, tmp_path: Path
) -> None:
    tuned = load_base(str(larger), dtype="float32").model
    move(attach(tuned, LoraConfig(r=2)), scale=0.3)
    save_adapter(tuned, tmp_path / "adapter")
    first = []
    for number, more in enumerate(({}, {"teacher_adapter": str(tmp_path / "adapter")})):
        loss = {"teacher": str(larger), "teacher_dtype": "float32", **more}
        graftlm.train(recipe(base_folder, rows, loss), tmp_path / f"out-{number}")
        first.append(lines(tmp_path / f"out-{number}")[0]["loss"])
    assert first[0] != pytest.approx(first[1], rel=1e-3)


def test_recipes_that_mean_nothing_are_refused(base_folder: Path, rows: Path) -> None:
    with pytest.raises(RecipeError, match="loss distillation needs a teacher"):
        recipe(base_folder, rows, {})
    recipe(base_folder, rows, {"supervised_weight": 0.9})
    with pytest.raises(RecipeError, match="neftune: it adds noise"):
        recipe(base_folder, rows, {"teacher": "x"}, callbacks=["neftune"])


def test_a_pack_without_rows_has_the_passes_of_one_with_them() -> None:
    model = moved()
    (part,) = pack(examples(1), 1000)
    idle: Pack = part.idle()
    with packed_attention(model):
        made, _ = Objective(DistillationConfig(teacher="another/base")).part(model, idle)
    made.sum.backward()
    assert made.sum.item() == 0
