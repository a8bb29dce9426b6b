"""Small libraries of adapters in a pool over one tiny base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graftlm.adapters.adapter import Adapter
from graftlm.combine.compose import lora_with
from graftlm.generation.adapter_pool import AdapterPool
from graftlm.model.modes import by_row
from graftlm.model.routes import Row
from graftlm.testing import tiny_tokenizer
from tests.generation.adapters import base

SITES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")
Library = Mapping[str, Mapping[str, tuple[torch.Tensor, torch.Tensor]]]


def random_library(*names: str, ranks: Sequence[int] = (3,), scale: float = 0.15, seed: int = 0) -> Library:
    """Adapter -> site -> (A, B), random; ranks take turns."""
    model, found, random = base(), {}, torch.Generator().manual_seed(seed)
    for number, name in enumerate(names):
        r = ranks[number % len(ranks)]
        found[name] = {}
        for site in SITES:
            d_out, d_in = model.get_submodule(site).weight.shape
            A, B = (torch.randn(*size, generator=random) for size in ((r, d_in), (d_out, r)))
            found[name][site] = (A, scale * B)
    return found


def in_another_gauge(library: Library) -> Library:
    """The same adapters by other factors: (R^-1 A, B R)."""
    random, found = torch.Generator().manual_seed(1), {}
    for name, factors in library.items():
        found[name] = {}
        for site, (A, B) in factors.items():
            R = torch.randn(len(A), len(A), generator=random).double() + 2 * torch.eye(len(A)).double()
            found[name][site] = ((R.inverse() @ A.double()).float(), (B.double() @ R).float())
    return found


def pool_of(library: Library, folder: Path) -> AdapterPool:
    """A pool over a base of its own, in which the adapters are registered in the order of the library."""
    model = base()
    pool = AdapterPool(model, slots=len(library) + 1)
    for name, factors in library.items():
        adapter: Adapter = lora_with(base(), factors)
        if not (folder / name).exists():
            adapter.write(folder / name)
        pool.register(name, folder / name)
    return pool


TOKENIZER = tiny_tokenizer()


@torch.no_grad()
def logits(model: Any, ids: Sequence[int], row: Row) -> torch.Tensor:
    """[tokens, vocabulary] by one pass of the model's own, without a cache."""
    with by_row(model, [row]):
        found: torch.Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found
