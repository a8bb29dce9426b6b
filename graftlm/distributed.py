"""Many processes, one run: all that knows of torch.distributed.

    torchrun --nproc-per-node N -m graftlm train ...

starts N processes, the ranks. Each reads the same rows and makes the same plan from the same seed; of a step's rows
each trains on its share, and the gradients are summed. The deltas are whole on every rank, and equal; the frozen base
is whole too, or cut in N parts (`shard`). Rank 0 prints and writes. See docs/decisions/028 and 029.

A process that is alone passes through all of this unchanged, and `import graftlm.distributed` imports no torch.
"""

import atexit
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from graftlm.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftlm.data.batches.pack import Example, Group, Pack

T = TypeVar("T")


class _Joined:
    store: Any = None
    """What the ranks leave notes in; None as long as this process is alone."""
    gathers: int = 0


def start() -> None:
    """Join the other ranks, if torchrun started this process as one of several; gloo on a CPU, NCCL on GPUs."""
    if _Joined.store is not None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch
    import torch.distributed as dist

    here, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and here >= gpus:
        raise TrainingError(
            f"process {here + 1} on a machine of {gpus} GPUs: --nproc-per-node {gpus} is the most",
            code="more-processes-than-gpus",
        )
    if gpus:
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        # Numbers and texts, which are small, go by gloo in either case.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        atexit.register(_stop)
    _Joined.store = dist.distributed_c10d._get_default_store()


def _stop() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many ranks there are."""
    return 1 if _Joined.store is None else int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """The number of this one."""
    return 0 if _Joined.store is None else int(os.environ["RANK"])


def first() -> bool:
    """Whether this rank prints and writes."""
    return rank() == 0


def shows_errors() -> bool:
    """Whether this rank is the one that shows what went wrong: the first that comes to it."""
    return _Joined.store is None or bool(_Joined.store.add("graft_errors", 1) == 1)


# What is summed, gathered and compared ---------------------------------------------------------------------------


def totals(*values: float) -> list[float]:
    """Each value summed over the ranks. All of them must come here, so this is where they wait for each other."""
    if _Joined.store is None:
        return [float(value) for value in values]
    import torch
    import torch.distributed as dist

    summed = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()


def gathered(items: Sequence[T]) -> list[T]:
    """The items of all ranks, those of rank 0 first; they travel as JSON, so tuples arrive as lists."""
    if _Joined.store is None:
        return list(items)
    _Joined.gathers += 1
    note = f"graft_gathered_{_Joined.gathers}_"
    _Joined.store.set(f"{note}{rank()}", json.dumps(list(items)))
    return [item for n in range(count()) for item in json.loads(_Joined.store.get(f"{note}{n}"))]


def sum_gradients(parameters: Iterable["nn.Parameter"]) -> None:
    """Sum the gradients over the ranks, all in one message; what has a gradient on no rank keeps none."""
    if _Joined.store is None:
        return
    import torch
    import torch.distributed as dist

    parameters = list(parameters)
    parts = [(p if p.grad is None else p.grad).detach().flatten() for p in parameters]
    parts = [torch.zeros_like(part) if p.grad is None else part for p, part in zip(parameters, parts, strict=True)]
    there = parts[0].new_tensor([p.grad is not None for p in parameters])
    bucket = torch.cat([there, *parts])
    dist.all_reduce(bucket)
    there, *parts = bucket.split([len(parameters), *(p.numel() for p in parameters)])
    for p, part, has in zip(parameters, parts, there.tolist(), strict=True):
        p.grad = part.view_as(p).to(p.dtype) if has else None


def check_same(tensors: Mapping[str, "Tensor"]) -> None:
    """Raise TrainingError, on every rank, for the first of these tensors that is not the same bytes on all of them."""
    if _Joined.store is None:
        return
    import torch

    def mark(tensor: "Tensor") -> int:
        return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    everyone = gathered([{name: mark(tensor) for name, tensor in tensors.items()}])
    for name, marks_of_first in everyone[0].items():
        other = [number for number, marks in enumerate(everyone) if marks.get(name) != marks_of_first]
        if other:
            raise TrainingError(
                f"{name} starts otherwise on rank {other[0]} than on rank 0, so they would train different deltas. "
                "Start all ranks with the same files and packages, on machines of one kind",
                code="ranks-start-differently",
            )


@contextmanager
def one_first() -> Iterator[None]:
    """Inside, the first rank of a machine goes ahead and the others find what it has made (a converted base)."""
    waits = int(os.environ.get("LOCAL_RANK", "0")) > 0
    if waits:
        totals(0)
    yield
    if not waits:
        totals(0)


# Who trains on what ----------------------------------------------------------------------------------------------


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the sizes for each rank: the largest first, each to the rank that has least; in order within a rank.

    Depends on the sizes alone. A single rank has all of them, as they come.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += sizes[index]
    return [sorted(share) for share in shares]


def packs_of(
    rows: Sequence["Example | Group"],
    make: Callable[[Sequence["Example | Group"]], "list[Pack]"],
    *,
    sharded: bool = False,
) -> "list[Pack]":
    """This rank's packs of the rows. With a sharded base every rank has as many, for they pass its layers together:
    who lacks one takes the shortest row and learns nothing from it.
    """
    shares = deal([row.cost() for row in rows], count())

    def packs_of_share(share: Sequence[int]) -> "list[Pack]":
        return make([rows[i] for i in share]) if share else []

    mine = packs_of_share(shares[rank()])
    if sharded and (missing := max(len(packs_of_share(share)) for share in shares) - len(mine)):
        (idle,) = make([min(rows, key=len)])
        mine += [idle.idle()] * missing
    return mine


# A base in parts -------------------------------------------------------------------------------------------------


def is_sharded(model: Any) -> bool:
    return getattr(model, "graft_sharded", False) is True
