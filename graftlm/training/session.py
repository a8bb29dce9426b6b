"""The course of a run: its steps, what is noted and said of them, when its state is saved, and what ends it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import Progress

from graftlm import distributed
from graftlm.data.batches.pack import Example, Group
from graftlm.data.chat.render import Renderer
from graftlm.evaluation.held_out import held_out_metrics
from graftlm.kernels.backend import Backend
from graftlm.model.layers.modes import deltas_still
from graftlm.model.layers.registry import trainable
from graftlm.recipe import Recipe
from graftlm.rl.rewards import Scorer
from graftlm.training.checkpoints import BEST, Snapshot, put_back, put_deltas_back, step_name, take
from graftlm.training.guards import EVERY, Guards
from graftlm.training.loop import NotFiniteError, Step
from graftlm.training.objective import Objective, start_of
from graftlm.training.phases import turns
from graftlm.training.run_folder import Place, Running


class Stopping:
    """Whether somebody has asked for the run to stop after its step."""

    requested = False


@dataclass(frozen=True)
class Watched:
    """Where a run leaves what it does, and who may stop it."""

    place: Place
    run: Running
    stopping: Stopping
    console: Console
    bars: Progress


class Course:
    """Steps through `plan`, the rows of each step, on a model that has its deltas; `facts` are kept in checkpoints.

    `seen` batches of the plan are done. `stopped` says that the run was left before its end.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        examples: Sequence[Example | Group],
        held_out: Sequence[Example | Group],
        plan: list[list[int]],
        facts: Mapping[str, Any],
        watched: Watched,
        backend: Backend,
    ) -> None:
        self.recipe, self.model, self.examples, self.held_out, self.plan = recipe, model, examples, held_out, plan
        self.backend = backend
        self.facts, self.place, self.run, self.stopping = facts, watched.place, watched.run, watched.stopping
        self.console, self.bars = watched.console, watched.bars
        self.guards = Guards(recipe.train.early_stopping, self.run.metrics.lines)
        self.seen, self.asked_to_stop = 0, False
        self.tokens, self.seconds = 0, 0.0  # of the steps of this process

    @property
    def stopped(self) -> bool:
        return self.asked_to_stop and self.seen < len(self.plan)

    @property
    def ends(self) -> bool:
        return self.asked_to_stop or self.guards.ended

    def go(
        self,
        found: Snapshot | None,
        aside: Sequence[Example | Group] = (),
        scorer: Scorer | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        """All steps from where the checkpoint `found` stood, or from the first; until they are done or something ends
        them. `aside` are rows for policies which learn from them; `scorer` judges the model's answers where it gives
        them itself, and `renderer`, that of the run, reads them."""
        self.seen = found.facts["seen"] if found else 0
        self.bar = self.bars.add_task("training", total=len(self.plan), completed=self.seen, now="")
        for turn in turns(self.recipe, self.model, len(self.plan), aside, scorer, self.backend, renderer):
            if found is not None and turn.first < found.facts["turn"]:
                continue
            if found is not None and turn.first == found.facts["turn"]:
                put_back(found, turn.training, turn.policies)
            self.turn, self.seen = turn, max(self.seen, turn.first)
            while self.seen < turn.last and not self.ends:
                if back := self._until_a_return():
                    self._put_back(back)
            turn.end()
            if self.stopped:
                break

    def _until_a_return(self) -> Snapshot | None:
        """Steps to the end of the turn or of the run; or to a spike, and then the checkpoint to go back to."""
        every = self.recipe.train.save_every
        try:
            for step in self.turn.steps(self.recipe, self.examples, self.plan, self.seen):
                self.seen = step.number
                self._note(step)
                if back := self._spike(step):
                    return back
                self._look_at_held_out()
                self.asked_to_stop = bool(distributed.totals(self.stopping.requested)[0])  # on any rank
                if self.ends or self.seen % every == 0 or self.seen == len(self.plan):
                    self._save(step_name(self.seen))
                if self.ends:
                    return None
        except NotFiniteError:  # what was reached is not lost, and `--resume` may leave the step out
            self._save(step_name(self.seen))
            raise
        return None

    def _note(self, step: Step) -> None:
        """Into metrics.jsonl, on the screen, and to the guards."""
        for line in _lines(step):
            self.run.note(line)
        if self.seen == 1 and (told := start_of(self.recipe.loss, step.metrics)):
            self.console.print(told, highlight=False)
        if not step.skipped:
            self.tokens, self.seconds = self.tokens + step.tokens, self.seconds + step.wall_s
        now = step.skipped or f"loss {step.loss:.3f}  {self.tokens / self.seconds:,.0f} tokens/s"
        now += f"  reward {step.metrics['reward']:.3f}" if "reward" in step.metrics else ""
        self.bars.update(self.bar, completed=self.seen, now=now)
        if self.seen % EVERY == 0:
            for event in self.guards.look(trainable(self.model)):
                self.run.note({"step": self.seen, **event})

    def _spike(self, step: Step) -> Snapshot | None:
        """Note it if this loss is one; the checkpoint to go back to, if that is wanted and there is one."""
        comparable = not (step.skipped or self.recipe.online)  # answers of its own change with the model
        spike = self.guards.spike(step.loss) if comparable else None
        if spike is None:
            return None
        back = self.place.last(self.console.print) if self.recipe.train.on_spike == "return" else None
        if back is not None and back.facts["turn"] != self.turn.first:
            back = None  # of an optimiser that is gone
        self.run.note({"step": self.seen, **spike, **({"returns_to": back.facts["seen"]} if back else {})})
        return back

    def _put_back(self, back: Snapshot) -> None:
        """The state of a checkpoint, while the batches since then stay left out."""
        put_deltas_back(back, self.model, list(self.recipe.all_deltas()), self.place.out)
        put_back(back, self.turn.training, self.turn.policies)
        self._save(step_name(self.seen))

    def _look_at_held_out(self) -> None:
        """When early stopping wants it: measure the held-out loss as an event, and save the state with the lowest."""
        stopping, train = self.recipe.train.early_stopping, self.recipe.train
        if stopping is None or self.seen % stopping.every:
            return
        with ExitStack() as held:
            for policy in self.turn.policies:
                held.enter_context(policy.evaluating(self.turn.training))
            held.enter_context(deltas_still(self.model))
            found = held_out_metrics(
                self.model,
                self.held_out,
                Objective(self.recipe.loss),
                pack_tokens=train.pack_tokens,
                packed=self.recipe.data.pack,
                share=train.prefix_sharing,
            )
            self.run.note({"step": self.seen, "event": "held out", "held_out_loss": found["loss"]})
            if self.guards.better(found["loss"]):
                self._save(BEST)

    def _save(self, name: str) -> None:
        turn, every = self.turn, list(self.recipe.all_deltas())
        snapshot = partial(take, turn.training, turn.policies, every, turn=turn.first, seen=self.seen, **self.facts)
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
