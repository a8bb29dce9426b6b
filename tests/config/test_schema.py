"""graftlm/config.py: what is read back is what was written, and every mistake is said with file, line and remedy."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from graftlm import Recipe
from graftlm.config.aliases import OTHER_NAMES
from graftlm.config.schema import build, config, json_schema, to_tree, to_yaml
from graftlm.config.source import parse_yaml, read
from graftlm.data.sources.source import DataConfig
from graftlm.hub.config import BaseConfig
from graftlm.rl.config import RLConfig
from tests.errors import raises

pytestmark = pytest.mark.versions

UNKNOWN, INVALID = "recipe/unknown-key", "recipe/invalid-value"
QUICKSTART = Path(__file__).parents[2] / "graftlm" / "recipes" / "quickstart.yaml"


def error(code: str, text: str, tmp_path: Path, *overrides: str) -> str:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with raises(code) as raised:
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
    with raises("recipe/invalid-value", match="train.kernels: ours computes packs only"):
        read(Recipe, file, ["train.kernels=ours", "data.pack=false"])
    with raises("recipe/unknown-key", match=r"train.compile: .* replaced by kernels \(auto, ours, torch or"):
        read(Recipe, file, ["train.compile=true"])


def test_overrides_are_laid_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    recipe = read(Recipe, file, ["delta.r=4", "train.learning_rate=1e-3", "delta.targets=[q_proj, v_proj]"])
    assert (recipe.delta.r, recipe.train.learning_rate) == (4, 1e-3)  # type: ignore[attr-defined]
    assert recipe.delta.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("text", "code", "messages"),
    [
        (GOOD + "train:\n  learnig_rate: 1\n", UNKNOWN, ["r.yaml:5: train.learnig_rate: ", "'learning_rate'"]),
        (GOOD + "  zzz: 4\n", UNKNOWN, ["r.yaml:4: delta.zzz: unknown key", "There is:", "alpha"]),
        (GOOD + "trian: {}\n", UNKNOWN, ["r.yaml:4: trian: unknown key", "'train'"]),
        (GOOD + "base: {nme: x}\n", UNKNOWN, ["r.yaml:4: base.nme", "'name'"]),
        (GOOD + "  r: many\n", INVALID, ["r.yaml:4: delta.r:", "integer", "'many'"]),
        (GOOD + "  r: true\n", INVALID, ["r.yaml:4: delta.r:", "integer"]),
        (GOOD + "  r: 0\n", INVALID, ["r.yaml:4: delta.r:", "greater than 0"]),
        (GOOD + "  dropout: 1.5\n", INVALID, ["r.yaml:4: delta.dropout:", "less than 1"]),
        (GOOD + "train: {learning_rate: .nan}\n", INVALID, ["r.yaml:4: train.learning_rate:", "finite"]),
        (GOOD + "loss: dop\n", INVALID, ["r.yaml:4: loss:", "'dpo'"]),
        (GOOD + "callbacks: [galor]\n", INVALID, ["r.yaml:4: callbacks:", "unknown callback 'galor'", "'alora'"]),
        (GOOD + "train: {steps: 3, epochs: 1}\n", INVALID, ["steps or epochs, not both"]),
        (GOOD + "data: {train: b}\n", "recipe/repeated-key", ["r.yaml:4: data ", "line 1"]),
        ("delta: {method: lora}\n", INVALID, ["r.yaml: data: this key has no default"]),
        ("- a\n", "recipe/not-a-mapping", ["list"]),
        ("a: [1\n", "recipe/invalid-yaml", ["r.yaml:2: "]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_what_is_near(
    text: str, code: str, messages: list[str], tmp_path: Path
) -> None:
    message = error(code, text, tmp_path)
    for part in messages:
        assert part in message


@pytest.mark.parametrize(
    ("train", "code", "messages"),
    [
        ("{path: a, weight: 0}", INVALID, ["data.train.weight: Input should be greater than 0 (given: 0)"]),
        ("[a, {path: b, weight: 0}]", INVALID, ["data.train.1.weight: Input should be greater than 0 (given: 0)"]),
        (
            "{pth: a}",
            UNKNOWN,
            ["data.train.path: this key has no", "data.train.pth: unknown key. Did you mean 'path'?"],
        ),
        ("a, held_out: 1.5", INVALID, ["data.held_out: Input should be less than 1 (given: 1.5)"]),
    ],
)
def test_of_what_may_be_several_kinds_only_the_nearest_is_told(
    train: str, code: str, messages: list[str], tmp_path: Path
) -> None:
    lines = error(code, f"data: {{train: {train}}}\ndelta: {{method: lora}}\n", tmp_path).splitlines()
    assert len(lines) == len(messages)
    assert all(f"r.yaml:1: {wanted}" in line for wanted, line in zip(messages, lines, strict=True))


def test_a_mistake_on_the_command_line_says_so(tmp_path: Path) -> None:
    message, steps = error(UNKNOWN, GOOD, tmp_path, "train.stps=3"), "train: {steps: 3}\n"
    assert "command line: train.stps: unknown key. Did you mean 'steps'?" in message
    assert "'train.steps'" in error("recipe/malformed-override", GOOD, tmp_path, "train.steps")
    assert "train.steps is 3" in error("recipe/no-nested-keys", GOOD + steps, tmp_path, "train.steps.x=1")
    assert "command line: loss:" in error(INVALID, GOOD, tmp_path, "loss.name=x")


def test_overrides_reach_into_lists_and_behind_names(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "data: {train: [a.jsonl, {path: b.jsonl, weight: 3}]}\nloss: dpo\nbase: smollm2\ncallbacks: [ema, lora-plus]\n"
    )
    recipe: Any = read(
        Recipe,
        file,
        ["data.train.0.weight=2", "data.train.1.cap=7", "callbacks.1.ratio=4", "loss.beta=0.3", "base.dtype=float32"],
    )
    assert [(source.path, source.weight, source.cap) for source in recipe.data.sources()] == [
        ("a.jsonl", 2, None),
        ("b.jsonl", 3, 7),
    ]
    assert (recipe.callbacks[0].name, recipe.callbacks[1].name, recipe.callbacks[1].ratio) == ("ema", "lora-plus", 4)
    assert (recipe.loss.name, recipe.loss.beta, recipe.base.name, recipe.base.dtype) == (
        "dpo",
        0.3,
        "smollm2",
        "float32",
    )
    file.write_text("data: {train: a.jsonl}\ncallbacks: lora-plus\ndelta:\n")
    one: Any = read(Recipe, file, ["callbacks.0.ratio=4", "data.train.0.cap=5", "delta.method=lora", "delta.r=2"])
    assert (one.callbacks[0].ratio, one.data.sources()[0].cap, one.delta.r) == (4, 5, 2)


def test_a_part_of_an_override_that_holds_dots_is_quoted(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    pattern = r"self_attn\.(q|v)_proj"
    for quote in "\"'":
        recipe: Any = read(Recipe, file, [f"delta.patterns.{quote}{pattern}{quote}.r=4"])
        assert recipe.delta.patterns == {pattern: {"r": 4}}


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("callbacks.2.decay=1", "recipe/index-out-of-range", "callbacks has 2 entries"),
        ("callbacks.ema.decay=1", "recipe/list-without-index", "callbacks.0.ema"),
        ("callbacks.1.ratoi=1", UNKNOWN, "command line: callbacks.1.ratoi: unknown key. Did you mean 'ratio'?"),
        ("data..train=1", "recipe/malformed-override", "'data..train=1'"),
        (".train=1", "recipe/malformed-override", "'.train=1'"),
        ("=1", "recipe/malformed-override", "'=1'"),
    ],
)
def test_an_override_that_reaches_nothing_says_what_is_there(
    override: str, code: str, message: str, tmp_path: Path
) -> None:
    assert message in error(code, GOOD + "callbacks: [ema, lora-plus]\n", tmp_path, override)


@pytest.mark.parametrize(
    ("text", "code", "messages"),
    [
        (
            "delta: {r: 4}",
            INVALID,
            ["r.yaml:2: delta.method: say which", "`method: NAME` beside r", "There is: ", "adalora"],
        ),
        ("delta: {method: lorra}", INVALID, ["r.yaml:2: delta.method: 'lorra' is unknown. Did you mean 'lora'"]),
        ("deltas: {a: {r: 4}}", INVALID, ["deltas.a.method: say which"]),
        ("select: {keep: 3}", INVALID, ["select.by: say which", "There is: "]),
        ("train: {lr: 1}", UNKNOWN, ["train.lr: unknown key. Here it is train.learning_rate"]),
        ("train: {num_train_epochs: 3}", UNKNOWN, ["Here it is train.epochs"]),
        ("train: {gradient_accumulation_steps: 4}", UNKNOWN, ["Here it is train.batch_rows, the rows of a whole step"]),
        ("train: {per-device-train-batch-size: 4}", UNKNOWN, ["Here it is train.batch_rows"]),
        ("lr: 1", UNKNOWN, ["r.yaml:2: lr: unknown key. Here it is train.learning_rate"]),
        ("delta: {method: lora, lora_alpha: 16}", UNKNOWN, ["delta.lora_alpha: unknown key. Here it is delta.alpha"]),
        ("base: {name: x, torch_dtype: bf16}", UNKNOWN, ["base.torch_dtype: unknown key. Here it is base.dtype"]),
        ("output_dir: x", UNKNOWN, ["Here it is no key: graft train --out DIR"]),
        ("train: {lr_scheduler_type: cosine}", UNKNOWN, ["Here it is train.schedule"]),
        ("base: {name: x, chat_template_kwargs: {a: 1}}", UNKNOWN, ["Here it is data.template_variables"]),
        (
            "data: {train: a.jsonl, keep: 3}",
            UNKNOWN,
            ["data.keep: unknown key. Here it is select.keep or callbacks.keep or train.keep"],
        ),
        ("max_tokens: 7", UNKNOWN, ["max_tokens: unknown key. Here it is data.max_tokens"]),
    ],
)
def test_what_other_trainers_call_a_key_gets_the_key_here(
    text: str, code: str, messages: list[str], tmp_path: Path
) -> None:
    rows = "" if text.startswith("data:") else "data: {train: a.jsonl}"
    message = error(code, f"{rows}\n{text}\n", tmp_path)
    for part in messages:
        assert part in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("base: {name: x, store: nf4}", "r.yaml:2: base.store: {}: write `base: {quantization: nf4}`"),
        ("base: {name: x, store: bf16}", "r.yaml:2: base.store: {}: write `base: {dtype: bfloat16}`"),
        ("base: {name: x, store: auto}", "r.yaml:2: base.store: {}: write `base: {dtype: auto}`"),
        (
            "base: {name: x, store: [4]}",
            "base.store: {} (auto, float32, bfloat16, float16; none, int8, int4, nf4)",
        ),
        (
            "loss: {name: distillation, teacher: x, teacher_store: int8}",
            "loss.teacher_store: this key was replaced by teacher_dtype and teacher_quantization: write "
            "`loss: {teacher_quantization: int8}`",
        ),
        (
            "rl: {scorer: {by: reward-model, model: x, store: fp32}}",
            "rl.scorer.store: this key was replaced by dtype (auto, float32, bfloat16, float16)",
        ),
    ],
)
def test_a_store_of_before_is_answered_with_what_to_write_now(text: str, answer: str, tmp_path: Path) -> None:
    message = error(UNKNOWN, f"data: {{train: a.jsonl}}\n{text}\n", tmp_path)
    assert answer.replace("{}", "this key was replaced by dtype and quantization", 1) in message
    assert len(message.splitlines()) == 1


def test_a_store_of_before_on_the_command_line_is_answered_too(tmp_path: Path) -> None:
    assert "command line: base.store: this key was replaced by" in error(UNKNOWN, GOOD, tmp_path, "base.store=nf4")


def test_both_spellings_of_a_dtype_are_one_recipe(tmp_path: Path) -> None:
    trees = []
    for dtype in ("bf16", "bfloat16"):
        file = tmp_path / f"{dtype}.yaml"
        file.write_text(f"base: {{name: x, dtype: {dtype}}}\ndata: {{train: a.jsonl}}\n")
        trees.append(to_tree(read(Recipe, file)))
    assert trees[0] == trees[1]
    assert trees[0]["base"]["dtype"] == "bfloat16"
    assert "base.dtype: Input should be 'auto', 'float32'" in error(INVALID, "base: {name: x, dtype: fp8}\n", tmp_path)


def test_every_other_name_leads_to_a_key_that_exists_and_is_no_key_itself() -> None:
    tree = to_tree(Recipe(data=DataConfig(train="a")))
    tree |= {"base": to_tree(BaseConfig(name="a")), "deltas": None}
    tree["rl"] = dict.fromkeys(field.name for field in fields(RLConfig))
    known = {".".join(key) for key in inside(tree)}
    for name, ours in OTHER_NAMES.items():
        key = ours.partition(" ")[0].rstrip(",;")
        assert key == "no" or key in known, (name, ours)
        section = key.partition(".")[0]
        assert f"{section}.{name}" not in known, name


def inside(tree: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from inside(value, (*at, key))


@pytest.mark.parametrize("text", ["base: &a [*a]\n", "base: &a {name: *a}\n", "a: &a {b: {c: [1, *a]}}\n"])
def test_an_alias_of_what_it_is_in_is_refused(text: str, tmp_path: Path) -> None:
    assert "r.yaml:2: " in error("recipe/endless-alias", GOOD.splitlines()[0] + "\n" + text, tmp_path)


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    message = error(INVALID, GOOD + "  r: 0\n  alpha: -1\n", tmp_path)
    assert "delta.r" in message
    assert "delta.alpha" in message


def test_a_missing_recipe_names_the_ones_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    with raises("recipe/no-such-recipe", match=r"Did you mean .*mine\.yaml"):
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
