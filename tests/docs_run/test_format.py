"""docs/format.md: the files and keys that it names are those of a folder that a run leaves."""

import json
import re
from pathlib import Path

import pytest

import graftlm
from graftlm.recipe import Recipe
from tests.docs_run.names import ROOT

PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        base=str(base_folder),
        data=graftlm.DataConfig(train=str(folder / "rows.jsonl"), held_out=2),
        delta=graftlm.LoraConfig(r=2, patterns={"v_proj": {"r": 4, "alpha": 3.0}}),
        train=graftlm.TrainConfig(steps=2, batch_rows=2),
        report=graftlm.ReportConfig(max_new_tokens=2),
    )
    return graftlm.train(recipe, folder / "out").folder


def section(name: str) -> str:
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found is not None
    return found[1]


def first_column(text: str) -> list[str]:
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_file_of_the_folder_is_in_the_table_and_the_other_way_round(adapter: Path) -> None:
    names = set(first_column(PAGE.partition("## How it is written")[0]))
    assert names == {file.name for file in adapter.iterdir()}


def test_every_key_of_graftlm_json_is_in_the_table_and_the_other_way_round(adapter: Path) -> None:
    record = json.loads((adapter / "graftlm.json").read_text())
    written = {key for key in record if key != "base"} | {f"base.{key}" for key in record["base"]}
    assert set(first_column(section("graftlm.json"))) == written
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", record["base"]["digest"])
    assert all(re.fullmatch(r"[0-9a-f]{32}", digest) for digest in record["base"]["tensors"].values())
    assert record["sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors", "graftlm.json"}
    assert all(f"`{key}`" in section("graftlm.json") for key in ("method", "init", "targets", "dropout", "patterns"))


def test_the_keys_of_peft_that_are_named_are_written(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    keys = first_column(section("adapter_config.json"))
    assert len(keys) >= 10
    assert set(keys) <= config.keys()
    assert config["rank_pattern"] == {re.escape(f"model.layers.{n}.self_attn.v_proj"): 4 for n in range(2)}


def test_the_keys_of_the_logs_are_those_that_are_written(adapter: Path) -> None:
    text = section("summary.json")
    summary = json.loads((adapter / "summary.json").read_text())
    example = json.loads(" ".join(line for line in text.splitlines() if line.startswith("    ")))
    assert keys(example) == keys(summary)
    for name in ("metrics.jsonl", "held_out.jsonl"):
        described = text.partition(f"`{name}` holds")[2].partition(". ")[0]
        line = json.loads((adapter / name).read_text().splitlines()[0])
        assert set(re.findall(r"`(\w+)`", described)) == line.keys(), name


def keys(tree: object) -> object:
    return {key: keys(value) for key, value in tree.items()} if isinstance(tree, dict) else None
