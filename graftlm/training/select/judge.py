"""Quality by a judge: AlpaGasus. Chen et al. 2023, arXiv:2307.08701, section 2: a strong model grades every row.

    score(z) = the grade, 1 to 5, that the judge writes             an OpenAI-compatible endpoint (`url`)
    score(z) = sum_k k p(k) / sum_k p(k),  k = 1 ... 5              a base of ours, from its next-token probabilities

The second is the expected grade of G-Eval (Liu et al. 2023, arXiv:2303.16634): a small base writes the same grade for
nearly every row, and its probabilities still tell rows apart. The paper keeps rows with 4.5 of 5 and more; here `least`
leaves out what has less.
"""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from pydantic import field_validator

from graftlm.config import PositiveCount, Rate, config
from graftlm.data.formats import TEXT, Message
from graftlm.data.pack import Example, collate
from graftlm.data.source import Row
from graftlm.errors import DataError
from graftlm.model.forward import log_probs
from graftlm.training.select.base import LEFT_OUT, Pool, Scores, SelectorConfig

GRADES = ("1", "2", "3", "4", "5")
ATTEMPTS = 4
"""For an endpoint that is busy or down, with 1, 2 and 4 seconds between them."""


@config
class JudgeConfig(SelectorConfig):
    by: Literal["judge"] = "judge"
    url: str | None = None
    """An OpenAI-compatible endpoint, up to /v1; without it the recipe's base judges. One that is not on this machine
    needs `network: true`."""
    model: str | None = None
    """The name of the endpoint's model."""
    key_from: str = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key; the key itself is written nowhere."""
    prompt: str = (
        "Below is a question and an answer to it. How good is the answer: right, complete, clear and to the point? "
        "Reply with one number from 1 (useless) to 5 (could not be better) and nothing else.\n\n"
        "[Question]\n{question}\n\n[Answer]\n{answer}"
    )
    """What the judge is asked; {question} and {answer} are replaced."""
    least: Rate = 0.0
    """The lowest grade that is not left out."""
    at_once: PositiveCount = 8
    """Requests under way at a time."""

    @field_validator("prompt")
    @classmethod
    def _shows_the_answer(cls, prompt: str) -> str:
        if "{answer}" not in prompt:
            raise ValueError("the prompt must hold {answer}, and {question} where it matters")
        return prompt


def score(config: JudgeConfig, pool: Pool) -> Scores:
    questions = [_question(config, row) for row in pool.rows]
    grades = _by_endpoint(config, pool, questions) if config.url else _by_base(pool, questions)
    kept = pool.usable & (grades >= config.least)
    return np.where(kept, grades, LEFT_OUT).astype(np.float32)


def _question(config: JudgeConfig, row: Row) -> str:
    """The row as the judge sees it: its last answer, and what was said before."""
    last = max(i for i, m in enumerate(row.messages) if m.role in ("assistant", TEXT))
    before = "\n\n".join(m.content for m in row.messages[:last])
    return config.prompt.replace("{question}", before).replace("{answer}", row.messages[last].content)


@torch.no_grad()
def _by_base(pool: Pool, questions: list[str]) -> Scores:
    """The expected grade under the base [n]."""
    digits = [pool.renderer.tokenizer.encode(grade, add_special_tokens=False) for grade in GRADES]
    if any(len(ids) != 1 for ids in digits):
        raise DataError("this base writes the digits 1 to 5 in several tokens: judge with an endpoint (`url`)")
    grades, found = torch.arange(1.0, 6.0), np.zeros(len(questions), np.float32)
    for number, question in enumerate(questions):
        prompt = pool.renderer.prompt([Message("user", question)])
        weights = np.append(np.zeros(len(prompt), np.float32), np.float32(1))
        asked = [Example(np.append(prompt, ids).astype(np.int32), weights, "") for ids in digits]
        pack = collate(asked, share=True).to(pool.model.device)
        with pool.attention():
            chance = log_probs(pool.model, pack).float().cpu()
        order = pack.targets.cpu().argsort()  # targets lie in the order of their ids
        place = torch.tensor([ids[0] for ids in digits]).argsort()
        found[number] = float(torch.softmax(chance[order], 0) @ grades[place])
        pool.progress("judging", number + 1, len(questions))
    return found


def _by_endpoint(config: JudgeConfig, pool: Pool, questions: list[str]) -> Scores:
    """The grades that the endpoint writes [n]; nan where it writes none, which is said."""
    assert config.url is not None
    local = urlsplit(config.url).hostname in ("localhost", "127.0.0.1", "::1")
    if not local and not pool.network:
        raise DataError(
            f"judge: {config.url} is not on this machine, and would be sent every row. Allow it: `network: true` in "
            "the recipe, --network on the command line"
        )
    key = os.environ.get(config.key_from)
    if not key and not local:
        raise DataError(
            f"judge: the environment variable {config.key_from} holds no key. Set it, or name another: key_from"
        )
    replies: list[str] = []
    with ThreadPoolExecutor(config.at_once) as workers:
        for reply in workers.map(partial(_ask, config, key), questions):
            replies.append(reply)
            pool.progress("judging", len(replies), len(questions))
    read = [re.search(r"(?<![\d.])[1-5](\.\d+)?(?![\d])", reply) for reply in replies]
    silent = [row.where for row, grade in zip(pool.rows, read, strict=True) if grade is None]
    if len(silent) > len(replies) / 2:
        raise DataError(
            f"judge: {len(silent)} of {len(replies)} replies hold no grade from 1 to 5. The first: {replies[0]!r}"
        )
    if silent:
        pool.notes.append(
            f"judge: {len(silent)} replies hold no grade, so their rows are left out: {', '.join(silent[:3])}"
        )
    return np.array([np.nan if grade is None else float(grade[0]) for grade in read], np.float32)


def _ask(config: JudgeConfig, key: str | None, question: str) -> str:
    body = {"model": config.model or "", "temperature": 0, "max_tokens": 8}
    body["messages"] = [{"role": "user", "content": question}]
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    url = f"{(config.url or '').rstrip('/')}/chat/completions"
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
