"""The page of `graft data check --html`: the report, and rows to leaf through. One file, nothing fetched.

Rows are from anywhere, so everything is text: the report is escaped by jinja2, rows travel as JSON in which no markup
can stand and are set as text, and the page's own policy forbids it to load anything.
"""

import json
from pathlib import Path
from typing import Any

from graftlm.data.chat.roles import Role
from graftlm.data.quality.preflight import shown_rows
from graftlm.data.quality.report import Lengths
from graftlm.data.quality.survey import WHY, evenly
from graftlm.data.sources.source import DataConfig, Row
from graftlm.display import pages
from graftlm.files import whole
from graftlm.prepare import Prepared

SAMPLED = 200
"""Rows at even distances that are shown whatever they hold."""

MAX_ROWS = 2_000
"""Rows on the page, the suspicious ones included."""

MAX_TOKENS = 4_000
"""The most tokens of one row that the page shows."""

LISTED = 30
"""Rows of a kind that the table of findings names; the page can be set to show the others one by one."""

WIDTH, HEIGHT = 420, 120
"""The size of a histogram, in pixels."""


def write(file: Path, data: Prepared, config: DataConfig, *, title: str) -> None:
    """Write the page; raises OutputError where it cannot be written."""
    with whole(file) as draft:
        draft.write_text(html(data, config, title=title), encoding="utf-8")


def html(data: Prepared, config: DataConfig, *, title: str) -> str:
    """The page of rows that were looked at (`prepare_data(..., look=True)`)."""
    preflight, survey = data.report, data.report.survey
    assert survey is not None
    notes: dict[str, list[tuple[str, str]]] = {}
    for finding in survey.findings:
        for entry in finding.entries:
            for where in entry.rows:
                others = ", ".join(other for other in entry.rows[:3] if other != where)
                note = f"{entry.note} ({others})" if entry.note and others else entry.note or others
                notes.setdefault(where, []).append((finding.kind, note))
    rows = _rows_to_show(data, notes)
    token_rows = [
        _row_json(piece, notes, config.max_tokens)
        for row in rows
        for piece in shown_rows([row], data.renderer, config, 1)
    ]
    place = {piece["where"]: i for i, piece in reversed(list(enumerate(token_rows)))}
    findings = []
    for finding in survey.findings:
        places_of_finding = list(dict.fromkeys(where for entry in finding.entries for where in entry.rows))
        listed = [(where, place[where]) for where in places_of_finding if where in place][:LISTED]
        if places_of_finding:
            facts = {"kind": finding.kind, "why": finding.why, "count": finding.count}
            findings.append(facts | {"places": listed, "more": len(places_of_finding) - len(listed)})
    left_out, total = len(notes.keys() - place.keys()), len(data.rows) + len(data.held_out_rows)
    return pages.page(
        "check.html.jinja",
        title=title,
        lines=[*preflight.lines(), *(line for line in survey.lines() if line[0] not in WHY)],  # those are below
        histograms=[("prompts", _bars(preflight.prompt_tokens)), ("answers", _bars(preflight.answer_tokens))],
        findings=findings,
        roles=[role.label for role in Role],
        sampled=f"{len(rows):,} of {total:,} rows: a sample at even distances, and those with findings."
        if len(rows) < total
        else "All rows.",
        limit_text=f"{left_out:,} more of these are left out." if left_out else "",
        rows=_json(token_rows),
    )


def _rows_to_show(data: Prepared, notes: dict[str, Any]) -> list[Row]:
    """A sample of the training rows and whatever is noted of any row, in order."""
    sample = set(evenly(len(data.rows), SAMPLED))
    every = [*data.rows, *data.held_out_rows]
    suspicious = [i for i, row in enumerate(every) if row.where in notes and i not in sample]
    return [every[i] for i in sorted(sample | set(suspicious[: MAX_ROWS - len(sample)]))]


def _row_json(piece: dict[str, Any], notes: dict[str, list[tuple[str, str]]], most: int) -> dict[str, Any]:
    tokens = [[token["text"], token["role"], token["weight"], token["id"]] for token in piece["tokens"]]
    return {
        "where": piece["where"],
        "found": notes.get(piece["where"], []),
        "tokens": tokens[:MAX_TOKENS],
        "left": len(tokens) - len(tokens[:MAX_TOKENS]),
        "limit": most,
    }


def _json(tree: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(tree)  # all but ASCII is escaped already
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _bars(lengths: Lengths) -> list[dict[str, Any]]:
    edges, rows = lengths.histogram()
    width, most = WIDTH / len(rows), max(1, *rows)
    return [
        {
            "x": round(i * width, 2),
            "y": round(HEIGHT * (1 - count / most), 2),
            "width": round(width - 1, 2),
            "height": round(HEIGHT * count / most, 2),
            "start": edges[i],
            "end": edges[i + 1] - 1,
            "title": f"{edges[i]:,} to {edges[i + 1] - 1:,} tokens: {count:,} rows",
        }
        for i, count in enumerate(rows)
    ]
