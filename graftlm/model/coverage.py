"""How much of a base its deltas and its quantization reach: shares of the weights of the decoder's matrices.

Embeddings and output head are left aside. Experts that a model keeps as one tensor [experts, ..] are no linear layers:
no delta sits on them and no quantization takes them, and they may be most of the model.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from graftlm.model.bases import QuantizedBase, view
from graftlm.model.probing import of_any_layer
from graftlm.model.registry import attachment, deltas_by_site
from graftlm.model.sites import (
    KEYWORDS,
    decoder_of,
    find_sites,
    not_called,
    output_head,
    part_of,
    places,
    towers,
)
from graftlm.model.state_dict import base_parameters


@dataclass(frozen=True)
class Coverage:
    weights: int
    """Weights of all matrices of the decoder."""
    under_deltas: int
    """Weights that a delta changes."""
    quantized: int
    quantization: str | None
    experts: dict[str, int]
    """Parameters of fused experts, by name with a star for the layer's number."""
    towers: tuple[str, ...]
    """What stands beside the decoder, where the targets are a keyword, which means the decoder."""
    not_called: tuple[str, ...]
    """Layers that a keyword leaves out: the model's code uses their weight without calling them."""

    def share(self, count: int) -> float:
        return count / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """Shares of the decoder's weights, from 0 to 1."""
        return {
            "under_deltas": round(self.share(self.under_deltas), 4),
            "quantized": round(self.share(self.quantized), 4),
            "fused_experts": {name: round(self.share(count), 4) for name, count in self.experts.items()},
            "left_out": [*self.towers, *self.not_called],
        }

    def lines(self) -> list[str]:
        """The findings, a line each."""
        sentences = []
        experts = ", ".join(f"{name} ({self.share(count):.0%})" for name, count in self.experts.items())
        if self.under_deltas:
            sentences.append(f"deltas sit on {self.share(self.under_deltas):.0%} of the decoder's weights")
            if experts:
                sentences.append(f"no delta reaches the experts, which are fused and no linear layers: {experts}")
        if self.quantization:
            sentences.append(self.about_quantization())
        if self.towers:
            sentences.append(f"left out, because text does not reach it: {', '.join(self.towers)}")
        if self.not_called:
            sentences.append(f"left out, because the model's code does not call them: {', '.join(self.not_called)}")
        return sentences

    def about_quantization(self) -> str:
        line = f"{self.quantization}: {self.share(self.quantized):.0%} of the decoder's weights are quantized"
        if self.experts:
            share = self.share(sum(self.experts.values()))
            line += f"; the fused experts, {share:.0%} of them, are not: {', '.join(self.experts)}"
        return line


def coverage(model: nn.Module) -> Coverage:
    """What the deltas and the quantization of a model reach, be it a whole one or one to plan with (`sketch.py`)."""
    decoder, head = decoder_of(model) or model, output_head(model)
    start = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    layers = {
        name: base
        for name, place in places(model).items()
        if place.kind == "linear"
        and place.module is not head
        and name.startswith(start)
        and (base := view(place.module))
    }
    linear = {name: base.d_in * base.d_out for name, base in layers.items()}
    vocabulary = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()}
    convolutions = {id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters()}
    experts: dict[str, int] = {}
    other = 0
    for name, p in base_parameters(model).items():
        if p.dim() < 2 or id(p) in vocabulary or not name.startswith(start) or name.removesuffix(".weight") in linear:
            continue
        if p.dim() == 3 and id(p) not in convolutions:
            experts[of_any_layer(name)] = experts.get(of_any_layer(name), 0) + p.numel()
        else:
            other += p.numel()
    reached: dict[str, int] = {}
    for _, site, delta in deltas_by_site(model):
        at = part_of(model, site)
        layer = at[0] if at else site
        if layer in linear:
            reached[layer] = min(linear[layer], reached.get(layer, 0) + delta.site.d_in * delta.site.d_out)
    codecs = {of_any_layer(n): m.layer.codec.name for n, m in layers.items() if isinstance(m, QuantizedBase)}
    keywords = {c.targets for c in attachment(model).configs.values() if c.targets in KEYWORDS}
    unused = [name for targets in keywords for name in not_called(model, find_sites(model, targets, ("linear",)))]
    return Coverage(
        weights=sum(linear.values()) + sum(experts.values()) + other,
        under_deltas=sum(reached.values()),
        quantized=sum(count for name, count in linear.items() if of_any_layer(name) in codecs),
        quantization=next(iter(codecs.values()), None),
        experts=experts,
        towers=tuple(towers(model) if keywords else ()),
        not_called=tuple(dict.fromkeys(of_any_layer(name) for name in unused)),
    )
