"""Whether the engine's passes are right for a model: by its structure, and then by its numbers."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from graftlm import distributed
from graftlm.generation.attention import Cache
from graftlm.generation.forward_pass import NoAttention, Piece, keys_before, pass_over
from graftlm.generation.inference_copy import inference_copy
from graftlm.model.modes import active_row, deltas_still
from graftlm.model.registry import attachment
from graftlm.model.sites import decoder_of

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""How far logits may be from the model's own, over their own spread: several times rounding."""

CHANGING_ROTATIONS = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on the longest row of a batch: a request would depend on its company."""

_known: "WeakKeyDictionary[Any, tuple[Any, int, str]]" = WeakKeyDictionary()
"""Model -> (what the answer depends on, `Attachment.version` then, the answer)"""


def why_not_ours(model: Any) -> str:
    """Why the engine cannot compute this model's answers itself; an empty text where it can.

    Two short prompts are read in one pass and answered token by token. The logits must be those of the model's own
    forward pass over each prompt alone, and those of one prompt must stay as they are when the embeddings of the other
    are NaN: a layer that carries a state from token to token, or attention of a kind of its own, shows in that.
    The answer is kept for a model as long as deltas of the same methods are on it: which tokens a delta sees follows
    from its method. Low-rank factors (`attach_factors`) act on single tokens. A reason, which may be the numbers of a
    delta, is looked for again with every delta that came or went.
    """
    record = attachment(model)
    methods = frozenset(config.method for config in record.configs.values())
    facts = methods, str(getattr(model.config, "_attn_implementation", "")), model.dtype
    known = _known.get(model)
    if known is None or known[0] != facts or (known[2] and known[1] != record.version):
        known = facts, record.version, _structure(model) or _numbers(model)
        _known[model] = known
    return known[2]


def _structure(model: Any) -> str:
    if decoder_of(model) is None:
        return "the model names no decoder"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if distributed.is_sharded(model):
        return "the base is in parts on several ranks"
    for module in model.modules():
        if getattr(module, "rope_type", None) in CHANGING_ROTATIONS:
            return f"its rotary embeddings ({module.rope_type}) depend on the longest row of a batch"
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention", "attention"}
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    return ""


@torch.no_grad()
def _numbers(model: Any) -> str:
    size = model.config.get_text_config().vocab_size
    first, second = ([(7 * n * n + 3 * n + 11) % size for n in range(*numbers)] for numbers in ((1, 10), (20, 34)))
    try:
        with deltas_still(model):
            own = [
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
                for ids in (first, second)
            ]
            found = _by_passes(model, [first, second])
            spoiled = _by_passes(model, [first, second], spoil=True)
    except NoAttention:
        return "none of its layers calls attention through transformers' interface"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model cannot do, its own `generate` may
        return f"a pass over several requests fails: {type(error).__name__}: {error}".splitlines()[0]
    errors = [_relative(b, a[-len(b) :]) for a, b in zip(own, found, strict=True)]
    worst = max(errors)
    if not worst <= TOLERANCE.get(model.dtype, 1e-3):
        return f"its logits in a pass over several requests are off by {worst:.2g} of their spread"
    changed = _relative(spoiled[0], found[0])
    if not changed <= TOLERANCE.get(model.dtype, 1e-3):
        return "tokens of one request reach another one outside of attention"
    return ""


def _by_passes(model: Any, prompts: list[list[int]], spoil: bool = False) -> list[Tensor]:
    """The logits after all but the first tokens of two prompts, read together and then answered with their own last
    tokens. With `spoil` the embeddings of the second one are NaN."""
    copy, row, steps = inference_copy(model, None).model, active_row(model), 3
    caches = [Cache(len(ids), keys_before(model, row)) for ids in prompts]
    read = [len(ids) - steps for ids in prompts]
    logits: list[list[Tensor]] = [[], []]
    for step in range(steps + 1):
        begin = [0 if step == 0 else at + step - 1 for at in read]
        pieces = [
            Piece(ids[start : at + step], start, cache, row, True)
            for ids, start, at, cache in zip(prompts, begin, read, caches, strict=True)
        ]
        own = len(pieces[0].ids)
        hook = None
        if spoil:
            hook = model.get_input_embeddings().register_forward_hook(lambda _, __, out, own=own: _spoiled(out, own))
        try:
            for kept, new in zip(logits, pass_over(copy, pieces).float(), strict=True):
                kept.append(new)
        finally:
            if hook is not None:
                hook.remove()
    return [torch.stack(rows) for rows in logits]


def _spoiled(out: Tensor, own: int) -> Tensor:
    """Embeddings [.., tokens, d] that are NaN after the first `own` tokens."""
    beside = torch.arange(out.shape[-2], device=out.device) >= own
    return out.masked_fill(beside[:, None], float("nan"))


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The difference of logits [n, V] over the spread of the wanted ones, without what all of a row have in common."""
    found, wanted = (t - t.mean(dim=-1, keepdim=True) for t in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())
