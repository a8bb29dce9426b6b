"""PHATGOOSE: Muqeeth et al. 2024, arXiv:2402.05859, section 3.

    y = W x + sigmoid(v_e . x) B_e A_e x        v_e [d_in] at each layer, from 0, learnt alone on the rows of adapter e
    s_e(x) = LN(v_e) . LN(x) / sqrt(d_in)       LN without gain and bias
    g(x) = softmax(s(x)) over the top_k largest

Each adapter gets its gate on its own rows, after its training and without the other adapters. The gates of a library
are kept in a file (`gates`), and only those of adapters that are not in it are learnt: no rows are needed for others.

Departures. AdamW with learning rate 1e-3 and 4 rows a step for 100 steps, as other public code of this router has it;
the paper takes Adafactor. Top 2 is the paper's.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from graftlm.config.schema import Count, PositiveCount, PositiveRate, config
from graftlm.errors import RecipeError
from graftlm.files import whole
from graftlm.model.routed import Experts, Gates
from graftlm.routing.base import RouterConfig, TokenRouter, softmax_of_top
from graftlm.routing.fit import fit
from graftlm.routing.library import Library

Vectors = dict[str, Tensor]
"""Site -> v [d_in]."""


@config
class PhatgooseConfig(RouterConfig):
    name: Literal["phatgoose"] = "phatgoose"
    gates: str | None = None
    """File in which gates are kept, a .safetensors; without it they are learnt at every start."""
    rows: dict[str, str] = Field(default_factory=dict)
    """Adapter -> the rows that its gate learns from, as `data.train` names them."""
    top_k: PositiveCount | None = 2
    """Adapters that a token takes; null for all of them."""
    examples: PositiveCount = 200
    """Rows of each adapter that are used."""
    steps: PositiveCount = 100
    learning_rate: PositiveRate = 1e-3
    batch_rows: PositiveCount = 4
    seed: Count = 0


class Phatgoose(TokenRouter):
    paper = "Muqeeth et al. 2024, arXiv:2402.05859"

    def prepare(self, library: Library) -> None:
        file = None if self.config.gates is None else Path(self.config.gates)
        known = {} if file is None else read_gates(file)
        prints = dict(zip(library.names, library.fingerprints, strict=True))
        missing = {name: fingerprint for name, fingerprint in prints.items() if fingerprint not in known}
        known |= {fingerprint: self._learnt(library, name) for name, fingerprint in missing.items()}
        if file is not None and missing:
            write_gates(file, known)
        self.gates_of = {name: known[fingerprint] for name, fingerprint in prints.items()}

    def _learnt(self, library: Library, name: str) -> Vectors:
        config, factors = self.config, library.factors(name)
        rows = library.examples(name, config.rows, config.examples, config.seed)
        v = {site: torch.zeros(A.shape[1], device=library.model.device) for site, (A, _) in factors.items()}
        for each in v.values():
            each.requires_grad_()
        fit(
            library.model,
            {name: factors},
            lambda site, _: lambda x, inner: (x @ v[site]).sigmoid()[:, None],
            list(v.values()),
            rows,
            steps=config.steps,
            learning_rate=config.learning_rate,
            batch_rows=config.batch_rows,
            seed=config.seed,
        )
        return {site: each.detach().cpu() for site, each in v.items()}

    def gates(self, site: str, experts: Experts) -> Gates:
        V = torch.stack([self.gates_of[name][site] for name in experts.names]).to(experts.A.device)
        size = (V.shape[1],)
        V = F.layer_norm(V, size)
        return lambda x, _: softmax_of_top(F.layer_norm(x, size) @ V.T / size[0] ** 0.5, self.config.top_k)


def write_gates(file: Path, gates: Mapping[str, Vectors]) -> None:
    """Gates by the fingerprint of the adapter that each was learnt on. OutputError where it cannot be written."""
    tensors = {f"{print_}/{site}": v.contiguous() for print_, vectors in gates.items() for site, v in vectors.items()}
    with whole(file) as partial:
        partial.write_bytes(save(tensors))


def read_gates(file: Path) -> dict[str, Vectors]:
    """Fingerprint of an adapter -> its gates; none where there is no such file."""
    found: dict[str, Vectors] = {}
    if not file.is_file():
        return found
    try:
        with safe_open(os.fspath(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                fingerprint, _, site = key.partition("/")
                found.setdefault(fingerprint, {})[site] = opened.get_tensor(key)
    except Exception as error:  # of safetensors, which has no class for it
        raise RecipeError(
            f"gates: {file} cannot be read: {error}. Delete it, and the gates are learnt again", code="unreadable-gates"
        ) from None
    return found
