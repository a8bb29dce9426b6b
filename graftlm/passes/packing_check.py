"""The proof, on the model at hand, that it computes what training assumes: before anything is trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.data.batches.pack import Example, Group
from graftlm.errors import TrainingError
from graftlm.kernels.backend import TORCH, Backend
from graftlm.passes.first_layers import first_layers_in_float32
from graftlm.passes.forward import head, hidden_states, log_probs, require_decoder
from graftlm.passes.packed_attention import packed_attention

PROBE_TOKENS = 32
"""The whole model is proved on the last so many tokens of a row: a head or a layer that does something of its own does
it to every token, and rounding does not grow with fewer (0.06 nats a token in bf16 for 16 tokens as for 128)."""

LONG_TOKENS = 2048
"""The first layers are proved on whole rows, up to so many of their last tokens: chunks, windows and sparse attention
begin somewhere."""

PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Nats, for the mean difference of log-probabilities between two right ways to compute them: several times rounding."""

FLOAT32_TOLERANCE = 1e-4
"""The same for hidden states after the first layers in float32, over their mean size."""


@dataclass(frozen=True)
class _PackedRow:
    """A row as `log_probs` takes it, alone or in a pack."""

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    parents: list[int]
    hidden_rows: Tensor
    targets: Tensor
    beside: Tensor
    """[T]: whether a token is one of the row's neighbors."""
    last: Tensor
    """[T]: whether it is the last one of the row, of which no other token of it knows."""

    @classmethod
    def of(cls, row: Tensor, neighbor: Tensor | None = None, shared: int = 0, *, start: int = 0) -> "_PackedRow":
        """A row, between a neighbor and the same once more, if there is one; with `shared`, the row a second time, now
        with its first `shared` tokens in common with a neighbor. The first segment begins at position `start`."""
        segments, of_the_row = [(row, start, -1)], [[0]]
        if neighbor is not None:
            segments, of_the_row = [(neighbor, start, -1), (row, 0, -1)], [[1]]
            if shared:
                root = len(segments)
                segments += [(row[:shared], 0, -1), (neighbor, shared, root), (row[shared:], shared, root)]
                of_the_row.append([root, root + 2])
            segments.append((neighbor, 0, -1))
        lengths = [len(ids) for ids, _, _ in segments]
        places = torch.arange(sum(lengths), device=row.device).split(lengths)
        own = [torch.cat([places[n] for n in parts]) for parts in of_the_row]
        beside = torch.ones(sum(lengths), dtype=torch.bool, device=row.device)
        beside[torch.cat(own)] = False
        last = torch.zeros_like(beside)
        last[torch.stack([part[-1] for part in own])] = True
        return cls(
            ids=torch.cat([ids for ids, _, _ in segments])[None],
            positions=torch.cat([torch.arange(a, a + len(ids), device=row.device) for ids, a, _ in segments])[None],
            lengths=lengths,
            parents=[parent for _, _, parent in segments],
            hidden_rows=torch.cat([part[:-1] for part in own]),
            targets=row[1:].repeat(len(of_the_row)),
            beside=beside,
            last=last,
        )

    def changed(self, tokens: Tensor, vocabulary: int) -> "_PackedRow":
        """The same with another id at each of these tokens [T]."""
        return replace(self, ids=torch.where(tokens, (self.ids + 1) % vocabulary, self.ids))


@contextmanager
def _not_a_number(model: Any, tokens: Tensor) -> Iterator[None]:
    """Inside, the embeddings of these tokens [T] of a pack are NaN: whatever takes in some of them, however little of
    it, becomes NaN too."""

    def spoil(layer: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        return out.masked_fill(tokens[:, None], float("nan")) if out.shape[-2] == len(tokens) else out

    hook = model.get_input_embeddings().register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def check_packing(
    model: Any, items: Sequence[Example | Group], *, packed: bool = True, sharing: bool = True, backend: Backend = TORCH
) -> None:
    """Prove on the rows of a run that the head, packed attention and shared beginnings give the model's own numbers.

    `items` are rows of two tokens at least (`graftlm.render` makes some); the shortest and the longest of them are
    used: what changes with a row's length shows between these. `packed=False` checks the head alone (`data.pack`),
    `sharing` checks shared beginnings too (`train.prefix_sharing`). Another backend is proved after TORCH was: by the
    whole model in packs, as the rest does not go through it. Returns nothing. Raises TrainingError with the remedy
    where the numbers differ by more than rounding, and ValueError without rows.
    """
    if not items:
        raise ValueError("items: there is no row to check")
    examples = [answer for item in items for answer in item.answers]
    short, long = (
        torch.from_numpy(example.ids.astype("int64")).to(model.device)
        for example in (min(examples, key=len), max(examples, key=len))
    )
    if backend is TORCH:
        check_forward(model, long[-PROBE_TOKENS:])
    if packed:
        check_packed_rows(model, short, long, sharing=sharing, longest=len(long), backend=backend)


@torch.no_grad()
def check_forward(model: Any, row: Tensor) -> None:
    """Prove on a row of ids, of two tokens at least, that `log_probs` says what the model itself says of it.

    This finds heads that do to their logits what `head` does not know, and models that see what comes after a token.
    Raises TrainingError.
    """
    name = type(model).__name__
    outputs: list[Tensor] = []
    hook = require_decoder(model).register_forward_hook(lambda module, inputs, out: outputs.append(out[0][0]))
    try:
        own = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise TrainingError(
            f"{name} cannot be trained: its own forward pass of a row fails ({what})", code="forward-pass-fails"
        ) from error
    finally:
        hook.remove()
    reference = _of_targets(own, row)
    if not reference.isfinite().all():
        raise TrainingError(
            f"{name} cannot be trained: its own log-probabilities are not finite. Look at its weights and its dtype",
            code="base-not-finite",
        )
    # Of the very same hidden states the head may differ by roundings of the logits, and by no more.
    of_the_head = 8 * torch.finfo(_dtype(model)).eps * max(1.0, float(own.abs().max()))
    try:
        both = head(model, outputs[0][:-1], row[1:]), log_probs(model, _PackedRow.of(row))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise TrainingError(
            f"{name} cannot be trained: its output layer does not take its last hidden states, or its decoder not the "
            f"positions of tokens ({what})",
            code="unsupported-model",
        ) from error
    for found, tolerance in zip(both, (of_the_head, PACKING_TOLERANCE.get(_dtype(model), 1e-3)), strict=True):
        difference = float((found - reference).abs().mean())
        if not difference <= tolerance:
            raise TrainingError(
                f"{name} cannot be trained: log-probabilities from its last hidden states and its output layer differ "
                f"from its own by {difference:.3g} nats a token (rounding is below {tolerance:.2g}). Its head does "
                "more than a product, a scale and soft-capping",
                code="unsupported-model",
            )
    with first_layers_in_float32(model) as decoder:
        before, after = (
            decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
            for ids in (row, torch.cat([row[:-1], (row[-1:] + 1) % _vocabulary(model)]))
        )
    if not _relative(after, before) <= FLOAT32_TOLERANCE:
        raise TrainingError(
            f"{name} cannot be trained to predict the next token: what it computes of a token changes with one that "
            "comes after it",
            code="model-not-causal",
        )


@torch.no_grad()
def check_packed_rows(
    model: Any,
    first: Tensor,
    second: Tensor,
    *,
    sharing: bool = False,
    longest: int | None = None,
    backend: Backend = TORCH,
) -> None:
    """Prove on two rows of ids that packing them is right; raise TrainingError with the remedy if it is not.

    The second row, of two tokens at least, must stay as it is when the tokens of the first are replaced and their
    embeddings are NaN, and all but its end when its last token is replaced: this finds architectures that ignore the
    attention interface, and layers that carry a state from row to row. And it must be what the model's own forward pass
    makes of it alone, up to rounding: this finds wrong positions. So must the first row, which lies behind it, and
    before it at the end of the `longest` row that will be packed (tokens; None: the longest that the model takes): this
    finds rotary embeddings that change with the longest row of a pack. With `sharing`, the same for two rows that have
    the first half of the second in common.

    The whole model is proved in its own dtype on the ends of the rows, and its first layers in float32 on all of them:
    these by torch's operations, so that another `backend` is proved on the whole model alone.
    """
    text = model.config.get_text_config()
    longest = max(_positions(model, first) if longest is None else longest, len(first), len(second))
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk is not None and longest > chunk:
        raise TrainingError(
            f"{type(model).__name__} cannot be packed: it attends in chunks of {chunk} tokens, and rows may have "
            f"{longest}. Set `data: {{pack: false}}` to run one row at a time, or make rows shorter",
            code="cannot-pack",
        )
    short, row = first[-PROBE_TOKENS:], second[-PROBE_TOKENS:]
    in_nats = _Criterion(
        alone=lambda row, start: _own_log_probs(model, row),
        read=lambda hidden, targets: head(model, hidden, targets),
        size=lambda reference: 1.0,
        tolerance=PACKING_TOLERANCE.get(_dtype(model), 1e-3),
        unit="nats",
    )
    _compare(model, in_nats, short, row, longest - len(short), sharing, backend, spoiled=True)
    if backend is not TORCH:
        return
    with first_layers_in_float32(model) as decoder:
        in_float32 = _Criterion(
            alone=lambda row, start: (
                hidden_states(model, _PackedRow.of(row, start=start))
                if start
                else decoder(input_ids=row[None], use_cache=False).last_hidden_state[0]
            )[:-1],
            read=lambda hidden, targets: hidden,
            size=lambda reference: float(reference.abs().mean()),
            tolerance=FLOAT32_TOLERANCE,
            unit="of its hidden states",
        )
        short, row = first[-LONG_TOKENS:], second[-LONG_TOKENS:]
        _compare(model, in_float32, short, row, longest - len(short), sharing, TORCH, spoiled=False)


def _positions(model: Any, row: Tensor) -> int:
    """How many positions the model has by its config; 0 where it says nothing, or does not take the last of them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < PROBE_TOKENS:
        return 0
    try:
        hidden_states(model, _PackedRow.of(row[-PROBE_TOKENS:], start=limit - len(row[-PROBE_TOKENS:])))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a table of fewer positions; whatever else it is, the proof meets it again and says it
        return 0
    return limit


@dataclass(frozen=True)
class _Criterion:
    """How two computations of a row are compared."""

    alone: Callable[[Tensor, int], Tensor]
    """A row and the position of its first token -> what the model's own code makes of it."""
    read: Callable[[Tensor, Tensor], Tensor]
    """Last hidden states [n, d] and the ids that follow [n] -> the same of our pass."""
    size: Callable[[Tensor], float]
    """The number that differences are divided by."""
    tolerance: float
    unit: str


def _compare(
    model: Any,
    by: _Criterion,
    first: Tensor,
    second: Tensor,
    start: int,
    sharing: bool,
    backend: Backend,
    *,
    spoiled: bool,
) -> None:
    """The second row in a pack against the row alone; then, `spoiled`, against the row beside NaN, or its neighbors
    against the same alone."""
    ways = {"packed": "data: {pack: false}` to run one row at a time"}
    if sharing:
        ways["packed with shared beginnings"] = "train: {prefix_sharing: false}` to compute the beginning of every row"
    name, shared = type(model).__name__, len(second) // 2 if sharing else 0
    reference, of_first = _alone(name, by, first, second, start, spoiled)
    pack = _PackedRow.of(second, first, shared, start=start)
    try:
        with packed_attention(model, backend):
            hidden = hidden_states(model, pack)
            found = beside_nan = by.read(hidden[pack.hidden_rows], pack.targets)
            if spoiled:
                other = pack.changed(pack.beside | pack.last, _vocabulary(model))
                with _not_a_number(model, pack.beside):
                    beside_nan = by.read(hidden_states(model, other)[pack.hidden_rows], pack.targets)
    except (torch.OutOfMemoryError, TrainingError):
        raise
    except Exception as error:
        # Shared beginnings cannot be the reason: the model's own code is told of them by nothing but positions, and
        # what segment_attention refuses it refuses whatever the segments continue.
        remedy = ways["packed"]
        raise TrainingError(
            f"{name} cannot be packed ({type(error).__name__}: {error}). Set `{remedy}", code="cannot-pack"
        ) from error
    size = by.size(reference)
    ends = [hidden[: len(first) - 1], hidden[len(hidden) - len(first) : -1]] if len(first) > 1 else []
    neighbors = [(by.read(end, first[1:]), alone) for end, alone in zip(ends, of_first, strict=False)]
    each = (t.view(len(ways), *reference.shape) for t in (found, beside_nan))
    for (how, remedy), packed, other_packed in zip(ways.items(), *each, strict=True):
        if not float((packed - other_packed).abs().mean()) / size <= by.tolerance:
            raise TrainingError(
                f"{name} cannot be {how}: {_leak(model, by, pack, found, backend)}. Set `{remedy}", code="cannot-pack"
            )
        for part, alone in ((packed, reference), *neighbors):
            difference = float((part - alone).abs().mean()) / size
            if not difference <= by.tolerance:
                why = _why(model, by, first, second, start, reference) if how == "packed" else ""
                raise TrainingError(
                    f"{name} cannot be {how}: a row in a pack differs from the same row alone by {difference:.3g} "
                    f"{by.unit} a token (rounding is below {by.tolerance:g}){why}. Set `{remedy}",
                    code="cannot-pack",
                )


def _alone(
    name: str, by: _Criterion, first: Tensor, second: Tensor, start: int, spoiled: bool
) -> tuple[Tensor, list[Tensor]]:
    """What the second row gives alone, and unless `spoiled` the first one too, at `start` and at 0."""
    try:
        return by.alone(second, 0), [] if spoiled else [by.alone(first, start), by.alone(first, 0)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what, tokens = f"{type(error).__name__}: {error}", max(start + len(first), len(second))
        raise TrainingError(
            f"{name} cannot be trained on rows of {tokens} tokens: its decoder fails on one ({what})",
            code="forward-pass-fails",
        ) from error


def _leak(model: Any, by: _Criterion, clean: _PackedRow, found: Tensor, backend: Backend) -> str:
    """What a row takes in that it should not: by how much it changes with each, in finite numbers."""
    changes = []
    for tokens in (clean.beside, clean.last):
        with packed_attention(model, backend):
            hidden = hidden_states(model, clean.changed(tokens, _vocabulary(model)))[clean.hidden_rows]
            changes.append(float((by.read(hidden, clean.targets) - found).abs().mean()) / by.size(found))
    of_neighbor, of_the_end = changes
    if of_the_end > of_neighbor:
        return f"a token changes by {of_the_end:.3g} {by.unit} with one that comes after it in its row"
    if of_neighbor > 0:
        return f"a row changes by {of_neighbor:.3g} {by.unit} with its neighbor"
    return "a row takes in numbers of its neighbor (NaN in one row became NaN in the other)"


def _why(model: Any, by: _Criterion, first: Tensor, second: Tensor, start: int, reference: Tensor) -> str:
    """The reason of a difference, where one can be named: beside a neighbor of the same length, at the usual
    positions, the row is right."""
    usual = _PackedRow.of(second, (second + 1) % _vocabulary(model))
    with packed_attention(model):
        found = by.read(hidden_states(model, usual)[usual.hidden_rows], usual.targets)
    if float((found - reference).abs().mean()) / by.size(reference) <= by.tolerance:
        longest = max(start + len(first), len(second))
        return (
            f" where a row of {longest} tokens lies in the pack: positions count otherwise in packs with long rows "
            "(longrope, dynamic)"
        )
    return ", so its positions are not the usual ones"


def _own_log_probs(model: Any, row: Tensor) -> Tensor:
    """What the model's own forward pass says of a row alone."""
    return _of_targets(model(input_ids=row[None], use_cache=False).logits[0, :-1].float(), row)


def _of_targets(logits: Tensor, row: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, row[1:, None])[:, 0]


def _relative(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).abs().mean() / reference.abs().mean())


def _vocabulary(model: Any) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _dtype(model: Any) -> torch.dtype:
    """The dtype of the weights; biases and norms may be wider."""
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype
