"""Searches: by words, by embeddings of example rows, and by the loss, which is that of each adapter alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import DataConfig
from graftlm.evaluation.held_out import held_out_loss
from graftlm.library.entry import Entry
from graftlm.library.library import add, read_library
from graftlm.library.search import EXAMPLES_KEPT, by_rows, by_words, example_rows, nearest_first
from graftlm.model.attach import detach
from graftlm.testing import tiny_model, tiny_tokenizer
from graftlm.testing.deltas import perturbed
from tests.errors import raises

OTHER = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
TASKS = {"numbers": "7 12 981 40 5", "shouting": "WHY IS IT LATE", "system": "a system tells the user"}


def file_of(folder: Path, name: str, texts: Sequence[str]) -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "completion": f"{text}!"}) + "\n" for text in texts))
    return file


def entry(description: str | None) -> Entry:
    known: dict[str, Any] = {"sites": 1, "ranks": (1,), "bytes": 1, "examples": 0, "files": {}, "targets": ()}
    return Entry(base=None, base_fingerprint=None, method="lora", description=description, **known)


def test_words_of_name_and_description_count_once_in_any_case() -> None:
    entries = {
        "sql-writer": entry("Turns questions into SQL queries."),
        "soup_cook": entry("Recipes, soup above all."),
        "bare": entry(None),
        "other": entry("questions about soup"),
    }
    found = by_words(entries, "Questions about SQL")
    assert [(each.name, each.value) for each in found] == [("other", 2 / 3), ("sql-writer", 2 / 3)]
    assert [each.name for each in by_words(entries, "soup")] == ["other", "soup_cook"]
    assert by_words(entries, "!") == []
    assert by_words(dict(reversed(entries.items())), "Questions about SQL") == found


def test_the_nearest_is_the_one_in_the_same_direction_from_the_middle() -> None:
    y = np.array([[101.0, 0.0], [100.0, 1.0], [99.0, -1.0]])
    c = y.mean(0)
    found = nearest_first(c + [0.5, 0.0], y)
    wanted = [float((each - c)[0] / np.linalg.norm(each - c)) for each in y]
    np.testing.assert_allclose(found, wanted)
    np.testing.assert_allclose(nearest_first(np.array([1.0, 1.0]), np.array([[2.0, 0.0]])), [0.5**0.5])


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters with example rows of three kinds; two of them are no LoRA, one has a template of its own."""
    folder = tmp_path_factory.mktemp("library")
    for (name, text), method in zip(TASKS.items(), ("lora", "ia3", "lora"), strict=True):
        model = perturbed(method, tiny_model(), seed=len(name))
        save_adapter(model, folder / "made" / name, tokenizer=tiny_tokenizer(OTHER) if name == "system" else None)
        examples = file_of(folder, f"{name}-examples", [f"{text} {n}" for n in range(4)])
        add(folder / "shelf", folder / "made" / name, examples=example_rows(examples))
    return folder / "shelf"


def test_rows_find_the_adapter_whose_examples_are_like_them(shelf: Path, tmp_path: Path) -> None:
    library, model, tokenizer = read_library(shelf), tiny_model(), tiny_tokenizer()
    assert {entry.examples for entry in library.entries.values()} == {4}
    for name, text in TASKS.items():
        made = by_rows(library, file_of(tmp_path, name, [f"{text} {n}" for n in range(7, 10)]), model, tokenizer)
        assert made.by == "embedding"
        assert made.found[0].name == name
        assert made.found[0].value > 0.9
        assert made.rows == 3


def test_the_loss_of_each_adapter_is_that_of_the_model_with_it_alone(shelf: Path, tmp_path: Path) -> None:
    library, rows = read_library(shelf), file_of(tmp_path, "rows", ["how are you", "one line", "late?"])
    seen: list[tuple[int, int]] = []
    model, tokenizer = tiny_model(), tiny_tokenizer()
    made = by_rows(library, rows, model, tokenizer, by="loss", progress=lambda *done: seen.append(done))
    assert seen[-1] == (3, 3)
    assert made.left_out == {}
    wanted = {None: alone(model, rows, tokenizer, None)}
    for name in TASKS:
        load_adapter(model, shelf / name)
        wanted[name] = alone(model, rows, tokenizer, OTHER if name == "system" else None)
        detach(model)
    assert made.base_loss == pytest.approx(wanted.pop(None), rel=1e-5)
    assert {each.name: each.value for each in made.found} == pytest.approx(wanted, rel=1e-5)
    assert [each.name for each in made.found] == sorted(wanted, key=wanted.__getitem__)
    assert len({round(each.value, 3) for each in made.found}) == 3


def alone(model: Any, rows: Path, tokenizer: Any, template: str | None) -> float:
    renderer, data = Renderer(tokenizer, template), DataConfig(train="")
    examples, _ = prepare(load_rows(str(rows))[0], renderer, data)
    return held_out_loss(model, examples, pack_tokens=512, packed=False)


def test_without_examples_of_every_adapter_the_loss_decides(shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shelf"
    add(folder, shelf / "numbers")
    rows = file_of(tmp_path, "rows", ["how are you"])
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert by_rows(read_library(folder), rows, model, tokenizer).by == "loss"
    with raises("adapter/no-example-rows", match="--examples"):
        by_rows(read_library(folder), rows, model, tokenizer, by="embedding")
    add(folder, shelf / "shouting", examples=example_rows(rows))
    made = by_rows(read_library(folder), rows, model, tokenizer, by="embedding")
    assert [each.name for each in made.found] == ["shouting"]
    assert list(made.left_out) == ["numbers"]


def test_an_adapter_of_another_base_is_left_out_of_a_search_by_loss(shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shelf"
    add(folder, shelf / "numbers")
    model = perturbed("lora", tiny_model(seed=3))
    save_adapter(model, tmp_path / "other")
    add(folder, tmp_path / "other", several_bases=True)
    made = by_rows(read_library(folder), file_of(tmp_path, "rows", ["how"]), tiny_model(), tiny_tokenizer())
    assert [each.name for each in made.found] == ["numbers"]
    assert "was trained on" in made.left_out["other"]


def test_an_adapter_that_cannot_be_asked_is_left_out_of_a_search_by_loss(shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shelf"
    add(folder, shelf / "numbers")
    save_adapter(perturbed("lora", tiny_model()), tmp_path / "mute", tokenizer=tiny_tokenizer(None))
    add(folder, tmp_path / "mute")
    made = by_rows(read_library(folder), file_of(tmp_path, "rows", ["how"]), tiny_model(), tiny_tokenizer())
    assert [each.name for each in made.found] == ["numbers"]
    assert "no chat template" in made.left_out["mute"]


def test_examples_are_the_first_rows(tmp_path: Path) -> None:
    file = file_of(tmp_path, "rows", [f"row {n}" for n in range(EXAMPLES_KEPT + 5)])
    found = example_rows(file)
    assert len(found) == EXAMPLES_KEPT
    assert found[0]["messages"][0]["content"] == "row 0"
