"""Random answers as every trainer has them: padded rows of log-probabilities, and the same as a batch of triples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.losses import Batch


@dataclass(frozen=True)
class Answers:
    """2P answers, the chosen ones first, of at most T tokens."""

    policy: Tensor
    """float64 [2P, T], with a gradient; below 0 everywhere, also where an answer has ended."""
    reference: Tensor
    mask: Tensor
    """bool [2P, T]"""
    batch: Batch

    def rows(self, values: Tensor) -> Tensor:
        """The tokens of all answers end to end: [S]."""
        return values[self.mask]


def answers(seed: int = 0, pairs: int = 5, longest: int = 7) -> Answers:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (2 * pairs,), generator=draw)
    mask = torch.arange(longest)[None] < lengths[:, None]
    policy, reference = (-3 * torch.rand(2 * pairs, longest, generator=draw, dtype=torch.float64) - 0.01 for _ in "ab")
    numbers = torch.arange(2 * pairs)
    batch = Batch(
        weights=torch.ones(int(lengths.sum())),
        answers=numbers.repeat_interleave(lengths),
        pairs=torch.stack([numbers[:pairs], numbers[pairs:]], dim=1),
        scores=(numbers < pairs).float(),
        values=torch.linspace(-0.3, 0.4, 2 * pairs, dtype=torch.float64),
        normalisers=torch.rand(int(lengths.sum()), generator=draw, dtype=torch.float64),
        mean_log_probs=-6 * torch.rand(int(lengths.sum()), generator=draw, dtype=torch.float64),
        divergences=torch.rand(int(lengths.sum()), generator=draw, dtype=torch.float64),
    )
    return Answers(policy.requires_grad_(), reference, mask, batch)
