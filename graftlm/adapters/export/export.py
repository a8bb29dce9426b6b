"""Deltas in the forms that others read: a merged model, plain LoRA, GGUF, PEFT, a difference of weights.

`factors()` makes this one small file: whatever has them is plain LoRA exactly, and plain LoRA is what servers read.
Everything else that is a change of weights goes through W' - W. Nothing here changes the model that it is given.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.export.llama_cpp import Architecture, architecture, gguf_factors, why_not_gguf
from graftlm.adapters.export.merged import merge_into
from graftlm.adapters.folder import new_folder
from graftlm.adapters.peft import model_type, target_modules, task, transposed, why_not_peft, why_not_read
from graftlm.adapters.save import adapter_of, as_json, base_facts
from graftlm.adapters.tensors import PREFIX
from graftlm.deltas.base import AdditiveDelta, WeightDelta
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import TargetError
from graftlm.hub.fingerprint import fingerprint, public_name
from graftlm.hub.quantize_base import quantization_of
from graftlm.hub.stopping import missing_end
from graftlm.model.acting import all_factors
from graftlm.model.hosts import Host, LayerHost
from graftlm.model.quantize import GROUP, QuantizedLinear
from graftlm.model.registry import hosts
from graftlm.model.state_dict import active_changes, base_state

# Merged models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LostChange:
    """How much of a layer's change a dtype cannot hold: ||round(W') - W'|| / ||W' - W||."""

    layer: str
    share: float


def lost_by_rounding(model: nn.Module, dtype: torch.dtype) -> list[LostChange]:
    """For each layer with active deltas, the share of its change that rounding W' to `dtype` loses; worst first."""
    found = []
    with torch.no_grad():
        for name, host in hosts(model).items():
            if host.active and isinstance(host, LayerHost):
                W, (W_new, _) = host.view.weight, host.effective()
                if bool((size := (W_new - W).norm()) > 0):
                    found.append(LostChange(name, float((W_new.to(dtype).float() - W_new).norm() / size)))
    return sorted(found, key=lambda item: -item.share)


def lost_by_quantizing(model: nn.Module) -> list[LostChange]:
    """For each quantized layer with active deltas, how far W' is from what the deltas make of W as it was before
    quantizing, as a share of the change that they make; worst first. TargetError where W cannot be read again.
    """
    found = []
    with torch.no_grad():
        for name, host in hosts(model).items():
            if host.active and isinstance(host, LayerHost) and isinstance(host.base, QuantizedLinear):
                W, (W_new, _) = host.view.weight, host.effective()
                target, _ = host.effective(host.view.original())
                if bool((size := (W_new - W).norm()) > 0):
                    found.append(LostChange(name, float((W_new - target).norm() / size)))
    return sorted(found, key=lambda item: -item.share)


def merged_int4(model: nn.Module) -> dict[str, Tensor]:
    """The state of an int4 base with the active deltas in its zero points: the same codes and scales, nothing rounded.

    A zero of its own for each group of inputs adds a constant to the group's weights, so this takes deltas that change
    a group as a whole (QA-LoRA with groups of a multiple of 32). Load the state into the same base in int4. Raises
    TargetError, naming the site, for any other delta and for a base that is kept otherwise.
    """
    state = base_state(model)
    for name, host in hosts(model).items():
        if not host.active:
            continue
        if (
            not isinstance(host, LayerHost)
            or not isinstance(host.base, QuantizedLinear)
            or host.base.codec.name != "int4"
        ):
            raise TargetError(
                f"{name}: no int4 layer, so it has no zero points: load the base with quantization int4",
                code="base-not-int4",
            )
        others = [delta.config.method for delta in host.on() if not isinstance(delta, AdditiveDelta)]
        if others:
            raise TargetError(
                f"{name}: {others[0]} changes W by more than an addition: {_INT4_ONLY}", code="not-mergeable-in-int4"
            )
        tensors = host.base.tensors()
        with torch.no_grad():
            change, _ = host.effective(torch.zeros(host.base.shape, device=tensors["zero"].device))
        groups = change.split(GROUP, dim=1)
        largest_range = max(float((part.amax(1) - part.amin(1)).max()) for part in groups)
        if largest_range > CONSTANT * float(change.abs().max()):
            raise TargetError(
                f"{name}: dW differs by up to {largest_range:.3g} inside groups of {GROUP} inputs: {_INT4_ONLY}",
                code="not-mergeable-in-int4",
            )
        shift = torch.stack([part[:, 0] for part in groups], dim=1)
        state[f"{name}.zero"] = tensors["zero"] - shift / tensors["scale"].float()
    return state


CONSTANT = 1e-6
"""Share of the greatest element by which a change that is constant in a group may differ there: float32's rounding."""
_INT4_ONLY = (
    "only a constant in each group goes into zero points. Train method qa-lora, or `graft merge` to float weights"
)


# Plain LoRA ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainLora:
    """dW = B A at each site with the scale folded in, and how far that is from the delta (0 where it is exact)."""

    factors: dict[str, tuple[Tensor, Tensor]]
    errors: dict[str, float]

    @property
    def rank(self) -> int:
        return max(A.shape[0] for A, _ in self.factors.values())


def plain_lora(model: nn.Module, *, rank: int | None = None) -> PlainLora:
    """The active deltas as one LoRA: exactly where all have factors, else by SVD of W' - W to `rank`.

    Raises TargetError, naming the site, for a delta that is no change of a weight matrix (a bias, a norm, an adapter),
    and where a rank is needed and none was given.
    """
    factors, errors = {}, {}
    with torch.no_grad():
        for name, host in hosts(model).items():
            if host.active:
                factors[name], errors[name] = _plain_at(name, host, rank)
    if not factors:
        raise TargetError("no delta is on: there is nothing to export", code="no-active-delta")
    return PlainLora(factors, errors)


def _plain_at(name: str, host: Host, rank: int | None) -> tuple[tuple[Tensor, Tensor], float]:
    deltas = host.on()
    for delta in deltas:
        if not isinstance(host, LayerHost) or host.view.kind == "norm" or not isinstance(delta, WeightDelta):
            why = delta.not_mergeable or "it changes a norm, and LoRA has matrices only"
            raise TargetError(f"{name}: {delta.config.method} is no LoRA: {why}", code="not-plain-lora")
    assert isinstance(host, LayerHost)
    exact = [all_factors(delta) for delta in deltas if isinstance(delta, AdditiveDelta)]
    if len(exact) == len(deltas) and all(exact):
        pairs = [pair for pair in exact if pair is not None]
        return (torch.cat([a for a, _ in pairs]).contiguous(), torch.cat([b for _, b in pairs], 1).contiguous()), 0.0
    W, b = host.effective()
    own = host.view.bias
    if b is not None and (own is None or not torch.equal(b, own)):
        raise TargetError(
            f"{name}: {deltas[0].config.method} changes a bias, which plain LoRA has no place for",
            code="not-plain-lora",
        )
    change = W - host.view.weight
    if rank is None:
        raise TargetError(
            f"{name}: {deltas[0].config.method} has no exact low-rank factors: say how many to keep (`--rank 64`; the "
            "error is reported), or export with `--to merged`",
            code="missing-rank",
        )
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    error = float(S[rank:].norm() / S.norm().clamp_min(1e-30))
    return ((S[:rank, None] * Vh[:rank]).contiguous(), U[:, :rank].contiguous()), error


def padded(plain: PlainLora) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors filled up with zeros to one rank: servers read a single rank and a single alpha."""
    r = plain.rank

    def fill(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        missing = r - A.shape[0]
        return torch.cat([A, A.new_zeros(missing, A.shape[1])]), torch.cat([B, B.new_zeros(B.shape[0], missing)], 1)

    return {name: fill(A, B) for name, (A, B) in plain.factors.items()}


def write_plain_lora(model: nn.Module, plain: PlainLora, folder: Path) -> None:
    """PEFT's LORA layout with alpha = r, no patterns and no rsLoRA: the form that every server reads alike."""
    found = hosts(model)
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in padded(plain).items():
        host = found[name]
        at_embedding = isinstance(host, LayerHost) and host.view.kind == "embedding"
        suffixes = ("lora_embedding_A", "lora_embedding_B") if at_embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{name}.{suffix}": t for suffix, t in zip(suffixes, (A, B), strict=True)}
    targets = target_modules(model, plain.factors)
    config_json = {
        "base_model_name_or_path": public_name(model),
        "bias": "none",
        "fan_in_fan_out": any(transposed(found[name]) for name in plain.factors),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": plain.rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": plain.rank,
        "target_modules": targets,
        "use_dora": False,
        "use_rslora": False,
        **task(model),
    }
    means = targets if isinstance(targets, str) else tuple(targets)
    config = LoraConfig(r=plain.rank, alpha=float(plain.rank), targets=means)
    Adapter(tensors, as_json(config_json), config, base_facts(model)).write_into(folder)


# Differences of weights ------------------------------------------------------------------------------------------


def write_difference(model: nn.Module, folder: Path) -> None:
    """`delta.safetensors`: W' - W and b' - b, float32, under the base's own names; and which base they belong to."""
    changes, tensors = active_changes(model), dict[str, Tensor]()
    with torch.no_grad():
        for name, host in hosts(model).items():
            if name in changes and isinstance(host, LayerHost):
                (W, b), own = changes[name](), host.view.bias
                tensors[f"{name}.weight"] = host.view.store(W - host.view.weight)
                if b is not None:
                    tensors[f"{name}.bias"] = b if own is None else b - own
    mark = fingerprint(model)
    save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, folder / "delta.safetensors")
    record = {"base": {"name": public_name(model), "digest": mark.digest}, "meaning": "W' = W + delta, in float32"}
    (folder / "delta.json").write_text(json.dumps(record, indent=1) + "\n")


# GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(model: Any, plain: PlainLora, file: Path) -> None:
    """A LoRA adapter for llama.cpp: alpha = r, so that its scale alpha / r is 1 and nothing is lost.

    Names, rows of B and columns of A are those of `adapters/export/llama_cpp.py`; embeddings' A is transposed. Raises
    TargetError for an architecture that is not known there, and for a layer on which llama.cpp applies no adapter.
    """
    try:
        import gguf
    except ImportError:
        raise TargetError(
            "writing GGUF needs the package gguf: pip install 'graftlm[gguf]'", code="missing-package"
        ) from None
    settings = {**model.config.to_dict(), "model_type": model.config.model_type}
    if reason := why_not_gguf(settings, plain.factors):
        raise TargetError(reason, code="unsupported-by-gguf")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type)
    if type(model).__name__ != causal:
        raise TargetError(
            f"llama.cpp runs {causal}, this is a {type(model).__name__}: export with `--to plain-lora` or "
            "`--to merged`",
            code="unsupported-by-gguf",
        )
    gguf_architecture = architecture(settings)
    assert isinstance(gguf_architecture, Architecture)
    writer = gguf.GGUFWriter(str(file), gguf_architecture.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(plain.rank))
    found = hosts(model)
    for name, (A, B) in padded(plain).items():
        host = found[name]
        at_embedding = isinstance(host, LayerHost) and host.view.kind == "embedding"
        for tensor, (inner, outer) in gguf_factors(settings, name, A, B).items():
            inner = inner.T if at_embedding else inner
            writer.add_tensor(f"{tensor}.lora_a", inner.float().cpu().contiguous().numpy())
            writer.add_tensor(f"{tensor}.lora_b", outer.float().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# All of them -----------------------------------------------------------------------------------------------------

EXPORTS = ("peft", "plain-lora", "merged", "gguf", "delta")


def export(
    model: Any,
    folder: str | Path,
    *,
    to: str,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    stop_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """Write the active deltas as `to`, one of EXPORTS; returns facts about what was written (`exact`, `errors` ...).

    `stop_ids`: as in `merge_into`. Other forms than a merged model leave the generation settings to the base: where it
    lacks the first of `stop_ids`, that is the fact `missing_end`. Raises TargetError with the reason where the deltas
    cannot be written so, and OutputError where the folder exists.
    """
    result = _exported(model, folder, to=to, rank=rank, dtype=dtype, tokenizer=tokenizer, stop_ids=stop_ids)
    if to != "merged" and tokenizer is not None and (end := missing_end(model, tokenizer, stop_ids)):
        result["missing_end"] = end._asdict() | {"why": str(end)}
    return result


def _exported(
    model: Any,
    folder: str | Path,
    *,
    to: str,
    rank: int | None,
    dtype: torch.dtype,
    tokenizer: Any,
    stop_ids: Sequence[int],
) -> dict[str, Any]:
    if to == "merged":
        merge_into(model, folder, dtype=dtype, tokenizer=tokenizer, stop_ids=stop_ids)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        untied = bool(model.config.tie_word_embeddings and not config["tie_word_embeddings"])
        changes_lost = [[item.layer, item.share] for item in lost_by_rounding(model, dtype)]
        result = {"kind": to, "exact": dtype == torch.float32, "untied": untied, "lost": changes_lost}
        if (quantization := quantization_of(model)) != "none":
            result |= {"base_quantization": quantization, "lost_by_quantizing": _quantizing(model)}
        return result
    names = _active(model)
    if to == "peft" and len(names) == 1 and not why_not_peft(model, names[0]):
        with new_folder(folder) as partial:
            adapter_of(model, names[0], tokenizer=tokenizer).write_into(partial)
        return {"kind": to, "exact": True, "as": "PEFT's own method"}
    if to == "peft" and (reason := why_not_read(model_type(model), "LORA", _sites(model))):
        raise TargetError(
            f"{reason}. Export with `--to merged`, or with `--to plain-lora` for a server that reads it",
            code="unsupported-by-peft",
        )
    if to == "delta":
        with new_folder(folder) as partial:
            write_difference(model, partial)
        return {"kind": to, "exact": True}
    plain = plain_lora(model, rank=rank)
    worst = max(plain.errors.values())
    with new_folder(folder) as partial:
        if to == "gguf":
            write_gguf(model, plain, partial / "adapter.gguf")
        else:
            write_plain_lora(model, plain, partial)
    return {"kind": to, "as": "plain LoRA", "exact": worst == 0.0, "rank": plain.rank, "errors": plain.errors}


def _quantizing(model: nn.Module) -> list[list[Any]] | str:
    """The error of quantizing the base, or the reason why it is unknown."""
    try:
        return [[item.layer, item.share] for item in lost_by_quantizing(model)]
    except TargetError as error:
        return str(error)


def _sites(model: nn.Module) -> list[str]:
    return [name for name, host in hosts(model).items() if host.active]


def _active(model: nn.Module) -> Sequence[str]:
    return tuple(dict.fromkeys(name for host in hosts(model).values() for name in host.active))
