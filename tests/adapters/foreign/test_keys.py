"""Names of modules in files of other models and wrappers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.adapters.folder import WEIGHTS
from graftlm.adapters.load import load_adapter
from graftlm.hub.quantize_base import quantize
from graftlm.model.attach import detach
from graftlm.model.modes import activate
from graftlm.model.state_dict import merged_state
from graftlm.testing.deltas import close, logits
from tests.adapters.foreign.folders import edit_config, edit_tensors, lora, refused, tied, untied
from tests.peers import peft_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def text_inside(key: str) -> str:
    return key.replace("base_model.model.model.", "base_model.model.model.language_model.")


def text_inside_before(key: str) -> str:
    return key.replace("base_model.model.", "base_model.model.language_model.")


NAMES: dict[str, tuple[Callable[[str], str], str]] = {
    "torch.compile": (lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."), "_orig_mod"),
    "torch.compile, outside": (lambda key: f"_orig_mod.{key}", "_orig_mod"),
    "compiled layers": (lambda key: key.replace("layers.0.", "layers.0._orig_mod."), "_orig_mod"),
    "fsdp": (lambda key: key.replace("layers.1.", "layers.1._fsdp_wrapped_module."), "_fsdp_wrapped_module"),
    "the adapter's name": (lambda key: key.replace(".weight", ".default.weight"), "'default'"),
    "another adapter's name": (lambda key: key.replace(".weight", ".sql.weight"), "'sql'"),
    "no prefix": (lambda key: key.removeprefix("base_model.model."), "base_model.model."),
    "inside a vision-language model": (text_inside, "model. for model.language_model."),
    "inside one of before 4.52": (text_inside_before, "language_model."),
    "without the head": (
        lambda key: key.replace("base_model.model.model.", "base_model.model."),
        "model. for (nothing)",
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_wrapped_models_are_mapped_and_it_is_said_once(case: str, folder: Path) -> None:
    rename, word = NAMES[case]
    wanted = tied()
    load_adapter(wanted, folder)
    edit_tensors(folder, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    ours = tied()
    note = load_adapter(ours, folder)
    assert torch.equal(logits(ours), logits(wanted))
    assert note.count("mapped") == 1
    assert word in note


def test_names_of_a_language_model_are_mapped_into_a_vision_language_model() -> None:
    from graftlm.adapters.foreign.keys import renamed, renamings

    modules = {"model.language_model.layers.0.mlp.up_proj", "lm_head"}
    for name in ("model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"):
        assert modules & {renamed(name, by) for by in renamings(tied())}
    modules = {"language_model.model.layers.0.mlp.up_proj", "language_model.lm_head"}
    for name in ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj", "lm_head"):
        assert modules & {renamed(name, by) for by in renamings(tied())}


def test_patterns_are_about_the_names_of_training(tmp_path: Path) -> None:
    patterns = {"alpha_pattern": {r"model.layers.0.self_attn.q_proj": 9}, "rank_pattern": {r"layers\.1.*v_proj": 2}}
    theirs = peft_adapter(lora(**patterns), tied(), tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: {text_inside(key): tensor for key, tensor in tensors.items()})
    edit_config(tmp_path / "a", alpha_pattern={r"model.language_model.layers.0.self_attn.q_proj": 9})
    ours = tied()
    load_adapter(ours, tmp_path / "a")
    close(logits(ours), logits(theirs), "patterns")


def test_a_magnitude_as_the_modules_name_it_is_read(tmp_path: Path) -> None:
    theirs = peft_adapter(lora(use_dora=True), tied(), tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda t: {k.replace("vector", "vector.default.weight"): v for k, v in t.items()})
    ours = tied()
    load_adapter(ours, tmp_path / "a")
    close(logits(ours), logits(theirs), "dora")


def test_modules_in_their_place_as_a_state_dict_names_them_are_read(tmp_path: Path) -> None:
    theirs = peft_adapter(lora(modules_to_save=["lm_head"]), untied(), tmp_path / "a")
    head = "base_model.model.lm_head"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{head}.modules_to_save.default.weight"] = tensors.pop(f"{head}.weight")
        tensors[f"{head}.original_module.weight"] = untied().lm_head.weight

    edit_tensors(tmp_path / "a", change)
    ours = untied()
    load_adapter(ours, tmp_path / "a")
    close(logits(ours), logits(theirs), "a head in its place")


def test_two_adapters_in_one_file_and_a_tensor_with_two_values_are_refused(folder: Path) -> None:
    whole = load_file(folder / WEIGHTS)
    edit_tensors(folder, lambda t: {k.replace("_A.weight", "_A.a.weight"): v for k, v in t.items()})
    edit_tensors(folder, lambda t: {k.replace("_B.weight", "_B.b.weight"): v for k, v in t.items()})
    refused(folder, "adapter/several-adapters", WEIGHTS, "2 adapters (a, b)")
    edit_tensors(folder, lambda _: whole | {f"{Q0}.lora_A.default.weight": whole[f"{Q0}.lora_A.weight"] + 1})
    refused(folder, "adapter/contradicting-tensors", f"{Q0}.lora_A.weight", f"{Q0}.lora_A.default.weight")


def test_an_adapter_of_a_language_model_sits_in_a_vision_language_model_and_the_other_way(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    text = tied()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    whole: Any = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text.config, vision_config=vision, image_token_id=299)
    ).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    tokens = torch.tensor([[5, 3, 7, 290]])
    theirs = peft_adapter(lora(), text, tmp_path / "of text")
    note = load_adapter(whole, tmp_path / "of text")
    with torch.no_grad():
        close(whole(input_ids=tokens).logits, theirs(input_ids=tokens).logits, "in the vision-language model")
    assert "model.language_model. for model." in note
    detach(whole)
    language = r".*language_model.*\.(q_proj|v_proj)"
    theirs = peft_adapter(lora(target_modules=language, modules_to_save=["lm_head"]), whole, tmp_path / "of both")
    alone = tied()
    note = load_adapter(alone, tmp_path / "of both")
    with torch.no_grad():
        close(alone(input_ids=tokens).logits, theirs(input_ids=tokens).logits, "in the language model alone")
    assert "model. for model.language_model." in note


def test_adapters_of_several_deltas_lie_on_one_model_beside_each_other(tmp_path: Path) -> None:
    settings: Any = {"a": {"modules_to_save": ["lm_head"]}, "b": {"modules_to_save": ["lm_head", "norm"], "r": 2}}
    theirs = {name: peft_adapter(lora(**each), untied(), tmp_path / name) for name, each in settings.items()}
    ours, base = untied(), untied()
    for name in settings:
        load_adapter(ours, tmp_path / name, name=name)
    for name, model in theirs.items():
        activate(ours, name)
        close(logits(ours), logits(model), name)
    activate(ours)
    assert torch.equal(logits(ours), logits(base))


def test_weights_stand_in_place_of_quantized_ones(tmp_path: Path) -> None:
    """On a quantized base they are what the adapter says, whatever quantizing lost."""
    peft_adapter(lora(modules_to_save=["mlp", "lm_head"]), untied(), tmp_path / "a")
    ours = quantize(untied(), "int4")
    load_adapter(ours, tmp_path / "a")
    stored, merged = load_file(tmp_path / "a" / WEIGHTS), merged_state(ours)
    for key in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        close(merged[key], stored[f"base_model.model.{key}"], key)
