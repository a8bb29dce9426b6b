"""Several processes that have been started as torchrun starts them: in one go, and from a server that has torch."""

import io
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch.distributed as dist

PATIENCE_S = 120


def together(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function returns on each of `count` ranks; fails if one raises, or if they do not end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["graftlm.testing", "graftlm.run", "torch.distributed.fsdp"])
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's own has this part
    queue = context.Queue()
    processes = [
        context.Process(target=_one, args=(number, count, store.port, queue, function, arguments), daemon=True)
        for number in range(count)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    until = time.monotonic() + PATIENCE_S
    try:
        while len(found) < count:
            number, failed, result = queue.get(timeout=max(0.1, until - time.monotonic()))
            assert not failed, f"rank {number}:\n{result}"
            found[number] = pickle.loads(result)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [found[number] for number in range(count)]


def _one(number: int, count: int, port: int, queue: Any, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as many processes as a test wants, wherever it runs
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else the ranks meet at the address that the host's name leads to
    try:
        queue.put((number, False, pickle.dumps(function(*arguments))))  # tensors as bytes, not as shared memory
    except BaseException:
        queue.put((number, True, traceback.format_exc()))


def command_line(*words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `graft` with these words, in this very process."""
    from graftlm.cli import main

    sys.argv = ["graft", *words]
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
    return code, out.getvalue(), errors.getvalue()
