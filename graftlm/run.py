"""A run: the parts that a recipe names, joined. Logging, evaluation and saving are here, as plain statements.

recipe -> rows -> examples -> base -> delta -> steps -> held-out rows -> adapter folder
"""

import datetime
import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from graftlm import distributed
from graftlm.adapters.folder import RECIPE, SUMMARY, new_folder
from graftlm.adapters.save import adapter_of
from graftlm.config.schema import to_tree, to_yaml
from graftlm.data.chat.render import Renderer
from graftlm.display import terminal
from graftlm.errors import TrainingError
from graftlm.evaluation.held_out import held_out_metrics
from graftlm.files import writing
from graftlm.hub.load import Loaded, load_base
from graftlm.kernels.backend import pinned
from graftlm.model.coverage import coverage
from graftlm.model.registry import Chat, attachment, hosts, parameters_of, trainable
from graftlm.passes.autotune import KernelChoice
from graftlm.passes.packing_check import check_packing
from graftlm.prepare import Prepared, prepare_data
from graftlm.recipe import Recipe, read_recipe
from graftlm.results import Measured, measure, summarize, write_report
from graftlm.rl.rewards import make_scorer
from graftlm.system import preserve_global_state, return_freed_memory
from graftlm.training import dependencies
from graftlm.training.checkpoints import METRICS
from graftlm.training.kernel_choice import choose_kernels
from graftlm.training.objective import objective_heads
from graftlm.training.phases import attach_deltas, load_teacher, make_batches
from graftlm.training.run_folder import KEPT, RunFolder
from graftlm.training.session import RunContext, Session, Stopping
from graftlm.training.setup import Setup
from graftlm.training.sharding import shard
from graftlm.training.snapshot import put_deltas_back
from graftlm.training.start_from import about_start
from graftlm.training.trackers import Trackers
from graftlm.training.trainer import Trainer

RESUMABLE = 75
"""Exit code of a run that was stopped and goes on with `--resume` (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True)
class Result:
    """What a run leaves: the adapter folder, its summary.json, and the model with the delta on.

    Of a run that was finished before there is no model: `graftlm.load_adapter` reads it.
    """

    folder: Path
    summary: dict[str, Any]
    model: torch.nn.Module | None
    tokenizer: Any


@preserve_global_state()
def train(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
) -> Result:
    """Train the delta that `recipe` (or the YAML file there) describes, and write the adapter folder `out`.

    `resume` goes on from the last checkpoint in `out`, where there is one, to the very bytes of an unbroken run; with
    `accept_changes` with a recipe that is not the one it began with. Raises a GraftError before anything is loaded
    where it can. Ctrl-C and SIGTERM finish the step, save and return; a second one stops at once. `console` shows the
    run; by default it is silent. Under torchrun the processes train it together, and the first of them writes. While
    another process trains into `out`, an OutputError names it. Returns the Result: folder, summary, model, tokenizer.
    """
    distributed.start()
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    console = console if console and distributed.first() else Console(quiet=True)
    out = Path(out) if out is not None else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    tree = to_tree(recipe)
    folder = RunFolder(out, tree, recipe.data, lambda path: to_tree(read_recipe(path)), keep=recipe.train.keep)
    with folder.lock(console.print):
        with distributed.one_first():
            state = folder.open(overwrite=overwrite, resume=resume, accept_changes=accept_changes, report=console.print)
        if state == "finished":
            console.print(f"{out} is a finished run of this recipe: there is nothing to resume", highlight=False)
            return Result(out, json.loads((out / SUMMARY).read_text(encoding="utf-8")), None, None)
        with Trackers(tree, out) as trackers:
            return _run(recipe, folder, trackers, console)


def _run(recipe: Recipe, folder: RunFolder, trackers: Trackers, console: Console) -> Result:
    recipe.start_adapter()  # refused before anything is loaded
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    torch.manual_seed(recipe.train.seed)
    today = datetime.date.fromisoformat(distributed.gathered([folder.began])[0][:10])  # a resumed run stays in its day
    with distributed.one_first():  # it may have to be fetched or converted
        tokenizer = recipe.tokenizer()
    data = _prepare(recipe, tokenizer, console, today)
    scorer = make_scorer(recipe.rl.scorer, network=recipe.network, today=today) if recipe.rl else None
    with console.status("loading the base"):
        in_parts = recipe.train.shard != "none" and distributed.count() > 1  # then no single device may hold it
        model: Any = load_base(recipe.base, network=recipe.network, leave_on_cpu=in_parts).model
    if recipe.train.offload and model.device.type == "cpu":
        raise TrainingError(
            "train.offload: the model is on a CPU, so its activations are in that memory already",
            code="gpu-only-setting",
        )
    if recipe.train.kernels != "auto":
        pinned(recipe.train.kernels, model.device, model.dtype)  # refused before anything else takes its time
    batches = make_batches(recipe.train, data.examples, data.curriculum, data.draws)
    setup = recipe.setup(scorer, data.renderer)
    trained = _train(recipe, setup, Loaded(model, tokenizer), data, batches, folder, trackers, console)
    _write_adapters(recipe, model, tokenizer, data.renderer, folder)
    # From here on the adapter is safe in its place; what is measured is added to it.
    measured = Measured() if trained.stopped else measure(recipe, model, data, scorer, console)
    log = [line for line in trained.lines if "loss" in line]
    summary = summarize(recipe, model, log, measured, trained.kernels, stopped=trained.stopped)
    if setup.start_from is not None:
        summary["start_from"] = about_start(setup.start_from)
    out = folder.out
    if distributed.first():
        with writing(out):
            if not trained.stopped:
                write_report(
                    recipe, model, tokenizer, data, out, summary, trained.lines, measured.samples, trained.kernels
                )
            (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    for event in trackers.finish(None if trained.stopped else summary):
        console.print(f"{event['tracker']}: {event['why']}", highlight=False, markup=False)
    if trained.stopped:
        steps = f"step {log[-1]['step']} of {len(batches)}" if log else "the start"
        console.print(f"stopped after {steps}. The adapter so far is saved in {out}; --resume goes on from there")
    else:
        folder.close()
        if measured.samples:
            console.print(terminal.side_by_side(measured.samples[: recipe.report.samples]))
        console.print(terminal.results(summary))
        console.print(f"wrote {out}: adapter, report.html, summary.json", highlight=False)
    distributed.totals(0)  # torchrun ends all ranks when one leaves early with an exit code: they leave together
    return Result(out, summary, model, tokenizer)


def _prepare(recipe: Recipe, tokenizer: Any, console: Console, today: datetime.date) -> Prepared:
    """The rows of the run, and what was found in them on the console."""
    status = nullcontext() if recipe.select else console.status("reading rows")  # selecting has bars of its own
    with status, distributed.one_first():  # the others find what it has rendered
        data = prepare_data(recipe, tokenizer, console=console, today=today)
    for line in data.chosen:
        console.print(line, highlight=False)
    console.print(terminal.preflight(data.report))
    if data.inner_rows:
        console.print(f"{len(data.inner_rows)} rows are the inner validation split", highlight=False)
    console.print(terminal.tokens(data.first_rows[0]))
    return data


class Trained(NamedTuple):
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    stopped: bool
    """Whether the run was left before its end."""
    kernels: KernelChoice


def _train(
    recipe: Recipe,
    setup: Setup,
    base: Loaded,
    data: Prepared,
    batches: list[list[int]],
    folder: RunFolder,
    trackers: Trackers,
    console: Console,
) -> Trained:
    """Attach the deltas and train them, from where the checkpoint stood if there is one."""
    model, tokenizer = base
    check_packing(model, data.examples, packed=recipe.data.pack, sharing=recipe.train.prefix_sharing)
    load_teacher(setup, model, data.examples)
    began = distributed.gathered([folder.began])[0]
    others = {"inner_rows": data.inner_rows, "statistics_rows": data.statistics_rows}
    facts: dict[str, Any] = dependencies.record(
        recipe.data, recipe.loss, model, tokenizer, data.examples, others, began=began, start_from=recipe.start_from
    )
    found = folder.newest(facts, report=console.print)
    with console.status("attaching the delta"):
        rows = data.statistics_rows
        attach_deltas(setup, model, data.examples, batches, statistics_rows=rows, start=found is None)
    if found is not None:
        put_deltas_back(found, model, list(setup.deltas))
    distributed.check_same(trainable(model))
    saved = found.facts.get("kernels") if found else None
    choice, backend = choose_kernels(setup, model, data.examples, batches, saved, console)
    console.print("kernels: " + "; ".join(choice.lines()), highlight=False, markup=False)
    facts["kernels"] = choice.to_json()
    for line in coverage(model).lines():
        console.print(line, highlight=False, markup=False)
    if recipe.train.shard == "fsdp":
        shard(model)
    for name, config in setup.deltas.items():
        count = sum(p.numel() for p in parameters_of(model, name))
        console.print(f"{config.method}: {count:,} trainable parameters, {len(batches)} steps", highlight=False)
    if found:
        console.print(f"goes on after step {found.facts['seen']} of {len(batches)}", highlight=False)

    def held_out_loss() -> float:
        layout: dict[str, Any] = {"pack_tokens": setup.train.pack_tokens, "packed": setup.packed}
        share = setup.train.prefix_sharing
        return held_out_metrics(model, data.held_out, setup.objective(), share=share, **layout)["loss"]

    with folder.begin(found) as run, stop_on_signal() as stopping, terminal.progress(console) as bars:
        trackers.begin(run.metrics.lines, resumes=found is not None)
        run.track = trackers.log
        context = RunContext(folder, run, stopping, console, bars)
        trainer = Trainer(setup, model, data.examples, batches, data.inner_rows, backend=backend)
        session = Session(trainer, facts, context, held_out_loss)
        session.train(found)
        lines = run.metrics.lines
    if setup.train.early_stopping and not session.stopped and (best := folder.best()):
        put_deltas_back(best, model, list(setup.deltas))
        console.print(f"the held-out loss was lowest after step {best.facts['seen']}: that state is the adapter")
    for host in hosts(model).values():
        host.deltas.eval()
    return_freed_memory()
    return Trained(lines, session.stopped, choice)


def _write_adapters(recipe: Recipe, model: Any, tokenizer: Any, renderer: Renderer, run_folder: RunFolder) -> None:
    """The adapter folder, with recipe and metrics. A single adapter is the folder itself, several are folders in it."""
    if not distributed.first():
        return
    with new_folder(run_folder.out, overwrite=True, keep=KEPT) as folder:
        for name in recipe.all_deltas():
            if renderer.template is not None:
                attachment(model).chats[name] = _chat(renderer)
            if heads := objective_heads(model):
                attachment(model).heads[name] = heads
            adapter = adapter_of(model, name, tokenizer=tokenizer)
            adapter.write_into(folder if recipe.delta else _inside(folder, name))
        (folder / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
        shutil.copyfile(run_folder.checkpoints.folder / METRICS, folder / METRICS)


def _inside(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _chat(renderer: Renderer) -> Chat:
    """How the conversations of a run were rendered."""
    today = renderer.today if renderer.writes_the_date else None
    return Chat(renderer.template or "", today, renderer.turn_order)


@contextmanager
def stop_on_signal() -> Iterator[Stopping]:
    """The first Ctrl-C (or SIGTERM) asks for a stop after the step; a second one stops at once."""
    state = Stopping()

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
