"""The facts of every method, stated and measured, and a few rules that choose among them.

Measured facts come from `graftlm/measured.json`, which benchmarks/methods writes: one job, one small base. They order
methods on that job and no other; where a figure is missing a method is not suggested for it.
"""

import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from graftlm.deltas import METHODS
from graftlm.errors import RecipeError, nearest
from graftlm.plugins import load_plugins

MEASURED = Path(__file__).parent.parent / "measured.json"


@cache
def measured() -> dict[str, Any]:
    """What benchmarks/methods measured: {"base": ..., "methods": {name: ...}}."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def facts() -> list[dict[str, Any]]:
    """Every method of METHODS with what it says of itself and, where it was measured, what it did."""
    load_plugins("graftlm.methods")
    base, runs = measured()["base"], measured()["methods"]
    rows = []
    for name, method in METHODS.items():
        delta, run = method.delta, runs.get(name, {})
        defaults = {f.name: f.default for f in fields(method.config)}
        rows.append(
            {
                "name": name,
                "family": delta.family,
                "paper": delta.paper,
                "parameters": delta.formula,
                "parameters_shared": delta.shared_formula,
                "sites": list(delta.kinds),
                "mergeable": method.mergeable,
                "why_not_mergeable": delta.not_mergeable or None,
                "factors": method.has_factors,
                "peft_type": delta.peft.type if delta.peft else None,
                "peft_tensors": dict(delta.peft.tensors) if delta.peft else None,
                "learning_rate": delta.learning_rate,
                "rank": defaults.get("r"),
                "parameters_trained": run.get("parameters"),
                "held_out_loss": run.get("held_out_loss"),
                "rouge_l": run.get("rouge_l"),
                "forgotten": run["general_loss"] - base["general_loss"] if run else None,
                "share_of_lora": run.get("share_of_lora"),
                "rate_measured": run.get("learning_rate"),
                "seeds": len(run["seeds"]) if run else None,
                "step_ratio": run.get("ratio"),
                "peak_over_lora_gib": run.get("peak_over_lora_gib"),
            }
        )
    return rows


GOOD_ENOUGH = 0.9
"""Rules other than `quality` choose among methods that learnt at least this share of what LoRA learnt."""

RULES: dict[str, tuple[str, str]] = {
    "quality": ("held_out_loss", "learnt most on the measured job"),
    "memory": ("peak_over_lora_gib", "lowest peak memory"),
    "speed": ("step_ratio", "shortest step"),
    "size": ("parameters_trained", "fewest parameters"),
    "forgetting": ("forgotten", "forgot least of general text"),
}
"""A word -> the fact to keep small, and what to say of those that do."""

CONDITIONS: dict[str, str] = {"serving": "factors", "merging": "mergeable"}
"""A word -> the fact that a method must have: exact LoRA factors, which every server takes; mergeable."""

ALSO = {
    "data": "forgetting", "small": "", "little": "", "tiny": "size", "fast": "speed", "low": "", "server": "serving",
    "serve": "serving", "merge": "merging", "forget": "forgetting", "parameters": "size", "accuracy": "quality",
    "good": "quality", "and": "", "of": "", "no": "", "less": "",
}  # fmt: skip
"""Other words for the same. Small data is about what is forgotten: few rows are soon learnt by heart."""


def suggest(need: str, *, count: int = 5) -> list[dict[str, Any]]:
    """The best of the measured methods by the words in `need`: by the mean of their places under each rule.

    Raises RecipeError for a word that stands for no rule.
    """
    words = [ALSO.get(word, word) for word in need.lower().replace(",", " ").split()]
    words = list(dict.fromkeys(word for word in words if word))
    for word in words:
        if word not in RULES and word not in CONDITIONS:
            known = (*RULES, *CONDITIONS, *ALSO)
            raise RecipeError(
                f"--for: no rule about {word!r}. {nearest(word, known)} Words: {', '.join(RULES | CONDITIONS)}",
                code="unknown-rule",
            )
    rules = [word for word in words if word in RULES] or ["quality"]
    rows = [row for row in facts() if all(row[CONDITIONS[word]] for word in words if word in CONDITIONS)]
    rows = [row for row in rows if all(row[RULES[rule][0]] is not None for rule in rules)]
    if rules != ["quality"]:
        rows = [row for row in rows if row["share_of_lora"] is not None and row["share_of_lora"] >= GOOD_ENOUGH]
    places: dict[str, list[int]] = {row["name"]: [] for row in rows}
    for rule in rules:
        for place, row in enumerate(sorted(rows, key=lambda row: row[RULES[rule][0]]), start=1):
            places[row["name"]].append(place)
    rows.sort(key=lambda row: sum(places[row["name"]]))
    for row in rows:
        row["why"] = "; ".join(f"{RULES[r][1]}: place {p}" for r, p in zip(rules, places[row["name"]], strict=True))
    return rows[:count]
