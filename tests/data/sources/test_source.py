"""Files -> rows, and the split: every bad row is named by file and line, and nothing is changed on the way."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.data.sources import docstrings
from graftlm.data.sources.formats import Message
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.records import Problem
from graftlm.data.sources.source import Row, SourceConfig
from graftlm.data.sources.splits import for_supervised, split
from tests.errors import raises

pytestmark = pytest.mark.versions

GOOD = {"prompt": "q", "completion": "a"}


def line(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def written(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(file)


def refused(source: str | SourceConfig, code: str = "data/unusable-rows") -> str:
    with raises(code) as caught:
        load_rows(source)
    return str(caught.value)


def contents(rows: list[Row]) -> list[list[str]]:
    return [[m.content for m in row.messages] for row in rows]


# What can be read ----------------------------------------------------------------------------------------------------


def test_a_jsonl_file_gives_its_rows_with_their_lines_and_its_format(tmp_path: Path) -> None:
    path = written(tmp_path, f"{line()}\n\n  \n{line(prompt='r', completion=' b ')}\n")
    rows, name = load_rows(path)
    assert name == "prompt-completion"
    assert rows == [
        Row([Message("user", "q"), Message("assistant", "a")], f"{path}:1", "q"),
        Row([Message("user", "r"), Message("assistant", " b ")], f"{path}:4", "r"),
    ]


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    plain = f"{line()}\n{line(completion='b')}\n"
    odd = b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode()
    assert contents(load_rows(written(tmp_path, odd))[0]) == [["q", "a"], ["q", "b"]]
    csv = b"\xef\xbb\xbfprompt,completion\r\nq,a\r\nq,b\r\n"
    assert contents(load_rows(written(tmp_path, csv, "rows.csv"))[0]) == [["q", "a"], ["q", "b"]]
    listed = b"\xef\xbb\xbf" + json.dumps([GOOD]).encode()
    assert contents(load_rows(written(tmp_path, listed, "rows.json"))[0]) == [["q", "a"]]


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    row = json.dumps({**GOOD, "completion": text}, ensure_ascii=False)
    rows, _ = load_rows(written(tmp_path, f"{row}\n{line()}\n"))
    assert contents(rows) == [["q", text], ["q", "a"]]
    assert rows[1].where.endswith(":2")


def test_an_escaped_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    rows, _ = load_rows(written(tmp_path, '{"prompt": "q", "completion": "\\ud83d\\ude00"}\n'))
    assert contents(rows) == [["q", "\U0001f600"]]


def test_a_json_list_gives_its_rows_by_number(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps([GOOD, {**GOOD, "prompt": "r"}], indent=1), "rows.json")
    rows, _ = load_rows(path)
    wanted = [("q", f"{path}:2: row 1"), ("r", f"{path}:6: row 2")]
    assert [(r.messages[0].content, r.where) for r in rows] == wanted


def test_csv_values_stay_the_text_that_they_are(tmp_path: Path) -> None:
    table = 'prompt,completion\nNA,null\n007,1e3\n"a ""quoted"", word","two\nlines"\nTrue, nan \n'
    rows, _ = load_rows(written(tmp_path, table, "rows.csv"))
    assert contents(rows) == [["NA", "null"], ["007", "1e3"], ['a "quoted", word', "two\nlines"], ["True", " nan "]]


def test_a_csv_row_is_named_by_the_line_on_which_it_begins(tmp_path: Path) -> None:
    path = written(tmp_path, 'prompt,completion\n"one\ntwo\nthree",a\nq,b\n', "rows.csv")
    assert [row.where for row in load_rows(path)[0]] == [f"{path}:2", f"{path}:5"]


def test_a_csv_field_may_be_a_long_document(tmp_path: Path) -> None:
    text = "word " * 40_000
    rows, name = load_rows(written(tmp_path, f'text\n"{text}"\n', "rows.csv"))
    assert (contents(rows), name) == ([[text]], "text")


def test_a_parquet_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    conversations = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\u00e9\U0001f600"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "NA"}],
    ]
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"messages": conversations, "group": [1, 2]}), path)
    rows, name = load_rows(path)
    assert name == "messages"
    assert [[(m.role, m.content) for m in r.messages] for r in rows] == [
        [(m["role"], m["content"]) for m in c] for c in conversations
    ]
    assert [(r.where, r.group) for r in rows] == [(f"{path}: row 1", "1"), (f"{path}: row 2", "2")]

    pq.write_table(pa.table({"text": ["another file of the same name"]}), path)
    assert contents(load_rows(path)[0]) == [["another file of the same name"]]


def test_what_a_table_fills_in_is_no_argument_of_a_call(tmp_path: Path) -> None:
    """Columns of a table have one type: arguments of any call become arguments of every call, and null."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def calling(**arguments: str) -> list[dict[str, object]]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]

    def tool(**properties: object) -> list[dict[str, object]]:
        parameters = {"type": "object", "properties": properties}
        return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]

    table = {"messages": [calling(city="Rome"), calling(unit="C")], "tools": [tool(city={"type": "string"}), tool()]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    rows, _ = load_rows(str(tmp_path / "rows.parquet"))
    assert [r.messages[1].tool_calls[0]["function"]["arguments"] for r in rows] == [{"city": "Rome"}, {"unit": "C"}]
    assert rows[0].tools == (tool(city={"type": "string"})[0],)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, b"PAR1 and then nothing", "rows.parquet")
    assert refused(path, "data/damaged-file").startswith(f"{path}: not a readable parquet file: ")


def test_the_format_can_be_said_and_then_nothing_is_guessed(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"text": "raw", "prompt": "q", "completion": "a"}))
    assert load_rows(path)[1] == "prompt-completion"
    rows, name = load_rows(SourceConfig(path=path, format="text"))
    assert (contents(rows), name) == ([["raw"]], "text")
    assert "field 'messages' is needed" in refused(SourceConfig(path=path, format="messages"))


def test_the_built_in_rows_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "_root", lambda: Path(json.__file__).parent)  # of all, a small part
    rows, name = load_rows("builtin:docstrings")
    assert name == "prompt-completion"
    assert len(rows) > 3
    assert rows[0].where == "builtin:docstrings:1"
    assert all(row.group.endswith(".py") for row in rows)


# What cannot ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    near = written(tmp_path, line(), "train.jsonl")
    written(tmp_path, "x", "train.txt")
    path = str(tmp_path / "trian.jsonl")
    assert refused(path, "data/no-such-file").endswith(f" Did you mean {near!r}?")


def test_a_missing_folder_is_refused_too(tmp_path: Path) -> None:
    path = str(tmp_path / "none" / "rows.jsonl")
    assert refused(path, "data/no-such-file").startswith(f"{path}: ")


def test_an_unknown_built_in_set_is_refused_with_the_nearest_name() -> None:
    assert refused("builtin:docstring", "data/no-such-data-set").endswith(
        "Did you mean 'docstrings' or 'tasks/docstring'?"
    )


def test_an_ending_that_cannot_be_read_is_refused_with_those_that_can(tmp_path: Path) -> None:
    path = written(tmp_path, "q a", "rows.txt")
    message = refused(path, "data/unsupported-file-type")
    assert "cannot read .txt" in message
    assert "Known: .jsonl, .json, .csv, .tsv, .parquet, .arrow" in message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, b"", name)
    assert path in refused(path, "data/empty-file")


@pytest.mark.parametrize(
    ("name", "content"), [("r.jsonl", "\n \n"), ("r.json", "[]"), ("r.csv", "prompt,completion\n")]
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = written(tmp_path, content, name)
    assert path in refused(path, "data/no-rows")


def test_all_bad_lines_are_reported_in_one_go(tmp_path: Path) -> None:
    bad = [
        line(),
        '{"prompt": "q", "completion": ',
        line(completion=""),
        "[1, 2]",
        '{"prompt": "q"}',
        '{"prompt": "q", "completion": "\\ud800x"}',
        '{"prompt": "q", "completion": "a\\u0000b"}',
        line(completion=3),
        "{'prompt': 'q'}",
    ]
    path = written(tmp_path, "\n".join(bad))
    first, *lines = refused(path).split("\n")
    assert first == f"8 rows of {path} cannot be used (1 can; the format is prompt-completion):"
    wanted = [
        (2, "not valid JSON: Expecting value"),
        (3, "message 2 (assistant) is empty"),
        (4, "a row is a mapping of fields to values, this is a list"),
        (5, "field 'completion' is needed, found ['prompt']"),
        (6, "message 2 (assistant) contains a lone surrogate"),
        (7, "message 2 (assistant) contains a NUL character"),
        (8, "field 'completion' must be text, this is a int: 3"),
        (9, "not valid JSON: Expecting property name"),
    ]
    assert len(lines) == len(wanted)
    for text, (number, what) in zip(lines, wanted, strict=True):
        assert text.startswith(f"  {path}:{number}: {what}"), text


def test_of_very_many_bad_lines_the_first_twenty_and_their_number_are_said(tmp_path: Path) -> None:
    lines = refused(written(tmp_path, "".join(f"{' ' * n}no\n" for n in range(50)))).split("\n")
    assert len(lines) == 1 + 20 + 1
    assert lines[0].startswith("50 rows")
    assert lines[-1] == "  and 30 more"


@pytest.mark.parametrize("first", ['{"title": "q"}', '{"text": "raw"}'])
def test_a_first_line_of_another_format_does_not_decide_for_the_others(tmp_path: Path, first: str) -> None:
    path = written(tmp_path, f"{first}\n{line()}\n{line(completion='')}\n{line(prompt='r')}")
    problems: list[Problem] = []
    rows, name = load_rows(path, problems=problems)
    assert (len(rows), name) == (2, "prompt-completion")
    assert str(problems[0]).startswith(f"{path}:1: field 'prompt' is needed, found")
    assert str(problems[1]).startswith(f"{path}:3: message 2 (assistant) is empty")


def test_a_row_of_another_format_than_its_file_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, f'{line()}\n{line(prompt="r")}\n{{"text": "raw"}}\n{{"prompt": 1, "completion": "a"}}')
    problems: list[Problem] = []
    load_rows(path, problems=problems)
    assert str(problems[0]).endswith(
        "(the row is of the format 'text', its file 'prompt-completion': give it a file of its own)"
    )
    assert "of the format" not in str(problems[1])


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("a.jsonl", b'[\n {"prompt": "q"}\n]', "data/json-list-in-jsonl", r"a\.jsonl:1: .*rename it to a\.json$"),
        ("a.jsonl", b'[{"prompt": "q",\n"completion": "a"}]', "data/json-list-in-jsonl", ""),
        (
            "a.jsonl",
            b'[{"prompt": "q", "completion": "a"}]',
            "data/unusable-rows",
            r"this is a list \(a file that is one list of rows ends in",
        ),
        ("a.jsonl", b"\x1f\x8b\x08\x00abc", "data/hidden-gzip", ""),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00abc", "data/damaged-file", "Compressed file ended"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00abc", "data/unsupported-file-type", r"unpack it first\. Known: \.jsonl"),
        ("a.jsonl.zst", b"abc", "data/unsupported-file-type", r"unpack it first\. Known: \.jsonl"),
        ("a.csv", b"prompt;completion\nq;a\n", "data/wrong-delimiter", r"a\.csv:1: .*'prompt;completion'.*commas"),
        ("a.json", b'{"version": 1, "data": [{"prompt": "q"}]}', "data/not-a-list", "'data'"),
        ("a.jsonl", b'{"prompt": "q', "data/unusable-rows", "Unterminated string starting at column 12"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_what_it_is(
    name: str, content: bytes, code: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with raises(code, message):
        load_rows(str(tmp_path / name))


def test_where_no_row_fits_a_format_it_is_said_of_each(tmp_path: Path) -> None:
    path = written(tmp_path, '{"title": "q"}\n{"answer": "a"}\n')
    message = refused(path)
    assert f"{path}:1: fields ['title'] fit no known format" in message
    assert f"{path}:2: fields ['answer'] fit no known format" in message


def test_json_nested_beyond_reason_is_a_bad_line_and_no_crash(tmp_path: Path) -> None:
    path = written(tmp_path, "[" * 200_000)
    assert f"{path}:1: not valid JSON" in refused(path)
    assert "not valid JSON" in refused(written(tmp_path, "[" * 200_000, "rows.json"))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}', ":2: "),
        ("rows.json", b'[{"text": "a"},\n {"text": "caf\xe9"},\n {"text": "b"}]', ":2: row 2: "),
        ("rows.csv", b"text\na\ncaf\xe9\nb\n", ":3: "),
    ],
)
def test_bytes_that_are_no_utf8_cost_their_own_row(
    tmp_path: Path, name: str, content: bytes, place: str, mark: bytes
) -> None:
    path = written(tmp_path, mark + content, name)
    problems: list[Problem] = []
    rows, _ = load_rows(path, problems=problems)
    assert contents(rows) == [["a"], ["b"]]
    assert [str(p) for p in problems] == [
        f"{path}{place}byte 0xe9 is not UTF-8. Convert the file, for example with iconv -f latin1 -t utf-8"
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_utf16_file_is_refused_and_utf16_is_named(tmp_path: Path, encoding: str) -> None:
    path = written(tmp_path, f"{line()}\n".encode(encoding))
    message = refused(path, "data/not-utf-8")
    assert message.startswith(f"{path}:1: ")
    assert "utf-16" in message.lower()


def test_nul_bytes_cost_their_own_row(tmp_path: Path) -> None:
    path = written(tmp_path, f"{line()}\n\0\0\0\n{line(prompt='r')}\n".encode())
    problems: list[Problem] = []
    assert len(load_rows(path, problems=problems)[0]) == 2
    assert [str(p) for p in problems] == [f"{path}:2: the line contains NUL bytes (the first is byte 1): damaged"]
    path = written(tmp_path, b"text\na\nb\0\nc\n", "rows.csv")
    problems = []
    assert contents(load_rows(path, problems=problems)[0]) == [["a"], ["c"]]
    assert [str(p) for p in problems] == [f"{path}:3: contains a NUL byte: damaged"]


@pytest.mark.parametrize(
    ("content", "wanted", "message"),
    [
        (
            '[{"text": "a"},\n{"text": "b", "text": "c"},\n{"text": "d"}]',
            ["a", "d"],
            ":2: row 2: the key 'text' is given twice",
        ),
        ('[{"text": "a"},\n{"text": "b", "x": NaN},\n{"text": "d"}]', ["a", "d"], ":2: row 2: NaN is no JSON value"),
        ('[{"text": "a"},\n{"text": b},\n{"text": "d"}]', ["a"], ":2: not valid JSON: Expecting value. What follows"),
        ('[{"text": "a"},\n{"text": "b"}', ["a", "b"], ":2: not valid JSON: Expecting ',' or ']'"),
        ('[{"text": "a"},\n]', ["a"], ":2: not valid JSON: Expecting a value"),
        ('[{"text": "a"}]\n[]', ["a"], ":2: there is more after the end of the list"),
        (' \n[ {"text": "a"} ,\n {"text": ""} ] \n', ["a"], ":3: row 2: message 1 (text) is empty"),
    ],
)
def test_a_json_list_is_read_as_far_as_it_goes(tmp_path: Path, content: str, wanted: list[str], message: str) -> None:
    path = written(tmp_path, content, "rows.json")
    problems: list[Problem] = []
    rows, _ = load_rows(path, problems=problems)
    assert [row.messages[0].content for row in rows] == wanted
    assert len(problems) == 1
    assert str(problems[0]).startswith(f"{path}{message}")


def test_csv_goes_on_after_a_row_that_is_none(tmp_path: Path) -> None:
    path = written(tmp_path, 'text\na\n"b"c\nd\n\ne\n', "rows.csv")
    problems: list[Problem] = []
    assert contents(load_rows(path, problems=problems)[0]) == [["a"], ["d"], ["e"]]
    assert [(str(p).partition(": ")[0], p.left_out) for p in problems] == [(f"{path}:3", True), (f"{path}:5", False)]


def test_the_instances_of_a_task_are_rows(tmp_path: Path) -> None:
    instances = [{"input": "i", "output": ["a", "b"]}, {"input": "j", "output": []}, {"input": "k", "output": ["c"]}]
    task = {"Definition": ["Do it."], "Positive Examples": [{"input": "x"}], "Instances": instances}
    for name, content, place in (("t.json", json.dumps(task), ""), ("t.jsonl", json.dumps(task), ":1")):
        path = written(tmp_path, content, name)
        problems: list[Problem] = []
        rows, found = load_rows(path, problems=problems)
        assert found == "natural-instructions"
        assert contents(rows) == [["Do it.\n\ni", "a"], ["Do it.\n\nk", "c"]]
        assert [row.where for row in rows] == [f"{path}{place}: instance 1", f"{path}{place}: instance 3"]
        assert [p.where for p in problems] == [f"{path}{place}: instance 2"]


def test_rows_with_pictures_are_left_out_and_raw_text_that_names_some_is_not(tmp_path: Path) -> None:
    path = written(tmp_path, f"{line(images=['x.png'])}\n{line(images=[])}")
    problems: list[Problem] = []
    assert len(load_rows(path, problems=problems)[0]) == 1
    assert [str(p) for p in problems] == [f"{path}:1: field 'images' holds images: only text can be trained on"]
    assert load_rows(written(tmp_path, '{"text": "a", "images": ["x.png"]}'))[1] == "text"


def test_a_row_without_what_an_order_asks_for_is_told_with_the_key_that_asks(tmp_path: Path) -> None:
    path = written(tmp_path, f"{line(hard=1)}\n{line(hrd=2)}\n")
    problems: list[Problem] = []
    assert [row.score for row in load_rows(path, problems=problems, score="hard")[0]] == [1.0]
    assert str(problems[0]).startswith(f"{path}:2: data.order: by hard: field 'hard' is needed, found")
    assert "Did you mean 'hrd'?" in str(problems[0])


def test_rows_that_say_the_same_are_kept_and_told(tmp_path: Path) -> None:
    path = written(tmp_path, f"{line()}\n{line(prompt='r')}\n{line(meta=1)}\n")
    problems: list[Problem] = []
    assert len(load_rows(path, problems=problems)[0]) == 3
    assert [(str(p), p.left_out) for p in problems] == [(f"{path}:3: says the same as {path}:1", False)]


def test_supervised_training_leaves_out_what_was_not_liked_and_says_so() -> None:
    messages = [Message("user", "q"), Message("assistant", "a")]
    plain, pair = Row(messages, "f:1", "q"), Row(messages, "f:2", "q", rejected=(messages,))
    liked, disliked = Row(messages, "f:3", "q", desirable=True), Row(messages, "f:4", "q", desirable=False)
    rows, notes = for_supervised([plain, pair, liked, disliked])
    assert rows == [plain, pair, liked]
    assert [note[:6] for note in notes] == ["1 rows", "1 rows"]
    assert "was not liked" in notes[0]
    assert "rejected answers" in notes[1]
    assert for_supervised([plain]) == ([plain], [])
    asks = Row([Message("user", "q")], "f:9", "q")
    assert for_supervised([asks, plain])[0] == [asks, plain]
    with raises("data/rows-without-answers"):
        for_supervised([asks, asks])
    with raises("data/no-desirable-answers"):
        for_supervised([disliked])


def test_bad_json_is_refused_with_its_line_and_what_it_should_hold(tmp_path: Path) -> None:
    path = written(tmp_path, '{"data":\n [}', "rows.json")
    assert refused(path, "data/invalid-json").startswith(f"{path}:2: ")
    path = written(tmp_path, json.dumps({"data": [GOOD]}), "rows.json")
    message = refused(path, "data/not-a-list")
    assert "this holds a dict" in message
    assert "'data'" in message


def test_json_by_the_line_is_read_whatever_its_ending(tmp_path: Path) -> None:
    path = written(tmp_path, f"{line()}\nno\n{line(prompt='r')}\n", "rows.json")
    problems: list[Problem] = []
    assert [row.where for row in load_rows(path, problems=problems)[0]] == [f"{path}:1", f"{path}:3"]
    assert [problem.where for problem in problems] == [f"{path}:2"]


def test_csv_rows_with_another_number_of_columns_are_all_reported(tmp_path: Path) -> None:
    path = written(tmp_path, "prompt,completion\nq,a\nq,a,b\nq\n\nq,b\n", "rows.csv")
    first, *lines = refused(path).split("\n")
    assert "2 rows" in first
    assert "(2 can" in first
    assert lines == [
        f"  {path}:3: has 3 columns, the header has 2: ['prompt', 'completion']",
        f"  {path}:4: has 1 columns, the header has 2: ['prompt', 'completion']",
    ]


def test_csv_with_an_open_quote_or_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, 'prompt,completion\nq,a\nq,"open\n', "rows.csv")
    assert "not valid CSV: unexpected end of data" in refused(path)
    path = written(tmp_path, "prompt,completion,prompt\nq,a,r\n", "rows.csv")
    message = refused(path, "data/duplicate-columns")
    assert message.startswith(f"{path}:1: ")
    assert message.endswith("['prompt', 'completion', 'prompt']")


# Groups and the split ------------------------------------------------------------------------------------------------


def test_the_group_of_a_row_is_its_own_or_its_first_question(tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "one"), ("assistant", "a"))]
    table = [{**GOOD, "group": "g"}, {**GOOD, "group": 7}, {**GOOD, "group": ""}, {**GOOD, "group": None}]
    lines = "\n".join(json.dumps(row) for row in table)
    assert [r.group for r in load_rows(written(tmp_path, lines))[0]] == ["g", "7", "q", "q"]
    assert load_rows(written(tmp_path, json.dumps({"messages": turns})))[0][0].group == "one"
    assert load_rows(written(tmp_path, '{"text": "raw"}'))[0][0].group == "raw"


def made(sizes: list[int]) -> list[Row]:
    """Rows of len(sizes) groups, the rows of a group apart from each other."""
    messages = [Message("user", "q"), Message("assistant", "a")]
    rows = [Row(messages, f"f:{g}:{i}", f"g{g}") for g, size in enumerate(sizes) for i in range(size)]
    return sorted(rows, key=lambda row: row.where.split(":")[2])


@pytest.mark.parametrize("sizes", [[1] * 50, [3] * 20, [1, 2, 3, 4, 5] * 6, [40, *[1] * 30]])
@pytest.mark.parametrize("wanted", [1, 7, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_holds_out_exactly_so_many_rows_and_no_group_is_on_both_sides(
    sizes: list[int], wanted: int, seed: int
) -> None:
    rows = made(sizes)
    train, held_out = split(rows, wanted, seed)
    assert len(held_out) == wanted
    assert train
    assert not {r.group for r in train} & {r.group for r in held_out}
    places = [r.where for r in (*train, *held_out)]
    assert len(set(places)) == len(places)
    assert set(places) <= {r.where for r in rows}
    order = [r.where for r in rows]
    assert train == sorted(train, key=lambda r: order.index(r.where)), "rows stay in the order of the file"
    if set(sizes) == {1}:
        assert len(train) + len(held_out) == len(rows), "nothing is lost where groups are single rows"


def test_a_split_follows_from_its_seed() -> None:
    rows = made([1] * 50)
    assert split(rows, 10, 3) == split(rows, 10, 3)
    assert split(rows, 10, 3) != split(rows, 10, 4)


def test_rows_that_are_added_do_not_reorder_the_draw_of_the_others() -> None:
    few, many = made([1] * 50), made([1] * 60)
    before, after = ({r.group for r in split(rows, 10, 0)[1]} for rows in (few, many))
    assert after - before <= {f"g{i}" for i in range(50, 60)}


def test_a_share_is_rounded_to_rows_and_is_at_least_one() -> None:
    rows = made([1] * 50)
    assert [len(split(rows, share, 0)[1]) for share in (0.1, 0.5, 0.05, 0.001)] == [5, 25, 2, 1]


def test_nothing_is_held_out_where_nothing_is_asked_for() -> None:
    rows = made([2, 3])
    assert split(rows, 0, 0) == (rows, [])
    assert split(rows, 0.0, 0) == (rows, [])


def test_large_groups_are_held_out_last() -> None:
    rows = made([30, *[1] * 30])
    assert "g0" not in {r.group for r in split(rows, 20, 0)[1]}


@pytest.mark.parametrize(("sizes", "wanted"), [([1] * 5, 5), ([1] * 5, 6), ([10], 2), ([5, 5], 6)])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(sizes: list[int], wanted: int) -> None:
    with raises("data/held-out-too-large", f"{wanted} of {sum(sizes)} rows in {len(sizes)} groups"):
        split(made(sizes), wanted, 0)
