"""A packed forward pass through any causal language model: hidden states, then log-probabilities of the targets.

The model's own code runs, with two things of ours in it: attention per segment, through transformers' attention
interface, and the head for supervised positions only. `check_packing` proves on the model at hand that both are right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from graftlm.errors import TrainingError
from graftlm.model.ops import Plan, head_log_probs, linear_log_probs, rms_norm, segment_attention

SEGMENTS = "graft_segments"
AttentionInterface.register(SEGMENTS, segment_attention)


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Inside, the model attends by segments and needs a plan; outside, as it did before (generation, evaluation).

    Held over the backward pass too, where recomputation may run the forward pass again.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    for config, _ in before:
        config._attn_implementation = SEGMENTS
    norms = _norms(model)
    for norm, gain, eps in norms:
        norm.forward = partial(rms_norm, gain=gain, eps=eps)
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        for norm, _, _ in norms:
            del norm.forward


def _norms(model: Any) -> list[tuple[Any, Tensor, float]]:
    """The modules that compute `rms_norm` of some gain, found by what they do: (module, gain, eps).

    A candidate is asked for the norm of rows so small that eps matters. Whatever differs by more than rounding, in
    either of the two ways that a gain is stored, keeps its own code.
    """
    found = getattr(model, "graft_norms", None)
    if found is None:
        found = [norm for module in model.modules() if (norm := _as_rms_norm(module)) is not None]
        model.graft_norms = found
    return found


@torch.no_grad()
def _as_rms_norm(module: Any) -> tuple[Any, Tensor, float] | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or weight.requires_grad:
        return None
    probe = torch.linspace(-1, 1, 4 * len(weight), device=weight.device).view(4, -1).sin() * eps**0.5
    probe = probe.to(weight.dtype)
    try:
        wanted = module(probe).float()
    except (TypeError, RuntimeError):
        return None
    for gain in (weight, 1 + weight):
        error = (rms_norm(probe, gain, eps).float() - wanted).abs().max() / wanted.abs().max()
        if error <= 4 * torch.finfo(weight.dtype).eps:
            return module, gain, eps
    return None


def log_probs(
    model: Any, ids: Tensor, positions: Tensor, lengths: Sequence[int], hidden_rows: Tensor, targets: Tensor
) -> Tensor:
    """log p(targets[i]) predicted from token `hidden_rows[i]`, in nats, float32 [S].

    ids and positions [1, T]; `lengths` of the segments, which sum to T. A single segment needs no packed attention;
    several must be run inside `packed_attention(model)`.
    """
    plan = {"plan": Plan(list(lengths))} if len(lengths) > 1 or _is_packed(model) else {}
    backbone = model.get_decoder()
    hidden = backbone(input_ids=ids, position_ids=positions, use_cache=False, **plan).last_hidden_state
    return head(model, hidden[0].index_select(0, hidden_rows), targets)


def head(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p(targets), float32 [S], from the last hidden states [S, d], without a [S, vocabulary] tensor."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is None and type(layer) is nn.Linear:
        return linear_log_probs(hidden, layer.weight, layer.bias, targets)

    def logits(h: Tensor) -> Tensor:
        out: Tensor = layer(h)
        return out if softcap is None else softcap * torch.tanh(out / softcap)

    return head_log_probs(logits, hidden, targets, config.vocab_size)


def _is_packed(model: Any) -> bool:
    return bool(model.config._attn_implementation == SEGMENTS)


PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Nats, for the mean difference of a row's log-probabilities: several times what rounding does, far below a leak."""


@torch.no_grad()
def check_packing(model: Any, rows: Sequence[Tensor]) -> None:
    """Prove on two rows of ids that packing them changes nothing; raise TrainingError with the remedy if it does.

    The reference is the model's own full forward pass on each row alone. It finds architectures that ignore the
    attention interface, layers that carry a state from row to row, and heads that scale their logits.
    """
    lengths = [len(r) for r in rows]
    positions = torch.cat([torch.arange(n) for n in lengths]).to(rows[0].device)[None]
    targets = torch.cat([r[1:] for r in rows])
    kept = torch.ones(sum(lengths), dtype=torch.bool)
    kept[torch.tensor(lengths).cumsum(0) - 1] = False
    hidden_rows = kept.nonzero()[:, 0].to(rows[0].device)
    name = type(model).__name__
    remedy = "Set `data: {pack: false}` to run one row at a time"
    try:
        with packed_attention(model):
            packed = log_probs(model, torch.cat(list(rows))[None], positions, lengths, hidden_rows, targets)
    except (KeyError, TypeError, NotImplementedError) as error:
        raise TrainingError(f"{name} cannot be packed ({type(error).__name__}: {error}). {remedy}") from None
    alone = []
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        alone.append(logits.log_softmax(-1).gather(1, row[1:, None])[:, 0])
    difference = float((packed - torch.cat(alone)).abs().mean())
    tolerance = PACKING_TOLERANCE.get(next(model.parameters()).dtype, 1e-3)
    if not difference <= tolerance:
        raise TrainingError(
            f"{name} cannot be packed: two rows laid end to end differ from the same rows alone by {difference:.3g} "
            f"nats "
            f"a token (at most {tolerance:g} is rounding), so one row leaks into the next. {remedy}"
        )
