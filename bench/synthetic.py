"""Traces made by chance, seeded: four kinds of work and their mixture.

    chat    conversations that begin with one of many system prompts (Zipf) and go on for a few
            turns; each turn's prompt is the last one, its answer and a new question
    rag     a system prompt, documents drawn by a Zipf law in a fixed order, and a question
    agent   one long prompt of tools, then many short steps; each step's prompt is the last one
            and a little more, seconds apart
    scan    prompts that share nothing with anything, as an evaluation over a corpus does
    mixed   all of these

Arrivals are a Poisson process; times between the turns of a conversation are log-normal. Prompt
lengths are log-normal, too, so a few are very long. Blocks are full: a rest of a prompt that fills
none has no id. The same seed gives the same trace.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from .traces import TraceRequest

_NS_PER_S = 1_000_000_000
_BLOCK_TOKENS = 512
_ANSWER_TOKENS = 340


@dataclass(frozen=True, slots=True)
class SyntheticOptions:
    """What to make."""

    kind: str = "chat"
    """One of `KINDS`."""
    num_requests: int = 12_000
    """Requests in all; the last conversations are cut off there."""
    requests_per_s: float = 3.4
    """Mean rate, turns included, once the trace is under way."""
    seed: int = 0


class _Tree:
    """Ids of blocks: the same for the same content after the same prefix."""

    def __init__(self) -> None:
        self._ids: dict[tuple[int, object], int] = {}
        self._next = itertools.count()

    def extend(self, chain: tuple[int, ...], content: object, num_blocks: int) -> tuple[int, ...]:
        """`chain` and `num_blocks` blocks of `content` behind it."""
        blocks = list(chain)
        for number in range(num_blocks):
            place = (blocks[-1] if blocks else -1, (content, number))
            blocks.append(self._ids.setdefault(place, len(self._ids)))
        return tuple(blocks)

    def fresh(self, chain: tuple[int, ...], num_blocks: int) -> tuple[int, ...]:
        """`chain` and `num_blocks` blocks that nobody else has."""
        return self.extend(chain, ("fresh", next(self._next)), num_blocks)


Turn = tuple[float, tuple[int, ...]]
"""Seconds after the turn before, and the prompt's blocks."""


class _Work:
    """What conversations of each kind look like. Each method makes one, turn by turn."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._tree = _Tree()
        self._templates = _Zipf(rng, 200, 1.0)
        self._documents = _Zipf(rng, 3000, 0.9)

    def chat(self) -> Iterator[Turn]:
        """A system prompt of 0 to 4 blocks, then turns."""
        template = self._templates.draw()
        chain = self._tree.extend((), ("template", template), template % 5)
        chain = self._tree.fresh(chain, self._length(7.0, 1.3))
        yield 0.0, chain
        goes_on = self._rng.choice((0.3, 0.3, 0.85))
        while self._rng.random() < goes_on:
            chain = self._tree.fresh(chain, self._length(2.0, 1.0))
            yield self._rng.lognormvariate(4.6, 1.0), chain

    def rag(self) -> Iterator[Turn]:
        """One to four documents, always in the order of their numbers, and a question."""
        documents = sorted({self._documents.draw() for _ in range(self._rng.randint(1, 4))})
        chain = self._tree.extend((), "rag", 1)
        for document in documents:
            chain = self._tree.extend(chain, ("document", document), 2 + document * 7 % 23)
        yield 0.0, self._tree.fresh(chain, 1)

    def agent(self) -> Iterator[Turn]:
        """28 blocks of tools that a fleet shares, then up to a hundred steps."""
        chain = self._tree.extend((), ("tools", self._templates.draw() % 6), 28)
        chain = self._tree.fresh(chain, self._length(6.0, 1.0))
        for _ in range(min(100, 1 + int(self._rng.expovariate(1 / 15)))):
            yield self._rng.lognormvariate(2.3, 1.2), chain
            chain = self._tree.fresh(chain, self._length(1.5, 0.8))

    def scan(self) -> Iterator[Turn]:
        """A prompt that nobody has sent before or will again."""
        yield 0.0, self._tree.fresh((), self._length(20.0, 0.8))

    def mixed(self) -> Iterator[Turn]:
        """One of the others."""
        kinds = (self.chat, self.chat, self.chat, self.rag, self.agent, self.scan)
        return self._rng.choice(kinds)()

    def _length(self, median: float, sigma: float) -> int:
        """Blocks: log-normal, 1 to 240."""
        return max(1, min(240, round(median * self._rng.lognormvariate(0.0, sigma))))


class _Zipf:
    """Numbers 0 to n-1; number k comes with a chance proportional to (k+1)^-s."""

    def __init__(self, rng: random.Random, n: int, s: float) -> None:
        self._rng = rng
        self._cumulative = list(itertools.accumulate((k + 1) ** -s for k in range(n)))

    def draw(self) -> int:
        """The next number."""
        return self._rng.choices(range(len(self._cumulative)), cum_weights=self._cumulative)[0]


_TURNS_PER_CONVERSATION: Final = {"chat": 2.1, "rag": 1.0, "agent": 15.5, "scan": 1.0, "mixed": 4.0}
KINDS: Final = tuple(_TURNS_PER_CONVERSATION)


def synthesize(options: SyntheticOptions) -> list[TraceRequest]:
    """Make a trace, in order of arrival."""
    rng = random.Random(options.seed)
    start: Callable[[], Iterator[Turn]] = getattr(_Work(rng), options.kind)
    rate = options.requests_per_s / _TURNS_PER_CONVERSATION[options.kind]
    order = itertools.count()
    pending: list[tuple[float, int, tuple[int, ...], Iterator[Turn]]] = []
    requests: list[TraceRequest] = []
    next_start_s = 0.0
    while len(requests) < options.num_requests:
        while not pending or next_start_s <= pending[0][0]:
            turns = start()
            _, chain = next(turns)
            heapq.heappush(pending, (next_start_s, next(order), chain, turns))
            next_start_s += rng.expovariate(rate)
        time_s, _, chain, turns = heapq.heappop(pending)
        tokens = len(chain) * _BLOCK_TOKENS
        requests.append(
            TraceRequest(int(time_s * _NS_PER_S), tokens, _ANSWER_TOKENS, _BLOCK_TOKENS, chain)
        )
        following = next(turns, None)
        if following is not None:
            after_s, chain = following
            heapq.heappush(pending, (time_s + after_s, next(order), chain, turns))
    return requests
