"""MASKS: roles -> loss weights. A mask is the set of roles that are trained, with weight 1; everything else has 0.

| mode           | trained                                                           |
|----------------|-------------------------------------------------------------------|
| response       | the answers, and what ends them                                   |
| last-turn      | the last answer of a conversation, and what ends it               |
| instruction    | all messages' text and what ends the answers (1)                  |
| no-boilerplate | every token but the text that the template writes by itself (2)   |
| everything     | every token                                                       |

A conversation that the template splits into rows has its last answer in the last of them.

(1) "Instruction modelling", Shi et al. 2024, arXiv:2405.14394: no special tokens, no role tokens.
(2) Control tokens between messages are trained, role names and a system message that nobody wrote are not.

Where the mask gives 0 a token may have the prompt's weight instead. What the row itself says of a message or a span
stands before both.
"""

import numpy as np
from numpy.typing import NDArray

from graftlm.data.chat.roles import Rendered, Role

MASKS: dict[str, frozenset[Role]] = {
    "response": frozenset({Role.ASSISTANT, Role.END_OF_TURN}),
    "instruction": frozenset({Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL, Role.END_OF_TURN}),
    "last-turn": frozenset({Role.ASSISTANT, Role.END_OF_TURN}),
    "no-boilerplate": frozenset(Role) - {Role.BOILERPLATE},
    "everything": frozenset(Role),
}

_TRAINED = {name: np.array([role in roles for role in Role]) for name, roles in MASKS.items()}


def weights(rendered: Rendered, mask: str, prompt_weight: float = 0.0) -> NDArray[np.float32]:
    """The weight of every token in the loss: float32 [n]. The first token of a row has no prediction: always 0."""
    is_trained = _TRAINED[mask][rendered.roles]
    if mask == "last-turn":
        last = -1 if rendered.more else rendered.turns[is_trained].max(initial=-1)
        is_trained &= rendered.turns == last
    found = is_trained.astype(np.float32)
    if prompt_weight:
        found[~is_trained] = prompt_weight
    has_weight = ~np.isnan(rendered.row_weights)
    if has_weight.any():
        found[has_weight] = rendered.row_weights[has_weight]
    if rendered.first:  # each answer is trained once
        found[rendered.turns < rendered.first] = 0
    found[:1] = 0
    return found
