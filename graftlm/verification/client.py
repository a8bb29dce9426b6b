"""A server's replies to prompts: whatever of the OpenAI-compatible routes it has, in whatever form it answers.

The user names the server, and only prompts of ours and the adapter's name are sent, so another machine needs no further
leave. A server on this machine is asked through no proxy, and no redirect is followed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from graftlm.errors import DataError, nearest
from graftlm.judges.endpoint import RefusedError, UnreachableError, is_http, json_reply, key_variable

ATTEMPTS = 3
"""For a server that is busy or down, with 1 and 2 seconds between them."""

TOP, FEWER = 20, 5
"""Log-probabilities asked for a prompt: vLLM gives 20 at most by default, OpenAI's completions 5."""

GREEDY_TOKENS = 24
"""Of an answer whose text alone is compared."""

LOWEST = -30.0
"""Nats: log-probabilities below are those of tokens that a sampler excluded."""

COMPLETIONS, CHAT = "completions", "chat/completions"


@dataclass(frozen=True)
class Prompt:
    """One prompt in all its forms."""

    question: str
    ids: Sequence[int]
    """As the adapter's own template renders it."""
    text: str | None
    """What a server tokenizes to `ids`; None where there is no such text."""


@dataclass(frozen=True)
class Reply:
    top: list[tuple[int | str, float]]
    """(token, its log-probability in nats) for the first token of the answer; by id or by text. Empty if not said."""
    text: str
    prompt_tokens: int | None
    """As the server counts them."""


def api_key(url: str, key_from: str | None) -> str | None:
    """The key in the environment; DataError for a URL that is none, or for a variable that was named and is empty."""
    if not is_http(url):
        raise DataError(
            f"URL: {url!r} is no http address. Write it up to /v1, as in http://localhost:8000/v1", code="invalid-url"
        )
    if key_from is not None and not os.environ.get(key_from):
        raise DataError(
            f"--key-from: the environment variable {key_from} holds no key. Set it, or name another",
            code="missing-api-key",
        )
    variable = key_variable(url, key_from)
    return os.environ.get(variable) if variable else None


class Server:
    """An OpenAI-compatible server by its URL, in which a missing path is /v1, and one of its models."""

    def __init__(self, url: str, key: str | None, *, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        if not urlsplit(self.url).path:
            self.url += "/v1"
        self._key = key

    def models(self) -> list[dict[str, Any]]:
        """What /models lists; nothing where the server has no such route."""
        try:
            listed = self._ask("models", None).get("data", [])
        except RefusedError:
            return []
        return [each for each in listed if isinstance(each, dict) and isinstance(each.get("id"), str)]

    def reply(self, path: str, body: dict[str, Any]) -> Reply:
        """Raises RefusedError for a request that is not answered, DataError for a server that cannot be asked."""
        answer = self._ask(path, body)
        try:
            return read_reply(answer)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._incompatible(path, error) from None

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        url = f"{self.url}/{path}"
        try:
            found = json_reply(url, body, self._key, timeout=self.timeout, attempts=ATTEMPTS, retry_timeouts=False)
        except RefusedError as error:
            if error.status not in (401, 403):
                raise
            raise DataError(
                f"{url} refuses: {error}. Name the environment variable that holds the server's key: --key-from",
                code="endpoint-refuses",
            ) from None
        except UnreachableError as error:
            raise DataError(
                f"{url} did not answer: {error}. Start the server, correct the URL (it ends in /v1), or wait longer: "
                "--timeout",
                code="endpoint-unreachable",
            ) from None
        except ValueError as error:
            raise self._incompatible(path, error) from None
        if not isinstance(found, dict):
            raise self._incompatible(path, ValueError(f"a {type(found).__name__} in place of an object"))
        return found

    def _incompatible(self, path: str, error: Exception) -> DataError:
        return DataError(
            f"{self.url}/{path} does not answer as an OpenAI-compatible server does: {error!r}",
            code="endpoint-incompatible",
        )


def read_reply(answer: dict[str, Any]) -> Reply:
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    text = choice["text"] if "text" in choice else choice["message"].get("content")
    count = usage.get("prompt_tokens")
    return Reply(_top(choice.get("logprobs") or {}), str(text or ""), None if count is None else int(count))


def _top(logprobs: dict[str, Any]) -> list[tuple[int | str, float]]:
    """Of the first new token, in either form: `content`, a list of objects, or `top_logprobs`, one mapping a token."""
    if content := logprobs.get("content"):
        found = [(each.get("id", each["token"]), each["logprob"]) for each in (content[0]["top_logprobs"] or [])]
    elif tops := logprobs.get("top_logprobs"):
        found = list((tops[0] or {}).items())
    else:
        return []
    known = {
        int(token.removeprefix("token_id:")) if str(token).startswith("token_id:") else token: float(value)
        for token, value in found
        if value is not None
    }
    if any(value > 1e-3 or value != value for value in known.values()):
        raise ValueError(f"log-probabilities above 0: {known}")
    return [(token, value) for token, value in known.items() if value > LOWEST]


# Routes ---------------------------------------------------------------------------------------------------------------


class Route:
    """One way of asking, in the richest form that the server understands. RefusedError where it understands none."""

    def __init__(self, server: Server, path: str, model: str, first: Prompt) -> None:
        self.server, self.path, self.model = server, path, model
        refused: RefusedError | None = None
        for self.by, self.extra in _forms(path):
            try:
                reply = self.ask(first)
            except RefusedError as error:
                refused = error
                continue
            if reply.top or not self.extra:
                return
        assert refused is not None, "the last form asks for no log-probabilities"
        raise refused

    @property
    def has_logprobs(self) -> bool:
        return bool(self.extra)

    def ask(self, prompt: Prompt) -> Reply:
        """Raises RefusedError for a prompt that the server does not read as it is."""
        body: dict[str, Any] = {"model": self.model, **self.extra}
        # Log-probabilities at temperature 1 are those of the model, whether a server reports them before or after it.
        body |= {"max_tokens": 1, "temperature": 1, "top_p": 1} if self.extra else {}
        body |= {} if self.extra else {"max_tokens": GREEDY_TOKENS, "temperature": 0}
        if self.by == "messages":
            body["messages"] = [{"role": "user", "content": prompt.question}]
            return self.server.reply(self.path, body)
        if self.by == "text" and prompt.text is None:
            raise RefusedError(0, "no text has the tokens of the prompts")
        body["prompt"] = list(map(int, prompt.ids)) if self.by == "ids" else prompt.text
        reply = self.server.reply(self.path, body)
        if reply.prompt_tokens not in (None, len(prompt.ids)):
            raise RefusedError(200, f"the server reads {reply.prompt_tokens} tokens in a prompt of {len(prompt.ids)}")
        return reply


def _forms(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(how prompts are given, what asks for log-probabilities), the richest first. One that asks for none is last."""
    by_id = {"return_tokens_as_token_ids": True}  # vLLM's; most servers ignore it, strict ones refuse it
    if path == CHAT:
        asked = [{"logprobs": True, "top_logprobs": count} for count in (TOP, FEWER)]
        return [("messages", extra) for extra in (asked[0] | by_id, *asked, {})]
    few = [{"logprobs": count} for count in (TOP, FEWER)]
    asking = [(by, extra) for by in ("ids", "text") for extra in (few[0] | by_id, *few)]
    return [*asking, ("ids", {}), ("text", {})]


def choose_model(listed: Sequence[dict[str, Any]], folder_name: str, wanted: str | None) -> str:
    """The model to ask: the wanted one, that of the folder's name, the only adapter, or the only model.

    DataError where none of these is there.
    """
    if wanted is not None:
        return wanted
    names = [each["id"] for each in listed]
    adapters = [each["id"] for each in listed if each.get("parent")]
    own = [name for name in names if name == folder_name or name.endswith(f":{folder_name}")]
    for found in (own[:1], adapters, names):
        if len(found) == 1:
            return str(found[0])
    raise DataError(
        f"the server has no model {folder_name!r}, which is the adapter's folder name: say by which name it serves the "
        f"adapter (--model). {nearest(folder_name, names)}",
        code="unknown-model",
    )
