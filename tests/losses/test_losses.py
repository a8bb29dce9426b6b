"""Losses are pure functions of log-probabilities: what holds for all of them, and equations written out by hand.

What TRL has too is compared with it in test_trl.py.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import graftlm.losses
from graftlm.config.schema import build
from graftlm.losses import LOSSES, Batch, LossSum
from graftlm.losses.orpo import log_odds
from graftlm.losses.policy_gradient import advantages
from tests.errors import raises
from tests.losses.answers import Answers, answers

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LOSSES),
    *(("dpo", {"link": link}) for link in ("hinge", "ipo", "robust", "exo")),
    ("supervised", {"label_smoothing": 0.1, "z_loss": 1e-2}),
    ("distillation", {"supervised_weight": 0.3, "temperature": 2.0}),
    ("policy-gradient", {"divide": "tokens", "kl": 0.1}),
    ("policy-gradient", {"divide": "constant", "length": 64, "kl": 0.1}),
    ("policy-gradient", {"ratio": "answer"}),
    ("policy-gradient", {"ratio": "answer-mean", "kl": 0.1}),
]
COMPARES_PAIRS = [(name, options) for name, options in OPTIONS if LOSSES[name].rows == "pairs"]


def made(name: str, options: dict[str, Any], sample: Answers) -> LossSum:
    loss = LOSSES[name]
    return loss.value(loss.config(**options), sample.rows(sample.policy), sample.rows(sample.reference), sample.batch)


def spread(sample: Answers, values: Tensor | None) -> Tensor:
    """What is known of each token [S], at its place in the rows [2P, T]."""
    assert values is not None
    return torch.zeros(sample.mask.shape, dtype=values.dtype).masked_scatter(sample.mask, values)


def part(sample: Answers, numbers: list[int]) -> Answers:
    """These pairs alone, in this order."""
    count = len(sample.batch.pairs)
    rows = torch.tensor([*numbers, *(count + n for n in numbers)], dtype=torch.int64)
    own, mask = torch.arange(len(rows)), sample.mask[rows]
    batch = Batch(
        weights=torch.ones(int(mask.sum())),
        answers=own.repeat_interleave(mask.sum(1)),
        pairs=torch.stack([own[: len(numbers)], own[len(numbers) :]], dim=1),
        scores=sample.batch.scores[rows],
        values=None if sample.batch.values is None else sample.batch.values[rows],
        divergences=spread(sample, sample.batch.divergences)[rows][mask],
        normalisers=spread(sample, sample.batch.normalisers)[rows][mask],
        mean_log_probs=spread(sample, sample.batch.mean_log_probs)[rows][mask],
    )
    return Answers(sample.policy[rows], sample.reference[rows], mask, batch)


def test_supervised_is_the_weighted_sum_of_negative_log_likelihoods() -> None:
    policy = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss = LOSSES["supervised"]
    found = loss.value(loss.config(), policy, None, Batch(torch.tensor([1.0, 0.5, 0.0])))
    assert found.sum.item() == pytest.approx(1 * 1 + 0.5 * 2)
    assert found.count.item() == pytest.approx(1.5)
    found.sum.backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [-1.0, -0.5, 0.0]


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.2}, {"z_loss": 0.03}, {"label_smoothing": 0.1, "z_loss": 1e-4}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_label_smoothing_and_z_loss_are_those_of_torch(options: dict[str, float], dtype: torch.dtype) -> None:
    """Also where weights differ, which torch's mean over tokens does not know."""
    z = (4 * torch.randn(9, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    z.requires_grad_()
    targets = torch.arange(9)
    for weights in (torch.ones(9, dtype=dtype), torch.linspace(0.1, 2, 9, dtype=dtype)):
        e, size = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
        smooth = torch.nn.functional.cross_entropy(z, targets, reduction="none", label_smoothing=e)
        wanted = (weights * (smooth + size * z.logsumexp(-1).square())).sum() / weights.sum()
        log_p = z.log_softmax(-1)
        batch = Batch(weights, normalisers=z.logsumexp(-1), mean_log_probs=log_p.mean(-1))
        loss = LOSSES["supervised"]
        found = loss.value(loss.config(**options), log_p[torch.arange(9), targets], None, batch)
        tolerance = {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(found.sum / found.count, wanted, **tolerance)
        (ours,) = torch.autograd.grad(found.sum / found.count, z, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(wanted, z)[0], **tolerance)
        assert float(found.metrics["supervised_loss"][0]) == pytest.approx(
            float(-(weights * log_p.detach()[torch.arange(9), targets]).sum()), rel=1e-6
        )


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_sums_counts_and_metrics_add_up_over_any_split(name: str, options: dict[str, Any]) -> None:
    sample = answers(7)
    whole = made(name, options, sample)
    (wanted,) = torch.autograd.grad(whole.sum, sample.policy)
    parts = [made(name, options, part(sample, numbers)) for numbers in ([3], [0, 4], [1, 2])]
    (found,) = torch.autograd.grad(sum(p.sum for p in parts), sample.policy)  # type: ignore[arg-type]
    assert sum(p.sum.item() for p in parts) == pytest.approx(whole.sum.item(), rel=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert float(sum(p.count for p in parts)) == float(whole.count)
    for metric, (value, count) in whole.metrics.items():
        assert sum(float(p.metrics[metric][0]) for p in parts) == pytest.approx(float(value), rel=1e-9), metric
        assert sum(float(p.metrics[metric][1]) for p in parts) == pytest.approx(float(count)), metric


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_the_count_is_known_before_any_pass_and_nothing_at_all_is_no_error(name: str, options: dict[str, Any]) -> None:
    loss, sample = LOSSES[name], answers(8)
    assert float(loss.count(loss.config(**options), sample.batch)) == float(made(name, options, sample).count) > 0
    nothing = made(name, options, part(sample, []))
    assert (nothing.sum.item(), float(nothing.count)) == (0.0, 0.0)
    assert all(float(value) == float(count) == 0.0 for value, count in nothing.metrics.values())


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_step_along_the_gradient_prefers_the_chosen_answers(name: str, options: dict[str, Any]) -> None:
    """Those with the larger marks, for losses without pairs; of supervised training, only what it trains."""
    sample = answers(9)
    scores = sample.batch.scores - (0.5 if name == "policy-gradient" else 0.0)
    sample = replace(sample, batch=replace(sample.batch, scores=scores))
    (gradient,) = torch.autograd.grad(made(name, options, sample).sum, sample.policy)
    towards = -(gradient * sample.mask).sum(1)
    pairs = len(sample.batch.pairs)
    if name == "distillation" and not options:
        assert not gradient.any(), "it has its gradient from whole distributions: tests/losses/test_distillation.py"
    elif LOSSES[name].rows in ("answers", "text"):
        assert (towards > 0).all()
    else:
        assert towards[:pairs].mean() > towards[pairs:].mean()
    assert not gradient[~sample.mask].any()


@pytest.mark.parametrize(("name", "options"), COMPARES_PAIRS)
def test_a_swapped_pair_has_the_opposite_margin(name: str, options: dict[str, Any]) -> None:
    sample = answers(10)
    swapped = replace(sample, batch=replace(sample.batch, pairs=sample.batch.pairs.flip(1)))
    ours, theirs = made(name, options, sample).metrics, made(name, options, swapped).metrics
    assert float(ours["margin"][0]) == pytest.approx(-float(theirs["margin"][0]))
    assert float(ours["margin"][0]) != 0
    assert float(ours["accuracy"][0]) == pytest.approx(5 - float(theirs["accuracy"][0]))
    assert float(ours["chosen_log_prob"][0]) == float(theirs["rejected_log_prob"][0])


@pytest.mark.parametrize(("name", "options"), [case for case in OPTIONS if LOSSES[case[0]].config().needs_reference])  # type: ignore[call-arg]
def test_a_policy_that_is_its_reference_has_no_margin_at_all(name: str, options: dict[str, Any]) -> None:
    sample = answers(11)
    metrics = made(name, options, replace(sample, reference=sample.policy.detach())).metrics
    for metric in ("margin", "chosen_reward", "rejected_reward"):
        assert float(metrics.get(metric, (0.0, 0.0))[0]) == 0.0
    if "accuracy" in metrics:
        assert float(metrics["accuracy"][0]) == 0.5 * 5


# Equations that TRL does not have, written out in plain Python ---------------------------------------------------


def sums(sample: Answers, values: Tensor, row: int) -> Tensor:
    return torch.stack([values[row, t] for t in range(values.shape[1]) if sample.mask[row, t]]).sum()


def check(found: LossSum, wanted: Tensor, sample: Answers) -> None:
    torch.testing.assert_close(found.sum / found.count, wanted, rtol=1e-9, atol=0.0)
    (ours,) = torch.autograd.grad(found.sum / found.count, sample.policy, retain_graph=True)
    (theirs,) = torch.autograd.grad(wanted, sample.policy)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_dpop() -> None:
    sample, pairs = answers(12), 5
    losses = []
    for n in range(pairs):
        w = sums(sample, sample.policy, n) - sums(sample, sample.reference, n)
        loser = sums(sample, sample.policy, pairs + n) - sums(sample, sample.reference, pairs + n)
        fallen = -w if w.item() < 0 else torch.zeros(())
        losses.append(torch.log(1 + torch.exp(-0.2 * (w - loser - 5.0 * fallen))))
    check(made("dpop", {"beta": 0.2, "penalty": 5.0}, sample), torch.stack(losses).mean(), sample)


def test_orpo_over_several_pairs() -> None:
    sample, pairs = answers(13), 5
    losses = []
    for n in range(pairs):
        w, loser = (sums(sample, sample.policy, row) / sample.mask[row].sum() for row in (n, pairs + n))
        ratio = (w.exp() / (1 - w.exp())) / (loser.exp() / (1 - loser.exp()))
        losses.append(-w - 0.3 * torch.log(ratio / (1 + ratio)))
    check(made("orpo", {"weight": 0.3}, sample), torch.stack(losses).mean(), sample)


def test_cpo_over_several_pairs() -> None:
    sample, pairs = answers(14), 5
    losses = []
    for n in range(pairs):
        w, loser = (sums(sample, sample.policy, row) for row in (n, pairs + n))
        losses.append(torch.log(1 + torch.exp(-0.2 * (w - loser))) - 0.5 * w / sample.mask[n].sum())
    check(made("cpo", {"beta": 0.2, "alpha": 0.5}, sample), torch.stack(losses).mean(), sample)


def test_sppo_with_shares_of_wins() -> None:
    sample = answers(15)
    shares = torch.linspace(0, 1, 10)
    sample = replace(sample, batch=replace(sample.batch, scores=shares))
    losses = [
        (sums(sample, sample.policy, n) - sums(sample, sample.reference, n) - 4 * (shares[n].double() - 0.5)) ** 2
        for n in range(10)
    ]
    check(made("sppo", {"eta": 4.0}, sample), torch.stack(losses).mean(), sample)


def test_dro() -> None:
    """The gradient of the values too, with rewards of any size."""
    sample = answers(16)
    values, rewards = sample.batch.values.clone().requires_grad_(), torch.linspace(-2, 3, 10)  # type: ignore[union-attr]
    sample = replace(sample, batch=replace(sample.batch, scores=rewards, values=values))
    losses = []
    for n in range(10):
        ratio = sums(sample, sample.policy, n) - sums(sample, sample.reference, n)
        losses.append(0.5 * (rewards[n].double() - values[n] - 0.4 * ratio) ** 2)
    found, wanted = made("dro", {"tau": 0.4}, sample), torch.stack(losses).mean()
    check(found, wanted, sample)
    wanted = torch.stack([values[n] - rewards[n].double() for n in range(10)]) / 10  # of the values' part
    (ours,) = torch.autograd.grad(made("dro", {"tau": 1e-12}, sample).sum / 10, values)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_odds_are_exact_at_both_ends() -> None:
    for p in (1e-300, 1e-9, 0.5, 1 - 1e-9):
        wanted = math.log(p) - math.log1p(-p)
        assert float(log_odds(torch.tensor(p, dtype=torch.float64).log())) == pytest.approx(wanted, rel=1e-6)
    certain = torch.zeros((), requires_grad=True)
    (gradient,) = torch.autograd.grad(log_odds(certain), certain)
    assert math.isfinite(log_odds(certain).item())
    assert math.isfinite(float(gradient))


# The table -------------------------------------------------------------------------------------------------------


def test_no_file_is_missing_from_the_table_and_each_names_its_source() -> None:
    folder = Path(graftlm.losses.__file__).parent
    files = {p.stem: p for p in folder.glob("*.py") if p.stem not in ("__init__", "base")}
    assert files.keys() == {loss.value.__module__.rpartition(".")[2] for loss in LOSSES.values()}
    for name, loss in LOSSES.items():
        assert loss.config().name == name  # type: ignore[call-arg]
    for stem, file in files.items():
        assert stem == "supervised" or "arXiv:" in file.read_text().split('"""')[1], stem


@pytest.mark.parametrize(
    ("name", "options", "code", "message"),
    [
        ("dpo", {"noise": 0.1}, "recipe/invalid-value", "noise is for the links robust and exo"),
        ("dpo", {"link": "robust", "noise": 0.5}, "recipe/invalid-value", "less than 0.5"),
        ("dpo", {"beta": 0}, "recipe/invalid-value", "greater than 0"),
        ("dpo", {"gamma": 1}, "recipe/unknown-key", "gamma"),
        ("supervised", {"label_smoothing": 1.0}, "recipe/invalid-value", "less than 1"),
        ("distillation", {"beta": 0.3}, "recipe/invalid-value", "beta is for the divergence jsd"),
        ("distillation", {"divergence": "jsd", "beta": 1.0}, "recipe/invalid-value", "less than 1"),
        ("distillation", {"teacher_adapter": "x"}, "recipe/invalid-value", "name that base in teacher"),
        ("simpo", {"reference": "x"}, "recipe/unknown-key", "reference"),
        (
            "policy-gradient",
            {"ratio": "answer", "divide": "tokens"},
            "recipe/invalid-value",
            "divide: tokens is for ratio: token",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, options: dict[str, Any], code: str, message: str) -> None:
    with raises(code, match=message):
        build(LOSSES[name].config, options, source="recipe.yaml")


def test_dr_grpo_is_the_equation_of_its_paper() -> None:
    """-1/G sum_i sum_t min(rho A, clip(rho) A) / C with A = r - mean r: no length of an answer and no deviation."""
    draw = torch.Generator().manual_seed(3)
    sizes, rewards, C = [5, 1, 9, 3], [0.0, 1.0, 0.25, 1.0], 12
    policy = torch.randn(sum(sizes), generator=draw, dtype=torch.float64).requires_grad_()
    before = policy.detach() + 0.3 * torch.randn(sum(sizes), generator=draw, dtype=torch.float64)
    loss = LOSSES["policy-gradient"]
    config = loss.config(baseline="mean", divide="constant", length=C)
    scores = advantages(torch.tensor(rewards), torch.zeros(4, dtype=torch.int64), config.baseline)
    batch = Batch(
        torch.ones(sum(sizes), dtype=torch.float64),
        answers=torch.repeat_interleave(torch.arange(4), torch.tensor(sizes)),
        scores=scores,
        old_log_probs=before,
    )
    found = loss.value(config, policy, None, batch)
    wanted, at = torch.zeros((), dtype=torch.float64), 0
    for size, reward in zip(sizes, rewards, strict=True):
        A = reward - sum(rewards) / len(rewards)
        for t in range(at, at + size):
            rho = (policy[t] - before[t]).exp()
            wanted = wanted - torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A) / C / len(sizes)
        at += size
    torch.testing.assert_close(found.sum / found.count, wanted, rtol=1e-6, atol=1e-9)
    (ours,) = torch.autograd.grad(found.sum / found.count, policy, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, policy)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"divide": "constant"}, "needs `length`"),
        ({"length": 8}, "length is for divide: constant"),
        ({"divide": "constant", "length": 8, "ratio": "answer"}, "is for ratio: token"),
    ],
)
def test_a_constant_to_divide_by_is_given_where_it_is_read(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        LOSSES["policy-gradient"].config(**options)
