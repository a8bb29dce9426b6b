"""ZipLoRA: Shah et al. 2023, arXiv:2311.13600, section 4, a layer at a time.

    M = sum_i M_i diag(m_i)        m_i [d_in]: a weight for each column, which is what one input of the layer does
    min over the m_i of  sum_i tr((M - w_i M_i) G_i (M - w_i M_i)^T) / tr(M_i G_i M_i^T)
                         + balance * sum_{i < k} mean_j |m_ij m_kj|

    G_i [d_in, d_in] = E[x x^T] over the inputs x of adapter i. Without rows, G_i = M_i^T M_i: as in `wudi.py`, the rows
    of M_i stand for those inputs. (With G_i = I and balance 0, M would be a mean.)

Each adapter keeps its outputs on its own inputs; the last term keeps one column from being shared by two adapters. The
m_i start at w_i, the weighted sum; `steps` steps of Adam follow, and the best m is the result. m_1 = w_1, m_2 = 0 is
adapter 1.

Spaces. In `knots` and `product` columns are inputs, as in the paper. In `core` they are the common input directions of
the adapters, which is another rule, and much cheaper for wide layers.

Departures. The paper compares outputs of the whole model, an image generator, on prompts of two adapters, and so
needs both. Here each layer is compared by itself, and relative to the adapter's own output, so that a large adapter
does not rule. The paper's last term is |m_1 . m_2| (public code: the mean of the |m_1j m_2j|, as here, which does not
grow with the width; another one takes the cosine). The paper has two adapters. The rate and the balance of 0.01 are
those of public code, the 100 steps are ours; none is compared with the text. The paper has no weights; here one
scales its adapter.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import MomentRule, RuleConfig
from graftlm.config.schema import PositiveCount, PositiveRate, Rate, config


@config
class ZiploraConfig(RuleConfig):
    name: Literal["ziplora"] = "ziplora"
    balance: Rate = 0.01
    """How much columns that several adapters share cost."""
    steps: PositiveCount = 100
    """Of Adam."""
    learning_rate: PositiveRate = 0.01


class Ziplora(MomentRule):
    paper = "Shah et al. 2023, arXiv:2311.13600"
    spaces = ("knots", "product", "core", "ctm")
    needs_moments = False

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        return self._merged(matrices, weights, [Inputs(rows=M) for M in matrices])

    def merge_with(self, matrices: Sequence[Tensor], weights: Sequence[float], moments: Sequence[Tensor]) -> Tensor:
        return self._merged(matrices, weights, [Inputs(moment=G) for G in moments])

    def _merged(self, matrices: Sequence[Tensor], weights: Sequence[float], inputs: "Sequence[Inputs]") -> Tensor:
        stacked = torch.stack(list(matrices))
        m = torch.tensor(weights, dtype=stacked.dtype)[:, None].repeat(1, stacked.shape[2])
        best, lowest = m.clone(), float("inf")
        parameter = m.requires_grad_()
        adam = torch.optim.Adam([parameter], lr=self.config.learning_rate)
        for _ in range(self.config.steps + 1):
            loss, parameter.grad = loss_and_gradient(m.detach(), stacked, weights, inputs, self.config.balance)
            if loss < lowest:
                best, lowest = m.detach().clone(), loss
            adam.step()
        return zipped(best, stacked)


class Inputs:
    """The inputs of an adapter: x of E[x x^T], or rows that stand for them."""

    def __init__(self, *, rows: Tensor | None = None, moment: Tensor | None = None) -> None:
        self.rows, self.moment = rows, moment

    def of(self, M: Tensor) -> Tensor:
        """M G [k, d_in] of M [k, d_in]."""
        if self.rows is not None:
            return (M @ self.rows.T) @ self.rows
        assert self.moment is not None
        return M @ self.moment


def zipped(m: Tensor, stacked: Tensor) -> Tensor:
    """sum_i M_i diag(m_i) of m [n, d_in] and the M_i [n, k, d_in]."""
    return (stacked * m[:, None]).sum(0)


def loss_and_gradient(
    m: Tensor, stacked: Tensor, weights: Sequence[float], inputs: Sequence[Inputs], balance: float
) -> tuple[float, Tensor]:
    """The objective above, and its gradient [n, d_in]."""
    M = zipped(m, stacked)
    loss, toward = 0.0, torch.zeros_like(M)
    for own, weight, given in zip(stacked, weights, inputs, strict=True):
        apart = M - weight * own
        applied = given.of(apart)
        size = float((own * given.of(own)).sum())
        if size > 0:  # an adapter that does nothing on its inputs wants nothing
            loss += float((apart * applied).sum()) / size
            toward += 2 / size * applied
    gradient = (stacked * toward).sum(1)
    sizes = m.abs()
    others = sizes.sum(0) - sizes
    loss += balance * float((sizes * others).sum()) / 2 / m.shape[1]
    return loss, gradient + balance * others * m.sign() / m.shape[1]
