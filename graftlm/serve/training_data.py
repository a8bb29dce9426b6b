"""GET /data and /data/report: what `graft data check` says of rows, and some of them token by token, to look at."""

import threading
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse, Response

from graftlm.recipe import Recipe
from graftlm.rows import check_rows
from graftlm.serve.training_runs import finite

SHOWN = 100
"""Rows token by token: the first ones."""

LISTED = 20
"""Rows that a finding names."""


def gets(recipe: Recipe | None) -> dict[str, Callable[..., Any]]:
    """Path -> what answers it, over the rows of a recipe. They are checked once, when the first request for the report
    asks. No recipe: "source" is null, as a page that asks can know no better."""
    source = None if recipe is None else str(recipe.data.train)

    async def name() -> Response:
        return JSONResponse({"source": source})

    if recipe is None:
        return {"/data": name}
    lock, checked = threading.Lock(), dict[str, Any]()

    def answer() -> Response:  # not async: it renders rows, so it runs in a thread
        with lock:
            if not checked:
                checked.update(report_of(recipe))
        return JSONResponse(checked)

    return {"/data": name, "/data/report": answer}


def report_of(recipe: Recipe) -> dict[str, Any]:
    """{source, figures: [[name, value]], findings: [{kind, why, count, rows}], rows: [{where, tokens}]}"""
    data = check_rows(recipe, show=SHOWN)
    survey = data.report.survey
    assert survey is not None, "check_rows surveys unless it is told not to"
    findings = [
        {
            "kind": finding.kind,
            "why": finding.why,
            "count": finding.count,
            "rows": list(dict.fromkeys(where for entry in finding.entries for where in entry.rows))[:LISTED],
        }
        for finding in survey.findings
    ]
    tree = {"source": str(recipe.data.train), "figures": data.report.lines(), "findings": findings}
    shown: dict[str, Any] = finite(tree | {"rows": data.first_rows})
    return shown
