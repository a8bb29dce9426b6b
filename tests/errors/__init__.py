"""Errors are asserted by code: `with raises("data/unusable-rows") as caught:`."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from graftlm.errors import GraftError


@contextmanager
def raises(code: str, match: str | None = None) -> Iterator[pytest.ExceptionInfo[GraftError]]:
    """Inside, an error of this code is raised. `match` is for a fact that the message must name, such as a line."""
    with pytest.raises(GraftError) as caught:
        yield caught
    try:
        assert caught.value.code == code, f"{caught.value.code} was raised: {caught.value}"
        if match is not None:
            caught.match(match)
    finally:
        del caught  # its traceback holds this frame, and in a cycle sockets of the error's frames would stay open
