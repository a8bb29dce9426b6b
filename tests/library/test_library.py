"""The index follows from the folders, a changed byte is found, and nothing is lost when processes meet or die."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.folder import adapters_in
from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.library import library as module
from graftlm.library.entry import ABOUT, Entry, Score, entry_of
from graftlm.library.library import DRAFTS, INDEX, REMOVED, add, read_library, remove, repair, scan, verify, writing_to
from graftlm.lock import only_writer
from graftlm.model.attach import attach, detach
from graftlm.testing import save_tiny_base, tiny_model
from graftlm.testing.deltas import attach_tiny, move
from tests.errors import raises
from tests.library.adapters import edit, write


def of_ours(folder: Path, seed: int = 0, model: Any = None, **changes: Any) -> Path:
    model = model or tiny_model()
    attach(model, LoraConfig(r=3, alpha=6, targets=("q_proj", "up_proj"), **changes), seed=seed)
    save_adapter(move(model, seed=seed), folder)
    detach(model)
    return folder


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A library of two of another tool's adapters and one of ours."""
    folder = tmp_path / "shelf"
    add(folder, write(tmp_path / "one", 1), description="cooks soup", licence="MIT", scores={"exact": Score(value=0.5)})
    add(folder, write(tmp_path / "two", 2, 3))
    add(folder, of_ours(tmp_path / "ours"), scores={"exact": Score(value=0.75, n=40)})
    return folder


def entries(folder: Path) -> dict[str, Entry]:
    return dict(read_library(folder).entries)


def test_an_entry_says_what_the_folder_holds(shelf: Path) -> None:
    found = entries(shelf)
    assert list(found) == ["one", "ours", "two"]
    one, ours = found["one"], found["ours"]
    assert (one.method, one.sites, one.ranks, one.base) == ("lora", 2, (4,), "tiny")
    assert one.targets == ("down_proj", "q_proj")
    assert one.base_fingerprint is one.data is None
    assert (one.description, one.licence, one.scores) == ("cooks soup", "MIT", {"exact": Score(value=0.5)})
    assert (ours.method, ours.sites, ours.ranks) == ("lora", 4, (3,))
    assert ours.base_fingerprint == Adapter.read(shelf / "ours").base["digest"]  # type: ignore[index]
    assert ours.scores["exact"].n == 40
    assert ours.created is not None
    assert one.bytes == (shelf / "one" / "adapter_model.safetensors").stat().st_size
    assert found["two"].ranks == (3,)


def test_a_folder_that_was_put_there_by_hand_is_an_adapter_of_which_less_is_known(shelf: Path, tmp_path: Path) -> None:
    write(shelf / "by-hand", 5)
    assert "by-hand is not in the index" in read_library(shelf).problems
    assert [finding.name for finding in verify(shelf)] == ["by-hand"]
    assert repair(shelf) == ["by-hand was added to the index"]
    assert verify(shelf) == []
    found = entries(shelf)["by-hand"]
    assert found.description is found.licence is found.created is found.data is None
    assert found.scores == {}


@pytest.mark.parametrize("method", ["ia3", "oft", "prefix", "dora", "houlsby", "bitfit", "melora"])
def test_methods_that_are_no_lora_have_entries_too(method: str, tmp_path: Path) -> None:
    model = tiny_model()
    attach_tiny(method, model)
    save_adapter(model, tmp_path / "one")
    assert entry_of(tmp_path / "one").method == method


def test_the_index_is_made_again_from_the_folders_byte_for_byte(shelf: Path, tmp_path: Path) -> None:
    before = (shelf / INDEX).read_bytes()
    (shelf / INDEX).unlink()
    found = read_library(shelf)
    assert list(found.entries) == ["one", "ours", "two"]
    assert "made from the folders" in found.problems[0]
    assert "is missing" in verify(shelf)[0].why
    repair(shelf)
    assert (shelf / INDEX).read_bytes() == before
    assert verify(shelf) == []
    other = tmp_path / "other"  # the same folders that came in another order
    for name in ("two", "ours", "one"):
        shutil.copytree(shelf / name, other / name)
        repair(other)
    assert (other / INDEX).read_bytes() == before


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["one", "ours"])
def test_every_changed_byte_is_found(shelf: Path, name: str) -> None:
    assert verify(shelf) == []
    for file in (shelf / name).iterdir():
        kept = file.read_bytes()
        for at in (0, len(kept) // 2, len(kept) - 1):
            file.write_bytes(kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :])
            assert [(each.name, file.name in each.why) for each in verify(shelf)] == [(name, True)], f"{file} {at}"
        repair(shelf)  # does not take the changed file for the right one
        assert [each.name for each in verify(shelf)] == [name]
        file.write_bytes(kept)
        assert verify(shelf) == []


def test_missing_and_added_files_and_an_edited_index_are_found(shelf: Path) -> None:
    (shelf / "one" / "more.txt").write_text("?")
    (shelf / "two" / ABOUT).unlink()
    assert [finding.name for finding in verify(shelf)] == ["one", "two"]
    (shelf / "one" / "more.txt").unlink()
    shutil.rmtree(shelf / "two")
    assert [finding.name for finding in verify(shelf)] == ["two"]
    assert repair(shelf) == ["two is gone and was taken out of the index"]
    tree = json.loads((shelf / INDEX).read_text())
    tree["adapters"]["one"]["scores"]["exact"]["value"] = 0.99
    (shelf / INDEX).write_text(json.dumps(tree))
    assert [finding.name for finding in verify(shelf)] == ["one"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text("{"),
        lambda file: file.write_text("[]"),
        lambda file: edit(file, format=2),
        lambda file: edit(file, adapters={"one": {"nope": 1}}),
    ],
)
def test_an_index_that_cannot_be_read_is_named(shelf: Path, spoil: Callable[[Path], None]) -> None:
    spoil(shelf / INDEX)
    with raises("adapter/unreadable-index", match=INDEX):
        read_library(shelf)
    (shelf / INDEX).unlink()
    repair(shelf)
    assert verify(shelf) == []


def test_a_library_that_is_not_there_is_named_and_not_made(tmp_path: Path) -> None:
    for act in (read_library, verify, repair):
        with raises("adapter/no-such-folder"):
            act(tmp_path / "nope")
    assert not (tmp_path / "nope").exists()


def test_a_damaged_adapter_does_not_come_in(shelf: Path, tmp_path: Path) -> None:
    before = files_of(shelf)
    damaged = of_ours(tmp_path / "damaged")
    file = damaged / "adapter_model.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    with raises("adapter/checksum-mismatch"):
        add(shelf, damaged)
    cut = write(tmp_path / "cut", 3)
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:-10])
    with raises("adapter/damaged-weights"):
        add(shelf, cut)
    with raises("output/already-exists", match="--name"):
        add(shelf, tmp_path / "one")
    with raises("adapter/invalid-adapter-name"):
        add(shelf, tmp_path / "one", name="../out")
    assert files_of(shelf) == before
    assert verify(shelf) == []


def test_another_base_comes_in_where_it_is_asked_for(shelf: Path, tmp_path: Path) -> None:
    other = of_ours(tmp_path / "other", model=tiny_model(seed=1))
    with raises("base/other-base", match="--several-bases"):
        add(shelf, other)
    add(shelf, other, several_bases=True)
    assert len(read_library(shelf).bases()) == 2
    add(shelf, of_ours(tmp_path / "third", model=tiny_model(seed=2)))  # it is of several bases already
    assert verify(shelf) == []


def test_the_same_tensors_are_named(shelf: Path, tmp_path: Path) -> None:
    _, remarks = add(shelf, tmp_path / "one", name="again")
    assert any("one has the same tensors" in remark for remark in remarks)


def test_removed_adapters_are_kept_and_another_of_the_name_does_not_take_their_place(
    shelf: Path, tmp_path: Path
) -> None:
    assert remove(shelf, ["one"]) == [shelf / REMOVED / "one"]
    add(shelf, tmp_path / "one")
    assert remove(shelf, ["one"]) == [shelf / REMOVED / "one-2"]
    Adapter.read(shelf / REMOVED / "one-2")
    assert list(entries(shelf)) == ["ours", "two"]
    with raises("adapter/not-in-library", match="two"):
        remove(shelf, ["ours", "tow"])
    assert list(entries(shelf)) == ["ours", "two"]
    assert remove(shelf, ["two"], delete=True) == []
    assert files_of(shelf / REMOVED) == ["one", "one-2"]
    assert verify(shelf) == []


def test_the_server_reads_the_folder(shelf: Path) -> None:
    remove(shelf, ["two"])
    (shelf / DRAFTS / "three").mkdir(parents=True)
    (shelf / DRAFTS / "three" / "adapter_config.json").write_text("{}")
    assert {path.name for path in adapters_in(shelf).values()} == {"one", "ours"}


# Processes that meet, and processes that die ------------------------------------------------------------------------


def _add_some(shelf: Path, sources: list[Path], start: Any) -> None:
    start.wait()
    for source in sources:
        add(shelf, source)


def test_two_processes_that_add_at_once_lose_nothing(tmp_path: Path) -> None:
    sources = [write(tmp_path / f"a{n}", n) for n in range(6)]
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(2)
    shelf = tmp_path / "shelf"
    processes = [fork.Process(target=_add_some, args=(shelf, sources[n::2], start)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert list(entries(shelf)) == [source.name for source in sources]
    assert verify(shelf) == []


def test_whoever_waits_too_long_is_told_who_writes(shelf: Path) -> None:
    with only_writer(shelf), raises("output/folder-in-use"), writing_to(shelf, patience=0.1):
        pass


class Died(BaseException):
    """A process that ends here."""


@pytest.mark.parametrize("step", ["entry_of", "write_index"])
def test_a_process_that_dies_while_it_adds_leaves_a_library(
    shelf: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`entry_of`: while it copies. `write_index`: between the folder and the index."""

    def die(*_: Any) -> None:
        raise Died

    source = write(tmp_path / "three", 3)
    with monkeypatch.context() as patched:
        patched.setattr(module, step, die)
        patched.setattr(module.shutil, "rmtree", lambda *given, **named: None)  # nobody tidies up after a dead process
        with pytest.raises(Died):
            add(shelf, source)
    assert set(entries(shelf)) == {"one", "ours", "two"}
    assert {path.name for path in adapters_in(shelf).values()} >= {"one", "ours", "two"}
    if step == "entry_of":
        assert verify(shelf) == []
        add(shelf, source)
    else:
        assert [finding.name for finding in verify(shelf)] == ["three"]
        with raises("output/already-exists"):
            add(shelf, source)
        repair(shelf)
    assert set(entries(shelf)) == {"one", "ours", "three", "two"}
    assert verify(shelf) == []
    assert not (shelf / DRAFTS).exists()


def test_a_process_that_dies_while_it_removes_leaves_a_library(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_index", die)
        with pytest.raises(Died):
            remove(shelf, ["one"])
    assert read_library(shelf).problems == ["one is in the index, and its folder is gone"]
    assert remove(shelf, ["one"]) == []
    assert verify(shelf) == []


def test_scores_and_rows_of_a_run_come_with_its_adapter(tmp_path: Path, rows: Path, without_pictures: None) -> None:
    from graftlm import DataConfig, Recipe, ReportConfig, TrainConfig, train

    base = save_tiny_base(tmp_path / "base")
    recipe = Recipe(
        base=str(base),
        data=DataConfig(train=str(rows), held_out=0.25),
        delta=LoraConfig(r=2),
        train=TrainConfig(steps=2, save_every=1),
        report=ReportConfig(answers=0, samples=0),
    )
    result = train(recipe, tmp_path / "run")
    add(tmp_path / "shelf", tmp_path / "run")
    found = entries(tmp_path / "shelf")["run"]
    facts = json.loads(sorted((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))[-1].read_text())
    assert found.data == f"sha256:{facts['rows']}"
    assert found.scores["held_out_loss_nats"].value == result.summary["held_out"]["loss_nats"]["tuned"]
    assert not (tmp_path / "shelf" / "run" / "checkpoints").exists()
    assert Adapter.read(tmp_path / "shelf" / "run") == Adapter.read(tmp_path / "run")
    assert scan(tmp_path / "shelf").entries == entries(tmp_path / "shelf")
