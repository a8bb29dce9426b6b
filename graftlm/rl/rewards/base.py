"""What every scorer is: a config, and from it a function from answers to rewards.

    make(config, network) -> scorer;    scorer([said, ...]) -> [reward, ...]

One reward for each answer, the larger the better. None is for an answer of which nobody can say how good it is: it is
left out. A reward that is not finite is an error of the loop, which names the row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graftlm.config.schema import config
from graftlm.data.sources.formats import Message
from graftlm.errors import DataError


@dataclass(frozen=True)
class Completion:
    """An answer that the model gave, and all that one may want to know to judge it."""

    messages: Sequence[Message]
    """What was said before; the last message is the question."""
    answer: str
    """Without special tokens, and without white space at either end."""
    reference: str | None
    """The row's own answer, where it has one."""
    cut: bool
    """Whether it was not over after `max_new_tokens`."""
    where: str
    """The row that asks."""

    @property
    def question(self) -> str:
        return self.messages[-1].content

    def required_reference(self, scorer: str) -> str:
        """The row's own answer; DataError where there is none."""
        if self.reference is None:
            raise DataError(
                f"{self.where}: scorer {scorer!r} compares with the row's own answer, and it has none. Give rows with "
                "answers, or another scorer",
                code="no-reference-answer",
            )
        return self.reference


Reward = float | None
Scorer = Callable[[Sequence[Completion]], Sequence[Reward]]


@config
class ScorerConfig:
    """The base of all configs of scorers; each adds `by`, its key in SCORERS, and its options."""

    by: str
