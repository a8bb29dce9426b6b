"""A conversation as training sees it: its text, its tokens, and which of them are trained."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.data.batches.pack import Example
from graftlm.data.chat.masks import MASKS, weights
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.roles import Role
from graftlm.data.chat.turn_order import TurnOrder
from graftlm.data.sources.formats import Conversation, Fields, Message, RowError
from graftlm.data.sources.formats import messages as read_messages
from graftlm.data.sources.messages import read_tools
from graftlm.data.sources.read_row import read_row
from graftlm.data.sources.source import Row
from graftlm.errors import DataError, nearest

PLACE = "conversation"
"""What `where` of a conversation is that comes from no file."""


@dataclass(frozen=True, kw_only=True)
class RenderedRow(Example):
    """A row of n tokens as training sees it: an Example (ids int32 [n], weights float32 [n], its place), and its text.

    The weight of a token is its factor in the loss: 0 where it is only read.
    """

    text: str
    """What the chat template wrote."""
    tokens: tuple[str, ...]
    """The text of each token, n of them."""
    roles: tuple[str, ...]
    """What each token is part of, n of them: special, boilerplate, system, user, assistant, tool or end-of-turn."""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each run of trained tokens: no weight of `ids[start:end]` is 0, those beside it are."""
        is_trained = [False, *(self.weights != 0).tolist(), False]
        edges = [i for i in range(len(is_trained) - 1) if is_trained[i] != is_trained[i + 1]]
        return tuple(zip(edges[::2], edges[1::2], strict=True))

    @property
    def trained(self) -> tuple[str, ...]:
        """The text of each of `spans`."""
        return tuple("".join(self.tokens[start:end]) for start, end in self.spans)


def render(
    conversation: Row | Sequence[Message | Mapping[str, Any]],
    tokenizer: Any,
    *,
    tools: Sequence[Fields] | None = None,
    mask: str = "response",
    prompt_weight: float = 0.0,
    turn_order: TurnOrder = "refuse",
    today: datetime.date | None = None,
) -> list[RenderedRow]:
    """Show how the tokenizer's chat template renders a conversation, and which tokens are trained.

    `conversation` is a list of messages, `{"role": ..., "content": ...}` as OpenAI has them, or a Row of `load_rows`,
    which has its own tools. `mask` and `prompt_weight` are those of `data` in a recipe, and so is `turn_order`; `today`
    is the day for templates that write the date (default: the present day).

    Returns one RenderedRow, or one for every answer where the template changes earlier turns when more is said. They
    are the examples that training has of this conversation, whatever its length. Raises DataError for messages that
    cannot be read and for those that the template refuses or rewrites, BaseModelError for a tokenizer without a chat
    template, ValueError for a mask that does not exist, and for `tools` beside a Row.
    """
    if mask not in MASKS:
        raise ValueError(f"mask: {mask!r} is unknown. {nearest(mask, MASKS)}")
    if isinstance(conversation, Row):
        if tools is not None:
            raise ValueError("tools: a Row has its own")
        row = conversation
    else:
        row = _read(conversation, tools or (), turn_order)
    renderer = Renderer(tokenizer, turn_order=turn_order, today=today)
    return rendered_rows(row, renderer, mask=mask, prompt_weight=prompt_weight)


def rendered_rows(row: Row, renderer: Renderer, *, mask: str, prompt_weight: float) -> list[RenderedRow]:
    """The rows of n tokens that training has of this conversation; raises the DataError of `Renderer.rows`."""
    found = []
    for piece in renderer.rows(row.messages, row.tools, row.variables):
        own = weights(piece, mask, prompt_weight)
        tokens = tuple(renderer.token_texts(piece.ids.tolist()))
        roles = tuple(Role(role).label for role in piece.roles.tolist())
        found.append(RenderedRow(piece.ids, own, row.where, text=piece.text, tokens=tokens, roles=roles))
    return found


def _read(conversation: Sequence[Message | Mapping[str, Any]], tools: Sequence[Fields], turn_order: TurnOrder) -> Row:
    """The conversation as a row of a file would be read."""
    if isinstance(conversation, str | Mapping):
        raise DataError(f"{PLACE}: give a list of messages, this is {conversation!r:.60}", code="unusable-conversation")
    own = [message for message in conversation if isinstance(message, Message)]
    fields: dict[str, Any] = {"messages": list(conversation), **({"tools": list(tools)} if tools else {})}
    try:
        whole = bool(own) and len(own) == len(conversation)
        content = Conversation(own, read_tools(fields)) if whole else read_messages(fields)
        return read_row(content, PLACE, fields, None, turn_order)[0]
    except RowError as error:
        raise DataError(f"{PLACE}: {error}", code="unusable-conversation") from None
