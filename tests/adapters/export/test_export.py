"""What leaves the house computes what the model computed: merged, plain LoRA, GGUF, PEFT, differences."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from graftlm.adapters.export.export import export, lost_by_rounding, plain_lora
from graftlm.adapters.export.lint import lint
from graftlm.adapters.export.merged import merge_into
from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.deltas import METHODS
from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.model.modes import activate, deltas_off
from graftlm.testing.deltas import attach_tiny, close, logits, move, perturbed
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.errors import raises

pytestmark = pytest.mark.versions

MERGEABLE = [name for name, method in METHODS.items() if method.mergeable]
WITH_FACTORS = [name for name, method in METHODS.items() if method.has_factors]
UNTIED = {"full", "trainable-tokens"}  # sit on the embeddings, so that a tied head has to part


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_merged_folder_is_loaded_by_transformers_and_is_the_model(name: str, tmp_path: Path) -> None:
    model = perturbed(name, tiny_model())
    with deltas_off(model):
        base = logits(model)
    made = export(model, tmp_path / "out", to="merged")
    assert made["exact"]
    again = loaded(tmp_path / "out")
    close(logits(again), logits(model), name)
    assert not torch.allclose(logits(again), base)
    assert again.config.tie_word_embeddings == (name not in UNTIED)
    assert made["untied"] == (name in UNTIED)
    verdicts = {v.server: v.accepts for v in lint(tmp_path / "out")}
    assert verdicts["transformers"]


@pytest.mark.parametrize("name", WITH_FACTORS)
@pytest.mark.filterwarnings("ignore")
def test_whatever_has_factors_is_plain_lora_exactly_and_peft_reads_it(name: str, tmp_path: Path) -> None:
    model = perturbed(name, tiny_model(tie_word_embeddings=False))
    made = export(model, tmp_path / "out", to="plain-lora")
    assert made["exact"]
    again = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=False), tmp_path / "out")
    close(logits(again), logits(model), f"{name} as plain LoRA in PEFT")
    other = tiny_model(tie_word_embeddings=False)
    load_adapter(other, tmp_path / "out")
    close(logits(other), logits(model), f"{name} as plain LoRA here")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    verdicts = {v.server: v.accepts for v in lint(tmp_path / "out")}
    assert verdicts["PEFT"]
    assert verdicts["vLLM"]


def test_plain_lora_on_conv1d(tmp_path: Path) -> None:
    model = perturbed("lora", tiny_gpt2())
    export(model, tmp_path / "out", to="plain-lora")
    close(logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "out")), logits(model), "GPT-2")


def test_what_has_no_factors_needs_a_rank_and_says_what_it_lost(tmp_path: Path) -> None:
    model = perturbed("dora", tiny_model())
    with raises("target/missing-rank", match="dora.*--rank"):
        export(model, tmp_path / "out", to="plain-lora")
    assert not (tmp_path / "out").exists()
    whole = export(model, tmp_path / "whole", to="plain-lora", rank=32)  # the smaller side of every layer
    assert max(whole["errors"].values()) <= 1e-5
    again = tiny_model()
    load_adapter(again, tmp_path / "whole")
    close(logits(again), logits(model), "DoRA by a full SVD")
    part = export(model, tmp_path / "part", to="plain-lora", rank=3)
    assert 0 < min(part["errors"].values()) < 1
    assert not part["exact"]


def test_several_deltas_leave_as_one(tmp_path: Path) -> None:
    model = perturbed("lora", tiny_model())
    attach(model, LoraConfig(r=2, alpha=4, rslora=True), name="second")
    move(model)
    export(model, tmp_path / "out", to="plain-lora")
    again = tiny_model()
    load_adapter(again, tmp_path / "out")
    close(logits(again), logits(model), "two LoRAs as one")
    merge_into(model, tmp_path / "merged")
    close(logits(loaded(tmp_path / "merged")), logits(model), "two LoRAs merged")


def test_only_active_deltas_leave(tmp_path: Path) -> None:
    model = perturbed("lora", tiny_model())
    attach(model, LoraConfig(r=2), name="second")
    move(model)
    activate(model, "default")
    merge_into(model, tmp_path / "merged")
    close(logits(loaded(tmp_path / "merged")), logits(model), "the active one")


def test_a_delta_that_is_no_change_of_weights_is_refused_with_its_reason(tmp_path: Path) -> None:
    merged, plain = "target/not-mergeable", "target/not-plain-lora"
    for to, code in {"merged": merged, "plain-lora": plain, "delta": merged, "gguf": plain}.items():
        with raises(code):
            export(perturbed("prefix", tiny_model()), tmp_path / to, to=to)
        assert not (tmp_path / to).exists()


def test_biases_are_merged_into_an_architecture_that_can_have_them(tmp_path: Path) -> None:
    model = perturbed("bitfit", tiny_model(), targets=("q_proj", "down_proj"))
    merge_into(model, tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert again.config.attention_bias
    assert again.config.mlp_bias
    close(logits(again), logits(model), "BitFit")
    assert not {v.server: v.accepts for v in lint(tmp_path / "out")}["llama.cpp"]


def test_biases_are_refused_where_the_architecture_has_no_place_for_them(tmp_path: Path) -> None:
    model = perturbed("bitfit", tiny_model("mistral"), targets=("q_proj",))
    with raises("target/no-bias-in-model", match=r"2 biases.*\n.*q_proj.bias"):
        merge_into(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = export(model, tmp_path / "delta", to="delta")
    assert made["exact"]
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    assert stored["model.layers.1.self_attn.q_proj.bias"].any()
    with raises("target/not-plain-lora", match="bias"):
        export(model, tmp_path / "lora", to="plain-lora", rank=4)


@pytest.mark.parametrize("base", [tiny_model, tiny_gpt2])
def test_a_difference_added_to_the_base_is_the_model(base: Any, tmp_path: Path) -> None:
    model = perturbed("dora", base())
    export(model, tmp_path / "out", to="delta")
    plain = base()
    with torch.no_grad():
        for key, change in load_file(tmp_path / "out" / "delta.safetensors").items():
            if (own := dict(plain.named_parameters()).get(key)) is not None:
                own.add_(change)
    close(logits(plain), logits(model), "base + difference")


def test_rounding_to_bf16_is_measured_layer_by_layer(tmp_path: Path) -> None:
    model = perturbed("lora", tiny_model(), scale=0.0001)
    lost = lost_by_rounding(model, torch.bfloat16)
    host = model.get_submodule(lost[0].layer)
    W, (changed, _) = host.base.weight, host.effective()
    wanted = ((changed.bfloat16().float() - changed).norm() / (changed - W).norm()).item()
    assert lost[0].share == pytest.approx(wanted)
    assert lost[0].share > 0.3, "a change far below the last digit of W is mostly lost"
    assert max(item.share for item in lost_by_rounding(model, torch.float32)) < 1e-3
    made = export(model, tmp_path / "out", to="merged", dtype=torch.bfloat16)
    assert not made["exact"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_gguf_holds_the_factors_under_its_names_and_in_its_order(tmp_path: Path) -> None:
    model = perturbed("lora", tiny_model())
    export(model, tmp_path / "out", to="gguf")
    reader = gguf.GGUFReader(str(tmp_path / "out" / "adapter.gguf"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    plain = plain_lora(model).factors
    assert fields["adapter.lora.alpha"] == 4.0
    A, B = plain["model.layers.1.mlp.down_proj"]
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_a"], A.numpy())
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_b"], B.numpy())
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        B = plain[f"model.layers.0.self_attn.{ours}"][1].numpy()
        stored = tensors[f"blk.0.{theirs}.weight.lora_b"]
        back = LlamaTensorProcessor()._reverse_permute_weights(stored, heads, heads)  # as transformers reads GGUF
        assert np.array_equal(back, B)
        assert not np.array_equal(stored, B)
    assert len(tensors) == 2 * len(plain)
    assert [v.server for v in lint(tmp_path / "out") if v.accepts] == ["llama.cpp", "Ollama"]


def test_gguf_refuses_an_architecture_that_it_does_not_know(tmp_path: Path) -> None:
    model = attach_tiny("lora", tiny_gpt2())
    model.config.model_type = "novel"
    with raises("target/unsupported-by-gguf", match="'novel'"):
        export(model, tmp_path / "out", to="gguf")


@pytest.mark.filterwarnings("ignore")
def test_an_init_that_took_a_part_of_w_leaves_as_a_lora_of_twice_the_rank(tmp_path: Path) -> None:
    model = move(attach_tiny("lora", tiny_model(), init="pissa"))
    save_adapter(model, tmp_path / "own")
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["peft_type"] == "GRAFTLM"
    made = export(model, tmp_path / "out", to="peft")
    assert made["exact"]
    assert made["rank"] == 8
    close(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "out")), logits(model), "PiSSA in PEFT")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    model = perturbed("lora", tiny_model())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with raises("output/already-exists"):
        export(model, tmp_path / "out", to="merged")
    assert (tmp_path / "out" / "precious").read_text() == "x"


# The linter ------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, name: str, **changes: Any) -> dict[str, tuple[bool, str]]:
    save_adapter(perturbed(name, tiny_model(), **changes), tmp_path / "a")
    return {v.server: (v.accepts, " ".join(v.why)) for v in lint(tmp_path / "a")}


def test_the_linter_knows_what_each_server_refuses(tmp_path: Path) -> None:
    assert saved(tmp_path / "1", "lora")["vLLM"] == (True, "")
    assert saved(tmp_path / "2", "lora", r=20)["vLLM"] == (True, "start it with --max-lora-rank 32")
    verdicts = saved(tmp_path / "3", "dora")
    assert not verdicts["vLLM"][0]
    assert "DoRA" in verdicts["vLLM"][1]
    assert verdicts["PEFT"][0]
    verdicts = saved(tmp_path / "4", "lora", patterns={"q_proj": {"alpha": 1}})
    assert verdicts["vLLM"][0]
    assert "0.32" in verdicts["vLLM"][1], "earlier versions do not read patterns"
    assert not verdicts["llama.cpp"][0]
    assert "alpha_pattern" in verdicts["llama.cpp"][1]
    verdicts = saved(tmp_path / "5", "lora", rslora=True)
    assert verdicts["vLLM"][0]
    assert "use_rslora" in verdicts["llama.cpp"][1]
    verdicts = saved(tmp_path / "6", "houlsby")
    assert not any(accepts for accepts, _ in verdicts.values())
    assert "houlsby" in verdicts["PEFT"][1]
