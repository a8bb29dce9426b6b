"""builtin:tasks: enough rows, no template and no input on both sides of a split, and the same rows every time."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from graftlm.data.sources.load import load_rows
from graftlm.data.sources.records import BUILTIN
from graftlm.data.sources.source import Row
from graftlm.data.sources.splits import split
from graftlm.data.sources.tasks.sql import DATABASES, ROWS, TABLES, database
from graftlm.data.sources.tasks.table import TASKS, every_row, rows
from graftlm.data.sources.tasks.task import LAYOUTS, ROWS_OF_A_TEMPLATE, task_of
from graftlm.hub.tokenizer import load_tokenizer
from tests.errors import raises

HELD_OUT = 48


def prompt_of(row: Row) -> str:
    return row.messages[0].content


def field_of(name: str, prompt: str) -> str:
    """What is asked about: the prompt without its template."""
    for template in TASKS[name].templates():
        before, after = template.split("{given}")
        if prompt.startswith(before) and prompt.endswith(after):
            return prompt[len(before) : len(prompt) - len(after)]
    raise AssertionError(f"no template of {name}: {prompt}")


def test_there_are_twenty_tasks() -> None:
    assert len(TASKS) == 20
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_split_shares_no_template_and_no_input(name: str) -> None:
    found, _ = load_rows(f"builtin:tasks/{name}")
    train, held_out = split(found, HELD_OUT, seed=0)
    assert len(train) >= 400
    assert len(held_out) == HELD_OUT
    assert not {row.group for row in train} & {row.group for row in held_out}
    assert len({row.group for row in held_out}) == HELD_OUT // ROWS_OF_A_TEMPLATE
    inputs = [field_of(name, prompt_of(row)) for row in found]
    assert len(set(inputs)) == len(inputs), "an input occurs once"
    templates = {row.group: TASKS[name].templates()[int(row.group.partition("/")[2])] for row in found}
    assert len(set(templates.values())) == len(templates)
    for row, text in zip(found, inputs, strict=True):
        assert prompt_of(row) == templates[row.group].replace("{given}", text)


@pytest.mark.parametrize("name", TASKS)
def test_every_template_has_as_many_rows_and_every_phrase_every_layout(name: str) -> None:
    task = TASKS[name]
    assert [len(set(phrases)) for phrases in task.ask] == [4, 4, 4]
    assert set(Counter(row["group"] for row in rows(name)).values()) == {ROWS_OF_A_TEMPLATE}
    whole = [layout.replace("{ask}", "").replace("{given}", "") for layout in LAYOUTS]
    for slot in task.ask:
        for phrase in slot:
            texts = [text for text in task.templates() if phrase in text]
            layouts = {number for text in texts for number, layout in enumerate(LAYOUTS) if _fits(text, layout)}
            assert len(layouts) == len(whole), phrase


def _fits(template: str, layout: str) -> bool:
    before, after = layout.split("{ask}")
    return template.startswith(before) and template.endswith(after) and "Input" * layout.count("Input") in template


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_the_same_each_time_and_others_with_another_seed(name: str) -> None:
    assert rows(name) == rows(name)
    first, second = ({row["prompt"] for row in rows(name, seed)} for seed in (0, 1))
    assert len(first & second) < len(first) / 2


def test_another_process_makes_the_same_rows() -> None:
    code = "from graftlm.data.sources.tasks.table import every_row; import json; print(json.dumps(every_row()))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # the order of a set would show
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == every_row()


def test_the_mixture_has_every_row_of_every_task_in_turn() -> None:
    mixed, name = load_rows("builtin:tasks")
    assert name == "prompt-completion"
    assert not any(row.unread for row in mixed)
    assert [task_of(row.group) for row in mixed[: 2 * len(TASKS)]] == [*TASKS, *TASKS]
    for task in TASKS:
        alone = [(row["prompt"], row["group"]) for row in rows(task)]
        assert [(prompt_of(row), row.group) for row in mixed if task_of(row.group) == task] == alone
    assert len({row["prompt"] for row in every_row()}) == len(mixed)


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with raises("data/no-such-data-set", match="Did you mean 'tasks/iso-date'"):
        load_rows("builtin:tasks/iso-dat")
    with raises("data/no-such-data-set"):
        load_rows("builtin:docstrings/iso-date")


def test_the_cache_of_rows_knows_every_file_that_makes_them() -> None:
    files = {file.name for file in BUILTIN["tasks/sql"].files()}
    assert {"task.py", "words.py", "sql.py", "table.py"} <= files
    assert BUILTIN["tasks"].files() == BUILTIN["tasks/sql"].files()


@pytest.mark.smollm2
def test_rows_are_short(smollm2: str) -> None:
    tokenizer = load_tokenizer(smollm2)
    texts = [f"{row['prompt']}\n{row['completion']}" for row in every_row()]
    assert max(map(len, tokenizer(texts).input_ids)) <= 100


def test_no_number_occurs_twice_in_a_column_of_a_database() -> None:
    for number in range(DATABASES):
        statements = database(number)
        assert len(statements) == len(TABLES) * (1 + ROWS)
        for table, columns in TABLES.items():
            values = [re.findall(r"-?\d+", s) for s in statements if s.startswith(f"INSERT INTO {table} ")]
            for column in zip(*values, strict=True):
                assert len(set(column)) == ROWS
            assert len(values[0]) == len(columns)
