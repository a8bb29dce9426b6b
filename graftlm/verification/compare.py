"""The replies of one route against every hypothesis."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from graftlm.adapters.adapter import Adapter
from graftlm.verification.client import CHAT, Prompt, Reply
from graftlm.verification.decide import (
    ADAPTER,
    BASE,
    NEAR,
    SURE,
    Array,
    Decision,
    Fit,
    Hypothesis,
    Limits,
    Numbers,
    Outcome,
    ScaleFit,
    decide,
    fit_scale,
    limits_of,
    name_of,
)
from graftlm.verification.local import Local

TEMPERATURES = (0.02, 0.1, 0.5, 1.0)
"""Of greedy answers: how far from the first choice noise may lead, in nats. The likeliest is taken."""

FACTORS = (0.125, 0.25, 0.5, 2.0, 4.0, 8.0)
"""Factors that greedy answers are compared with, beside those that are a known fault of servers."""

GREEDY = Limits(effect=0, smallest_effect=0.02, distance=0.15, lead=2 * SURE, unit="tokens")

Report = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class HypothesisFinding:
    name: str
    distance: float
    """From the server's answers: nats, or a share of tokens."""
    behind: float
    """Log-likelihood that it lacks to the best hypothesis."""


@dataclass(frozen=True)
class RouteFinding:
    """What one route serves."""

    route: str
    prompts_by: str
    """How prompts were given: ids, text or messages."""
    evidence: str
    """`log-probabilities`, or `greedy answers`, which prove less."""
    verdict: Outcome
    why: str
    other: str | None
    template: str | None
    """The template of the hypothesis that fits best; None where prompts were rendered here."""
    factor: float | None
    factor_range: tuple[float, float] | None
    prompts: int
    """That were answered and compared."""
    numbers: int
    """Log-probabilities, or tokens."""
    noise: float | None
    """What the best hypothesis leaves unexplained; None where nothing was compared."""
    effect: float
    """The distance between base and adapter on the same tokens."""
    hypotheses: list[HypothesisFinding]


@dataclass(frozen=True)
class _Asked:
    """What is the same for all hypotheses of a route."""

    local: Local
    path: str
    by: str
    report: Report

    @property
    def templates(self) -> list[str]:
        return list(self.local.renderers) if self.path == CHAT else [""]

    @property
    def hypotheses(self) -> list[Hypothesis]:
        return [Hypothesis(w, t) for t in self.templates for w in (BASE, ADAPTER, *self.local.others)]

    def ids(self, prompts: Sequence[Prompt], template: str) -> list[list[int]]:
        return [list(p.ids) if not template else self.local.ids(p.question, template) for p in prompts]


def compare_numbers(
    local: Local, path: str, by: str, prompts: Sequence[Prompt], replies: Sequence[Reply | None], report: Report
) -> RouteFinding:
    """The verdict on log-probabilities of first tokens."""
    asked = _Asked(local, path, by, report)
    tops = [_known(local, reply) for reply in replies]
    kept = [number for number, top in enumerate(tops) if top]
    prompts, tops = [prompts[number] for number in kept], [tops[number] for number in kept]
    found = np.array([value for top in tops for _, value in top])
    numbers = Numbers(found, np.repeat(np.arange(len(tops)), [len(top) for top in tops]))
    if not tops:
        return _finding(asked, "log-probabilities", {}, None, limits_of(0), (0, 0))

    def predict(hypothesis: Hypothesis, scale: float = 1.0) -> Array:
        each = local.next_log_probs(asked.ids(prompts, hypothesis.template), local.row(hypothesis.weights, scale))
        parts = [log_probs[[token for token, _ in top]] for log_probs, top in zip(each, tops, strict=True)]
        made: Array = torch.cat(parts).double().numpy()
        return made

    predictions = _of_each(asked, predict)
    fits = {hypothesis: numbers.fit(each) for hypothesis, each in predictions.items()}
    best = max(fits, key=lambda hypothesis: fits[hypothesis].log_likelihood)
    base, own = (predictions[Hypothesis(weights, best.template)] for weights in (BASE, ADAPTER))
    effect = numbers.between(base, own if best.weights == BASE else predictions[best])
    scale = None
    if local.can_scale:
        report("fitting the scale", 0, 1)
        scale = fit_scale(numbers, partial(predict, Hypothesis(ADAPTER, best.template)), {0.0: base, 1.0: own})
        report("fitting the scale", 1, 1)
    return _finding(asked, "log-probabilities", fits, scale, limits_of(effect), (numbers.prompts, len(found)))


def compare_greedy(
    local: Local, path: str, by: str, prompts: Sequence[Prompt], replies: Sequence[Reply | None], report: Report
) -> RouteFinding:
    """The verdict on the tokens of greedy answers: whether they are what each hypothesis would have chosen."""
    asked = _Asked(local, path, by, report)
    answers = [local.answer_ids(reply.text) if reply is not None else [] for reply in replies]
    kept = [number for number, answer in enumerate(answers) if answer]
    prompts, answers = [prompts[number] for number in kept], [answers[number] for number in kept]
    tokens = torch.tensor([token for answer in answers for token in answer])
    if not kept:
        return _finding(asked, "greedy answers", {}, None, GREEDY, (0, 0))

    def choices(hypothesis: Hypothesis, scale: float = 1.0) -> tuple[Fit, torch.Tensor]:
        ids, row = asked.ids(prompts, hypothesis.template), local.row(hypothesis.weights, scale)
        chosen, likelihoods = list[torch.Tensor](), torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        for logits, answer in zip(local.logits_after(ids, answers, row), answers, strict=True):
            chosen.append(logits[:-1].argmax(-1))
            at = torch.arange(len(answer)), torch.tensor(answer)
            for number, temperature in enumerate(TEMPERATURES):
                likelihoods[number] += (logits[:-1].double() / temperature).log_softmax(-1)[at].sum()
        first = torch.cat(chosen)
        return Fit(float((first != tokens).double().mean()), float(likelihoods.max())), first

    found = _of_each(asked, choices)
    fits = {hypothesis: fit for hypothesis, (fit, _) in found.items()}
    best = max(fits, key=lambda hypothesis: fits[hypothesis].log_likelihood)
    base, own = (found[Hypothesis(weights, best.template)][1] for weights in (BASE, ADAPTER))
    effect = float((base != (own if best.weights == BASE else found[best][1])).double().mean())
    scale = None
    if local.can_scale:
        known = {0.0: fits[Hypothesis(BASE, best.template)], 1.0: fits[Hypothesis(ADAPTER, best.template)]}
        factors = [*FACTORS, *[factor for factor, _ in usual_factors(local.adapter)]]
        for number, factor in enumerate(factors, 1):
            known[factor] = choices(Hypothesis(ADAPTER, best.template), factor)[0]
            report("trying scales", number, len(factors))
        scale = _best_of(known)
    limits = GREEDY._replace(effect=effect)
    return _finding(asked, "greedy answers", fits, scale, limits, (len(answers), len(tokens)))


def _of_each(asked: _Asked, compute: Callable[[Hypothesis], T]) -> dict[Hypothesis, T]:
    found: dict[Hypothesis, T] = {}
    for number, hypothesis in enumerate(asked.hypotheses, 1):
        found[hypothesis] = compute(hypothesis)
        asked.report(f"comparing {asked.path}", number, len(asked.hypotheses))
    return found


def _known(local: Local, reply: Reply | None) -> list[tuple[int, float]]:
    """(id, log-probability) of each token that is known here, one an id."""
    named = [(local.token_id(token), value) for token, value in (reply.top if reply is not None else [])]
    return list({token: value for token, value in named if token is not None}.items())


def _best_of(fits: dict[float, Fit]) -> ScaleFit:
    best = max(fits, key=lambda factor: fits[factor].log_likelihood)
    least = fits[best].log_likelihood - GREEDY.lead
    possible = [factor for factor, fit in fits.items() if fit.log_likelihood >= least]
    return ScaleFit(best, min(possible), max(possible), fits[best])


def _finding(
    asked: _Asked,
    evidence: str,
    fits: dict[Hypothesis, Fit],
    scale: ScaleFit | None,
    limits: Limits,
    counts: tuple[int, int],
) -> RouteFinding:
    decision = (
        decide(fits, scale, limits, expected=asked.local.expected, prompts=counts[0])
        if fits
        else Decision("undecided", "no answer can be compared: none has tokens that this tokenizer knows")
    )
    listed = {name_of(hypothesis): fit for hypothesis, fit in fits.items()}
    best = max(fits, key=lambda hypothesis: fits[hypothesis].log_likelihood, default=None)
    if scale is not None and best is not None:
        listed[f"{name_of(Hypothesis(ADAPTER, best.template))} at {scale.factor:.2f} of its scale"] = scale.fit
    ordered = sorted(listed.items(), key=lambda item: -item[1].log_likelihood)
    top = ordered[0][1] if ordered else None
    why = decision.why
    if decision.verdict == "wrong scale" and scale is not None:
        why += "".join(f": {text}" for text in cause_of(scale.factor, asked.local.adapter))
    if evidence == "greedy answers":
        why += ". Greedy answers prove less than log-probabilities, which the server does not give"
    return RouteFinding(
        asked.path,
        asked.by,
        evidence,
        decision.verdict,
        why,
        decision.other,
        (best.template or None) if best is not None else None,
        scale.factor if scale is not None else None,
        (scale.low, scale.high) if scale is not None else None,
        *counts,
        top.distance if top else None,
        limits.effect,
        [HypothesisFinding(n, f.distance, top.log_likelihood - f.log_likelihood) for n, f in ordered if top],
    )


# Factors that faults of servers lead to -------------------------------------------------------------------------------


def usual_factors(adapter: Adapter) -> list[tuple[float, str]]:
    """(factor, what leads to it) for LoRA in PEFT's layout; nothing for what has no alpha and r."""
    config = adapter.peft_config
    r, alpha = config.get("r"), config.get("lora_alpha")
    if adapter.layout != "LORA" or not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1 or alpha <= 0:
        return []
    stabilized = bool(config.get("use_rslora"))
    own = alpha / (math.sqrt(r) if stabilized else r)
    found = [(1 / own, f"a server that reads neither alpha ({alpha:g}) nor r ({r}) would do this")]
    if stabilized:
        found.insert(0, (1 / math.sqrt(r), f"alpha / r in place of alpha / sqrt(r), r = {r}: rsLoRA is ignored"))
    else:
        found.append((math.sqrt(r), f"alpha / sqrt(r) in place of alpha / r, r = {r}"))
    return [(factor, text) for factor, text in found if not 1 / NEAR <= factor <= NEAR]


def cause_of(factor: float, adapter: Adapter) -> list[str]:
    """What usually leads to a factor, if anything does."""
    known = [*usual_factors(adapter), (0.5, "half of it"), (2.0, "twice as much, as if it was applied twice")]
    return [text for usual, text in known if 1 / NEAR <= factor / usual <= NEAR][:1]
