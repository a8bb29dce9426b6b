"""From rows to steps: the batches, the deltas on the model, and which of them learns when.

A phase is a part of the batches with deltas that learn together and an optimizer and callbacks of their own. Most runs
have one; `train.in_turn` makes one for each delta.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from graftlm import distributed
from graftlm.data.batches.order import Curriculum
from graftlm.data.batches.pack import Example, Group, Pack, batches
from graftlm.data.sources.template_draws import Draws
from graftlm.deltas import METHODS
from graftlm.deltas.base import Delta
from graftlm.kernels.backend import TORCH, Backend
from graftlm.model.layers.attach import attach
from graftlm.model.layers.initialize import needed_statistics
from graftlm.model.layers.registry import hosts, parameters_of, trainable
from graftlm.model.passes.packed_attention import packed_attention
from graftlm.model.passes.packing_check import check_packing
from graftlm.model.passes.statistics import collect
from graftlm.training.callback import Callback, default_rate, make_optimizer
from graftlm.training.config import TrainConfig
from graftlm.training.inner_split import make_inner_loss
from graftlm.training.kernel_choice import choose_kernels
from graftlm.training.loop import Step, steps
from graftlm.training.setup import Setup
from graftlm.training.state import ParameterGroup, TrainingState
from graftlm.training.teacher import add_teacher

Rows = Sequence[Example | Group]

STATISTICS_PACKS = 8
"""What an init or a method wants to know of the data is gathered over this many packs of the first steps."""


def attach_deltas(
    setup: Setup, model: Any, examples: Rows, batches: Sequence[Sequence[int]], *, start: bool = True
) -> None:
    """Put the deltas on the model; those that start from the data see the first packs of training.

    Every rank looks at the same packs, so that all start from the same numbers. Without `start` they are there to be
    filled with what a checkpoint holds.
    """
    objective = setup.objective()
    objective.add_reference(model)
    load_teacher(setup, model, examples)
    gathered = {
        name: collect(model, config, needs, _losses(setup, model, examples, batches))
        for name, config in setup.deltas.items()
        if start and (needs := needed_statistics(config))
    }
    for name, config in setup.deltas.items():
        attach(model, config, name=name, seed=setup.train.seed, statistics=gathered.get(name), start=start)
    objective.add_head(model)


def load_teacher(setup: Setup, model: Any, examples: Rows) -> None:
    """Put another base beside the model where the loss has one as its teacher, proved on the rows."""
    proved = partial(check_packing, items=examples, packed=setup.packed, sharing=setup.train.prefix_sharing)
    add_teacher(model, setup.loss, base=setup.base, network=setup.network, proved=proved)


def _losses(
    setup: Setup, model: Any, examples: Rows, batches: Sequence[Sequence[int]]
) -> Iterator[Callable[[], torch.Tensor]]:
    """The mean loss of each of the first packs, as functions to be called while the bare base is watched."""
    steps = (setup.make_packs([examples[i] for i in batch], share=False) for batch in batches)
    packs = (pack.to(model.device) for step in steps for pack in step)
    objective = setup.objective()

    def loss(pack: Pack) -> torch.Tensor:
        made, _ = objective.part(model, pack)
        return made.sum / objective.count(pack)

    with packed_attention(model) if setup.packed else nullcontext():
        for each in islice(packs, STATISTICS_PACKS):
            yield partial(loss, each)


def count_steps(config: TrainConfig, rows: int) -> int:
    """The steps of a run with epochs of so many rows."""
    return config.steps or max(1, round((config.epochs or 1) * rows / config.batch_rows))


def make_batches(
    config: TrainConfig, examples: Rows, order: Curriculum | None = None, draws: Draws | None = None
) -> list[list[int]]:
    """The examples of each step, by number. The batch with the most tokens comes first, so that memory trouble shows at
    once; in a curriculum no step is moved. `draws` say which of the examples a row is in each epoch."""
    count = len(examples) if draws is None else draws.count
    total = count_steps(config, count)
    if order is not None:
        found = order.batches(config.batch_rows, total, config.seed)
        return found if draws is None else draws.of(found)
    found = batches(count, config.batch_rows, total, config.seed)
    found = found if draws is None else draws.of(found)
    largest = max(range(total), key=lambda i: sum(len(examples[j]) for j in found[i]))
    found[0], found[largest] = found[largest], found[0]
    return found


@dataclass
class Phase:
    """Deltas that learn together over the batches `first` to `last`, from 0, `last` not included."""

    setup: Setup
    first: int
    last: int
    training: TrainingState
    callbacks: list[Callback]
    schedule: Callable[[int], float]
    backend: Backend = TORCH

    def steps(self, examples: Rows, batches: Sequence[Sequence[int]], seen: int) -> Iterator[Step]:
        """The steps from batch `seen` on. Afterwards, if that was the end of the phase: `end`."""
        setup, model = self.setup, self.training.model
        objective = setup.objective()

        def rows_of(number: int) -> Rows:
            return [examples[i] for i in batches[number]]

        def packs(number: int) -> Iterator[Pack]:
            made = (callback.rows(self.training, number, rows_of, self.last) for callback in self.callbacks)
            rows = next((rows for rows in made if rows is not None), None)
            rows = rows_of(number) if rows is None else rows
            for some in (rows, objective.mismatched(rows)):
                for pack in distributed.packs_of(some, setup.make_packs, sharded=distributed.is_sharded(model)):
                    yield pack.to(model.device)  # type: ignore[arg-type]

        return steps(
            model,
            (list(packs(number)) for number in range(seen, self.last)),
            loss=setup.loss,
            optimizer=self.training.optimizer,
            schedule=self.schedule,
            clip=setup.train.clip,
            callbacks=self.callbacks,
            regularizers=setup.regularizers,
            training=self.training,
            seen=seen,
            on_nonfinite=setup.train.on_nonfinite,
            backend=self.backend,
            **setup.passes(),
        )

    def end(self) -> None:
        for callback in self.callbacks:
            callback.on_end(self.training)


def phases(setup: Setup, model: Any, total: int, inner_rows: Rows = (), backend: Backend = TORCH) -> Iterator[Phase]:
    """All deltas together over `total` steps, or one after another while the others stay as they are.

    `inner_rows` are those of the inner validation split, for callbacks that learn from them.
    """
    for host in hosts(model).values():
        host.deltas.train()  # the base stays in evaluation mode: its own dropout would only add noise
    config, deltas = setup.train, setup.deltas
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
        callbacks = setup.make_callbacks()
        rates = {name: METHODS[deltas[name].method].delta.learning_rate for name in names}
        groups = [
            ParameterGroup(
                learning[name],
                config.learning_rate or default_rate(callbacks, rates[name]),
                at_embeddings=embeddings.intersection(learning[name]),
            )
            for name in names
        ]
        groups += setup.objective().groups(model)
        optimizer = make_optimizer(callbacks, groups, weight_decay=config.weight_decay)
        schedule = config.factor(last - first)
        for callback in callbacks:
            schedule = callback.schedule(schedule)
        training = TrainingState(
            model,
            {name: deltas[name] for name in names},
            optimizer,
            total=last - first,
            seed=config.seed,
            first=first,
        )
        if inner_rows:
            training.inner_loss = make_inner_loss(setup, training, inner_rows, backend)
        yield Phase(setup, first, last, training, callbacks, schedule, backend)
        first = last
    for parameters in learning.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def _at_embeddings(model: Any, by_tensor: Mapping[int, str]) -> frozenset[str]:
    """The names of the trained parameters that belong to an embedding."""
    deltas = [delta for host in hosts(model).values() for delta in host.deltas.values()]
    at = [delta for delta in deltas if isinstance(delta, Delta) and delta.site.kind == "embedding"]
    return frozenset(by_tensor[id(p)] for delta in at for p in delta.parameters() if id(p) in by_tensor)


def training_steps(
    setup: Setup, model: Any, examples: Rows, batches: Sequence[Sequence[int]], inner_rows: Rows = ()
) -> Iterator[Step]:
    """Every step of a run, for callers that want nothing but the steps."""
    _, backend = choose_kernels(setup, model, examples, batches)
    for phase in phases(setup, model, len(batches), inner_rows, backend):
        yield from phase.steps(examples, batches, phase.first)
        phase.end()
