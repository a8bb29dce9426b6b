"""A sample of the matrix of architectures: each cell is right, or a refusal with a reason."""

import pytest

from tests.architectures import COLUMNS, NAMES, NOT_BUILT, answer

SAMPLE = (
    *(
        "llama",
        "gpt2",
        "gemma2",
        "phi3",
        "olmo2",
        "stablelm",
        "mpt",
        "gpt_oss",
        "mixtral",
        "qwen2_moe",
        "doge",
        "bamba",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_every_cell_of_a_sample_is_right_or_refused(name: str) -> None:
    cells = {column: answer(column, name) for column in COLUMNS}
    assert not {column: cell for column, cell in cells.items() if cell["verdict"] in ("wrong", "crash")}
    assert sum(cell["verdict"] == "ok" for cell in cells.values()) >= 6


@pytest.mark.long(group="architectures")
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_right_or_refused(name: str) -> None:
    cells = {column: answer(column, name) for column in COLUMNS}
    assert not {column: cell for column, cell in cells.items() if cell["verdict"] in ("wrong", "crash")}


def test_the_matrix_is_of_nearly_all_classes() -> None:
    assert len(NAMES) >= 160
    assert all(reason for reason in NOT_BUILT.values())
