"""What people have in their rows and files: every key is read or named, and files of the usual kinds are read.

The cases are from public reports; each test names them.
"""

import csv
import gzip
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftlm import DataConfig
from graftlm.data.batches.prompts import asked_in
from graftlm.data.chat.masks import weights
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.roles import Role
from graftlm.data.quality.preflight import prepare, shown_rows
from graftlm.data.quality.report import Report
from graftlm.data.sources.convert import convert
from graftlm.data.sources.formats import FORMATS, RowError
from graftlm.data.sources.load import load_rows, stream_rows
from graftlm.data.sources.messages import Message
from graftlm.data.sources.parts import content_hash
from graftlm.data.sources.prompt_templates import PromptTemplate, ask
from graftlm.data.sources.records import Problem
from graftlm.data.sources.row_cache import read_cached
from graftlm.data.sources.source import Row, SourceConfig
from graftlm.data.sources.streaming import Stream
from graftlm.errors import numbered
from graftlm.testing import tiny_tokenizer
from tests.data.sources.test_damage import CLEAN
from tests.errors import raises


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def reported(path: str | SourceConfig, renderer: Renderer) -> tuple[list[Row], Report, str]:
    """The rows, the report and the text of all trained tokens."""
    rows, name = load_rows(path, problems=[])
    examples, report = prepare(rows, renderer, DataConfig(train="x"), format=name)
    trained = [renderer.tokenizer.decode(one.ids[one.weights > 0]) for one in examples]
    return rows, report, " ".join(trained)


# Marks that an answer is not to be trained (verl#5316, verl#5472, LLaMA-Factory#10471, Axolotl) ---------------------

OFF: dict[str, Any] = {
    "weight": 0,
    "loss": False,
    "loss_scale": 0.0,
    "train": False,
    "trainable": False,
    "training": False,
    "train_on_turn": False,
    "loss_mask": 0,
}


def dialogue(format: str, **of_the_first_answer: Any) -> dict[str, Any]:
    key, role, text, asks, says = {
        "messages": ("messages", "role", "content", "user", "assistant"),
        "sharegpt": ("conversations", "from", "value", "human", "gpt"),
    }[format]
    turns = [(asks, "a"), (says, "WRONG"), (asks, "b"), (says, "right")]
    found: list[dict[str, Any]] = [{role: who, text: content} for who, content in turns]
    found[1] |= of_the_first_answer
    return {key: found}


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
@pytest.mark.parametrize("key", OFF)
def test_an_answer_marked_as_not_to_be_trained_is_not(
    key: str, format: str, renderer: Renderer, tmp_path: Path
) -> None:
    _, report, trained = reported(written(tmp_path, dialogue(format, **{key: OFF[key]})), renderer)
    assert "right" in trained
    assert "WRONG" not in trained
    assert report.notes == []


@pytest.mark.parametrize("key", ["train", "trainable", "training", "train_on_turn", "loss_mask"])
def test_flags_are_true_or_false_or_1_or_0_and_nothing_else(key: str) -> None:
    for value, weight in ((True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (None, None)):
        answer = FORMATS["messages"](dialogue("messages", **{key: value})).messages[1]
        assert answer.weight == weight
    for value in (2, "false", [0], 0.5, 0.0):
        with pytest.raises(RowError, match=f"{key} must be true or false"):
            FORMATS["messages"](dialogue("messages", **{key: value}))


def test_several_marks_multiply_so_that_none_is_overruled() -> None:
    for marks, weight in (
        ({"weight": 1, "train": False}, 0.0),
        ({"loss": False, "loss_scale": 2.0}, 0.0),
        ({"loss": True, "loss_scale": 2.0, "weight": 0.5}, 1.0),
    ):
        assert FORMATS["messages"](dialogue("messages", **marks)).messages[1].weight == weight


def test_a_call_that_is_a_turn_of_its_own_can_be_marked_too() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "train": False}
    row = {"conversations": [{"from": "human", "value": "q"}, call]}
    assert FORMATS["sharegpt"](row).messages[1].weight == 0.0


# Thoughts (vLLM#27752, mlx-vlm#1408) --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_read_under_each_of_their_names(key: str) -> None:
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", key: "two and two"}]}
    assert FORMATS["messages"](row).messages[1] == Message("assistant", "4", thinking="two and two")


def test_two_names_may_hold_the_same_thoughts_and_not_different_ones() -> None:
    answer = {"role": "assistant", "content": "4", "reasoning": "two and two", "reasoning_content": "two and two"}
    question = {"role": "user", "content": "2+2?"}
    assert FORMATS["messages"]({"messages": [question, answer]}).messages[1].thinking == "two and two"
    with pytest.raises(RowError, match="'reasoning_content' and 'reasoning' hold different thoughts"):
        FORMATS["messages"]({"messages": [question, answer | {"reasoning": "other"}]})


# Pictures beside the text (LLaVA, Qwen-VL, InternVL, ms-swift#4895, Qwen3-VL#1887) ----------------------------------

CAT = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "cat"}]
PICTURES: dict[str, dict[str, Any]] = {
    "a part image_url": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"text": "what?"}]},
            CAT[1],
        ]
    },
    "a picture in a part of text": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "what?", "image": "x.png"}]}, CAT[1]]
    },
    "images": {"messages": CAT, "images": ["x.png"]},
    "image, in ShareGPT": {
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "cat"}],
        "image": "x.png",
    },
    "image_path": {"messages": CAT, "image_path": "x.png"},
    "image_url": {"query": "what?", "response": "cat", "image_url": "http://x"},
    "audio": {"messages": CAT, "audio": "x.wav"},
    "audios": {"messages": CAT, "audios": ["x.wav"]},
    "videos": {"messages": CAT, "videos": ["x.mp4"]},
    "video_path": {"messages": CAT, "video_path": "x.mp4"},
    "images of a message": {"messages": [CAT[0] | {"images": ["x.png"]}, CAT[1]]},
    "image of a message": {"messages": [CAT[0] | {"image": "x.png"}, CAT[1]]},
    "audio of an answer": {"messages": [CAT[0], CAT[1] | {"audio": {"id": "x"}}]},
    "image of a chosen answer": {"prompt": "q", "chosen": [CAT[1] | {"image": "x"}], "rejected": [CAT[1]]},
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_row_with_pictures_is_refused_wherever_they_stand(name: str, tmp_path: Path) -> None:
    (refused,) = stream_rows(written(tmp_path, PICTURES[name]))
    assert isinstance(refused, Problem)
    assert refused.left_out
    assert "only text can be trained on" in refused.reason


def test_places_for_pictures_that_hold_none_are_no_pictures(tmp_path: Path, renderer: Renderer) -> None:
    row = {"messages": [CAT[0] | {"images": []}, CAT[1] | {"audio": None}], "images": [], "image": None, "video": ""}
    rows, report, _ = reported(written(tmp_path, row), renderer)
    assert len(rows) == 1
    assert report.notes == []


# Keys that nobody reads ---------------------------------------------------------------------------------------------


def test_keys_that_nobody_reads_are_counted_and_named(tmp_path: Path, renderer: Renderer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "strict": True}}
    answer = {"role": "assistant", "content": "a", "learn": False}
    asks = {"role": "user", "content": [{"type": "text", "text": "q", "cache": 1}], "name": "ann"}
    path = written(
        tmp_path,
        {"messages": [asks, answer, asks, answer], "id": 7, "source": {"a": 1}},
        {"messages": [{"role": "user", "content": "r"}, answer | {"wieght": 0, "learn": None}], "id": 8},
        {"messages": [asks, {"role": "assistant", "content": None, "tool_calls": [call]}]},
    )
    _, report, _ = reported(path, renderer)
    assert report.notes == [
        f"fields of rows that are not used: 'id' (2, first in {path}:1), 'source' (1, first in {path}:1)",
        f"fields of messages that are not used: 'name' (3, first in {path}:1), 'learn' (2, first in {path}:1), "
        f"'wieght' (1, first in {path}:2; did you mean 'weight'?)",
        f"fields of parts and calls of messages that are not used: 'cache' (3, first in {path}:1), "
        f"'strict' (1, first in {path}:3)",
    ]
    assert any(report.notes[0] in value for name, value in report.lines() if name == "noted")


PLANTED = ("keep", "learn", "mask", "ignore", "calculate_loss", "lang", "meta", "score_of_a_judge")


def mappings(value: Any, depth: int = 0) -> list[dict[str, Any]]:
    """The row and its messages."""
    if isinstance(value, list):
        return [found for one in value for found in mappings(one, depth)]
    if not isinstance(value, dict) or depth > 1:
        return []
    beside = ("tools", "tool_calls", "history")
    return [value, *(found for key, one in value.items() if key not in beside for found in mappings(one, depth + 1))]


@pytest.mark.parametrize("format", FORMATS)
def test_of_planted_keys_none_is_silent_and_clean_rows_raise_no_alarm(
    format: str, tmp_path: Path, renderer: Renderer
) -> None:
    chance, planted, rows = random.Random(format), dict.fromkeys(PLANTED, 0), []
    for n in range(100):
        row = {key: value for key, value in CLEAN[format](n).items() if key != "id"}
        rows.append(json.loads(json.dumps(row)))
    clean, _ = load_rows(SourceConfig(path=written(tmp_path, *rows), format=format))  # type: ignore[arg-type]
    assert [row.unread for row in clean] == [()] * 100
    for row in rows:
        key = chance.choice(PLANTED)
        chance.choice(mappings(row))[key] = chance.choice([False, 0, "x", {"a": None}])
        planted[key] += 1
    found, _ = load_rows(SourceConfig(path=written(tmp_path, *rows), format=format))  # type: ignore[arg-type]
    assert len(found) == 100
    assert {key: sum(one[1] == key for row in found for one in row.unread) for key in PLANTED} == planted


def test_what_is_looked_at_to_tell_the_format_is_not_used_for_that(tmp_path: Path) -> None:
    (row,), name = load_rows(written(tmp_path, {"prompt": "q", "completion": "a", "label": 3}))
    assert (name, row.unread) == ("prompt-completion", (("rows", "label"),))


def test_fields_that_templates_use_are_used(tmp_path: Path) -> None:
    template = {"prompt": "{question}", "completion": "{answer}"}
    path = written(tmp_path, {"question": "q", "answer": "a", "hint": "h", "hard": 1, "group": "g"})
    source = SourceConfig(path=path, templates=[template])  # type: ignore[arg-type]
    (row,), _ = load_rows(source, score="hard")
    assert row.unread == (("rows", "hint"),)


def test_fields_that_descriptions_of_other_trainers_use_are_used(tmp_path: Path) -> None:
    turns = [{"who": "human", "text": "q", "lang": "en"}, {"who": "gpt", "text": "a"}]
    written(tmp_path, {"talk": turns, "id": 1})
    entry = {
        "file_name": "rows.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk"},
        "tags": {"role_tag": "who", "content_tag": "text"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    (row,), _ = load_rows(f"{tmp_path}/dataset_info.json:mine")
    assert sorted(row.unread) == [("messages", "lang"), ("rows", "id")]
    (tmp_path / "axolotl.yaml").write_text(
        f"datasets: [{{path: {tmp_path}/rows.jsonl, type: chat_template, field_messages: talk, "
        "message_property_mappings: {role: who, content: text}}]"
    )
    (row,), _ = load_rows(f"{tmp_path}/axolotl.yaml")
    assert sorted(row.unread) == [("messages", "lang"), ("rows", "id")]


def test_kept_rows_know_what_was_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renderer: Renderer) -> None:
    monkeypatch.setattr("graftlm.data.chat.parallel.MANY", 0)
    path = written(tmp_path, *({"prompt": f"q{n}", "completion": "a", "id": n} for n in range(5)))
    data = DataConfig(train=path)
    for _ in range(2):
        rows = read_cached(data, seed=0, folder=tmp_path / "kept").train
        _, report = prepare(rows, renderer, data, cache=tmp_path / "kept")
        assert report.notes[0] == f"fields of rows that are not used: 'id' (5, first in {path}:1)"
        assert rows[1].unread == (("rows", "id"),)


def test_what_a_conversion_drops_is_named_and_what_a_stream_drops_is_counted(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "q", "completion": "a", "id": 1})
    _, problems = convert(path, tmp_path / "out.jsonl")
    assert [str(p) for p in problems] == [f"{path}: fields of rows that are not used: 'id' (1, first in {path}:1)"]
    assert Stream([SourceConfig(path=path)], seed=0).unread == {("rows", "id"): 1}


# Nulls of a table (ms-swift#6467, ms-swift#10125, axolotl#2909, ms-swift#10110) and calls without arguments -----------


def tool(name: str, **schema: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calling(arguments: Any, *tools: dict[str, Any], name: str = "move") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    question = {"role": "user", "content": "go"}
    return {"messages": [question, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": list(tools)}


def arguments_of(row: Row) -> Any:
    return row.messages[-1].tool_calls[0]["function"]["arguments"]


NUMBER = {"type": "number"}


@pytest.mark.parametrize("as_text", [False, True])
def test_nulls_that_a_table_put_into_json_are_not_there(as_text: bool, tmp_path: Path) -> None:
    properties = {"x": NUMBER | {"enum": None, "default": None}, "theta": None}
    arguments = {"x": 1, "theta": None, "at": {"y": 2, "z": None}}
    row = calling(json.dumps(arguments) if as_text else arguments, tool("move", **properties))
    row["messages"][1]["tool_calls"][0]["index"] = None
    (found,), _ = load_rows(written(tmp_path, row))
    assert arguments_of(found) == {"x": 1, "at": {"y": 2}}
    assert found.tools == (tool("move", x=NUMBER),)
    assert "index" not in found.messages[1].tool_calls[0]
    row = {"prompt": "go", "chosen": [row["messages"][1]], "rejected": [calling({"x": None})["messages"][1]]}
    (found,), _ = load_rows(written(tmp_path, row))
    assert found.rejected[0][-1].tool_calls[0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["number", "null"]},
        {"type": "number", "nullable": True},
        {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None},
        {"enum": [1, None]},
    ],
)
def test_a_null_that_the_schema_of_its_tool_allows_is_said(schema: dict[str, Any], tmp_path: Path) -> None:
    (row,), _ = load_rows(written(tmp_path, calling({"x": None, "y": None}, tool("move", x=schema, y=NUMBER))))
    assert arguments_of(row) == {"x": None}
    assert row.tools == (tool("move", x=schema, y=NUMBER),)


def test_a_null_that_the_schema_of_its_tool_requires_is_said(tmp_path: Path) -> None:
    needs = tool("move", x=NUMBER, y=NUMBER)
    needs["function"]["parameters"]["required"] = ["x"]
    (row,), _ = load_rows(written(tmp_path, calling({"x": None, "y": None}, needs)))
    assert arguments_of(row) == {"x": None}


@pytest.mark.parametrize("arguments", ["null", " null\n", "", "{}", None, {}])
def test_a_call_without_arguments_is_read_however_it_says_so(arguments: Any) -> None:
    """vllm#43861"""
    answer = FORMATS["messages"](calling(arguments)).messages[1]
    assert answer.tool_calls[0]["function"]["arguments"] == {}


# Fields under other names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "Who?", "answer": "Ann."}, "Who?", "Ann."),
        ({"question": "Who?", "context": "Ann came.", "answer": "Ann."}, "Who?\n\nAnn came.", "Ann."),
        ({"input": "2+2", "output": "4"}, "2+2", "4"),
        ({"input": "2+2", "context": "", "output": "4"}, "2+2", "4"),
        ({"instruction": "Who?", "context": "Ann came.", "response": "Ann."}, "Who?\n\nAnn came.", "Ann."),
        ({"instruction": "Who?", "input": "i", "output": "Ann."}, "Who?\n\ni", "Ann."),
        ({"query": "Who?", "answer": "Ann.", "system": ""}, "Who?", "Ann."),
        ({"prompt": "Who?", "output": "Ann."}, "Who?", "Ann."),
    ],
)
def test_questions_and_answers_are_read_under_their_usual_names(
    row: dict[str, str], question: str, answer: str, tmp_path: Path
) -> None:
    (found,), _ = load_rows(written(tmp_path, row))
    assert [m.content for m in found.messages] == [question, answer]
    assert found.unread == ()


def test_a_question_with_an_answer_can_be_asked_in_a_loop_of_answers(tmp_path: Path) -> None:
    path = written(tmp_path, {"question": "2+2", "answer": "4"}, {"question": "2+3", "answer": "5"})
    rows, _ = load_rows(SourceConfig(path=path, format="prompt"))
    assert [asked_in(row)[1] for row in rows] == ["4", "5"]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (row,), _ = load_rows(SourceConfig(path=written(tmp_path, {"messages": messages, "answer": "x"}), format="prompt"))
    assert [m.content for m in row.messages] == ["q", "a"]
    assert row.unread == (("rows", "answer"),)


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"premise": "It rains.", "hypothesis": 'It is "wet".', "label": 1}, 'It rains.\n\nIt is "wet".', "1"),
        ({"Summary": "Rain.", "Document: raw": "It rains."}, "It rains.", "Rain."),
        ({"en": "rain", "de": "Regen", "tags": ["x"], "{odd}": "y"}, "rain", "Regen"),
    ],
)
def test_the_error_of_other_fields_has_the_templates_to_paste(
    row: dict[str, Any], prompt: str, completion: str, tmp_path: Path
) -> None:
    path = written(tmp_path, row)
    with raises("data/unusable-rows") as caught:
        load_rows(path)
    line = str(caught.value).rpartition("templates: [")[2].partition("\n")[0]
    pasted = yaml.safe_load(f"path: {path}\ntemplates: [{line}")
    (found,), _ = load_rows(SourceConfig(**pasted))
    assert [m.content for m in found.messages] == [prompt, completion]


# A problem that many rows share -------------------------------------------------------------------------------------


def test_a_problem_that_many_rows_share_is_one_line_with_a_count(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y"}] * 5_000 + [{"prompt": "q"}, {"prompt": "q", "completion": 3}]
    path = written(tmp_path, *rows)
    with raises("data/unusable-rows") as caught:
        load_rows(path)
    first, *lines = str(caught.value).split("\n")
    assert first.startswith(f"5001 rows of {path} cannot be used")
    assert len(lines) == 2
    assert lines[0].startswith(f"  {path}:1 and 4,999 more places: fields ['a', 'b'] fit no known format")
    assert lines[1].startswith(f"  {path}:5002: field 'completion' must be text")


@pytest.mark.parametrize("where", ["a.jsonl:{}", "a.parquet: row {}", "a.json:{}: row 7", "hub:o/n:train: row {}"])
def test_places_of_every_kind_are_put_together(where: str) -> None:
    same = [f"{where.format(n)}: wrong: it is" for n in range(1, 13)]
    assert numbered([*same, "other: wrong"]) == f"  {where.format(1)} and 11 more places: wrong: it is\n  other: wrong"
    assert numbered(same[:9]) == "\n".join(f"  {one}" for one in same[:9])
    assert numbered([f"{n}: it is {n}" for n in range(5)], 2) == "  0: it is 0\n  1: it is 1\n  and 3 more"
    assert numbered(["a: 1", "b: 2", *same], 2).endswith("\n  and 12 more")


# Files (a glob, a folder, gzip, tabs, capitals: asked in many forums) ------------------------------------------------

PAIR = {"prompt": "a", "completion": "b"}
LINE = json.dumps(PAIR) + "\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    for name in ("b.jsonl", "a.JSONL", "folder/c.jsonl"):
        (tmp_path / name).write_text(LINE)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as packed:
        packed.write(LINE * 2)
    with gzip.open(tmp_path / "d.csv.GZ", "wt") as packed:
        packed.write("prompt,completion\na,b\n")
    (tmp_path / "e.tsv").write_text('prompt\tcompletion\na\t"b, ""c"""\n')
    (tmp_path / "notes.txt").write_text("no rows\n")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "places"),
    [
        ("a.JSONL", ["a.JSONL:1"]),
        ("*.jsonl", ["b.jsonl:1"]),
        ("?.*[lL]", ["a.JSONL:1", "b.jsonl:1"]),
        ("**/*.jsonl", ["b.jsonl:1", "folder/c.jsonl:1"]),
        ("c.jsonl.gz", ["c.jsonl.gz:1", "c.jsonl.gz:2"]),
        ("d.csv.GZ", ["d.csv.GZ:2"]),
        ("e.tsv", ["e.tsv:2"]),
        ("folder", ["folder/c.jsonl:1"]),
        (".", ["a.JSONL:1", "b.jsonl:1", "c.jsonl.gz:1", "c.jsonl.gz:2", "d.csv.GZ:2", "e.tsv:2"]),
    ],
)
def test_files_of_the_usual_kinds_are_read(path: str, places: list[str], files: Path) -> None:
    rows, name = load_rows(str(files / path), problems=[])
    assert name == "prompt-completion"
    assert [str(Path(row.where).relative_to(files)) for row in rows] == places
    if path == "e.tsv":
        assert rows[0].messages[1].content == 'b, "c"'


def test_what_datasets_wrote_to_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([PAIR, PAIR | {"prompt": "c"}]).save_to_disk(str(tmp_path / "disk"))
    for path in (tmp_path / "disk", tmp_path / "disk" / "data-00000-of-00001.arrow"):
        rows, _ = load_rows(str(path))
        assert [row.messages[0].content for row in rows] == ["a", "c"]


def test_a_folder_or_pattern_without_rows_says_so(files: Path) -> None:
    (files / "empty").mkdir()
    for path, why in (("empty", "folder"), ("*.yet", "no file matches")):
        with raises("data/no-such-file", match=why):
            load_rows(str(files / path))


def test_a_packed_file_that_is_cut_off_is_an_error_and_no_end(files: Path) -> None:
    whole = (files / "c.jsonl.gz").read_bytes()
    for damaged in (whole[:-9], whole[:20], b"no gzip"):
        (files / "c.jsonl.gz").write_bytes(damaged)
        with raises("data/damaged-file", match=r"c\.jsonl\.gz"):
            load_rows(str(files / "c.jsonl.gz"))


def test_a_new_file_in_a_folder_is_seen_by_what_was_kept(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.data.chat.parallel.MANY", 0)
    data = DataConfig(train=str(files / "folder"))
    for _ in range(2):
        assert len(read_cached(data, seed=0, folder=files / "kept").train) == 1
    before = content_hash(str(files / "folder"))
    assert before is not None
    (files / "folder" / "d.jsonl").write_text(LINE)
    assert content_hash(str(files / "folder")) != before
    assert len(read_cached(data, seed=0, folder=files / "kept").train) == 2


# JSON text in a column ----------------------------------------------------------------------------------------------

HI = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "odd": 1}]


def test_json_text_in_a_field_that_holds_no_text_is_read(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    calls = [HI[0], {"role": "assistant", "content": None, "tool_calls": json.dumps(call)}]
    for row in (
        {"messages": json.dumps(HI)},
        {"conversations": json.dumps(turns)},
        {"instruction": "q", "output": "a", "history": "[]"},
        {"prompt": "q", "completion": "a", "history": json.dumps([["x", "y"]])},
        {"prompt": "q", "responses": json.dumps(["b", "a"]), "scores": "[1, 2]"},
    ):
        (found,), _ = load_rows(written(tmp_path, row))
        assert [m.content for m in found.messages][-2:] == ["q", "a"]
    (found,), _ = load_rows(written(tmp_path, {"messages": calls}))
    assert found.messages[1].tool_calls == tuple(call)
    with (tmp_path / "rows.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["messages"], [json.dumps(HI)]])
    (found,), name = load_rows(str(tmp_path / "rows.csv"))
    assert (name, found.unread) == ("messages", (("messages", "odd"),))


def test_an_answer_in_json_stays_the_text_that_it_is(tmp_path: Path) -> None:
    (row,), _ = load_rows(written(tmp_path, {"prompt": "[1]", "completion": '[{"role": "user"}]'}))
    assert [m.content for m in row.messages] == ["[1]", '[{"role": "user"}]']


def test_text_that_is_no_json_says_what_is_wrong_with_it() -> None:
    with pytest.raises(RowError, match="not valid JSON .* This is how Python shows a value: write it with json.dumps"):
        FORMATS["messages"]({"messages": str(HI)})
    with pytest.raises(RowError, match=r"field 'messages' is not valid JSON \(.*: '\[\{"):
        FORMATS["messages"]({"messages": json.dumps(HI)[:-3]})


# Characters that are made of several tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\u00e9\u65e5\U0001f600", "a\u0301\u05d0", "\ufffd", "\ufffd\u65e5\ufffd", "plain"])
def test_characters_of_several_tokens_are_shown_whole(text: str, renderer: Renderer) -> None:
    row = Row([Message("user", "q"), Message("assistant", text)], "here", "g")
    (shown,) = shown_rows([row], renderer, DataConfig(train="x"), 1)
    rendered = renderer.conversation(row.messages)
    assert [token["id"] for token in shown["tokens"]] == rendered.ids.tolist(), "no token is left out"
    assert "".join(token["text"] for token in shown["tokens"]) == rendered.text
    broken = sum(token["text"].count("\ufffd") for token in shown["tokens"])
    assert broken == text.count("\ufffd")


def test_bytes_that_are_no_character_are_shown_one_by_one(renderer: Renderer) -> None:
    ids = renderer.tokenizer("\u65e5", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert renderer.token_texts(ids) == ["\u65e5", *[""] * (len(ids) - 1)]
    assert renderer.token_texts(ids[:-1]) == ["\ufffd"] * (len(ids) - 1)


# Templates of rows --------------------------------------------------------------------------------------------------

INTRO = "Below is an instruction that describes a task"
ALPACA = (
    PromptTemplate(
        prompt=f"{INTRO}, paired with an input that provides further context. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
        completion="{output}",
    ),
    PromptTemplate(
        prompt=f"{INTRO}. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "{instruction}\n\n### Response:",
        completion="{output}",
        unless="input",
    ),
)
"""As published: stanford_alpaca/train.py, PROMPT_DICT."""
PLAIN = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""A chat template that writes nothing but the messages, and what ends an answer."""


def test_the_two_prompts_of_alpaca_are_rendered_and_masked_as_published(tmp_path: Path) -> None:
    with_input = {"instruction": "Add.", "input": "2+2", "output": "4"}
    path = written(tmp_path, with_input, with_input | {"input": ""}, {"instruction": "Hi.", "output": "Hello."})
    rows, _ = load_rows(SourceConfig(path=path, templates=ALPACA))
    assert [row.template for row in rows] == [0, 1, 1]
    renderer = Renderer(tiny_tokenizer(PLAIN))
    eos = renderer.tokenizer.eos_token
    for row, fields in zip(rows, ("Add./2+2", "Add.", "Hi."), strict=True):
        instruction, _, input_text = fields.partition("/")
        published = (
            ALPACA[row.template or 0].prompt.replace("{instruction}", instruction).replace("{input}", input_text)
        )
        rendered = renderer.conversation(row.messages)
        answer = row.messages[1].content
        assert rendered.text == f"{published}{answer}{eos}"
        trained = rendered.ids[weights(rendered, "response") > 0]
        assert renderer.tokenizer.decode(trained) == f"{answer}{eos}"
        prompt = renderer.prompt(row.messages[:1])
        assert rendered.ids.tolist() == [*prompt.tolist(), *trained.tolist()], "the prompt is what generation sees"
    assert all(row.unread == () for row in rows)


def test_the_fixed_words_of_a_template_are_boilerplate_and_the_fields_are_not(tmp_path: Path) -> None:
    way = PromptTemplate(prompt="{{Say}} where {who} is. Answer:", completion="It is {where}.")
    rows, _ = load_rows(SourceConfig(path=written(tmp_path, {"who": "Ann \u65e5", "where": "here"}), templates=(way,)))
    renderer = Renderer(tiny_tokenizer())
    rendered = renderer.conversation(rows[0].messages)
    assert "{Say} where Ann \u65e5 is. Answer:" in rendered.text
    for mask, expected in (
        ("response", ""),
        ("instruction", "Ann \u65e5"),
        ("no-boilerplate", "Ann \u65e5"),
        ("everything", "{Say} where Ann \u65e5 is. Answer:"),
    ):
        own = (weights(rendered, mask) > 0) & (rendered.turns == 0) & (rendered.roles != Role.SPECIAL)
        text = renderer.tokenizer.decode(rendered.ids[own])
        assert expected in text
        if mask != "everything":
            assert "where" not in text
            assert "Answer" not in text
        answer = (weights(rendered, mask) > 0) & (rendered.roles == Role.ASSISTANT)
        assert renderer.tokenizer.decode(rendered.ids[answer]).strip() == "It is here."


def test_the_template_of_a_row_stays_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.data.chat.parallel.MANY", 0)
    ways = tuple(PromptTemplate(prompt=f"{word} {{n}}?", completion="{n}") for word in ("Who", "What", "Which"))
    path = written(tmp_path, *({"n": n} for n in range(30)))
    data = DataConfig(train=SourceConfig(path=path, templates=ways))
    for _ in range(2):
        read = read_cached(data, seed=0, folder=tmp_path / "kept")
        words = [ways[row.template].prompt.split()[0] for row in read.train if row.template is not None]
        assert words == [row.messages[0].content.split()[0] for row in read.train]
        assert [row.messages[0].boilerplate for row in read.train][0][0] == (0, len(words[0]) + 1)
        counts = ", ".join(f"{n + 1}: {words.count(way.prompt.split()[0])} rows" for n, way in enumerate(ways))
        assert f"{path}: asked by template {counts}" in read.notes
        assert min(words.count(word) for word in set(words)) > 0
    convert(SourceConfig(path=path, templates=ways), tmp_path / "out.jsonl")
    again, _ = load_rows(str(tmp_path / "out.jsonl"))
    assert [row.messages for row in again] == [row.messages for row in read.train]


def test_a_stream_draws_templates_anew_in_every_epoch(tmp_path: Path) -> None:
    ways = tuple(PromptTemplate(prompt=f"{word} {{n}}?", completion="{n}") for word in ("Who", "What", "Which"))
    path = written(tmp_path, *({"n": n} for n in range(30)))
    stream = Stream([SourceConfig(path=path, templates=ways)], seed=0)
    rows = list(islice(stream, 90))
    epochs = [{row.where: row.template for row in rows[start : start + 30]} for start in (0, 30, 60)]
    assert all(len(epoch) == 30 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [row.template for row in islice(stream, 90)] == [row.template for row in rows]


def test_a_row_that_no_template_is_for_says_what_is_missing() -> None:
    with pytest.raises(RowError, match="field 'instruction' is needed"):
        ask(ALPACA, {"input": "2+2", "output": "4"})
    with pytest.raises(RowError, match="no template is for this row"):
        ask(ALPACA[1:], {"instruction": "a", "input": "2+2", "output": "4"})


def test_the_examples_of_a_task_stand_before_the_input_in_the_words_of_tk_instruct(tmp_path: Path) -> None:
    """The wanted text was written by hand from src/ni_collator.py of github.com/yizhongw/Tk-Instruct at 7c0e400."""
    examples = [{"input": f"{n}+1 ", "output": f"{n + 1}", "explanation": "so"} for n in range(3)]
    examples[1] |= {"input": "1+1?", "output": "Two!"}
    task = {"Definition": ["Add"], "Positive Examples": examples, "Source": ["x"]}
    path = written(tmp_path, task | {"Instances": [{"input": "5+1", "output": ["6"]}]}, name="task.json")
    (row,), _ = load_rows(path)
    assert row.messages[0].content == (
        "Definition: Add.\n\n Positive Example 1 -\nInput: 0+1.\n Output: 1.\n\n Positive Example 2 -\nInput: 1+1?\n"
        " Output: Two!\n\nNow complete the following example -\nInput: 5+1.\nOutput:"
    )
    assert row.messages[1].content == "6"
    assert row.unread == (("rows", "Source"),)
    path = written(tmp_path, {"Definition": ["Add."], "Instances": [{"input": "5+1", "output": ["6"]}]}, name="t.json")
    assert load_rows(path)[0][0].messages[0].content == "Add.\n\n5+1"
