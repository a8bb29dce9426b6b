"""Pages: report.html here, others by `page`. One file each, pictures inside, nothing fetched."""

import io
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2


def page(template: str, **values: Any) -> str:
    """A page from a template of this package; whatever it is given is escaped, and nothing may be missing."""
    return _compile(template).render(**values)


@cache
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(files("graftlm.display").joinpath(template).read_text(encoding="utf-8"))


def html(
    *,
    title: str,
    summary: Mapping[str, Any],
    facts: Mapping[str, str],
    steps: Sequence[Mapping[str, float]],
    events: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
    preflight: Sequence[tuple[str, str]],
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, str]],
    recipe: str,
) -> str:
    """The report of one run; every text in it is escaped."""
    return page(
        "report.html.jinja",
        title=title,
        held_out=summary["held_out"],
        train=summary["train"],
        interrupted=summary.get("interrupted", False),
        facts=facts,
        loss_curve=_loss_curve(steps),
        answers_curve=_answers_curve(steps),
        rewards_curve=_rewards_curve([*steps, *events]),
        events=[_event_row(event) for event in events if event["event"] != NO_SIGNAL],  # the curve has their share
        lengths=_lengths(lengths),
        preflight=preflight,
        rows=rows,
        samples=samples,
        recipe=recipe,
    )


def _event_row(event: Mapping[str, Any]) -> tuple[int, str, str]:
    """(step, what happened, what is known of it)"""
    facts = ((key, value) for key, value in event.items() if key not in ("step", "event"))
    texts = ((key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in facts)
    return event["step"], event["event"], "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in texts)


def _loss_curve(steps: Sequence[Mapping[str, float]]) -> str:
    picture, axis = figure()
    numbers, losses = [s["step"] for s in steps], [s["loss"] for s in steps]
    axis.plot(numbers, losses, color="#2da44e", linewidth=1, alpha=0.4)
    axis.plot(numbers, smoothed(losses), color="#2da44e", linewidth=2)
    compares = any(_compares_answers(s) for s in steps)
    axis.set(xlabel="step", ylabel="loss" if compares else "loss, nats per supervised token")
    rate = axis.twinx()
    rate.plot(numbers, [s["learning_rate"] for s in steps], color="#8b8f96", linewidth=1, linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    return svg(picture)


ANSWERS = {"chosen": "#2da44e", "rejected": "#cf222e"}


def _compares_answers(step: Mapping[str, float]) -> bool:
    return any(f"{kind}_log_prob" in step for kind in ANSWERS)


def _answers_curve(steps: Sequence[Mapping[str, float]]) -> str:
    """How likely chosen and rejected answers are, and the margin between them; nothing where no answer is compared."""
    if not any(map(_compares_answers, steps)):
        return ""
    picture, axis = figure()
    for kind, color in ANSWERS.items():
        there = [s for s in steps if f"{kind}_log_prob" in s]
        found = [s[f"{kind}_log_prob"] for s in there]
        axis.plot([s["step"] for s in there], found, color=color, linewidth=1.5, label=f"{kind} answers")
    axis.set(xlabel="step", ylabel="log-probability of an answer, nats")
    axis.legend(frameon=False)
    margins = [s for s in steps if "margin" in s]
    if margins:
        margin = axis.twinx()
        margin.plot([s["step"] for s in margins], [s["margin"] for s in margins], color="#0b6bcb", linestyle=":")
        margin.set_ylabel("margin (dotted)")
    return svg(picture)


NO_SIGNAL = "no signal"
"""The event of prompts whose answers all have the same reward."""


def _rewards_curve(lines: Sequence[Mapping[str, Any]]) -> str:
    """Mean rewards of answers that the model gave, step by step, and what share of prompts said nothing; nothing where
    it gave none."""
    there = sorted((line for line in lines if "reward" in line), key=lambda line: line["step"])
    if not there:
        return ""
    picture, axis = figure()
    numbers, rewards = [line["step"] for line in there], [line["reward"] for line in there]
    axis.plot(numbers, rewards, color="#2da44e", linewidth=1, alpha=0.4)
    axis.plot(numbers, smoothed(rewards), color="#2da44e", linewidth=2)
    axis.set(xlabel="step", ylabel="mean reward of the answers")
    share = axis.twinx()
    share.plot(numbers, [line["no_signal"] for line in there], color="#8b8f96", linewidth=1, linestyle=":")
    share.set_ylabel("share of prompts without a signal (dotted)")
    return svg(picture)


def _lengths(lengths: Sequence[int]) -> str:
    picture, axis = figure(height=2.2)
    axis.hist(lengths, bins=40, color="#0b6bcb")
    axis.set(xlabel="tokens of a row", ylabel="rows")
    return svg(picture)


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each value and those just before it, a twentieth of all."""
    width = max(1, len(losses) // 20)
    parts = [losses[max(0, i - width) : i + 1] for i in range(len(losses))]
    return [sum(part) / len(part) for part in parts]


def figure(height: float = 3.2) -> tuple[Any, Any]:
    """A figure and its one pair of axes, as wide as a page."""
    # The object interface of matplotlib: no pyplot, so no window system and no global state.
    from matplotlib.figure import Figure

    new_figure = Figure(figsize=(9, height), layout="constrained")
    return new_figure, new_figure.add_subplot()


def svg(figure: Any) -> str:
    """The picture as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
