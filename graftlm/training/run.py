"""A run: the parts that a recipe names, joined. Logging, evaluation and saving are here, as plain statements.

recipe -> rows -> examples -> base -> delta -> steps -> held-out rows -> adapter folder
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from graftlm.config import to_yaml
from graftlm.data.check import Report, prepare, shown_rows
from graftlm.data.mixing import read_data
from graftlm.data.pack import Example, Pack, batches, fill, lay_out, saved_by_sharing
from graftlm.data.render import Renderer
from graftlm.data.source import Row
from graftlm.data.survey import survey
from graftlm.deltas import METHODS
from graftlm.errors import TrainingError
from graftlm.losses import LOSSES
from graftlm.model.attach import attach, deltas_off, hosts, needed_statistics, parameters_of, trainable
from graftlm.model.collect import collect
from graftlm.model.forward import check_compiler, check_forward, check_packing, log_probs, packed_attention
from graftlm.model.load import Loaded, cache_folder, fingerprint, load_base, load_tokenizer, return_freed_memory
from graftlm.model.store import model_card, new_folder, write_adapter, writing
from graftlm.training import display, ranks, report
from graftlm.training.held_out import HeldOut, can_be_answered, evaluate
from graftlm.training.loop import Step, TrainConfig, steps
from graftlm.training.optim import warmup_cosine
from graftlm.training.policies import make_optimiser, make_policies
from graftlm.training.policies.base import Group, Training
from graftlm.training.recipe import Recipe, read_recipe
from graftlm.training.select.choose import choose

PROBE_TOKENS = 256
"""Packing is proved on a row of this length, if there is one: long enough to matter, a second's work."""

SHARING_STEPS = 100
"""What shared beginnings save is counted over so many steps of the run."""

INTERRUPTED = 130
"""Exit code of a run that was stopped by Ctrl-C, its adapter saved."""


@dataclass(frozen=True)
class Result:
    """What a run leaves: the adapter folder, its summary.json, and the model with the delta on."""

    folder: Path
    summary: dict[str, Any]
    model: torch.nn.Module
    tokenizer: Any


@dataclass(frozen=True)
class Prepared:
    """The rows of a run, rendered: what `graft data check` reports and `train` trains on."""

    rows: list[Row]
    examples: list[Example]
    report: Report
    held_out_rows: list[Row]
    held_out: list[Example]
    first_rows: list[dict[str, Any]]
    chosen: list[str] = field(default_factory=list)
    """What each selector of the recipe did, a line each."""


def prepare_data(
    recipe: Recipe, tokenizer: Any, *, show: int = 1, look: bool = False, console: Console | None = None
) -> Prepared:
    """Read, split, choose, render and check the rows of a recipe.

    Raises DataError where none can be used, and under `strict` where one cannot.

    With `look` the rows themselves are looked at too (`report.survey`), which takes longer than rendering them.
    """
    data = recipe.data
    read = read_data(data, seed=recipe.train.seed, network=recipe.network)
    rows, aside = read.train, read.held_out
    chosen: list[str] = []
    if recipe.select:
        rows, choices = choose(recipe, rows, tokenizer, console or Console(quiet=True))
        chosen = [choice.line() for choice in choices]
    renderer = Renderer(tokenizer)
    workers, kept = recipe.train.threads, cache_folder() / "rows"
    examples, found = prepare(rows, renderer, data, format=read.format, workers=workers, cache=kept)
    rows = _usable(rows, examples, found)
    found.problems[:0], found.notes[:0] = read.problems, read.notes
    if data.pack:
        first = plan_batches(recipe.train, examples)[:SHARING_STEPS]
        steps_of_rows = [[examples[i] for i in step] for step in first]
        share, tokens = recipe.train.prefix_sharing, recipe.train.pack_tokens
        found.shared_share = saved_by_sharing(steps_of_rows, tokens) if share else None
        found.pack_fill = fill(steps_of_rows, tokens, share=share)
    held_out: list[Example] = []
    if aside:  # every held-out row counts: one that is too long is cut, not left out
        cut = replace(data, over_length="truncate")
        held_out, found_aside = prepare(aside, renderer, cut, workers=workers, cache=kept)
        aside = _usable(aside, held_out, found_aside)
        found.problems += found_aside.problems
    if look:
        found.survey = survey(rows, aside)
    return Prepared(rows, examples, found, aside, held_out, shown_rows(rows, renderer, data, show), chosen)


def _usable(rows: list[Row], examples: Sequence[Example], found: Report) -> list[Row]:
    """The rows without those that the template refused or that would have taught nothing."""
    if not found.problems:
        return rows
    known = {example.where for example in examples} | set(found.dropped_over_length)
    return [row for row in rows if row.where in known]


def train(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> Result:
    """Train the delta that `recipe` (or the YAML file there) describes, and write the adapter folder `out`.

    Raises a GraftError before anything is loaded where it can. Ctrl-C finishes the step, saves what was learnt and
    returns; a second one stops at once. `console` shows the run; by default it is silent. Under torchrun the processes
    train it together, and the first of them writes.
    """
    ranks.start()
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    console = console if console and ranks.first() else Console(quiet=True)
    out = Path(out) if out is not None else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    with new_folder(out, overwrite=overwrite) if ranks.first() else nullcontext() as folder:
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        torch.manual_seed(recipe.train.seed)
        with ranks.one_first():  # it may have to be fetched or converted
            tokenizer = load_tokenizer(recipe.base, network=recipe.network)
        waiting = nullcontext() if recipe.select else console.status("reading rows")  # selecting has bars of its own
        with waiting, ranks.one_first():  # the others find what it has rendered
            data = prepare_data(recipe, tokenizer, console=console)
        for line in data.chosen:
            console.print(line, highlight=False)
        console.print(display.preflight(data.report))
        console.print(display.tokens(data.first_rows[0]))
        with console.status("loading the base"):
            in_parts = recipe.train.shard != "none" and ranks.count() > 1  # then no single device may hold it
            model: Any = load_base(recipe.base, network=recipe.network, leave_on_cpu=in_parts).model
        if recipe.train.offload and model.device.type == "cpu":
            raise TrainingError("train.offload: the model is on a CPU, so its activations are in that memory already")
        if recipe.train.compile:
            check_compiler(model.device)
        plan = plan_batches(recipe.train, data.examples)
        log = _train(recipe, model, data, plan, folder, console)
        if folder is not None:
            for name in recipe.all_deltas():  # a single one is the folder itself, several are folders in it
                write_adapter(model, folder if recipe.delta else _inside(folder, name), name=name, tokenizer=tokenizer)
            (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    # From here on the adapter is safe in its place; what is measured is added to it.
    interrupted = len(log) < len(plan)
    if interrupted:
        console.print(f"interrupted after step {len(log)} of {len(plan)}: what was learnt by then is saved in {out}")
    before, after, samples = (
        (None, None, []) if interrupted else _measure(recipe, Loaded(model, tokenizer), data, console)
    )
    summary = _summary(recipe, model, log, before, after, interrupted)
    if ranks.first():
        with writing(out):
            _write_report(recipe, model, data, out, summary, log, samples)
    if samples:
        console.print(display.side_by_side(samples[: recipe.report.samples]))
    console.print(display.results(summary))
    console.print(f"wrote {out}: adapter, report.html, summary.json", highlight=False)
    ranks.totals(0)  # torchrun ends all ranks when one leaves early with an exit code: they leave together
    return Result(out, summary, model, tokenizer)


def _train(
    recipe: Recipe, model: Any, data: Prepared, plan: list[list[int]], folder: Path | None, console: Console
) -> list[dict[str, float]]:
    """Attach the delta and train it; what every step did goes to metrics.jsonl as it happens, and is returned."""
    probes = (min(data.examples, key=len), max(data.examples, key=len))
    short, long = (torch.from_numpy(example.ids.astype("int64")).to(model.device) for example in probes)
    check_forward(model, long[:PROBE_TOKENS])
    if recipe.data.pack:
        check_packing(model, short, long[:PROBE_TOKENS], sharing=recipe.train.prefix_sharing)
    with console.status("attaching the delta"):
        attach_deltas(recipe, model, data.examples, plan)
    ranks.check_same(trainable(model))
    if recipe.train.shard == "fsdp":
        ranks.shard(model)
    for name, config in recipe.all_deltas().items():
        count = sum(p.numel() for p in parameters_of(model, name))
        console.print(f"{config.method}: {count:,} trainable parameters, {len(plan)} steps", highlight=False)
    log: list[dict[str, float]] = []
    with (
        stop_on_signal() as stopping,
        display.progress(console) as bars,
        open(folder / "metrics.jsonl" if folder else os.devnull, "w") as metrics,
    ):
        bar = bars.add_task("training", total=len(plan), now="")
        for step in training_steps(recipe, model, data.examples, plan):
            log.append(_line(step))
            metrics.write(json.dumps(log[-1]) + "\n")
            metrics.flush()
            rate = sum(s["tokens"] for s in log) / sum(s["wall_s"] for s in log)
            bars.update(bar, advance=1, now=f"loss {step.loss:.3f}  {rate:,.0f} tokens/s")
            if ranks.totals(stopping.requested)[0]:  # on any rank
                break
    for host in hosts(model).values():
        host.deltas.eval()
    return_freed_memory()
    return log


def _inside(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


STATISTICS_PACKS = 8
"""What an init or a method wants to know of the data is gathered over this many packs of the first steps."""


def attach_deltas(recipe: Recipe, model: Any, examples: Sequence[Example], plan: list[list[int]]) -> None:
    """Put the deltas of the recipe on the model; those that start from the data see the first packs of training.

    Every rank looks at the same packs, so that all start from the same numbers.
    """
    deltas = recipe.all_deltas()
    gathered = {
        name: collect(model, config, needs, _losses(recipe, model, examples, plan))
        for name, config in deltas.items()
        if (needs := needed_statistics(config))
    }
    for name, config in deltas.items():
        attach(model, config, name=name, seed=recipe.train.seed, statistics=gathered.get(name))


def _losses(
    recipe: Recipe, model: Any, examples: Sequence[Example], plan: list[list[int]]
) -> Iterator[Callable[[], torch.Tensor]]:
    """The mean loss of each of the first packs, as functions to be called while the bare base is watched."""
    packs = (p.to(model.device) for step in plan for p in packs_of(recipe, [examples[i] for i in step], share=False))

    def loss(p: Pack) -> torch.Tensor:
        policy = log_probs(model, p)
        return LOSSES[recipe.loss](policy, None, p.weights).sum / p.weights.sum()

    with packed_attention(model) if recipe.data.pack else nullcontext():
        for each in islice(packs, STATISTICS_PACKS):
            yield partial(loss, each)


def packs_of(recipe: Recipe, rows: Sequence[Example], *, share: bool) -> list[Pack]:
    """The passes over some rows as the recipe has them, beginnings shared or not."""
    return lay_out(rows, recipe.train.pack_tokens, packed=recipe.data.pack, share=share)


def plan_batches(config: TrainConfig, examples: Sequence[Example]) -> list[list[int]]:
    """The rows of each step; the batch with the most tokens comes first, so that memory trouble shows at once."""
    total = config.steps or max(1, round((config.epochs or 1) * len(examples) / config.batch_rows))
    plan = batches(len(examples), config.batch_rows, total, config.seed)
    largest = max(range(total), key=lambda i: sum(len(examples[j]) for j in plan[i]))
    plan[0], plan[largest] = plan[largest], plan[0]
    return plan


def training_steps(recipe: Recipe, model: Any, examples: Sequence[Example], plan: list[list[int]]) -> Iterator[Step]:
    """Every step of the run: with all deltas learning, or with each in its turn and the others as they are."""
    for host in hosts(model).values():
        host.deltas.train()  # the base stays in evaluation mode: its own dropout would only add noise
    names = list(recipe.all_deltas())
    by_tensor = {id(p): name for name, p in trainable(model).items()}
    learning = {name: {by_tensor[id(p)]: p for p in parameters_of(model, name)} for name in names}
    turns = [[name] for name in names] if recipe.train.in_turn else [names]
    first = 0
    for number, turn in enumerate(turns):
        share = plan[first : round(len(plan) * (number + 1) / len(turns))]
        for name, parameters in learning.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name in turn)
        for step in _turn(recipe, model, examples, share, {name: learning[name] for name in turn}):
            yield replace(step, number=first + step.number)
        first += len(share)
    for parameters in learning.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def _turn(
    recipe: Recipe,
    model: Any,
    examples: Sequence[Example],
    plan: list[list[int]],
    learning: Mapping[str, Mapping[str, torch.nn.Parameter]],
) -> Iterator[Step]:
    config = recipe.train
    deltas = {name: recipe.all_deltas()[name] for name in learning}
    make = partial(packs_of, recipe, share=config.prefix_sharing)
    packs = partial(ranks.packs_of, make=make, sharded=ranks.is_sharded(model))
    groups = [
        Group(parameters, config.learning_rate or METHODS[deltas[name].method].delta.learning_rate)
        for name, parameters in learning.items()
    ]
    policies = make_policies(recipe.policies)
    optimiser = make_optimiser(policies, groups, weight_decay=config.weight_decay)
    schedule = warmup_cosine(steps=len(plan), warmup_steps=round(config.warmup * len(plan)))
    for policy in policies:
        schedule = policy.schedule(schedule)
    training = Training(model, deltas, optimiser, total=len(plan), seed=config.seed)
    yield from steps(
        model,
        ([p.to(model.device) for p in packs([examples[i] for i in rows])] for rows in plan),
        loss=recipe.loss,
        optimiser=optimiser,
        schedule=schedule,
        clip=config.clip,
        policies=policies,
        training=training,
        on_nonfinite=config.on_nonfinite,
        packed=recipe.data.pack,
        checkpointing=config.checkpointing,
        offload=config.offload,
        compiled=config.compile,
    )
    for policy in policies:
        policy.on_end(training)


def _line(step: Step) -> dict[str, float]:
    return {
        "step": step.number,
        "loss": step.loss,
        "tokens": step.tokens,
        "computed_tokens": step.computed_tokens,
        "supervised_tokens": step.supervised_tokens,
        "grad_norm": step.grad_norm,
        "learning_rate": step.learning_rate,
        "wall_s": round(step.wall_s, 4),
    }


def _measure(
    recipe: Recipe, base: Loaded, data: Prepared, console: Console
) -> tuple[HeldOut | None, HeldOut | None, list[dict[str, str]]]:
    """Held-out rows with the delta off and on, and the answers side by side."""
    asked = [row for row in data.held_out_rows if can_be_answered(row)][: recipe.report.answers]
    if not data.held_out:
        return None, None, []
    model, tokenizer = base
    renderer = Renderer(tokenizer)

    def measured(name: str, bars: Any) -> HeldOut:
        bar = bars.add_task(f"{name} answers", total=len(asked), now="")
        return evaluate(
            model,
            renderer,
            data.held_out,
            asked,
            max_new_tokens=recipe.report.max_new_tokens,
            pack_tokens=recipe.train.pack_tokens,
            packed=recipe.data.pack,
            progress=lambda done: bars.update(bar, completed=done),
        )

    with display.progress(console) as bars:
        with deltas_off(model):
            before = measured("base", bars)
        after = measured("tuned", bars)
    samples = [
        {
            "asked": row.messages[-2].content,
            "wanted": row.messages[-1].content,
            "base": b,
            "tuned": t,
            "where": row.where,
        }
        for row, b, t in zip(asked, before.answers, after.answers, strict=True)
    ]
    return before, after, samples


def peak_rss_gib() -> float:
    """The most memory that this process had resident at any time."""
    with suppress(OSError), open("/proc/self/status") as lines:  # the other figure begins at that of who started us
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _summary(
    recipe: Recipe,
    model: Any,
    log: list[dict[str, float]],
    before: HeldOut | None,
    after: HeldOut | None,
    interrupted: bool,
) -> dict[str, Any]:
    wall_s = sum(s["wall_s"] for s in log)
    summary = {
        "held_out": {
            "rouge_l": {"base": before and before.rouge_l, "tuned": after and after.rouge_l},
            "loss_nats": {"base": before and before.loss_nats, "tuned": after and after.loss_nats},
        },
        "train": {
            "tokens_per_s": sum(s["tokens"] for s in log) / wall_s,
            "supervised_tokens": int(sum(s["supervised_tokens"] for s in log)),
            "steps": len(log),
            "wall_s": wall_s,
            "peak_rss_gib": max(ranks.gathered([peak_rss_gib()])),
            "ranks": ranks.count(),
        },
        "base_fingerprint": fingerprint(model).digest,
        "seed": recipe.train.seed,
    }
    return summary | ({"interrupted": True} if interrupted else {})


def _write_report(
    recipe: Recipe,
    model: Any,
    data: Prepared,
    folder: Path,
    summary: dict[str, Any],
    log: list[dict[str, float]],
    samples: list[dict[str, str]],
) -> None:
    done = summary["train"]
    processes = f"{done['ranks']} processes, each of " if done["ranks"] > 1 else ""
    source = ", ".join(source.path for source in recipe.data.sources())
    facts = {
        "training data": f"{source}: {data.report.rows:,} rows, {len(data.held_out_rows)} held out",
        "steps": f"{done['steps']} of {recipe.train.batch_rows} rows, seed {recipe.train.seed}",
        "supervised tokens": f"{done['supervised_tokens']:,}",
        "speed": f"{done['tokens_per_s']:,.0f} tokens/s",
        "machine": f"{processes}{torch.get_num_threads()} threads, {model.device}, {model.dtype}",
        "training time": f"{done['wall_s']:.0f} s",
        "peak memory": f"{done['peak_rss_gib']:.2f} GiB",
    }
    for name, label in (("loss_nats", "held-out loss, nats per supervised token"), ("rouge_l", "held-out ROUGE-L F1")):
        figures = summary["held_out"][name]
        if figures["tuned"] is not None:
            facts[label] = f"{figures['base']:.3f} base, {figures['tuned']:.3f} tuned"
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "held_out.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    for name in recipe.all_deltas():
        card = model_card(model, name, facts=facts)
        ((folder if recipe.delta else folder / name) / "README.md").write_text(card, encoding="utf-8")
    methods = " + ".join(config.method for config in recipe.all_deltas().values())
    page = report.html(
        title=f"{methods} on {recipe.base if isinstance(recipe.base, str) else recipe.base.name}: {source}",
        summary=summary,
        facts=facts,
        steps=log,
        lengths=[len(e) for e in data.examples],
        preflight=data.report.lines(),
        rows=data.first_rows,
        samples=samples[: recipe.report.samples],
        recipe=to_yaml(recipe),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


class _Stopping:
    requested = False


@contextmanager
def stop_on_signal() -> Iterator[_Stopping]:
    """The first Ctrl-C (or SIGTERM) asks for a stop after the step; a second one stops at once."""
    state = _Stopping()

    def ask(number: int, frame: object) -> None:
        if state.requested:
            raise KeyboardInterrupt
        state.requested = True

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread: its owner decides about signals
        pass
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
