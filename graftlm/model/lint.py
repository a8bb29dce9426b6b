"""Which server will take an exported folder, and why not: the rules that each applies when it loads an adapter.

Rules as of vLLM 0.11, LoRAX 0.12, PEFT 0.21 and llama.cpp in 2026; what they do in silence counts as a refusal here.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from graftlm.model.store import CONFIG, OWN_TYPE, WEIGHTS

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank can have; 16 without it."""


@dataclass(frozen=True)
class Verdict:
    server: str
    accepts: bool
    why: tuple[str, ...] = ()
    """Why not; or what to say to the server so that it does."""


def lint(folder: str | Path) -> list[Verdict]:
    """A verdict for each of transformers, PEFT, vLLM, LoRAX and llama.cpp on a folder that `export` wrote."""
    folder = Path(folder)
    if (folder / "adapter.gguf").is_file():
        return _only("llama.cpp", "a GGUF adapter is read by llama.cpp alone")
    if (folder / "delta.safetensors").is_file():
        return _only("", "a difference of weights is read by no server: add it to the base, or export `--to merged`")
    if not (folder / CONFIG).is_file():
        return _merged(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        keys = list(file.keys())
    checks = {"PEFT": _peft, "vLLM": _vllm, "LoRAX": _lorax, "llama.cpp": _llama_cpp}
    verdicts = [Verdict("transformers", False, ("an adapter alone is no model: load it with PEFT, or merge it",))]
    for server, check in checks.items():
        problems, hints = check(config, keys)
        verdicts.append(Verdict(server, not problems, tuple(problems or hints)))
    return verdicts


def to_json(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    return [asdict(verdict) for verdict in verdicts]


Problems = tuple[list[str], list[str]]


def _only(server: str, why: str) -> list[Verdict]:
    servers = ("transformers", "PEFT", "vLLM", "LoRAX", "llama.cpp")
    return [Verdict(each, each == server, () if each == server else (why,)) for each in servers]


def _merged(folder: Path) -> list[Verdict]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    biases = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    hint = tuple(f"{key} is on: check that the server's {config['model_type']} reads it" for key in biases)
    convert = "convert it with llama.cpp's convert_hf_to_gguf.py first"
    return [
        Verdict("transformers", True),
        Verdict("PEFT", True, ("as a base",)),
        Verdict("vLLM", True, hint),
        Verdict("LoRAX", True, hint),
        Verdict("llama.cpp", not biases, (convert, *hint)),
    ]


def _peft(config: dict[str, Any], keys: list[str]) -> Problems:
    if config.get("peft_type") == OWN_TYPE:
        return [f"PEFT has no method {config.get('method')!r}: export `--to plain-lora` or `--to merged`"], []
    return [], []


def _lora_only(config: dict[str, Any], keys: list[str]) -> list[str]:
    if config.get("peft_type") != "LORA":
        kind = config.get("method") or config.get("peft_type")
        return [f"it reads LoRA alone, and this is {kind}: export `--to plain-lora` (exact where there are factors)"]
    problems = []
    if config.get("use_dora"):
        problems.append("it refuses DoRA: export `--to plain-lora --rank N`, or `--to merged`")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            problems.append(f"it does not read {key}, so some layers would be scaled wrongly: export `--to plain-lora`")
    if config.get("modules_to_save"):
        problems.append("it refuses modules_to_save")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        problems.append("it reads no biases")
    return problems


def _vllm(config: dict[str, Any], keys: list[str]) -> Problems:
    problems = _lora_only(config, keys)
    known = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    strange = [key for key in keys if not key.endswith(known)]
    if strange and not problems:
        problems.append(f"it refuses tensors that it does not know, such as {strange[0]}")
    rank = config.get("r", 0)
    enough = next((r for r in VLLM_RANKS if r >= rank), None)
    if enough is None and not problems:
        problems.append(f"its largest rank is {VLLM_RANKS[-1]}, this has {rank}")
    return problems, [f"start it with --max-lora-rank {enough}"] if enough and enough > 16 else []


def _lorax(config: dict[str, Any], keys: list[str]) -> Problems:
    problems = _lora_only(config, keys)
    if any("embedding" in key for key in keys) and not problems:
        problems.append("it ignores LoRA on embeddings with a warning on the server's side")
    return problems, []


def _llama_cpp(config: dict[str, Any], keys: list[str]) -> Problems:
    problems = _lora_only(config, keys)
    if config.get("use_rslora") and not problems:
        problems.append("its converter does not read use_rslora and would scale by alpha / r: export `--to gguf`")
    return problems, ["convert it with convert_lora_to_gguf.py, or export `--to gguf`"]
