"""Preference pairs with a right answer, from the built-in data: which sentence is this function's own?

The chosen answer is the first sentence of the function's docstring. The rejected one is that of another function of the
same module (of all modules, where there is none), the nearest in length: so neither style nor length decides.
"""

import json
from collections import defaultdict
from pathlib import Path

from graftlm.data.sources.docstrings import rows

ASK = "Say in one sentence what this function does.\n\n"


def pairs() -> list[dict[str, str]]:
    """{prompt, chosen, rejected, group: module}"""
    found = rows()
    siblings: dict[str, list[str]] = defaultdict(list)
    for row in found:
        siblings[row["group"]].append(row["completion"])
    everywhere = sorted({row["completion"] for row in found})
    made = []
    for row in found:
        own = row["completion"]
        others = [other for other in siblings[row["group"]] if other != own] or [o for o in everywhere if o != own]
        nearest = min(others, key=lambda other: (abs(len(other) - len(own)), other))
        made.append({"prompt": ASK + row["prompt"], "chosen": own, "rejected": nearest, "group": row["group"]})
    return made


def write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs()), encoding="utf-8")
