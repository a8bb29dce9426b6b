"""Peer side of the CPU LoRA training-speed benchmark: TRL's SFTTrainer with a PEFT adapter.

Trains on tokenised rows in file order (step k takes rows [k * batch_rows, (k + 1) * batch_rows)) and writes
speed, every step's loss and peak memory as JSON. One run is one shape, in a process of its own:

* documented: as TRL's documentation shows it. One padded batch a step and SFTConfig's defaults, so bf16
  autocast and gradient checkpointing are on.
* best: its fastest configuration on a CPU. One row at a time, accumulated (`--micro-rows` pads more together); no
  autocast, no checkpointing, eager attention.
* tuned: beyond configuration. A private function of TRL is replaced, so that its loss skips unsupervised positions
  as it does on a GPU, and the process's allocator is tuned. Nobody runs it so; it shows how far it could go.

Both hold the base in bf16 and the adapter in fp32, and share the adapter's start, rows, order, schedule, optimiser
and clipping.
The clock runs from the start of the first step to the end of the last: loading and label building are out.
"""

import argparse
import ctypes
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import peak_rss_gib


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, kind in {"--base": Path, "--rows": Path, "--start": Path, "--out": Path, "--steps": int}.items():
        parser.add_argument(name, type=kind, required=True)
    numbers = {"--batch-rows": 8, "--threads": 1, "--seed": 0, "--warmup-steps": 3, "--r": 16, "--alpha": 32}
    for name, default in (numbers | {"--learning-rate": 5e-4}).items():
        parser.add_argument(name, type=type(default), default=default)
    parser.add_argument("--shape", choices=("best", "tuned", "documented"), default="best")
    parser.add_argument("--micro-rows", type=int, help="default: the whole batch as documented, else 1")
    args = parser.parse_args()
    args.micro_rows = args.micro_rows or (args.batch_rows if args.shape == "documented" else 1)
    assert args.batch_rows % args.micro_rows == 0, "--micro-rows must divide --batch-rows"
    return args


def prepare_process(args: argparse.Namespace) -> None:
    """Set what must be in place before torch is imported."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    if args.shape == "tuned":
        # Every large tensor is a fresh mapping by default, and its page faults cost a tenth of a step. Let
        # torch ask for large pages and glibc keep freed blocks (M_TRIM_THRESHOLD, then M_MMAP_THRESHOLD).
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
        ctypes.CDLL(None).mallopt(-3, 2**30)


def train(args: argparse.Namespace, rows: list[dict[str, list[int]]], output_dir: str) -> dict[str, Any]:
    import peft
    import safetensors.torch
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

    marks: list[float] = []  # begin and end of every step, in turn

    class StepClock(transformers.TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())
            assert torch.get_num_threads() == args.threads, torch.get_num_threads()

    load, fast = {"dtype": "bfloat16"}, {}
    if args.shape != "documented":
        # Faster than sdpa: the CPU flash kernel's backward is slow on rows of a hundred tokens or so.
        load["attn_implementation"] = "eager"
        fast = dict.fromkeys(("bf16", "fp16", "gradient_checkpointing", "dataloader_pin_memory"), False)
    config = trl.SFTConfig(
        output_dir=output_dir, use_cpu=True, seed=args.seed, model_init_kwargs=load, max_steps=args.steps,
        per_device_train_batch_size=args.micro_rows, max_length=None, completion_only_loss=True,
        gradient_accumulation_steps=args.batch_rows // args.micro_rows, train_sampling_strategy="sequential",
        optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0, learning_rate=args.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=args.warmup_steps, save_strategy="no", report_to="none",
        logging_steps=1, logging_nan_inf_filter=False, disable_tqdm=True, **fast,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=args.r, lora_alpha=args.alpha, lora_dropout=0.0, bias="none",
        target_modules="all-linear", task_type="CAUSAL_LM")  # fmt: skip
    data, base = Dataset.from_list(rows), str(args.base)
    trainer = trl.SFTTrainer(base, config, train_dataset=data, peft_config=lora, callbacks=[StepClock()])
    start = safetensors.torch.load_file(args.start / "adapter_model.safetensors")
    found = peft.set_peft_model_state_dict(trainer.model, start)
    assert not found.unexpected_keys, found.unexpected_keys
    # PEFT makes adapters fp32 over a bf16 base; TRL casts them only over a quantised one. Hold them to it.
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}, dtypes
    trainer.train()

    wall, tokens = marks[-1] - marks[0], sum(len(row["input_ids"]) for row in rows)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, peft)}
    versions["python"] = platform.python_version()
    return {
        "shape": args.shape, "threads": args.threads, "micro_rows": args.micro_rows,
        "tokens": tokens,  # below, nothing predicts a row's first token, so it is never a trained one
        "supervised_tokens": sum(sum(row["completion_mask"][1:]) for row in rows),
        "steps": len(marks) // 2, "train_wall_s": wall, "tokens_per_s": tokens / wall,
        "step_wall_s": [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_rss_gib": peak_rss_gib(), "versions": versions,
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    wanted = args.steps * args.batch_rows
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()[:wanted]]
    assert len(rows) == wanted, f"{args.rows} has {len(rows)} rows; {args.steps} steps need {wanted}"
    prepare_process(args)
    with tempfile.TemporaryDirectory() as output_dir:
        args.out.write_text(json.dumps(train(args, rows, output_dir), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
