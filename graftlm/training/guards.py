"""What watches a run while nobody does: spikes of the loss, tensors that stand still, memory that grows, and its end.

What a guard notices is an event in metrics.jsonl. All that it remembers can be read there again, so a run that resumes
is watched as one that was never stopped. Steps that are not finite are the loop's own affair (`train.on_nonfinite`).
"""

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from graftlm.config.schema import PositiveCount, Rate, config
from graftlm.system import resident_gib

WINDOW = 32
"""A loss is compared with that of so many steps before it."""

FEWEST = 8
"""With fewer it is not known yet what is usual."""

TIMES, DEVIATIONS = 3.0, 8.0
"""A spike is above so many times the median, and so many deviations above it (1.4826 times the median distance from it,
which is the standard deviation where losses are normal). The first is for steps that are all alike, the second for
those of single rows, which are not."""

EVERY = 50
"""Steps between two looks at tensors and memory."""

GROWTH, LEAST_GROWTH_GIB = 1.25, 0.25
"""Memory grows if it is so many times, and so much, what it was after the first EVERY steps."""


@config
class EarlyStopping:
    """Stop when the held-out loss falls no more, and keep the state in which it was lowest."""

    every: PositiveCount = 50
    """Steps between two measurements of the held-out loss."""
    patience: PositiveCount = 3
    """Stop after so many measurements in a row that were no better."""
    min_gain: Rate = 0.0
    """By how much lower, in nats, a loss must be to count as better."""


class Guards:
    """`lines` are those of metrics.jsonl so far."""

    def __init__(self, stopping: EarlyStopping | None, lines: Iterable[Mapping[str, Any]]) -> None:
        self.stopping = stopping
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.best, self.since = float("inf"), 0
        self._marks: dict[str, tuple[float, float]] = {}
        self._memory: float | None = None
        for line in lines:
            if "loss" in line and "event" not in line:
                self.spike(line["loss"])
            elif line.get("event") == "held out":
                self.better(line["held_out_loss"])

    def spike(self, loss: float) -> dict[str, Any] | None:
        """An event if this loss is far above those before it; it does not count for what is usual then."""
        if len(self.losses) >= FEWEST:
            usual = median(self.losses)
            deviation = 1.4826 * median(abs(other - usual) for other in self.losses)
            if loss > usual + max((TIMES - 1) * abs(usual), DEVIATIONS * deviation):
                return {"event": "spike", "spike": loss, "usual": usual}
        self.losses.append(loss)
        return None

    def better(self, held_out_loss: float) -> bool:
        """Whether this is the best so far; `ended` says whether it is time to stop."""
        least = self.stopping.min_gain if self.stopping else 0.0
        if held_out_loss < self.best - least or self.best == float("inf"):
            self.best, self.since = held_out_loss, 0
            return True
        self.since += 1
        return False

    @property
    def ended(self) -> bool:
        return self.stopping is not None and self.since >= self.stopping.patience

    def look(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Events of the last EVERY steps: which of the tensors that learn have not moved, and whether memory has
        grown."""
        marks = {name: _mark(tensor) for name, tensor in tensors.items()}
        still = sorted(name for name, mark in marks.items() if self._marks.get(name) == mark)
        self._marks = marks
        events: list[dict[str, Any]] = [{"event": "stalled", "tensors": still, "steps": EVERY}] if still else []
        memory = memory_gib()
        if memory is not None and self._memory is None:
            self._memory = memory
        elif memory is not None and self._memory is not None and memory > self._memory * GROWTH + LEAST_GROWTH_GIB:
            events.append({"event": "memory grows", "from_gib": round(self._memory, 2), "to_gib": round(memory, 2)})
            self._memory = memory  # told again only when it has grown as much again
        return events


def _mark(tensor: Tensor) -> tuple[float, float]:
    numbers = tensor.detach().double()
    return float(numbers.sum()), float(numbers.square().sum())


def memory_gib() -> float | None:
    """What this process holds now: on a GPU of its memory, else resident; None where nobody says."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    return resident_gib("VmRSS")
