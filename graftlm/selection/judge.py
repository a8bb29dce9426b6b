"""Quality by a judge: AlpaGasus. Chen et al. 2023, arXiv:2307.08701, section 2: a strong model grades every row.

    score(z) = the grade, 1 to 5, that the judge writes             an OpenAI-compatible endpoint (`url`)
    score(z) = sum_k k p(k) / sum_k p(k),  k = 1 ... 5              a base of ours, from its next-token probabilities

The second is the expected grade of G-Eval (Liu et al. 2023, arXiv:2303.16634): a small base writes the same grade for
nearly every row, and its probabilities still tell rows apart. The paper keeps rows with 4.5 of 5 and more; here `least`
leaves out what has less.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from graftlm.config.schema import Rate, config
from graftlm.data.batches.pack import Example, collate
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.source import Row
from graftlm.errors import DataError
from graftlm.judges.endpoint import EndpointConfig, ask, check, filled, grades
from graftlm.passes.forward import log_probs
from graftlm.selection.base import LEFT_OUT, Pool, Scores, SelectorConfig

GRADES = ("1", "2", "3", "4", "5")


@config
class JudgeConfig(EndpointConfig, SelectorConfig):
    by: Literal["judge"] = "judge"
    url: str | None = None
    """An OpenAI-compatible endpoint, up to /v1; without it the recipe's base judges. One that is not on this machine
    needs `network: true`."""
    least: Rate = 0.0
    """The lowest grade that is not left out."""


def score(config: JudgeConfig, pool: Pool) -> Scores:
    questions = [_question(config, row) for row in pool.rows]
    grades = _by_endpoint(config, pool, questions) if config.url else _by_base(pool, questions)
    good = pool.usable & (grades >= config.least)
    return np.where(good, grades, LEFT_OUT).astype(np.float32)


def _question(config: JudgeConfig, row: Row) -> str:
    """The row as the judge sees it: its last answer, and what was said before."""
    last = max(i for i, m in enumerate(row.messages) if m.role in ("assistant", TEXT))
    before = "\n\n".join(m.content for m in row.messages[:last])
    return filled(config.prompt, {"question": before, "answer": row.messages[last].content})


@torch.no_grad()
def _by_base(pool: Pool, questions: list[str]) -> Scores:
    """The expected grade under the base [n]."""
    digits = [pool.renderer.tokenizer.encode(grade, add_special_tokens=False) for grade in GRADES]
    if any(len(ids) != 1 for ids in digits):
        raise DataError(
            "this base writes the digits 1 to 5 in several tokens: judge with an endpoint (`url`)",
            code="grades-not-single-tokens",
        )
    grades, found = torch.arange(1.0, 6.0), np.zeros(len(questions), np.float32)
    graded_examples = [
        _graded(pool.renderer.prompt([Message("user", question)]), digits, row.where)
        for row, question in zip(pool.rows, questions, strict=True)
    ]
    pool.check_positions([examples[0] for examples in graded_examples], "questions to the judge")
    for number, examples in enumerate(graded_examples):
        pack = collate(examples, share=True).to(pool.model.device)
        with pool.attention():
            chance = log_probs(pool.model, pack).float().cpu()
        order = pack.targets.cpu().argsort()  # targets lie in the order of their ids
        place = torch.tensor([ids[0] for ids in digits]).argsort()
        found[number] = float(torch.softmax(chance[order], 0) @ grades[place])
        pool.progress("judging", number + 1, len(questions))
    return found


def _graded(prompt: NDArray[np.int32], digits: Sequence[Sequence[int]], where: str) -> list[Example]:
    """The prompt with each grade, of which the grade alone has a weight."""
    weights = np.append(np.zeros(len(prompt), np.float32), np.float32(1))
    return [Example(np.append(prompt, ids).astype(np.int32), weights, where) for ids in digits]


def _by_endpoint(config: JudgeConfig, pool: Pool, questions: list[str]) -> Scores:
    """The grades that the endpoint writes [n]; nan where it writes none, which is said."""
    key = check(config, network=pool.network)
    replies: list[str] = []
    for reply in ask(config, key, questions):
        replies.append(reply)
        pool.progress("judging", len(replies), len(questions))
    found = grades(replies)
    silent = [row.where for row, grade in zip(pool.rows, found, strict=True) if grade is None]
    if silent:
        pool.notes.append(
            f"judge: {len(silent)} replies hold no grade, so their rows are left out: {', '.join(silent[:3])}"
        )
    return np.array([np.nan if grade is None else grade for grade in found], np.float32)
