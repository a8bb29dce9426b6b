"""The methods on which the interface was tried first: against PEFT where it has them, else against plain equations."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F

from graftlm.model.state_dict import merged_state
from graftlm.testing.deltas import close, ids, load_merged_state, logits, perturbed
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.golden.check import LINEAR, against_peft, against_reference

pytestmark = pytest.mark.versions

LM = {"task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[str, Any]] = {
    "dora": ("dora", peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=LINEAR, **LM)),
    "dora with patterns and rslora": (
        "dora",
        peft.LoraConfig(
            r=4, lora_alpha=6, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules=LINEAR, **LM
        ),
    ),
    "vera": ("vera", peft.VeraConfig(r=4, target_modules=LINEAR, **LM)),
    "ia3": (
        "ia3",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **LM),
    ),
    "prefix": ("prefix", peft.PrefixTuningConfig(num_virtual_tokens=5, **LM)),
    "prompt": ("prompt", peft.PromptTuningConfig(num_virtual_tokens=5, **LM)),
    "lora on embeddings": ("lora", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"], **LM)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_against_peft(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    against_peft(name, config, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_on_gpt2_against_peft(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, **LM
    )
    against_peft("dora", config, tmp_path / "dora", base=tiny_gpt2)
    against_peft("prefix", peft.PrefixTuningConfig(num_virtual_tokens=5, **LM), tmp_path / "prefix", base=tiny_gpt2)


def test_bitfit_is_a_bias() -> None:
    against_reference("bitfit", lambda t, W, b, x, d: x @ W.T + t["delta"], targets="all-linear")


def test_full_is_another_weight() -> None:
    against_reference("full", lambda t, W, b, x, d: x @ (W + t["D"]).T, targets="all-linear")


def test_houlsby_acts_on_what_the_sub_layer_returns() -> None:
    model = perturbed("houlsby", tiny_model())
    block = tiny_model().model.layers[0].mlp
    delta = model.model.layers[0].mlp.graft.deltas["default"]
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    y = block(x)
    close(model.model.layers[0].mlp(x), y + F.gelu(y @ delta.D.T + delta.d) @ delta.U.T + delta.u, "houlsby")


def test_a_prompt_is_rows_of_embeddings_before_the_row() -> None:
    model, plain = perturbed("prompt", tiny_model()), tiny_model()
    P = model.model.graft.deltas["default"].P
    with torch.no_grad():
        rows = torch.cat([P.expand(2, -1, -1), plain.model.embed_tokens(ids())], dim=1)
        close(logits(model), plain(inputs_embeds=rows).logits[:, 5:], "prompt")


def test_reslora_adds_the_input_of_the_same_layer_one_block_before() -> None:
    model = perturbed("reslora", tiny_model())
    inputs_and_outputs: list[Any] = []
    projections = [layer.mlp.up_proj for layer in model.model.layers]
    for projection in projections:
        projection.register_forward_hook(lambda m, inputs, y: inputs_and_outputs.append((inputs[0], y)))
    model(ids())
    delta = projections[1].deltas["default"].lora
    x, before = inputs_and_outputs[1][0], inputs_and_outputs[0][0]
    wanted = x @ projections[1].base.weight.T + 6 / 4 * (x + before) @ delta.A.T @ delta.B.T
    close(inputs_and_outputs[1][1], wanted, "reslora")


def test_dora_learns_the_magnitude_of_more_layers_than_the_direction() -> None:
    def reference(t: Any, W: Any, b: Any, x: Any, delta: Any) -> Any:
        V = W + (6 / 4 * t["V.B"] @ t["V.A"] if "mlp" in delta.site.name else 0)
        rows = [m * row / row.detach().square().sum().sqrt() for m, row in zip(t["m"], V, strict=True)]
        return x @ torch.stack(rows).T

    against_reference("dora", reference, directions=("gate_proj", "up_proj", "down_proj"))
    model = perturbed("dora", tiny_gpt2(), directions=("c_fc",))  # whose layers have biases
    close(logits(load_merged_state(merged_state(model), tiny_gpt2(seed=5))), logits(model), "merged")
