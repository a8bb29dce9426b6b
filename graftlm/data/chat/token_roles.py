"""The role of every token, from where messages lie in the rendered text, and the weights that a row sets itself."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from graftlm.data.chat.roles import Role
from graftlm.data.chat.spans import Span
from graftlm.data.chat.tokenization import Tokenization, Tokens
from graftlm.data.sources.formats import Message


class TokenRoles:
    """Gives tokens of one tokenizer their roles."""

    def __init__(self, tokenization: Tokenization) -> None:
        self._end_ids, self._end_texts = tokenization.end_ids, tokenization.end_texts
        self._is_control = tokenization.is_control
        self._outside = np.full(len(self._is_control), Role.BOILERPLATE, np.uint8)
        """The role of each id where it is part of no message's text."""
        self._outside[list(tokenization.special_ids)] = Role.SPECIAL

    def of(
        self,
        messages: Sequence[Message],
        spans: Mapping[int, Span],
        turns: Mapping[int, tuple[int, int]],
        tokens: Tokens,
        length: int,
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """The role of every token, and the message that it belongs to; `turns` are those of the answers."""
        starts, ends, controls = tokens.starts, tokens.ends, tokens.controls
        parts = {index: (span.start, span.end) for index, span in spans.items()}
        over = {index: span.end for index, span in spans.items()}  # where a message ends
        for index in (i for i, m in enumerate(messages) if m.role == "assistant" and i not in turns):
            over[index] = min((span.start for i, span in spans.items() if i > index), default=length)
        for index, (begin, until) in turns.items():
            if messages[index].tool_calls:
                parts[index] = begin, until
            elif index in spans:
                parts[index] = begin, spans[index].end
            else:
                continue
            over[index] = until
        closed = sorted((end, index) for index, end in over.items())

        # As no token goes back, what overlaps a part of the text are the tokens from one place to another.
        places = [part[0] for part in parts.values()] + [part[1] for part in parts.values()]
        after = ends.searchsorted([*places, *(end for end, _ in closed)], "right").tolist()
        before = starts.searchsorted([*places[len(parts) :], *(until for _, until in turns.values())], "left").tolist()
        bounds = dict(zip(turns, before[len(parts) :], strict=True))

        roles = self._outside.take(tokens.ids, mode="clip")
        for (index, (start, end)), first, last, beyond in zip(
            parts.items(), after, before, after[len(parts) :], strict=False
        ):
            # A control token may swallow white space around it, of a text too: it is part of the text only if inside.
            inside = controls[bisect_left(controls, first) : bisect_left(controls, last)]
            across = [place for place in inside if starts[place] < start or ends[place] > end] if inside else []
            roles_across = roles[across] if across else roles[:0]
            answer = index in turns
            roles[first:last] = Role.ASSISTANT if answer else spans[index].role
            if answer and messages[index].tool_calls:
                # Written by the template from the calls: its last control token is what ends the turn.
                stops = self._stops(messages[index], [p for p in inside if p not in across], tokens.ids)
                if stops:
                    roles[stops[-1]] = Role.END_OF_TURN
                    roles[stops[-1] + 1 : last] = Role.BOILERPLATE
            if across:
                roles[across] = roles_across
            if answer and not messages[index].tool_calls:
                until = turns[index][1]
                for place in chain((p for p in across if p >= beyond), range(max(last, beyond), bounds[index])):
                    if self._is_control.take(tokens.ids[place], mode="clip"):
                        roles[place : self._end(tokens, place, bounds[index])] = Role.END_OF_TURN
                        break
                    if ends[place] <= until:
                        roles[place] = Role.END_OF_TURN
        numbers = np.array([index for _, index in closed] + [len(messages) - 1], np.int32)
        return roles, numbers.repeat([b - a for a, b in pairwise([0, *after[2 * len(parts) :], len(starts)])])

    def _end(self, tokens: Tokens, place: int, bound: int) -> int:
        """Where the end of an answer is over whose first control token is at `place`: behind the end-of-text token if
        nothing but control tokens stands before it, else behind the first one."""
        run = place
        while run < bound and self._is_control.take(tokens.ids[run], mode="clip"):
            if tokens.ids[run] in self._end_ids:
                return run + 1
            run += 1
        return place + 1

    def _stops(self, message: Message, controls: list[int], ids: NDArray[np.int32]) -> list[int]:
        """The control tokens of a turn with calls that may end the turn. Some templates open the next turn behind
        the end-of-text token; where the message itself says that token, all of them may."""
        ends = [place for place in controls if ids[place] in self._end_ids]
        in_text = any(text in message.all_text for text in self._end_texts)
        return controls if in_text or not ends else ends


def row_weights(
    messages: Sequence[Message],
    spans: Mapping[int, Span],
    roles: NDArray[np.uint8],
    turns: NDArray[np.int32],
    starts: NDArray[np.int64],
) -> NDArray[np.float32]:
    """The weights that the row itself gives its tokens; NaN where it gives none."""
    weights = np.empty(len(roles), np.float32)
    weights.fill(np.nan)
    for index, message in enumerate(messages):
        if message.weight is None and not message.spans:
            continue
        own = (turns == index) & ~np.isin(roles, (Role.SPECIAL, Role.BOILERPLATE))
        if message.weight is not None:
            weights[own] = message.weight
        for start, stop, weight in message.spans:
            if index in spans:
                at = spans[index].content
                weights[own & (starts >= at + start) & (starts < at + stop)] = weight
    return weights


def set_boilerplate(
    messages: Sequence[Message],
    spans: Mapping[int, Span],
    roles: NDArray[np.uint8],
    turns: NDArray[np.int32],
    tokens: Tokens,
) -> None:
    """Give tokens that are wholly fixed words of a row's template the role of what templates write."""
    for index, span in spans.items():
        for start, end in messages[index].boilerplate:
            inside = (tokens.starts >= span.content + start) & (tokens.ends <= span.content + end)
            roles[inside & (turns == index) & (roles == span.role)] = Role.BOILERPLATE
