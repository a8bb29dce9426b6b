"""What a run shows in a terminal: the pre-flight report, a row with trained tokens colored, answers side by side."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from graftlm.data.quality.report import Report
from graftlm.data.quality.survey import WHY

ROLE_STYLES = {
    "special": "dim magenta",
    "boilerplate": "dim",
    "system": "yellow",
    "user": "cyan",
    "assistant": "default",
    "tool": "blue",
    "end-of-turn": "magenta",
}
TRAINED = "bold black on green"
TRAINED_LESS, TRAINED_MORE = "black on pale_green1", "bold white on dark_green"
ATTENTION = {"EOS not in loss", "special tokens in text", "left out"}


def preflight(report: Report, title: str = "pre-flight") -> RenderableType:
    """The report as a table, and what was found in the rows as another; whatever needs attention in yellow."""
    table = Table(title=title, show_header=False, title_justify="left", min_width=60)
    for name, value in report.lines():
        alarming = "NOT" in name + value or name in ATTENTION
        table.add_row(name, Text(value, style="yellow" if alarming else ""))
    if report.survey is None:
        return table
    rows = Table(title="the rows", show_header=False, title_justify="left", min_width=60)
    for name, value in report.survey.lines():
        rows.add_row(name, Text(value, style="yellow" if name in WHY else ""))
    return Group(table, rows)


def tokens(row: dict[str, Any]) -> RenderableType:
    """One row of `preflight.shown_rows`: trained tokens on green, lighter or darker where their weight is not 1, the
    others by role."""
    text, weights = Text(), [token["weight"] for token in row["tokens"]]
    for token, weight in zip(row["tokens"], weights, strict=True):
        text.append(token["text"], style=_weight_style(weight) if weight else ROLE_STYLES[token["role"]])
    legend = Text.assemble(("trained", TRAINED), "  ")
    for name, some in (("less", [w for w in weights if 0 < w < 1]), ("more", [w for w in weights if w > 1])):
        if some:
            legend.append(f"with {name} weight", style=_weight_style(some[0])).append("  ")
    for role, style in ROLE_STYLES.items():
        legend.append(f"{role}  ", style=style)
    return Panel(Group(text, Text(), legend), title=Text(row["where"]), title_align="left")


def _weight_style(weight: float) -> str:
    return TRAINED if weight == 1 else TRAINED_LESS if weight < 1 else TRAINED_MORE


def progress(console: Console) -> Progress:
    """A live bar: what, how far, how long, and a field `now` for the latest figures."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
        console=console,
    )


def side_by_side(samples: Sequence[dict[str, str]]) -> RenderableType:
    """Held-out answers before and after, with what was asked and what was wanted: in columns, or under each other where
    a text is too long to be read in a column."""
    if any(len(text) > COLUMN_CHARACTERS or text.count("\n") > COLUMN_LINES for s in samples for text in s.values()):
        return Group(Text("held-out answers", style="italic"), *(_full_width(sample) for sample in samples))
    table = Table(title="held-out answers", title_justify="left", show_lines=True, expand=True)
    for name, ratio in COLUMNS.items():
        table.add_column(name, ratio=ratio, style="bold green" if name == "tuned" else "", overflow="fold")
    for sample in samples:
        table.add_row(*(Text(sample.get(name, "")) for name in COLUMNS))
    return table


COLUMNS = {"asked": 4, "wanted": 2, "base": 3, "tuned": 2}
"""What is shown of a held-out answer, and the width that each has beside the others."""
COLUMN_CHARACTERS, COLUMN_LINES = 300, 8
"""The longest text, and the most line breaks in it, for a column."""


def _full_width(sample: dict[str, str]) -> RenderableType:
    """A held-out answer at full width."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style="bold", width=max(map(len, COLUMNS)))
    table.add_column(ratio=1, overflow="fold")
    for name in COLUMNS:
        if text := sample.get(name, ""):
            table.add_row(Text(name), Text(text, style="green" if name == "tuned" else ""))
    return Group(Rule(style="dim"), table)


def results(summary: dict[str, Any]) -> RenderableType:
    """The figures of `summary.json` that one wants to see first."""
    table = Table(title="result", title_justify="left")
    for heading in ("held out", "base", "tuned"):
        table.add_column(heading, justify="left" if heading == "held out" else "right")
    for name, label in (("loss_nats", "loss, nats per supervised token"), ("rouge_l", "ROUGE-L F1")):
        figures = summary["held_out"][name]
        table.add_row(label, *("-" if figures[k] is None else f"{figures[k]:.3f}" for k in ("base", "tuned")))
    compared = summary["held_out"].get("objective")
    for name in compared["tuned"] if compared else ():
        table.add_row(name.replace("_", " "), *(f"{compared[k][name]:.3f}" for k in ("base", "tuned")))
    train = summary["train"]
    speed = Text(
        f"{train['steps']} steps, {train['supervised_tokens']:,} supervised tokens, "
        f"{train['tokens_per_s']:,.0f} tokens/s, {train['wall_s']:.0f} s, at most {train['peak_rss_gib']:.2f} GiB"
    )
    return Group(table, speed)
