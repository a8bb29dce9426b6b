"""graftlm/config/aliases.py: every setting of the trainers that people come from has an answer."""

from dataclasses import fields
from typing import Any

import pytest

from graftlm import Recipe
from graftlm.config.aliases import OTHER_NAMES
from graftlm.config.schema import build
from tests.errors import raises

PEERS = [
    ("transformers.training_args", "TrainingArguments"),
    ("trl.trainer.sft_config", "SFTConfig"),
    ("trl.trainer.dpo_config", "DPOConfig"),
    ("trl.trainer.kto_config", "KTOConfig"),
    ("trl.trainer.grpo_config", "GRPOConfig"),
    ("peft", "LoraConfig"),
]
OURS = {"learning_rate", "weight_decay", "seed", "r", "revision", "beta", "label_smoothing", "temperature", "top_p"}
"""What a recipe calls the same."""
SECTIONS = {"delta"}
"""What is the name of a section of a recipe."""


@pytest.mark.parametrize(("module", "name"), PEERS, ids=[name for _, name in PEERS])
def test_every_setting_of_other_trainers_has_an_answer(module: str, name: str) -> None:
    config: Any = getattr(pytest.importorskip(module), name)
    settings = {field.name for field in fields(config)}
    assert len(settings) > 20
    assert settings - OTHER_NAMES.keys() - OURS - SECTIONS == set()
    misplaced = sorted(settings & (OTHER_NAMES.keys() | OURS))
    tree = {"data": {"train": "a.jsonl"}, "report": dict.fromkeys(misplaced)}
    with raises("recipe/unknown-key") as raised:
        build(Recipe, tree, source="recipe")
    lines = str(raised.value).splitlines()
    assert len(lines) == len(misplaced)
    for setting, line in zip(misplaced, sorted(lines), strict=True):
        assert line.startswith(f"recipe: report.{setting}: unknown key. ")
        if setting in OTHER_NAMES:
            assert line.endswith(f"Here it is {OTHER_NAMES[setting]}")
        else:
            assert setting in line.partition("unknown key. ")[2]
