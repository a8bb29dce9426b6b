"""Python and the command line ask an adapter with the chat template that it was trained with."""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import graftlm
import graftlm.generation.answer as answer_module
from graftlm.adapters.chat import template_of
from graftlm.adapters.folder import TEMPLATE
from graftlm.adapters.load import load_adapter, load_with_adapters
from graftlm.adapters.save import save_adapter
from graftlm.cli import app
from graftlm.cli.chat import CHAT_HELP
from graftlm.config.schema import build
from graftlm.data.chat import render
from graftlm.data.sources.formats import Message
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import DataError
from graftlm.hub.load import load_base
from graftlm.model.attach import attach, detach
from graftlm.model.registry import attachment
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.run import Result
from graftlm.runs import check_page
from graftlm.testing.tiny import CHATML, save_tiny_base, tiny_tokenizer
from graftlm.training import run_folder
from tests.adapters.folders import write_record
from tests.errors import raises

OTHER = CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")


@pytest.fixture
def adapter(base_folder: Path, tmp_path: Path) -> Path:
    """An adapter that was trained with another template than its base has."""
    model = load_base(str(base_folder)).model
    attach(model, LoraConfig(r=2))
    return save_adapter(model, tmp_path / "adapter", tokenizer=tiny_tokenizer(OTHER))


def asked(
    model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    conversation: str | Sequence[Message] = "hello",
    **rendering: Any,
) -> str:
    """The prompt that `answer` gives the model."""
    seen: list[list[int]] = []

    def generated(model: Any, prompts: Any, **_: Any) -> Any:
        seen.extend(list(prompt) for prompt in prompts)
        return iter([(0, [])])

    monkeypatch.setattr("graftlm.generation.answer.generate", generated)
    graftlm.answer(model, tokenizer, conversation, **rendering)
    return str(tokenizer.decode(seen[0]))


def test_python_and_the_command_line_ask_alike(
    adapter: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_base(str(base_folder))
    own = asked(model, tokenizer, monkeypatch)
    said = load_adapter(model, adapter)
    assert "answers use its chat template" in said
    assert "edited" not in said
    by_python = asked(model, tokenizer, monkeypatch)
    by_command = asked(*load_with_adapters(str(base_folder), [adapter])[:2], monkeypatch)
    assert by_python == by_command
    assert by_python.endswith("<|im_start|>bot\n")
    assert own != by_python
    detach(model)
    assert asked(model, tokenizer, monkeypatch) == own


def test_a_template_that_was_edited_is_said(adapter: Path, base_folder: Path) -> None:
    (adapter / TEMPLATE).write_text(CHATML)
    assert "it was edited" in load_adapter(load_base(str(base_folder)).model, adapter)


def test_of_two_templates_the_last_is_used_and_that_is_said(adapter: Path, base_folder: Path, tmp_path: Path) -> None:
    model = load_base(str(base_folder)).model
    attach(model, LoraConfig(r=2), name="second")
    second = save_adapter(model, tmp_path / "second", name="second", tokenizer=tiny_tokenizer(CHATML))
    detach(model)
    load_adapter(model, adapter, name="first")
    assert "in place of that of first, which is another one" in load_adapter(model, second, name="second")
    assert template_of(model) == CHATML
    detach(model, "second")
    assert template_of(model) == OTHER
    assert list(attachment(model).chats) == ["first"]


def test_what_may_be_published_names_no_folder_of_this_machine(base_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(base_folder))
    attach(model, LoraConfig(r=2))
    folder = save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    for file in ("README.md", "adapter_config.json", "graftlm.json"):
        text = (folder / file).read_text()
        assert str(base_folder) not in text
        assert str(base_folder.parent) not in text
    assert f"base_model: {base_folder.name}\n" in (folder / "README.md").read_text()


# The day that a template writes, and the order of turns ---------------------------------------------------------------

DATED = "{{ strftime_now('%d %B %Y') }}\n" + CHATML
DAY, LATER = datetime.date(2026, 3, 1), datetime.date(2026, 4, 2)
SYSTEM = {"role": "system", "content": "Be brief."}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def _at(day: datetime.date) -> type[datetime.datetime]:
    """A datetime whose now() is late on that day."""

    class Now(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.combine(day, datetime.time(23, 50))

    return Now


def on(day: datetime.date, patch: pytest.MonkeyPatch) -> None:
    """As if it were that day for the whole process."""

    class Today(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return datetime.date(day.year, day.month, day.day)

    patch.setattr(run_folder, "datetime", SimpleNamespace(datetime=_at(day)))
    for module in (render, answer_module):
        patch.setattr(module, "datetime", SimpleNamespace(date=Today))


def trained(base: Path, folder: Path, template: str, **data: Any) -> Result:
    (folder / "chat.jinja").write_text(template)
    before = data.pop("before", [])
    rows = [{"messages": [*before, *turns("a", "b")]} for _ in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "base": {"name": str(base), "dtype": "float32", "template": str(folder / "chat.jinja")},
        "data": {"train": str(folder / "rows.jsonl"), **data},
        "train": {"steps": 1, "batch_rows": 4},
    }
    return graftlm.train(build(Recipe, tree, source="test"), folder / "out")


def turns(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def test_an_adapter_is_asked_on_the_day_of_its_training(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        on(DAY, patch)
        result = trained(base_folder, tmp_path, DATED)
    on(LATER, monkeypatch)
    assert json.loads((tmp_path / "out" / "graftlm.json").read_text())["today"] == "2026-03-01"
    assert asked(result.model, result.tokenizer, monkeypatch).startswith("01 March 2026\n")
    model, tokenizer = load_base(str(base_folder))
    said = load_adapter(model, tmp_path / "out")
    assert "which writes the day of training, 2026-03-01" in said
    assert asked(model, tokenizer, monkeypatch).startswith("01 March 2026\n")
    assert asked(model, tokenizer, monkeypatch, today=LATER).startswith("02 April 2026\n")
    again = save_adapter(model, tmp_path / "again", tokenizer=result.tokenizer)
    assert json.loads((again / "graftlm.json").read_text())["today"] == "2026-03-01"
    detach(model)
    tokenizer.chat_template = DATED
    assert asked(model, tokenizer, monkeypatch).startswith("02 April 2026\n"), "without an adapter: the present day"


def test_an_adapter_whose_template_writes_no_date_keeps_none(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, tmp_path, CHATML)
    kept = json.loads((tmp_path / "out" / "graftlm.json").read_text())
    assert (kept["today"], kept["turn_order"]) == (None, "refuse")


def test_a_day_that_is_none_is_refused(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, tmp_path, CHATML)
    file = tmp_path / "out" / "graftlm.json"
    write_record(file.parent, json.loads(file.read_text()) | {"today": "1 March"})
    with raises("adapter/invalid-date", match=r"graftlm.json: today: '1 March'"):
        load_adapter(load_base(str(base_folder)).model, tmp_path / "out")


def test_rows_page_and_held_out_answers_have_one_day(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns("a", "b")}) + "\n")
    config = graftlm.DataConfig(train=str(tmp_path / "rows.jsonl"))
    on(DAY, monkeypatch)
    tokenizer = tiny_tokenizer(DATED)
    data = prepare_data(Recipe(base=str(base_folder), data=config), tokenizer, look=True)
    on(LATER, monkeypatch)  # midnight passes
    page = check_page.html(data, config, title="t")
    (script,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    shown = "".join(token[0] for token in json.loads(script)[0]["tokens"])
    assert shown.startswith("01 March 2026\n")
    assert tokenizer.decode(data.examples[0].answers[0].ids).startswith("01 March 2026\n")
    assert tokenizer.decode(data.renderer.prompt(data.rows[0].messages[:1])).startswith("01 March 2026\n")


def test_a_chat_keeps_the_turn_order_of_training(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(base_folder, tmp_path, NO_SYSTEM, before=[SYSTEM], turn_order="merge")
    model, tokenizer = load_base(str(base_folder))
    said = [Message("system", "Be brief."), Message("user", "hello")]
    load_adapter(model, tmp_path / "out")
    assert "<|im_start|>user\nBe brief.\n\nhello<|im_end|>" in asked(model, tokenizer, monkeypatch, said)
    dropped = asked(model, tokenizer, monkeypatch, said, turn_order="drop")
    assert "Be brief." not in dropped
    assert "<|im_start|>user\nhello<|im_end|>" in dropped
    with raises(
        "data/template-refuses-conversation",
        match="turn_order: merge .*, --turn-order of graft chat",
    ):
        asked(model, tokenizer, monkeypatch, said, turn_order="refuse")


@pytest.mark.parametrize(
    "source",
    [NO_SYSTEM, "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML],
    ids=["refuses", "drops"],
)
def test_chat_says_at_once_that_there_is_no_place_for_a_system_message(source: str, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", template=source)
    talk = ["chat", "--base", str(base), "--system", "Be brief.", "--max-new-tokens", "2"]
    refused = CliRunner().invoke(app, talk, input="hello\n")
    assert isinstance(refused.exception, DataError)
    assert "--turn-order" in str(refused.exception)
    assert CHAT_HELP not in refused.output
    for how in ("merge", "drop"):
        assert CliRunner().invoke(app, [*talk, "--turn-order", how], input="hello\n").exit_code == 0
    wrong = CliRunner().invoke(app, [*talk, "--turn-order", "merg"], input="")
    assert wrong.exit_code == 2
    assert "Did you mean 'merge'" in wrong.output
    wrong = CliRunner().invoke(app, ["generate", "a", "--base", str(base), "--today", "1 May"])
    assert (wrong.exit_code, "no date" in wrong.output) == (2, True)


RUNS: dict[str, dict[str, Any]] = {
    "supervised": {"data": {"held_out": 2}, "select": {"by": "perplexity", "keep": 4}},
    "rl": {"data": {"held_out": 2}, "loss": "dpo", "rl": {"scorer": {"by": "exact"}, "max_new_tokens": 4}},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_renderer_of_a_run_has_the_day_on_which_it_began(
    name: str, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days: list[datetime.date] = []
    own = render.Renderer.__init__

    def noted(self: Any, *args: Any, **options: Any) -> None:
        own(self, *args, **options)
        days.append(self.today)

    monkeypatch.setattr(render.Renderer, "__init__", noted)
    on(LATER, monkeypatch)
    monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(datetime=_at(DAY)))  # then midnight passes
    (tmp_path / "chat.jinja").write_text(DATED)
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = RUNS[name] | {
        "base": {"name": str(base_folder), "dtype": "float32", "template": str(tmp_path / "chat.jinja")},
        "data": RUNS[name]["data"] | {"train": str(tmp_path / "rows.jsonl")},
        "train": {"steps": 1, "batch_rows": 2},
        "report": {"answers": 1, "max_new_tokens": 2},
    }
    graftlm.train(build(Recipe, tree, source="test"), tmp_path / "out")
    assert set(days) == {DAY}
    assert json.loads((tmp_path / "out" / "graftlm.json").read_text())["today"] == DAY.isoformat()
