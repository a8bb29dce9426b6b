"""One pass of a model over tokens of several requests, and the logits of those whose next token is wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from graftlm.generation.attention import Cache, Part, Pass, use_pass
from graftlm.model.hosts import ModelHost
from graftlm.model.routes import Route, Row, Span, use_route
from graftlm.model.sites import CHILD
from graftlm.passes.forward import logits, require_decoder

READ_TOKENS = 64
"""Tokens whose logits are in memory together where those of a whole prompt are wanted: 40 MB of 150,000 ids."""


class NoAttention(Exception):
    """No layer of the model called `attend_to_caches`, so its tokens saw those of every request."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one request that a pass computes."""

    ids: Sequence[int]
    start: int
    """Tokens of the request before these, which its cache holds."""
    cache: Cache
    row: Row
    """The deltas that act."""
    predicts: bool
    """Whether the token after these is wanted."""
    read: Callable[[int, Tensor], None] | None = None
    """Called with a number n of tokens and the logits after the tokens from n on [at most READ_TOKENS, vocabulary], for
    all of them in order that are not before `read_from`."""
    read_from: int = 0
    """The number of the first token of the request after which the logits are read."""


def pass_over(copy: Any, pieces: Sequence[Piece]) -> Tensor:
    """The logits after each piece that `predicts` [n, vocabulary]; the caches then hold the tokens of the pieces.

    `copy` is an `inference_copy`. Pieces with the same deltas stand beside each other.
    """
    device = copy.device
    ids = torch.tensor([[token for piece in pieces for token in piece.ids]], device=device)
    positions = [piece.cache.always + piece.start + number for piece in pieces for number in range(len(piece.ids))]
    last, rows, end = [], [], 0
    for piece in pieces:
        end += len(piece.ids)
        rows.append((len(piece.ids), piece.row))
        if piece.predicts:
            last.append((end - 1, piece.row))
    parts = [Part(piece.cache, piece.start, len(piece.ids)) for piece in pieces]
    requests = Pass(parts)
    with use_pass(requests), use_route(_route(rows)):
        decoder = require_decoder(copy)
        out = decoder(input_ids=ids, position_ids=torch.tensor([positions], device=device), use_cache=False)
    if not requests.layer:
        raise NoAttention
    hidden: Tensor = out.last_hidden_state[0]
    _read(copy, pieces, hidden)
    if not last:
        return hidden[:0]
    with use_route(_route([(1, row) for _, row in last])):
        return logits(copy, hidden[torch.tensor([at for at, _ in last], device=device)])


def _read(copy: Any, pieces: Sequence[Piece], hidden: Tensor) -> None:
    """Give the logits of pieces that want all of theirs; hidden states [tokens, d]."""
    end = 0
    for piece in pieces:
        begin, end = end, end + len(piece.ids)
        if piece.read is None:
            continue
        for start in range(begin + max(0, piece.read_from - piece.start), end, READ_TOKENS):
            some = hidden[start : min(end, start + READ_TOKENS)]
            with use_route(_route([(len(some), piece.row)])):
                piece.read(piece.start + start - begin, logits(copy, some))


def _route(rows: Sequence[tuple[int, Row]]) -> Route:
    """Of (tokens, deltas) of one request after the other; those with the same deltas are one span."""
    spans, end = [], 0
    for row, some in groupby(rows, key=lambda each: tuple(each[1].items())):
        start, end = end, end + sum(tokens for tokens, _ in some)
        spans.append(Span(start, end, dict(row)))
    return Route(tuple(spans))


def keys_before(model: Any, row: Row) -> Tensor | None:
    """The keys and values that prefixes and prompts of a row put before a request [layers, 2, G, p, D]."""
    decoder = require_decoder(model)
    host = getattr(decoder, CHILD, None)
    if not isinstance(host, ModelHost):
        return None
    names = tuple(name for name, _ in host.here(row))
    if not names:
        return None
    with use_route(Route((Span(0, 1, row),))):  # a single span is all tokens, however many there are
        before = host.before_of(decoder, names)
    return before.whole() if before.length else None
