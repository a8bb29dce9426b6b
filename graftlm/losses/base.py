"""What every objective is: a function of log-probabilities of targets that says what to minimise, as a sum.

Letters, in all files here: S loss triples (hidden row, target, weight), N answers, P pairs of answers. All numbers are
in nats. y_w is the chosen answer of a pair, y_l the rejected one, x the prompt that both answer; pi is the policy, the
model with its deltas, and pi_ref the reference, the same model without them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from graftlm.config.schema import config

Metrics = Mapping[str, tuple[Tensor, Tensor | float]]
"""What is logged of a step beside its loss, by name: a sum, and over how many things. Neither has a gradient."""


Reading = Literal["normalisers", "mean_log_probs"]
"""What a loss may want of each distribution beside the probability of its target: a field of `Batch`."""


@dataclass(frozen=True)
class LossSum:
    """sum: a scalar with a gradient; count: what the sum is divided by, over all packs and ranks of a step."""

    sum: Tensor
    count: Tensor
    metrics: Metrics = field(default_factory=dict)
    penalty: Tensor | None = None
    """What a recipe adds for each supervised token, summed; it is divided by their number, not by `count`."""

    def mean(self, count: float, tokens: float) -> Tensor:
        """This part of a step that has so many things to be counted, and so many supervised tokens."""
        return self.sum / count if self.penalty is None else self.sum / count + self.penalty / tokens


@dataclass(frozen=True)
class Batch:
    """What a pack knows of its S triples beside their log-probabilities."""

    weights: Tensor
    """float [S]"""
    answers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [S]: the answer that each triple is a token of, from 0. Empty where nobody tells answers apart."""
    pairs: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    """int64 [P, 2]: answers to one prompt, (chosen, rejected)."""
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    """float [N]: what is known of each answer: liked 1 or not 0, a share of wins, a reward, an advantage."""
    old_log_probs: Tensor | None = None
    """float [S]: log-probabilities from when the answers were sampled; None where the policy is still the same."""
    values: Tensor | None = None
    """float [N], with a gradient: V(x) of the prompt that each answer is to, for losses with a value head."""
    divergences: Tensor | None = None
    """float [S], with a gradient: how far the policy's whole distribution is from a teacher's, for distillation."""
    normalisers: Tensor | None = None
    """float [S], with a gradient: log sum_v exp(logit_v), for losses that ask for it (`LossConfig.reads`)."""
    mean_log_probs: Tensor | None = None
    """float [S], with a gradient: the mean of log-probabilities over the vocabulary, for losses that ask for it."""
    statistic: float = 0.0
    """A number that the whole step has in common, where `Loss.statistic` asks for one."""


@config
class LossConfig:
    """The base of all configs of objectives; each adds `name`, its key in LOSSES, and its options."""

    name: str

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of the reference are needed."""
        return False

    @property
    def reads(self) -> tuple[Reading, ...]:
        """What must be read of each distribution of the policy's."""
        return ()

    @property
    def makes_passes(self) -> bool:
        """Whether another model, or this one without its deltas, goes through the packs of a step too."""
        return self.needs_reference

    def conflict_in(self, recipe: Any) -> str:
        """Why these options do not fit other parts of a recipe, or an empty text; `recipe` as in `Loss.conflict_in`."""
        return ""


@config
class ComparedConfig(LossConfig):
    """Of the objectives that compare the policy with a reference."""

    reference: str | None = None
    """The reference model: the folder of an adapter, which is loaded onto the base and not trained. Default: the base
    without deltas."""

    @property
    def needs_reference(self) -> bool:
        return True


@dataclass(frozen=True)
class Loss:
    """A row of the table: the config that names the objective, its function, and what it needs to be given."""

    config: type[LossConfig]
    value: Callable[[Any, Tensor, Tensor | None, Batch], LossSum]
    """(config, policy [S], reference [S] or None, batch): log-probabilities in, a sum out."""
    count: Callable[[Any, Batch], Tensor]
    """What the sum is divided by, known before any forward pass: `tokens`, `answers` or `pairs`."""
    rows: Literal["answers", "text", "pairs", "feedback", "rewards"]
    """What a row must have: an answer; raw text; answers that were liked less; an answer that was liked or not;
    answers that somebody has given rewards, as loops that generate do."""
    values: bool = False
    """Whether it learns a value of each prompt: a linear head on the hidden state where the prompt ends."""
    statistic: Callable[[Any, Tensor, Tensor | None, Batch], LossSum] | None = None
    """For a number that is a mean over the whole step, like the KL divergence in KTO: its part of one pack of
    mismatched answers, without a gradient. The mean over all of them is `batch.statistic` of the passes that learn."""

    def conflict_in(self, recipe: Any) -> str:
        """Why this objective does not fit other parts of a recipe, or an empty text. `recipe` has the sections of a
        recipe as attributes."""
        data, name = recipe.data, recipe.loss.name
        if self.rows in ("pairs", "feedback"):
            if data.mask not in ("response", "last-turn") or data.prompt_weight:
                return (
                    f"loss {name} compares answers and nothing else: use data.mask response and no data.prompt_weight"
                )
            if recipe.select:
                return f"select chooses rows for loss supervised; loss {name} takes them as they are"
        if self.rows == "pairs" and not data.pack:
            return f"loss {name} sees two answers in one pass: set `data: {{pack: true}}`"
        if self.statistic is not None and recipe.train.batch_rows < 2:
            return f"loss {name} needs answers to other prompts of a step: set train.batch_rows to 2 or more"
        return str(recipe.loss.conflict_in(recipe))


# What is counted --------------------------------------------------------------------------------------------------


def tokens(config: Any, batch: Batch) -> Tensor:
    return batch.weights.sum()


def answers(config: Any, batch: Batch) -> Tensor:
    return torch.tensor(float(len(batch.scores)))


def pairs(config: Any, batch: Batch) -> Tensor:
    return torch.tensor(float(len(batch.pairs)))


# From tokens to answers to pairs ----------------------------------------------------------------------------------


def per_answer(values: Tensor, batch: Batch) -> Tensor:
    """The weighted sum of values [S] over the tokens of each answer: [N]."""
    return values.new_zeros(len(batch.scores)).index_add(0, batch.answers, values * batch.weights.to(values.dtype))


def lengths(batch: Batch, like: Tensor) -> Tensor:
    """|y| of each answer, [N]: the sum of its weights, which is its number of tokens where none is between 0 and 1."""
    return per_answer(torch.ones_like(like), batch)


def log_ratios(policy: Tensor, reference: Tensor | None, batch: Batch) -> Tensor:
    """log pi(y|x) / pi_ref(y|x) of each answer: [N]. Exactly 0 where the deltas do nothing."""
    assert reference is not None, "this objective needs a reference"
    return per_answer(policy - reference, batch)


def of_pairs(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The values [N] of the chosen and of the rejected answers: [P] each."""
    return values[batch.pairs[:, 0]], values[batch.pairs[:, 1]]


def pair_metrics(policy: Tensor, rewards: Tensor, batch: Batch) -> Metrics:
    """What is logged of P pairs: of rewards [N], the mean margin and how often the chosen answer has more (half where
    both have the same); of log-probabilities, the mean sum over an answer's tokens, and how often the chosen one has
    more."""
    with torch.no_grad():
        count = float(len(batch.pairs))
        chosen, rejected = of_pairs(rewards, batch)
        log_w, log_l = of_pairs(per_answer(policy, batch), batch)
        return {
            "margin": ((chosen - rejected).sum(), count),
            "accuracy": (_better(chosen, rejected), count),
            "chosen_log_prob": (log_w.sum(), count),
            "rejected_log_prob": (log_l.sum(), count),
            "chosen_likelier": (_better(log_w, log_l), count),
        }


def _better(chosen: Tensor, rejected: Tensor) -> Tensor:
    return (chosen > rejected).double().sum() + 0.5 * (chosen == rejected).double().sum()
