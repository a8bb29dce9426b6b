"""The section `train` of a recipe."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from graftlm.config.schema import Count, Flag, PositiveCount, PositiveRate, Rate, Share, config
from graftlm.data.sources.source import SourceConfig
from graftlm.deltas import METHODS
from graftlm.deltas.inits import INITS
from graftlm.kernels.backend import Kernels
from graftlm.model.initialize import needed_statistics
from graftlm.training.guards import EarlyStopping
from graftlm.training.schedule import Schedule, learning_rate_factor


@config
class StatisticsConfig:
    """The rows from which inits and methods gather statistics before training. A wrong value raises a ValueError."""

    rows: str | SourceConfig
    """A source as in `data.train`: the same formats, templates and limits. All rows of it are used, once; without this
    section, the packs of the first steps of training are."""

    def conflict_in(self, recipe: Any) -> str:
        """Why this section has no meaning in the recipe, or an empty text."""
        if any(needed_statistics(delta) for delta in recipe.all_deltas().values()):
            return ""
        inits = ", ".join(name for name, init in INITS.items() if init.needs)
        methods = ", ".join(name for name, method in METHODS.items() if method.delta.needs)
        return (
            f"statistics.rows: no delta of the recipe gathers statistics. Those with an init of {inits} do, and the "
            f"methods {methods}: choose one of them, or leave the section out"
        )


@config
class TrainConfig:
    """The steps of a run: how many, how large, at which rate, on which machine. A wrong value raises a ValueError."""

    steps: PositiveCount | None = None
    """Optimizer steps; give these or `epochs`."""
    epochs: PositiveRate | None = None
    """Passes over the training rows, 1 if neither is given."""
    batch_rows: PositiveCount = 8
    """Rows of one optimizer step."""
    learning_rate: PositiveRate | None = None
    """The largest learning rate; by default that of each delta's method (`graft methods` lists them): the smallest that
    gained 95 % of what the best one did on the job of benchmarks/methods. `graft lr-range` tests rates on your rows."""
    in_turn: Flag = False
    """Train several deltas one after another, each for an equal share of the steps, instead of together."""
    schedule: Schedule = "cosine"
    """How the learning rate goes on after the warm-up: to zero along half a cosine or a line (`linear`), not at all
    (`constant`), or not at all until the last `decay` of the steps and then to zero along a line
    (`warmup-stable-decay`)."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises."""
    decay: Share | None = None
    """Share of the steps over which the learning rate of `schedule: warmup-stable-decay` falls; 0.2 where nothing is
    given. The other schedules do not read it."""
    weight_decay: Rate = 0.0
    clip: PositiveRate = 1.0
    """Largest norm of the gradient of all trainable tensors together."""
    pack_tokens: PositiveCount = 1024
    """Tokens of one forward pass: memory grows with it, the result does not change."""
    prefix_sharing: Flag = True
    """Compute what rows of a pack begin with alike once, for all of them: the loss and its gradients are the same."""
    checkpointing: Flag = False
    """Keep each layer's input alone and run the layer again in the backward pass: less memory, about a third slower."""
    offload: Flag = False
    """Keep activations in the machine's memory instead of the GPU's; refused on a CPU, where they are there already."""
    kernels: Kernels = "auto"
    """What computes attention, layers with low-rank factors, norms, gated units and rotary embeddings. `ours`: kernels
    for a CPU and a base in bf16, which need a C++ compiler. `torch`: torch's own operations. `compiled`: torch.compile
    for norms, gates and rotary embeddings, torch for the rest. `auto`: the fastest of them for each shape, measured at
    the first run of a base on a machine; kernels that cannot be built are left out, and the start says so. The others
    are an error where they cannot compute, and need `data.pack`."""

    def __post_init__(self) -> None:
        if self.decay is not None and self.schedule != "warmup-stable-decay":
            raise ValueError(f"decay is for schedule: warmup-stable-decay; schedule: {self.schedule} does not read it")
        if self.schedule == "warmup-stable-decay" and self.warmup + self.decay_share > 1:
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay_share:g} are more than the whole run")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.early_stopping and self.in_turn:
            raise ValueError("early_stopping knows one end, and in_turn has several: leave one out")

    def conflict_in(self, recipe: Any) -> str:
        """Why these keys do not fit other parts of a recipe, or an empty text."""
        if self.early_stopping and not recipe.data.held_out:
            return "train.early_stopping looks at held-out rows: set data.held_out"
        if self.kernels in ("ours", "compiled") and not recipe.data.pack:
            return (
                f"train.kernels: {self.kernels} computes packs only: set `data: {{pack: true}}` or train.kernels: auto"
            )
        return ""

    @property
    def decay_share(self) -> float:
        """`decay`, or its default."""
        return 0.2 if self.decay is None else self.decay

    def factor(self, steps: int) -> Callable[[int], float]:
        """The factor on the learning rate of each of so many steps."""
        warmup_steps, decay_steps = round(self.warmup * steps), round(self.decay_share * steps)
        return learning_rate_factor(self.schedule, steps=steps, warmup_steps=warmup_steps, decay_steps=decay_steps)

    REPLACED: ClassVar[Mapping[str, str]] = {"compile": "kernels (auto, ours, torch or compiled)"}
    """Keys of earlier versions, and what took their place."""
    save_every: PositiveCount = 50
    """Steps between two checkpoints, from which `--resume` goes on; one is saved at the end and at Ctrl-C too."""
    keep: PositiveCount = 2
    """How many of the last checkpoints are kept."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: stop, or leave the step out, name its rows and go on; after three in a
    row it stops in either case. Nothing is changed by such a step."""
    on_spike: Literal["tell", "return"] = "tell"
    """At a loss far above those before it: say so, or go back to the last checkpoint and leave out the batches since
    then."""
    early_stopping: EarlyStopping | None = None
    """Stop when the loss of the held-out rows falls no more, and keep the state in which it was lowest."""
    seed: Count = 0
    threads: PositiveCount | None = None
    """CPU threads; by default torch's own choice."""
    shard: Literal["none", "fsdp"] = "none"
    """With several processes, what each holds of the frozen base: all of it, or by fsdp (FSDP2) its part."""
