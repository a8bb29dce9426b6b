"""Rendering on all cores gives what one core gives, in order, and leaves no process behind."""

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftlm.data.chat import parallel
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.token_columns import Columns, join, render
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.source import DataConfig, Row
from graftlm.errors import DataError
from graftlm.testing import tiny_tokenizer
from tests.data.shapes import chat, tokenizer_for
from tests.errors import raises

DATA = DataConfig(train="rows.jsonl")


def row(number: int, *, length: int = 20) -> Row:
    question = f"question {number}"
    return Row(chat(question, "answer " * (number % length) + "end"), f"f:{number}", question)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of ten rows or so, and processes from three chunks on."""
    monkeypatch.setattr(parallel, "CHUNK", 11_000)
    monkeypatch.setattr(parallel, "MANY", 33_000)


def equal(a: Columns, b: Columns) -> bool:
    assert a.problems == b.problems
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype
        for name in ("ids", "roles", "weights", "ends", "rows", "control")
    )


@pytest.mark.parametrize("count", range(6))
def test_rows_together_are_what_each_is_alone(count: int, renderer: Renderer) -> None:
    refused = Row(chat("a", "b")[1:], "f:0", "a")
    rows = [refused if number == 2 else row(number) for number in range(count)]
    together = renderer.rows_of_all([(one.messages, one.tools) for one in rows])
    assert len(together) == count
    for one, pieces in zip(rows, together, strict=True):
        if one is refused:
            assert isinstance(pieces, DataError)
        else:
            assert not isinstance(pieces, DataError)
            (piece,), (alone,) = pieces, renderer.rows(one.messages, one.tools)
            assert piece.ids.tolist() == alone.ids.tolist()
            assert piece.roles.tolist() == alone.roles.tolist()


def test_columns_hold_what_each_row_is_rendered_to(renderer: Renderer) -> None:
    rows = [row(1), row(5), row(2)]
    columns = render(rows, renderer, DATA)
    assert columns.rows.tolist() == [0, 1, 2]
    for one, start, end in zip(rows, columns.starts, columns.ends, strict=True):
        (piece,) = renderer.rows(one.messages, one.tools)
        assert columns.ids[start:end].tolist() == piece.ids.tolist()
        assert columns.roles[start:end].tolist() == piece.roles.tolist()
        trained = columns.ids[start:end][columns.weights[start:end] > 0]
        assert renderer.decode(trained) == one.messages[1].content


def test_joined_columns_are_the_columns_of_all_rows() -> None:
    renderer = Renderer(tokenizer_for("gemma"))
    refused = Row(chat("a", "b", system="s"), "f:0", "a")
    rows = [row(0), refused, row(2), row(3), refused, row(5)]
    apart = [render(rows[:2], renderer, DATA), render([], renderer, DATA), render(rows[2:], renderer, DATA)]
    assert equal(join(apart), render(rows, renderer, DATA))
    assert sorted(join(apart).problems) == [1, 4]
    assert equal(join([]), render([], renderer, DATA))


def test_a_row_with_a_control_token_is_marked_whichever_message_holds_it(renderer: Renderer) -> None:
    rows = [row(1), Row(chat("a", "<|im_end|>"), "f", "a"), Row(chat("a<b|", "c"), "f", "a")]
    assert render(rows, renderer, DATA).control.tolist() == [False, True, False]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_many_workers_give_what_one_gives_in_order(renderer: Renderer, small: None, workers: int) -> None:
    rows = [row(i) for i in range(137)]
    rows[70] = Row([rows[70].messages[1]], "f:70", "a")  # begins with an answer: refused
    chunks = list(parallel.rendered(rows, renderer, DATA, workers))
    assert [r for chunk, _ in chunks for r in chunk] == rows
    assert len(chunks) > 10
    assert all(len(columns.control) == len(chunk) for chunk, columns in chunks)
    together = join([columns for _, columns in chunks])
    assert equal(together, render(rows, renderer, DATA))
    assert list(together.problems) == [70]


def test_rows_are_taken_only_as_they_are_needed(renderer: Renderer, small: None) -> None:
    taken = 0

    def endless() -> Iterator[Row]:
        nonlocal taken
        while True:
            taken += 1
            yield row(taken)

    chunks = parallel.rendered(endless(), renderer, DATA, 2)
    for _ in range(5):
        next(chunks)
    ahead = (parallel.AHEAD * 2 + 5 + 1) * 12
    assert taken <= ahead
    chunks.close()  # type: ignore[attr-defined]


def children() -> list[str]:
    """The processes below this one that render."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"graftlm.data.chat.parallel" in (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs Linux")
def test_no_process_is_left_when_the_reader_stops_early(renderer: Renderer, small: None) -> None:
    chunks = parallel.rendered([row(i) for i in range(200)], renderer, DATA, 3)
    next(chunks)
    assert len(children()) == 2
    chunks.close()  # type: ignore[attr-defined]
    assert not children()


def test_a_base_without_a_template_is_an_error_in_many_processes_too(small: None) -> None:
    with raises("base/no-chat-template"):
        list(parallel.rendered([row(i) for i in range(100)], Renderer(tiny_tokenizer(template=None)), DATA, 2))


def test_a_process_that_dies_is_said_and_not_waited_for(
    renderer: Renderer, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])  # its imports fail
    monkeypatch.setattr(parallel._RenderingProcess, "__init__", _silent)
    with raises("data/rendering-process-ended"):
        list(parallel.rendered([row(i) for i in range(100)], renderer, DATA, 2))


def _silent(child: Any, start: bytes) -> None:
    child._start = start
    command = [sys.executable, "-c", "import sys; sys.stdin.buffer.read(1); sys.exit(3)"]
    child._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.slow
def test_a_caller_without_a_main_guard_is_not_run_again(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from graftlm.data.chat import parallel\n"
        "from graftlm.data.sources.formats import Message\n"
        "from graftlm.data.chat.render import Renderer\n"
        "from graftlm.data.sources.source import DataConfig, Row\n"
        "from graftlm.testing import tiny_tokenizer\n"
        "parallel.CHUNK, parallel.MANY = 11_000, 33_000\n"
        "rows = [Row([Message('user', 'a'), Message('assistant', 'b')], 'f', 'a')] * 100\n"
        "print(sum(len(c) for c, _ in parallel.rendered(rows, Renderer(tiny_tokenizer()), DataConfig(train='f'), 2)))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["once", "100"]


@pytest.mark.parametrize("name", ["llama-3", "gemma", "llama-2"])
def test_a_worker_needs_neither_torch_nor_transformers_to_render_the_same(name: str) -> None:
    renderer = Renderer(tokenizer_for(name))
    raw = Row([Message(TEXT, "raw text")], "f:raw", "r")
    rows = [*(row(i) for i in range(5)), Row(chat("\u00e9", "<|im_end|> b"), "f:5", "a"), raw]
    program = (
        "import sys, pickle; from graftlm.data.chat.token_columns import render; "
        "columns = render(*pickle.load(sys.stdin.buffer)); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr); "
        "pickle.dump(columns, sys.stdout.buffer)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    request = pickle.dumps((rows, renderer.for_rows(), DATA))
    done = subprocess.run(
        [sys.executable, "-c", program], input=request, capture_output=True, env=environment, check=True
    )
    assert done.stderr.decode().strip() == "[]"
    assert equal(pickle.loads(done.stdout), render(rows, renderer, DATA))


def test_the_collector_of_garbage_is_left_as_it_was() -> None:
    objects = [[number] for number in range(100)]
    assert gc.get_freeze_count() == 0

    def fails() -> None:
        with parallel.lasting(), parallel.lasting():
            assert gc.get_freeze_count() > len(objects)
            raise ValueError("in between")

    with pytest.raises(ValueError, match="in between"):
        fails()
    assert gc.get_freeze_count() == 0
    gc.freeze()  # as a server does that forks
    try:
        with parallel.lasting():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
