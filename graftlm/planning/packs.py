"""The packs of a recipe: of a step of middling size, and the largest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graftlm.data.batches.pack import Example, Group, Pack
from graftlm.data.sources.template_draws import Draws
from graftlm.recipe import Recipe
from graftlm.rl.config import training_group
from graftlm.training.kernel_choice import with_answer
from graftlm.training.phases import make_batches
from graftlm.training.setup import Answers

STEPS_SAMPLED = 64
"""Steps, evenly spread, that stand for all of a longer run; the largest batch is the first, and always sampled."""


@dataclass(frozen=True)
class Shape:
    """A recipe's packs: those of a step of middling size, and the one that needs the most memory."""

    step: list[Pack]
    largest: Pack
    lengths: tuple[int, int]
    """How many different lengths the packs of the run have, and how many their segments."""
    packs_a_step: float
    tokens_a_step: float
    """Computed ones; those of the rows are more where beginnings are shared."""
    row_tokens_a_step: float
    tokens_a_pack: float


def with_answers(recipe: Recipe, prompts: Sequence[Example | Group]) -> tuple[Recipe, Sequence[Example | Group]]:
    """A recipe with `rl` as one without it, and its prompts as what its steps train on: with the longest answers, whose
    rewards all differ. Any other recipe and its rows as they are."""
    rl = recipe.rl
    if rl is None:
        return recipe, prompts
    answers = Answers(rl.samples, rl.max_new_tokens)
    groups = [
        training_group(recipe.loss, [with_answer(prompt, answers)] * rl.samples, range(rl.samples))
        for prompt in prompts
    ]
    return replace(recipe, rl=None), [group for group in groups if group is not None]


def shape_of(recipe: Recipe, examples: Sequence[Example | Group], draws: Draws | None = None) -> Shape:
    steps = make_batches(recipe.train, examples, draws=draws)
    sampled = steps[:: max(1, len(steps) // STEPS_SAMPLED)]
    share = recipe.train.prefix_sharing
    packs_of_steps = sorted(
        (recipe.setup().make_packs([examples[i] for i in step], share=share) for step in sampled), key=token_count
    )
    largest = max(
        (pack for packs in packs_of_steps for pack in packs),
        key=lambda p: (p.ids.numel(), sum(n**2 for n in p.lengths)),
    )
    packs = [pack for packs in packs_of_steps for pack in packs]
    more = len(steps) / len(sampled)  # a guess for those that were not looked at; full caches make an end of it
    lengths = len({p.ids.numel() for p in packs}), len({n for p in packs for n in p.lengths})
    count, tokens = sum(map(len, packs_of_steps)), sum(map(token_count, packs_of_steps))
    middle = packs_of_steps[len(packs_of_steps) // 2]
    return Shape(
        middle,
        largest,
        (int(more * lengths[0]), int(more * lengths[1])),
        count / len(packs_of_steps),
        token_count(middle),
        sum(pack.row_tokens for pack in middle),
        tokens / count,
    )


def token_count(packs: Sequence[Pack]) -> int:
    return sum(pack.ids.numel() for pack in packs)
