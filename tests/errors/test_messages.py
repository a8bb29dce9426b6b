"""Errors for users have codes that stay, and messages that change only where messages.txt changes with them."""

import pickle
import re
from pathlib import Path

import pytest

from graftlm.data.chat.spans import UnstableTemplateError
from graftlm.errors import DataError, GraftError, RecipeError
from tests.errors import raises
from tests.errors.messages import Site, sites

SITES = sites()
TABLE = Path(__file__).with_name("messages.txt")


def table(found: list[Site]) -> list[str]:
    """A line for each message: `code: message`."""
    return sorted({f"{site.code}: {site.message}" for site in found})


def test_every_error_has_a_literal_code_of_two_to_four_words() -> None:
    assert len(SITES) > 330
    bad = [site for site in SITES if not re.fullmatch(r"[a-z]+/[a-z0-9]+(-[a-z0-9]+){1,3}", site.code)]
    assert not bad, "give `code=` a literal that names the condition"


def test_an_error_cannot_be_made_without_a_code() -> None:
    with pytest.raises(TypeError, match="code"):
        DataError("no code")  # type: ignore[call-arg]


def test_no_error_is_of_the_root_class() -> None:
    assert not [site for site in SITES if site.kind == "GraftError"]


def test_a_code_belongs_to_one_class_of_errors() -> None:
    families = {kind.__name__: kind.family for kind in GraftError.__subclasses__() if "graftlm.errors" in str(kind)}
    assert len(set(families.values())) == len(families) == 9
    assert "graft" not in families.values()


def test_the_messages_are_those_of_the_table() -> None:
    """After a change on purpose: `python -m tests.errors.test_messages` writes the table again."""
    stored = TABLE.read_text(encoding="utf-8").splitlines()
    assert table(SITES) == stored


def test_the_code_is_the_family_and_the_condition_in_subclasses_too() -> None:
    assert RecipeError("no", code="unknown-key").code == "recipe/unknown-key"
    assert UnstableTemplateError("no", code="prompt-mismatch").code == "data/prompt-mismatch"


def test_an_error_that_comes_from_another_process_has_its_code_and_message() -> None:
    error = pickle.loads(pickle.dumps(UnstableTemplateError("says why", code="prompt-mismatch")))  # noqa: S301
    assert type(error) is UnstableTemplateError
    assert error.code == "data/prompt-mismatch"
    assert str(error) == "says why"


def test_another_code_than_the_one_that_is_asserted_fails_with_the_message() -> None:
    with pytest.raises(AssertionError, match="data/no-rows was raised: the file"), raises("data/empty-file"):
        raise DataError("the file", code="no-rows")


if __name__ == "__main__":
    TABLE.write_text("".join(f"{line}\n" for line in table(SITES)), encoding="utf-8")
