"""Training on answers that the model gives itself: what a recipe says of it, and what a loss is given of rewards.

For each prompt of a step the model gives several answers, a scorer gives each a reward, and the group of them becomes
what the loss trains on:

| the loss needs | it is given | of rewards r_1 ... r_n |
|---|---|---|
| rewards (policy-gradient) | all answers, with advantages | RLOO, GRPO, Dr. GRPO: `baseline` of the loss |
| pairs (dpo, simpo ..) | the best against the worst | online DPO (Guo et al. 2024, arXiv:2402.04792) |
| answers (supervised) | the best | best-of-n, RAFT (Dong et al. 2023, arXiv:2304.06767) |
| feedback: kto | all, liked or not | above or below the mean; what equals it is left out |
| feedback: sppo | all, with their share of wins | (others that are worse + half of those as good) / (n - 1) |
| feedback: dro | all, with their rewards | as they are |

A group whose rewards are all the same says nothing of which answer is better: it is left out, as DAPO does (Yu et al.
2025, arXiv:2503.14476, section 3.2), but for dro, which regresses on rewards themselves.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Union

import torch
from pydantic import Field, Strict

from graftlm import distributed
from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.data.batches.pack import Example, Group
from graftlm.data.batches.prompts import asked_in
from graftlm.data.sources.source import Row
from graftlm.errors import TrainingError, numbered
from graftlm.losses import LOSSES, LossConfig
from graftlm.losses.policy_gradient import advantages
from graftlm.model.initialize import needed_statistics
from graftlm.plugins import load_plugins
from graftlm.rl.rewards import SCORERS, Completion, Reward, Scorer, ScorerConfig

load_plugins("graftlm.rewards")  # what they add to the table is in the union

if TYPE_CHECKING:
    AnyScorer = ScorerConfig
else:  # whichever configs are in the table, told apart by their `by`
    _SCORERS = tuple(row.config for row in SCORERS.values())
    AnyScorer = Annotated[Union[_SCORERS], Field(discriminator="by")]  # noqa: UP007

Nucleus = Annotated[float, Strict(), Field(gt=0, le=1)]


@config
class RLConfig:
    scorer: AnyScorer
    """What gives an answer its reward."""
    samples: Annotated[int, Strict(), Field(ge=2)] = 4
    """Answers to each prompt."""
    max_new_tokens: PositiveCount = 64
    """The longest answer, in tokens; one that does not end by then is cut, and its end is not trained."""
    temperature: PositiveRate = 1.0
    """What logits are divided by. Loss policy-gradient takes 1 only: its gradient is that of answers which the policy
    itself gives, and with another temperature these would be another policy's."""
    top_p: Nucleus = 1.0
    """Sample among the likeliest tokens that together have this probability; for policy-gradient 1 only, likewise."""
    at_once: PositiveCount = 32
    """Answers that are generated together; several processes share these batches out. What is drawn depends on it."""
    steps_per_round: PositiveCount = 1
    """Steps that are made of answers from one state of the model: their prompts are all answered before the first of
    them. With more than 1, policy-gradient compares the policy with the one that answered."""

    def conflict_in(self, recipe: Any) -> str:
        """Why training on the model's own answers does not fit other parts of a recipe, or an empty text."""
        data, train, name = recipe.data, recipe.train, recipe.loss.name
        needs = LOSSES[name].rows
        if needs == "text":
            return f"loss {name} trains raw text, and rl gives answers: use supervised, or another loss"
        if needs == "rewards" and (self.temperature, self.top_p) != (1.0, 1.0):
            return (
                f"loss {name} needs rl.temperature and top_p at 1: its gradient is that of answers which the policy "
                "itself gives, and these would be drawn from another distribution"
            )
        if needs != "answers" and not data.pack:
            return f"loss {name} sees several answers in one pass: set `data: {{pack: true}}`"
        if data.mask != "response" or data.prompt_weight:
            return "rl trains what the model answered: use data.mask response and no data.prompt_weight"
        if data.over_length == "truncate":
            return "a question that was cut asks something else: rl takes data.over_length drop or error"
        if data.max_tokens <= self.max_new_tokens:
            return (
                f"data.max_tokens {data.max_tokens} must hold a prompt and rl.max_new_tokens {self.max_new_tokens}: "
                "raise the one or lower the other"
            )
        if recipe.select or data.desirable_share is not None:
            key = "select" if recipe.select else "data.desirable_share"
            return f"{key} chooses rows by their answers, and rl takes questions only: leave one out"
        if train.early_stopping or train.on_spike == "return":
            key = "early_stopping" if train.early_stopping else "on_spike: return"
            return f"train.{key} looks at the loss, which says nothing where answers change with the model"
        if starts := [each.method for each in recipe.all_deltas().values() if needed_statistics(each)]:
            return (
                f"delta {starts[0]} starts from what it sees of training rows, and rl makes them later: choose another "
                "init or method"
            )
        return ""


# Rewards ---------------------------------------------------------------------------------------------------------


def score(scorer: Scorer, answers: Sequence[Completion]) -> list[Reward]:
    """The reward of each answer, the ranks sharing the work; TrainingError for one that is not finite, or missing."""
    mine = list(range(distributed.rank(), len(answers), distributed.count()))
    rewards = list(scorer([answers[i] for i in mine])) if mine else []
    if len(rewards) != len(mine):
        raise TrainingError(
            f"the scorer gave {len(rewards)} rewards for {len(mine)} answers", code="wrong-reward-count"
        )
    bad = [
        f"{answers[i].where}: {reward} for {answers[i].answer[:80]!r}"
        for i, reward in zip(mine, rewards, strict=True)
        if reward is not None and not math.isfinite(reward)
    ]
    if bad:
        raise TrainingError(
            f"the scorer gave rewards that are not finite:\n{numbered(bad)}\nLet it return a number, or None for an "
            "answer that it cannot judge: that is left out",
            code="non-finite-rewards",
        )
    found: dict[int, Reward] = dict(distributed.gathered(list(zip(mine, rewards, strict=True))))
    return [found[i] for i in range(len(answers))]


def mean_reward(scorer: Scorer, rows: Sequence[Row], texts: Sequence[str]) -> float | None:
    """The mean reward of answers to these rows; None where none can be judged. Whether they were cut is not known."""
    prompts = [asked_in(row) for row in rows]
    completions = [
        Completion(messages, text, reference, cut=False, where=row.where)
        for row, (messages, reference), text in zip(rows, prompts, texts, strict=True)
    ]
    rewards = [reward for reward in score(scorer, completions) if reward is not None]
    return fmean(rewards) if rewards else None


def training_group(loss: LossConfig, answers: Sequence[Example], rewards: Sequence[Reward]) -> Example | Group | None:
    """What the loss trains on, of several answers to one prompt; None where they say nothing.

    An answer whose reward is None is left out.
    """
    judged = [(answer, reward) for answer, reward in zip(answers, rewards, strict=True) if reward is not None]
    values = [reward for _, reward in judged]
    if len(set(values)) < 2 and not (values and loss.name == "dro"):
        return None
    best, worst = (judged[values.index(extreme(values))][0] for extreme in (max, min))
    needs = LOSSES[loss.name].rows
    if needs == "answers":
        return best
    if needs == "pairs":
        return Group((best, worst), (1.0, 0.0), ((0, 1),))
    if needs == "rewards":
        scores: list[float | None] = [*_advantages(loss, values)]
    else:
        scores = FEEDBACK[loss.name](values)
    scored = [(answer, score) for (answer, _), score in zip(judged, scores, strict=True) if score is not None]
    return Group(tuple(answer for answer, _ in scored), tuple(score for _, score in scored))


def _advantages(loss: Any, rewards: Sequence[float]) -> list[float]:
    one_group = torch.zeros(len(rewards), dtype=torch.int64)
    found: list[float] = advantages(torch.tensor(rewards, dtype=torch.float64), one_group, loss.baseline).tolist()
    return found


def _liked(rewards: Sequence[float]) -> list[float | None]:
    mean = fmean(rewards)
    return [None if reward == mean else float(reward > mean) for reward in rewards]


def _wins(rewards: Sequence[float]) -> list[float | None]:
    """The share of comparisons with the other answers that each wins."""
    others = len(rewards) - 1
    return [
        (sum(other < reward for other in rewards) + 0.5 * (sum(other == reward for other in rewards) - 1)) / others
        for reward in rewards
    ]


def _as_they_are(rewards: Sequence[float]) -> list[float | None]:
    return [*rewards]


FEEDBACK: dict[str, Callable[[Sequence[float]], list[float | None]]] = {
    "dro": _as_they_are,
    "kto": _liked,
    "sppo": _wins,
}
"""How the rewards of a group become the scores of losses that need feedback."""
