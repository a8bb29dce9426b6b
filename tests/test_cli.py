"""The command line: what scripts rely on, and errors that are one message."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from graftlm import cli
from graftlm.adapters.save import save_adapter
from graftlm.deltas import METHODS
from graftlm.hub.config import BaseConfig
from graftlm.hub.load import load_base
from graftlm.model.attach import attach
from graftlm.testing import save_tiny_base, tiny_model, tiny_tokenizer
from graftlm.testing.deltas import close, logits, move
from tests.errors import raises

ROWS = "\n".join(json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) for n in range(12))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path / "rows.jsonl"


@pytest.fixture
def recipe(base_folder: Path, rows: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"base: {{name: {base_folder}, dtype: float32}}\n"
        f"data: {{train: {rows}, held_out: 2}}\n"
        "delta: {method: lora, r: 2, alpha: 64}\n"
        "train: {steps: 3, batch_rows: 2, learning_rate: 0.05}\n"
        "report: {max_new_tokens: 4}\n"
    )
    return file


def graft(*arguments: str, input: str | None = None) -> Any:
    result = CliRunner().invoke(cli.app, list(arguments), input=input)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.versions
def test_train_generate_and_chat_work_end_to_end(recipe: Path, base_folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    trained = graft("train", str(recipe), "train.steps=20", "--out", out)
    assert trained.exit_code == 0
    for shown in ("pre-flight", "supervised", "training", "held-out answers", "ROUGE-L", "wrote"):
        assert shown in trained.stdout
    assert json.loads(Path(out, "summary.json").read_text())["train"]["steps"] == 20

    ask = ("generate", "--base", str(base_folder), "--prompt", "question 3", "--max-new-tokens", "8")
    base, tuned = graft(*ask), graft(*ask, "--adapter", out)
    assert base.exit_code == tuned.exit_code == 0
    assert "checksums and base fingerprint match" in tuned.stderr
    assert base.stdout != tuned.stdout

    talk = ("chat", "--base", str(base_folder), "--adapter", out, "--max-new-tokens", "8")
    output = graft(*talk, input="question 3\n/new\n/base\nquestion 3\n/new\n/tuned\nquestion 3\n/quit\n").stdout
    assert output == tuned.stdout + base.stdout + tuned.stdout, "/base and /tuned switch the delta in mid-conversation"


def test_chat_names_the_command_that_was_meant(base_folder: Path) -> None:
    result = graft("chat", "--base", str(base_folder), input="/bse\n/base\n")
    assert "/bse: no such command. Did you mean '/base'?" in result.stderr
    assert "start with --adapter" in result.stderr


@pytest.mark.versions
def test_data_check_prints_json_for_scripts(base_folder: Path, rows: Path) -> None:
    result = graft(
        "data", "check", str(rows), "--base", str(base_folder), "--mask", "response", "--show", "2", "--json"
    )
    report = json.loads(result.stdout)
    assert report["rows"] == 12
    assert report["end_of_turn"] == "<|im_end|>"
    assert report["end_of_turn_trained"] is True
    assert len(report["shown"]) == 2
    for row, number in zip(report["shown"], (0, 1), strict=True):
        assert all(token.keys() == {"id", "text", "role", "weight"} for token in row["tokens"])
        trained = "".join(token["text"] for token in row["tokens"] if token["weight"])
        assert trained == f"answer {number}<|im_end|>"
    assert report["supervised_tokens"] <= report["tokens"]


def test_data_check_reads_a_recipe_and_other_masks(recipe: Path) -> None:
    counts = [
        json.loads(graft("data", "check", str(recipe), "--mask", mask, "--json").stdout)["supervised_tokens"]
        for mask in ("response", "instruction", "everything")
    ]
    assert counts == sorted(counts)
    assert len(set(counts)) == 3
    shown = graft("data", "check", str(recipe)).stdout
    assert "an answer ends with" in shown
    assert "10" in shown, "two of the twelve rows are held out"


def test_rows_that_cannot_be_used_are_left_out_and_reported(base_folder: Path, rows: Path, recipe: Path) -> None:
    rows.write_text(ROWS + '\n{"prompt": "q", "completion": ""}\n\n')
    report = json.loads(graft("data", "check", str(rows), "--base", str(base_folder), "--json").stdout)
    assert report["rows"] == 12
    assert [text.partition(": ")[0] for text in report["problems"]] == [f"{rows}:13"]
    assert [text.partition(": ")[0] for text in report["notes"]] == [f"{rows}:14"]
    shown = graft("data", "check", str(recipe)).stdout
    assert "1 rows that can NOT be used" in shown
    strict = recipe.read_text().replace("held_out: 2", "held_out: 2, strict: true")
    recipe.write_text(strict)
    with raises("data/unusable-rows", match="1 rows of "):
        graft("data", "check", str(recipe))


def test_rows_that_the_template_refuses_are_told_with_the_others(
    base_folder: Path, rows: Path, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if '11' in m.content or '3' in m.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    rows.write_text("no JSON\n" + ROWS)
    options = ("--base", str(base_folder), "--template", str(tmp_path / "t.jinja"), "--json")
    report = json.loads(graft("data", "check", str(rows), *options).stdout)
    assert [text.partition(": ")[0] for text in report["problems"]] == [f"{rows}:{n}" for n in (1, 5, 13)]
    assert report["rows"] == 10
    not_strict = json.loads(graft("data", "check", str(recipe), *options).stdout)
    assert sorted(text.partition(": ")[0] for text in not_strict["problems"]) == [f"{rows}:{n}" for n in (1, 13, 5)]
    assert not_strict["rows"] + not_strict["held_out_rows"] == 10


def test_data_check_reads_what_axolotl_describes(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows.write_text(json.dumps({"messages": turns}))
    (tmp_path / "axolotl.yaml").write_text("base_model: x\ndatasets: [{path: rows.jsonl, type: chat_template}]\n")
    described = ("data", "check", str(tmp_path / "axolotl.yaml"), "--base", str(base_folder), "--json")
    assert json.loads(graft(*described).stdout)["rows"] == 1


def test_several_sources_are_mixed_and_none_is_held_out_twice(recipe: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text(
        '{"instruction": "few 1", "output": "a"}\n{"instruction": "few 2", "output": "b"}'
    )
    several = f"train: [{rows}, {{path: {tmp_path}/few.jsonl, weight: 6.0}}], mix_temperature: 1.0"
    recipe.write_text(recipe.read_text().replace(f"train: {rows}", several))
    report = json.loads(graft("data", "check", str(recipe), "--json").stdout)
    assert report["format"] == "prompt-completion, alpaca"
    assert (report["rows"], report["held_out_rows"]) == (12, 2)
    assert [note for note in report["notes"] if "rows of an epoch" in note]


def test_rows_are_converted_to_messages(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    rows.write_text(ROWS + "\nno JSON\n")
    done = graft("data", "convert", str(rows), "--to", "messages", "--out", str(out))
    assert done.exit_code == 0
    assert f"{rows}:13: not valid JSON" in done.stderr
    assert f"wrote 12 rows to {out}" in done.stderr
    turns = [{"role": "user", "content": "question 0"}, {"role": "assistant", "content": "answer 0"}]
    assert json.loads(out.read_text().splitlines()[0]) == {"messages": turns}
    with raises("output/already-exists"):
        graft("data", "convert", str(rows), "--out", str(out))


def test_labelled_rows_are_converted_by_the_templates_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("said,label\nfine,1\nbad,0\n")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out.jsonl"
    way = "{prompt: 'Is it good? {said}', completion: '{label}', words: {label: ['no', 'yes']}}"
    source = f"{{path: {tmp_path}/rows.csv, templates: [{way}]}}"
    recipe.write_text(f"data: {{train: {source}}}\n")
    assert graft("data", "convert", str(recipe), "--out", str(out)).exit_code == 0
    output = [[turn["content"] for turn in json.loads(line)["messages"]] for line in out.read_text().splitlines()]
    assert output == [["Is it good? fine", "yes"], ["Is it good? bad", "no"]]
    recipe.write_text(f"data: {{train: [{source}, {tmp_path}/rows.csv]}}\n")
    with raises("data/several-sources"):
        graft("data", "convert", str(recipe), "--out", str(out), "--overwrite")


def test_rows_are_written_to_a_name_that_says_what_they_are(rows: Path, tmp_path: Path) -> None:
    with raises("output/not-jsonl"):
        graft("data", "convert", str(rows), "--out", str(tmp_path / "out.csv"))


@pytest.mark.versions
def test_methods_are_listed_as_json() -> None:
    listed = json.loads(graft("methods", "--json").stdout)
    assert [m["name"] for m in listed] == list(METHODS)
    for method in listed:
        known = METHODS[method["name"]]
        assert method["mergeable"] == known.mergeable
        assert method["mergeable"] or method["why_not_mergeable"]
        assert method["factors"] == known.has_factors
        assert (method["peft_type"] is None) == (method["peft_tensors"] is None)
        assert method["learning_rate"] > 0
    assert "lora" in graft("methods").stdout


@pytest.mark.versions
def test_an_adapter_goes_out_by_merge_and_by_export(base_folder: Path, tmp_path: Path) -> None:
    loaded = load_base(BaseConfig(name=str(base_folder), dtype="float32"))
    move(attach(loaded.model, METHODS["dora"].config(r=4)))
    wanted = logits(loaded.model)
    save_adapter(loaded.model, tmp_path / "a")
    base = ("--base", str(base_folder))
    graft("merge", *base, "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    close(
        logits(merged), wanted, "graft merge", tolerance=0.02
    )  # the command loads the base in bf16 where that is fast
    half = graft("merge", *base, "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "half"), "--dtype", "bf16")
    assert "bfloat16 loses" in half.stderr
    found = json.loads(
        graft("export", str(tmp_path / "a"), "--to", "plain-lora", "--rank", "4", "--out", str(tmp_path / "lora"),
              "--json", *base).stdout
    )  # fmt: skip
    assert not found["exact"]
    assert {server["server"]: server["accepts"] for server in found["servers"]}["vLLM"]
    output = graft("export", str(tmp_path / "a"), "--to", "peft", "--out", str(tmp_path / "peft"), *base).stdout
    assert "it refuses DoRA" in output


@pytest.mark.versions
def test_merging_onto_quantized_weights_says_what_they_had_lost(base_folder: Path, tmp_path: Path) -> None:
    loaded = load_base(BaseConfig(name=str(base_folder), quantization="nf4"))
    move(attach(loaded.model, METHODS["lora"].config(r=4)))
    save_adapter(loaded.model, tmp_path / "a")
    base = ("--base", str(base_folder), "--adapter", str(tmp_path / "a"), "--quantization", "nf4")
    output = graft("merge", *base, "--out", str(tmp_path / "merged")).stderr
    assert "times the change away at" in output
    assert "the middle one" in output
    assert "trained on" not in output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    close(logits(merged), logits(loaded.model.float()), "graft merge onto nf4", tolerance=1e-4)
    other = graft("merge", *base[:-2], "--base-dtype", "fp32", "--out", str(tmp_path / "other")).stderr
    assert "it was trained on quantization nf4, this base has none" in other


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (("train", "no.yaml"), "no.yaml: no such recipe"),
        (("data", "check", "rows.jsonl", "--mask", "respnse"), "'response'"),
        (("data", "check", "none.jsonl"), "none.jsonl: no such file"),
        (("generate", "--base", "./nowhere", "--prompt", "x"), "./nowhere: no such folder"),
    ],
)
def test_an_error_is_one_message_and_exit_code_1(arguments: tuple[str, ...], output: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    command = [sys.executable, "-m", "graftlm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert output in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "r.yaml"), "unknown command plan: it is estimate now"),
        (("train", "r.yaml", "--probe-lr"), "unknown option --probe-lr: it is `graft lr-range RECIPE` now"),
        (
            ("train", "r.yaml", "--probe-lr", "--html", "x.html"),
            "unknown option --probe-lr: it is `graft lr-range RECIPE`",
        ),
        (("trian", "r.yaml"), "No such command 'trian'"),
        (("generate", "x", "--store", "nf4"), "unknown option --store: it is `--dtype` or `--quantization` now"),
        (("merge", "--store=bf16"), "unknown option --store: it is `--base-dtype` or `--quantization` now"),
        (("generate", "x", "--dtype", "bf15"), "unknown value 'bf15'. There is: auto, bfloat16, float16, float32"),
        (("chat", "--quantization", "nf3"), "unknown value 'nf3'. Did you mean 'nf4'"),
        (("train",), "Missing argument"),
        (("export", "adapter", "--to", "onnx", "--out", "o"), "unknown value 'onnx'. There is: delta"),
        (
            ("merge", "--adapter", "a", "--out", "o", "--dtype", "fp8"),
            "unknown value 'fp8'. There is: bfloat16, float32",
        ),
        (("data", "convert", "rows.jsonl", "--to", "message", "--out", "o.jsonl"), "Did you mean 'messages'?"),
        (("data", "select", "rows.jsonl", "--by", "lesss", "--out", "o.jsonl"), "Did you mean 'less'?"),
        (("sweep", "r.yaml", "seed=0..2", "--on", "slurm"), "unknown value 'slurm'. There is: local, ray"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = graft(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_an_interrupted_command_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("graftlm.environment.environment", interrupted)
    monkeypatch.setattr(sys, "argv", ["graft", "env"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130


@pytest.mark.versions
def test_the_version_is_printed() -> None:
    assert graft("--version").stdout.startswith("graftlm ")


def test_data_check_tells_what_the_rows_hold_and_writes_a_page(base_folder: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    pairs = [("a", "As an AI language model, no"), ("what?", "caf\u00c3\u00a9"), ("a", "As an AI language model, no")]
    file.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs))
    result = graft("data", "check", str(file), "--base", str(base_folder), "--html", str(page))
    for shown in ("exact duplicates", "refusals", "encoding damage", "languages", "wrote"):
        assert shown in result.stdout
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    tree = json.loads(graft("data", "check", str(file), "--base", str(base_folder), "--json").stdout)
    counts = {finding["kind"]: finding["count"] for finding in tree["survey"]["findings"]}
    assert (counts["exact duplicates"], counts["refusals"], counts["encoding damage"]) == (1, 2, 1)
    assert tree["pack_fill"] > 0
    assert set(tree["prompt_tokens"]) == {"tokens", "quantiles", "edges", "rows"}


@pytest.mark.versions
def test_the_end_that_a_base_lacks_is_named_in_card_and_export_and_written_by_merge(tmp_path: Path) -> None:
    """Turns end with <|im_end|> (2), and the base's settings know <|endoftext|> (0) alone."""
    model, tokenizer = tiny_model(eos_token_id=0), tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "recipe.yaml").write_text(
        f"base: {{name: {base}, dtype: float32}}\ndata: {{train: {tmp_path}/rows.jsonl}}\n"
        "delta: {method: lora, r: 2}\ntrain: {steps: 2, batch_rows: 2}\nreport: {samples: 0}\n"
    )
    assert graft("train", str(tmp_path / "recipe.yaml"), "--out", str(out)).exit_code == 0
    assert "answers end with <|im_end|> (id 2)" in (out / "README.md").read_text()
    exported = graft("export", str(out), "--to", "peft", "--out", str(tmp_path / "peft"), "--base", str(base))
    assert "answers end with <|im_end|> (id 2)" in exported.stderr
    graft("merge", "--base", str(base), "--adapter", str(out), "--out", str(tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|im_end|>"


def test_it_is_said_where_transformers_generates(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "bloom", model_type="bloom", hidden_size=32, n_layer=2, n_head=4)
    result = graft("generate", "question 3", "--base", str(base), "--max-new-tokens", "4")
    assert result.exit_code == 0
    assert "answers are generated by transformers: " in result.stderr


def test_a_question_is_an_argument_and_sampling_is_checked_before_anything_is_loaded(base_folder: Path) -> None:
    base = ("--base", str(base_folder), "--max-new-tokens", "6")
    result = graft("generate", "question 3", *base)
    assert result.exit_code == 0
    assert result.stdout == graft("generate", "--prompt", "question 3", *base).stdout
    sampled = [graft("generate", "question 3", *base, "--temperature", "3", "--seed", str(n)).stdout for n in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert graft("generate", "question 3", *base, "--temperature", "3", "--top-k", "1").stdout == result.stdout
    for wrong, why in (
        ((), "give one question"),
        (("a", "--prompt", "b"), "give one question"),
        (("a", "--top-k", "3"), "top_k: temperature 0 takes the likeliest token"),
        (("a", "--min-p", "0.1", "--top-p", "0.5"), "top_p and min_p: temperature 0"),
        (("a", "--stop", ""), "would end every answer at once"),
    ):
        failed = graft("generate", *wrong, "--base", "./nowhere")
        assert failed.exit_code == 2
        assert why in " ".join(failed.stderr.split())
    assert graft("chat", "--top-k", "3", "--base", "./nowhere", input="").exit_code == 2


def test_a_chat_template_that_cannot_be_used_does_not_keep_weights_from_being_merged(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", template="{% for m in messages %}{{ m.content }}")
    loaded = load_base(BaseConfig(name=str(base), dtype="float32"))
    move(attach(loaded.model, METHODS["lora"].config(r=4)))
    save_adapter(loaded.model, tmp_path / "a")
    made = graft("merge", "--base", str(base), "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "merged"))
    assert made.exit_code == 0
    assert "the token that ends an answer is not known" in made.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_an_answer_is_json_of_the_schema_in_a_file(base_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    file = tmp_path / "schema.json"
    file.write_text('{"enum": ["ab", [1, true]]}')
    ask = ("generate", "question 3", "--base", str(base_folder), "--json-schema", str(file))
    found = graft(*ask)
    assert json.loads(found.stdout) in ("ab", [1, True])
    assert "cut off" not in found.stderr
    assert "the answer is cut off" in graft(*ask, "--max-new-tokens", "1").stderr
    file.write_text('{"uniqueItems": true}')
    with raises("request/unsupported-schema", match="#/uniqueItems"):
        graft(*ask)
    file.write_text("{")
    assert "--json-schema" in graft(*ask).stderr


def test_penalties_reach_the_answer(base_folder: Path) -> None:
    ask = ("generate", "question 3", "--base", str(base_folder), "--max-new-tokens", "12")
    plain = graft(*ask).stdout
    assert (
        len({plain, graft(*ask, "--presence-penalty", "2").stdout, graft(*ask, "--frequency-penalty", "-2").stdout}) > 1
    )
    assert "--frequency-penalty" in graft(*ask, "--frequency-penalty", "3").stderr
