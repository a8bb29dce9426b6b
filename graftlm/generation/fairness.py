"""Whose request begins next: adapters take turns by what they have cost so far.

Virtual token counters (Sheng et al. 2024, arXiv:2401.00588, algorithm 2): each adapter has a counter of what it has
cost, and the adapter whose counter is least begins its next request. An adapter that had nothing waiting gets no credit
for its idle time: its counter rises to the least of those that wait. The counter of an adapter that waits stands still,
and nobody comes back with a lesser one, so each request is first at some time; then nothing overtakes it, however large
it is. The paper counts a prompt when its request begins. Here it counts token by token as it is read, and what is left
of it counts only in the choice of the next request: else who comes while long prompts are read would wait for all.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping

from graftlm.generation.requests import Generation

PROMPT_COST, ANSWER_COST = 1.0, 2.0
"""Of a token; those of the paper. A token of a prompt is computed beside others, one of an answer in a pass of its
own."""

REMEMBERED = 1024
"""Counters of adapters without a waiting request that are kept."""

Client = tuple[str, ...]
"""The deltas of a request, whatever their weights."""


def client_of(generation: Generation) -> Client:
    return tuple(generation.row)


class FairQueue:
    """The requests that wait: in order of arrival within an adapter, between adapters by their counters."""

    def __init__(self) -> None:
        self._lines: dict[Client, deque[tuple[int, Generation]]] = {}
        self._costs: OrderedDict[Client, float] = OrderedDict()
        """What was charged last stands last."""
        self._arrivals = 0
        self._last: Client | None = None
        """Who took a request from the queue last."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Generation]:
        """All that wait, adapter by adapter."""
        return (generation for line in self._lines.values() for _, generation in line)

    def cost(self, client: Client) -> float:
        """The counter of an adapter."""
        return self._costs.get(client, 0.0)

    def append(self, generation: Generation) -> None:
        client = client_of(generation)
        if client not in self._lines:
            if self._lines:
                least = min(map(self.cost, self._lines))
            else:
                least = 0.0 if self._last is None else self.cost(self._last)
            self._costs[client] = max(self.cost(client), least)
            self._lines[client] = deque()
        self._arrivals += 1
        self._lines[client].append((self._arrivals, generation))

    def first(self, unread: Mapping[Client, int] | None = None) -> Generation:
        """Who begins next; of equal counters the one that has waited longest.

        `unread`: tokens of prompts that began and that are still to be computed.
        """
        left = unread or {}
        lines = self._lines.items()
        _, line = min(lines, key=lambda each: (self.cost(each[0]) + PROMPT_COST * left.get(each[0], 0), each[1][0][0]))
        return line[0][1]

    def remove(self, some: Iterable[Generation]) -> None:
        """Take these out of the queue."""
        gone = set(some)
        for client in {client_of(generation) for generation in gone}:
            left = deque(each for each in self._lines[client] if each[1] not in gone)
            self._set(client, left)

    def pop(self, generation: Generation) -> None:
        """Take out what `first` named."""
        client = client_of(generation)
        self._lines[client].popleft()
        self._set(client, self._lines[client])

    def _set(self, client: Client, line: deque[tuple[int, Generation]]) -> None:
        if line:
            self._lines[client] = line
        else:
            del self._lines[client]
            self._last = client

    def charge(self, generation: Generation, *, prompt: int = 0, answer: int = 0) -> None:
        """Count tokens that were computed for a request."""
        client = client_of(generation)
        self._costs[client] = self.cost(client) + PROMPT_COST * prompt + ANSWER_COST * answer
        self._costs.move_to_end(client)
        if len(self._costs) > REMEMBERED + len(self._lines):
            del self._costs[next(other for other in self._costs if other not in self._lines)]
