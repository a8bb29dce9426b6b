"""From a recipe and its rows to steps: the plan of batches, the deltas on the model, and who of them learns when.

A turn is a part of the plan with deltas that learn together and an optimiser and policies of their own. Most runs have
one; `train.in_turn` makes one for each delta.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from graftlm import distributed
from graftlm.callbacks import default_rate, make_optimiser, make_policies
from graftlm.data.batches.order import Curriculum
from graftlm.data.batches.pack import Example, Group, Pack, batches, lay_out
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.template_draws import Draws
from graftlm.deltas import METHODS
from graftlm.deltas.base import Delta
from graftlm.kernels.backend import TORCH, Backend
from graftlm.model.layers.attach import attach, hosts, needed_statistics, parameters_of, trainable
from graftlm.model.passes.packed_attention import packed_attention
from graftlm.model.passes.packing_check import check_packing
from graftlm.model.passes.statistics import collect
from graftlm.recipe import Recipe
from graftlm.rl.rewards import Scorer
from graftlm.rl.rollouts import Sampler
from graftlm.training.callback import ParameterGroup, Policy, Training
from graftlm.training.inner_split import loss_aside
from graftlm.training.kernel_choice import choose_kernels
from graftlm.training.loop import Step, TrainConfig, steps
from graftlm.training.objective import Objective
from graftlm.training.teacher import add_teacher

STATISTICS_PACKS = 8
"""What an init or a method wants to know of the data is gathered over this many packs of the first steps."""


def attach_deltas(
    recipe: Recipe, model: Any, examples: Sequence[Example | Group], plan: list[list[int]], *, start: bool = True
) -> None:
    """Put the deltas of the recipe on the model; those that start from the data see the first packs of training.

    Every rank looks at the same packs, so that all start from the same numbers. Without `start` they are there to be
    filled with what a checkpoint holds.
    """
    deltas, objective = recipe.all_deltas(), Objective(recipe.loss)
    objective.add_reference(model)
    load_teacher(recipe, model, examples)
    gathered = {
        name: collect(model, config, needs, _losses(recipe, model, examples, plan))
        for name, config in deltas.items()
        if start and (needs := needed_statistics(config))
    }
    for name, config in deltas.items():
        attach(model, config, name=name, seed=recipe.train.seed, statistics=gathered.get(name), start=start)
    objective.add_head(model)


def load_teacher(recipe: Recipe, model: Any, examples: Sequence[Example | Group]) -> None:
    """Put another base beside the model where the loss has one as its teacher, proved on the rows."""
    proved = partial(check_packing, items=examples, packed=recipe.data.pack, sharing=recipe.train.prefix_sharing)
    add_teacher(model, recipe.loss, base=recipe.base, network=recipe.network, proved=proved)


def _losses(
    recipe: Recipe, model: Any, examples: Sequence[Example | Group], plan: list[list[int]]
) -> Iterator[Callable[[], torch.Tensor]]:
    """The mean loss of each of the first packs, as functions to be called while the bare base is watched."""
    packs = (p.to(model.device) for step in plan for p in packs_of(recipe, [examples[i] for i in step], share=False))

    objective = Objective(recipe.loss)

    def loss(p: Pack) -> torch.Tensor:
        made, _ = objective.part(model, p)
        return made.sum / objective.count(p)

    with packed_attention(model) if recipe.data.pack else nullcontext():
        for each in islice(packs, STATISTICS_PACKS):
            yield partial(loss, each)


def packs_of(recipe: Recipe, rows: Sequence[Example | Group], *, share: bool) -> list[Pack]:
    """The passes over some rows as the recipe has them, beginnings shared or not."""
    return lay_out(rows, recipe.train.pack_tokens, packed=recipe.data.pack, share=share)


def steps_of(config: TrainConfig, rows: int) -> int:
    """The steps of a run with epochs of so many rows."""
    return config.steps or max(1, round((config.epochs or 1) * rows / config.batch_rows))


def plan_batches(
    config: TrainConfig,
    examples: Sequence[Example | Group],
    order: Curriculum | None = None,
    draws: Draws | None = None,
) -> list[list[int]]:
    """The examples of each step; the batch with the most tokens comes first, so that memory trouble shows at once. In a
    curriculum no step is moved. `draws` say which of the examples a row is in each epoch."""
    count = len(examples) if draws is None else draws.count
    total = steps_of(config, count)
    if order is not None:
        plan = order.batches(config.batch_rows, total, config.seed)
        return plan if draws is None else draws.of(plan)
    plan = batches(count, config.batch_rows, total, config.seed)
    plan = plan if draws is None else draws.of(plan)
    largest = max(range(total), key=lambda i: sum(len(examples[j]) for j in plan[i]))
    plan[0], plan[largest] = plan[largest], plan[0]
    return plan


@dataclass
class Turn:
    """Deltas that learn together over the batches `first` to `last` of the plan, from 0, `last` not included."""

    first: int
    last: int
    training: Training
    policies: list[Policy]
    schedule: Callable[[int], float]
    backend: Backend = TORCH

    def steps(
        self, recipe: Recipe, examples: Sequence[Example | Group], plan: list[list[int]], seen: int
    ) -> Iterator[Step]:
        """The steps from batch `seen` of the plan on. Afterwards, if that was the end of the turn: `end`."""
        config, model = recipe.train, self.training.model
        objective = Objective(recipe.loss)
        make = partial(packs_of, recipe, share=config.prefix_sharing)

        sampler = next((policy for policy in self.policies if isinstance(policy, Sampler)), None)

        def packs(number: int) -> Iterator[Pack]:
            items = [examples[i] for i in plan[number]]
            if sampler is not None:
                items = sampler.rows(self.training, number, lambda n: [examples[i] for i in plan[n]], self.last)
            for some in (items, objective.probes(items)):
                for pack in distributed.packs_of(some, make, sharded=distributed.is_sharded(model)):
                    yield pack.to(model.device)  # type: ignore[arg-type]

        return steps(
            model,
            (list(packs(number)) for number in range(seen, self.last)),
            loss=recipe.loss,
            optimiser=self.training.optimiser,
            schedule=self.schedule,
            clip=config.clip,
            policies=self.policies,
            regularisers=recipe.regularisers,
            training=self.training,
            seen=seen,
            on_nonfinite=config.on_nonfinite,
            backend=self.backend,
            **recipe.passes(),
        )

    def end(self) -> None:
        for policy in self.policies:
            policy.on_end(self.training)


def turns(
    recipe: Recipe,
    model: Any,
    total: int,
    aside: Sequence[Example | Group] = (),
    scorer: Scorer | None = None,
    backend: Backend = TORCH,
    renderer: Renderer | None = None,
) -> Iterator[Turn]:
    """All deltas together over `total` steps, or each in its turn and the others as they are.

    `aside` are rows for policies which learn from them. `scorer` judges the answers of `online` and `renderer` reads
    them; both are made of the recipe where they are not given.
    """
    for host in hosts(model).values():
        host.deltas.train()  # the base stays in evaluation mode: its own dropout would only add noise
    config, deltas = recipe.train, recipe.all_deltas()
    by_tensor = {id(p): name for name, p in trainable(model).items()}
    learning = {name: {by_tensor[id(p)]: p for p in parameters_of(model, name)} for name in deltas}
    embeddings = _at_embeddings(model, by_tensor)
    together = [[name] for name in deltas] if config.in_turn else [list(deltas)]
    first = 0
    for number, names in enumerate(together, start=1):
        last = round(total * number / len(together))
        for name, parameters in learning.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name in names)
        policies = make_policies(recipe.policies)
        rates = {name: METHODS[deltas[name].method].delta.learning_rate for name in names}
        groups = [
            ParameterGroup(
                learning[name],
                config.learning_rate or default_rate(policies, rates[name]),
                at_embeddings=embeddings.intersection(learning[name]),
            )
            for name in names
        ]
        groups += Objective(recipe.loss).groups(model)
        policies += [Sampler(recipe, first, scorer, renderer)] if recipe.online else []
        optimiser = make_optimiser(policies, groups, weight_decay=config.weight_decay)
        schedule = config.factor(last - first)
        for policy in policies:
            schedule = policy.schedule(schedule)
        training = Training(
            model, {name: deltas[name] for name in names}, optimiser, total=last - first, seed=config.seed
        )
        if aside:
            make = partial(packs_of, recipe, share=config.prefix_sharing)
            training.aside = loss_aside(recipe, training, aside, make, backend)
        yield Turn(first, last, training, policies, schedule, backend)
        first = last
    for parameters in learning.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def _at_embeddings(model: Any, by_tensor: Mapping[int, str]) -> frozenset[str]:
    """The names of the trained parameters that lie at an embedding."""
    deltas = [delta for host in hosts(model).values() for delta in host.deltas.values()]
    at = [delta for delta in deltas if isinstance(delta, Delta) and delta.site.kind == "embedding"]
    return frozenset(by_tensor[id(p)] for delta in at for p in delta.parameters() if id(p) in by_tensor)


def training_steps(
    recipe: Recipe,
    model: Any,
    examples: Sequence[Example | Group],
    plan: list[list[int]],
    aside: Sequence[Example | Group] = (),
) -> Iterator[Step]:
    """Every step of a run, for who wants nothing but the steps."""
    _, backend = choose_kernels(recipe, model, examples, plan)
    for turn in turns(recipe, model, len(plan), aside, backend=backend):
        yield from turn.steps(recipe, examples, plan, turn.first)
        turn.end()
