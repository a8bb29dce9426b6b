"""What training takes of a recipe: what is trained and how, apart from the rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from graftlm.adapters.adapter import Adapter
from graftlm.data.batches.pack import Example, Group, Pack, lay_out
from graftlm.deltas.base import DeltaConfig
from graftlm.hub.config import BaseConfig
from graftlm.kernels.backend import TORCH, Backend
from graftlm.losses import LossConfig
from graftlm.training.callback import Callback
from graftlm.training.config import TrainConfig
from graftlm.training.objective import Objective
from graftlm.training.passes import Passes
from graftlm.training.regularizers import RegularizerConfig


class Answers(NamedTuple):
    """Online RL's answers: how many the model gives to a prompt, and the tokens of the longest."""

    samples: int
    max_tokens: int


@dataclass(frozen=True)
class Setup:
    base: str | BaseConfig
    deltas: Mapping[str, DeltaConfig]
    """By name, in the order in which they act."""
    loss: LossConfig
    regularizers: Sequence[RegularizerConfig]
    train: TrainConfig
    make_callbacks: Callable[[], list[Callback]]
    """Makes the optimizer and the callbacks of one phase, in this order."""
    packed: bool
    """Whether several rows go through the model in one pass (`data.pack`)."""
    network: bool
    start_from: Adapter | None = None
    """What the only delta continues; None where it starts anew."""
    answers: Answers | None = None
    """None where the rows come from files."""

    def passes(self, backend: Backend = TORCH) -> Passes:
        """How packs go through the model."""
        return Passes(self.packed, self.train.checkpointing, self.train.offload, backend)

    def objective(self) -> Objective:
        """The loss alone: what has to be added for regularizers is in `loop.TrainStep`."""
        return Objective(self.loss)

    def make_packs(self, rows: Sequence[Example | Group], *, share: bool | None = None) -> list[Pack]:
        """The passes over some rows; `share` overrides `train.prefix_sharing`."""
        share = self.train.prefix_sharing if share is None else share
        return lay_out(rows, self.train.pack_tokens, packed=self.packed, share=share)
