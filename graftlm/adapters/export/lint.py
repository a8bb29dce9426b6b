"""Which program will take an exported folder, and why not: the rules that each applies when it loads an adapter.

What a program does in silence (a key or a tensor that it does not read) counts as a refusal here. Each rule is a row
of RULES with the place in the program's source where it was read, and when.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from graftlm.adapters.export.llama_cpp import why_not_gguf
from graftlm.adapters.folder import CONFIG, RECORD, WEIGHTS
from graftlm.adapters.peft import OWN_TYPE, why_not_read
from graftlm.adapters.tensors import PREFIX
from graftlm.errors import AdapterError

PROGRAMS = ("transformers", "PEFT", "vLLM", "SGLang", "LoRAX", "llama.cpp", "Ollama", "OpenVINO", "MLX")
"""In the order of the verdicts. OpenVINO is OpenVINO GenAI, MLX is mlx-lm."""

SERVERS = ("vLLM", "SGLang", "LoRAX", "llama.cpp", "OpenVINO")
"""Servers that read PEFT's folders, or files of them."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank can have."""

VLLM_DEFAULT_RANK = 16

SGLANG_LAYERS = (
    "down_proj",
    "embed_tokens",
    "embeddings",
    "gate_proj",
    "gate_up_proj",
    "in_proj",
    "in_proj_qkv",
    "in_proj_z",
    "k_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "lm_head",
    "o_proj",
    "out_proj",
    "output",
    "q_a_proj",
    "q_b_proj",
    "q_proj",
    "qkv_proj",
    "up_proj",
    "v_proj",
    "vocab_emb",
    "word_embeddings",
)
"""The ends of names that SGLang has LoRA layers for."""


@dataclass(frozen=True)
class Verdict:
    server: str
    accepts: bool
    why: tuple[str, ...] = ()
    """Why not; or what to do so that it does."""


@dataclass(frozen=True)
class Folder:
    """An adapter folder as the rules see it."""

    config: Mapping[str, Any]
    keys: Sequence[str]
    base: Mapping[str, Any] | None
    """The config of the base that graftlm.json holds."""

    @cached_property
    def sites(self) -> list[str]:
        names = (key.removeprefix(PREFIX) for key in self.keys)
        inner = (name.rpartition(".")[0] if self.own else name.rpartition(".lora_")[0] for name in names)
        return [site for site in dict.fromkeys(inner) if site]

    @property
    def method(self) -> str:
        return str(self.config.get("method") or self.config.get("peft_type"))

    @property
    def lora(self) -> bool:
        return self.config.get("peft_type") == "LORA"

    @property
    def own(self) -> bool:
        """Whether it has graftlm's own form."""
        return self.config.get("peft_type") == OWN_TYPE


Broken = Callable[[Folder], Any]
PLAIN = "export `--to plain-lora`"


@dataclass(frozen=True)
class Rule:
    """`broken` gives what breaks the rule, for the braces in `why`, or something false."""

    programs: tuple[str, ...]
    read: str
    """Year and month, and where in the program's source."""
    broken: Broken
    why: str


def _key(name: str, *neutral: Any) -> Broken:
    return lambda folder: name if folder.config.get(name) not in (None, *neutral) else ""


def _not_lora(folder: Folder) -> str:
    return "" if folder.lora else f"{folder.method} in graftlm's own form" if folder.own else folder.method


def _peft(folder: Folder) -> str:
    parameters = not folder.config.get("lora_dropout") and not folder.config.get("use_dora")
    kind, form = str((folder.base or {}).get("model_type", "")), str(folder.config.get("peft_type"))
    reason = why_not_read(kind, "LORA" if folder.own else form, folder.sites, parameters=parameters)
    if reason:
        return f"{reason}: export `--to merged`"
    return f"PEFT has no method {folder.method!r}: {PLAIN} or `--to merged`" if folder.own else ""


def _gguf(folder: Folder) -> str:
    if folder.base is None or not folder.lora:
        return ""
    if folder.config.get("task_type") != "CAUSAL_LM":
        model_class = (folder.config.get("auto_mapping") or {}).get("base_model_class", folder.config.get("task_type"))
        return f"llama.cpp runs causal language models, and the adapter is for a {model_class}: export `--to merged`"
    return why_not_gguf(folder.base, folder.sites)


def _unread_by_vllm(folder: Folder) -> str:
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    return next((key for key in folder.keys if not key.endswith(ends)), "")


def _not_in_sglang(folder: Folder) -> str:
    return next((site for site in folder.sites if site.rpartition(".")[2] not in SGLANG_LAYERS), "")


def _embeddings(folder: Folder) -> str:
    return next((key for key in folder.keys if "lora_embedding" in key), "")


def _rank(folder: Folder) -> int:
    """The largest of all layers."""
    return max(map(int, (folder.config.get("r", 0), *(folder.config.get("rank_pattern") or {}).values())))


def _patterns(*names: str) -> Broken:
    return lambda folder: next((name for name in names if folder.config.get(name)), "")


def _refused_by_vllm(folder: Folder) -> str:
    """Inits of the names below leave the base as it is."""
    start = folder.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        return f"init_lora_weights={start!r}: let PEFT convert it (path_initial_model_for_weight_conversion)"
    keys = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    return next((key for key in keys if folder.config.get(key)), "")


def _scaled(folder: Folder) -> str:
    alpha, rslora, rank = folder.config.get("lora_alpha"), folder.config.get("use_rslora"), folder.config.get("r")
    scale = float(alpha or 0) / (float(rank) ** 0.5 if rslora else float(rank)) if rank else 1.0
    return "" if scale == 1.0 else f"{scale:g}"


UNREAD_PATTERN = f"it does not read {{}}, so some layers would be scaled wrongly: {PLAIN}"
RULES = (
    Rule(
        ("PEFT",),
        "2026-11 peft/utils/transformers_weight_conversion.py, peft/tuners/tuners_utils.py",
        _peft,
        "{}",
    ),
    Rule(
        SERVERS,
        "2026-11 vllm/lora/peft_helper.py, sglang/srt/lora/lora.py, lorax utils/adapter.py, convert_lora_to_gguf.py",
        _not_lora,
        f"it reads LoRA alone, and this is {{}}: {PLAIN} (exact where there are factors)",
    ),
    Rule(
        SERVERS,
        "2026-11 vllm/lora/peft_helper.py, sglang/srt/lora/lora_config.py, openvino.genai lora/adapter.cpp",
        _key("use_dora", False),
        "it refuses DoRA or leaves it out: export `--to plain-lora --rank N`, or `--to merged`",
    ),
    Rule(
        SERVERS,
        "2026-11 vllm/lora/peft_helper.py, sglang/srt/lora/lora_config.py, openvino.genai lora/adapter.cpp",
        _patterns("kasa_config"),
        "it leaves out what {} changes of the base: export `--to plain-lora`, which is exact",
    ),
    Rule(
        ("SGLang", "LoRAX", "OpenVINO"),
        "2026-11 sglang/srt/lora/lora.py, lorax utils/adapter.py, openvino.genai lora/adapter.cpp",
        _patterns("rank_pattern", "alpha_pattern"),
        UNREAD_PATTERN,
    ),
    Rule(  # it divides alpha by the rank that each tensor has, so it needs no rank_pattern
        ("llama.cpp",),
        "2026-11 convert_lora_to_gguf.py, src/llama-adapter.h",
        _patterns("alpha_pattern"),
        UNREAD_PATTERN,
    ),
    Rule(
        ("vLLM",),
        "2026-11 vllm/lora/peft_helper.py",
        lambda f: _refused_by_vllm(f) if f.lora else "",
        "it refuses {}",
    ),
    Rule(
        SERVERS,
        "2026-11 vllm/lora/peft_helper.py, convert_lora_to_gguf.py",
        _key("modules_to_save", []),
        "it refuses {}: export `--to merged`",
    ),
    Rule(
        SERVERS,
        "2026-11 vllm/lora/lora_model.py, convert_lora_to_gguf.py",
        lambda f: f.config.get("bias") not in (None, "none") or f.config.get("lora_bias"),
        "it reads no biases: export `--to merged`",
    ),
    Rule(
        ("vLLM",),
        "2026-11 vllm/lora/lora_model.py",
        lambda f: _unread_by_vllm(f) if f.lora else "",
        "it refuses tensors that it does not know, such as {}",
    ),
    Rule(
        ("vLLM",),
        "2026-11 vllm/config/lora.py",
        lambda f: _rank(f) if _rank(f) > VLLM_RANKS[-1] else 0,
        f"its largest rank is {VLLM_RANKS[-1]}, this has {{}}: export `--to merged`",
    ),
    Rule(
        ("SGLang",),
        "2026-11 sglang/srt/lora/utils.py",
        lambda f: _not_in_sglang(f) if f.lora else "",
        "{}: it has LoRA layers for other names only: export `--to merged`",
    ),
    Rule(
        ("SGLang",),
        "2026-11 sglang/srt/lora/utils.py",
        lambda f: isinstance(named := f.config.get("target_modules"), str) and named not in ("all", "all-linear"),
        "it takes no regular expression for target_modules: export `--to merged`",
    ),
    Rule(
        ("SGLang", "llama.cpp"),
        "2026-11 sglang/srt/lora/lora.py, convert_lora_to_gguf.py",
        _key("use_rslora", False),
        f"it does not read {{}} and would scale by alpha / r: {PLAIN}, or `--to gguf` for llama.cpp",
    ),
    Rule(
        ("LoRAX", "OpenVINO"),
        "2026-11 lorax utils/adapter.py, openvino.genai lora/adapter.cpp",
        _embeddings,
        "it leaves LoRA on embeddings out ({}): export `--to merged`",
    ),
    Rule(
        ("OpenVINO",),
        "2026-11 openvino.genai lora/adapter.cpp",
        lambda f: _scaled(f) if f.lora else "",
        f"it reads the weights alone, without {CONFIG}, so it would leave out the scale {{}}: {PLAIN} (its scale is 1)",
    ),
    Rule(
        ("llama.cpp",),
        "2026-11 conversion/gpt2.py, convert_lora_to_gguf.py",
        _key("fan_in_fan_out", False),
        "its converter transposes the factors of Conv1D layers, which PEFT keeps as those of linear layers: export "
        "`--to gguf`",
    ),
    Rule(
        ("llama.cpp", "Ollama"),
        "2026-11 conversion/*.py, src/models/*.cpp",
        _gguf,
        "{}",
    ),
    Rule(
        ("Ollama",),
        "2026-11 convert/convert.go, convert/convert_llama_adapter.go",
        lambda f: not _gguf(f),
        "it reads folders of Llama and Gemma 2 alone, in an order of rows that is not llama.cpp's: export `--to gguf`",
    ),
    Rule(
        ("MLX",),
        "2026-11 mlx_lm/tuner/utils.py",
        lambda f: True,
        "it reads adapters of its own (adapters.safetensors): export `--to merged` and run mlx_lm.convert",
    ),
)


def lint(folder: str | Path) -> list[Verdict]:
    """Check which programs read a folder that `export` or `save_adapter` wrote.

    Returns a Verdict of each of PROGRAMS: whether it accepts the folder, and why not or what to do first. Raises
    AdapterError for a folder that holds neither an adapter nor a model.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("adapter.gguf", "delta.safetensors", CONFIG, "config.json")):
        raise AdapterError(
            f"{folder}: holds neither an adapter ({CONFIG}) nor a merged model (config.json)", code="nothing-to-check"
        )
    if (folder / "adapter.gguf").is_file():
        return _verdicts(_only_gguf)
    if (folder / "delta.safetensors").is_file():
        why = "a difference of weights is read by no program: add it to the base, or export `--to merged`"
        return _verdicts(lambda program: (False, why))
    if not (folder / CONFIG).is_file():
        return _merged(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        keys = list(file.keys())
    base = None
    if (folder / RECORD).is_file():
        base = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("base", {}).get("config")
    return [_verdict(program, Folder(config, keys, base)) for program in PROGRAMS]


def to_json(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    return [asdict(verdict) for verdict in verdicts]


def _verdict(program: str, folder: Folder) -> Verdict:
    if program == "transformers":
        return Verdict(program, False, ("an adapter alone is no model: load it with PEFT, or merge it",))
    problems = []
    for rule in RULES:
        if program in rule.programs and (found := rule.broken(folder)):
            problems.append(rule.why.format(found))
            if rule.broken is _not_lora:
                break  # the other rules are about LoRA
    if problems:
        return Verdict(program, False, tuple(problems))
    return Verdict(program, True, _hints(program, folder))


def _hints(program: str, folder: Folder) -> tuple[str, ...]:
    if program == "vLLM":
        option = next(r for r in VLLM_RANKS if r >= _rank(folder))
        patterns = _patterns("rank_pattern", "alpha_pattern")(folder)
        hints = [f"start it with --max-lora-rank {option}"] if option > VLLM_DEFAULT_RANK else []
        return (*hints, *([f"it reads {patterns} since 0.32.0: {PLAIN} for an earlier one"] if patterns else []))
    if program == "SGLang":
        return (f"start it with --max-lora-rank {_rank(folder)} or more",)
    if program == "llama.cpp":
        return ("convert it with convert_lora_to_gguf.py, or export `--to gguf`",)
    return ()


def _verdicts(decide: Callable[[str], tuple[bool, str]]) -> list[Verdict]:
    return [
        Verdict(program, accepts, (why,) if why else ()) for program in PROGRAMS for accepts, why in [decide(program)]
    ]


def _only_gguf(program: str) -> tuple[bool, str]:
    if program == "llama.cpp":
        return True, ""
    if program == "Ollama":
        return True, "name it in the Modelfile: FROM the base, ADAPTER ./adapter.gguf"
    return False, "a GGUF adapter is read by llama.cpp and what is built on it"


def _merged(folder: Path) -> list[Verdict]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    biases = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    hint = "; ".join(f"{key} is on: check that its {config['model_type']} reads it" for key in biases)
    before = {
        "llama.cpp": "convert it with llama.cpp's convert_hf_to_gguf.py first",
        "Ollama": "convert it with llama.cpp's convert_hf_to_gguf.py first",
        "OpenVINO": "convert it with optimum-cli export openvino first",
        "MLX": "convert it with mlx_lm.convert first",
    }

    def decide(program: str) -> tuple[bool, str]:
        if program in ("transformers", "PEFT"):
            return True, "as a base" if program == "PEFT" else ""
        accepts = not biases or program not in ("llama.cpp", "Ollama")
        return accepts, "; ".join(part for part in (before.get(program, ""), hint) if part)

    return _verdicts(decide)
