"""An objective on a model: the passes over a pack that its function needs, with gradients or without."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm import distributed
from graftlm.adapters.folder import HEADS
from graftlm.adapters.tensors import fill
from graftlm.data.batches.groups import mismatched_groups
from graftlm.data.batches.pack import Example, Group, Pack
from graftlm.kernels.head import Comparison, Readings
from graftlm.losses import LOSSES, Batch, LossConfig, LossSum
from graftlm.losses.distillation import DistillationConfig, distance
from graftlm.losses.dro import DroConfig
from graftlm.model.registry import SHARED, share, shared_of
from graftlm.passes.forward import head, head_read, hidden_states, log_probs
from graftlm.training.regularizers import KlConfig
from graftlm.training.state import ParameterGroup
from graftlm.training.teacher import add_adapter, comparison, is_adapter, referring

KL_TO_BASE = "kl_to_base"
"""The metric of the divergence from the base that `kl-to-base` adds."""

VALUES = "value-head"
"""The name of a loss's value head among the modules that deltas share."""


class Objective:
    """What a step minimises: the loss of a config as a function of model and pack."""

    def __init__(self, config: LossConfig | str, kl_to_base: KlConfig | None = None) -> None:
        """A name is that loss with its defaults; `kl_to_base` adds a divergence from the base to it."""
        self.config = LOSSES[config].config() if isinstance(config, str) else config  # type: ignore[call-arg]
        self.loss = LOSSES[self.config.name]
        self.kl_to_base = kl_to_base

    def add_reference(self, model: nn.Module) -> None:
        """Put the adapter that is the reference on the bare base, if there is one: before any delta.

        Raises AdapterError for an adapter that does not fit.
        """
        if folder := getattr(self.config, "reference", None) or self._teacher_adapter():
            add_adapter(model, folder)

    def _teacher_adapter(self) -> str | None:
        teacher: str | None = getattr(self.config, "teacher", None)
        return teacher if teacher is not None and is_adapter(teacher) else None

    def add_head(self, model: Any, heads: Mapping[str, Tensor]) -> None:
        """Put the value head on the model, if this loss has one: after the deltas, which freeze everything else.

        It starts as the one in `heads`, those of an adapter that is continued; at 0 where there is none. Raises
        AdapterError where that one does not fit.
        """
        if self.loss.values:
            head = nn.Linear(model.config.get_text_config().hidden_size, 1)
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
            share(model, VALUES, head)
            if stored := {key: tensor for key, tensor in heads.items() if key.startswith(f"{VALUES}.")}:
                fill(objective_heads(model), stored, Path(HEADS))

    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        """What the optimizer trains beside the deltas."""
        return (
            [ParameterGroup(extra_parameters(model), self.config.value_rate)]
            if isinstance(self.config, DroConfig)
            else []
        )

    def count(self, pack: Pack) -> float:
        """What this pack adds to the number that the step's sum is divided by; nothing has to be computed for it."""
        return float(self.loss.count(self.config, batch_of(pack)))

    def part(self, model: nn.Module, pack: Pack, statistic: float = 0.0) -> tuple[LossSum, Tensor]:
        """The pack's part of the loss and log-probabilities of its targets [S], both with a gradient. `statistic` is
        that of the step."""
        batch = replace(batch_of(pack), statistic=statistic)
        reference = self.reference(model, pack)
        comparisons = self.comparisons(model, pack)
        more = bool(comparisons or self.config.reads)
        if more or self.loss.values:
            hidden = hidden_states(model, pack)
            at = hidden.index_select(0, pack.hidden_rows)
            if more:
                means = "mean_log_probs" in self.config.reads
                readings = head_read(model, at, pack.targets, comparisons, with_means=means)
                policy, batch = readings.log_probs, _with_readings(batch, readings)
            else:
                policy = head(model, at, pack.targets)
            if self.loss.values:
                batch = replace(batch, values=_values(model, hidden.detach(), pack))
        else:
            policy = log_probs(model, pack)
        value = self.loss.value(self.config, policy, reference, batch)
        if self.kl_to_base is not None:
            apart = (batch.weights * readings.distances[-1]).sum()
            metrics = {**value.metrics, KL_TO_BASE: (apart.detach(), batch.weights.sum())}
            value = replace(value, metrics=metrics, penalty=self.kl_to_base.weight * apart)
        return value, policy

    def comparisons(self, model: nn.Module, pack: Pack) -> list[Comparison]:
        """Whole distributions that the policy's are compared with: those of a teacher, and last those of the base."""
        found = []
        if isinstance(self.config, DistillationConfig):
            found.append(comparison(model, pack, self.config.teacher, partial(distance, self.config)))
        if self.kl_to_base is not None:
            found.append(comparison(model, pack, None, self.kl_to_base.distance()))
        return found

    def mismatched(self, step: Sequence[Example | Group]) -> list[Group]:
        """The groups that the statistic of a step of these rows needs; none where the loss has no statistic."""
        return mismatched_groups([item for item in step if isinstance(item, Group)]) if self.loss.statistic else []

    @torch.no_grad()
    def statistic(self, model: nn.Module, mismatched: Iterable[Pack]) -> float:
        """The number that the whole step has in common, from mismatched answers on all ranks; 0 without any."""
        if self.loss.statistic is None:
            return 0.0
        total = count = 0.0
        for pack in mismatched:
            found = self.loss.statistic(
                self.config, log_probs(model, pack), self.reference(model, pack), batch_of(pack)
            )
            total, count = total + float(found.sum), count + float(found.count)
        total, count = distributed.totals(total, count)
        return total / count if count else 0.0

    @torch.no_grad()
    def reference(self, model: nn.Module, pack: Pack) -> Tensor | None:
        """log-probabilities of the targets under the reference, [S]: the same pack through the same model."""
        if not self.config.needs_reference:
            return None
        with referring(model, getattr(self.config, "reference", None)):
            return log_probs(model, pack)


def extra_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an objective trains in addition to the deltas, by its name in the model."""
    head = shared_of(model, VALUES)
    return {} if head is None else {f"{SHARED}.{VALUES}.{name}": p for name, p in head.named_parameters()}


def objective_heads(model: nn.Module) -> dict[str, Tensor]:
    """The heads that the objective trains, as an adapter keeps them: HEAD.PARAMETER -> tensor."""
    head = shared_of(model, VALUES)
    return {} if head is None else {f"{VALUES}.{name}": p.detach() for name, p in head.named_parameters()}


def _values(model: nn.Module, hidden: Tensor, pack: Pack) -> Tensor:
    """V(x) [N] from the hidden states [T, d], where prompts end."""
    head = shared_of(model, VALUES)
    if head is None:  # before there are deltas: it will start at 0
        return hidden.new_zeros(len(pack.scores), dtype=torch.float32)
    values: Tensor = head(hidden.index_select(0, pack.prompt_ends).float())
    return values[:, 0]


def _with_readings(batch: Batch, readings: Readings) -> Batch:
    return replace(
        batch,
        divergences=readings.distances[0] if readings.distances else None,
        normalisers=readings.normalisers,
        mean_log_probs=None if readings.means is None else readings.means - readings.normalisers,
    )


def batch_of(pack: Pack) -> Batch:
    return Batch(pack.weights, pack.answers, pack.pairs, pack.scores, pack.old_log_probs)


def start_of(config: LossConfig, metrics: Mapping[str, float]) -> str:
    """What the metrics of the first step say of the reference; nothing where there is none."""
    rewards = [metrics[name] for name in ("margin", "chosen_reward", "rejected_reward") if name in metrics]
    if not config.needs_reference or not rewards:
        return ""
    if not any(rewards):
        return "margin before the first step: 0, so the policy starts as its reference"
    rewards_text = ", ".join(
        f"{name} {metrics[name]:.3g}" for name in ("margin", "chosen_reward", "rejected_reward") if name in metrics
    )
    return f"before the first step the policy is not its reference: {rewards_text}"


class Sums:
    """The loss and the metrics of many packs, added up."""

    def __init__(self, objective: Objective) -> None:
        nothing = torch.empty(0)  # every rank must know what there is, one without packs too
        readings: Any = {"divergences": nothing, "normalisers": nothing, "mean_log_probs": nothing}
        value = objective.loss.value(objective.config, nothing, nothing, Batch(nothing, values=nothing, **readings))
        self.parts = {name: [0.0, 0.0] for name in (*value.metrics, *([KL_TO_BASE] if objective.kl_to_base else []))}
        self.loss = 0.0

    def add(self, value_of_pack: LossSum) -> None:
        self.loss += float(value_of_pack.sum.detach())
        for name, (value, count) in value_of_pack.metrics.items():
            self.parts[name][0] += float(value)
            self.parts[name][1] += float(count)

    def totals(self) -> tuple[float, dict[str, float]]:
        """The summed loss and, of what was counted at all, the mean metrics: of all ranks."""
        loss, *summed = distributed.totals(self.loss, *(number for part in self.parts.values() for number in part))
        found = zip(self.parts, summed[::2], summed[1::2], strict=True)
        return loss, {name: value / count for name, value, count in found if count}
