"""A judge behind an OpenAI-compatible endpoint: what is asked, and the grades from 1 to 5 that it writes."""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from pydantic import field_validator

from graftlm.config import PositiveCount, config
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
    key_from: str = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key; the key itself is written nowhere."""
    prompt: str = GRADE
    """What the judge is asked; {question} and {answer} are replaced."""
    at_once: PositiveCount = 8
    """Requests under way at a time."""

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
    def key_from(self) -> str: ...
    @property
    def at_once(self) -> int: ...


def check(endpoint: Endpoint, *, network: bool) -> str | None:
    """The key; DataError where there is none, or where something would be sent to another machine without leave."""
    local = urlsplit(endpoint.url or "").hostname in ("localhost", "127.0.0.1", "::1")
    if not local and not network:
        raise DataError(
            f"judge: {endpoint.url} is not on this machine, and would be sent every row. Allow it: `network: true` in "
            "the recipe, --network on the command line"
        )
    key = os.environ.get(endpoint.key_from)
    if not key and not local:
        raise DataError(
            f"judge: the environment variable {endpoint.key_from} holds no key. Set it, or name another: key_from"
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
    read = [re.search(r"(?<![\d.])[1-5](\.\d+)?(?![\d])", reply) for reply in replies]
    silent = sum(grade is None for grade in read)
    if silent > len(replies) / 2:
        first = next(reply for reply, grade in zip(replies, read, strict=True) if grade is None)
        raise DataError(
            f"judge: {silent} of {len(replies)} replies hold no grade from 1 to 5. The first of them: {first!r}"
        )
    return [None if grade is None else float(grade[0]) for grade in read]


def _ask(endpoint: Endpoint, key: str | None, question: str) -> str:
    body = {"model": endpoint.model or "", "temperature": 0, "max_tokens": 8}
    body["messages"] = [{"role": "user", "content": question}]
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    url = f"{(endpoint.url or '').rstrip('/')}/chat/completions"
    for attempt in range(ATTEMPTS):
        try:
            with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=120) as reply:  # noqa: S310
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except HTTPError as error:
            said = f"{error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
            if error.code not in (408, 429) and error.code < 500:
                raise DataError(f"judge: {url} refuses: {said}. Look at url, model and key_from") from None
        except (URLError, TimeoutError, ConnectionError) as error:
            said = str(error)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"judge: {url} does not answer as an OpenAI-compatible endpoint does: {error!r}") from None
        if attempt + 1 < ATTEMPTS:
            time.sleep(2**attempt)
    raise DataError(f"judge: {url} did not answer in {ATTEMPTS} attempts: {said}")
