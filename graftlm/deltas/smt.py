"""SMT: Sparse Matrix in Large Language Model Fine-tuning. He et al. 2024, arXiv:2405.15525, section 3.

    W'[i, j] = W[i, j] + V_ij        for chosen blocks (i, j), where W is cut into blocks of 256 x 256; V_ij at first 0

Blocks with the greatest mean of |G| are chosen, G the gradient of the loss over some batches at the untouched base
(the paper: over 100 steps of full fine-tuning). The paper ranks the blocks of all layers together, so that some layers
get none; here each layer gets the same share, which the authors' code offers too. A layer that is smaller than a block
has blocks of its own size; rows and columns that fill no whole block stay frozen.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, Share, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, Site, Targets


@config
class SmtConfig(DeltaConfig):
    method: Literal["smt"] = "smt"
    density: Share = 0.03
    """Share of a layer's blocks that learn, at least one."""
    block: PositiveCount = 256
    """Rows and columns of a block."""
    targets: Targets = r".*\.(q_proj|k_proj|v_proj|query|key|value|query_key_value|qkv_proj|c_attn)"


class Smt(AdditiveDelta):
    family = "specification"
    paper = "He et al. 2024, arXiv:2405.15525"
    formula = "taken * height * width"
    learning_rate = 2e-3
    needs = ("gradient",)
    chosen: Tensor

    def __init__(self, site: Site, config: SmtConfig) -> None:
        super().__init__(site, config)
        self.height, self.width = min(config.block, site.d_out), min(config.block, site.d_in)
        self.rows, self.columns = site.d_out // self.height, site.d_in // self.width
        self.taken = max(1, round(config.density * self.rows * self.columns))
        self.register_buffer("chosen", torch.arange(self.taken))
        self.V = nn.Parameter(torch.zeros(self.taken, self.height, self.width))

    def start(self) -> None:
        G = self.site.statistics["gradient"].abs()
        G = G[: self.rows * self.height, : self.columns * self.width]
        means = G.reshape(self.rows, self.height, self.columns, self.width).mean((1, 3))
        self.chosen.copy_(means.flatten().topk(self.taken).indices.sort().values)

    def matrix(self) -> Tensor:
        grid = self.V.new_zeros(self.rows * self.columns, self.height, self.width)
        grid = grid.index_copy(0, self.chosen, self.V).unflatten(0, (self.rows, self.columns))
        whole = grid.transpose(1, 2).reshape(self.rows * self.height, self.columns * self.width)
        return F.pad(whole, (0, self.site.d_in - whole.shape[1], 0, self.site.d_out - whole.shape[0]))

    def increment(self, x: Tensor, base: Base) -> Tensor:
        row, column = self.chosen // self.columns, self.chosen % self.columns
        pieces = x[..., : self.columns * self.width].unflatten(-1, (self.columns, self.width))
        products = torch.einsum("...nw,nhw->...nh", pieces.index_select(-2, column), self.V)
        y = products.new_zeros(*x.shape[:-1], self.rows, self.height).index_add(-2, row, products).flatten(-2)
        return F.pad(y, (0, self.site.d_out - y.shape[-1]))
