"""A pool of rows over a tiny base, and where its scores are kept: in a folder of the test."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.data.sources.source import DataConfig, Row
from graftlm.selection.base import Pool, examples_of
from graftlm.testing import tiny_model, tiny_tokenizer

WORDS = ["the", "user", "asks", "and", "assistant", "answers", "in", "one", "line", "a", "system", "tells"]


def qa(question: str, answer: str, where: str = "", group: str | None = None) -> Row:
    messages = [Message("user", question), Message("assistant", answer)]
    return Row(messages, where or f"{question} {answer}", question if group is None else group)


def some_rows(count: int) -> list[Row]:
    """Rows of different lengths that all differ."""
    words = [WORDS[(7 * n + n // 12) % len(WORDS)] for n in range(4 * count)]
    return [
        qa(f"{' '.join(words[n : n + 2 + n % 3])} {n}?", " ".join(words[2 * n : 2 * n + 2 + n % 5]), f"rows:{n}")
        for n in range(count)
    ]


@pytest.fixture(autouse=True)
def _own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pool_of() -> Callable[..., Pool]:
    def made(rows: Sequence[Row], model: Any = None, **data: Any) -> Pool:
        renderer = Renderer(tiny_tokenizer())
        settings = DataConfig(train="unused", **data)
        model = model or tiny_model()
        return Pool(rows, examples_of(rows, renderer, settings), renderer, settings, lambda: model, pack_tokens=200)

    return made


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """30 rows, of which two say the same as an earlier one."""
    rows = [{"prompt": row.messages[0].content, "completion": row.messages[1].content} for row in some_rows(30)]
    rows[11], rows[12] = rows[3], {key: f" {text.upper()}  " for key, text in rows[4].items()}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
