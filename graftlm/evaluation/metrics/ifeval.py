"""Shares of instructions that are followed (IFEval: Zhou et al. 2023, arXiv:2311.07911, section 3), by lm-eval's names:

    prompt_level_strict_acc   answers that follow all instructions of their row
    inst_level_strict_acc     instructions that are followed, of all rows together
    *_loose_acc               the same where one of eight forms of the answer follows: as it is, without its first line,
                              without its last, without both; and each of these without the character *

The row has `instruction_id_list` (names, as in `instructions.INSTRUCTIONS`) and `kwargs` (arguments, one mapping for
each), as in IFEval's file; or `instructions`, a list of {name, arguments...}. An empty answer follows nothing. Several
kinds at once, CoDI-Eval's multi-aspect rows, are several instructions of a row.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.errors import DataError
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, ratio, scores
from graftlm.evaluation.metrics.instructions import follows


@config
class PromptStrictConfig(MetricConfig):
    name: Literal["prompt_level_strict_acc"] = "prompt_level_strict_acc"


@config
class PromptLooseConfig(MetricConfig):
    name: Literal["prompt_level_loose_acc"] = "prompt_level_loose_acc"


@config
class InstructionStrictConfig(MetricConfig):
    name: Literal["inst_level_strict_acc"] = "inst_level_strict_acc"


@config
class InstructionLooseConfig(MetricConfig):
    name: Literal["inst_level_loose_acc"] = "inst_level_loose_acc"


def loose_forms(answer: str) -> list[str]:
    lines = answer.split("\n")
    some = [answer, *("\n".join(each).strip() for each in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*some, *(each.replace("*", "") for each in some)]


def followed(item: Answer, *, loose: bool) -> list[bool]:
    """For each instruction of a row, whether the answer follows it."""
    forms = [form for form in (loose_forms(item.text) if loose else [item.text]) if form.strip()]
    wanted = instructions_of(item)
    return [any(follows(name, form, arguments, item.where) for form in forms) for name, arguments in wanted]


def instructions_of(item: Answer) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, arguments) of each instruction of a row. DataError where there are none."""
    fields = item.fields
    names, arguments = fields.get("instruction_id_list"), fields.get("kwargs")
    listed = fields.get("instructions")
    if isinstance(names, Sequence) and isinstance(arguments, Sequence) and len(names) == len(arguments) > 0:
        return [(str(name), each or {}) for name, each in zip(names, arguments, strict=True)]
    if isinstance(listed, Sequence) and listed and all(isinstance(one, Mapping) and "name" in one for one in listed):
        return [(str(one["name"]), {key: value for key, value in one.items() if key != "name"}) for one in listed]
    raise DataError(
        f"{item.where}: the row names no instructions that can be verified: give it `instructions`, a list of "
        "{name, ...}, or `instruction_id_list` and `kwargs` of one length, as IFEval has them",
        code="no-instructions",
    )


def prompt_parts(loose: bool, config: MetricConfig, items: Sequence[Answer]) -> Array:
    return scores([float(all(followed(item, loose=loose))) for item in items])


def instruction_parts(loose: bool, config: MetricConfig, items: Sequence[Answer]) -> Array:
    """Followed ones and all [n, 2]."""
    found = (followed(item, loose=loose) for item in items)
    return np.asarray([(sum(each), len(each)) for each in found], dtype=float)


def share(sums: Array) -> Array:
    return ratio(sums[..., 0], sums[..., 1])


ROWS = {
    "prompt_level_strict_acc": MetricRow(PromptStrictConfig, (Answer,), partial(prompt_parts, False)),
    "prompt_level_loose_acc": MetricRow(PromptLooseConfig, (Answer,), partial(prompt_parts, True)),
    "inst_level_strict_acc": MetricRow(InstructionStrictConfig, (Answer,), partial(instruction_parts, False), share),
    "inst_level_loose_acc": MetricRow(InstructionLooseConfig, (Answer,), partial(instruction_parts, True), share),
}
