"""The role of each token in a rendered row."""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Role(IntEnum):
    """The part of a conversation that a token belongs to. There is no padding, so there is no role for it."""

    SPECIAL = 0  # a control token of the tokenizer outside any message's text
    BOILERPLATE = 1  # text that the template writes by itself
    SYSTEM = 2
    USER = 3
    ASSISTANT = 4  # from where generation begins an answer to the end of the answer's text
    TOOL = 5
    END_OF_TURN = 6  # what the template writes after an answer, up to the token that ends the turn

    @property
    def label(self) -> str:
        """Its name for people: `end-of-turn`."""
        return self.name.lower().replace("_", "-")


class Rendered(NamedTuple):
    """A row of n tokens, and the characters that were tokenised."""

    ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    text: str
    turns: NDArray[np.int32]
    """The index of the message that a token belongs to."""
    row_weights: NDArray[np.float32]
    """The weight that the row itself gives to a token; NaN where it leaves that to the mask."""
    first: int = 0
    """Messages before this one are trained in another row of the same conversation: here they are only read."""
    more: bool = False
    """Whether a later answer of the same conversation is trained in another row: then the last one is not here."""
    lost_thoughts: bool = False
    """Whether an answer that is trained has thoughts that the template does not write."""
    lost_tools: bool = False
    """Whether the template does not write all tools."""
    moved_system: bool = False
    """Whether the template has no place for the system message, and `turn_order` says where it went. Messages are then
    counted without it."""
