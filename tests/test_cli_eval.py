"""`graft eval`: what it writes, and that a killed run goes on to the same file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graftlm.evaluation import evaluate as evaluating
from graftlm.generation import prefix_store  # noqa: F401 (imported before a test replaces what asks)
from graftlm.testing import tiny_tokenizer
from tests.errors import raises
from tests.generation.adapters import base, write_adapter
from tests.test_cli import graft


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, rows and tasks."""
    made = tmp_path_factory.mktemp("eval")
    base().save_pretrained(made / "base")
    tiny_tokenizer().save_pretrained(made / "base")
    for name, seed in (("one", 1), ("two", 2)):
        write_adapter(made / name, seed)
    rows = ({"q": f"question {n}", "a": "yes" if n % 3 else "no", "c": ["yes", "no"]} for n in range(20))
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "tasks.yaml").write_text(
        f"""base: {made / "base"}
tasks:
  said: {{rows: {made / "rows.jsonl"}, prompt: ["{{q}}?", "Well, {{q}}?"], answer: "{{a}}", max_new_tokens: 5,
          metrics: [token_f1, rouge_l]}}
  chosen: {{rows: {made / "rows.jsonl"}, kind: choice, prompt: "{{q}}", choices: "{{c}}", answer: "{{a}}"}}
"""
    )
    return made


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    adapters = ("--adapter", str(folder / "one"), "--adapter", str(folder / "two"))
    return ["eval", str(folder / "tasks.yaml"), *adapters, "--dtype", "float32", "--out", str(out), *more]


def test_tasks_of_a_file_by_base_and_adapters(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    shown = graft(*arguments(folder, out))
    assert shown.exit_code == 0
    found = json.loads(out.read_text())
    assert list(found["tasks"]) == ["said", "chosen"]
    assert list(found["tasks"]["chosen"]) == ["base", "one", "two"]
    assert found["tasks"]["chosen"]["one"]["acc"].keys() == {"value", "low", "high", "n"}
    assert len(found["tasks"]["said"]["two"]["token_f1"]["templates"]["values"]) == 2
    assert found["adapters"] == {"one": str(folder / "one"), "two": str(folder / "two")}
    for text in ("token_f1", "chosen: 20 rows", "one - base", "(Holm)"):
        assert text in shown.stdout
    for line in shown.stdout.splitlines():
        assert ("no difference found" in line) == ("would have been found" in line), line

    with raises("output/already-exists"):
        graft(*arguments(folder, out))
    before = out.read_bytes()
    assert graft(*arguments(folder, out, "--overwrite", "--json")).exit_code == 0
    assert out.read_bytes() == before
    limited = json.loads(graft(*arguments(folder, out, "--overwrite", "--json", "--limit", "6")).stdout)
    assert limited["tasks"]["said"]["base"]["rouge_l"]["n"] == 6


class _Stop(Exception):
    pass


def test_an_interrupted_command_goes_on_to_the_same_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert graft(*arguments(folder, whole)).exit_code == 0
    plain, calls = evaluating.answers, []

    def interrupted(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise _Stop
        return plain(*given)

    monkeypatch.setattr(evaluating, "answers", interrupted)
    with pytest.raises(_Stop):
        graft(*arguments(folder, cut))
    assert not cut.exists()
    assert len((tmp_path / "cut.json.journal").read_text().splitlines()) == 1 + 20
    assert graft(*arguments(folder, cut)).exit_code == 0
    assert len(calls) == 3 + 2, "what was there was not asked again"
    assert cut.read_bytes() == whole.read_bytes()
    with raises("output/other-evaluation"):
        cut.unlink()
        graft(*arguments(folder, cut, "--limit", "3"))


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_file(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert graft(*arguments(folder, whole)).exit_code == 0
    journal, lines = tmp_path / "cut.json.journal", [0]
    for wanted in (1, 17):
        process = subprocess.Popen(
            [sys.executable, "-c", "from graftlm.cli import main; main()", *arguments(folder, cut)],
            env=os.environ.copy(),
        )
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if journal.is_file() and journal.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
        lines.append(journal.read_bytes().count(b"\n"))
    assert lines[2] >= lines[1] > 0
    if cut.exists():
        pytest.skip("it was faster than the kill")
    assert graft(*arguments(folder, cut)).exit_code == 0
    assert cut.read_bytes() == whole.read_bytes()


def test_held_out_rows_of_a_recipe(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"base: {{name: {folder / 'base'}, dtype: float32}}\n"
        f"data: {{train: {tmp_path / 'train.jsonl'}, held_out: 3}}\n"
        "delta: {method: lora}\ntrain: {steps: 1}\nreport: {max_new_tokens: 4}\n"
    )
    rows = (json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) for n in range(12))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    out = tmp_path / "eval.json"
    graft("eval", str(tmp_path / "recipe.yaml"), "--adapter", str(folder / "one"), "--out", str(out))
    found = json.loads(out.read_text())["tasks"]
    assert found["held_out"]["one"]["rouge_l"]["n"] == 3
    assert found["held_out_loss"]["base"]["nats_per_token"]["value"] > 0


def test_builtin_tasks_need_no_file_and_take_the_base_of_the_adapter(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    given = ("--adapter", str(folder / "one"), "--limit", "2", "--base", str(folder / "base"))
    assert graft("eval", "builtin:tasks/roman", *given, "--out", str(out)).exit_code == 0
    assert json.loads(out.read_text())["tasks"]["roman"]["one"]["task_score"]["n"] == 2


def test_folders_of_one_name_have_numbers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    again = tmp_path / "again" / "one"
    write_adapter(again, 3)
    given = ("--adapter", str(folder / "one"), "--adapter", str(again), "--limit", "2", "--base", str(folder / "base"))
    graft("eval", "builtin:tasks/add", *given, "--dtype", "float32", "--out", str(out))
    assert list(json.loads(out.read_text())["adapters"]) == ["1-one", "2-one"]


def test_what_is_wrong_in_a_file_of_tasks_is_said_with_its_line(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text("tasks:\n  a:\n    rows: x.jsonl\n    promt: hello\n")
    with raises("recipe/unknown-key", match=r"tasks.yaml:4: tasks.a.promt.*prompt"):
        graft("eval", str(file), "--base", str(folder / "base"), "--out", str(tmp_path / "e.json"))
    file.write_text("tasks: {}\n")
    with raises("recipe/invalid-value", match="no tasks"):
        graft("eval", str(file), "--base", str(folder / "base"), "--out", str(tmp_path / "e.json"))
    file.write_text("tasks: {a: {rows: 'builtin:tasks/add'}}\n")
    shown = graft("eval", str(file), "--out", str(tmp_path / "e.json"))
    assert shown.exit_code == 2
    assert "--base" in shown.output
