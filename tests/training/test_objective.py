"""Objectives on a model: how answers are laid out changes nothing, the reference is the model without its deltas."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftlm.data.batches.groups import mismatched_groups
from graftlm.data.batches.pack import Example, Group, Pack, pack
from graftlm.deltas.lora import LoraConfig
from graftlm.losses import LOSSES
from graftlm.model.attach import attach
from graftlm.model.modes import activate, deltas_off
from graftlm.model.registry import trainable
from graftlm.passes.forward import hidden_states, log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.passes.recompute import recomputed_layers
from graftlm.testing import tiny_model
from graftlm.testing.deltas import move, perturbed
from graftlm.training.objective import Objective, Sums, extra_parameters
from graftlm.training.teacher import TEACHER

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LOSSES),
    *(("dpo", {"link": link}) for link in ("hinge", "ipo", "robust", "exo")),
    ("supervised", {"label_smoothing": 0.1, "z_loss": 1e-2}),
    ("distillation", {"divergence": "reverse", "supervised_weight": 0.3}),
    ("distillation", {"divergence": "jsd", "temperature": 2.0, "teacher": "another/base"}),
    ("policy-gradient", {"kl": 0.1, "divide": "tokens"}),
]


def answered(count: int = 6, seed: int = 0) -> list[Group]:
    """Groups of two answers to prompts of their own; in some the answers begin alike."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        prompt = random.integers(3, 300, int(random.integers(9, 20)))
        common = random.integers(3, 300, int(random.integers(0, 4)))
        answers = []
        for which in range(2):
            own = random.integers(3, 300, int(random.integers(1, 12)))
            ids = np.concatenate([prompt, common, own]).astype(np.int32)
            weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(common) + len(own))]).astype(np.float32)
            answers.append(Example(ids, weights, f"rows.jsonl:{number + 1}, {which}"))
        made.append(Group(tuple(answers), (1.0, 0.0), ((0, 1),)))
    return made


def items(name: str, found: Sequence[Group]) -> list[Group | Example]:
    """What this loss trains on: groups, or the rows of which they are made."""
    if LOSSES[name].rows in ("answers", "text"):
        return [answer for group in found for answer in group.answers]
    return list(found)


def step(model: Any, name: str, options: dict[str, Any], packs: Sequence[Pack], probes: Sequence[Pack] = ()) -> Any:
    """(loss, gradients, metrics) of a step over these packs, as the loop takes it."""
    objective = Objective(LOSSES[name].config(**options))
    count = sum(objective.count(part) for part in packs)
    sums = Sums(objective)
    with packed_attention(model):
        statistic = objective.statistic(model, probes)
        for part in packs:
            made, _ = objective.part(model, part, statistic)
            (made.sum / count).backward()
            sums.add(made)
    gradients = {key: p.grad.clone() for key, p in trainable(model).items() if p.grad is not None}
    for p in trainable(model).values():
        p.grad = None
    total, metrics = sums.totals()
    return total / count, gradients, metrics


def same(found: Any, wanted: Any, tolerance: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1].keys() == wanted[1].keys()
    largest = max(float(t.abs().max()) for t in wanted[1].values())
    for key, tensor in wanted[1].items():
        assert float((found[1][key] - tensor).abs().max()) <= tolerance * largest, key
    assert found[2] == pytest.approx(wanted[2], rel=tolerance, abs=tolerance)


def moved() -> Any:
    """A model away from its base, and beside it a wider teacher that is another."""
    model = perturbed("lora", tiny_model())
    model.__dict__[TEACHER] = tiny_model(seed=5, hidden_size=48, num_hidden_layers=3)
    return model


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_how_a_step_is_split_into_packs_and_what_they_share_changes_nothing(name: str, options: dict[str, Any]) -> None:
    model, found = moved(), answered()
    rows, others = items(name, found), mismatched_groups(found)
    whole = step(model, name, options, pack(rows, 10_000), pack(others, 10_000))
    packs = pack(rows, 60, share=True)
    assert len(packs) > 2
    split = step(model, name, options, pack(rows, 60, share=False), pack(others, 35))
    same(split, whole, 1e-5)
    shared = step(model, name, options, packs, pack(others, 50, share=True))
    same(shared, whole, 1e-5)
    assert sum(p.ids.numel() for p in packs) < 0.8 * sum(p.ids.numel() for p in pack(rows, 60))


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
def test_in_double_precision_it_is_the_same_to_twelve_digits(name: str) -> None:
    model, found = moved().double(), answered(4)
    wanted = step(model, name, {}, pack(found, 10_000), pack(mismatched_groups(found), 10_000))
    same(step(model, name, {}, pack(found, 60, share=True), pack(mismatched_groups(found), 60)), wanted, 1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("lm_head", "v_proj")])
def test_label_smoothing_and_z_loss_of_rows_alone(architecture: str, targets: tuple[str, ...]) -> None:
    """With a soft cap, a scale on the logits, a delta on the head; rows packed, with shared beginnings, recomputed."""
    model = tiny_model(architecture, **({"logit_scale": 2.0} if architecture == "cohere" else {}))
    move(attach(model, LoraConfig(r=4, targets=targets)))
    rows = items("supervised", answered(4))
    total, count = torch.zeros(()), 0.0
    for row in rows:
        ids, weights = torch.from_numpy(row.ids.astype("int64"))[None], torch.from_numpy(row.weights)[1:]  # type: ignore[union-attr]
        z = model(ids).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(z, ids[0, 1:], reduction="none", label_smoothing=0.1)
        total = total + (weights * (each + 0.01 * z.logsumexp(-1).square())).sum()
        count += float(weights.sum())
    (total / count).backward()
    gradients = {key: p.grad.clone() for key, p in trainable(model).items() if p.grad is not None}
    for p in trainable(model).values():
        p.grad = None
    wanted = float(total.detach()) / count, gradients, {}
    for held in (nullcontext, recomputed_layers):
        with held(model):  # type: ignore[operator]
            found = step(model, "supervised", {"label_smoothing": 0.1, "z_loss": 0.01}, pack(rows, 60, share=True))
        same((*found[:2], {}), wanted, 2e-5)


def test_a_pack_tells_the_answers_apart_where_they_agree() -> None:
    group = answered(1)[0]
    (part,) = pack([group], 1000, share=True)
    assert len(part.targets) == sum(int(answer.weights.sum()) for answer in group.answers)
    for number, answer in enumerate(group.answers):
        mine = part.answers == number
        assert part.targets[mine].tolist() == answer.ids[answer.weights > 0].tolist()
    assert part.pairs.tolist() == [[0, 1]]
    assert part.scores.tolist() == [1.0, 0.0]


def test_what_was_sampled_stays_beside_its_token_however_answers_are_packed() -> None:
    """Several updates after one sampling: the ratios are those of a policy that has moved since."""
    model, found = moved(), answered(4)
    draw, sampled = np.random.default_rng(3), []
    for group in found:
        rows = [replace(a, old_log_probs=draw.uniform(-6, -5, len(a)).astype(np.float32)) for a in group.answers]
        sampled.append(Group(tuple(rows), (1.0, -1.0)))
    by_place = {row.where: row for group in sampled for row in group.answers}
    for part in pack(sampled, 70, share=True):
        assert part.old_log_probs is not None
        order = list(dict.fromkeys(row for rows in part.where for row in rows))
        for number in range(len(part.scores)):
            mine = part.answers == number
            match = [
                by_place[w]
                for w in order
                if by_place[w].ids[by_place[w].weights > 0].tolist() == part.targets[mine].tolist()
            ]
            assert any(
                np.array_equal(row.old_log_probs[row.weights > 0], part.old_log_probs[mine].numpy()) for row in match
            )  # type: ignore[index]
        assert part.idle().old_log_probs is not None
        assert len(part.idle().old_log_probs) == 0  # type: ignore[arg-type]
    whole = step(model, "policy-gradient", {}, pack(sampled, 10_000))
    same(step(model, "policy-gradient", {}, pack(sampled, 70, share=True)), whole, 1e-5)
    fresh = step(model, "policy-gradient", {}, pack([Group(g.answers, (1.0, -1.0)) for g in found], 10_000))
    assert fresh[0] != pytest.approx(whole[0], rel=1e-3)


def test_groups_stay_whole_and_a_long_one_has_a_pack_of_its_own() -> None:
    found = answered(12)
    for tokens in (10, 45, 80, 200):
        for share in (False, True):
            parts = pack(found, tokens, share=share)
            assert parts[0].ids.shape == pack(found[::-1], tokens, share=share)[0].ids.shape, "order decides nothing"
            seen = sorted(row for part in parts for row in part.rows)
            assert seen == sorted(answer.where for group in found for answer in group.answers)
            for part in parts:
                assert len(part.pairs) == len(part.scores) // 2
                assert len(part.pairs) == 1 or share or part.ids.numel() <= tokens
                together = {row.split(",")[0] for row in part.rows}
                assert len(part.rows) == 2 * len(together)


def test_an_idle_pack_has_the_passes_of_a_pack_and_teaches_nothing() -> None:
    model = moved()
    (part,) = pack(answered(1), 1000, share=True)
    for name, loss in LOSSES.items():
        objective = Objective(loss.config())  # type: ignore[call-arg]
        assert objective.count(part.idle()) == 0
        with packed_attention(model):
            made, _ = objective.part(model, part.idle())
        made.sum.backward()
        assert made.sum.item() == 0, name
        assert all(p.grad is not None and not p.grad.any() for p in trainable(model).values()), name


# The reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.config().needs_reference])  # type: ignore[call-arg]
def test_deltas_that_do_nothing_have_no_margin_at_all(name: str) -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=4))
    _, _, metrics = step(model, name, {}, pack(answered(), 90, share=True))
    for metric in ("margin", "chosen_reward", "rejected_reward"):
        assert metrics.get(metric, 0.0) == 0.0


def test_the_reference_is_the_model_with_its_deltas_off_and_gets_no_gradient() -> None:
    model = moved()
    (part,) = pack(answered(3), 1000, share=True)
    objective = Objective(LOSSES["dpo"].config())  # type: ignore[call-arg]
    with packed_attention(model):
        with deltas_off(model), torch.no_grad():
            wanted = log_probs(model, part)
        found = objective.reference(model, part)
        assert found is not None
        assert torch.equal(found, wanted)
        assert not found.requires_grad
        assert not torch.allclose(log_probs(model, part), wanted, atol=1e-3)


def test_the_reference_may_be_an_adapter_that_is_on_the_model_too() -> None:
    model = moved()
    attach(model, LoraConfig(r=2), name="reference")
    (part,) = pack(answered(3), 1000, share=True)
    with torch.no_grad():
        for key, p in trainable(model).items():
            if ".reference." in key:
                p.add_(0.1)
    activate(model, "default")
    objective = Objective(LOSSES["dpo"].config(reference="somewhere/adapter"))  # type: ignore[call-arg]
    with packed_attention(model), torch.no_grad():
        found = objective.reference(model, part)
        policy = log_probs(model, part)
        activate(model, "reference")
        assert found is not None
        assert torch.equal(found, log_probs(model, part))
        assert not torch.equal(found, policy)


@pytest.mark.slow
def test_the_value_of_a_prompt_is_read_where_it_ends_and_is_learnt_beside_the_deltas() -> None:
    model, found = moved(), [Group(g.answers, (0.8, 0.2)) for g in answered(4)]
    objective = Objective(LOSSES["dro"].config(tau=1e-6))  # type: ignore[call-arg]  # so the values alone matter
    objective.add_head(model, {})
    head = extra_parameters(model)
    assert sorted(head) == ["graft_shared.value-head.bias", "graft_shared.value-head.weight"]
    assert head.items() < trainable(model).items()
    packs = pack(found, 70, share=True)
    for part in packs:
        with packed_attention(model), torch.no_grad():
            hidden = hidden_states(model, part)
        for number in range(len(part.scores)):
            group = next(g for g in found if g.where == part.rows[2 * (number // 2)])
            prompt = int(group.answers[0].weights.nonzero()[0][0])
            (alone,) = pack(
                [Example(group.answers[0].ids[: prompt + 1], np.eye(prompt + 1)[-1].astype(np.float32), "")], 99
            )
            with torch.no_grad():
                wanted = hidden_states(model, alone)[-1]
            at = part.hidden_rows[part.answers == number].min()
            assert torch.allclose(hidden[at], wanted, atol=1e-5)
    optimizer = torch.optim.Adam(head.values(), 0.05)
    for _ in range(200):
        _, gradients, metrics = step(model, "dro", {"tau": 1e-6}, packs)
        for name, p in trainable(model).items():
            p.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
    assert metrics["value"] == pytest.approx(0.5, abs=0.02), "each prompt has one answer of 0.8 and one of 0.2"


# It learns -------------------------------------------------------------------------------------------------------


def margin(model: Any, found: Sequence[Group]) -> Tensor:
    """log pi(chosen) - log pi(rejected) of every pair, by passes over single rows."""
    sums = []
    with torch.no_grad():
        for group in found:
            for answer in group.answers:
                (part,) = pack([answer], 1000)
                sums.append((log_probs(model, part) * part.weights).sum())
    return torch.stack(sums).view(-1, 2) @ torch.tensor([1.0, -1.0])


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n, o in OPTIONS if LOSSES[n].rows in ("pairs", "feedback", "rewards")]
)
def test_every_objective_teaches_a_tiny_model_to_prefer_the_chosen_answers(name: str, options: dict[str, Any]) -> None:
    model, found = tiny_model(), answered(4)
    attach(model, LoraConfig(r=8))
    if name == "sppo":
        options = {"eta": 20.0}
    if name == "policy-gradient":
        found = [Group(g.answers, (1.0, -1.0)) for g in found]
    before = margin(model, found)
    optimizer = torch.optim.Adam(trainable(model).values(), 0.02)
    packs, probes = pack(found, 90, share=True), pack(mismatched_groups(found), 90, share=True)
    losses = []
    for _ in range(15):
        loss, gradients, metrics = step(model, name, options, packs, probes)
        losses.append(loss)
        assert math.isfinite(loss)
        for key, p in trainable(model).items():
            p.grad = gradients[key]
        optimizer.step()
        optimizer.zero_grad()
    rise = margin(model, found) - before
    assert rise.mean() > 1, rise
    assert (rise > 0).all(), rise
    if "margin" in metrics and LOSSES[name].config(**options).needs_reference:
        assert metrics["accuracy"] == 1.0
    if name != "policy-gradient":
        assert losses[-1] < losses[0]


def test_one_pair_may_be_all_there_is() -> None:
    loss, gradients, _ = step(moved(), "kto", {}, pack(answered(1), 1000), ())
    assert math.isfinite(loss)
    assert gradients
