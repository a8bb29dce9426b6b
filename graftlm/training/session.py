"""A session: the steps of a run, what is logged of them, when its state is saved, and what ends it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import Progress

from graftlm import distributed
from graftlm.model.modes import deltas_still
from graftlm.model.registry import trainable
from graftlm.training.checkpoints import BEST, step_name
from graftlm.training.guards import EVERY, Guards
from graftlm.training.loop import NotFiniteError, Step
from graftlm.training.objective import start_of
from graftlm.training.run_folder import RunFolder, RunHandle
from graftlm.training.snapshot import Snapshot
from graftlm.training.trainer import Trainer


class Stopping:
    """Whether somebody has asked for the run to stop after its step."""

    requested = False


@dataclass(frozen=True)
class RunContext:
    """Where a run is saved and shown, and what may stop it."""

    folder: RunFolder
    run: RunHandle
    stopping: Stopping
    console: Console
    bars: Progress


class Session:
    """The steps of `trainer`, logged and saved; checkpoints hold `facts` too.

    `stopped` says that the run was left before its end. `held_out_loss` computes the loss of the held-out rows, for
    early stopping.
    """

    def __init__(
        self, trainer: Trainer, facts: Mapping[str, Any], context: RunContext, held_out_loss: Callable[[], float]
    ) -> None:
        self.trainer, self.train_config, self.held_out_loss = trainer, trainer.setup.train, held_out_loss
        self.facts, self.folder, self.run, self.stopping = facts, context.folder, context.run, context.stopping
        self.console, self.bars = context.console, context.bars
        self.guards = Guards(self.train_config.early_stopping, self.run.metrics.lines)
        self.stop_requested = False
        self.tokens, self.seconds = 0, 0.0  # of the steps of this process

    @property
    def seen(self) -> int:
        return self.trainer.seen

    @property
    def stopped(self) -> bool:
        return self.stop_requested and not self.trainer.finished

    @property
    def ends(self) -> bool:
        return self.stop_requested or self.guards.ended

    def train(self, found: Snapshot | None) -> None:
        """All steps from where the checkpoint `found` stood, or from the first; until they are done or something ends
        them."""
        if found is not None:
            self.trainer.load(found)
        total = len(self.trainer.batches)
        self.bar = self.bars.add_task("training", total=total, completed=self.seen, now="")
        while not (self.trainer.finished or self.ends):
            if snapshot := self._until_a_return():
                self._return_to(snapshot)
        self.trainer.end()

    def _until_a_return(self) -> Snapshot | None:
        """Steps to the end of the run; or to a spike, and then the checkpoint to go back to."""
        try:
            for step in self.trainer.steps():
                self._log(step)
                if snapshot := self._spike(step):
                    return snapshot
                self._look_at_held_out()
                self.stop_requested = bool(distributed.totals(self.stopping.requested)[0])  # on any rank
                if self.ends or self.seen % self.train_config.save_every == 0 or self.trainer.finished:
                    self._save(step_name(self.seen))
                if self.ends:
                    return None
        except NotFiniteError:  # what was reached is not lost, and `--resume` may leave the step out
            self._save(step_name(self.seen))
            raise
        return None

    def _log(self, step: Step) -> None:
        """Write the step into metrics.jsonl, show it, and give it to the guards."""
        for line in _lines(step):
            self.run.log(line)
        if self.seen == 1 and (text := start_of(self.trainer.setup.loss, step.metrics)):
            self.console.print(text, highlight=False)
        if not step.skipped:
            self.tokens, self.seconds = self.tokens + step.tokens, self.seconds + step.wall_s
        now = step.skipped or f"loss {step.loss:.3f}  {self.tokens / self.seconds:,.0f} tokens/s"
        now += f"  reward {step.metrics['reward']:.3f}" if "reward" in step.metrics else ""
        self.bars.update(self.bar, completed=self.seen, now=now)
        if self.seen % EVERY == 0:
            for event in self.guards.look(trainable(self.trainer.model)):
                self.run.log({"step": self.seen, **event})

    def _spike(self, step: Step) -> Snapshot | None:
        """Log it if this loss is one; the checkpoint to return to, if that is wanted and there is one."""
        comparable = not step.skipped and self.trainer.setup.answers is None  # answers of the model change with it
        spike = self.guards.spike(step.loss) if comparable else None
        if spike is None:
            return None
        snapshot = self.folder.last(self.console.print) if self.train_config.on_spike == "return" else None
        if snapshot is not None and snapshot.facts["phase"] != self.trainer.phase.first:
            snapshot = None  # of an optimizer that is gone
        self.run.log({"step": self.seen, **spike, **({"returns_to": snapshot.facts["seen"]} if snapshot else {})})
        return snapshot

    def _return_to(self, snapshot: Snapshot) -> None:
        """Restore the state of a checkpoint; the batches since then stay left out."""
        self.trainer.load(replace(snapshot, facts={**snapshot.facts, "seen": self.seen}))
        self._save(step_name(self.seen))

    def _look_at_held_out(self) -> None:
        """When early stopping wants it: measure the held-out loss as an event, and save the state with the lowest."""
        stopping = self.train_config.early_stopping
        if stopping is None or self.seen % stopping.every:
            return
        with ExitStack() as stack:
            for callback in self.trainer.callbacks:
                stack.enter_context(callback.evaluating(self.trainer.training))
            stack.enter_context(deltas_still(self.trainer.model))
            loss = self.held_out_loss()
            self.run.log({"step": self.seen, "event": "held out", "held_out_loss": loss})
            if self.guards.better(loss):
                self._save(BEST)

    def _save(self, name: str) -> None:
        def snapshot(**more: Any) -> Snapshot:
            state = self.trainer.state()
            return replace(state, facts={**state.facts, **self.facts, **more})

        self.run.save(name, snapshot)


def _lines(step: Step) -> Iterator[dict[str, Any]]:
    """What metrics.jsonl says of a step: what it did or why it was left out, and what else happened."""
    if step.skipped:
        skipped = {"step": step.number, "event": "skipped", "why": step.skipped, "rows": list(step.rows)}
        yield skipped | dict(step.metrics)
    else:
        yield {
            "step": step.number,
            "loss": step.loss,
            "tokens": step.tokens,
            "computed_tokens": step.computed_tokens,
            "supervised_tokens": step.supervised_tokens,
            "grad_norm": step.grad_norm,
            "learning_rate": step.learning_rate,
            "wall_s": round(step.wall_s, 4),
            **step.metrics,
        }
    yield from ({"step": step.number, **event} for event in step.events)
