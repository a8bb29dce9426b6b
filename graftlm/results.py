"""What a run leaves beside its adapter: held-out rows before and after, summary.json, report.html, the model card."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from graftlm import distributed
from graftlm.adapters.model_card import model_card
from graftlm.config.schema import to_yaml
from graftlm.data.batches.pack import Group
from graftlm.data.batches.prompts import asked_in
from graftlm.data.sources.source import Row
from graftlm.display import pages, terminal
from graftlm.evaluation.held_out import HeldOut, can_be_answered, evaluate, held_out_metrics
from graftlm.generation.support import why_not_ours
from graftlm.hub.config import base_config
from graftlm.hub.fingerprint import fingerprint
from graftlm.hub.stopping import missing_end
from graftlm.model.modes import deltas_off
from graftlm.passes.autotune import KernelChoice
from graftlm.prepare import Prepared
from graftlm.recipe import Recipe
from graftlm.rl.config import mean_reward
from graftlm.rl.rewards import Scorer
from graftlm.system import peak_rss_gib
from graftlm.training.objective import Objective


class Measured(NamedTuple):
    """Held-out rows with the deltas off and on; None and empty where there are none."""

    before: HeldOut | None = None
    after: HeldOut | None = None
    samples: Sequence[dict[str, str]] = ()
    """The answers side by side, for every row that was asked."""


def measure(recipe: Recipe, model: Any, data: Prepared, scorer: Scorer | None, console: Console) -> Measured:
    """Answer and score the held-out rows, before and after."""
    if not data.held_out_rows:
        return Measured()
    questions = questions_of(recipe, data)
    with terminal.progress(console) as bars:
        with deltas_off(model):
            before = _measured(recipe, model, data, questions, scorer, "base", bars)
        after = _measured(recipe, model, data, questions, scorer, "tuned", bars)
    samples = [
        {
            "asked": asked_in(row)[0][-1].content,
            "wanted": asked_in(row)[1] or "",
            "base": b,
            "tuned": t,
            "where": row.where,
        }
        for row, b, t in zip(questions, before.answers, after.answers, strict=True)
    ]
    return Measured(before, after, samples)


def questions_of(recipe: Recipe, data: Prepared) -> Sequence[Row]:
    """The held-out rows to answer: `report.answers` of those that ask something within the positions of the base."""
    rows = [row for row in data.held_out_rows if row.desirable is not False and (recipe.rl or can_be_answered(row))]
    if data.positions and data.positions.count and data.positions.are_a_table():
        room = data.positions.count - recipe.report.max_new_tokens
        rows = [row for row in rows if len(data.renderer.prompt(asked_in(row)[0], row.tools, row.variables)) <= room]
    return rows[: recipe.report.answers]


def _measured(
    recipe: Recipe,
    model: Any,
    data: Prepared,
    questions: Sequence[Row],
    scorer: Scorer | None,
    name: str,
    bars: Any,
) -> HeldOut:
    """The held-out rows on the model as it is; `name` is shown beside the bar."""
    groups = [item for item in data.held_out if isinstance(item, Group)]
    examples = [example for item in data.held_out for example in (item.liked if isinstance(item, Group) else [item])]
    layout: dict[str, Any] = {"pack_tokens": recipe.train.pack_tokens, "packed": recipe.data.pack}
    bar = bars.add_task(f"{name} answers", total=len(questions), now="")
    found = evaluate(
        model,
        data.renderer,
        examples,
        questions,
        max_new_tokens=recipe.report.max_new_tokens,
        progress=lambda done: bars.update(bar, completed=done),
        **layout,
    )
    if scorer is not None and questions:
        reward = mean_reward(scorer, questions, found.answers)
        return found if reward is None else replace(found, objective={"reward": reward})
    if not groups:
        return found
    share = recipe.train.prefix_sharing
    return replace(found, objective=held_out_metrics(model, groups, Objective(recipe.loss), share=share, **layout))


def path_name(source: str) -> str:
    """A source for what may be published: a file without its folders."""
    return source if source.startswith(("hub:", "builtin:")) else Path(source).name


def summarize(
    recipe: Recipe,
    model: Any,
    log: Sequence[dict[str, float]],
    measured: Measured,
    choice: KernelChoice,
    *,
    stopped: bool,
) -> dict[str, Any]:
    """The tree of summary.json. `log` are the lines of the steps in metrics.jsonl."""
    before, after, _ = measured
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
    summary |= {"interrupted": True} if stopped else {}
    return summary | {"kernels": choice.to_json()}


def write_report(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    data: Prepared,
    folder: Path,
    summary: dict[str, Any],
    lines: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, str]],
    choice: KernelChoice,
) -> None:
    """held_out.jsonl, model cards and report.html, into the adapter folder. `lines` are those of metrics.jsonl."""
    source = ", ".join(source.path for source in recipe.data.sources())
    facts = _facts(recipe, model, tokenizer, data, summary, choice)
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


def _facts(
    recipe: Recipe, model: Any, tokenizer: Any, data: Prepared, summary: dict[str, Any], choice: KernelChoice
) -> dict[str, str]:
    """What the report and the model card tell of a run: label -> text."""
    train = summary["train"]
    processes = f"{train['ranks']} processes, each of " if train["ranks"] > 1 else ""
    sources = ", ".join(dict.fromkeys(path_name(source.path) for source in recipe.data.sources()))
    facts = {
        "training data": f"{sources}: {data.report.rows:,} rows, {len(data.held_out_rows)} held out",
        "steps": f"{train['steps']} of {recipe.train.batch_rows} rows, seed {recipe.train.seed}",
        "supervised tokens": f"{train['supervised_tokens']:,}",
        "speed": f"{train['tokens_per_s']:,.0f} tokens/s",
        "machine": f"{processes}{torch.get_num_threads()} threads, {model.device}, {model.dtype}",
        "kernels": "; ".join(choice.lines()),
        "training time": f"{train['wall_s']:.0f} s",
        "peak memory": f"{train['peak_rss_gib']:.2f} GiB",
    }
    if end := missing_end(model, tokenizer, data.renderer.stop_ids):
        facts["end of an answer"] = f"{end}: give it to servers as a stop token, or use `graft merge`"
    if (recipe.rl is not None or recipe.report.answers) and (reason := why_not_ours(model)):
        facts["answers"] = f"generated by transformers: {reason}"
    for name, label in (("loss_nats", "held-out loss, nats per supervised token"), ("rouge_l", "held-out ROUGE-L F1")):
        figures = summary["held_out"][name]
        if figures["tuned"] is not None:
            facts[label] = f"{figures['base']:.3f} base, {figures['tuned']:.3f} tuned"
    return facts
