"""Plugins: rows of tables from other distributions, the broken ones among them. Each test is a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graftlm.plugins import GROUPS
from graftlm.testing import save_tiny_base
from tests.docs_run.names import ROOT, blocks

PAGE = (ROOT / "docs" / "how-to" / "plugins.md").read_text(encoding="utf-8")

OTHERS = """
from typing import Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.losses.base import Loss, LossConfig, LossSum, tokens
from graftlm.rl.rewards import RewardRow
from graftlm.rl.rewards.base import ScorerConfig
from graftlm.selection import Selector
from graftlm.selection.base import SelectorConfig
from graftlm.training.callback import Callback, CallbackConfig, CallbackRow as Row


@config
class DoubleConfig(LossConfig):
    name: Literal["double"] = "double"


def value(config, policy, reference, batch):
    return LossSum(-2 * (policy * batch.weights).sum(), batch.weights.sum())


LOSS = Loss(DoubleConfig, value, tokens, rows="answers")


@config
class ShoutConfig(CallbackConfig):
    name: Literal["shout"] = "shout"
    word: str = "step"


class Shout(Callback):
    paper, cost = "none", "none"

    def on_step(self, training):
        training.events.append({"shout": f"{self.config.word} {training.done}"})


CALLBACK = Row(ShoutConfig, Shout)


@config
class ShortConfig(ScorerConfig):
    by: Literal["short"] = "short"


REWARD = RewardRow(ShortConfig, lambda config, network, today: lambda answers: [-len(a.answer) for a in answers])


@config
class OddConfig(SelectorConfig):
    by: Literal["odd"] = "odd"


SELECTOR = Selector(OddConfig, lambda config, pool: np.arange(len(pool), dtype=np.float32) % 2)
"""


def distribution(folder: Path, name: str, version: str, points: str, **modules: str) -> None:
    """What an installer leaves: modules, and a dist-info folder with entry points."""
    folder.mkdir(exist_ok=True)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)


def run(script: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """The distribution of the page, and one with a row for every other table."""
    folder = tmp_path / "installed"
    (_, module), (_, toml) = blocks(PAGE, "python")[0], blocks(PAGE, "toml")[0]
    name, version = (re.search(rf'^{key} = "(.*)"$', toml, re.M) for key in ("name", "version"))
    assert name is not None
    assert version is not None
    group, point = re.search(r'entry-points\."(.*)"\]\n(.*)$', toml.strip(), re.S).groups()  # type: ignore[union-attr]
    distribution(folder, name[1], version[1], f"[{group}]\n{point.replace(chr(34), '')}\n", graft_gain=module)
    points = "".join(
        f"[{group}]\n{point}\n"
        for group, point in {
            "graftlm.losses": "double = graft_others:LOSS",
            "graftlm.callbacks": "shout = graft_others:CALLBACK",
            "graftlm.rewards": "short = graft_others:REWARD",
            "graftlm.selectors": "odd = graft_others:SELECTOR",
        }.items()
    )
    distribution(folder, "graft-others", "0.3", points, graft_others=OTHERS)
    return folder


def test_plugins_of_every_group_train(good: Path, rows: Path, tmp_path: Path) -> None:
    base, out = save_tiny_base(tmp_path / "base"), tmp_path / "out"
    script = """
import json, sys
import graftlm
base, rows, out = sys.argv[1:]
common = {"base": base, "data": {"train": rows}, "train": {"steps": 3, "threads": 1}, "report": {"answers": 0}}
from graftlm.config.schema import build
recipe = build(graftlm.Recipe, common | {
    "select": {"by": "odd", "keep": 12}, "delta": {"method": "output-gain"}, "loss": "double",
    "callbacks": [{"name": "shout", "word": "done"}],
}, source="test")
result = graftlm.train(recipe, out=out)
lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
plain = graftlm.train(build(graftlm.Recipe, common | {
    "select": {"by": "odd", "keep": 12}, "delta": {"method": "output-gain"}}, source="test"), out=out + "-plain")
losses = [json.loads(line)["loss"] for line in open(f"{out}-plain/metrics.jsonl") if '"loss"' in line]
rl = build(graftlm.Recipe, common | {"rl": {"scorer": {"by": "short"}}}, source="test").rl
print(json.dumps({
    "moved": float(result.model.model.layers[0].mlp.down_proj.deltas["default"].g.abs().sum()),
    "events": [line["shout"] for line in lines if "shout" in line],
    "loss": [line["loss"] for line in lines if "loss" in line], "plain": losses, "by": rl.scorer.by,
}))
"""
    found = json.loads(run(script, good, base, rows, out).stdout.splitlines()[-1])
    assert found["moved"] > 0
    assert found["events"] == ["done 1", "done 2", "done 3"]
    assert found["loss"][0] == pytest.approx(2 * found["plain"][0], rel=1e-5)
    assert found["by"] == "short"
    # The adapter is read where no recipe was, and the method keeps the contract.
    script = """
import sys, json, torch, graftlm
base, out = sys.argv[1:]
model, tokenizer = graftlm.load_base(base)
print(graftlm.load_adapter(model, out))
assert "graftlm.recipe" not in sys.modules
assert "output-gain" in graftlm.METHODS
from graftlm.testing.contract import check_method
check_method("output-gain")
"""
    run(script, good, base, out)


@pytest.mark.slow
def test_env_lists_plugins_and_help_imports_none(good: Path) -> None:
    script = """
import json, sys
import typer.testing
from graftlm.cli import app
graft = typer.testing.CliRunner().invoke
assert graft(app, ["--help"]).exit_code == 0
assert not {"torch", "graft_gain", "graft_others"} & set(sys.modules), "help imports nothing"
print(json.dumps(json.loads(graft(app, ["env", "--json"]).stdout)["plugins"]))
print(graft(app, ["env"]).stdout)
print(graft(app, ["methods"]).stdout)
"""
    done = run(script, good)
    first, _, text = done.stdout.partition("\n")
    listed = json.loads(first)
    assert [(each["group"], each["name"], each["distribution"], each["version"]) for each in listed] == [
        ("graftlm.methods", "output-gain", "graft-gain", "1.2"),
        ("graftlm.losses", "double", "graft-others", "0.3"),
        ("graftlm.callbacks", "shout", "graft-others", "0.3"),
        ("graftlm.rewards", "short", "graft-others", "0.3"),
        ("graftlm.selectors", "odd", "graft-others", "0.3"),
    ]
    assert not any(each["error"] for each in listed)
    assert "graftlm.methods: output-gain of graft-gain 1.2\n" in text
    assert re.search(r"^ *output-gain ", text, re.M), "graft methods has it"
    assert done.stderr == ""


BROKEN = {
    "absent": ("methods", "graft_absent:METHOD", "No module named 'graft_absent'"),
    "nothing": ("methods", "graft_broken:NOTHING", "has no attribute 'NOTHING'"),
    "wrong": ("losses", "graft_broken:WRONG", "must be a graftlm.losses.base.Loss, this is a Method"),
    "kind": ("methods", "graft_gain:OutputGain", "this is the class OutputGain"),
    "renamed": ("methods", "graft_gain:METHOD", "method: Literal['output-gain'], and the entry point is called"),
    "plain": ("callbacks", "graft_broken:PLAIN", "must be a graftlm.training.callback.CallbackConfig under @config"),
    "above": ("selectors", "graft_above:SELECTOR", "A plugin imports only what is below graftlm.recipe"),
    "exits": ("methods", "graft_exits:METHOD", "SystemExit: 3"),
    "lora": ("methods", "graft_gain:METHOD", "the name 'lora' is taken by another row of METHODS"),
    "output-gain": ("methods", "graft_gain:METHOD", "the name 'output-gain' is taken by another row of METHODS"),
}


@pytest.mark.slow
def test_broken_plugins_are_reported_and_everything_else_works(good: Path, rows: Path, tmp_path: Path) -> None:
    modules = {
        "graft_broken": "from graft_gain import METHOD as WRONG\n"
        "from graftlm.callbacks import Row\nPLAIN = Row(int, int)\n",
        "graft_above": "from graftlm.recipe import Recipe\n",
        "graft_exits": "import sys\nsys.exit(3)\n",
    }
    points = "".join(
        f"[graftlm.{group}]\n" + "".join(f"{n} = {value}\n" for n, (g, value, _) in BROKEN.items() if g == group)
        for group in {group: None for group, _, _ in BROKEN.values()}
    )
    distribution(good, "graft-zzz", "9", points, **modules)
    base = save_tiny_base(tmp_path / "base")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {base}\ndata: {{train: {rows}}}\ntrain: {{steps: 1, threads: 1}}\nreport: {{answers: 0}}\n"
    )
    script = """
import json, sys
import typer.testing
from graftlm.cli import app
import graftlm.recipe  # warns here, before CliRunner captures what is written
recipe, out = sys.argv[1:]
graft = typer.testing.CliRunner().invoke
for changes in (["delta.method=absent"], ["loss=wrong"], ["callbacks=[plain]"], ["select.by=above"],
                ["deltas.first.method=exits"], ["callbacks.name=shoutt"]):
    refused = graft(app, ["train", recipe, *changes, "--out", out])
    print(json.dumps([changes[0], str(refused.exception)]))
for method in ("lora", "output-gain"):
    trained = graft(app, ["train", recipe, f"delta.method={method}", "--out", f"{out}-{method}"])
    assert trained.exit_code == 0, trained.exception
assert graft(app, ["methods"]).exit_code == 0
from graftlm.deltas import METHODS
assert METHODS["lora"].delta.__module__ == "graftlm.deltas.lora"
print(json.dumps(json.loads(graft(app, ["env", "--json"]).stdout)["plugins"]))
print(graft(app, ["env"]).stdout)
"""
    done = run(script, good, recipe, tmp_path / "out")
    lines = done.stdout.splitlines()
    refused = dict(map(json.loads, lines[:6]))
    for key, (name, what) in {
        "delta.method=absent": ("absent", "delta"),
        "loss=wrong": ("wrong", "loss"),
        "callbacks=[plain]": ("plain", "callbacks"),
        "select.by=above": ("above", "select"),
        "deltas.first.method=exits": ("exits", "deltas"),
    }.items():
        message = refused[key]
        assert f"{what}: {name!r} cannot be used: the plugin {name} (graftlm." in message
        assert "of graft-zzz 9 is broken: " in message
        assert BROKEN[name][2] in message
    assert "Did you mean 'shout'?" in refused["callbacks.name=shoutt"]
    errors = {(each["distribution"], each["name"]): each["error"] for each in json.loads(lines[6])}
    assert errors.keys() >= {("graft-zzz", name) for name in BROKEN}
    for name, (group, _, why) in BROKEN.items():
        assert why in errors["graft-zzz", name]
        assert done.stderr.count(f"plugin {name} (graftlm.{group}) of graft-zzz 9 is left out: ") == 1
        assert f"graftlm.{group}: {name} of graft-zzz 9, BROKEN: " in done.stdout
    assert errors["graft-gain", "output-gain"] == ""


def test_every_group_is_in_the_page_with_its_table() -> None:
    rows = re.findall(r"^\| `(graftlm\.\w+)` \| `.*?` \| `(\w+)` \| (.*) \|$", PAGE, re.M)
    assert {group: (key, tuple(re.findall(r"`(\w+)", names))) for group, key, names in rows} == {
        group: (about.key, about.sections) for group, about in GROUPS.items()
    }


@pytest.mark.slow
def test_a_plugin_that_imports_the_recipe_is_broken_whoever_loads_it_first(tmp_path: Path) -> None:
    folder = tmp_path / "installed"
    points = "[graftlm.methods]\nabove = graft_above:METHOD\n"
    distribution(folder, "graft-above", "1", points, graft_above="from graftlm.recipe import Recipe\n")
    script = """
import graftlm, graftlm.plugins, sys
from graftlm.testing import tiny_model
graftlm.attach(tiny_model(), graftlm.LoraConfig(r=2))
assert graftlm.Recipe(data=graftlm.DataConfig(train="rows.jsonl")).delta.method == "lora"
print(graftlm.plugins.plugins()[0].error)
"""
    done = run(script, folder)
    assert done.stdout.endswith("A plugin imports only what is below graftlm.recipe\n")
    assert done.stderr.count("is left out") == 1


@pytest.mark.slow
def test_two_plugins_with_one_name(good: Path) -> None:
    distribution(good, "graft-aaa", "1", "[graftlm.methods]\noutput-gain = graft_gain:METHOD\n")
    script = """
import graftlm.plugins
for each in graftlm.plugins.plugins():
    if each.name == "output-gain":
        print(each.distribution, each.error or "is used")
"""
    done = run(script, good)
    assert done.stdout == ("graft-aaa is used\ngraft-gain the name 'output-gain' is taken by another row of METHODS\n")
