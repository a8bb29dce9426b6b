"""Regularisers: each against the plain equation with autograd, once a step, on any objective, packs and ranks."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftlm
import graftlm.training.loop as loop
from graftlm import distributed
from graftlm.config.schema import build
from graftlm.data.batches.pack import pack
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import RecipeError
from graftlm.losses import LOSSES
from graftlm.model.attach import attach
from graftlm.model.modes import deltas_off
from graftlm.model.registry import trainable
from graftlm.passes.packed_attention import packed_attention
from graftlm.recipe import Recipe
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.objective import Objective
from graftlm.training.regularizers import REGULARIZERS, check_regularizers, terms
from graftlm.training.state import TrainingState
from tests.errors import raises
from tests.training.test_objective import answered, items, moved
from tests.training.together import together

pytestmark = pytest.mark.usefixtures("without_pictures")


def tensors(model: Any, name: str) -> list[Tensor]:
    return [p for key, p in trainable(model).items() if key.endswith(f".{name}")]


def squares(rows: Tensor) -> Tensor:
    return (rows @ rows.T - torch.eye(len(rows))).square().sum()


def grouped(model: Any, by: str) -> Tensor:
    total = torch.zeros(())
    for A, B in zip(tensors(model, "A"), tensors(model, "B"), strict=True):
        if by == "site":
            total = total + (A.numel() + B.numel()) ** 0.5 * (A.square().sum() + B.square().sum()).sqrt()
        for i in range(len(A) if by == "component" else 0):
            total = total + (A.shape[1] + B.shape[0]) ** 0.5 * (A[i].square().sum() + B[:, i].square().sum()).sqrt()
    return total


PLAIN: list[tuple[dict[str, Any], Any]] = [
    ({"name": "l1"}, lambda m: sum(p.abs().sum() for p in trainable(m).values())),
    ({"name": "l2"}, lambda m: sum((p * p).sum() for p in trainable(m).values())),
    ({"name": "l2", "tensors": "B"}, lambda m: sum((p * p).sum() for p in tensors(m, "B"))),
    ({"name": "orthogonality"}, lambda m: sum(map(squares, [*tensors(m, "A"), *(B.T for B in tensors(m, "B"))]))),
    ({"name": "group-lasso"}, lambda m: grouped(m, "component")),
    ({"name": "group-lasso", "by": "site"}, lambda m: grouped(m, "site")),
]  # fmt: skip


def made(options: dict[str, Any], weight: float = 0.5) -> Any:
    return REGULARIZERS[options["name"]][0](weight=weight, **{k: v for k, v in options.items() if k != "name"})


@pytest.mark.parametrize(("options", "plain"), PLAIN, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_each_is_its_equation(options: dict[str, Any], plain: Any) -> None:
    model = perturbed("lora", tiny_model()).double()
    config = made(options)
    check_regularizers([config], model)
    ((weight, value),) = terms([config], model).values()
    wanted = plain(model)
    assert weight == 0.5
    torch.testing.assert_close(value, wanted, rtol=1e-9, atol=0.0)
    for ours, theirs in zip(
        torch.autograd.grad(value, [*trainable(model).values()], allow_unused=True),
        torch.autograd.grad(wanted, [*trainable(model).values()], allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_delta_at_its_start_has_finite_gradients() -> None:
    """B of LoRA is zero then, and a norm has no gradient at zero."""
    model = attach(tiny_model(), LoraConfig(r=4))
    for options, _ in PLAIN:
        ((_, value),) = terms([made(options)], model).values()
        for gradient in torch.autograd.grad(value, [*trainable(model).values()], allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


def one(name: str, options: dict[str, Any], added: list[dict[str, Any]], tokens: int = 40) -> Any:
    """(loss, metrics, gradients) of a step, on this rank."""
    distributed.start()
    model = moved()
    objective = Objective(LOSSES[name].config(**options))
    rows = items(name, answered(3))
    make = partial(pack, tokens=tokens, share=True)
    packs = [p for some in (rows, objective.mismatched(rows)) for p in distributed.packs_of(some, make)]
    gradients: dict[str, Tensor] = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            gradients.update({key: p.grad.clone() for key, p in trainable(model).items() if p.grad is not None})

    training = TrainingState(model, {}, Recorder(trainable(model).values(), lr=0.0))
    regularizers = [made(each, 0.5) for each in added]
    train_step = loop.TrainStep(training, objective.config, lambda n: 1.0, clip=1e9, regularizers=regularizers)
    step = train_step.step(packs)
    return step.loss, dict(step.metrics), gradients


ALL = [{"name": "l2"}, {"name": "orthogonality"}, {"name": "group-lasso"}, {"name": "l1"}, {"name": "kl"}]


@pytest.mark.parametrize(("name", "kind"), [("supervised", "reverse"), ("dpo", "forward")])
def test_they_are_added_to_the_gradient_of_any_objective_once(name: str, kind: str) -> None:
    loss, metrics, alone = one(name, {}, [])
    added = [*ALL[:-1], {"name": "kl", "divergence": kind}]
    again, more, gradients = one(name, {}, added)
    assert again == pytest.approx(loss)
    assert metrics == pytest.approx({key: more[key] for key in metrics})
    assert more.keys() - metrics.keys() == {"l1", "l2", "orthogonality", "group_lasso", "kl_to_base"}

    model = moved()
    total, count = torch.zeros(()), 0.0
    for row in (answer for group in answered(3) for answer in group.answers):
        ids, weights = torch.from_numpy(row.ids.astype("int64"))[None], torch.from_numpy(row.weights)[1:]
        p = model(ids).logits[0, :-1].softmax(-1)
        with deltas_off(model), torch.no_grad():
            q = model(ids).logits[0, :-1].softmax(-1)
        apart = (p * (p / q).log()).sum(-1) if kind == "reverse" else (q * (q / p).log()).sum(-1)
        total, count = total + (weights * apart).sum(), count + float(weights.sum())
    assert more["kl_to_base"] == pytest.approx(float(total.detach()) / count, rel=1e-4)
    plain = {options["name"]: function for options, function in PLAIN if len(options) == 1}
    extra = 0.5 * (total / count + sum(function(model) for function in plain.values()))
    extra.backward()
    largest = max(float(p.grad.abs().max()) for p in trainable(model).values() if p.grad is not None)
    for key, p in trainable(model).items():
        assert p.grad is not None
        assert float((gradients[key] - alone[key] - p.grad).abs().max()) <= 1e-5 * largest, key


def test_the_first_margin_is_zero_beside_a_tie_to_the_base_too() -> None:
    """The policy is read for more than log-probabilities then, the reference is not."""
    model = attach(tiny_model(), LoraConfig(r=4))
    objective = Objective("dpo", made({"name": "kl"}))
    with packed_attention(model):
        for part in pack(answered(4), 60, share=True):
            found, _ = objective.part(model, part)
            assert float(found.metrics["margin"][0]) == 0.0
            assert float(found.metrics["kl_to_base"][0]) == 0.0
            assert found.penalty is not None


def every(tokens: int) -> list[Any]:
    return [one(name, {}, ALL, tokens) for name in ("supervised", "kto", "dpo")]


@pytest.mark.parametrize("count", [1, 2])
def test_packs_and_ranks_change_nothing(count: int) -> None:
    wanted = every(10_000)
    found = together(count, every, 40) if count > 1 else [every(40)]
    for results in found:
        for (loss, metrics, gradients), (whole, figures, total) in zip(results, wanted, strict=True):
            assert loss == pytest.approx(whole, rel=1e-5)
            assert metrics == pytest.approx(figures, rel=1e-5, abs=1e-5)
            largest = max(float(t.abs().max()) for t in total.values())
            assert all(float((gradients[key] - t).abs().max()) <= 1e-5 * largest for key, t in total.items())


@pytest.mark.parametrize(
    ("method", "options", "code", "message"),
    [
        (
            "lora",
            {"name": "l2", "tensors": "C"},
            "training/no-such-tensor",
            r"'C' is the end of no tensor's name(.|\n)*default\.A",
        ),
        ("ia3", {"name": "orthogonality"}, "training/not-a-matrix", "no tensor that .* is a matrix"),
        ("bitfit", {"name": "group-lasso"}, "training/no-rank-one-components", "no factor with rank-one components"),
    ],
)
def test_what_has_no_meaning_is_refused(method: str, options: dict[str, Any], code: str, message: str) -> None:
    model = perturbed(method, tiny_model())
    with raises(code, match=message):
        check_regularizers([made(options)], model)


def recipe(base: Path, rows: Path, **sections: Any) -> Recipe:
    tree: dict[str, Any] = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 2},
        "delta": {"method": "lora", "r": 4},
        "train": {"steps": 3, "batch_rows": 4, "learning_rate": 0.01},
        "report": {"samples": 1, "answers": 1, "max_new_tokens": 2},
    }
    return build(Recipe, tree | sections, source="test")


def test_a_recipe_has_a_list_of_them(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    added = [{"name": "kl", "weight": 0.1}, {"name": "l2", "weight": 1e-3, "tensors": "B"}]
    graftlm.train(recipe(base_folder, rows, regularisers=added), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl_to_base"] == 0
    assert lines[0]["l2"] == 0
    assert lines[-1]["kl_to_base"] > 0
    assert lines[-1]["l2"] > 0
    fused = recipe(base_folder, rows, regularisers={"name": "l1", "weight": 1}, optimizer="lomo")
    with raises("training/conflicting-settings"):
        graftlm.train(fused, tmp_path / "lomo")
    for wrong, message in (
        ([{"name": "l3", "weight": 1}], "unknown regulariser 'l3'"),
        ([*added, added[0]], "'kl' is listed twice"),
        ([{"name": "l2", "weight": 0}], "greater than 0"),
        ([{"name": "l2"}], "must be given"),
        ([{"name": "l2", "weight": 1, "tensors": "(B"}], r"regularisers.*tensors: no regular expression.*'\(B'"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(base_folder, rows, regularisers=wrong)
    with pytest.raises(RecipeError, match="neftune: it adds noise"):
        recipe(base_folder, rows, regularisers=added, callbacks=["neftune"])
