"""`graft eval`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.cli.options import DtypeOption, JsonOption, NetworkOption, QuantizationOption
from graftlm.cli.terminal import note, prepare_libraries, print_json, print_table, wrote

if TYPE_CHECKING:
    from graftlm.config.trees import Tree
    from graftlm.evaluation.results import Comparison, Evaluation
    from graftlm.evaluation.task import Task


def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_TASKS",
            help="File of tasks (.yaml with `tasks`), builtin:tasks[/NAME], or a recipe with held-out rows.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="JSON file to write.")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", help="Adapter folder. Repeat the option: each is a model of its own, in one pass."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model. Default: that of the file or of the first adapter."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Measure so many rows of each task, drawn at random.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file and its journal.")] = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Measure a base and adapters on tasks, with intervals and tests of their differences.

    Answers are kept in OUT.journal. After an interruption the same command goes on from there, to the same file.
    """
    # Over 60 lines: its signature is the list of options, with the help of each.
    from graftlm.adapters.load import load_adapter
    from graftlm.evaluation.evaluate import evaluate as measure
    from graftlm.files import check_new, whole
    from graftlm.hub.fingerprint import base_record
    from graftlm.lock import only_writer

    prepare_libraries()
    check_new(out, overwrite=overwrite)
    folders = _named(adapter or [])
    tasks_of, named = _source(source, network)
    model, tokenizer = _load(base or named, folders, dtype=dtype, quantization=quantization, network=network)
    for each, folder in folders.items():
        typer.secho(load_adapter(model, folder, name=each), dim=True, err=True)
    tasks = _limited(tasks_of(tokenizer), limit)
    with only_writer(out, say=note):
        found = measure(
            model,
            tokenizer,
            tasks,
            adapters=list(folders),
            journal=out.with_name(f"{out.name}.journal"),
            replace_journal=overwrite,
            progress=_shown_progress(),
        )
        about = {
            "source": source,
            "base_model": base_record(model).name,
            "adapters": {each: str(path) for each, path in folders.items()},
        }
        tree = about | found.to_json()
        with whole(out) as draft:
            draft.write_text(_json(tree), encoding="utf-8")
    if as_json:
        print_json(tree)
    else:
        _show(found)
    wrote(out)


def _json(tree: "Tree") -> str:
    import json

    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Name of a model -> folder of its adapter: the folder's name, with a number before it where two have the same."""
    from graftlm.adapters.folder import adapters_in
    from graftlm.evaluation.evaluate import BASE

    found = [
        (folder.resolve().name if key == "default" else f"{folder.resolve().name}-{key}", path)
        for folder in folders
        for key, path in adapters_in(folder).items()
    ]
    names = [name.replace(".", "-") for name, _ in found]
    unique = {n: names.count(name) == 1 and name != BASE for n, name in enumerate(names)}
    return {name if unique[n] else f"{n + 1}-{name}": found[n][1] for n, name in enumerate(names)}


def _load(base: Any, folders: dict[str, Path], **how: Any) -> Any:
    """The base that is named, or else the one that the first adapter names."""
    from graftlm.adapters.adapter import Adapter
    from graftlm.adapters.load import load_named_base
    from graftlm.hub.load import load_base

    if base is not None:
        return load_base(base, **how)
    if not folders:
        raise typer.BadParameter("name the base: nothing else says which it is", param_hint="--base")
    first = Adapter.read(next(iter(folders.values())))
    named = (first.base or {}).get("name") or first.peft_config.get("base_model_name_or_path") or "smollm2"
    return load_named_base(str(named), str(first.where), **how)


def _source(source: str, network: bool) -> tuple[Any, Any]:
    """(what makes the tasks, given the tokenizer of the base; the base, where the source has one)."""
    from graftlm.evaluation.task import read_task
    from graftlm.evaluation.task_file import is_task_file, read_tasks

    if source.startswith("builtin:") or is_task_file(Path(source)):
        config = read_tasks(source)
        tasks = [read_task(name, each, network=network or config.network) for name, each in config.tasks.items()]
        return (lambda tokenizer: tasks), config.base
    from graftlm.recipe import read_recipe

    recipe = read_recipe(source)
    return (lambda tokenizer: _held_out(recipe, source, tokenizer)), recipe.base


def _held_out(recipe: Any, source: str, tokenizer: Any) -> "list[Task]":
    """The held-out rows of a recipe: answered, and how likely their own answers are."""
    from graftlm.errors import DataError
    from graftlm.evaluation.held_out import can_be_answered
    from graftlm.evaluation.task import Task, TaskConfig, items_of_rows, metrics_of
    from graftlm.prepare import prepare_data

    rows = [row for row in prepare_data(recipe, tokenizer).held_out_rows if can_be_answered(row)]
    if not rows:
        raise DataError(
            f"{source}: no held-out rows with an answer: give the recipe `data.held_out`, or `graft eval` a file of "
            "tasks",
            code="no-held-out-rows",
        )
    configs = {
        "held_out": TaskConfig(
            rows=source, max_new_tokens=recipe.report.max_new_tokens, metrics=("rouge_l", "exact_match")
        ),
        "held_out_loss": TaskConfig(rows=source, kind="likelihood"),
    }
    return [
        Task(name, config, items_of_rows(rows, config), metrics_of(name, config)) for name, config in configs.items()
    ]


def _limited(tasks: "Sequence[Task]", limit: int | None) -> "list[Task]":
    from graftlm.evaluation.task import drawn_items

    if limit is None:
        return list(tasks)
    return [replace(task, items=drawn_items(task.items, limit, task.config.seed)) for task in tasks]


def _shown_progress() -> Any:
    """A callback that shows the progress of each task on standard error."""

    def show(task: str, done: int, total: int) -> None:
        if done == total:
            note(f"{task}: {total} rows")

    return show


# The table -----------------------------------------------------------------------------------------------------------


def _show(found: "Evaluation") -> None:
    tree = found.to_json()
    for task in found.tasks:
        metrics = list(next(iter(tree["tasks"][task.name].values())))
        rows = [
            [model, *(_cell(tree["tasks"][task.name][model][metric]) for metric in metrics)] for model in found.models
        ]
        print_table(["model", *metrics], rows, title=f"{task.name}: {len(task.items)} rows")
    for each in found.comparisons:
        if each.p_holm is not None:
            print(_sentence(each))
    for task in found.tasks:
        for model in found.models:
            about = tree["answers"][task.name][model]
            if about["cut"]:
                note(
                    f"{task.name}, {model}: {about['cut']} answers were cut off at {task.config.max_new_tokens} tokens"
                )
            if about["near_ties"]:
                note(
                    f"{task.name}, {model}: rounding may decide {len(about['near_ties'])} rows (near_ties in the file)"
                )


def _cell(one: "Tree") -> str:
    low, high = one["low"], one["high"]
    around = f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""
    return ("-" if one["value"] is None else f"{one['value']:.3g}") + around


def _sentence(each: "Comparison") -> str:
    """A comparison in a line. Where no difference was found, what could have been found is said."""
    difference = each.difference
    said = (
        f"{each.task}, {each.metric}: {each.adapter} - {each.base} = {difference.value:+.3g} "
        f"[{difference.low:.3g}, {difference.high:.3g}], p = {each.p_holm:.2g} (Holm): {each.verdict}"
    )
    if each.verdict == "no difference found":
        said += f". One of {each.detectable:.2g} would have been found in 4 of 5 samples like this"
    return said
