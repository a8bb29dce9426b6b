"""`graft cache`: what is ours is listed and removed, and nothing else is."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftlm import cache, cli
from graftlm.files import cache_folder
from graftlm.hub import fingerprint

DAY = 86400


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAFT_CACHE", str(folder))
    return folder


def write(file: Path, size: int = 10, age_s: float = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size)
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def graft(*arguments: str, input: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments), input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def fill(folder: Path) -> dict[str, list[Path]]:
    """Entries of every kind, by the names that graftlm gives them."""
    base = folder / "bases" / f"SmolLM2-{'a' * 12}"
    write(base / "model.safetensors", 3 * 2**20)
    old = write(folder / "rows" / f"{'b' * 64}.rows.safetensors", 2**20, age_s=3 * DAY)
    return {
        "bases": [base],
        "fingerprints": [write(folder / "fingerprints" / f"{'c' * 24}.json")],
        "kernels": [
            write(folder / "kernels" / f"{'d' * 16}.so"),
            write(folder / "kernels" / f"{'d' * 32}.{'e' * 32}.so"),
            write(folder / "kernels" / f"timings-{'f' * 32}.json"),
        ],
        "rows": [old, write(folder / "rows" / f"{'1' * 32}.safetensors")],
        "scores": [write(folder / "scores" / f"{'2' * 32}.jsonl")],
    }


def foreign(folder: Path, elsewhere: Path) -> list[Path]:
    """What is not ours, links to it included."""
    write(elsewhere / "bases" / f"mine-{'a' * 12}" / "model.safetensors")
    (folder / "bases" / f"link-{'a' * 12}").symlink_to(elsewhere / "bases" / f"mine-{'a' * 12}")
    (folder / "kernels" / f"{'9' * 16}.so").symlink_to(write(elsewhere / "library.so"))
    (folder / "scores" / f"{'3' * 32}.jsonl").mkdir()
    return [
        write(folder / "notes.txt"),
        write(folder / "rows" / "mine.safetensors"),
        write(folder / "bases" / "my-model" / "config.json"),
        write(folder / "other" / f"{'a' * 24}.json"),
        folder / "bases" / f"link-{'a' * 12}",
        folder / "kernels" / f"{'9' * 16}.so",
        folder / "scores" / f"{'3' * 32}.jsonl",
        elsewhere / "bases" / f"mine-{'a' * 12}" / "model.safetensors",
        elsewhere / "library.so",
    ]


def test_an_empty_cache(folder: Path) -> None:
    code, output = graft("cache", "list")
    assert code == 0
    assert str(folder) in output
    for kind in cache.KINDS:
        assert f"\n{kind:13} empty " in output
    assert graft("cache", "clear") == (0, f"nothing to remove in {folder}\n")
    assert not folder.exists()


def test_list_counts_by_kind(folder: Path) -> None:
    fill(folder)
    code, output = graft("cache", "list")
    assert code == 0
    lines = {line.split()[0]: line for line in output.splitlines() if line}
    assert "1 entry, 3.0 MiB, 0 days old" in lines["bases"]
    assert "3 entries" in lines["kernels"]
    assert "2 entries, 1.0 MiB, 0 to 3 days old" in lines["rows"]


def test_list_as_json_names_every_entry_and_what_is_not_ours(folder: Path, tmp_path: Path) -> None:
    entries, others = fill(folder), foreign(folder, tmp_path / "elsewhere")
    code, output = graft("cache", "list", "--json")
    assert code == 0
    found = json.loads(output)
    assert found["folder"] == str(folder)
    listed = {(entry["kind"], entry["path"]) for entry in found["entries"]}
    assert listed == {(kind, str(path)) for kind, paths in entries.items() for path in paths}
    inside = {path for path in others if folder in path.parents}
    inside = {folder / path.relative_to(folder).parts[0] if "other" in path.parts else path for path in inside}
    inside = {path.parent if path.parent.name == "my-model" else path for path in inside}
    assert set(found["others"]) == {str(path) for path in inside}


def test_clear_removes_one_kind(folder: Path) -> None:
    entries = fill(folder)
    code, output = graft("cache", "clear", "--kind", "rows", "--yes")
    assert code == 0
    assert "removed 2 entries" in output
    for kind, paths in entries.items():
        assert all(path.exists() == (kind != "rows") for path in paths), kind


def test_clear_asks_first(folder: Path) -> None:
    entries = fill(folder)
    for answer in ("n\n", "\n", ""):
        code, output = graft("cache", "clear", input=answer)
        assert code == 1
        assert "Remove these" in output
    assert all(path.exists() for paths in entries.values() for path in paths)
    code, _ = graft("cache", "clear", input="y\n")
    assert code == 0
    assert not any(path.exists() for paths in entries.values() for path in paths)


def test_clear_removes_nothing_that_is_not_ours(folder: Path, tmp_path: Path) -> None:
    entries, others = fill(folder), foreign(folder, tmp_path / "elsewhere")
    base = entries["bases"][0]
    (base / "inside").symlink_to(tmp_path / "elsewhere")
    assert graft("cache", "clear", "--yes")[0] == 0
    assert not any(path.exists() for paths in entries.values() for path in paths)
    for path in others:
        assert path.exists(), path


def test_a_kind_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "elsewhere" / f"{'c' * 24}.json").parent
    folder.mkdir()
    (folder / "fingerprints").symlink_to(target)
    assert cache.entries() == []
    assert cache.others() == [folder / "fingerprints"]
    assert graft("cache", "clear", "--yes")[0] == 0
    assert (target / f"{'c' * 24}.json").is_file()


def test_a_draft_of_a_running_process_stays(folder: Path) -> None:
    young = write(folder / "rows" / f".{'b' * 64}.rows.safetensors.partial-77")
    old = write(folder / "rows" / f".{'c' * 64}.rows.safetensors.partial-78", age_s=DAY)
    assert graft("cache", "clear", "--yes")[0] == 0
    assert young.exists()
    assert not old.exists()


def test_an_unknown_kind_is_wrong_usage(folder: Path) -> None:
    fill(folder)
    code, output = graft("cache", "clear", "--kind", "row", "--yes")
    assert code == 2
    assert "rows" in output
    assert len(cache.entries()) == 8


def test_what_the_library_writes_is_ours(folder: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patterns follow the code that writes: each file of a run with a selector is listed."""
    from graftlm.config.schema import build
    from graftlm.recipe import Recipe
    from graftlm.run import train

    monkeypatch.setattr(fingerprint, "_fingerprint_folder", lambda: cache_folder() / "fingerprints")
    for module in ("quality.preflight", "sources.row_cache"):  # few rows are not written
        monkeypatch.setattr(f"graftlm.data.{module}.many", lambda rows: True)
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"p {n}", "completion": f"c {n}"}) + "\n" for n in range(12)))
    tree = {
        "base": str(base_folder),
        "data": {"train": str(rows), "held_out": 2},
        "select": [{"by": "longest", "keep": 6}],
        "train": {"steps": 1, "batch_rows": 2},
        "report": {"answers": 0},
    }
    train(build(Recipe, tree, source="test"), folder.parent / "out")
    assert cache.others() == []
    kinds = {entry.kind for entry in cache.entries()}
    assert {"fingerprints", "rows", "scores"} <= kinds
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert files == {entry.path for entry in cache.entries()}
