"""A pytest plugin: which cases of a large parametrised test `make test` runs. pyproject.toml describes the markers."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

SAMPLE = 6


def sample(cases: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which of a test's cases (parameter -> value) are in the sample: where the positions of the values add up to a
    multiple of SAMPLE.

    So the first case always is, and with two parameters every value of either meets a sixth of the other's.
    """
    positions: set[tuple[int, ...]] = set()  # those of parameters that change together are equal, and count once
    for name in cases[0]:
        seen: dict[int, int] = {}
        positions.add(tuple(seen.setdefault(id(case[name]), len(seen)) for case in cases))
    return [sum(each) % SAMPLE == 0 for each in zip(*positions, strict=True)]


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is not in the sample of a test that is marked `sampled`."""
    functions: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in functions.values():
        for item, stays in zip(cases, sample([case.callspec.params for case in cases]), strict=True):
            if not stays:
                item.add_marker("slow")
