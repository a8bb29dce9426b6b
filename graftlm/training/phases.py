"""From rows to steps: the batches, the deltas on the model, and which of them learns when.

A phase is a part of the batches with deltas that learn together and an optimizer and callbacks of their own. Most runs
have one; `train.in_turn` makes one for each delta.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.load import attach_adapter
from graftlm.data.batches.order import Curriculum
from graftlm.data.batches.pack import Example, Group, Pack, batches
from graftlm.data.sources.template_draws import Draws
from graftlm.deltas import METHODS
from graftlm.deltas.base import Delta
from graftlm.model.attach import attach
from graftlm.model.initialize import needed_statistics
from graftlm.model.registry import attachment, hosts, parameters_of, trainable
from graftlm.passes.packed_attention import packed_attention
from graftlm.passes.packing_check import check_packing
from graftlm.passes.statistics import collect
from graftlm.training.callback import Callback, default_rate, make_optimizer
from graftlm.training.config import TrainConfig
from graftlm.training.setup import Setup
from graftlm.training.state import ParameterGroup, TrainingState
from graftlm.training.teacher import add_teacher

Rows = Sequence[Example | Group]

STATISTICS_PACKS = 8
"""What an init or a method wants to know of the data is gathered over this many packs of the first steps, where no
rows are named for it (`statistics.rows`)."""


def attach_deltas(
    setup: Setup,
    model: Any,
    examples: Rows,
    batches: Sequence[Sequence[int]],
    *,
    statistics_rows: Rows = (),
    start: bool = True,
) -> None:
    """Put the deltas on the model. Those that start from the data see all of `statistics_rows`, or, where there are
    none, the first packs of training.

    Every rank looks at the same packs, so that all start from the same numbers. Without `start` they are there to be
    filled with what a checkpoint holds. One that continues an adapter is that adapter; AdapterError or BaseModelError
    where it does not fit.
    """
    objective = setup.objective()
    objective.add_reference(model)
    load_teacher(setup, model, examples)
    packs = partial(_statistics_packs, setup, examples, batches, statistics_rows)
    gathered = {
        name: collect(model, config, needs, _losses(setup, model, packs()))
        for name, config in setup.deltas.items()
        if start and setup.start_from is None and (needs := needed_statistics(config))
    }
    for name, config in setup.deltas.items():
        if setup.start_from is not None:
            _continue_adapter(model, setup.start_from, name)
            continue
        attach(model, config, name=name, seed=setup.train.seed, statistics=gathered.get(name), start=start)
    objective.add_head(model, setup.start_from.heads if setup.start_from is not None else {})


def _continue_adapter(model: Any, adapter: Adapter, name: str) -> None:
    attach_adapter(model, adapter, name=name)
    record = attachment(model)  # template and tokenizer are those of this run
    record.chats.pop(name, None)
    record.tokenizers.pop(name, None)


def load_teacher(setup: Setup, model: Any, examples: Rows) -> None:
    """Put another base beside the model where the loss has one as its teacher, proved on the rows."""
    proved = partial(check_packing, items=examples, packed=setup.packed, sharing=setup.train.prefix_sharing)
    add_teacher(model, setup.loss, base=setup.base, network=setup.network, proved=proved)


def _statistics_packs(
    setup: Setup, examples: Rows, batches: Sequence[Sequence[int]], statistics_rows: Rows
) -> Iterator[Pack]:
    """The packs from which statistics are gathered: of rows that were named all, else the first of training."""
    size = setup.train.batch_rows
    own_steps = [statistics_rows[i : i + size] for i in range(0, len(statistics_rows), size)]
    steps = own_steps or ([examples[i] for i in batch] for batch in batches)
    packs = (pack for step in steps for pack in setup.make_packs(step, share=False))
    return islice(packs, None if own_steps else STATISTICS_PACKS)


def _losses(setup: Setup, model: Any, packs: Iterable[Pack]) -> Iterator[Callable[[], torch.Tensor]]:
    """The mean loss of each pack, as functions to be called while the bare base is watched."""
    objective = setup.objective()

    def loss(pack: Pack) -> torch.Tensor:
        value, _ = objective.part(model, pack)
        return value.sum / objective.count(pack)

    with packed_attention(model) if setup.packed else nullcontext():
        for each in packs:
            yield partial(loss, each.to(model.device))


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

    first: int
    last: int
    training: TrainingState
    callbacks: list[Callback]
    schedule: Callable[[int], float]


class Phases:
    """The phases of a run of `total` batches: all deltas together, or one after another while the others stay as they
    are (`train.in_turn`). The base stays in evaluation mode: its own dropout would only add noise."""

    def __init__(self, setup: Setup, model: Any, total: int) -> None:
        for host in hosts(model).values():
            host.deltas.train()
        self.setup, self.model = setup, model
        by_tensor = {id(p): name for name, p in trainable(model).items()}
        self._learning = {name: {by_tensor[id(p)]: p for p in parameters_of(model, name)} for name in setup.deltas}
        self._embeddings = _at_embeddings(model, by_tensor)
        self._together = [[name] for name in setup.deltas] if setup.train.in_turn else [list(setup.deltas)]
        ends = [round(total * number / len(self._together)) for number in range(len(self._together) + 1)]
        self.bounds = list(pairwise(ends))
        """The first batch of each phase, and the one after its last."""

    def begin(self, number: int) -> Phase:
        """Let the deltas of phase `number` learn alone, with a new optimizer and new callbacks."""
        names, (first, last) = self._together[number], self.bounds[number]
        setup, model = self.setup, self.model
        self._let_learn(names)
        callbacks = setup.make_callbacks()
        optimizer = make_optimizer(callbacks, self._groups(names, callbacks), weight_decay=setup.train.weight_decay)
        schedule = setup.train.factor(last - first)
        for callback in callbacks:
            schedule = callback.schedule(schedule)
        deltas = {name: setup.deltas[name] for name in names}
        seed, total = setup.train.seed, last - first
        training = TrainingState(model, deltas, optimizer, total=total, seed=seed, first=first, seen=first)
        return Phase(first, last, training, callbacks, schedule)

    def _groups(self, names: Sequence[str], callbacks: Sequence[Callback]) -> list[ParameterGroup]:
        rates = {name: METHODS[self.setup.deltas[name].method].delta.learning_rate for name in names}
        groups = [
            ParameterGroup(
                self._learning[name],
                self.setup.train.learning_rate or default_rate(callbacks, rates[name]),
                at_embeddings=self._embeddings.intersection(self._learning[name]),
            )
            for name in names
        ]
        return groups + self.setup.objective().groups(self.model)

    def end(self) -> None:
        """Let all deltas learn again, as before the first phase."""
        self._let_learn(list(self._learning))

    def _let_learn(self, names: Sequence[str]) -> None:
        for name, parameters in self._learning.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name in names)


def _at_embeddings(model: Any, by_tensor: Mapping[int, str]) -> frozenset[str]:
    """The names of the trained parameters that belong to an embedding."""
    deltas = [delta for host in hosts(model).values() for delta in host.deltas.values()]
    at = [delta for delta in deltas if isinstance(delta, Delta) and delta.site.kind == "embedding"]
    return frozenset(by_tensor[id(p)] for delta in at for p in delta.parameters() if id(p) in by_tensor)
