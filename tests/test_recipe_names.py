"""recipe.py knows the tables of its parts, and no part by its name."""

import ast
from pathlib import Path

import graftlm.recipe
from graftlm.callbacks import CALLBACKS
from graftlm.deltas import METHODS
from graftlm.losses import LOSSES
from graftlm.optim import OPTIMIZERS
from graftlm.selection import SELECTORS
from graftlm.training.regularizers import REGULARIZERS


def test_no_string_in_the_recipe_is_the_name_of_a_part() -> None:
    names = {*METHODS, *LOSSES, *OPTIMIZERS, *CALLBACKS, *REGULARIZERS, *SELECTORS}
    tree = ast.parse(Path(graftlm.recipe.__file__).read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert len(strings) > 20
    assert not strings & names
