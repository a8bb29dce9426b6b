"""Rows whose answers are compared, or judged -> groups of examples, which a loss sees together.

Every answer is a conversation of its own and goes through the one renderer, as a row whose earlier messages have
weight 0: so only the answer is compared, whatever the chat template writes before it. Answers to one prompt begin with
the same tokens, which a pack computes once. An answer of several turns (calls of tools, what follows their results) is
several examples where the template rewrites earlier turns: its log-probability is the sum over all of them.

| a row must have | chosen and rejected | or a verdict           | loss                |
|-----------------|---------------------|------------------------|---------------------|
| pairs           | yes: the best against each of the others      | dpo, simpo, orpo .. |
| feedback        | each is an answer   | `desirable`, one answer | kto, sppo          |
| text            | raw text, or the mask `everything`            | pretraining         |
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np

from graftlm.data.batches.pack import Example, Group
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare
from graftlm.data.quality.report import Report
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.source import DataConfig, Row
from graftlm.data.sources.splits import for_supervised
from graftlm.errors import DataError, numbered

COMPARED = ("pairs", "feedback")
"""What a loss needs where its rows become groups."""

Usable = Callable[[Sequence[Row]], tuple[list[Row], list[str]]]
"""Rows -> those that a loss can use, and what is to be told of the others; DataError where a loss cannot do."""


def usable_by(loss: str, needs: str, data: DataConfig) -> Usable:
    """What `read_data` asks about its rows: whether they have what this loss needs."""

    def usable(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
        if needs == "answers":
            return for_supervised(rows)
        problems = [f"{row.where}: {why}" for row in rows if (why := _lacks(row, needs, data))]
        if problems:
            raise DataError(
                f"{len(problems)} of {len(rows)} rows lack what loss {loss!r} needs:\n"
                f"{numbered(problems)}\n{REMEDIES[needs]}",
                code="rows-unfit-for-loss",
            )
        return list(rows), []

    return usable


REMEDIES = {
    "pairs": "Give rows with `chosen` and `rejected` (or `responses` with `scores`); loss `kto` takes single answers "
    "that were liked or not, and loss `supervised` takes what is to be imitated",
    "feedback": "Give rows with a `label` (true or false), or pairs with `chosen` and `rejected`; loss `supervised` "
    "takes answers that nobody has judged",
    "text": "Give rows with a `text`, or set `data: {mask: everything}` to train every token of conversations",
    "rewards": "Rewards come from a loop that generates answers and judges them, not from files: say how in `rl`",
    "prompts": "With `rl` the model answers questions by itself: give rows that ask something",
}


def _lacks(row: Row, needs: str, data: DataConfig) -> str:
    """What is missing, or nothing."""
    raw = row.messages[0].role == TEXT
    if needs == "text":
        return "" if raw or data.mask == "everything" else "a conversation is no raw text"
    if needs == "rewards":
        return "no rewards"
    if raw:
        return "raw text asks nothing" if needs == "prompts" else "raw text has no answer"
    if needs == "prompts":
        return ""
    if any(one[-1].role != "assistant" for one in (row.messages, *row.rejected)):
        return "does not end with an answer"
    if needs == "pairs" or row.rejected:
        return "" if row.rejected else "no rejected answer to compare with"
    return "" if row.desirable is not None else "nobody says whether the answer was liked"


# Answers as rows, and back -----------------------------------------------------------------------------------------


def answers_of(rows: Sequence[Row]) -> list[Row]:
    """Every answer of these rows as a row, each row once: what the renderer is given."""
    return [answer for row in {row.where: row for row in rows}.values() for answer in _answers(row)]


def _answers(row: Row) -> list[Row]:
    conversations = [row.messages, *row.rejected]
    common = _common(conversations) if row.rejected else len(row.messages) - 1
    return [
        Row(
            [*(replace(m, weight=0.0, spans=()) for m in one[:common]), *one[common:]],
            where,
            row.group,
            row.tools,
            variables=row.variables,
            unread=row.unread if one is row.messages else (),
        )
        for one, where in zip(conversations, _places(row), strict=True)
    ]


def _places(row: Row) -> list[str]:
    return [row.where, *(f"{row.where}: rejected answer {n}" for n in range(1, len(row.rejected) + 1))]


def _common(conversations: Sequence[Sequence[Message]]) -> int:
    """The messages that all begin with; each has one more at least."""
    count = 0
    for together in zip(*(one[:-1] for one in conversations), strict=False):
        if any(message != together[0] for message in together):
            break
        count += 1
    return count


def prepare_groups(
    rows: Sequence[Row], renderer: Renderer, data: DataConfig, needs: str, **options: Any
) -> tuple[list[Group], list[Row], Report]:
    """Groups ready to pack, the rows that they are of, and the report, as `prepare` makes them of single rows."""
    examples, report = prepare(answers_of(rows), renderer, data, **options)
    found, group_rows, problems = groups(rows, examples, needs, in_part=report.rows_in_part)
    report.problems += problems
    report.rows, report.compared = len(found), True
    if needs == "feedback":
        scores = [score for group in found for score in group.scores]
        report.notes.append(f"{sum(scores):,.0f} answers were liked, {len(scores) - sum(scores):,.0f} were not")
    if problems and (data.strict or not found):
        raise DataError(
            f"{len(problems)} of {len(rows)} rows cannot be trained on:\n" + numbered(problems), code="unusable-rows"
        )
    if not found:
        raise DataError(
            f"no row is left to train on: each of {len(rows)} has an answer longer than max_tokens={data.max_tokens}. "
            "Raise data.max_tokens, or set data.over_length: truncate",
            code="no-rows-left",
        )
    return found, group_rows, report


def groups(
    rows: Sequence[Row], examples: Sequence[Example], needs: str, in_part: Collection[str] = ()
) -> tuple[list[Group], list[Row], list[str]]:
    """(a group for each row, the rows that have one, what is wrong with others) from the examples of `answers_of`.

    A row has none where an answer of it could not be rendered or was too long, which is in the report already, or is
    there `in_part`: some of its examples were left out.
    """
    left_out = set(in_part)
    found: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        found[example.where].append(example)
    made_groups: list[Group] = []
    group_rows: list[Row] = []
    problems: dict[str, str] = {}
    for row in rows:
        answers = [found[place] for place in _places(row)]
        if all(answers) and left_out.isdisjoint(_places(row)):
            group = _group(row, answers, needs)
            same = [n for n in range(1, len(answers)) if _same(answers[0], answers[n])]
            if same:
                problems[row.where] = f"rejected answer {same[0]} is rendered to the same tokens as the chosen one"
            else:
                made_groups.append(group)
                group_rows.append(row)
    return made_groups, group_rows, [f"{where}: {why}" for where, why in problems.items()]


def _group(row: Row, answers: Sequence[Sequence[Example]], needs: str) -> Group:
    examples, numbers = _in_order(answers)
    if not row.rejected:
        return Group(examples, (float(bool(row.desirable)),), numbers=numbers)
    worse = range(1, len(answers))
    pairs = tuple((0, n) for n in worse) if needs == "pairs" else ()
    return Group(examples, (1.0, *(0.0 for _ in worse)), pairs, numbers)


def _in_order(answers: Sequence[Sequence[Example]]) -> tuple[tuple[Example, ...], tuple[int, ...]]:
    """(the examples of all answers, the `numbers` of a group of them)"""
    numbered = [(number, example) for number, examples in enumerate(answers) for example in examples]
    numbers = tuple(number for number, _ in numbered) if len(numbered) > len(answers) else ()
    return tuple(example for _, example in numbered), numbers


def _same(a: Sequence[Example], b: Sequence[Example]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(one.ids, other.ids) and np.array_equal(one.weights, other.weights)
        for one, other in zip(a, b, strict=True)
    )


# Answers to other prompts ------------------------------------------------------------------------------------------


def mismatched_groups(step: Sequence[Group]) -> list[Group]:
    """The prompts of a step with the answers of the next group that was asked something else, to be looked at only.

    From these KTO estimates how far the policy is from its reference. Groups without such a neighbour have none.
    """
    found = []
    for number, group in enumerate(step):
        others = (step[(number + n) % len(step)] for n in range(1, len(step)))
        other = next((one for one in others if not np.array_equal(_prompt(one), _prompt(group))), None)
        if other is not None:
            pairs = zip(group.parts(), cycle(other.parts()), strict=False)
            answers = [_exchanged(prompts[0], answer_parts) for prompts, answer_parts in pairs]
            examples, numbers = _in_order(answers)
            found.append(Group(examples, (0.0,) * len(answers), mismatched=True, numbers=numbers))
    return found


def _begins(example: Example) -> int:
    """Where what is trained begins."""
    return int(example.weights.nonzero()[0][0])


def _prompt(group: Group) -> np.ndarray:
    return group.answers[0].ids[: _begins(group.answers[0])]


def _exchanged(example: Example, answer_parts: Sequence[Example]) -> list[Example]:
    """The answer, in one example or several, behind another prompt."""
    a, prompt = _begins(example), answer_parts[0].ids[: _begins(answer_parts[0])]
    found = []
    for part in answer_parts:
        different = np.flatnonzero(part.ids[: len(prompt)] != prompt[: len(part)])
        b = int(different[0]) if len(different) else len(prompt)  # a later turn may follow a prompt that was rewritten
        ids = np.concatenate([example.ids[:a], part.ids[b:]])
        weights = np.concatenate([np.zeros(a, np.float32), part.weights[b:]])
        found.append(Example(ids, weights, f"{example.where}, with the answer of {part.where}"))
    return found
