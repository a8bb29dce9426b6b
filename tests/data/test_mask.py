"""Roles -> loss weights, against sequences written by hand."""

import numpy as np
import pytest

from graftlm.data.mask import MASKS, weights
from graftlm.data.render import Rendered, Role

ROLES = [
    Role.SPECIAL,
    Role.BOILERPLATE,
    Role.SYSTEM,
    Role.SPECIAL,
    Role.USER,
    Role.TOOL,
    Role.BOILERPLATE,
    Role.ASSISTANT,
    Role.ASSISTANT,
    Role.END_OF_TURN,
    Role.BOILERPLATE,
]
BY_HAND = {
    "response": [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
    "instruction": [0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0],
    "everything": [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
}


def rendered(roles: list[Role]) -> Rendered:
    return Rendered(np.zeros(len(roles), np.int32), np.array(roles, np.uint8), "")


def test_every_mask_has_a_sequence_written_by_hand() -> None:
    assert BY_HAND.keys() == MASKS.keys()


@pytest.mark.parametrize("mask", BY_HAND)
def test_a_mask_weighs_the_roles_that_its_line_in_the_table_names(mask: str) -> None:
    found = weights(rendered(ROLES), mask)
    assert found.dtype == np.float32
    assert found.tolist() == BY_HAND[mask]


@pytest.mark.parametrize("mask", MASKS)
def test_the_first_token_has_no_prediction_and_no_weight(mask: str) -> None:
    assert weights(rendered([Role.ASSISTANT, Role.ASSISTANT]), mask).tolist() == [0, 1]
    assert weights(rendered([]), mask).tolist() == []
