"""What the user of a written model has to know."""

import re

import pytest

from graftlm.adapters.export.warnings import export_warnings


def test_an_exact_export_has_no_warning() -> None:
    assert export_warnings({"kind": "merged", "untied": False, "lost": []}, "fp32") == []


@pytest.mark.parametrize(
    ("made", "dtype", "text"),
    [
        ({"untied": True}, "fp32", "both are written, untied"),
        ({"missing_end": {"why": "answers end with </s>"}}, "fp32", "answers end with </s>: a server needs it"),
        ({"lost": [["a", 0.5], ["b", 0.2], ["c", 0.1]]}, "bf16", "bf16 loses 20% .* and 50% of a, the worst"),
        (
            {"base_store": "nf4", "lost_by_quantising": [["a", 3.0], ["b", 2.0]]},
            "fp32",
            "in nf4, .* 3 times the change away at a, the worst layer, and 2 times at b",
        ),
        ({"base_store": "nf4", "lost_by_quantising": []}, "fp32", "No layer was changed"),
        ({"base_store": "nf4", "lost_by_quantising": "no float base"}, "fp32", "is not known: no float base"),
    ],
)
def test_each_fact_has_its_sentence(made: dict[str, object], dtype: str, text: str) -> None:
    (warning,) = export_warnings(made, dtype)
    assert re.search(text, warning)
