"""Peer side of the preference benchmark: TRL's DPOTrainer with a PEFT adapter, whose reference is the adapter off.

Trains on tokenised pairs in file order and writes the time, loss and margin of every step as JSON. Its fastest
configuration on a CPU is one pair at a time, accumulated, with eager attention and neither autocast nor
checkpointing; `--documented` leaves all that at its defaults. With `--precompute` the reference's log-probabilities
are computed before the first step, and their time is told apart.
"""

import argparse
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
    numbers = {"--batch-pairs": 8, "--threads": 1, "--seed": 0, "--warmup-steps": 2, "--r": 16, "--alpha": 32}
    for name, default in (numbers | {"--learning-rate": 1e-4, "--beta": 0.1}).items():
        parser.add_argument(name, type=type(default), default=default)
    parser.add_argument("--precompute", action="store_true")
    parser.add_argument("--documented", action="store_true")
    parser.add_argument("--micro-pairs", type=int, help="default: the whole batch as documented, else 1")
    args = parser.parse_args()
    args.micro_pairs = args.micro_pairs or (args.batch_pairs if args.documented else 1)
    assert args.batch_pairs % args.micro_pairs == 0, "--micro-pairs must divide --batch-pairs"
    return args


def train(args: argparse.Namespace, rows: list[dict[str, list[int]]], output_dir: str) -> dict[str, Any]:
    import peft
    import safetensors.torch
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(args.threads)
    marks: list[float] = []  # begin and end of every step, in turn

    class StepClock(transformers.TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())
            assert torch.get_num_threads() == args.threads, torch.get_num_threads()

    load, fast = {"dtype": "bfloat16"}, {}
    if not args.documented:
        load["attn_implementation"] = "eager"
        fast = dict.fromkeys(("bf16", "fp16", "gradient_checkpointing", "dataloader_pin_memory"), False)
    config = trl.DPOConfig(
        output_dir=output_dir, use_cpu=True, seed=args.seed, model_init_kwargs=load, max_steps=args.steps,
        per_device_train_batch_size=args.micro_pairs, max_length=None, beta=args.beta, loss_type=["sigmoid"],
        gradient_accumulation_steps=args.batch_pairs // args.micro_pairs, train_sampling_strategy="sequential",
        precompute_ref_log_probs=args.precompute, optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0,
        learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=args.warmup_steps,
        save_strategy="no", report_to="none", logging_steps=1, logging_nan_inf_filter=False, disable_tqdm=True, **fast,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=args.r, lora_alpha=args.alpha, lora_dropout=0.0, bias="none",
        target_modules="all-linear", task_type="CAUSAL_LM")  # fmt: skip
    beforehand = 0.0
    original = trl.DPOTrainer._precompute_ref_logps

    def timed(*given: Any, **named: Any) -> Any:
        nonlocal beforehand
        started = time.perf_counter()
        found = original(*given, **named)
        beforehand += time.perf_counter() - started
        return found

    trl.DPOTrainer._precompute_ref_logps = timed
    trl.DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # the rows are tokens already
    data, base = Dataset.from_list(rows), str(args.base)
    trainer = trl.DPOTrainer(base, args=config, train_dataset=data, peft_config=lora, callbacks=[StepClock()])
    start = safetensors.torch.load_file(args.start / "adapter_model.safetensors")
    found = peft.set_peft_model_state_dict(trainer.model, start)
    assert not found.unexpected_keys, found.unexpected_keys
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}, dtypes
    trainer.train()

    wall = marks[-1] - marks[0]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, peft)}
    versions["python"] = platform.python_version()
    prompts, answers = (sum(len(row[key]) for row in rows for key in keys) for keys in (("prompt_ids",), KINDS))
    return {
        "threads": args.threads, "micro_pairs": args.micro_pairs, "pairs": len(rows),
        "tokens": 2 * prompts + answers, "computed_tokens": 2 * prompts + answers,
        "steps": len(marks) // 2, "train_wall_s": wall, "pairs_per_s": len(rows) / wall,
        "step_wall_s": [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)],
        "losses": [entry["loss"] for entry in log], "margins": [entry["rewards/margins"] for entry in log],
        "beforehand_s": beforehand, "peak_rss_gib": peak_rss_gib(), "versions": versions,
    }  # fmt: skip


KINDS = ("chosen_ids", "rejected_ids")


def main() -> None:
    args = parse_args()
    wanted = args.steps * args.batch_pairs
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()[:wanted]]
    assert len(rows) == wanted, f"{args.rows} has {len(rows)} rows; {args.steps} steps need {wanted}"
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as output_dir:
        args.out.write_text(json.dumps(train(args, rows, output_dir), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
