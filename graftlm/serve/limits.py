"""What a request may cost, and how its JSON is read: bounded, strict, and never a failure of the server."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from graftlm.errors import nearest
from graftlm.serve.errors import ApiError, invalid


@dataclass(frozen=True)
class Limits:
    """The bounds of a server."""

    body_bytes: int = 4 * 2**20
    body_seconds: float = 60.0
    """Time for a body to come."""
    depth: int = 64
    """Nesting of the JSON of a request."""
    queue: int = 256
    """Answers that wait for their turn; more are refused with 429."""
    timeout: float = 600.0
    """Seconds for a request from its arrival to its last byte."""
    choices: int = 16
    """Answers to one request: `n`, and prompts of a completion times n."""
    inputs: int = 256
    """Texts of one request for embeddings."""
    drain: float = 30.0
    """Seconds that running requests have to end when the server stops."""
    ping: float = 5.0
    """Seconds of silence on a stream after which a comment is sent, so that nothing between takes it for dead."""


LARGEST_NUMBER = 2**63


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object that is the body of a request. Raises ApiError for anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"the body must be application/json, its Content-Type is {kind or 'missing'}", code="content_type"
        )
    try:
        body = await asyncio.wait_for(_body(request, limits.body_bytes), limits.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.body_seconds:g} seconds", code="slow_body") from None
    return parse_object(body, limits.depth)


async def _body(request: Request, most: int) -> bytes:
    """The body, counted as it comes: what a header says of its length is not believed."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, f"the body has more than {most:,} bytes, the most that is read", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def parse_object(body: bytes, depth: int) -> dict[str, Any]:
    """JSON -> dict. Raises ApiError (400) where it is none, nested deeper than `depth`, or holds what is no text or no
    finite number."""

    def refuse(constant: str) -> Any:
        raise invalid(f"the body holds {constant}, which is no JSON", code="invalid_json")

    try:
        tree = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_utf8") from None
    except RecursionError:
        raise _too_deep(depth) from None
    except ValueError as error:  # no JSON, or an integer of thousands of digits
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise invalid(f"the body must be a JSON object, this is a {type(tree).__name__}", code="invalid_json")
    _check(tree, depth)
    return tree


def _too_deep(depth: int) -> ApiError:
    return invalid(f"the body is nested deeper than {depth} levels", code="too_deep")


def _check(tree: Any, most: int) -> None:
    """Walk the tree without recursion."""
    stack = [(tree, 1)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int | float):
            if abs(value) >= LARGEST_NUMBER:  # infinity too; NaN is no JSON
                raise invalid("the body holds a number that is too large", code="invalid_number")
        elif depth > most:
            raise _too_deep(most)
        else:
            if isinstance(value, dict):
                stack += [(key, depth) for key in value]
                value = value.values()
            stack += [(one, depth + 1) for one in value]


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid(
            f"a text of the body has half of a surrogate pair ({text[error.start]!a}), which is no character",
            code="invalid_text",
        ) from None


def unknown_field(name: str, known: Any, where: str = "") -> ApiError:
    """The error for a field that this route does not have."""
    return invalid(f"unknown field {where}{name!r}. {nearest(name, known)}", f"{where}{name}", "unknown_field")
