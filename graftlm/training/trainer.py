"""The trainer: the steps of a run in memory, which may stop after any of them and go on, here or in another process.

    trainer = Trainer(setup, model, examples, batches)
    for step in trainer.steps(7):
        ...
    state = trainer.state()                            # tensors on the CPU, and facts that JSON can say
    again = Trainer(setup, other, examples, batches)   # `other` has the same base and deltas
    again.load(state)
    for step in again.steps():                         # the same bytes as without the stop
        ...
    again.end()

No folder is read or written here. `session.py` logs the steps of a recipe's run and saves states as checkpoints.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from graftlm import distributed
from graftlm.data.batches.pack import Pack
from graftlm.errors import TrainingError
from graftlm.kernels.backend import Backend
from graftlm.training.callback import Callback
from graftlm.training.inner_split import make_inner_loss
from graftlm.training.kernel_choice import choose_kernels
from graftlm.training.loop import Step, TrainStep
from graftlm.training.phases import Phases, Rows
from graftlm.training.setup import Setup
from graftlm.training.snapshot import Snapshot, put_back, put_deltas_back, take
from graftlm.training.state import TrainingState


class Trainer:
    """Steps over `batches`, the numbers of the `examples` of each, on a model that has its deltas (`attach_deltas`).

    `inner_rows` are those of the inner validation split, for callbacks that learn from them. `backend` computes the
    passes; by default it is chosen as `train.kernels` says.
    """

    def __init__(
        self,
        setup: Setup,
        model: Any,
        examples: Rows,
        batches: Sequence[Sequence[int]],
        inner_rows: Rows = (),
        *,
        backend: Backend | None = None,
    ) -> None:
        self.setup, self.model, self.examples, self.batches = setup, model, examples, batches
        self.inner_rows = inner_rows
        self.backend = backend or choose_kernels(setup, model, examples, batches)[1]
        self.phases = Phases(setup, model, len(batches))
        self.ended = False
        self._train_step: TrainStep | None = None
        self._begin(0)

    @property
    def training(self) -> TrainingState:
        """What callbacks see of the phase."""
        return self.phase.training

    @property
    def callbacks(self) -> list[Callback]:
        """The optimizer and the callbacks of the phase."""
        return self.phase.callbacks

    @property
    def seen(self) -> int:
        """Batches so far, those that were skipped too."""
        return self.training.seen

    @property
    def finished(self) -> bool:
        """Whether all batches have been seen."""
        return self.seen == len(self.batches)

    def steps(self, count: int | None = None) -> Iterator[Step]:
        """The next `count` steps, or all to the end of the run; fewer where the run ends before."""
        numbers = range(len(self.batches) - self.seen)
        for _ in islice(numbers, count):
            yield self.step()

    def step(self) -> Step:
        """The next step; of a phase that is over, `on_end` of its callbacks is called before.

        Raises as `TrainStep.step`, and TrainingError where no step is left.
        """
        if self.finished or self.ended:
            ended = ", and `end` was called. To go on, load a state from before that" if self.ended else ""
            raise TrainingError(
                f"no step is left: {self.seen} of {len(self.batches)} batches are done{ended}", code="no-step-left"
            )
        while self.seen == self.phase.last:
            self._end_phase()
            self._begin(self.number + 1)
        if self._train_step is None:
            self._train_step = self._make_train_step()
        return self._train_step.step(list(self._packs(self.seen)))

    def state(self) -> Snapshot:
        """All that the steps so far have changed, as a copy."""
        return take(self.training, self.callbacks, list(self.setup.deltas))

    def load(self, state: Snapshot) -> None:
        """Go on from a state of a trainer of the same setup, with a new optimizer and new callbacks.

        Tensors of it may have been replaced, as by the mean of several states. Raises TrainingError where the state is
        of another optimizer or of another phase than there is here, AdapterError for deltas of other shapes.
        """
        firsts = [first for first, _ in self.phases.bounds]
        if (first := state.facts["phase"]) not in firsts:
            raise TrainingError(
                f"the state is of a phase that begins with batch {first}; here phases begin with batch "
                f"{', '.join(map(str, firsts))}",
                code="checkpoint-mismatch",
            )
        self.ended = False
        self._begin(firsts.index(first))
        put_deltas_back(state, self.model, list(self.setup.deltas))
        put_back(state, self.training, self.callbacks)

    def end(self) -> None:
        """Let callbacks leave the deltas as they shall be used (`on_end`): after the last step, or to stop for good."""
        self._end_phase()
        while self.finished and self.number + 1 < len(self.phases.bounds):  # phases without a batch
            self._begin(self.number + 1)
            self._end_phase()
        self.phases.end()
        self.ended = True

    def _begin(self, number: int) -> None:
        self.number, self.phase = number, self.phases.begin(number)
        self._train_step = None
        if self.inner_rows:
            self.training.inner_loss = make_inner_loss(self.setup, self.training, self.inner_rows, self.backend)

    def _end_phase(self) -> None:
        for callback in self.callbacks:
            callback.on_end(self.training)

    def _make_train_step(self) -> TrainStep:
        setup = self.setup
        return TrainStep(
            self.training,
            setup.loss,
            self.phase.schedule,
            setup.train.clip,
            self.callbacks,
            setup.regularizers,
            setup.train.on_nonfinite,
            setup.passes(self.backend),
        )

    def _rows_of(self, number: int) -> Rows:
        return [self.examples[i] for i in self.batches[number]]

    def _packs(self, number: int) -> Iterator[Pack]:
        """The packs of a batch on this rank: of its rows, or of those that a callback makes of them."""
        rows_by_callback = (each.rows(self.training, number, self._rows_of, self.phase.last) for each in self.callbacks)
        rows = next((rows for rows in rows_by_callback if rows is not None), None)
        rows = self._rows_of(number) if rows is None else rows
        sharded = distributed.is_sharded(self.model)
        for some in (rows, self.setup.objective().mismatched(rows)):
            for pack in distributed.packs_of(some, self.setup.make_packs, sharded=sharded):
                yield pack.to(self.model.device)
