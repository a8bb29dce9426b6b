"""Rows that are longer than the positions of their base are an error where positions are learned, a note otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest

import graftlm
from graftlm.config.schema import build, to_tree
from graftlm.hub.sketch import positions
from graftlm.hub.tokenizer import load_tokenizer
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.testing import save_tiny_base, tiny_model, tiny_tokenizer
from tests.errors import raises

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
        "base": {"name": str(base), "dtype": "float32"},
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
    with raises("data/beyond-learned-positions", match=f"the {MOST} positions") as raised:
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


LEARNT = {"by": "perplexity", "keep": 4}


@pytest.mark.parametrize("select", [[LEARNT], [{"by": "judge", "keep": 4}], [{"by": "rds", "keep": 4}]])
def test_rows_beyond_a_table_are_refused_before_a_selector_runs_the_base(
    select: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tmp_path / "base", "gpt2", n_positions=MOST)
    (tmp_path / "target.jsonl").write_text('{"prompt": "q", "completion": "yes"}\n')
    select = [each | ({"target": str(tmp_path / "target.jsonl")} if each["by"] == "rds" else {}) for each in select]
    made = build(Recipe, to_tree(recipe(base, tmp_path)) | {"select": select}, source="test")
    loaded: list[Any] = []
    monkeypatch.setattr("graftlm.selection.choose.load_base", lambda *a, **k: loaded.append(a))
    with raises("data/beyond-learned-positions", match=f"the {MOST} positions") as raised:
        prepare_data(made, load_tokenizer(made.base))
    assert not loaded
    assert "rows.jsonl:" in str(raised.value)


def test_rows_of_a_target_must_fit_too(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gpt2", n_positions=MOST)
    (tmp_path / "target.jsonl").write_text(json.dumps({"prompt": "q", "completion": "yes " * 40}) + "\n")
    select = [{"by": "length", "most": 20}, {"by": "rds", "keep": 4, "target": str(tmp_path / "target.jsonl")}]
    made = build(Recipe, to_tree(recipe(base, tmp_path)) | {"select": select}, source="test")
    with raises("data/beyond-learned-positions", match=f"rows of the target .* the {MOST} positions"):
        prepare_data(made, load_tokenizer(made.base))


def test_a_selector_may_leave_out_what_does_not_fit(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gpt2", n_positions=MOST)
    select = [{"by": "length", "most": 20}, LEARNT]
    made = build(Recipe, to_tree(recipe(base, tmp_path, held_out=0)) | {"select": select}, source="test")
    assert len(prepare_data(made, load_tokenizer(made.base)).rows) == 4
