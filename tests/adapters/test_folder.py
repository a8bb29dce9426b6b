"""A new folder takes its place whole or not at all."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from graftlm.adapters import adapter as values
from graftlm.adapters.folder import CONFIG, WEIGHTS
from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from tests.adapters.folders import ours
from tests.errors import raises

pytestmark = pytest.mark.versions


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_existing_folder_is_not_overwritten_unless_told(adapter: Path) -> None:
    before = files(adapter)
    with raises("output/already-exists", match="--overwrite"):
        save_adapter(ours(LoraConfig(r=2)), adapter)
    assert files(adapter) == before
    (adapter / "extra").write_text("x")
    save_adapter(ours(LoraConfig(r=2)), adapter, overwrite=True)
    assert json.loads((adapter / CONFIG).read_text())["r"] == 2
    assert not (adapter / "extra").exists(), "what was in the old folder must not mix with the new"
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["weights", "text", "sync"])
def test_no_room_on_the_disk_is_said_and_what_was_there_stays(
    adapter: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(adapter)
    if where == "weights":
        monkeypatch.setattr(values, "save_file", full_disk)
    elif where == "text":
        monkeypatch.setattr(Path, "write_text", full_disk)
    else:
        monkeypatch.setattr(os, "fsync", full_disk)
    with raises("output/no-space-left") as raised:
        save_adapter(ours(LoraConfig(r=2)), adapter, overwrite=True)
    monkeypatch.undo()
    assert str(adapter) in str(raised.value)
    assert files(adapter) == before
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"], "nothing half-written may be left behind"


def test_no_room_as_safetensors_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(values, "save_file", fails)
    with raises("output/no-space-left"):
        save_adapter(ours(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_any_other_failure_leaves_what_was_there_and_nothing_else(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(adapter)
    monkeypatch.setattr(values, "save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(ours(), adapter, overwrite=True)
    assert files(adapter) == before
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def test_a_failing_last_rename_puts_the_old_folder_back(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(adapter)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Any:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        save_adapter(ours(), adapter, overwrite=True)
    assert files(adapter) == before
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)
    (tmp_path / ".a.partial-7").mkdir()
    (tmp_path / ".a.partial-7" / "old").write_text("x")
    folder = save_adapter(ours(), tmp_path / "a")
    assert not (folder / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with raises("output/not-writable"):
        save_adapter(ours(), tmp_path / "file" / "a")
    with raises("output/already-exists"):
        save_adapter(ours(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_folders_above_are_made(tmp_path: Path) -> None:
    assert (save_adapter(ours(), tmp_path / "x" / "y" / "a") / WEIGHTS).is_file()
