"""The rules of each program, one by one: a folder that breaks a rule has the verdict no, with the reason."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graftlm.adapters.export.export import export
from graftlm.adapters.export.lint import PROGRAMS, RULES, lint, to_json
from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.testing.deltas import perturbed
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.architectures import build
from tests.errors import raises

READERS = ("PEFT", "vLLM", "SGLang", "LoRAX", "llama.cpp", "OpenVINO")
"""The programs that read a folder in PEFT's layout."""


def written(folder: Path, *tensors: str, **changes: Any) -> dict[str, tuple[bool, str]]:
    """The verdicts on a LoRA folder of another tool with these keys in its config, and these tensors beside its own."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "use_dora": False}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    own = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    own += [own[0].replace("lora_A", "lora_B")]
    save_file({name: torch.zeros(1) for name in [*own, *tensors]}, folder / "adapter_model.safetensors")
    return verdicts(folder)


def verdicts(folder: Path) -> dict[str, tuple[bool, str]]:
    return {verdict.server: (verdict.accepts, "; ".join(verdict.why)) for verdict in lint(folder)}


def test_plain_lora_is_read_by_whatever_reads_lora(tmp_path: Path) -> None:
    found = written(tmp_path / "a")
    assert tuple(found) == PROGRAMS
    assert {program for program, (accepts, _) in found.items() if accepts} == set(READERS)
    assert found["vLLM"] == (True, "")
    assert "--max-lora-rank 4" in found["SGLang"][1]
    assert "export `--to merged` and run mlx_lm.convert" in found["MLX"][1]
    assert "--to gguf" in found["Ollama"][1]


NORM = "base_model.model.model.norm.weight"
EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A"
BREACHES: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, str]]] = {
    "dora": ({"use_dora": True}, (), dict.fromkeys(READERS[1:], r"DoRA.*--to plain-lora --rank N")),
    "ranks": (
        {"rank_pattern": {"q_proj": 2}},
        (),
        dict.fromkeys(("SGLang", "LoRAX", "OpenVINO"), "rank_pattern.*--to plain-lora"),
    ),
    "alphas": (
        {"alpha_pattern": {"q_proj": 2}},
        (),
        dict.fromkeys(("SGLang", "LoRAX", "llama.cpp", "OpenVINO"), "alpha_pattern.*--to plain-lora"),
    ),
    "an init that changes the base": ({"init_lora_weights": "pissa"}, (), {"vLLM": "init_lora_weights='pissa'"}),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, (), {"vLLM": "alora_invocation_tokens"}),
    "modules": ({"modules_to_save": ["lm_head"]}, (), dict.fromkeys(READERS[1:], "modules_to_save.*--to merged")),
    "biases": ({"bias": "lora_only"}, (), dict.fromkeys(READERS[1:], "biases.*--to merged")),
    "biases of LoRA": ({"lora_bias": True}, (), dict.fromkeys(READERS[1:], "biases")),
    "another method": ({"peft_type": "IA3"}, (), dict.fromkeys(READERS[1:], "this is IA3.*--to plain-lora")),
    "rsLoRA": (
        {"use_rslora": True, "lora_alpha": 8},
        (),
        {
            "SGLang": "use_rslora",
            "llama.cpp": "use_rslora.*--to gguf",
            "OpenVINO": r"scale 4: export `--to plain-lora`",
        },
    ),
    "a scale": ({"lora_alpha": 10}, (), {"OpenVINO": r"without adapter_config.json.*scale 2.5"}),
    "a large rank": ({"r": 600, "lora_alpha": 600}, (), {"vLLM": "largest rank is 512, this has 600"}),
    "a norm": ({}, (NORM,), {"vLLM": r"does not know, such as .*model.norm.weight"}),
    "embeddings": ({}, (EMBEDDING,), {"LoRAX": "embeddings out", "OpenVINO": "embeddings out"}),
    "a layer": (
        {},
        ("base_model.model.model.layers.0.mlp.fc1.lora_A.weight",),
        {"SGLang": r"layers.0.mlp.fc1: it has LoRA layers for other names"},
    ),
    "an expression": ({"target_modules": ".*q_proj"}, (), {"SGLang": "no regular expression"}),
    "Conv1D": ({"fan_in_fan_out": True}, (), {"llama.cpp": r"Conv1D.*--to gguf"}),
}


@pytest.mark.parametrize("case", BREACHES)
def test_a_folder_that_breaks_a_rule_is_refused_by_whom_it_concerns(case: str, tmp_path: Path) -> None:
    changes, tensors, refused = BREACHES[case]
    found = written(tmp_path / "a", *tensors, **changes)
    for program in READERS:
        accepts, why = found[program]
        assert accepts == (program not in refused), (program, why)
        assert re.search(refused.get(program, ""), why), (program, why)


def test_each_rule_says_for_whom_it_is_and_where_it_was_read() -> None:
    for rule in RULES:
        assert set(rule.programs) <= set(PROGRAMS)
        assert re.match(r"20\d\d-\d\d \S+", rule.read)


def test_a_rank_that_needs_an_option(tmp_path: Path) -> None:
    assert written(tmp_path / "a", r=17, lora_alpha=17)["vLLM"] == (True, "start it with --max-lora-rank 32")


def test_a_rank_of_a_pattern_counts(tmp_path: Path) -> None:
    accepts, why = written(tmp_path / "a", rank_pattern={"q_proj": 40})["vLLM"]
    assert accepts
    assert "--max-lora-rank 64" in why
    assert "since 0.32.0: export `--to plain-lora`" in why
    assert "has 600" in written(tmp_path / "b", rank_pattern={"q_proj": 600})["vLLM"][1]


def test_names_for_all_linear_layers_are_no_expression(tmp_path: Path) -> None:
    assert written(tmp_path / "a", target_modules="all-linear")["SGLang"][0]


def test_our_own_form_says_what_to_export(tmp_path: Path) -> None:
    save_adapter(perturbed("houlsby", tiny_model()), tmp_path / "a")
    found = verdicts(tmp_path / "a")
    assert not any(accepts for accepts, _ in found.values())
    assert "PEFT has no method 'houlsby'" in found["PEFT"][1]
    assert "houlsby in graftlm's own form: export `--to plain-lora`" in found["vLLM"][1]


def test_a_lora_that_peft_would_lose_is_read_by_servers_as_plain_lora(tmp_path: Path) -> None:
    model = attach(build("glm4_moe"), LoraConfig(r=4, alpha=4))
    save_adapter(model, tmp_path / "saved")
    found = verdicts(tmp_path / "saved")
    assert "of the routed experts" in found["PEFT"][1]
    assert "--to plain-lora" not in found["PEFT"][1]
    assert "lora in graftlm's own form: export `--to plain-lora`" in found["vLLM"][1]
    export(model, tmp_path / "lora", to="plain-lora")
    found = verdicts(tmp_path / "lora")
    assert not found["PEFT"][0]
    assert found["vLLM"][0]


def test_conv1d_layers_go_to_llama_cpp_by_our_export(tmp_path: Path) -> None:
    export(perturbed("lora", tiny_gpt2()), tmp_path / "lora", to="plain-lora")
    assert "--to gguf" in verdicts(tmp_path / "lora")["llama.cpp"][1]
    export(perturbed("lora", tiny_gpt2()), tmp_path / "gguf", to="gguf")
    assert {program for program, (accepts, _) in verdicts(tmp_path / "gguf").items() if accepts} == {
        "llama.cpp",
        "Ollama",
    }


def test_a_merged_model_says_what_to_convert_it_with(tmp_path: Path) -> None:
    export(perturbed("lora", tiny_model()), tmp_path / "merged", to="merged")
    found = verdicts(tmp_path / "merged")
    assert all(accepts for accepts, _ in found.values())
    assert "convert_hf_to_gguf.py" in found["llama.cpp"][1]
    assert "mlx_lm.convert" in found["MLX"][1]
    assert "optimum-cli" in found["OpenVINO"][1]


def test_a_difference_is_read_by_no_program(tmp_path: Path) -> None:
    export(perturbed("lora", tiny_model()), tmp_path / "delta", to="delta")
    assert not any(accepts for accepts, _ in verdicts(tmp_path / "delta").values())


def test_verdicts_as_json(tmp_path: Path) -> None:
    written(tmp_path / "a")
    first = to_json(lint(tmp_path / "a"))[0]
    assert first["server"] == "transformers"
    assert not first["accepts"]


def test_a_folder_without_an_adapter_or_a_model_is_refused(tmp_path: Path) -> None:
    with raises("adapter/nothing-to-check", match="absent"):
        lint(tmp_path / "absent")
