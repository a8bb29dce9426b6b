"""`graft generate --route`: who answers, and what is said about it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftlm.adapters.save import save_adapter
from graftlm.cli import app
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.load import load_base
from graftlm.model.attach import attach, detach
from graftlm.testing.deltas import move


@pytest.fixture
def adapters(base_folder: Path, tmp_path: Path) -> Path:
    model, tokenizer = load_base(str(base_folder), dtype="float32")
    for seed, name in enumerate(("one", "two")):
        move(attach(model, LoraConfig(r=2)), scale=0.5, seed=seed)
        save_adapter(model, tmp_path / "adapters" / name, tokenizer=tokenizer)
        detach(model)
    return tmp_path / "adapters"


def ask(base: Path, *more: str) -> tuple[str, str]:
    words = ["generate", "question 3", "--base", str(base), "--dtype", "float32", "--max-new-tokens", "8", *more]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_the_adapter_that_a_router_chooses_answers(base_folder: Path, adapters: Path, tmp_path: Path) -> None:
    router = tmp_path / "router.yaml"
    router.write_text(f"name: tasks\nbase: false\namong: [two]\ntasks: {{t: {tmp_path / 'rows.jsonl'}}}\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "question 1", "completion": "yes"}\n')
    text, said = ask(base_folder, "--adapter", str(adapters), "--route", str(router))
    assert "routed to two\n" in said
    assert text == ask(base_folder, "--adapter", str(adapters / "two"))[0]
    assert text != ask(base_folder, "--adapter", str(adapters / "one"))[0]


def test_tokens_are_routed_between_folders(base_folder: Path, adapters: Path) -> None:
    folders = ("--adapter", str(adapters / "two"), "--adapter", str(adapters / "one"))
    text, said = ask(base_folder, *folders, "--route", "arrow")
    assert "routed to arrow(one+two)\n" in said
    assert text == ask(base_folder, "--adapter", str(adapters), "--route", "arrow")[0]


def test_a_router_without_adapters_or_of_no_name_is_refused(base_folder: Path, adapters: Path) -> None:
    wrong = CliRunner().invoke(app, ["generate", "x", "--base", str(base_folder), "--route", "arrow"])
    assert wrong.exit_code == 2
    unknown = ["generate", "x", "--base", str(base_folder), "--adapter", str(adapters), "--route", "arow"]
    assert "unknown-router" in str(getattr(CliRunner().invoke(app, unknown).exception, "code", ""))
