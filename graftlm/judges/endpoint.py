"""A judge behind an OpenAI-compatible endpoint: what is asked, and the grades from 1 to 5 that it writes.

A judge on this machine is asked directly, whatever proxies the environment names, and gets a key only if the config
names one. No redirect is followed: it would carry rows and key to a host that nobody allowed.
"""

import ipaddress
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from pydantic import field_validator

from graftlm.config.schema import PositiveCount, config
from graftlm.errors import DataError

ATTEMPTS = 4
"""For an endpoint that is busy or down, with 1, 2 and 4 seconds between them."""

GRADE = (
    "Below is a question and an answer to it. How good is the answer: right, complete, clear and to the point? "
    "Reply with one number from 1 (useless) to 5 (could not be better) and nothing else.\n\n"
    "[Question]\n{question}\n\n[Answer]\n{answer}"
)


@config
class EndpointConfig:
    """The keys of all that asks a judge, beside its `url`."""

    model: str | None = None
    """The name of the endpoint's model."""
    key_from: str | None = None
    """The environment variable that holds the endpoint's key; the key itself is written nowhere. By default
    OPENAI_API_KEY for an endpoint on another machine, and no key for one on this machine."""
    prompt: str = GRADE
    """What the judge is asked; {question} and {answer} are replaced."""
    at_once: PositiveCount = 8
    """Requests under way at a time."""
    max_tokens: PositiveCount = 2048
    """The longest reply, in tokens, with what the judge thinks before its grade."""

    @field_validator("prompt")
    @classmethod
    def _shows_the_answer(cls, prompt: str) -> str:
        if "{answer}" not in prompt:
            raise ValueError("the prompt must hold {answer}, and {question} where it matters")
        return prompt


class Endpoint(Protocol):
    """What is known of an endpoint."""

    @property
    def url(self) -> str | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def key_from(self) -> str | None: ...
    @property
    def at_once(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...


def is_local(url: str) -> bool:
    """Whether the host of a URL is this machine by its name: localhost or a loopback address."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check(endpoint: Endpoint, *, network: bool) -> str | None:
    """The key; DataError where there is none, or where something would be sent to another machine without leave."""
    url = endpoint.url or ""
    if not is_http(url):
        raise DataError(
            f"judge: url: {url!r} is no http address. Write it up to /v1, as in http://localhost:8000/v1",
            code="invalid-url",
        )
    local = is_local(url)
    if not local and not network:
        raise DataError(
            f"judge: {url} is not on this machine, and would be sent every row. Allow it: `network: true` in "
            "the recipe, --network on the command line",
            code="network-not-allowed",
        )
    variable = key_variable(url, endpoint.key_from)
    key = os.environ.get(variable) if variable else None
    if variable and not key:
        raise DataError(
            f"judge: the environment variable {variable} holds no key. Set it, or name another: key_from",
            code="missing-api-key",
        )
    return key


def ask(endpoint: Endpoint, key: str | None, questions: Sequence[str]) -> Iterator[str]:
    """The replies, in the order of the questions, each as soon as it and those before it are there."""
    with ThreadPoolExecutor(endpoint.at_once) as workers:
        yield from workers.map(partial(_ask, endpoint, key), questions)


def filled(prompt: str, texts: Mapping[str, str]) -> str:
    """The prompt with each {name} replaced by its text; braces that stand in a text are left as they are."""
    return re.sub(f"{{({'|'.join(texts)})}}", lambda name: texts[name[1]], prompt)


def grades(replies: Sequence[str]) -> list[float | None]:
    """The grade in each reply; None where there is none. DataError where that is so in more than half of them."""
    found = [grade(reply) for reply in replies]
    silent = sum(each is None for each in found)
    if silent > len(replies) / 2:
        first = next(reply for reply, each in zip(replies, found, strict=True) if each is None)
        raise DataError(
            f"judge: {silent} of {len(replies)} replies hold no grade from 1 to 5. The first of them: {first!r}",
            code="ungraded-replies",
        )
    return found


_NUMBER = r"(?<![\d.,A-Za-z])(?<!\s[-\u2212])(?<!^[-\u2212])(\d+(?:[.,]\d+)?)(?![\dA-Za-z%]|[.,]\d)"
"""A number that stands alone, without a minus."""

_SCALE = re.compile(
    r"\b(?:from |between )?1(?: *\([^)]*\))?(?: *(?:-|\u2013|\u2014|\.\.+|…|~) *| (?:to|through|and|bis|a|à) )"
    r"5(?: *\([^)]*\))?(?![\d.,]*\d)",
    re.IGNORECASE,
)
"""The scale itself: "1 to 5", "1-5", "from 1 (useless) to 5 (could not be better)"."""

_SHARE = re.compile(rf"{_NUMBER}\s*(?:/|out of|of)\s*(\d+)(?![.,]?\d)", re.IGNORECASE)
"""4/5, 4 out of 5, and shares of something else: "2 of 3 facts"."""

_LABELLED = re.compile(
    r"(?:\b(?:grade|score|rating|verdict)\b[^\w\n]*(?:is\b|=|:)[^\w\n]*|"
    r"\b(?:give|rate|grade|score)s? (?:(?:it|this|that|the answer|this answer) )?(?:an? |with )?[^\w\n-]*)"
    rf"{_NUMBER}",
    re.IGNORECASE,
)
"""A number that is called the grade: "Grade: 4", "the score is **4**", "I give it a 4"."""


def grade(reply: str) -> float | None:
    """The grade from 1 to 5 that a reply gives; None where it gives none, one off the scale, or several.

    What a judge thinks before it answers does not count. A number that the reply calls its grade comes first, then the
    only number of the last line, then one that the reply begins with, then the only number of the reply.
    """
    text = re.sub(r"<think(ing)?>.*?(</think(ing)?>|\Z)", "", reply, flags=re.DOTALL | re.IGNORECASE)
    text = text.rpartition("</think>")[2]  # of a template that opens the thinking in the prompt
    text = _SCALE.sub(" ", re.sub(r"[*_`#]", "", text))
    text = _SHARE.sub(lambda share: f" {share[1]} " if share[2] == "5" else " ", text).strip()
    if labelled := _LABELLED.findall(text):
        return _on_scale(labelled[-1])
    lines = text.splitlines() or [""]
    alone = re.fullmatch(rf"\W*?{_NUMBER}\W*", lines[-1])
    begins = re.match(rf"{_NUMBER}(?=\s*$|[.:;,)](?:\s|$)|\s*\n|\s+[-\u2013\u2014]\s)", text)
    if first := alone or begins:
        return _on_scale(first[1])
    only = set(re.findall(_NUMBER, text))
    return _on_scale(only.pop()) if len(only) == 1 else None


def _on_scale(number: str) -> float | None:
    found = float(number.replace(",", "."))
    return found if 1 <= found <= 5 else None


class _NoRedirect(HTTPRedirectHandler):
    http_error_308 = HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        fp.close()
        raise DataError(
            f"{req.full_url} redirects to {newurl}. Nothing was sent there. If you trust it: url",
            code="endpoint-redirects",
        )


def opener(url: str) -> OpenerDirector:
    """For requests to a URL: those to this machine go through no proxy, and no redirect is followed (DataError)."""
    return build_opener(_NoRedirect, *([ProxyHandler({})] if is_local(url) else []))


class RefusedError(Exception):
    """A request that an endpoint does not answer as asked; `status` is the HTTP status of its reply."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may be answered later."""
        return self.status in (408, 429) or self.status >= 500


class UnreachableError(Exception):
    """An endpoint that sends no reply."""


def json_reply(
    url: str,
    body: Mapping[str, Any] | None,
    key: str | None,
    *,
    timeout: float,
    attempts: int,
    retry_timeouts: bool = True,
) -> Any:
    """The JSON that an endpoint replies to a POST of `body`, or to a GET where it is None.

    An endpoint that is busy or down is asked again after 1, 2, 4, ... seconds.

    `timeout`, in seconds, is for each attempt. Raises RefusedError for a status that is an error, UnreachableError
    where no reply comes, and ValueError for a reply that is no JSON.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data, director = None if body is None else json.dumps(body).encode(), opener(url)
    failure: RefusedError | UnreachableError | None = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            with director.open(Request(url, data, headers), timeout=timeout) as reply:  # noqa: S310
                return json.load(reply)
        except HTTPError as error:
            message = f"{error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
            failure = RefusedError(error.code, message)
            if not failure.is_temporary:
                break
        except (URLError, TimeoutError, ConnectionError) as error:
            failure = UnreachableError(str(error))
            if "timed out" in str(error) and not retry_timeouts:
                break
    assert failure is not None, "there is one attempt at least"
    raise failure


def key_variable(url: str, key_from: str | None) -> str | None:
    """The environment variable that holds the key of an endpoint: OPENAI_API_KEY for one on another machine, unless
    `key_from` names another; None where no key is sent."""
    return key_from or (None if is_local(url) else "OPENAI_API_KEY")


def is_http(url: str) -> bool:
    return urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)


def _ask(endpoint: Endpoint, key: str | None, question: str) -> str:
    body: dict[str, Any] = {"model": endpoint.model or "", "temperature": 0, "max_tokens": endpoint.max_tokens}
    body["messages"] = [{"role": "user", "content": question}]
    url = f"{(endpoint.url or '').rstrip('/')}/chat/completions"
    try:
        found = json_reply(url, body, key, timeout=120, attempts=ATTEMPTS)
        return str(found["choices"][0]["message"]["content"] or "")
    except (RefusedError, UnreachableError) as error:
        if isinstance(error, RefusedError) and not error.is_temporary:
            raise DataError(
                f"judge: {url} refuses: {error}. Look at url, model and key_from", code="endpoint-refuses"
            ) from None
        raise DataError(
            f"judge: {url} did not answer in {ATTEMPTS} attempts: {error}", code="endpoint-unreachable"
        ) from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"judge: {url} does not answer as an OpenAI-compatible endpoint does: {error!r}",
            code="endpoint-incompatible",
        ) from None
