"""What `graft methods` says: facts that are true, and rules that do what their words say."""

from typing import Any

import pytest

from graftlm.deltas import METHODS
from graftlm.planning import advice
from tests.errors import raises

FIGURES = ("held_out_loss", "share_of_lora", "parameters", "general_loss", "peak_over_lora_gib", "ratio")
RUNS: dict[str, Any] = {
    name: dict(zip(FIGURES, figures, strict=True))
    for name, figures in {
        "lora": (2.0, 1.0, 900, 3.2, 1.0, 1),
        "dora": (1.9, 1.1, 950, 3.3, 1.2, 1.1),
        "vera": (2.1, 0.95, 10, 3.1, 1.1, 1.5),
        "houlsby": (2.05, 0.97, 99, 3.4, 0.9, 0.8),
        "norm-tuning": (2.9, 0.2, 1, 3.0, 0.8, 0.7),
    }.items()
}


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {name: run | {"learning_rate": 1e-3, "seeds": [0], "rouge_l": 0.2} for name, run in RUNS.items()}
    monkeypatch.setattr(advice, "measured", lambda: {"base": {"general_loss": 3.0}, "methods": runs})


def names(wanted: str) -> list[str]:
    return [row["name"] for row in advice.suggest(wanted)]


def test_every_method_has_its_facts() -> None:
    rows = {row["name"]: row for row in advice.facts()}
    assert rows.keys() == METHODS.keys()
    assert rows["lora"]["forgotten"] == pytest.approx(0.2)
    assert rows["mora"]["held_out_loss"] is None
    for row in rows.values():
        assert row["mergeable"] == (row["why_not_mergeable"] is None)


def test_each_word_orders_by_its_fact() -> None:
    assert names("quality") == ["dora", "lora", "houlsby", "vera", "norm-tuning"]
    assert names("memory") == ["houlsby", "lora", "vera", "dora"], "what learns too little is left out"
    assert names("speed")[0] == "houlsby"
    assert names("size")[0] == "vera"
    assert names("forgetting")[0] == "vera"
    assert names("small data, little memory")[0] in ("lora", "vera")
    assert names("merging, speed") == ["lora", "dora", "vera"]
    assert names("serving") == ["lora", "vera"], "exact factors, by quality"


def test_each_row_says_why() -> None:
    assert advice.suggest("memory")[0]["why"] == "lowest peak memory: place 1"


def test_a_word_without_a_rule_is_refused() -> None:
    with raises("recipe/unknown-rule", match=r"'memroy'.*'memory'"):
        advice.suggest("memroy")
