"""Many rendered rows as columns: their tokens lie end to end, which is quick to send, to keep and to count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graftlm.data.chat.masks import weights
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.source import DataConfig, Row
from graftlm.errors import DataError

LOST_THOUGHTS, LOST_TOOLS, MOVED_SYSTEM, UNREAD_VARIABLES = 1, 2, 4, 8


@dataclass(frozen=True)
class Columns:
    """Pieces are what rows are rendered to, usually one each, and none for a row with a problem. Of a row in several
    pieces those without a weight are left out. T tokens, P pieces."""

    ids: NDArray[np.int32]
    """[T]"""
    roles: NDArray[np.uint8]
    """[T]"""
    weights: NDArray[np.float32]
    """[T], of the whole row: nothing is cut at a length."""
    ends: NDArray[np.int64]
    """[P]: where each piece ends among the tokens."""
    rows: NDArray[np.int64]
    """[P]: the number of the row that each piece is of, from 0."""
    control: NDArray[np.bool_]
    """[rows]: whether the row's own text holds a control token of the tokenizer."""
    lost: NDArray[np.uint8]
    """[rows]: what the template does not write or read of a row, the sum of LOST_THOUGHTS, LOST_TOOLS, MOVED_SYSTEM and
    UNREAD_VARIABLES."""
    problems: dict[int, str]
    """Why a row cannot be rendered, by its number."""

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])[: len(self.ends)]


def render(rows: Sequence[Row], renderer: Renderer, data: DataConfig) -> Columns:
    """The columns of these rows; a row that cannot be rendered is among their problems."""
    ids, roles, all_weights, numbers = [], [], [], []
    problems: dict[int, str] = {}
    lost = np.zeros(len(rows), np.uint8)
    for number, pieces in enumerate(renderer.rows_of_all([(row.messages, row.tools, row.variables) for row in rows])):
        if isinstance(pieces, DataError):
            problems[number] = str(pieces)
            continue
        piece_weights = [weights(piece, data.mask, data.prompt_weight) for piece in pieces]
        some = any(values.any() for values in piece_weights)
        for piece, values in zip(pieces, piece_weights, strict=True):
            if some and not values.any():
                continue  # another row of the same conversation has what is to be learnt
            lost[number] |= LOST_THOUGHTS * piece.lost_thoughts | LOST_TOOLS * piece.lost_tools
            lost[number] |= MOVED_SYSTEM * piece.moved_system
            lost[number] |= UNREAD_VARIABLES * bool(renderer.unread(rows[number].variables))
            ids.append(piece.ids)
            roles.append(piece.roles)
            all_weights.append(values)
            numbers.append(number)
    return Columns(
        np.concatenate([np.empty(0, np.int32), *ids]),
        np.concatenate([np.empty(0, np.uint8), *roles]),
        np.concatenate([np.empty(0, np.float32), *all_weights]),
        np.cumsum([len(piece) for piece in ids], dtype=np.int64),
        np.array(numbers, np.int64),
        _holds_control(rows, renderer.tokenization.special_texts),
        lost,
        problems,
    )


def _holds_control(rows: Sequence[Row], special_texts: Sequence[str]) -> NDArray[np.bool_]:
    begins = {text[0] for text in special_texts if text}  # hundreds of control tokens begin with one of few characters

    def holds(content: str) -> bool:
        return any(begin in content for begin in begins) and any(text in content for text in special_texts)

    return np.array([any(holds(m.content) for m in row.messages) for row in rows], np.bool_)


def join(parts: Sequence[Columns]) -> Columns:
    """The columns of consecutive lots of rows as those of all of them."""
    tokens = np.cumsum([0, *(len(part.ids) for part in parts)])
    rows = np.cumsum([0, *(len(part.control) for part in parts)])
    return Columns(
        np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
        np.concatenate([np.empty(0, np.uint8), *(part.roles for part in parts)]),
        np.concatenate([np.empty(0, np.float32), *(part.weights for part in parts)]),
        np.concatenate([np.empty(0, np.int64), *(p.ends + n for p, n in zip(parts, tokens, strict=False))]),
        np.concatenate([np.empty(0, np.int64), *(p.rows + n for p, n in zip(parts, rows, strict=False))]),
        np.concatenate([np.empty(0, np.bool_), *(part.control for part in parts)]),
        np.concatenate([np.empty(0, np.uint8), *(part.lost for part in parts)]),
        {i + int(n): why for part, n in zip(parts, rows, strict=False) for i, why in part.problems.items()},
    )
