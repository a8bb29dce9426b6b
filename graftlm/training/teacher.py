"""The teacher of a policy: the base without deltas, an adapter on it, or another base.

The first two are the model itself with other deltas on. Another base hangs on the model, unseen by whoever walks over
its modules and parameters, and is frozen. Teacher and policy go through the same packs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.adapters.folder import CONFIG, WEIGHTS, sha256_of
from graftlm.adapters.load import load_adapter
from graftlm.data.batches.pack import Pack
from graftlm.errors import TrainingError, numbered
from graftlm.hub.config import BaseConfig
from graftlm.hub.load import load_base
from graftlm.hub.tokenizer import load_tokenizer
from graftlm.kernels.head import Comparison
from graftlm.losses.distillation import DistillationConfig
from graftlm.model.modes import activate, deltas_only
from graftlm.model.registry import hosts, parameters_of
from graftlm.passes.forward import hidden_states, logits
from graftlm.passes.packed_attention import is_packed, packed_attention

REFERENCE = "reference"
"""What the adapter of a config's `reference`, or a teacher that is one, is called on the model."""

TEACHER = "graft_teacher"


def is_adapter(name: str) -> bool:
    """Whether this is the folder of an adapter; else it is a base."""
    return (Path(name).expanduser() / CONFIG).is_file()


def add_adapter(model: nn.Module, folder: str) -> None:
    """Put an adapter on the bare base that is not trained, and leave it off. Raises AdapterError if it does not fit."""
    load_adapter(model, folder, name=REFERENCE)
    for parameter in parameters_of(model, REFERENCE):
        parameter.requires_grad_(False)
    activate(model)


def teacher_base(config: Any) -> BaseConfig | None:
    """The other base that a loss has as its teacher; None where it is an adapter, or there is none."""
    if not isinstance(config, DistillationConfig) or config.teacher is None or is_adapter(config.teacher):
        return None
    return BaseConfig(name=config.teacher, dtype=config.teacher_dtype, quantization=config.teacher_quantization)


def add_teacher(
    model: Any,
    config: Any,
    *,
    base: str | BaseConfig,
    network: bool,
    proved: Callable[[Any], None] = lambda teacher: None,
) -> None:
    """Load the teacher of a loss, if it is another base and not there yet, beside a model whose base is `base`.

    `proved` raises where it cannot be run as the recipe runs models. TrainingError for another vocabulary.
    """
    if (teacher_config := teacher_base(config)) is None or TEACHER in model.__dict__:
        return
    check_vocabulary(
        load_tokenizer(base, network=network), load_tokenizer(teacher_config, network=network), teacher_config.name
    )
    teacher: Any = load_base(teacher_config, network=network).model
    here, there = (m.config.get_text_config().vocab_size for m in (model, teacher))
    if here != there:
        raise TrainingError(
            f"loss.teacher: {teacher_config.name} has {there:,} logits and this base {here:,}, though the tokens are "
            "the same: one of the two is padded. Take a teacher of the same width",
            code="teacher-width-differs",
        )
    proved(teacher)
    if config.teacher_adapter is not None:
        add_adapter(teacher, config.teacher_adapter)
        activate(teacher, REFERENCE)
        for host in hosts(teacher).values():
            host.deltas.eval()
    model.__dict__[TEACHER] = teacher.eval().requires_grad_(False)


def check_vocabulary(ours: Any, theirs: Any, name: str) -> None:
    """Raise TrainingError where two tokenizers do not have the same tokens under the same numbers."""
    here, there = ours.get_vocab(), theirs.get_vocab()
    if here == there:
        return
    odd = sorted((token for token in here | there if here.get(token) != there.get(token)), key=str)
    raise TrainingError(
        f"loss.teacher: {name} has another vocabulary than the recipe's base, and distributions over other tokens "
        f"cannot be compared. {len(odd):,} tokens differ, such as:\n"
        + numbered(
            [f"{token!r}: {here.get(token, 'none')} here, {there.get(token, 'none')} there" for token in odd[:3]]
        )
        + "\nTake a teacher of the same family; or let it write answers, and imitate those (loss: supervised)",
        code="teacher-vocabulary-differs",
    )


@contextmanager
def referring(model: Any, adapter: str | None) -> Iterator[Any]:
    """Inside, the model is its reference: its base, or with the adapter on that was added."""
    for host in hosts(model).values() if adapter else ():
        if REFERENCE in host.deltas:
            host.deltas[REFERENCE].eval()
    with deltas_only(model, *([REFERENCE] if adapter else [])):
        yield model


def teaching(model: Any, teacher: str | None) -> AbstractContextManager[Any]:
    """Inside, what is yielded computes as the teacher does: another model, or this one with other deltas on."""
    if teacher is not None and (other := model.__dict__.get(TEACHER)) is not None:
        return nullcontext(other)
    return referring(model, teacher)


Distance = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def comparison(model: Any, pack: Pack, teacher: str | None, distance: Distance) -> Comparison:
    """The teacher's distributions at the supervised positions of a pack: hidden states now, logits when asked."""
    with teaching(model, teacher) as other, packed_attention(other) if is_packed(model) else nullcontext():
        hidden = hidden_states(other, pack).index_select(0, pack.hidden_rows)

    @torch.no_grad()
    def of(rows: slice) -> Tensor:
        with teaching(model, teacher) as other:
            return logits(other, hidden[rows])

    return Comparison(of, distance)


def adapters_compared_with(config: Any) -> list[str]:
    """The digests of the adapters that a loss compares the policy with."""
    folders = [getattr(config, key, None) for key in ("reference", "teacher", "teacher_adapter")]
    return [sha256_of(Path(each).expanduser() / WEIGHTS) for each in folders if each and is_adapter(each)]
