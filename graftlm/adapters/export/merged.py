"""A merged model as a folder that transformers loads without graftlm, written a layer at a time.

One layer is in memory at a time (outside of layers: the embeddings, or the output head and its neighbors), never a
second model.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from graftlm.adapters.export.shards import Shards
from graftlm.adapters.folder import TEMPLATE, new_folder
from graftlm.errors import TargetError, numbered
from graftlm.hub.stopping import generation_settings, tokenizer_that_ends
from graftlm.model.registry import attachment
from graftlm.model.state_dict import active_changes, merged_tensors


def merge_into(
    model: Any,
    folder: str | Path,
    *,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    stop_ids: Sequence[int] = (),
) -> Path:
    """Write the base with the active deltas folded in as a folder that transformers loads without graftlm.

    A tied head stays tied unless a delta sits on one side only: then both are written and the config says so. Raises
    TargetError where a delta is no change of weights, or gives a layer a bias that the architecture has no place for.

    `tensors` are written in place of the active deltas: (name in the base, tensor), each layer's in a row, as
    `combine.merge.merge` yields them. `stop_ids` (`Renderer.stop_ids`: what the chat template ends an answer with) come
    first in the eos_token_id of generation_config.json, before the base's own, and the first of them becomes the
    tokenizer's eos token.
    """
    tensors = merged_tensors(model, active_changes(model), dtype=dtype) if tensors is None else tensors
    config = copy.deepcopy(model.config)
    config._attn_implementation = attachment(model).kernel_before or config._attn_implementation
    config.dtype = dtype
    with new_folder(folder) as partial:
        shards = Shards(partial)
        weights = MergedWeights(shards, _plain(model, config), dtype, _ends(model))
        weights.add(tensors)
        _complete(model, config, weights)
        if not config.tie_word_embeddings:
            weights.untie()
        plain = _plain(model, config).to(dtype)
        weights.add((key, torch.zeros(t.shape, dtype=dtype)) for key, t in _missing(plain, weights).items())
        plain.generation_config = generation_settings(model, stop_ids)
        plain.save_pretrained(partial, state_dict={})  # all but the weights
        shards.close()
        if tokenizer is not None:
            tokenizer_that_ends(tokenizer, stop_ids).save_pretrained(partial)
            if tokenizer.chat_template:
                (partial / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    return Path(folder)


class MergedWeights:
    """The weights of a merged model, written into shards as they come.

    `plain` is such a model without weights. `names` are those that came, `together` says whether embeddings and output
    head (`ends`) are one tensor.
    """

    def __init__(self, shards: Shards, plain: Any, dtype: torch.dtype, ends: Sequence[str]) -> None:
        self.shards, self.plain, self.dtype, self.ends = shards, plain, dtype, ends
        self.names: set[str] = set()
        self.together = False
        self._tied: dict[str, Tensor] = {}

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """All tensors of some layers, under the names that they have in the model; a tensor's names in a row."""
        one_each = (dict(tied) for _, tied in groupby(tensors, lambda item: id(item[1])))
        for _, layer in groupby(one_each, lambda tied: _layer(next(iter(tied)))):
            new: dict[str, Tensor] = {}
            for tied in layer:
                self.names.update(tied)
                new |= self._without_tied(tied)
            self._store(new)

    def untie(self) -> None:
        """Add what was left out because transformers would tie it to another weight."""
        self._store(self._tied)

    def _without_tied(self, tied: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The names of one tensor that transformers does not tie to another of its names."""
        stored = [name for name in tied if name not in self.plain.all_tied_weights_keys] or list(tied)[:1]
        if set(self.ends) <= tied.keys():
            self.together = True  # and so they remain: nothing will be untied
        else:
            self._tied |= {name: tied[name].clone() for name in tied if name not in stored}
        return {name: tied[name].clone() if number else tied[name] for number, name in enumerate(stored)}

    def _store(self, tensors: Mapping[str, Tensor]) -> None:
        ignored = self.plain._keys_to_ignore_on_save or ()
        new = {name: t.to("cpu", self.dtype if t.is_floating_point() else t.dtype) for name, t in tensors.items()}
        new = {name: t for name, t in new.items() if name not in ignored}
        new = {name: t.contiguous() for name, t in revert_weight_conversion(self.plain, new).items()}
        self.shards.add(new)


def _layer(name: str) -> str:
    """The part of a name that identifies its layer: `model.layers.3`; empty outside of layers."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else ""


def _plain(model: Any, config: Any) -> Any:
    with torch.device("meta"):
        return type(model)(config)


def _ends(model: Any) -> list[str]:
    """The names of the weights of output head and embeddings, as far as there are such."""
    names = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    return [f"{names[id(end)].removesuffix('.base')}.weight" for end in ends if end is not None]


BIAS_SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "bias", "add_bias_linear", "qkv_bias")
"""The keys by which transformers' configs give their linear layers biases."""


def _complete(model: Any, config: Any, weights: MergedWeights) -> None:
    """Say in the config what the written weights need said there; TargetError where it cannot be said."""
    if config.tie_word_embeddings and len(weights.ends) == 2 and not weights.together:
        config.tie_word_embeddings = False
    if _without_a_place(model, config, weights):
        for switch in BIAS_SWITCHES:
            if getattr(config, switch, None) is False:
                setattr(config, switch, True)
        if missing := _without_a_place(model, config, weights):
            raise TargetError(
                f"{type(model).__name__} has no place for {len(missing)} biases that the delta gave its layers, so a "
                f"merged model would drop them:\n{numbered(missing)}\nExport with `--to delta`, or give the delta "
                "targets that have a bias",
                code="no-bias-in-model",
            )


def _without_a_place(model: Any, config: Any, weights: MergedWeights) -> list[str]:
    return sorted(weights.names - _plain(model, config).state_dict().keys())


def _missing(plain: Any, weights: MergedWeights) -> dict[str, Tensor]:
    """Tensors of the model that were not yielded: biases that the config adds to a layer without a delta."""
    return {key: tensor for key, tensor in plain.state_dict().items() if key not in weights.names}
