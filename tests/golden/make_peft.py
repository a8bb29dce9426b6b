"""Adapters of an older PEFT on a tiny model, and what that PEFT computes with them.

    make peers NAME=peft-0.4        runs this in an environment with that version

It imports nothing of graftlm and runs with every version. The base is not written: its weights are a formula, so that
`test_older_peft.py` makes the same one. A folder for each case; `logits.safetensors` has the logits of all, and the
versions in its metadata.
"""

import inspect
import shutil
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"intermediate_size": 24, "num_key_value_heads": 1}),
    "opt": (OPTConfig, OPTForCausalLM, {"ffn_dim": 24, "word_embed_proj_dim": 16}),  # has biases
}
IDS = torch.tensor([[3, 7, 11, 47, 0, 5, 21], [9, 2, 40, 33, 6, 1, 12]])


def waves(shape, seed):
    """Numbers between -1 and 1 that look random, the same on every machine and with every version."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(count * 12.9898 + seed * 78.233 + 0.5 * torch.sin(count * 4.1414)).reshape(shape).float()


def base(kind="llama", tied=False):
    """The base: every weight by `waves`, in the order of the names."""
    config, model, more = KINDS[kind]
    made = model(config(**SIZES, **more, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(made.named_parameters())):
            middle = 1 if name.endswith("norm.weight") else 0
            parameter.copy_(middle + (0.1 if parameter.dim() == 1 else 0.4) * waves(parameter.shape, seed))
    return made


CASES = {
    "lora": ({"target_modules": ["q_proj", "v_proj"]}, {}),
    "some-layers": ({"target_modules": r".*layers\.1.*\.(up|down)_proj"}, {}),
    "one-layer": ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, {}),
    "head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}),
    "both-ends": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, {}),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "tied-embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {"tied": True}),
    "tied-head": ({"target_modules": ["lm_head", "q_proj"]}, {"tied": True}),
    "lora-biases": ({"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}, {"kind": "opt"}),
    "all-biases": ({"target_modules": ["out_proj"], "bias": "all"}, {"kind": "opt"}),
    "rslora": ({"target_modules": ["q_proj"], "use_rslora": True}, {}),
    "patterns": (
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"up_proj": 2, r"layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"v_proj": 12},
        },
        {},
    ),
    "dora": ({"target_modules": ["q_proj", "down_proj"], "use_dora": True}, {}),
    "dora-rslora-patterns": (
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "use_rslora": True, "alpha_pattern": {"v_proj": 3}},
        {},
    ),
}
"""Case -> (PEFT's settings, the base's). Those whose settings a version does not know are left out."""


def make(folder):
    known = inspect.signature(peft.LoraConfig).parameters
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = {}
    for case, (settings, of_base) in CASES.items():
        if not settings.keys() <= known.keys():
            continue
        config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(base(**of_base), config).eval()
        with torch.no_grad():
            for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
                if parameter.requires_grad:  # factors start at random, all others where the base is
                    kept = 0 if "lora_A" in name or "lora_B" in name or "lora_embedding" in name else parameter
                    parameter.copy_(kept + 0.3 * waves(parameter.shape, 100 + seed))
        model.save_pretrained(folder / case, safe_serialization=True)
        again = peft.PeftModel.from_pretrained(base(**of_base), folder / case).eval()  # 0.13 loses biases of lora_only
        with torch.no_grad():
            found[case] = again(input_ids=IDS).logits.contiguous()
        for file in (folder / case).iterdir():
            if file.name not in ("adapter_config.json", "adapter_model.safetensors"):
                file.unlink()
    versions = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    save_file(found, folder / "logits.safetensors", metadata=versions)
    print(f"{folder}: {len(found)} adapters by {versions}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    make(Path(sys.argv[1]))
