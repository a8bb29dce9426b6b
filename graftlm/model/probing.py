"""How a model's own code uses a layer, found by a pass over a few tokens.

Names and classes do not say it. Whether a layer is called or only its weight is read, and which rows of a fused
projection are the queries, is in code that differs from architecture to architecture.
"""

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.model.hosts import LayerHost
from graftlm.model.switch import Switch
from graftlm.system import preserve_global_state

TOKENS = 4


def of_any_layer(name: str) -> str:
    """The name of a module with a star for every number in it: what the layers of a model have in common."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def is_absent(model: nn.Module, name: str) -> bool:
    """Whether the weights of a module are not there: such a layer did not run, and is taken to be like the others."""
    return any(p.is_meta for p in model.get_submodule(name).parameters())


@preserve_global_state()
def run(model: Any, layers: Mapping[str, nn.Module]) -> bool:
    """One pass of a language model over a few tokens, of text alone; False where its code wants something else.

    `layers` are its decoder layers by name. Those whose weights are not there (`sketch.py`) are left out.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return False
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    there = next((p.device for p in model.parameters() if not p.is_meta), None)
    if not vocabulary or there is None:
        return False
    ids = torch.arange(3, 3 + TOKENS, device=there)[None] % vocabulary
    decoder_inputs = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    with _real_layers(model, layers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model(input_ids=ids, use_cache=False, **decoder_inputs)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError):
            return False
    return True


@contextmanager
def _real_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    real = [layer for layer in layers.values() if not any(p.is_meta for p in layer.parameters())]
    if len(real) == len(layers):
        yield
        return
    parent, _, attribute = next(iter(layers)).rpartition(".")[0].rpartition(".")
    holder = model.get_submodule(parent)
    whole = getattr(holder, attribute)
    setattr(holder, attribute, nn.ModuleList(real))
    try:
        yield
    finally:
        setattr(holder, attribute, whole)


# Layers whose weight is used, and which are not called ------------------------------------------------------------


def bypassed(model: nn.Module, names: Sequence[str], layers: Mapping[str, nn.Module]) -> list[str]:
    """The layers whose weight the model's code multiplies with by itself, without calling the layer.

    A delta there would act in part, or not at all. Reading a weight's dtype, and scaling it in place, is no such use.
    The model runs once for that, and only where the text of its code speaks of the weight of a layer of such a name.
    """
    suspects = _suspects(model)
    suspect_names = [name for name in names if suspects is None or name.rpartition(".")[2] in suspects]
    device = next((p.device.type for p in model.parameters() if not p.is_meta), "meta")
    answers = model.__dict__.setdefault("graft_bypassed", {})  # which code runs depends on these
    is_bypassed: dict[str, bool] = answers.setdefault((device, model.training), {})
    if any(name not in is_bypassed for name in suspect_names):
        found: set[str] = set()
        with _watched(model, suspect_names, found), torch.no_grad():
            run(model, layers)
        like = {of_any_layer(name) for name in found}
        is_bypassed.update({n: n in found or (is_absent(model, n) and of_any_layer(n) in like) for n in suspect_names})
    return [name for name in suspect_names if is_bypassed[name]]


def _suspects(model: nn.Module) -> set[str] | None:
    """The names of the layers whose weight the model's code speaks of; None, any layer, where it speaks of the weight
    of something that is the name of none, such as a variable."""
    files = {type(m).__module__ for m in model.modules()}
    no_models = ("graftlm.", "torch.", "transformers.pytorch_utils")
    names = {name for file in files if not file.startswith(no_models) for name in _weights_read_in(file)}
    return names if names <= {name.rpartition(".")[2] for name, _ in model.named_modules()} else None


@cache
def _weights_read_in(module: str) -> frozenset[str]:
    try:
        text = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"\b(\w+)\.weight\b", text)) - {"self", "module"}


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], found: set[str]) -> Iterator[None]:
    """Inside, the weights of these layers report their use: they are hosts for the time, where they were none."""
    replaced_layers: list[tuple[nn.Module, str, LayerHost]] = []
    watched: list[LayerHost] = []
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, LayerHost):
            parent, _, attribute = name.rpartition(".")
            layer, holder = LayerHost(layer, Switch()).train(layer.training), model.get_submodule(parent)
            setattr(holder, attribute, layer)
            replaced_layers.append((holder, attribute, layer))
        layer.watch = _watch(name, found)
        watched.append(layer)
    active = [host.active for host in watched]
    for host in watched:
        host.active = ()
    try:
        yield
    finally:
        for host, names_ in zip(watched, active, strict=True):
            host.active, host.watch = names_, None
        for holder, attribute, host in replaced_layers:
            setattr(holder, attribute, host.base)


def _watch(name: str, found: set[str]) -> Any:
    def watch(weight: Tensor) -> Tensor:
        watched_weight: _Seen = weight.detach().as_subclass(_Seen)
        watched_weight.report = lambda: found.add(name)
        return watched_weight

    return watch


class _Seen(Tensor):
    """A weight that reports the operations that make something of it."""

    report: Any = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        only_like = name in ("to", "type_as") and not isinstance(args[0], _Seen)
        watched = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, _Seen) and t.report is not None]
        if not watched or not isinstance(result, Tensor):
            return result
        if name == "__get__":  # .dtype is no tensor; .T and .data are, and whoever takes them means to use them
            vars(result)["report"] = watched[0].report
        elif not in_place and not only_like:
            watched[0].report()
        return result
