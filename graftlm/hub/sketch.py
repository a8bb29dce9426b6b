"""A base without its weights: all of its layers by shape, a few of them filled with random numbers so that they run.

What a training step needs is the sum over layers, and layers with the same shapes and the same deltas need the same.
So a few layers of each kind, run alone and together, tell what the whole model will do.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from graftlm.errors import BaseModelError
from graftlm.hub.config import BaseConfig, base_config
from graftlm.hub.dtypes import resolve_dtype
from graftlm.hub.locate import locate
from graftlm.hub.quantize_base import quantize_layers
from graftlm.model.attach import SKETCH
from graftlm.model.quantize import QuantizedLinear
from graftlm.model.sites import transformer_layers


@dataclass(frozen=True)
class Sketch:
    """A model whose decoder layers are on the meta device, but for those of `real`; deltas can be attached to it."""

    model: Any
    layers: list[nn.Module]
    """All of them, in order."""
    names: list[str]
    dtype: torch.dtype
    base_bytes: int
    """What the weights take in memory, tied ones once."""
    file_bytes: int
    """The size of the weights on disk, 0 where they are not here."""


def read_config(base: BaseConfig, *, network: bool = False) -> Any:
    """transformers' config of a base; raises BaseModelError."""
    where = locate(base, network=network)
    try:
        return AutoConfig.from_pretrained(
            where,
            revision=base.revision,
            local_files_only=not network,
            trust_remote_code=base.run_code_shipped_with_the_model,
        )
    except Exception as error:
        raise BaseModelError(f"{base.name}: its config cannot be read: {error}", code="unreadable-config") from None


@dataclass(frozen=True)
class Positions:
    """How many positions a base has by its config; None where the config does not say it."""

    count: int | None
    config: Any

    def are_a_table(self) -> bool:
        """Whether the base looks its positions up in a table, which ends. Makes the model without its weights."""
        if self.count is None:
            return False
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        about = range(self.count, self.count + 9)  # OPT's table begins with two more
        words = model.get_input_embeddings()
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
        if any(embedding.num_embeddings in about for embedding in embeddings):
            return True
        tensors = (*model.named_parameters(), *model.named_buffers())
        return any("pos" in name.lower() and t.dim() > 1 and about.start in t.shape[:-1] for name, t in tensors)


def positions(base: BaseConfig | str, *, network: bool = False) -> Positions:
    """The positions of a base, by config.json alone; raises BaseModelError.

    RoPE that is stretched has its factor times as many as before (YaRN: the config of Qwen2.5 names those before).
    """
    config = read_config(base_config(base), network=network)
    text = config.get_text_config()
    count = getattr(text, "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return Positions(None, config)
    rope = getattr(text, "rope_parameters", None) or {}
    before, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if isinstance(before, int) and isinstance(factor, int | float):
        count = max(count, int(before * factor))
    return Positions(count, config)


def sketch(base: BaseConfig | str, real: Sequence[int], *, network: bool = False, device: str | None = None) -> Sketch:
    """The sketch of a base with the layers of these numbers real; no weight is read, only config.json."""
    base = base_config(base)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(base.dtype, device)
    config = read_config(base, network=network)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, dtype=dtype)
    sizes = {id(t): t.numel() * t.element_size() for t in (*whole.parameters(), *whole.buffers())}
    layers = transformer_layers(whole)
    if not layers:
        raise BaseModelError(
            f"{base.name}: {type(whole).__name__} has no list of decoder layers to plan with", code="no-decoder-layers"
        )
    shortened, count = copy.deepcopy(config), len(layers)
    per_layer = {k: v for k, v in vars(shortened.get_text_config()).items() if isinstance(v, list) and len(v) == count}
    text = shortened.get_text_config()
    text.num_hidden_layers = len(real)  # GPT-2 calls it n_layer, which this sets
    vars(text).update({key: [values[n] for n in real] for key, values in per_layer.items()})
    model: Any = AutoModelForCausalLM.from_config(shortened, dtype=dtype).to(device)
    model.eval().requires_grad_(False)
    size = sum(sizes.values())
    if base.quantization != "none":
        size -= _saved_by_quantization(whole, quantize_layers(model, base.quantization))
    filled = list(whole.get_submodule(_list_name(layers)))
    for number, layer in zip(real, transformer_layers(model).values(), strict=True):
        filled[number] = layer
    model.config.get_text_config().num_hidden_layers = count
    vars(model.config.get_text_config()).update(per_layer)
    _set(model, _list_name(layers), nn.ModuleList(filled).requires_grad_(False))
    model.__dict__[SKETCH] = True
    where = Path(locate(base, network=network))
    files = where.glob("*.safetensors") if where.is_dir() else ()
    return Sketch(model, filled, list(layers), dtype, size, sum(f.stat().st_size for f in files))


def _saved_by_quantization(whole: nn.Module, quantized: nn.Module) -> int:
    """Bytes less than `whole` takes with its layers quantized, as `quantized` has a few of them."""
    found = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    bytes_now = sum(t.numel() * t.element_size() for layer in found for t in layer.tensors().values())
    each = bytes_now / sum(layer.in_features * layer.out_features for layer in found)
    weights = [p for layer in transformer_layers(whole).values() for p in layer.parameters() if p.dim() == 2]
    return int(sum(p.numel() * (p.element_size() - each) for p in weights))


def _list_name(layers: dict[str, nn.Module]) -> str:
    return next(iter(layers)).rpartition(".")[0]


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


@contextmanager
def only(sketch: Sketch, numbers: Sequence[int]) -> Iterator[Any]:
    """Inside, the model runs these layers, in this order."""
    name = sketch.names[0].rpartition(".")[0]
    whole = sketch.model.get_submodule(name)
    shorten(sketch, numbers)
    try:
        yield sketch.model
    finally:
        _set(sketch.model, name, whole)


def shorten(sketch: Sketch, numbers: Sequence[int]) -> None:
    """From now on the model runs these layers, in this order."""
    for place, number in enumerate(numbers):
        for module in sketch.layers[number].modules():
            if hasattr(module, "layer_idx"):
                module.__dict__["layer_idx"] = place  # by it a prompt's keys and values are found
    name = sketch.names[0].rpartition(".")[0]
    _set(sketch.model, name, nn.ModuleList([sketch.layers[number] for number in numbers]))


def kinds_of_layer(sketch: Sketch) -> list[list[int]]:
    """The layers that need the same, together: the same shapes, the same deltas, and as much of a backward pass."""
    found: dict[tuple[Any, ...], list[int]] = {}
    reached = False  # by a delta in this layer or below: from there on, gradients pass through
    for number, layer in enumerate(sketch.layers):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        below, reached = reached, reached or any(p.requires_grad for p in layer.parameters())
        window = tuple(getattr(module, "sliding_window", None) for module in layer.modules())
        found.setdefault((type(layer), shapes, window, below, reached), []).append(number)
    return list(found.values())
