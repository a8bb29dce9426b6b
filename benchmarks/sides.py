"""What the two sides of a comparison with TRL + PEFT have in common: what they are told, the schedule, the clock."""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any


def arguments(doc: str | None, batch: str, **defaults: float) -> argparse.ArgumentParser:
    """What `rounds.compare` tells both sides; `batch` is what the key for a step's rows is called."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    for name, kind in {"base": Path, "rows": Path, "start": Path, "out": Path, "steps": int, batch: int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name, default in {"threads": 1, "seed": 0, "warmup-steps": 2, "learning-rate": 1e-4, **defaults}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser


def use_threads(count: int) -> None:
    """Before torch is imported."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def rows_of(file: Path, wanted: int) -> list[dict[str, list[int]]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:wanted]]
    assert len(rows) == wanted, f"{file} has {len(rows)} rows of {wanted}"
    return rows


def write(out: Path, result: dict[str, Any]) -> None:
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def peers_schedule(step: int, *, steps: int, warmup_steps: int) -> float:
    """transformers' cosine schedule, whose first rate is 0: losses are to be compared step by step.

    (Not quite 0 here: the loop checks that after the first step A learns, and for that B must have moved.)
    """
    if step < warmup_steps:
        return max(step, 1e-4) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


# The peer --------------------------------------------------------------------------------------------------------

LORA: dict[str, Any] = {
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none", "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}  # fmt: skip


def peers_settings(args: argparse.Namespace, *, documented: bool, dtype: str = "bfloat16") -> dict[str, Any]:
    """What both of TRL's trainers are told; unless as documented, with what makes them fastest on a CPU: eager
    attention (the flash kernel's backward is slow on rows of a hundred tokens or so), neither autocast nor
    checkpointing."""
    load, fast = {"dtype": dtype}, {}
    if not documented:
        load["attn_implementation"] = "eager"
        fast = dict.fromkeys(("bf16", "fp16", "gradient_checkpointing", "dataloader_pin_memory"), False)
    return {
        "use_cpu": True, "seed": args.seed, "model_init_kwargs": load, "max_steps": args.steps, "max_length": None,
        "train_sampling_strategy": "sequential", "optim": "adamw_torch_fused", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "learning_rate": args.learning_rate, "lr_scheduler_type": "cosine",
        "warmup_steps": args.warmup_steps, "save_strategy": "no", "report_to": "none", "logging_steps": 1,
        "logging_nan_inf_filter": False, "disable_tqdm": True, **fast,
    }  # fmt: skip


def clock(threads: int) -> tuple[Any, list[float]]:
    """A callback for a trainer, and the times of begin and end of every step, in turn; its `cpu_s` are the same in
    seconds of processor time."""
    import torch
    import transformers

    marks: list[float] = []

    class StepClock(transformers.TrainerCallback):
        cpu_s: list[float] = []

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.cpu_s.append(time.process_time())
            marks.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())
            self.cpu_s.append(time.process_time())
            assert torch.get_num_threads() == threads, torch.get_num_threads()

    return StepClock(), marks


def begin_at(trainer: Any, start: Path, dtype: str = "bfloat16") -> None:
    """Put the common adapter into a trainer's model, and hold it to the same dtypes: PEFT makes adapters fp32 over a
    bf16 base, and TRL casts them only over a quantized one. `dtype` is the base's."""
    import peft
    import safetensors.torch
    import torch

    found = peft.set_peft_model_state_dict(
        trainer.model, safetensors.torch.load_file(start / "adapter_model.safetensors")
    )
    assert not found.unexpected_keys, found.unexpected_keys
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, getattr(torch, dtype))}, dtypes


def timed(marks: list[float]) -> dict[str, Any]:
    """What the clock says of a run."""
    return {
        "steps": len(marks) // 2,
        "train_wall_s": marks[-1] - marks[0],
        "step_wall_s": [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)],
    }


def versions(*modules: Any) -> dict[str, str]:
    import platform

    return {module.__name__: module.__version__ for module in modules} | {"python": platform.python_version()}
