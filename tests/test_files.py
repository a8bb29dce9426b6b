"""A file is there whole or not at all, and what stood there before stays until then."""

from pathlib import Path

import pytest

from graftlm.files import check_new, whole
from tests.errors import raises


def test_a_file_appears_when_its_block_ends_well(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    with whole(file) as draft:
        draft.write_text("one")
        assert not file.exists()
    assert file.read_text() == "one"
    assert list(file.parent.iterdir()) == [file]


def test_what_was_there_stays_when_the_block_fails(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")

    def fail() -> None:
        with whole(file) as draft:
            draft.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with raises("output/not-writable", match=r"file/a\.txt: "), whole(tmp_path / "file" / "a.txt"):
        pass


def test_a_name_that_no_file_can_have_is_named(tmp_path: Path) -> None:
    file = tmp_path / ("a" * 300)
    with raises("output/not-writable", match="File name too long"), whole(file):
        pass
    with raises("output/not-writable", match="File name too long"):
        check_new(file, overwrite=False)


def test_a_place_where_nothing_can_be_made_is_named_and_what_is_read_meanwhile_is_not_blamed_on_it(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.txt"

    def into_nowhere() -> None:
        with whole(file) as draft:
            tmp_path.rmdir()
            draft.touch()

    with raises("output/not-writable", match=r"a\.txt: .*No such file"):
        into_nowhere()
    tmp_path.mkdir()
    with pytest.raises(FileNotFoundError, match="other"), whole(file):
        (tmp_path / "other.txt").read_text()


def test_something_that_would_be_lost_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    check_new(file, overwrite=False)
    file.write_text("x")
    with raises("output/already-exists"):
        check_new(file, overwrite=False)
    check_new(file, overwrite=True)
    with raises("output/path-is-folder"):
        check_new(tmp_path, overwrite=True)
