"""What a model does on rows that it never saw: loss in nats per supervised token, greedy answers, ROUGE-L."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from graftlm import distributed
from graftlm.data.batches.pack import Example, Group, lay_out
from graftlm.data.batches.prompts import asked_in
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.source import Row
from graftlm.evaluation.metrics.rouge import rouge_l
from graftlm.generation.generate import generate
from graftlm.hub.stopping import all_stop_ids
from graftlm.passes.packed_attention import packed_attention
from graftlm.training.objective import Objective, Sums


@dataclass(frozen=True)
class HeldOut:
    loss_nats: float | None
    """None where there is no answer to be imitated."""
    rouge_l: float | None
    """Mean ROUGE-L F1 over the answers; None where no row could be answered (raw text, or none asked for)."""
    answers: list[str]
    objective: Mapping[str, float] = field(default_factory=dict)
    """The loss and the metrics of an objective that compares answers; empty for others."""


def held_out_loss(model: Any, examples: Sequence[Example], *, pack_tokens: int, packed: bool) -> float:
    """Mean of -log p over all supervised tokens, in nats, whatever the model was trained for."""
    supervised = Objective("supervised")
    return held_out_metrics(model, examples, supervised, pack_tokens=pack_tokens, packed=packed, share=False)["loss"]


@torch.no_grad()
def held_out_metrics(
    model: Any, groups: Sequence[Example | Group], objective: Objective, *, pack_tokens: int, packed: bool, share: bool
) -> dict[str, float]:
    """The loss and the metrics of an objective over all groups. Every rank has its share of them."""
    make = partial(lay_out, tokens=pack_tokens, packed=packed, share=share)
    sharded, sums, count = distributed.is_sharded(model), Sums(objective), 0.0
    with packed_attention(model) if packed else nullcontext():
        probes = distributed.packs_of(objective.mismatched(groups), make, sharded=sharded)
        statistic = objective.statistic(model, [part.to(model.device) for part in probes])
        for part in distributed.packs_of(groups, make, sharded=sharded):
            made, _ = objective.part(model, part.to(model.device), statistic)
            sums.add(made)
            count += objective.count(part)
    total, metrics = sums.totals()
    return {"loss": total / distributed.totals(count)[0], **metrics}


def answers(
    model: Any, renderer: Renderer, rows: Sequence[Row], max_new_tokens: int, progress: Callable[[int], None]
) -> list[str]:
    """The greedy answer to each row's last question; `progress` is told how many are done.

    Each rank answers its share. A sharded base passes through its layers on all ranks at once: there, each answers
    everything.
    """
    prompts = [renderer.prompt(asked_in(row)[0], row.tools, row.variables) for row in rows]
    rank, count = (0, 1) if distributed.is_sharded(model) else (distributed.rank(), distributed.count())
    stop_ids = all_stop_ids(model, renderer.stop_ids)
    mine: list[tuple[int, str]] = []
    for number, ids in generate(model, prompts[rank::count], stop_ids=stop_ids, max_new_tokens=max_new_tokens):
        mine.append((rank + number * count, renderer.decode(ids).strip()))
        progress(min(len(rows), len(mine) * count))
    found = dict(distributed.gathered(mine))
    return [found[index] for index in range(len(rows))]


def can_be_answered(row: Row) -> bool:
    """Whether a row is a question with an answer to compare with."""
    return len(row.messages) > 1 and row.messages[-1].role == "assistant"


def evaluate(
    model: Any,
    renderer: Renderer,
    examples: Sequence[Example],
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    pack_tokens: int,
    packed: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> HeldOut:
    """Loss over `examples`, and answers to `rows` with their mean ROUGE-L."""
    loss = held_out_loss(model, examples, pack_tokens=pack_tokens, packed=packed) if examples else None
    said = answers(model, renderer, rows, max_new_tokens, progress)
    pairs = zip((asked_in(row)[1] for row in rows), said, strict=True)
    scores = [rouge_l(wanted, text) for wanted, text in pairs if wanted is not None]
    return HeldOut(loss, sum(scores) / len(scores) if scores else None, said)
