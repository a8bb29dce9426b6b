"""The blocks of README and docs/: Python runs, YAML is a recipe, commands exist.

Nothing is changed in a block. Pages say `smollm2`; here that name leads to a tiny random base, so that they run in
seconds and need nothing installed. README's blocks take rows.jsonl for granted, so it lies in the folder. A page that
says that its rows and adapter are those of the quick start runs after the blocks of that page.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from graftlm.cli import app
from graftlm.combine.config import ComposeConfig
from graftlm.config.schema import build
from graftlm.data.sources.formats import FORMATS
from graftlm.data.sources.load import load_rows
from graftlm.deltas import METHODS
from graftlm.evaluation.task_file import TasksConfig
from graftlm.hub import load, tokenizer
from graftlm.hub.config import BaseConfig
from graftlm.recipe import read_recipe
from graftlm.routing.config import read_router
from tests.docs_run.names import PAGES, ROOT, blocks, title
from tests.errors import raises
from tests.errors.messages import sites

TEXTS = {title(page): page.read_text(encoding="utf-8") for page in PAGES}
SCRIPTS = [name for name, text in TEXTS.items() if blocks(text, "python")]
RECIPES = [(name, line, block) for name, text in TEXTS.items() for line, block in blocks(text, "yaml")]
LINES = [
    (name, command)
    for name, text in TEXTS.items()
    for _, block in blocks(text, "sh")
    for command in block.replace("\\\n", " ").splitlines()
    if command.strip() and not command.startswith("#")
]
QUICK_START = "docs/index.md"
COLLECTING = ("data/unusable-rows", "recipe/unknown-key", "recipe/invalid-value")
"""Codes of errors that list problems of rows or keys, whose texts have no code of their own."""
AFTER_QUICK_START = "Rows and adapter: those of the [quick start](../index.md)."


@pytest.fixture
def smollm2_is_tiny(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name `smollm2` means the tiny base."""
    locate = load.locate

    def found(base: BaseConfig, *, network: bool = False) -> str:
        return str(base_folder) if base.name == "smollm2" else locate(base, network=network)

    monkeypatch.setattr(load, "locate", found)
    monkeypatch.setattr(tokenizer, "locate", found)


@pytest.fixture
def table_of_methods() -> Iterator[None]:
    """What a page adds to the table is taken out again."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.sampled
@pytest.mark.parametrize("page", SCRIPTS)
@pytest.mark.usefixtures("smollm2_is_tiny", "table_of_methods")
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"Where is parcel {n}?", "completion": f"Parcel {n} is on its way."} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    parts = [(page, *part) for part in blocks(TEXTS[page], "python")]
    if AFTER_QUICK_START in TEXTS[page]:
        parts = [(QUICK_START, *part) for part in blocks(TEXTS[QUICK_START], "python")] + parts
    for page, line, block in parts:
        exec(compile("\n" * (line - 1) + block, str(ROOT / page), "exec"), namespace)  # errors name the page's line
    assert namespace.keys() - {"__name__", "__builtins__"}, "the blocks did something"


@pytest.mark.parametrize(("page", "line", "block"), RECIPES, ids=[f"{page}:{line}" for page, line, _ in RECIPES])
def test_a_yaml_block_is_a_recipe(page: str, line: int, block: str, tmp_path: Path) -> None:
    if block.startswith("adapters:"):
        assert build(ComposeConfig, yaml.safe_load(block), source=page).adapters, "a recipe of graft compose"
        return
    if block.startswith("name:"):
        (tmp_path / "router.yaml").write_text(block)
        assert read_router(str(tmp_path / "router.yaml")), "a router"
        return
    if "\ntasks:" in block:
        assert build(TasksConfig, yaml.safe_load(block), source=page).tasks, "a file of tasks"
        return
    assert block.startswith("base:"), f"{page}:{line}: show whole recipes, so that they can be tried and tested"
    (tmp_path / "recipe.yaml").write_text(block)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    base = yaml.safe_load(block)["base"]
    assert recipe.base == (base if isinstance(base, str) else BaseConfig(**base))


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}" for page, line in LINES])
def test_a_command_exists_with_its_options(page: str, line: str, tmp_path: Path) -> None:
    program, *words = shlex.split(re.sub(r"^torchrun --nproc-per-node \d+ -m graftlm ", "graft ", line), comments=True)
    if program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
        assert targets is not None
        assert words[0] in targets[1].split()
    else:
        assert program == "graft", f"{page}: {line}: no test for {program}"
        options = parse(words)
        (tmp_path / "recipe.yaml").write_text("data: {train: rows.jsonl}\ndelta: {method: lora}\n")
        overrides = options.get("overrides") or []
        changed = read_recipe(tmp_path / "recipe.yaml", overrides) != read_recipe(tmp_path / "recipe.yaml")
        assert changed == bool(overrides), "every key=value is a key of a recipe, and says something new"


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters of a `graft` command line, by name; raises for a command or an option that does not exist."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    parameters: dict[str, Any] = command.make_context(command.name, words).params
    return parameters


@pytest.mark.parametrize("line", ["generate --promt x", "data look rows.jsonl", "train", "generate --prompt"])
def test_a_command_that_does_not_exist_would_be_found_out(line: str) -> None:
    with pytest.raises(Exception, match=r"no command|promt|[Mm]issing|requires"):
        parse(line.split())


def test_a_misspelt_override_would_be_found_out(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {train: rows.jsonl}\ndelta: {method: lora}\n")
    with raises("recipe/unknown-key", match="learning_rate"):
        read_recipe(tmp_path / "recipe.yaml", ["train.learning_rat=1"])


def test_the_page_of_formats_shows_every_one_with_a_row_that_is_told_as_such(tmp_path: Path) -> None:
    shown = re.findall(r"\n\n`([\w-]+)`(?:[^\n]+\n)+\n```jsonl\n(.*?)```", TEXTS["docs/row-formats.md"], re.S)
    assert {name for name, _ in shown} == set(FORMATS)
    for name, text in shown:
        (tmp_path / "rows.jsonl").write_text(text)
        rows, found = load_rows(tmp_path.joinpath("rows.jsonl").as_posix())
        assert found == name
        assert len(rows) == 1


def test_the_pages_name_every_mask_and_every_error() -> None:
    from graftlm import errors
    from graftlm.data.chat.masks import MASKS

    for mask in MASKS:
        assert f"| `{mask}`" in TEXTS["docs/how-to/masks.md"]
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.GraftError)]
    for kind in kinds:
        assert kind is errors.GraftError or f"| {kind.__name__} |" in TEXTS["docs/errors.md"]
    assert len(kinds) > 5


def rows_of_errors() -> list[list[str]]:
    """The rows of docs/errors.md: code, class, messages, fix."""
    lines = [line for line in TEXTS["docs/errors.md"].splitlines() if re.match(r"\|.*\| \w+Error \|", line)]
    return [[cell.strip().strip("`") if n < 2 else cell for n, cell in enumerate(cells(line))] for line in lines]


def cells(line: str) -> list[str]:
    return re.split(r" \| ", line.removeprefix("|").removesuffix("|"))


def test_the_page_of_errors_has_every_code_of_the_source_under_its_class_and_no_other() -> None:
    from graftlm import errors

    found = {site.code for site in sites()}
    shown = {code: kind for code, kind, _, _ in rows_of_errors() if code}
    assert shown.keys() == found
    for code, kind in shown.items():
        assert getattr(errors, kind).family == code.partition("/")[0]


def test_the_messages_of_the_page_of_errors_are_those_of_the_code() -> None:
    """Between the dots each message is a part of some text in graftlm/, and of one that has its code."""
    of_code: dict[str, str] = {}
    for site in sites():
        of_code[site.code] = f"{of_code.get(site.code, '')}\n{site.message}"
    texts = []
    for file in (ROOT / "graftlm").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    code = "\n".join(texts)
    rows = rows_of_errors()
    assert len(rows) > 120
    for own, _, messages, _ in rows:
        for message in re.findall(r"`([^`]+)`", messages):
            for part in message.split("..."):
                text = code if own in COLLECTING or not own else of_code[own]
                assert part.strip(" :") in text, f"{message}: no message of {own} has {part!r}"
