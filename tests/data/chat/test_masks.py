"""Roles -> loss weights, against sequences written by hand."""

import numpy as np
import pytest

from graftlm.data.chat.masks import MASKS, weights
from graftlm.data.chat.roles import Rendered, Role

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
    "last-turn": [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
    "no-boilerplate": [0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0],
    "everything": [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
}


def rendered(roles: list[Role]) -> Rendered:
    return Rendered(
        ids=np.zeros(len(roles), np.int32),
        roles=np.array(roles, np.uint8),
        text="",
        turns=np.array([ROLES.index(role) for role in roles], np.int32) // 5,
        row_weights=np.full(len(roles), np.nan, np.float32),
    )


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


TWO_TURNS = Rendered(
    ids=np.zeros(8, np.int32),
    roles=np.array([Role.SPECIAL, Role.USER, Role.ASSISTANT, Role.END_OF_TURN] * 2, np.uint8),
    text="",
    turns=np.array([0, 0, 1, 1, 2, 2, 3, 3], np.int32),
    row_weights=np.full(8, np.nan, np.float32),
)


def test_of_several_answers_the_last_turn_trains_the_last_alone() -> None:
    assert weights(TWO_TURNS, "response").tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert weights(TWO_TURNS, "last-turn").tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_what_the_mask_leaves_out_may_have_the_prompts_weight() -> None:
    assert weights(TWO_TURNS, "response", 0.25).tolist() == [0, 0.25, 1, 1, 0.25, 0.25, 1, 1]
    assert weights(TWO_TURNS, "last-turn", 0.5).tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 1]


def test_what_the_row_says_stands_before_mask_and_prompt_weight() -> None:
    row_weights = np.array([9, 2, 0, np.nan, np.nan, np.nan, 0.5, np.nan], np.float32)
    assert weights(TWO_TURNS._replace(row_weights=row_weights), "response", 0.25).tolist() == [
        0,
        2,
        0,
        1,
        0.25,
        0.25,
        0.5,
        1,
    ]


@pytest.mark.parametrize("mask", MASKS)
def test_what_another_row_trains_is_only_read(mask: str) -> None:
    found = weights(TWO_TURNS._replace(first=2, row_weights=np.ones(8, np.float32)), mask, 1.0)
    assert found.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
