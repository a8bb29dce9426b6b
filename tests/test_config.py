"""graftlm/config.py: what is read back is what was written, and every mistake is said with file, line and remedy."""

import json
from pathlib import Path

import pytest

from graftlm import Recipe
from graftlm.config import build, config, json_schema, parse_yaml, read, to_tree, to_yaml
from graftlm.errors import RecipeError

pytestmark = pytest.mark.versions

QUICKSTART = Path(__file__).parent.parent / "graftlm" / "recipes" / "quickstart.yaml"


def error(text: str, tmp_path: Path, *overrides: str) -> str:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as raised:
        read(Recipe, file, overrides)
    return str(raised.value)


GOOD = "data: {train: rows.jsonl}\ndelta:\n  method: lora\n"


def test_a_recipe_survives_being_written_and_read() -> None:
    recipe = read(Recipe, QUICKSTART)
    again = build(Recipe, parse_yaml(to_yaml(recipe), "x")[0], source="x")
    assert again == recipe
    assert to_tree(again) == to_tree(recipe)


def test_a_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD + "train: {learning_rate: 5e-4}\n")
    assert read(Recipe, file).train.learning_rate == 0.0005


def test_compiling_what_is_not_packed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    with pytest.raises(RecipeError, match="train.kernels: ours computes packs only"):
        read(Recipe, file, ["train.kernels=ours", "data.pack=false"])
    with pytest.raises(RecipeError, match=r"train.compile: this key was replaced by kernels \(auto, ours, torch or"):
        read(Recipe, file, ["train.compile=true"])


def test_overrides_are_laid_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    recipe = read(Recipe, file, ["delta.r=4", "train.learning_rate=1e-3", "delta.targets=[q_proj, v_proj]"])
    assert (recipe.delta.r, recipe.train.learning_rate) == (4, 1e-3)  # type: ignore[attr-defined]
    assert recipe.delta.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "train:\n  learnig_rate: 1\n", ["r.yaml:5: train.learnig_rate: unknown key", "'learning_rate'"]),
        (GOOD + "  rank: 4\n", ["r.yaml:4: delta.rank: unknown key", "There is:", "alpha"]),
        (GOOD + "trian: {}\n", ["r.yaml:4: trian: unknown key", "'train'"]),
        (GOOD + "base: {nme: x}\n", ["r.yaml:4: base.nme", "'name'"]),
        (GOOD + "  r: many\n", ["r.yaml:4: delta.r:", "integer", "'many'"]),
        (GOOD + "  r: true\n", ["r.yaml:4: delta.r:", "integer"]),
        (GOOD + "  r: 0\n", ["r.yaml:4: delta.r:", "greater than 0"]),
        (GOOD + "  dropout: 1.5\n", ["r.yaml:4: delta.dropout:", "less than 1"]),
        (GOOD + "train: {learning_rate: .nan}\n", ["r.yaml:4: train.learning_rate:", "finite"]),
        (GOOD + "loss: dop\n", ["r.yaml:4: loss:", "'dpo'"]),
        (GOOD + "policies: [galor]\n", ["r.yaml:4: policies:", "no policy", "'galore'"]),
        (GOOD + "train: {steps: 3, epochs: 1}\n", ["steps or epochs, not both"]),
        (GOOD + "data: {train: b}\n", ["r.yaml:4: data was already given in line 1"]),
        ("delta: {method: lora}\n", ["r.yaml: data: this key has no default"]),
        ("- a\n", ["a recipe is a mapping", "list"]),
        ("a: [1\n", ["r.yaml:2: not valid YAML"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_what_is_near(text: str, said: list[str], tmp_path: Path) -> None:
    message = error(text, tmp_path)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("{path: a, weight: 0}", ["data.train.weight: Input should be greater than 0 (given: 0)"]),
        ("[a, {path: b, weight: 0}]", ["data.train.1.weight: Input should be greater than 0 (given: 0)"]),
        ("{pth: a}", ["data.train.path: this key has no", "data.train.pth: unknown key. Did you mean 'path'?"]),
        ("a, held_out: 1.5", ["data.held_out: Input should be less than 1 (given: 1.5)"]),
    ],
)
def test_of_what_may_be_several_kinds_only_the_nearest_is_told(train: str, said: list[str], tmp_path: Path) -> None:
    lines = error(f"data: {{train: {train}}}\ndelta: {{method: lora}}\n", tmp_path).splitlines()
    assert len(lines) == len(said)
    assert all(f"r.yaml:1: {wanted}" in line for wanted, line in zip(said, lines, strict=True))


def test_a_mistake_on_the_command_line_says_so(tmp_path: Path) -> None:
    assert "command line: train.stps: unknown key. Did you mean 'steps'?" in error(GOOD, tmp_path, "train.stps=3")
    assert "write an override as key=value" in error(GOOD, tmp_path, "train.steps")
    assert "has no keys inside" in error(GOOD + "loss: supervised\n", tmp_path, "loss.name=x")
    assert "command line: loss:" in error(GOOD, tmp_path, "loss.name=x")


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    message = error(GOOD + "  r: 0\n  alpha: -1\n", tmp_path)
    assert "delta.r" in message
    assert "delta.alpha" in message


def test_a_missing_recipe_names_the_ones_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"nime\.yaml: no such recipe. Did you mean .*mine\.yaml"):
        read(Recipe, tmp_path / "nime.yaml")


def test_configs_check_themselves_in_python_too() -> None:
    from graftlm import LoraConfig

    with pytest.raises(ValueError, match="greater than 0"):
        LoraConfig(r=-1)
    with pytest.raises(ValueError, match="rr"):
        LoraConfig(rr=1)  # type: ignore[call-arg]


def test_the_schema_describes_a_field_by_the_string_under_it_wherever_it_is_inherited() -> None:
    @config
    class Parent:
        a: int = 1
        """Of the parent,
        in two lines."""
        b: int = 2
        c: int = 3
        """Is said anew."""

    @config
    class Child(Parent):
        """No field's."""

        c: int = 4
        """Of the child."""
        d: str = "no description"

    described = {name: field.get("description") for name, field in json.loads(json_schema(Child))["properties"].items()}
    assert described == {"a": "Of the parent,\nin two lines.", "b": None, "c": "Of the child.", "d": None}
    from_nowhere: dict[str, type] = {"config": config}  # type: ignore[dict-item]
    exec("@config\nclass Told:\n    a: int = 1\n    'no source, no description'", from_nowhere)  # noqa: S102
    assert json.loads(json_schema(from_nowhere["Told"]))["properties"]["a"] == {
        "default": 1, "title": "A", "type": "integer"
    }  # fmt: skip
