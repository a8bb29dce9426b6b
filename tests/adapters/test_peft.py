"""What PEFT makes of our folders, asked of PEFT: the verdict says yes where its logits are ours, and no elsewhere."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from peft.utils import transformers_weight_conversion as conversion
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from graftlm.adapters.export.export import export
from graftlm.adapters.export.lint import lint
from graftlm.adapters.load import load_adapter
from graftlm.adapters.peft import EXPERT_NAMES, MOE_AS_QWEN2, ROUTER_NAME, target_modules
from graftlm.adapters.save import save_adapter
from graftlm.deltas import METHODS
from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.testing.deltas import attach_tiny, close, ids, move
from graftlm.testing.tiny import TINY, tiny_gpt2, tiny_model
from tests.architectures import build
from tests.errors import raises

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = """
    afmoe apertus arcee aria_text bamba bart bert biogpt bitnet bloom camembert codegen cohere cohere2
    cohere2_moe ctrl cwm deepseek_v2 deepseek_v3 deepseek_v4 diffllama doge dots1 electra ernie4_5 ernie4_5_moe
    exaone4 exaone_moe falcon_h1 flex_olmo gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe
    glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe
    granitemoehybrid granitemoeshared helium hunyuan_v1_dense hyperclovax jais2 jetmoe lfm2 lfm2_moe llama
    llama4_text mamba2 marian mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral3 mistral mixtral
    modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
    recurrent_gemma roberta seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma xglm xlstm
""".split()  # noqa: SIM905 (a list of a line each)
"""Types of which a tiny model runs with LoRA on all of its linear layers."""

SAMPLE = """
    afmoe ctrl falcon_h1 flex_olmo gemma3_text glm4_moe gpt2 gpt_neox llama mamba2 mixtral qwen2_moe
    qwen3_5_moe_text qwen3_moe qwen3_next solar_open laguna
""".split()  # noqa: SIM905
"""A few of each kind of answer: dense, with experts alone, with experts for all tokens, with states, with numbers."""


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    options = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    out: Tensor = model(input_ids=ids(), **options)[0].float()
    return out


def with_lora(model: Any, **changes: Any) -> Any:
    return move(attach(model, LoraConfig(**({"r": 4, "alpha": 6} | changes))))


def verdict(folder: Path) -> tuple[bool, str]:
    found = next(verdict for verdict in lint(folder) if verdict.server == "PEFT")
    return found.accepts, " ".join(found.why)


def peft_computes(plain: Any, folder: Path, wanted: Tensor) -> bool:
    """Whether PEFT loads the folder and gives these outputs, to 1e-5 of the largest."""
    try:
        got = outputs(PeftModel.from_pretrained(plain, folder).eval())
    except (ValueError, KeyError, TypeError, RuntimeError):
        return False
    return float((got - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def the_verdict_is_what_peft_does(kind: str, folder: Path) -> None:
    model = build(kind)
    plain = copy.deepcopy(model)
    before = outputs(model)
    wanted = outputs(with_lora(model))
    assert float((wanted - before).abs().max() / wanted.abs().max()) > 1e-3, "a delta that PEFT could lose unnoticed"
    export(model, folder / "lora", to="plain-lora")
    save_adapter(model, folder / "saved")
    read = peft_computes(copy.deepcopy(plain), folder / "lora", wanted)
    assert verdict(folder / "lora")[0] == read, verdict(folder / "lora")
    assert verdict(folder / "saved")[0] == peft_computes(plain, folder / "saved", wanted) == read
    card = (folder / "saved" / "README.md").read_text()
    assert ("PeftModel.from_pretrained" in card) == read
    assert ("PEFT does not load the folder" in card) == (not read)
    again = build(kind)
    load_adapter(again, folder / "saved")
    close(outputs(again), wanted, kind)


@pytest.mark.parametrize("kind", ["llama", "glm4_moe", "mamba2"])
def test_the_verdict_is_what_peft_does(kind: str, tmp_path: Path) -> None:
    the_verdict_is_what_peft_does(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLE)
def test_the_verdict_is_what_peft_does_on_a_sample(kind: str, tmp_path: Path) -> None:
    the_verdict_is_what_peft_does(kind, tmp_path)


@pytest.mark.long(group="peft")
@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_is_what_peft_does_on_all_types(kind: str, tmp_path: Path) -> None:
    the_verdict_is_what_peft_does(kind, tmp_path)


# Experts ---------------------------------------------------------------------------------------------------------


def test_our_list_of_types_with_experts_is_that_of_peft_and_transformers() -> None:
    alike = {kind for kind, like in conversion._MODEL_TO_CONVERSION_PATTERN.items() if like == "qwen2_moe"}
    types = {kind for kind in alike if kind.islower()}  # PEFT looks model types up; the others are names of classes
    assert {kind for kind in types if get_checkpoint_conversion_mapping(kind) is not None} == set(MOE_AS_QWEN2)
    assert conversion._MOE_TARGET_MODULE_MAPPING["qwen2_moe"].keys() == {*EXPERT_NAMES, ROUTER_NAME}


def test_what_peft_would_lose_has_a_type_that_it_refuses(tmp_path: Path) -> None:
    model = with_lora(build("glm4_moe"))
    save_adapter(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "GRAFTLM"
    with raises(
        "target/unsupported-by-peft", match=r"gate_proj, up_proj, down_proj of glm4_moe for those of the routed experts"
    ):
        export(model, tmp_path / "peft", to="peft")
    assert not (tmp_path / "peft").exists()
    export(model, tmp_path / "lora", to="plain-lora")
    accepts, why = verdict(tmp_path / "lora")
    assert not accepts
    assert "mlp.down_proj: PEFT up to 0.21.2" in why
    assert "--to merged" in why


@pytest.mark.parametrize("targets", [("q_proj", "o_proj"), ("gate",)])
def test_layers_that_peft_does_not_take_for_experts_are_read(targets: tuple[str, ...], tmp_path: Path) -> None:
    model = build("afmoe")
    plain = copy.deepcopy(model)
    wanted = outputs(with_lora(model, targets=targets))
    save_adapter(model, tmp_path / "saved")
    assert verdict(tmp_path / "saved")[0]
    assert peft_computes(plain, tmp_path / "saved", wanted)


def test_a_router_with_dropout_is_no_parameter_of_peft(tmp_path: Path) -> None:
    model = build("afmoe")
    plain = copy.deepcopy(model)
    wanted = outputs(with_lora(model, targets=("gate",), dropout=0.1))
    save_adapter(model, tmp_path / "saved")
    assert not verdict(tmp_path / "saved")[0]
    export(model, tmp_path / "lora", to="plain-lora")  # which has no dropout
    assert verdict(tmp_path / "lora")[0]
    assert peft_computes(plain, tmp_path / "lora", wanted)


WITH_LAYOUT = [
    name
    for name, method in METHODS.items()
    # PEFT's BOFT needs its CUDA kernel, and its prompts have outputs of their own.
    if method.delta.peft is not None and name not in ("boft", "prompt")
]


@pytest.mark.sampled
@pytest.mark.parametrize("method", WITH_LAYOUT)
def test_what_peft_makes_of_its_other_types_on_experts(method: str, tmp_path: Path) -> None:
    model = build("glm4_moe")
    plain = copy.deepcopy(model)
    wanted = outputs(move(attach_tiny(method, model)))
    save_adapter(model, tmp_path / "saved")
    accepts, why = verdict(tmp_path / "saved")
    assert accepts == peft_computes(plain, tmp_path / "saved", wanted), why


# Targets ---------------------------------------------------------------------------------------------------------


def targets_of(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())["target_modules"]


def test_layers_with_numbers_for_names_are_named_whole(tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("ctrl", **sizes)).eval()
    plain = copy.deepcopy(model)
    wanted = outputs(with_lora(model))
    save_adapter(model, tmp_path / "saved")
    targets = targets_of(tmp_path / "saved")
    assert {"Wq", "transformer.h.0.ffn.0", "transformer.h.1.ffn.2"} <= set(targets)
    assert not [target for target in targets if target.isdigit()]
    assert peft_computes(plain, tmp_path / "saved", wanted)


def test_a_vision_tower_with_numbers_for_names(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    plain = copy.deepcopy(model)
    wanted = outputs(with_lora(model, targets=("q_proj", "down_proj", "fc1", "mlp.0")))
    save_adapter(model, tmp_path / "saved")
    assert "model.visual.merger.mlp.0" in targets_of(tmp_path / "saved")
    assert peft_computes(plain, tmp_path / "saved", wanted)


def test_a_name_that_fits_another_layer_is_written_whole(tmp_path: Path) -> None:
    model = tiny_model()
    plain = copy.deepcopy(model)
    one = "model.layers.1.mlp.down_proj"
    wanted = outputs(with_lora(model, targets=(one, "q_proj")))
    save_adapter(model, tmp_path / "saved")
    assert targets_of(tmp_path / "saved") == [one, "q_proj"]
    assert peft_computes(plain, tmp_path / "saved", wanted)


def test_names_as_they_would_be_read_by_peft() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(2, 2)
            self.inner = nn.ModuleDict({"proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})

    model = Twice()
    assert target_modules(model, ["proj", "inner.proj"]) == ["proj"]
    assert target_modules(model, ["inner.proj"]) == ["inner.proj"]
    assert target_modules(model, ["proj"]) == "proj"  # a regular expression: as the end of a name it means both


# Tasks -----------------------------------------------------------------------------------------------------------

ENCODER = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}


@pytest.mark.parametrize(
    ("auto", "kind", "sizes", "task"),
    [
        ("AutoModelForSequenceClassification", "bert", {}, None),
        ("AutoModelForSequenceClassification", "llama", {}, None),
        ("AutoModelForTokenClassification", "bert", {}, None),
        ("AutoModelForQuestionAnswering", "bert", {}, None),
        ("AutoModelForMaskedLM", "bert", {}, None),
        ("AutoModel", "llama", {}, None),
        ("AutoModelForCausalLM", "llama", {}, "CAUSAL_LM"),
        ("AutoModelForSeq2SeqLM", "bart", ENCODER | DECODER, "SEQ_2_SEQ_LM"),
    ],
)
@pytest.mark.parametrize("to", ["save", "plain-lora"])
def test_peft_reads_the_adapter_of_any_class_of_models(
    to: str, auto: str, kind: str, sizes: dict[str, Any], task: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(AutoConfig.for_model(kind, **(TINY | sizes))).eval()
    plain = copy.deepcopy(model.requires_grad_(False))
    wanted = outputs(with_lora(model))  # on the head of classifiers, too
    if to == "save":
        save_adapter(model, tmp_path / "out")
    else:
        export(model, tmp_path / "out", to=to)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == task
    if task is None:
        assert config["auto_mapping"]["base_model_class"] == type(model).__name__
        assert getattr(transformers, type(model).__name__).__module__ == config["auto_mapping"]["parent_library"]
    close(outputs(PeftModel.from_pretrained(plain, tmp_path / "out").eval()), wanted, f"{auto} of {kind} in PEFT")


# Plain LoRA belongs to its base ----------------------------------------------------------------------------------


def test_plain_lora_knows_its_base(tmp_path: Path) -> None:
    model = with_lora(tiny_gpt2())
    export(model, tmp_path / "out", to="plain-lora")
    again = tiny_gpt2()
    assert "base fingerprint match" in load_adapter(again, tmp_path / "out")
    close(outputs(again), outputs(model), "plain LoRA")
