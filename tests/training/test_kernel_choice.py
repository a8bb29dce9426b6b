"""A run names what computed it, keeps to that when it goes on, and does without kernels that cannot be built."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import graftlm
from graftlm.errors import TrainingError
from graftlm.kernels import cpu
from graftlm.passes import autotune
from graftlm.passes.autotune import KernelChoice
from graftlm.recipe import Recipe
from tests.kernels.test_cpu import BROKEN, script
from tests.training.test_resume import losses, recipe, stopping_after
from tests.training.together import together

needs_kernels = pytest.mark.skipif(
    bool(cpu.unavailable(torch.device("cpu"), torch.bfloat16)), reason="our kernels cannot be built here"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has built nothing yet."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    cpu._library.cache_clear()
    yield tmp_path / "cache"
    cpu._library.cache_clear()


def in_bf16(base: Path, rows: Path, **changes: Any) -> Recipe:
    return recipe(base, rows, base__dtype="bfloat16", **changes)


def trained(made: Recipe, out: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """(summary, what the run printed)"""
    printed = io.StringIO()
    result = graftlm.train(made, out, console=Console(file=printed, width=300), **options)
    return result.summary, printed.getvalue()


def saved_choices(out: Path) -> list[Any]:
    return [json.loads(f.read_text())["kernels"] for f in sorted((out / "checkpoints").glob("step-*/state.json"))]


# Builds that fail ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_run_does_without_kernels_that_cannot_be_built_and_says_so_once(
    name: str, cache: Path, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, reason = BROKEN[name]
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", text) if text else "no-such-compiler")
    summary, printed = trained(in_bf16(base_folder, rows), tmp_path / "out")
    assert len(losses(tmp_path / "out")) == summary["train"]["steps"] == 6
    assert printed.count(reason) == 1
    assert reason in summary["kernels"]["reason"]
    assert not summary["kernels"]["classes"]
    assert reason in (tmp_path / "out" / "report.html").read_text().replace("&#39;", "'")
    with pytest.raises(TrainingError, match="train.kernels: ours"):
        trained(in_bf16(base_folder, rows, train__kernels="ours"), tmp_path / "pinned")
    assert not (tmp_path / "pinned").exists(), "refused before anything is written"


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("what", ["CXX of several words", "a cache that others can write", "a cache without room"])
def test_a_run_has_kernels_where_they_can_be_built_in_spite_of_the_place(
    what: str, cache: Path, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "CXX of several words":
        ccache = script(tmp_path / "ccache", 'exec "$@"')
        monkeypatch.setenv("CXX", f"{ccache} g++")
    elif what == "a cache without room":
        cache.mkdir()
        (cache / "kernels").write_text("a file where the folder should be")
    else:
        cpu.library()
        for stored in (cache / "kernels").glob("*.so"):
            stored.write_bytes(b"of somebody else")
            stored.chmod(0o666)
        cache.chmod(0o777)
        cpu._library.cache_clear()
    summary, printed = trained(in_bf16(base_folder, rows), tmp_path / "out")
    assert summary["kernels"]["reason"] == ""
    assert {each["operation"] for each in summary["kernels"]["classes"]} >= {"low_rank_linear", "attention"}
    assert "kernels: attention: " in printed


# The choice is a part of the run -------------------------------------------------------------------------------------


def forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, this candidate is the fastest that is measured."""
    monkeypatch.setattr(autotune.Timing, "fastest", lambda self, leave_out="": name)


@pytest.mark.slow
@needs_kernels
def test_a_resumed_run_computes_as_it_began_whatever_would_be_chosen_now(
    cache: Path, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = in_bf16(base_folder, rows)
    with monkeypatch.context() as patch:
        forced("ours", patch)
        unbroken, _ = trained(made, tmp_path / "unbroken")
        stopping_after(3, patch)
        trained(made, tmp_path / "out")
    chosen = {each["by"] for each in saved_choices(tmp_path / "out")[-1]["classes"]}
    assert chosen == {"ours"}
    forced("torch", monkeypatch)
    shutil.rmtree(cache)
    summary, _ = trained(made, tmp_path / "out", resume=True)
    assert summary["kernels"] == unbroken["kernels"]
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "unbroken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other, _ = trained(made, tmp_path / "other")
    assert {each["by"] for each in other["kernels"]["classes"]} == {"torch"}
    assert losses(tmp_path / "other") != losses(tmp_path / "unbroken"), "so the choice can be seen in the bytes"


@pytest.mark.slow
@needs_kernels
def test_a_run_whose_kernels_are_gone_goes_on_with_others_and_says_so(
    cache: Path, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = in_bf16(base_folder, rows)
    with monkeypatch.context() as patch:
        forced("ours", patch)
        stopping_after(3, patch)
        trained(made, tmp_path / "out")
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu._library.cache_clear()
    summary, printed = trained(made, tmp_path / "out", resume=True)
    assert "They are chosen anew" in printed
    assert "no-such-compiler" in summary["kernels"]["reason"]
    assert len(losses(tmp_path / "out")) == 6


def test_another_setting_may_be_resumed_with(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        trained(in_bf16(base_folder, rows), tmp_path / "out")
    summary, printed = trained(in_bf16(base_folder, rows, train__kernels="torch"), tmp_path / "out", resume=True)
    assert summary["kernels"] == KernelChoice("torch").to_json()
    assert 'train.kernels: "auto" -> "torch"' in printed


def test_rows_that_are_not_packed_are_computed_by_the_models_own_code(
    base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    made = in_bf16(base_folder, rows, data__pack=False)
    summary, _ = trained(made, tmp_path / "out")
    assert "own code" in summary["kernels"]["reason"]


def chosen_on_a_rank(base: Path, rows: Path, out: Path) -> Any:
    from graftlm import distributed

    if distributed.rank() == 1:  # its timings would say something else

        def choose(*arguments: Any, **options: Any) -> Any:
            raise AssertionError("the first rank chooses for all")

        import graftlm.training.kernel_choice as module

        module.choose = choose
    os.environ["GRAFT_CACHE"] = str(out / "cache")
    return graftlm.train(in_bf16(base, rows), out / "out").summary["kernels"]


@pytest.mark.slow
@needs_kernels
def test_all_ranks_take_the_choice_of_the_first(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    first, second = together(2, chosen_on_a_rank, base_folder, rows, tmp_path)
    assert first == second
    assert first["classes"]
