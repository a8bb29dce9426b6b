"""Whether a weight in a file is a copy of the base's, up to the rounding of a dtype."""

import torch
from torch import Tensor


def copied_rows(own: Tensor, copy: Tensor) -> Tensor:
    """For each row of a weight, whether `copy` is what storing it in another dtype leaves of it: bool [rows].

    Either may have been rounded to its dtype, or to a narrower one in between, from the same numbers x:

        |own - copy| <= (u + v) |x| + s + t      u, v: half of each eps;  s, t: half of each smallest number

    and a number above the greatest of the copy's dtype is infinity there.
    """
    blocks = zip(own.split(4096), copy.split(4096), strict=True)  # a table is large, and float32 twice as large
    return torch.cat([_copied(one, other) for one, other in blocks])


def _copied(own: Tensor, copy: Tensor) -> Tensor:
    wide, theirs = own.float(), copy.float()
    fits = torch.zeros(len(own), dtype=torch.bool, device=own.device)
    for here in _dtypes(own):
        for there in _dtypes(copy):
            same = wide == theirs
            if here != there:
                a, b = torch.finfo(here), torch.finfo(there)
                bound = 0.51 * ((a.eps + b.eps) * wide.abs() + a.smallest_normal * a.eps + b.smallest_normal * b.eps)
                above = wide.abs() >= b.max * (1 - b.eps)
                same |= ((wide - theirs).abs() <= bound) | (above & (theirs == wide.sign() * torch.inf))
            fits |= same.reshape(len(own), -1).all(1)
    return fits


def _dtypes(t: Tensor) -> set[torch.dtype]:
    """The dtypes that the numbers of a tensor may have been rounded to."""
    halves = (torch.float16, torch.bfloat16)
    return {t.dtype, *(dtype for dtype in halves if torch.equal(t.to(dtype).float(), t.float()))}
