"""Peer side of the CPU LoRA training-speed benchmark: TRL's SFTTrainer with a PEFT adapter.

Trains on tokenised rows in file order (step k takes rows [k * batch_rows, (k + 1) * batch_rows)) and writes
speed, every step's loss and peak memory as JSON. One run is one shape, in a process of its own:

* documented: as TRL's documentation shows it. One padded batch a step and SFTConfig's defaults, so bf16
  autocast and gradient checkpointing are on.
* best: its fastest configuration on a CPU. One row at a time, accumulated (`--micro-rows` pads more together); no
  autocast, no checkpointing, eager attention.
* float32: as best, with the base in float32: what the losses of the steps are where nothing is rounded to bf16.
* grid: one point of grid.py: `--attention`, `--micro-rows`, `--pack`, `--compile` and `--autocast` say which.
* tuned: beyond configuration. A private function of TRL is replaced, so that its loss skips unsupervised positions
  as it does on a GPU, and the process's allocator is tuned. Nobody runs it so; it shows how far it could go.

Both sides hold the base in bf16 (but for float32) and the adapter in fp32, and share the adapter's start, rows, order,
schedule, optimizer and clipping.
The clock runs from the start of the first step to the end of the last: loading and label building are out.
"""

import argparse
import ctypes
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import peak_rss_gib
from sides import LORA, arguments, begin_at, clock, peers_settings, rows_of, timed, use_threads, versions, write


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__, "batch-rows")
    parser.add_argument("--shape", choices=("best", "float32", "tuned", "documented", "grid"), default="best")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--pack", type=int, help="tokens of a pack, in place of padded rows; rows see each other there")
    parser.add_argument("--compile", action="store_true", help="torch_compile of transformers' Trainer")
    parser.add_argument("--autocast", action="store_true", help="bf16 of transformers' Trainer")
    parser.add_argument("--micro-rows", type=int, help="default: the whole batch as documented, else 1")
    args = parser.parse_args()
    args.micro_rows = args.micro_rows or (args.batch_rows if args.shape == "documented" else 1)
    assert args.batch_rows % args.micro_rows == 0, "--micro-rows must divide --batch-rows"
    return args


def prepare_process(args: argparse.Namespace) -> None:
    """Set what must be in place before torch is imported."""
    use_threads(args.threads)
    if args.shape == "tuned":
        # Every large tensor is a fresh mapping by default, and its page faults cost a tenth of a step. Let
        # torch ask for large pages and glibc keep freed blocks (M_TRIM_THRESHOLD, then M_MMAP_THRESHOLD).
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
        ctypes.CDLL(None).mallopt(-3, 2**30)


def train(args: argparse.Namespace, rows: list[dict[str, list[int]]], output_dir: str) -> dict[str, Any]:
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(args.threads)
    if args.shape == "tuned":
        # TRL's LM head drops unsupervised positions before the vocabulary product only where this says yes.
        # The kernels look up a copy of their own, so nothing else changes: same loss, far less work.
        assert hasattr(trl.trainer.utils, "_use_triton"), "this TRL cannot be patched so"
        trl.trainer.utils._use_triton = lambda device: True

    dtype = "float32" if args.shape == "float32" else "bfloat16"
    step_clock, marks = clock(args.threads)
    settings = peers_settings(args, documented=args.shape == "documented", dtype=dtype)
    settings["gradient_accumulation_steps"] = args.batch_rows // args.micro_rows
    settings |= {"torch_compile": args.compile}
    if args.shape == "grid":
        settings["model_init_kwargs"]["attn_implementation"] = args.attention
        settings |= {"bf16": args.autocast}
        if args.pack:  # one pass over the rows
            settings |= {"packing": True, "max_length": args.pack, "gradient_accumulation_steps": 1, "max_steps": -1}
            settings["num_train_epochs"] = 1
    config = trl.SFTConfig(
        output_dir=output_dir, per_device_train_batch_size=args.micro_rows, completion_only_loss=True, **settings
    )  # fmt: skip
    lora = peft.LoraConfig(**LORA)
    data, base = Dataset.from_list(rows), str(args.base)
    trainer = trl.SFTTrainer(base, config, train_dataset=data, peft_config=lora, callbacks=[step_clock])
    begin_at(trainer, args.start, dtype)
    trainer.train()
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {
        "shape": args.shape, "threads": args.threads, "micro_rows": args.micro_rows,
        "tokens": tokens,  # below, nothing predicts a row's first token, so it is never a trained one
        "supervised_tokens": sum(sum(row["completion_mask"][1:]) for row in rows),
        **timed(marks), "tokens_per_s": tokens / (marks[-1] - marks[0]),
        "step_cpu_s": [end - begin for begin, end in zip(step_clock.cpu_s[::2], step_clock.cpu_s[1::2], strict=True)],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_rss_gib": peak_rss_gib(), "versions": versions(torch, transformers, trl, peft),
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    rows = rows_of(args.rows, args.steps * args.batch_rows)
    prepare_process(args)
    with tempfile.TemporaryDirectory() as output_dir:
        write(args.out, train(args, rows, output_dir))


if __name__ == "__main__":
    main()
