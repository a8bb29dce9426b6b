"""The built-in data set: real functions of the running Python, and nothing of the answer in the question."""

import ast
from pathlib import Path

import pytest

from graftlm.data.sources import docstrings


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return docstrings.rows()


@pytest.mark.slow
def test_there_are_thousands_of_rows_and_no_question_twice(rows: list[dict[str, str]]) -> None:
    assert len(rows) > 3000
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(row.keys() == {"prompt", "completion", "group"} for row in rows)


def test_every_question_is_one_whole_function_without_a_docstring(rows: list[dict[str, str]]) -> None:
    for row in rows:
        (function,) = ast.parse(row["prompt"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef), row["group"]
        assert ast.get_docstring(function) is None, row["group"]


def test_answers_are_one_line_of_moderate_length(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert "\n" not in row["completion"]
        assert row["completion"] == row["completion"].strip()
        assert 15 <= len(row["completion"]) <= 160
        assert 60 <= len(row["prompt"]) <= 800


def test_groups_are_modules_of_the_standard_library(rows: list[dict[str, str]]) -> None:
    root = Path(ast.__file__).parent
    groups = {row["group"] for row in rows}
    assert len(groups) > 200
    assert all((root / group).is_file() and group.endswith(".py") for group in groups)
    assert not any("test" in Path(group).parts or "site-packages" in group for group in groups)


def test_the_rows_are_the_same_each_time_and_stand_in_the_order_of_modules(rows: list[dict[str, str]]) -> None:
    groups = list(dict.fromkeys(row["group"] for row in rows))
    assert groups == [g.as_posix() for g in sorted(map(Path, groups))]
    assert len(groups) < len(rows)


SENTENCES = {
    "Return x.": "Return x.",
    "Return x": "Return x",
    "Return x.  And more.": "Return x.",
    "Return x\nin two lines.\n\nMore.": "Return x in two lines.",
    "A title\n\nReturn x.": "A title",
    "\n    Return x.\n    Then y.\n    ": "Return x.",
    "Like e.g. This or i.e. That. More.": "Like e.g. This or i.e. That.",
    "Version 3.5 or file.txt is read. Yes": "Version 3.5 or file.txt is read.",
    "Is it so? Then return.": "Is it so?",
    "Stop! Now.": "Stop!",
    "Ends with dots... and goes on. Next": "Ends with dots... and goes on.",
    "": "",
}


@pytest.mark.parametrize("docstring", SENTENCES)
def test_the_first_sentence_ends_where_a_reader_would_end_it(docstring: str) -> None:
    assert docstrings.first_sentence(docstring) == SENTENCES[docstring]


MODULE = '''
class C:
    @decorated
    def method(self, x):
        # before
        """Say what the method does.

        More.
        """
        text = """
  less indented
"""

        return [
            x, text]

    async def waits(self, something_long_enough_to_count):
        "Wait for something to happen."
        await something_long_enough_to_count
        await something_long_enough_to_count
        return 1

    def one_line(self): """Is too short to be kept."""; return "something that is long enough to be kept by far"

    def nothing_but_a_docstring(self, something, something_else, something_else_again):
        """There is nothing to describe.

        At all.
        """
'''


def test_a_function_is_cut_out_of_its_file_dedented_and_without_its_docstring(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(MODULE)
    method = (
        'def method(self, x):\n    # before\n    text = """\nless indented\n"""\n    return [\n        x, text]',
        "Say what the method does.",
    )
    waits = (
        "async def waits(self, something_long_enough_to_count):\n"
        "    await something_long_enough_to_count\n    await something_long_enough_to_count\n    return 1",
        "Wait for something to happen.",
    )
    assert list(docstrings._functions(file)) == [method, waits]


def test_a_file_that_is_no_python_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\ndef f(): pass\n")
    assert [list(docstrings._functions(tmp_path / name)) for name in ("broken.py", "latin.py")] == [[], []]


def test_a_form_feed_does_not_shift_the_lines(tmp_path: Path) -> None:
    file = tmp_path / "paged.py"
    file.write_text(
        'import os\n\x0c\n# another page\n\ndef one(a, b):\n    """Add a to b, whatever they are."""\n'
        "    total = a + b\n    print('the sum of the two is', total)\n    return total\n"
    )
    ((code, sentence),) = docstrings._functions(file)
    assert sentence == "Add a to b, whatever they are."
    assert code.startswith("def one(a, b):\n    total = a + b")
    assert code.endswith("return total")
