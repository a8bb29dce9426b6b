"""Scores of builtin:tasks: a row's own answer is right, that of another row is wrong, and answers are checked by code
that did not make them."""

import json
import re
import sqlite3
from collections.abc import Callable
from datetime import datetime

import pytest

from graftlm.data.sources.formats import Message
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import Row
from graftlm.data.sources.tasks.table import TASKS, rows
from graftlm.evaluation.tasks import SAME, same_json, same_rows, same_text, score
from tests.errors import raises


@pytest.mark.parametrize("name", TASKS)
def test_a_row_s_own_answer_is_right_and_that_of_another_row_is_wrong(name: str) -> None:
    found, _ = load_rows(f"builtin:tasks/{name}")
    answers = [row.messages[-1].content for row in found]
    for index, row in enumerate(found):
        own, other = answers[index], answers[(index + 1) % len(answers)]
        assert score(row, own) == 1
        assert score(row, f"\n{own} ") == 1
        assert score(row, other) == (own == other)
        assert score(row, "") == 0
        assert score(row, f"Sure! {own}") == 0
        assert score(row, own[:-1] if name != "sql" else own[:-2] + "x") == 0


def test_every_task_is_compared_in_a_way_that_there_is() -> None:
    assert {task.answer for task in TASKS.values()} == set(SAME)


# Answers, by other means than those that made them -------------------------------------------------------------------


def _date(text: str) -> str:
    for pattern in ("%B %d, %Y", "%d %B %Y"):
        try:
            return datetime.strptime(text, pattern).strftime("%Y-%m-%d")
        except ValueError:
            continue
    raise AssertionError(text)


def _roman(text: str) -> str:
    """A numeral for each decimal digit."""
    name, number = text.split()
    tens, ones = divmod(int(number), 10)
    return f"{name} {_places('X', 'L', 'C')[tens]}{_places('I', 'V', 'X')[ones]}"


def _places(one: str, five: str, ten: str) -> list[str]:
    return ["", one, one * 2, one * 3, one + five, five, five + one, five + one * 2, five + one * 3, one + ten]


def _csv(text: str) -> str:
    header, *lines = (line.split(",") for line in text.split("\n"))
    cells = [{key: int(v) if v.isdigit() else v for key, v in zip(header, line, strict=True)} for line in lines]
    return json.dumps(cells)


def _pairs(text: str) -> str:
    found = dict(re.findall(r"(\w+): ([^;]+)", text))
    return json.dumps({key: int(value) if value.isdigit() else value for key, value in found.items()})


def _contact(text: str) -> str:
    (email,) = re.findall(r"\S+@[\w.]+\w", text.replace("(", ""))
    first, last = re.findall(r"(\w+)@(\w+)", email)[0]
    return json.dumps({"name": f"{first.title()} {last.title()}", "email": email})


CHECKS: dict[str, Callable[[str], str]] = {
    "reverse-words": lambda text: " ".join(text.split()[::-1]),
    "sort-words": lambda text: ", ".join(sorted(text.split(", "))),
    "snake-case": lambda text: text.lower().replace(" ", "_"),
    "camel-case": lambda text: re.sub(r" (\w)", lambda m: m[1].upper(), text),
    "shift-letters": lambda text: text.translate({97 + i: 97 + (i + 1) % 26 for i in range(26)}),
    "iso-date": _date,
    "clock-24h": lambda text: datetime.strptime(text, "%I:%M %p").strftime("%H:%M"),
    "phone": lambda text: "+1-" + "-".join(re.findall(r"\d+", text)),
    "contact-json": _contact,
    "pairs-json": _pairs,
    "csv-json": _csv,
    "add": lambda text: str(sum(map(int, text.split(" + ")))),
    "roman": _roman,
}


@pytest.mark.parametrize("name", CHECKS)
def test_answers_are_those_of_another_computation(name: str) -> None:
    templates = TASKS[name].templates()
    for row in rows(name):
        start, end = templates[int(row["group"].partition("/")[2])].split("{given}")
        given = row["prompt"].removeprefix(start).removesuffix(end)
        assert SAME[TASKS[name].answer](CHECKS[name](given), row["completion"]), row


# Comparisons ---------------------------------------------------------------------------------------------------------


def test_texts_are_the_same_without_white_space_at_their_ends() -> None:
    assert same_text("a b", " a b\n")
    assert not same_text("a b", "a  b")
    assert not same_text("a b", "A b")


def test_json_is_the_same_whatever_its_spaces_and_order() -> None:
    wanted = '{"a": 1, "b": ["x", true]}'
    assert same_json(wanted, '{"b":["x",true],\n "a":1}')
    for other in (
        '{"a": 1}',
        '{"a": "1", "b": ["x", true]}',
        '{"a": 1.0, "b": ["x", true]}',
        '{"a": 1, "b": ["x", 1]}',
    ):
        assert not same_json(wanted, other)
    for broken in ("", "{", f"{wanted} and more", f"```json\n{wanted}\n```", "[" * 100_000):
        assert not same_json(wanted, broken)


def test_queries_are_the_same_if_they_give_the_same_rows() -> None:
    wanted = "SELECT name FROM books WHERE year > 1990;"
    assert same_rows(wanted, "select b.name from books as b where not b.year <= 1990 order by price")
    assert not same_rows(wanted, "SELECT name FROM books WHERE year > 1960;")
    assert not same_rows(wanted, "SELECT name, year FROM books WHERE year > 1990;")
    ordered = "SELECT name FROM books ORDER BY year LIMIT 3;"
    assert same_rows(ordered, "SELECT name FROM books ORDER BY year ASC LIMIT 3")
    assert not same_rows(ordered, "SELECT * FROM (SELECT name FROM books ORDER BY year LIMIT 3) ORDER BY name;")


REFUSED = {
    "nothing": "",
    "a comment": "-- SELECT name FROM books",
    "no SQL": "The answer is 3.",
    "two statements": "SELECT name FROM books; SELECT name FROM books;",
    "writing": "INSERT INTO books VALUES ('x', 1, 2, 3)",
    "dropping": "DROP TABLE books",
    "another file": "ATTACH DATABASE 'x.db' AS x",
    "settings": "PRAGMA query_only = 1",
    "an unknown function": "SELECT load_extension('x')",
    "a function of memory": "SELECT randomblob(1000000000)",
    "without an end": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
    "far too long": "SELECT COUNT(*) FROM books, books b, books c, books d, books e, books f",
    "a null character": "SELECT name FROM books\0",
    "half of a surrogate": "SELECT name FROM books \udc80",
}


@pytest.mark.parametrize("query", REFUSED.values(), ids=REFUSED)
def test_what_may_not_run_is_wrong_and_leaves_the_databases_as_they_are(query: str) -> None:
    wanted = "SELECT COUNT(*) FROM books;"
    assert not same_rows(wanted, query)
    assert same_rows(wanted, "SELECT 40")


def test_a_query_of_the_task_that_does_not_run_is_not_hidden() -> None:
    with pytest.raises(sqlite3.Error):
        same_rows("SELECT nothing FROM nowhere", "SELECT 1")


# Errors --------------------------------------------------------------------------------------------------------------


def test_rows_of_no_task_are_refused_with_the_nearest_name() -> None:
    said = [Message("user", "q"), Message("assistant", "a")]
    with raises("data/no-such-task", match=r"f:3: group 'sqll/3' .* Did you mean 'sql'\?"):
        score(Row(said, "f:3", "sqll/3"), "a")
    with raises("data/no-such-task"):
        score(Row(said, "f:3", "q"), "a")
    with raises("data/no-reference-answer", match="f:3"):
        score(Row(said[:1], "f:3", "sql/3"), "a")
