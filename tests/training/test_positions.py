"""Rows that are longer than the positions of their base are an error where positions are learned, a note otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest

import graftlm
from graftlm.config import build
from graftlm.errors import DataError
from graftlm.model.load import load_tokenizer
from graftlm.model.sketch import positions
from graftlm.testing import save_tiny_base, tiny_model, tiny_tokenizer
from graftlm.training.recipe import Recipe
from graftlm.training.run import prepare_data

pytestmark = pytest.mark.usefixtures("without_pictures")
MOST = 64


def base_of(folder: Path, model_type: str, **changes: Any) -> Path:
    tiny_model(model_type, max_position_embeddings=MOST, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe(base: Path, folder: Path, **data: Any) -> Recipe:
    """Ten short rows, and two of more than 64 tokens."""
    rows = [{"prompt": f"q {n}", "completion": "yes " * (4 + 30 * (n in (3, 8)))} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "base": {"name": str(base), "store": "fp32"},
        "data": {"train": str(folder / "rows.jsonl"), "held_out": 2} | data,
        "train": {"steps": 2, "batch_rows": 2},
        "report": {"answers": 2, "max_new_tokens": 8},
    }
    return build(Recipe, tree, source="test")


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gptj"])
def test_a_table_of_positions_ends(model_type: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", model_type)
    found = positions(str(base))
    assert (found.count, found.are_a_table()) == (MOST, True)
    with pytest.raises(DataError, match=f"longer than the {MOST} positions") as raised:
        graftlm.train(recipe(base, tmp_path), tmp_path / "out")
    assert "rows.jsonl:4: " in str(raised.value)
    assert f"data.max_tokens={MOST}" in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["llama", "bloom", "mpt"])
def test_computed_positions_go_on(model_type: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", model_type)
    assert not positions(str(base)).are_a_table()


def test_rows_beyond_what_a_base_was_trained_for_are_noted(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", max_position_embeddings=MOST)
    made = recipe(base, tmp_path)
    notes = prepare_data(made, load_tokenizer(made.base)).report.notes
    assert sum(int(note.split()[0]) for note in notes if f"rows are longer than the {MOST} positions" in note) == 2
    short = recipe(base, tmp_path, max_tokens=MOST)
    assert not prepare_data(short, load_tokenizer(short.base)).report.notes


def test_with_max_tokens_the_run_goes_through_and_asks_what_fits(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gpt2", n_positions=MOST)
    for over_length in ("drop", "truncate"):
        made = recipe(base, tmp_path, max_tokens=MOST, over_length=over_length, held_out=6)
        summary = graftlm.train(made, tmp_path / over_length).summary
        assert summary["train"]["steps"] == 2


def test_stretched_positions_count(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": MOST}
    base = save_tiny_base(tmp_path / "base", max_position_embeddings=MOST, rope_parameters=rope)
    assert positions(str(base)).count == 4 * MOST
