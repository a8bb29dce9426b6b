"""What a quantized frozen base costs and what it loses: bits, errors, perplexity, ways to expand codes, step time.

Times are process CPU time; the steps of each kind of base run in a process of their own, in turn, `rounds` times.

    python benchmarks/nf4/run.py                       everything, writes result.json
    python benchmarks/nf4/run.py --steps nf4           one process of the step section, prints JSON
"""

import importlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm.hub.load import load_base  # noqa: E402
from graftlm.hub.tokenizer import load_tokenizer  # noqa: E402
from graftlm.model.quantize import CODECS, QuantizedLinear, normal_levels  # noqa: E402
from graftlm.prepare import prepare_data  # noqa: E402
from graftlm.recipe import Recipe, read_recipe  # noqa: E402
from graftlm.system import peak_rss_gib, tune_process  # noqa: E402
from graftlm.training.phases import attach_deltas, make_batches  # noqa: E402
from graftlm.training.trainer import Trainer  # noqa: E402

CONFIG = yaml.safe_load((HERE / "config.yaml").read_text())


def recipe(kind: str, *overrides: str) -> Recipe:
    """The demo job on a base of this dtype (bf16, fp32) or quantization."""
    key = "quantization" if kind in CODECS else "dtype"
    base = f"base={{name: {CONFIG['base']}, {key}: {kind}}}"
    return read_recipe(HERE / CONFIG["recipe"], [f"train.steps={CONFIG['steps']['count']}", base, *overrides])


def base_of(kind: str) -> Any:
    return load_base(recipe(kind).base).model


def quantized_layers(model: Any) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


# Bits and errors -------------------------------------------------------------------------------------------------


def codecs() -> dict[str, Any]:
    """Over all linear layers of the base; and, since a base from a GGUF file is 4-bit already, over normal weights."""
    normal = torch.randn(1536, 576, generator=torch.Generator().manual_seed(0))
    found = {}
    for kind, codec in CODECS.items():
        layers = quantized_layers(base_of(kind)).values()
        size = sum(t.numel() * t.element_size() for layer in layers for t in layer.tensors().values())
        weights = sum(math.prod(layer.shape) for layer in layers)
        errors = [relative(layer.dequantized(), layer.original().float()) for layer in layers]  # type: ignore[misc]
        again = codec.dequantize(codec.quantize(normal), (1536, 576), torch.float32)
        found[kind] = {
            "bits_a_weight": round(8 * size / weights, 4),
            "mib": round(size / 2**20, 1),
            "relative_error": {"mean": round(statistics.mean(errors), 5), "max": round(max(errors), 5)},
            "relative_error_of_normal_weights": round(relative(again, normal), 5),
        }
    return found


def relative(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


# Perplexity ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nats(model: Any) -> float:
    """Mean -log p of a text's tokens, in windows of so many tokens without overlap."""
    about = CONFIG["text"]
    topics = importlib.import_module(about["module"]).topics
    text = "\n".join(topics[key] for key in sorted(topics))[: about["characters"]]
    ids = torch.tensor(load_tokenizer(recipe("bf16").base)(text).input_ids)
    total, count = 0.0, 0
    for window in ids.split(about["window"]):
        log_probs = model(window[None]).logits[0, :-1].float().log_softmax(-1)
        total -= float(log_probs.gather(1, window[1:, None]).sum())
        count += len(window) - 1
    return total / max(count, 1)


def perplexities() -> dict[str, float]:
    found = {kind: nats(base_of(kind)) for kind in CONFIG["bases"]}
    for name, weight in (("nf4, fp32 products", _ours), ("nf4 of bitsandbytes, fp32 products", _theirs)):
        plain, quantized = base_of("fp32"), quantized_layers(base_of("nf4"))
        try:
            for key, layer in quantized.items():
                plain.get_submodule(key).weight.data = weight(layer)
        except ImportError:
            continue
        found[name] = nats(plain)
    return {name: round(value, 5) for name, value in found.items()}


def _ours(layer: QuantizedLinear) -> torch.Tensor:
    return layer.dequantized()


def _theirs(layer: QuantizedLinear) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    W = layer.original().bfloat16()  # type: ignore[misc]
    codes, state = quantize_4bit(W.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = torch.float32
    return dequantize_4bit(codes, state).float()


# What LoftQ's alternation would gain -----------------------------------------------------------------------------


def loftq() -> dict[str, Any]:
    """||W - Q - B A|| / ||W||, the mean over layers: as quantized, after one SVD, after so many rounds of both."""
    about = CONFIG["loftq"]
    codec, r = CODECS[about["quantization"]], about["r"]
    rows = []
    for layer in list(quantized_layers(base_of(about["quantization"])).values())[:: about["every"]]:
        W = layer.original().float()  # type: ignore[misc]
        product, errors = torch.zeros_like(W), []
        for _ in range(about["rounds"]):
            Q = codec.dequantize(codec.quantize(W - product), layer.shape, torch.float32)
            errors.append(relative(Q + product, W) if not errors else None)
            U, S, V = torch.svd_lowrank(W - Q, r + 16, niter=4)
            product = (U[:, :r] * S[:r]) @ V[:, :r].T
            errors.append(relative(Q + product, W))
        rows.append((errors[0], errors[1], errors[-1]))
    quantized, once, often = (statistics.mean(column) for column in zip(*rows, strict=True))
    return {
        "layers": len(rows),
        "quantized": round(quantized, 5),
        "one_svd": round(once, 5),
        f"{about['rounds']}_rounds": round(often, 5),
        "one_svd_takes_away": round(1 - once / quantized, 4),
        "more_rounds_take_away_of_the_rest": round(1 - often / once, 4),
    }


# What the inits make of it ---------------------------------------------------------------------------------------


def inits() -> dict[str, Any]:
    """Mean nats of the text with a fresh delta on the base in NF4, and the process seconds that its start took."""
    found = {}
    tokenizer = load_tokenizer(recipe("nf4").base)
    for init in CONFIG["inits"]:
        job = recipe("nf4", f"delta.init={init}")
        data = prepare_data(job, tokenizer)
        model = load_base(job.base).model
        started = time.process_time()
        attach_deltas(job.setup(), model, data.examples, make_batches(job.train, data.examples))
        found[init] = {"start_s": round(time.process_time() - started, 1), "nats": round(nats(model), 5)}
    return found


# Ways to expand codes --------------------------------------------------------------------------------------------


def cpu_ms(run: Callable[[], Any]) -> float:
    """The least process time of a call, in milliseconds, over three series."""
    repeats, times = CONFIG["expand"]["repeats"], []
    run()
    for _ in range(3):
        started = time.process_time()
        for _ in range(repeats):
            run()
        times.append((time.process_time() - started) / repeats)
    return 1e3 * min(times)


def expansions(shape: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """NF4 codes of W -> W in bf16, four ways."""
    codec, levels = CODECS["nf4"], normal_levels()
    tensors = codec.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    bytes_, n = tensors["codes"], math.prod(shape)
    constants = torch.rand(n // 64, 1)
    byte = torch.arange(256)
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
    half = pairs.bfloat16().view(torch.int32).view(-1)
    word = torch.arange(65536)
    fours = torch.cat([pairs[word & 255], pairs[word >> 8]], dim=1).bfloat16().view(torch.int64).view(-1)
    fours = fours.roll(32768)  # words are signed

    def by_nibble() -> torch.Tensor:
        codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).view(-1)
        return (levels[codes.int()].view(-1, 64) * constants).bfloat16()

    def bf16_pairs() -> torch.Tensor:
        return half.index_select(0, bytes_.int()).view(torch.bfloat16).view(-1, 64).mul_(constants.bfloat16())

    def bf16_fours() -> torch.Tensor:
        words = bytes_.view(torch.int16).int().add_(32768)
        return fours.index_select(0, words).view(torch.bfloat16).view(-1, 64).mul_(constants.bfloat16())

    return {
        "pairs in float32, rounded once (kept)": lambda: codec.dequantize(tensors, shape, torch.bfloat16),
        "pairs in bf16": bf16_pairs,
        "fours in bf16": bf16_fours,
        "nibble by nibble": by_nibble,
    }


def expand() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for d_out, d_in in CONFIG["expand"]["shapes"]:
        row = {name: round(cpu_ms(run), 3) for name, run in expansions((d_out, d_in)).items()}
        W = torch.randn(d_out, d_in).bfloat16()
        for tokens in CONFIG["expand"]["tokens"]:
            x = torch.randn(tokens, d_in).bfloat16()
            row[f"bf16 product with {tokens} tokens"] = round(cpu_ms(lambda x=x, W=W: x @ W.T), 3)
        found[f"{d_out}x{d_in}"] = row
    return found


# Steps of the demo job -------------------------------------------------------------------------------------------


def steps(kind: str) -> dict[str, Any]:
    """Process and wall seconds of each step after the first few, tokens, losses and peak memory; in this process."""
    job = recipe(kind)
    torch.manual_seed(job.train.seed)
    base = load_base(job.base)
    data = prepare_data(job, base.tokenizer)
    plan, setup = make_batches(job.train, data.examples), job.setup()
    attach_deltas(setup, base.model, data.examples, plan)
    cpu, done = [time.process_time()], []
    for step in Trainer(setup, base.model, data.examples, plan).steps():
        cpu.append(time.process_time())
        done.append(step)
    used = [after - before for before, after in itertools.pairwise(cpu)]
    skip = CONFIG["steps"]["warmup"]
    return {
        "cpu_s": sum(used[skip:]),
        "wall_s": sum(step.wall_s for step in done[skip:]),
        "tokens": sum(step.tokens for step in done[skip:]),
        "last_loss": done[-1].loss,
        "peak_rss_gib": peak_rss_gib(),
    }


def all_steps() -> dict[str, Any]:
    about = CONFIG["steps"]
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in about["bases"]}
    for _ in range(about["rounds"]):
        for kind in about["bases"]:
            command = [sys.executable, __file__, "--steps", kind]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[kind].append(json.loads(out.splitlines()[-1]))
    table = {
        kind: {key: round(statistics.median(run[key] for run in made), 4) for key in made[0]}
        for kind, made in runs.items()
    }
    ratios = {kind: round(row["cpu_s"] / table["bf16"]["cpu_s"], 3) for kind, row in table.items()}
    return {"table": table, "cpu_ratio_to_bf16": ratios}


def main() -> None:
    tune_process()
    torch.set_num_threads(CONFIG["steps"]["threads"])
    if sys.argv[1:2] == ["--steps"]:
        print(json.dumps(steps(sys.argv[2])))
        return
    # Steps first: a process inherits the peak memory of the one that starts it, and this one is small yet.
    sections = {"steps": all_steps, "expand_ms": expand, "codecs": codecs, "nats": perplexities, "loftq": loftq}
    sections["inits"] = inits
    found: dict[str, Any] = {}
    for name, section in sections.items():
        print(f"{name} ...", flush=True)
        found[name] = section()
        print(json.dumps(found[name], indent=1), flush=True)
    write_result(__file__, {"config": CONFIG, **found})


if __name__ == "__main__":
    main()
