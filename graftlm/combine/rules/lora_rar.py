"""LoRA.rar: Shenaj et al. 2024, arXiv:2412.05148, section 3: a network that says how two adapters are merged.

    (m_1j, m_2j) = O relu(U [c_1j; c_2j] + b) + o        c_ij [d_out] column j of M_i;  U [h, 2 d_out]  O [2, h]
    M = M_1 diag(m_1) + M_2 diag(m_2)

Each column is looked at by itself, so columns in another order have their weights in that order. The network is trained
once on pairs of a library of adapters (`graftlm/combine/train_merger.py`); then a merge is one pass. There is a U and a
b for each d_out, and one O and o for all, as in the released code, which has h = 128.

Columns are those of whole matrices: the rule acts in `product` space alone. M_1 is the larger adapter.

Departures. Columns are divided by the root of the mean of the ||c_ij||^2, so that the sizes of two adapters together do
not matter. The paper has no weights; here one scales its adapter first. One adapter alone is itself, without the
network. (Written after the released code; not compared with the text of the paper.)
"""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftlm.combine.rules.base import Convention, Rule, RuleConfig, weighted_sum
from graftlm.config.schema import config
from graftlm.errors import RecipeError
from graftlm.files import whole

FORMAT = "graftlm-merger-1"
HIDDEN = 128


class Merger:
    """The network: tensors by name. It starts at weights 1, which is the sum."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        """`output.weight` [2, h], its bias [2], and for each d_out `input.D_OUT.weight` [h, 2 d_out], its bias [h]."""

    @classmethod
    def new(cls, widths: Sequence[int], *, seed: int, hidden: int = HIDDEN) -> "Merger":
        random = torch.Generator().manual_seed(seed)
        tensors = {"output.weight": torch.zeros(2, hidden), "output.bias": torch.ones(2)}
        for d_out in sorted(set(widths)):
            tensors[f"input.{d_out}.weight"] = torch.randn(hidden, 2 * d_out, generator=random)
            tensors[f"input.{d_out}.bias"] = torch.zeros(hidden)
        return cls(tensors)

    @property
    def widths(self) -> list[int]:
        return sorted(int(key.split(".")[1]) for key in self.tensors if key.startswith("input.") and "weight" in key)

    def weights(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """m [2, d_in] of two changes, each as factors whose product is the change: (M,) or (B, A). In their dtype."""
        d_out, d_in = len(first[0]), first[-1].shape[1]
        U, b, O, o = (  # noqa: E741 (names of the equation)
            self.tensors[key].to(first[0].dtype)
            for key in (f"input.{d_out}.weight", f"input.{d_out}.bias", "output.weight", "output.bias")
        )
        size = sqrt(sum(squared_norm(factors) for factors in (first, second)) / (2 * d_in)) or 1.0
        hidden = sum(_product([half, *each]) for half, each in zip(U.split(d_out, 1), (first, second), strict=True))
        return O @ torch.relu(hidden / size + b[:, None]) + o[:, None]

    def save(self, file: str | Path) -> Path:
        """Write it as a safetensors file, which takes the place of another. Raises OutputError where it cannot be."""
        with whole(Path(file)) as draft:
            tensors = {key: tensor.detach().contiguous() for key, tensor in self.tensors.items()}
            save_file(tensors, draft, metadata={"format": FORMAT})
        return Path(file)

    @classmethod
    def read(cls, file: str | Path) -> "Merger":
        """Raises RecipeError for a file that is not there or holds no such network."""
        if not Path(file).is_file():
            raise RecipeError(
                f"{file}: no such file. `network` is what `train_merger(...).save` wrote", code="no-such-file"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                known = (opened.metadata() or {}).get("format")
                tensors = {key: opened.get_tensor(key) for key in opened.keys()} if known == FORMAT else {}  # noqa: SIM118
        except SafetensorError:
            tensors = {}
        if not tensors:
            raise RecipeError(
                f"{file} is no network for lora-rar: give what `train_merger(...).save` wrote", code="unusable-network"
            )
        return cls(tensors)


def _product(factors: Sequence[Tensor]) -> Tensor:
    made = factors[0]
    for each in factors[1:]:
        made = made @ each
    return made


def squared_norm(factors: Sequence[Tensor]) -> float:
    """||M||^2 of (M,) or of (B, A)."""
    if len(factors) == 1:
        return float(factors[0].square().sum())
    B, A = factors
    return float(((B.T @ B) * (A @ A.T)).sum())


@config
class LoraRarConfig(RuleConfig):
    name: Literal["lora-rar"] = "lora-rar"
    network: str | None = None
    """The file of the network, which has no default."""


class LoraRar(Rule):
    paper = "Shenaj et al. 2024, arXiv:2412.05148"
    spaces = ("product",)
    most = 2

    def __init__(self, config: LoraRarConfig, convention: Convention | None = None) -> None:
        super().__init__(config, convention)
        if config.network is None:
            raise RecipeError(
                "lora-rar needs a network, trained on a library of adapters of this base: --set network=FILE. Without "
                "one, ziplora finds such weights by itself",
                code="missing-option",
            )
        self.merger = Merger.read(config.network)

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        scaled = [weight * M for M, weight in zip(matrices, weights, strict=True)]
        if len(scaled) == 1:
            return scaled[0]
        d_out = len(scaled[0])
        if d_out not in self.merger.widths:
            raise RecipeError(
                f"{self.config.network} knows layers of {', '.join(map(str, self.merger.widths))} outputs, and this "
                f"one has {d_out}: train it on adapters that change the same layers",
                code="unusable-network",
            )
        first, second = sorted(scaled, key=lambda M: -float(M.norm()))
        m = self.merger.weights([first], [second])
        return weighted_sum([first * m[0], second * m[1]], [1.0, 1.0])
