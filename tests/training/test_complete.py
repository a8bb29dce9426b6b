"""A method that is nothing without its callback brings it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

import graftlm
from graftlm.callbacks import CALLBACKS
from graftlm.config.schema import build, to_tree
from graftlm.deltas import METHODS
from graftlm.recipe import Recipe

NEEDS = {name: row.delta.callbacks for name, row in METHODS.items() if row.delta.callbacks}

pytestmark = pytest.mark.usefixtures("without_pictures")


def recipe(method: str, *callbacks: str) -> Recipe:
    tree = {"data": {"train": "a.jsonl"}, "delta": {"method": method}, "callbacks": list(callbacks)}
    return build(Recipe, tree, source="test")


@pytest.mark.parametrize("method", NEEDS)
def test_the_first_callback_of_a_method_is_added_where_it_has_none(method: str) -> None:
    own, *others = NEEDS[method]
    made = recipe(method)
    assert [callback.name for callback in made.callbacks] == [own]
    assert build(Recipe, to_tree(made), source="again") == made, "the written recipe says it"
    assert [callback.name for callback in recipe(method, "ema").callbacks] == ["ema", own]
    for callback in (own, *others):
        assert [each.name for each in recipe(method, callback).callbacks] == [callback]


def test_other_methods_get_none() -> None:
    assert recipe("lora").callbacks == ()
    assert NEEDS.keys() == {"adalora", "diff-pruning", "dylora", "lamda", "spiel"}
    assert {name for names in NEEDS.values() for name in names} <= CALLBACKS.keys()


def test_adalora_by_its_name_alone_prunes_to_two_thirds(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    tree = {
        "base": {"name": str(base_folder), "dtype": "float32"},
        "data": {"train": str(rows)},
        "delta": {"method": "adalora", "r": 6},
        "train": {"steps": 10, "batch_rows": 2},
        "report": {"answers": 0},
    }
    graftlm.train(build(Recipe, tree, source="test"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    values = [tensor for name, tensor in tensors.items() if name.endswith("lora_E")]
    living = sum(int(tensor.count_nonzero()) for tensor in values)
    assert sum(tensor.numel() for tensor in values) == 6 * len(values)
    assert living == 4 * len(values)
