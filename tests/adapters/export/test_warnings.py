"""What the user of a written model has to know."""

import re

import pytest

from graftlm.adapters.export.warnings import export_warnings


def test_an_exact_export_has_no_warning() -> None:
    assert export_warnings({"kind": "merged", "untied": False, "lost": []}, "float32") == []


@pytest.mark.parametrize(
    ("made", "dtype", "text"),
    [
        ({"untied": True}, "float32", "both are written, untied"),
        ({"missing_end": {"why": "answers end with </s>"}}, "float32", "answers end with </s>: a server needs it"),
        ({"lost": [["a", 0.5], ["b", 0.2], ["c", 0.1]]}, "bfloat16", "bfloat16 loses 20% .* and 50% of a, the worst"),
        (
            {"base_quantization": "nf4", "lost_by_quantizing": [["a", 3.0], ["b", 2.0]]},
            "float32",
            "in nf4, .* 3 times the change away at a, the worst layer, and 2 times at b",
        ),
        ({"base_quantization": "nf4", "lost_by_quantizing": []}, "float32", "No layer was changed"),
        ({"base_quantization": "nf4", "lost_by_quantizing": "no float base"}, "float32", "is not known: no float base"),
    ],
)
def test_each_fact_has_its_sentence(made: dict[str, object], dtype: str, text: str) -> None:
    (warning,) = export_warnings(made, dtype)
    assert re.search(text, warning)
