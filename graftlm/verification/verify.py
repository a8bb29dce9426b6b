"""Proof that a server applies an adapter: its answers, compared with those that are computed here.

    found = verify("http://localhost:8000/v1", "parcels")
    found.verdict          # "applied", "base", "wrong scale", "another adapter", "another template" or "undecided"

The server is asked prompts on which base and adapter differ most. Where it reports log-probabilities, each hypothesis
predicts these numbers (`graftlm/verification/decide.py`); else the tokens of its greedy answers are compared, which
proves less. Each route is judged by itself: servers exist that apply an adapter in one of them alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graftlm.errors import DataError
from graftlm.judges.endpoint import RefusedError
from graftlm.verification.client import (
    CHAT,
    COMPLETIONS,
    Prompt,
    Reply,
    Route,
    Server,
    api_key,
    choose_model,
)
from graftlm.verification.compare import RouteFinding, compare_greedy, compare_numbers
from graftlm.verification.decide import ADAPTER, BASE, Outcome
from graftlm.verification.local import OWN, TODAY, Local, load
from graftlm.verification.prompts import PROMPTS

COUNT = 24
"""Prompts that a server is asked."""

EXIT_CODES: dict[Outcome, int] = {
    "applied": 0,
    "base": 3,
    "wrong scale": 3,
    "another adapter": 3,
    "another template": 3,
    "undecided": 4,
}

OnProgress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much."""


@dataclass(frozen=True)
class Verification:
    """What a server serves, by its answers."""

    url: str
    model: str
    """As the server calls it."""
    verdict: Outcome
    why: str
    factor: float | None
    """The factor on the adapter's own scale that explains the answers best; None where none was fitted."""
    routes: list[RouteFinding]
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"exit_code": self.exit_code}


def verify(
    url: str,
    adapter: str | Path,
    *,
    model: str | None = None,
    base: str | None = None,
    others: Sequence[str | Path] = (),
    prompts: Sequence[str] = PROMPTS,
    key_from: str | None = None,
    timeout: float = 120.0,
    dtype: str | None = None,
    quantization: str | None = None,
    network: bool = False,
    on_progress: OnProgress | None = None,
) -> Verification:
    """What the server at `url` serves under the name `model`: the adapter in this folder, or what else.

    `url` ends in /v1, which is added to one without a path. `model` is the name by which the server knows the
    adapter, by default that of the folder or of its only adapter. `base` is by default the one that the adapter
    names; `dtype` and `quantization` are those of its weights here. `others` are adapters that may be served
    instead. `prompts` are questions, of which those are asked on which the adapter acts most. `key_from` names the
    environment variable that holds the server's key. `timeout`, in seconds, is for each request. `network` allows
    the base to be fetched.

    Raises DataError for a server that cannot be asked or does not answer, and what loading base and adapters raises.
    """
    report = on_progress or (lambda what, done, total: None)
    folder = Path(adapter)
    server = Server(url, api_key(url, key_from), timeout=timeout)
    listed = server.models()
    name = choose_model(listed, folder.resolve().name, model)
    local = load(
        folder, [Path(each) for each in others], base=base, dtype=dtype, quantization=quantization, network=network
    )
    chosen = [local.prompt(each) for each in _most_different(local, prompts, report)]
    routes: list[RouteFinding] = []
    refused: dict[str, RefusedError] = {}
    for path in (CHAT, COMPLETIONS) if local.renderers else (COMPLETIONS,):
        try:
            route = Route(server, path, name, chosen[0])
        except RefusedError as error:
            refused[path] = error
            continue
        replies = _ask(route, chosen, report)
        compare = compare_numbers if route.has_logprobs else compare_greedy
        routes.append(compare(local, path, route.by, chosen, replies, report))
    if not routes:
        raise _no_route(server, name, [each["id"] for each in listed], refused)
    worst = min(routes, key=lambda each: _ORDER.index(EXIT_CODES[each.verdict]))
    notes = [f"{path} was not compared: {error}" for path, error in refused.items()]
    return Verification(url, name, worst.verdict, worst.why, worst.factor, routes, [*notes, *_notes(worst, local)])


_ORDER = (3, 0, 4)
"""A route that does not apply the adapter outweighs one that does, and this one that cannot be decided."""


def _most_different(local: Local, questions: Iterable[str], report: OnProgress) -> list[str]:
    """The questions after which base and adapter differ most: by the mean difference over the most likely tokens."""
    questions = list(dict.fromkeys(each for each in questions if each.strip()))
    if not questions:
        raise DataError("no prompts: give questions, one a line (--prompts)", code="no-prompts")
    ids = [local.ids(question, "") for question in questions]
    rows = (local.row(BASE), local.row(ADAPTER))
    differences: list[float] = []
    for base, adapter in zip(*(local.next_log_probs(ids, row) for row in rows), strict=True):
        likely = (base.topk(10).indices, adapter.topk(10).indices)
        differences.append(float(sum((base - adapter)[each].abs().sum() for each in likely)))
        report("choosing prompts", len(differences), len(questions))
    order = sorted(range(len(questions)), key=lambda number: -differences[number])
    return [questions[number] for number in order[:COUNT]]


def _ask(route: Route, prompts: Sequence[Prompt], report: OnProgress) -> list[Reply | None]:
    """A reply a prompt; None for one that cannot be asked in the form that the server understands."""
    replies: list[Reply | None] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            replies.append(route.ask(prompt))
        except RefusedError as error:
            if error.status not in (0, 200):
                raise DataError(
                    f"{route.server.url}/{route.path} answers some prompts and refuses another: {error}",
                    code="endpoint-refuses",
                ) from None
            replies.append(None)
        report(f"asking {route.path}", number, len(prompts))
    return replies


def _no_route(server: Server, model: str, names: Sequence[str], refused: dict[str, RefusedError]) -> DataError:
    said = "; ".join(f"{path}: {error}" for path, error in refused.items())
    listed = f"It lists the models {', '.join(names)}" if names else "It lists no models"
    return DataError(
        f"{server.url} answers no prompt for the model {model!r}: {said}. {listed}: look at the URL, which ends in "
        "/v1, and at --model",
        code="endpoint-refuses",
    )


def _notes(route: RouteFinding, local: Local) -> list[str]:
    """What a verdict may come from."""
    found = []
    if route.verdict == "base":
        found.append(
            "usual causes: the server ignores the name in `model` (llama-server does), has not loaded the adapter, or "
            "left out what it does not know (`graft export --to plain-lora` writes what every server reads)"
        )
    if route.verdict == "another template":
        found.append(
            f"prompts that are rendered with {OWN} template are answered right: give the server the adapter's "
            "chat_template.jinja (vLLM: --chat-template; llama-server: --chat-template-file)"
        )
    if route.verdict == "applied" and route.template == TODAY:
        found.append("the template writes today's date, in training it wrote that of the training")
    return found + ([] if local.can_scale else ["a prefix or prompt is there or not, so no scale was fitted"])
