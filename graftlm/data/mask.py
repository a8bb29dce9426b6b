"""MASKS: roles -> loss weights. A mask is the set of roles that are trained, with weight 1; everything else has 0.

| mode        | trained                                                    |
|-------------|------------------------------------------------------------|
| response    | the answers, and what ends them                            |
| instruction | all messages' text and what ends the answers (1)           |
| everything  | every token                                                |

(1) "Instruction modelling", Shi et al. 2024, arXiv:2405.14394: no special tokens, no role tokens.
"""

import numpy as np
from numpy.typing import NDArray

from graftlm.data.render import Rendered, Role

MASKS: dict[str, frozenset[Role]] = {
    "response": frozenset({Role.ASSISTANT, Role.END_OF_TURN}),
    "instruction": frozenset({Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL, Role.END_OF_TURN}),
    "everything": frozenset(Role),
}


def weights(rendered: Rendered, mask: str) -> NDArray[np.float32]:
    """The weight of every token in the loss: float32 [n]. The first token of a row has no prediction: always 0."""
    trained = np.isin(rendered.roles, [int(role) for role in MASKS[mask]]).astype(np.float32)
    trained[:1] = 0
    return trained
