"""A run: the parts that a recipe names, joined. Logging, evaluation and saving are here, as plain statements.

recipe -> rows -> examples -> base -> delta -> steps -> held-out rows -> adapter folder
"""

import datetime
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from graftlm import distributed
from graftlm.adapters.store import model_card, new_folder, write_adapter
from graftlm.config.schema import to_yaml
from graftlm.data.batches.groups import COMPARED, prepare_groups, usable_by
from graftlm.data.batches.order import Curriculum, curriculum
from graftlm.data.batches.pack import Example, Group, fill, saved_by_sharing
from graftlm.data.batches.prompts import asked_in, prepare_prompts, shown_prompts
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare, shown_rows
from graftlm.data.quality.report import Report
from graftlm.data.quality.survey import not_told, survey
from graftlm.data.sources.row_cache import read_kept, unread_keys
from graftlm.data.sources.source import DataConfig, Row
from graftlm.data.sources.template_draws import Draws, draw_again
from graftlm.display import pages, terminal
from graftlm.errors import TrainingError
from graftlm.evaluation.held_out import HeldOut, can_be_answered, evaluate, held_out_metrics
from graftlm.files import cache_folder, writing
from graftlm.kernels.backend import pinned
from graftlm.losses import LOSSES
from graftlm.model.hub.load import Loaded, base_config, fingerprint, load_base
from graftlm.model.hub.sketch import Positions
from graftlm.model.hub.stopping import missing_end
from graftlm.model.layers.attach import Chat, attachment, deltas_off, hosts, parameters_of, trainable
from graftlm.model.layers.coverage import coverage
from graftlm.model.passes.autotune import Choice
from graftlm.model.passes.packing_check import check_packing
from graftlm.recipe import Recipe, read_recipe
from graftlm.rl.config import mean_reward
from graftlm.rl.rewards import Scorer, make_scorer
from graftlm.selection.choose import choose
from graftlm.system import peak_rss_gib, preserve_global_state, return_freed_memory
from graftlm.training import dependencies
from graftlm.training.checkpoints import METRICS, put_deltas_back
from graftlm.training.inner_split import put_aside
from graftlm.training.kernel_choice import choose_kernels
from graftlm.training.objective import Objective
from graftlm.training.phases import attach_deltas, load_teacher, plan_batches, steps_of
from graftlm.training.positions import check_positions
from graftlm.training.run_folder import KEPT, RECIPE, SUMMARY, Place
from graftlm.training.session import Course, Stopping, Watched
from graftlm.training.tokenizer import recipe_tokenizer
from graftlm.training.trackers import Trackers

SHARING_STEPS = 100
"""What shared beginnings save is counted over so many steps of the run."""

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


@dataclass(frozen=True)
class Prepared:
    """The rows of a run, rendered: what `graft data check` reports and `train` trains on."""

    rows: Sequence[Row]
    examples: Sequence[Example | Group]
    """What a step is made of: rows, or groups of answers where the loss compares them. Those of a first epoch come
    before what `draws` has for later ones."""
    report: Report
    held_out_rows: Sequence[Row]
    held_out: Sequence[Example | Group]
    first_rows: list[dict[str, Any]]
    renderer: Renderer
    """What has rendered the rows: with the template, the day and the turn order of the run."""
    chosen: list[str] = field(default_factory=list)
    """What each selector of the recipe did, a line each."""
    aside: list[Example | Group] = field(default_factory=list)
    """Rows that are kept out of `examples` for policies that learn from them."""
    curriculum: Curriculum | None = None
    """The order of `examples` in an epoch; None where every epoch is shuffled."""
    draws: Draws | None = None
    """Which of `examples` each row is in each epoch; None where every epoch has the same."""
    scorer: Scorer | None = None
    """What judges the answers that the model gives while it is trained."""
    positions: Positions | None = None
    """Those of the base."""

    @property
    def first_epoch(self) -> Sequence[Example | Group]:
        """What a first epoch is made of."""
        return self.examples if self.draws is None else self.examples[: self.draws.count]


def prepare_data(
    recipe: Recipe,
    tokenizer: Any,
    *,
    show: int = 1,
    look: bool = False,
    console: Console | None = None,
    today: datetime.date | None = None,
) -> Prepared:
    """Read, split, choose, render and check the rows of a recipe.

    Raises DataError where none can be used, and under `strict` where one cannot.

    With `look` the rows themselves are looked at too (`report.survey`), which takes longer than rendering them. `today`
    is the day for chat templates that write the date.
    """
    data, needs = recipe.data, "prompts" if recipe.online else LOSSES[recipe.loss.name].rows
    usable = usable_by(recipe.loss.name, needs, data)
    kept = cache_folder() / "rows"
    read = read_kept(data, seed=recipe.train.seed, network=recipe.network, folder=kept, needs=needs, usable=usable)
    rows, held_out_rows = read.train, read.held_out
    chosen: list[str] = []
    if recipe.select:
        rows, choices = choose(recipe, rows, tokenizer, console or Console(quiet=True), today)
        chosen = [choice.line() for choice in choices]
    renderer = Renderer(tokenizer, turn_order=data.turn_order, today=today)
    ready = partial(_ready, needs, renderer, workers=recipe.train.threads, cache=kept)
    examples: Sequence[Example | Group]
    room = recipe.online.max_new_tokens if recipe.online else 0

    def prompts(rows: Sequence[Row], data: DataConfig, *, format: str = "") -> Any:
        return prepare_prompts(rows, renderer, data, room=room, format=format)

    if recipe.online:
        examples, rows, found = prompts(rows, data, format=read.format)
    else:
        examples, rows, found = ready(rows, data, format=read.format)
    found.problems[:0] = read.problems
    found.notes += read.notes  # many a time one for each row: behind what is said of all
    has = check_positions(recipe, examples, found, room=room)
    learnt, aside = put_aside(recipe, examples)
    examples = learnt
    order = curriculum(data.order, rows, examples) if data.order else None
    epochs = math.ceil(steps_of(recipe.train, len(examples)) * recipe.train.batch_rows / len(examples))
    how: dict[str, Any] = {"epochs": epochs, "seed": recipe.train.seed, "network": recipe.network}
    more, draws, notes = draw_again(data, rows, examples, prompts if recipe.online else ready, **how)
    found.notes += notes
    check_positions(recipe, more, found, what="rows of later epochs", room=room)
    examples = [*examples, *more]
    if data.pack and not recipe.online:
        first = plan_batches(recipe.train, examples, order, draws)[:SHARING_STEPS]
        steps_of_rows = [[examples[i] for i in step] for step in first]
        share, tokens = recipe.train.prefix_sharing, recipe.train.pack_tokens
        found.shared_share = saved_by_sharing(steps_of_rows, tokens) if share else None
        found.pack_fill = fill(steps_of_rows, tokens, share=share)
    held_out: Sequence[Example | Group] = []
    answered = [row for row in held_out_rows if asked_in(row)[1] is not None] if recipe.online else held_out_rows
    if answered:  # every one counts: one that is too long is cut, not left out
        held_out, answered, about = ready(answered, replace(data, over_length="truncate"))
        held_out_rows = held_out_rows if recipe.online else answered
        found.problems += about.problems
        if not isinstance(data.held_out, int | float):  # else its rows have the keys of the others
            found.notes += [f"held-out rows: {line}" for line in unread_keys(held_out_rows)]
        check_positions(recipe, held_out, found, what="held-out rows")
    if look:
        found.survey = survey(rows, held_out_rows)
        found.notes = not_told(found.notes, found.survey)
    return Prepared(
        rows,
        examples,
        found,
        held_out_rows,
        held_out,
        shown_prompts(examples, renderer, show) if recipe.online else shown_rows(rows, renderer, data, show),
        renderer,
        chosen=chosen,
        aside=aside,
        curriculum=order,
        draws=draws,
        positions=has,
    )


def _ready(
    needs: str, renderer: Renderer, rows: Sequence[Row], data: DataConfig, **options: Any
) -> tuple[Sequence[Example | Group], Sequence[Row], Report]:
    """(what the loss trains on, the rows that it is made of, the report)"""
    if needs in COMPARED:
        return prepare_groups(rows, renderer, data, needs, **options)
    examples, found = prepare(rows, renderer, data, **options)
    return examples, _usable(rows, examples, found), found


def _usable(rows: Sequence[Row], examples: Sequence[Example], found: Report) -> Sequence[Row]:
    """The rows without those that the template refused or that would have taught nothing."""
    if not found.problems:
        return rows
    known = {example.where for example in examples} | set(found.dropped_over_length)
    return [row for row in rows if row.where in known]


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
    place = Place(out, recipe)
    with place.lock(console.print):
        with distributed.one_first():
            begun = place.open(overwrite=overwrite, resume=resume, accept_changes=accept_changes, told=console.print)
        if begun == "finished":
            console.print(f"{out} is a finished run of this recipe: there is nothing to resume", highlight=False)
            return Result(out, json.loads((out / SUMMARY).read_text(encoding="utf-8")), None, None)
        with Trackers(recipe, out) as trackers:
            return _run(recipe, place, trackers, console)


def _run(recipe: Recipe, place: Place, trackers: Trackers, console: Console) -> Result:
    out = place.out
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    torch.manual_seed(recipe.train.seed)
    with distributed.one_first():  # it may have to be fetched or converted
        tokenizer = recipe_tokenizer(recipe)
    today = datetime.date.fromisoformat(distributed.gathered([place.began])[0][:10])  # a resumed run stays in its day
    waiting = nullcontext() if recipe.select else console.status("reading rows")  # selecting has bars of its own
    with waiting, distributed.one_first():  # the others find what it has rendered
        data = prepare_data(recipe, tokenizer, console=console, today=today)
    if recipe.online:
        data = replace(data, scorer=make_scorer(recipe.online.scorer, network=recipe.network, today=today))
    for line in data.chosen:
        console.print(line, highlight=False)
    console.print(terminal.preflight(data.report))
    if data.aside:
        console.print(
            f"{len(data.aside)} of these rows are put aside for policies that learn from them", highlight=False
        )
    console.print(terminal.tokens(data.first_rows[0]))
    with console.status("loading the base"):
        in_parts = recipe.train.shard != "none" and distributed.count() > 1  # then no single device may hold it
        model: Any = load_base(recipe.base, network=recipe.network, leave_on_cpu=in_parts).model
    if recipe.train.offload and model.device.type == "cpu":
        raise TrainingError("train.offload: the model is on a CPU, so its activations are in that memory already")
    if recipe.train.kernels != "auto":
        pinned(recipe.train.kernels, model.device, model.dtype)  # refused before anything else takes its time
    plan = plan_batches(recipe.train, data.examples, data.curriculum, data.draws)
    lines, stopped, choice = _train(recipe, Loaded(model, tokenizer), data, plan, place, trackers, console)
    log = [line for line in lines if "loss" in line]
    if distributed.first():
        with new_folder(out, overwrite=True, keep=KEPT) as folder:
            for name in recipe.all_deltas():  # a single one is the folder itself, several are folders in it
                if data.renderer.template is not None:
                    attachment(model).chats[name] = _chat(data.renderer)
                write_adapter(model, folder if recipe.delta else _inside(folder, name), name=name, tokenizer=tokenizer)
            (folder / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
            shutil.copyfile(place.checkpoints.folder / METRICS, folder / METRICS)
    # From here on the adapter is safe in its place; what is measured is added to it.
    before, after, samples = (None, None, []) if stopped else _measure(recipe, model, data, console)
    summary = _summary(recipe, model, log, before, after, stopped) | {"kernels": choice.to_json()}
    if distributed.first():
        with writing(out):
            if not stopped:
                _write_report(recipe, model, tokenizer, data, out, summary, lines, samples, choice)
            (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    for event in trackers.finish(None if stopped else summary):
        console.print(f"{event['tracker']}: {event['why']}", highlight=False, markup=False)
    if stopped:
        steps = f"step {log[-1]['step']} of {len(plan)}" if log else "the start"
        console.print(f"stopped after {steps}. What was learnt by then is saved in {out}; --resume goes on from there")
    else:
        place.close()
        if samples:
            console.print(terminal.side_by_side(samples[: recipe.report.samples]))
        console.print(terminal.results(summary))
        console.print(f"wrote {out}: adapter, report.html, summary.json", highlight=False)
    distributed.totals(0)  # torchrun ends all ranks when one leaves early with an exit code: they leave together
    return Result(out, summary, model, tokenizer)


def _train(
    recipe: Recipe,
    base: Loaded,
    data: Prepared,
    plan: list[list[int]],
    place: Place,
    trackers: Trackers,
    console: Console,
) -> tuple[list[dict[str, Any]], bool, Choice]:
    """Attach the delta and train it, from where the checkpoint stood if there is one: (metrics so far, was stopped,
    what computed it)."""
    model, tokenizer = base
    check_packing(model, data.examples, packed=recipe.data.pack, sharing=recipe.train.prefix_sharing)
    load_teacher(recipe, model, data.examples)
    facts: dict[str, Any] = dependencies.record(
        recipe, model, tokenizer, data.examples, began=distributed.gathered([place.began])[0]
    )
    found = place.newest(facts, told=console.print)
    with console.status("attaching the delta"):
        attach_deltas(recipe, model, data.examples, plan, start=found is None)
    if found is not None:
        put_deltas_back(found, model, list(recipe.all_deltas()), place.out)
    distributed.check_same(trainable(model))
    covered = coverage(model).lines()
    saved = found.facts.get("kernels") if found else None
    choice, backend = choose_kernels(recipe, model, data.examples, plan, saved, console)
    console.print("kernels: " + "; ".join(choice.lines()), highlight=False, markup=False)
    facts["kernels"] = choice.to_json()
    if recipe.train.shard == "fsdp":
        distributed.shard(model)
    for line in covered:
        console.print(line, highlight=False, markup=False)
    for name, config in recipe.all_deltas().items():
        count = sum(p.numel() for p in parameters_of(model, name))
        console.print(f"{config.method}: {count:,} trainable parameters, {len(plan)} steps", highlight=False)
    if found:
        console.print(f"goes on after step {found.facts['seen']} of {len(plan)}", highlight=False)
    with place.begin(found) as run, stop_on_signal() as stopping, terminal.progress(console) as bars:
        trackers.begin(run.metrics.lines, resumes=found is not None)
        run.tell = trackers.log
        watched = Watched(place, run, stopping, console, bars)
        course = Course(recipe, model, data.examples, data.held_out, plan, facts, watched, backend)
        course.go(found, data.aside, data.scorer, data.renderer)
        lines = run.metrics.lines
    if recipe.train.early_stopping and not course.stopped and (best := place.best()):
        put_deltas_back(best, model, list(recipe.all_deltas()), place.out)
        console.print(f"the held-out loss was lowest after step {best.facts['seen']}: that state is kept")
    for host in hosts(model).values():
        host.deltas.eval()
    return_freed_memory()
    return lines, course.stopped, choice


def _inside(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _chat(renderer: Renderer) -> Chat:
    """How the conversations of a run were rendered."""
    today = renderer.today if renderer.writes_the_date else None
    return Chat(renderer.template or "", today, renderer.turn_order)


def _measure(
    recipe: Recipe, model: Any, data: Prepared, console: Console
) -> tuple[HeldOut | None, HeldOut | None, list[dict[str, str]]]:
    """Held-out rows with the delta off and on, and the answers side by side."""
    liked = [row for row in data.held_out_rows if row.desirable is not False]
    if not data.held_out_rows:
        return None, None, []
    renderer = data.renderer
    can = [row for row in liked if recipe.online or can_be_answered(row)]
    if data.positions and data.positions.count and data.positions.are_a_table():
        room = data.positions.count - recipe.report.max_new_tokens
        can = [row for row in can if len(renderer.prompt(asked_in(row)[0], row.tools, row.variables)) <= room]
    asked = can[: recipe.report.answers]
    groups = [item for item in data.held_out if isinstance(item, Group)]
    wanted = [example for item in data.held_out for example in (item.liked if isinstance(item, Group) else [item])]
    layout: dict[str, Any] = {"pack_tokens": recipe.train.pack_tokens, "packed": recipe.data.pack}

    def measured(name: str, bars: Any) -> HeldOut:
        bar = bars.add_task(f"{name} answers", total=len(asked), now="")
        found = evaluate(
            model,
            renderer,
            wanted,
            asked,
            max_new_tokens=recipe.report.max_new_tokens,
            progress=lambda done: bars.update(bar, completed=done),
            **layout,
        )
        if data.scorer is not None and asked:
            reward = mean_reward(data.scorer, asked, found.answers)
            return found if reward is None else replace(found, objective={"reward": reward})
        if not groups:
            return found
        share = recipe.train.prefix_sharing
        return replace(found, objective=held_out_metrics(model, groups, Objective(recipe.loss), share=share, **layout))

    with terminal.progress(console) as bars:
        with deltas_off(model):
            before = measured("base", bars)
        after = measured("tuned", bars)
    samples = [
        {
            "asked": asked_in(row)[0][-1].content,
            "wanted": asked_in(row)[1] or "",
            "base": b,
            "tuned": t,
            "where": row.where,
        }
        for row, b, t in zip(asked, before.answers, after.answers, strict=True)
    ]
    return before, after, samples


def path_name(source: str) -> str:
    """A source for what may be published: a file without the folders that it lies in."""
    return source if source.startswith(("hub:", "builtin:")) else Path(source).name


def _summary(
    recipe: Recipe,
    model: Any,
    log: list[dict[str, float]],
    before: HeldOut | None,
    after: HeldOut | None,
    stopped: bool,
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "held_out": {
            "rouge_l": {"base": before and before.rouge_l, "tuned": after and after.rouge_l},
            "loss_nats": {"base": before and before.loss_nats, "tuned": after and after.loss_nats},
        },
        "train": {
            "tokens_per_s": sum(s["tokens"] for s in log) / sum(s["wall_s"] for s in log) if log else 0.0,
            "supervised_tokens": int(sum(s["supervised_tokens"] for s in log)),
            "steps": len(log),
            "wall_s": sum(s["wall_s"] for s in log),
            "peak_rss_gib": max(distributed.gathered([peak_rss_gib()])),
            "ranks": distributed.count(),
        },
        "base_fingerprint": fingerprint(model).digest,
        "seed": recipe.train.seed,
    }
    if before and after and before.objective:
        summary["held_out"]["objective"] = {"base": before.objective, "tuned": after.objective}
    return summary | ({"interrupted": True} if stopped else {})


def _write_report(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    data: Prepared,
    folder: Path,
    summary: dict[str, Any],
    lines: Sequence[dict[str, Any]],
    samples: list[dict[str, str]],
    choice: Choice,
) -> None:
    done = summary["train"]
    processes = f"{done['ranks']} processes, each of " if done["ranks"] > 1 else ""
    source = ", ".join(source.path for source in recipe.data.sources())
    named = ", ".join(dict.fromkeys(path_name(source.path) for source in recipe.data.sources()))
    facts = {
        "training data": f"{named}: {data.report.rows:,} rows, {len(data.held_out_rows)} held out",
        "steps": f"{done['steps']} of {recipe.train.batch_rows} rows, seed {recipe.train.seed}",
        "supervised tokens": f"{done['supervised_tokens']:,}",
        "speed": f"{done['tokens_per_s']:,.0f} tokens/s",
        "machine": f"{processes}{torch.get_num_threads()} threads, {model.device}, {model.dtype}",
        "kernels": "; ".join(choice.lines()),
        "training time": f"{done['wall_s']:.0f} s",
        "peak memory": f"{done['peak_rss_gib']:.2f} GiB",
    }
    if end := missing_end(model, tokenizer, data.renderer.stop_ids):
        facts["end of an answer"] = f"{end}: give it to servers as a stop token, or use `graft merge`"
    for name, label in (("loss_nats", "held-out loss, nats per supervised token"), ("rouge_l", "held-out ROUGE-L F1")):
        figures = summary["held_out"][name]
        if figures["tuned"] is not None:
            facts[label] = f"{figures['base']:.3f} base, {figures['tuned']:.3f} tuned"
    (folder / "held_out.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    for name in recipe.all_deltas():
        card = model_card(model, name, facts=facts)
        ((folder if recipe.delta else folder / name) / "README.md").write_text(card, encoding="utf-8")
    methods = " + ".join(config.method for config in recipe.all_deltas().values())
    page = pages.html(
        title=f"{methods} on {base_config(recipe.base).name}: {source}",
        summary=summary,
        facts=facts,
        steps=[line for line in lines if "loss" in line],
        events=[line for line in lines if "event" in line],
        lengths=[len(answer) for item in data.first_epoch for answer in item.answers],
        preflight=data.report.lines(),
        rows=data.first_rows,
        samples=samples[: recipe.report.samples],
        recipe=to_yaml(recipe),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


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
