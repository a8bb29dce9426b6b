"""Objectives against TRL: the loss that its trainers compute and the gradient of every log-probability.

TRL's own methods run, on a stand-in for the trainer that has the settings that they read and a stand-in for the model
that returns our log-probabilities.
"""

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.losses import LOSSES
from graftlm.losses.policy_gradient import advantages
from tests.losses.answers import Answers, answers

PLACE = SimpleNamespace(
    device="cpu",
    gather=lambda t: t,
    gather_for_metrics=lambda t: t,
    reduce=lambda t, reduction: t,
    num_processes=1,
)


@pytest.fixture(scope="module")
def trl() -> Any:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if sys.version_info < (3, 11):
        pytest.skip("this TRL needs Python 3.11")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    return SimpleNamespace(
        dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer, grpo=GRPOTrainer, rloo=RLOOTrainer
    )


def ours(name: str, sample: Answers, *, statistic: float = 0.0, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient [2P, T])."""
    loss = LOSSES[name]
    batch = replace(sample.batch, statistic=statistic)
    made = loss.value(loss.config(**options), sample.rows(sample.policy), sample.rows(sample.reference), batch)
    return with_gradient(made.sum / made.count, sample.policy)


def with_gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], factor: float = 1.0) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, factor * b, rtol=1e-6, atol=1e-9)


# DPO and what TRL has in the same trainer --------------------------------------------------------------------------


def trl_dpo(trl: Any, sample: Answers, kind: str, beta: float, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    pairs = len(sample.batch.pairs)
    completion = torch.cat([torch.zeros(2 * pairs, 1), sample.mask.double()], dim=1)
    zeros = torch.zeros_like(sample.reference)
    outputs = SimpleNamespace(
        log_probs=sample.policy * sample.mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    sums = (sample.reference * sample.mask).sum(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=PLACE, aux_loss_enabled=False, ld_alpha=None, beta=beta,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
        label_smoothing=noise, use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(2 * pairs, completion.shape[1], dtype=torch.int64),
        "attention_mask": torch.ones(2 * pairs, completion.shape[1]),
        "completion_mask": completion,
        "ref_chosen_logps": sums[:pairs],
        "ref_rejected_logps": sums[pairs:],
    }
    return with_gradient(trl.dpo._compute_loss(trainer, lambda **_: outputs, inputs, False), sample.policy)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("link", ["sigmoid", "hinge", "ipo"])
def test_dpo(trl: Any, link: str, beta: float) -> None:
    for seed in range(3):
        sample = answers(seed)
        same(ours("dpo", sample, link=link, beta=beta), trl_dpo(trl, sample, link, beta))


@pytest.mark.parametrize(("link", "kind", "noise"), [("robust", "robust", 0.1), ("exo", "exo_pair", 1e-3)])
def test_dpo_with_noise(trl: Any, link: str, kind: str, noise: float) -> None:
    sample = answers(4)
    same(ours("dpo", sample, link=link), trl_dpo(trl, sample, kind, 0.1, noise))
    same(ours("dpo", sample, link=link, beta=0.5, noise=0.2), trl_dpo(trl, sample, kind, 0.5, 0.2))


def test_sppo_is_the_mean_over_answers_where_trl_adds_the_two_of_a_pair(trl: Any) -> None:
    sample = answers(1)
    same(ours("sppo", sample, eta=10.0), trl_dpo(trl, sample, "sppo_hard", beta=0.1), factor=0.5)


# SimPO, CPO, ORPO ------------------------------------------------------------------------------------------------


def trl_from_logits(
    trainer_class: Any, settings: dict[str, Any], logits: Tensor, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses that TRL computes from logits [2P, T + 1, V]; the first token is the prompt."""
    labels = ids.masked_fill(~mask, -100)
    pairs = len(ids) // 2
    attention = torch.cat([torch.ones(2 * pairs, 1, dtype=torch.bool), mask[:, 1:]], dim=1).long()
    batch = {
        f"{name}_{kind}": tensor[part]
        for name, part in (("chosen", slice(pairs)), ("rejected", slice(pairs, None)))
        for kind, tensor in (("input_ids", ids), ("labels", labels), ("attention_mask", attention))
    }
    trainer = SimpleNamespace(
        accelerator=PLACE, aux_loss_enabled=False, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **settings
    )
    for name in ("concatenated_inputs", "concatenated_forward", "cpo_loss", "odds_ratio_loss", "get_batch_logps"):
        if hasattr(trainer_class, name):
            method = getattr(trainer_class, name)
            static = isinstance(trainer_class.__dict__[name], staticmethod)
            setattr(trainer, name, method if static else method.__get__(trainer))
    model = lambda *_, **__: SimpleNamespace(logits=logits)  # noqa: E731
    loss, _ = trainer_class.get_batch_loss_metrics(trainer, model, batch)
    return with_gradient(loss, logits)


def ours_from_logits(name: str, sample: Answers, logits: Tensor, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    loss = LOSSES[name]
    policy = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    made = loss.value(loss.config(**options), sample.rows(policy), None, sample.batch)
    return with_gradient(made.sum / made.count, logits)


CPO = {"alpha": 0.0, "label_smoothing": 0.0}


@pytest.mark.parametrize(
    ("name", "trainer", "settings", "options", "pairs"),
    [
        ("simpo", "cpo", CPO | {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0}, {}, 5),
        ("cpo", "cpo", CPO | {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.0}, {"alpha": 0.0}, 5),
        # what TRL divides by the tokens of the batch we divide pair by pair: the same for one pair
        ("cpo", "cpo", CPO | {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.8}, {"beta": 0.3, "alpha": 0.8}, 1),
        ("orpo", "orpo", {"beta": 0.1}, {}, 1),
        ("orpo", "orpo", {"beta": 0.7}, {"weight": 0.7}, 1),
    ],
)
def test_what_needs_no_reference(
    trl: Any, name: str, trainer: str, settings: dict[str, Any], options: dict[str, Any], pairs: int
) -> None:
    for seed in range(3):
        sample = answers(seed, pairs)
        draw = torch.Generator().manual_seed(seed)
        count, length = sample.mask.shape
        logits = torch.randn(count, length + 1, 11, generator=draw, dtype=torch.float64).requires_grad_()
        ids = torch.randint(1, 11, (count, length + 1), generator=draw)
        mask = torch.cat([torch.zeros(count, 1, dtype=torch.bool), sample.mask], dim=1)
        wanted = trl_from_logits(getattr(trl, trainer), settings, logits, ids, mask)
        same(ours_from_logits(name, sample, logits, ids, **options), wanted)


# KTO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-2.0, 0.5])
def test_kto(trl: Any, shift: float) -> None:
    """`shift` makes the divergence negative, which counts as 0, or positive."""
    sample, other = answers(2), answers(3)
    z0 = ((other.policy - other.reference) * other.mask).sum(1).detach()
    z0 = z0 - z0.mean() + shift
    zeros = torch.zeros_like(sample.reference)
    completion = torch.cat([torch.zeros(len(zeros), 1), sample.mask.double()], dim=1)
    outputs = SimpleNamespace(log_probs=sample.policy * sample.mask, entropy=zeros, mean_logits=zeros)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=PLACE, aux_loss_enabled=False, beta=0.3, loss_type="kto",
        precompute_ref_logps=True, calculate_KL=True, desirable_weight=1.5, undesirable_weight=0.7,
        _compute_kl_logps=lambda model, batch: z0, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(completion, dtype=torch.int64),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "label": sample.batch.scores.bool(),
        "ref_logps": (sample.reference * sample.mask).sum(1),
        "ref_KL_logps": torch.zeros_like(z0),
    }
    wanted = with_gradient(trl.kto._compute_loss(trainer, lambda **_: outputs, inputs, False), sample.policy)
    found = ours("kto", sample, statistic=float(z0.mean()), beta=0.3, liked=1.5, not_liked=0.7)
    same(found, wanted)


# Policy gradients ------------------------------------------------------------------------------------------------


def rewarded(seed: int, drift: float) -> tuple[Answers, Tensor, Tensor]:
    """Answers with advantages, and the log-probabilities from before [2P, T]."""
    sample = answers(seed)
    draw = torch.Generator().manual_seed(seed)
    before = sample.policy.detach() + drift * torch.randn(sample.policy.shape, generator=draw, dtype=torch.float64)
    scores = torch.randn(len(sample.mask), generator=draw)
    return (
        replace(sample, batch=replace(sample.batch, scores=scores, old_log_probs=sample.rows(before))),
        before,
        scores,
    )


@pytest.mark.parametrize("kl", [0.0, 0.2])
@pytest.mark.parametrize(
    ("kind", "level", "options"),
    [
        ("grpo", "token", {}),
        ("bnpo", "token", {"divide": "tokens"}),
        ("dr_grpo", "token", {"divide": "constant", "length": 37}),
        ("grpo", "sequence", {"ratio": "answer-mean"}),
    ],
)
def test_grpo_and_gspo(trl: Any, kind: str, level: str, options: dict[str, Any], kl: float) -> None:
    sample, before, scores = rewarded(5, drift=0.3)
    zeros = torch.zeros_like(before)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=PLACE, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level=level, beta=kl, loss_type=kind, epsilon_low=0.2,
        epsilon_high=0.2, args=SimpleNamespace(delta=None, use_bias_correction_kl=False), use_vllm=False,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, max_completion_length=37,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (sample.policy, zeros, None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(len(scores), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(scores), 1),
        "completion_ids": torch.zeros_like(before, dtype=torch.int64),
        "completion_mask": sample.mask.double(),
        "advantages": scores.double(),
        "old_per_token_logps": before,
        "ref_per_token_logps": sample.reference,
    }
    wanted = with_gradient(trl.grpo._compute_loss(trainer, None, inputs), sample.policy)
    same(ours("policy-gradient", sample, kl=kl, **options), wanted)


def test_rloo(trl: Any) -> None:
    sample, before, scores = rewarded(6, drift=0.05)
    zeros = torch.zeros_like(before)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=PLACE, aux_loss_enabled=False, epsilon_low=0.2,
        epsilon_high=0.2,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (sample.policy, zeros, None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(len(scores), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(scores), 1),
        "completion_ids": torch.zeros_like(before, dtype=torch.int64),
        "completion_mask": sample.mask.double(),
        "advantages": scores.double(),
        "old_logps": (before * sample.mask).sum(1),
    }
    wanted = with_gradient(trl.rloo._compute_loss(trainer, None, inputs), sample.policy)
    same(ours("policy-gradient", sample, ratio="answer"), wanted)


def plain(rewards: list[float], baseline: Callable[[list[float], int], float]) -> list[float]:
    return [reward - baseline(rewards, i) for i, reward in enumerate(rewards)]


def test_advantages_are_those_of_the_group() -> None:
    first, second = [1.0, 0.0, 0.0, 3.0], [2.0, 4.0]
    rewards, groups = torch.tensor([1.0, 2.0, 0.0, 0.0, 4.0, 3.0, 7.0]), torch.tensor([0, 1, 0, 0, 1, 0, 2])

    def put(a: list[float], b: list[float]) -> list[float]:
        return [a[0], b[0], a[1], a[2], b[1], a[3], 0.0]  # the last is alone: nothing to compare it with

    others = lambda r, i: sum(r[:i] + r[i + 1 :]) / (len(r) - 1)  # noqa: E731
    everyone = lambda r, i: sum(r) / len(r)  # noqa: E731
    found = advantages(rewards, groups, "leave-one-out").tolist()
    assert found == pytest.approx(put(plain(first, others), plain(second, others)))
    found = advantages(rewards, groups, "mean").tolist()
    assert found == pytest.approx(put(plain(first, everyone), plain(second, everyone)))
    found = advantages(rewards, groups, "standardised").tolist()
    scaled = [[value / (float(torch.tensor(r).std()) + 1e-4) for value in plain(r, everyone)] for r in (first, second)]
    assert found == pytest.approx(put(*scaled), rel=1e-5)
