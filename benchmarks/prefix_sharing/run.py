"""Training steps on rows that begin alike, their beginnings shared and not, in turn, in one process.

Texts are the standard library's own; for time only lengths and what is alike matter, so rows are cut to measure.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm.data.batches.pack import Example, pack  # noqa: E402
from graftlm.data.sources.load import load_rows  # noqa: E402
from graftlm.deltas.lora import LoraConfig  # noqa: E402
from graftlm.hub.load import load_base  # noqa: E402
from graftlm.model.attach import attach  # noqa: E402
from graftlm.model.registry import trainable  # noqa: E402
from graftlm.optim.adamw import adamw  # noqa: E402
from graftlm.passes.autotune import fastest_backend  # noqa: E402
from graftlm.system import tune_process  # noqa: E402
from graftlm.training.loop import Step, TrainStep  # noqa: E402
from graftlm.training.passes import Passes  # noqa: E402
from graftlm.training.state import TrainingState  # noqa: E402


def cut_rows(text: np.ndarray, *, rows: int, alike: int, shared: int, own: int) -> list[Example]:
    """Rows of `shared` + `own` tokens, each `alike` of them with the same first `shared`; their own part is trained."""
    made, at = [], 0
    for group in range(rows // alike):
        beginning, at = text[at : at + shared], at + shared
        for number in range(alike):
            ids, at = np.concatenate([beginning, text[at : at + own]]), at + own
            weights = np.concatenate([np.zeros(shared, np.float32), np.ones(own, np.float32)])
            made.append(Example(ids, weights, f"{group}:{number}"))
    return made


def one_step(model: Any, rows: list[Example], tokens: int, share: bool) -> Step:
    optimizer = adamw([(trainable(model).values(), 0.0)], weight_decay=0.0)  # a rate of 0: every round is the same
    packs = pack(rows, tokens, share=share)
    training, passes = TrainingState(model, {}, optimizer), Passes(backend=fastest_backend(model, packs))
    return TrainStep(training, "supervised", lambda step: 1.0, clip=1.0, passes=passes).step(packs)


def main() -> None:
    tune_process()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    torch.set_num_threads(config["threads"])
    model, tokenizer = load_base(config["base"], dtype="bfloat16")
    attach(model, LoraConfig(r=16, alpha=32), seed=0)
    rows, _ = load_rows("builtin:docstrings")
    text = np.array(tokenizer("\n".join(row.messages[0].content for row in rows[:600])).input_ids, np.int32)
    found: dict[str, Any] = {}
    for name, job in config["jobs"].items():
        examples = cut_rows(text, **job)
        done: dict[bool, list[Step]] = {False: [], True: []}
        for round_ in range(config["rounds"]):
            for share in (False, True):
                if share or round_ < config["unshared_rounds"].get(name, config["rounds"]):
                    started = time.perf_counter()
                    done[share].append(one_step(model, examples, config["pack_tokens"], share))
                    print(f"{name} {'shared' if share else 'apart'}: {time.perf_counter() - started:.1f} s", flush=True)
        apart, shared = (statistics.median([s.wall_s for s in done[k][1:] or done[k]] or [0]) for k in (False, True))
        tokens = {k: sum(p.ids.numel() for p in pack(examples, config["pack_tokens"], share=k)) for k in (False, True)}
        found[name] = {
            "rows": len(examples),
            "row_tokens": done[True][0].tokens,
            "computed_tokens": {"apart": tokens[False], "shared": tokens[True]},
            "fewer_tokens": round(tokens[False] / tokens[True], 2),
            "step_s": {"apart": round(apart, 2) or None, "shared": round(shared, 2)},
            "times_as_fast": round(apart / shared, 2) or None,
            "loss": {name: round(done[k][0].loss, 5) for name, k in (("apart", False), ("shared", True)) if done[k]},
        }
    write_result(__file__, {"config": config, "jobs": found})


if __name__ == "__main__":
    main()
