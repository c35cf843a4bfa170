"""How the daemon stands with loads, where every client can see it: refused without a call.

    page     one memfd a daemon, sealed: the daemon writes, clients map it read-only
    CROWDED  word 0: until this time a load needs a ticket; 0, or a time that has passed: come
    RETRY    word 1: about how long who finds no ticket should stay away
    tickets  a `TokenPipe`, one a daemon: the daemon puts one in for each load that may come, a
             client takes one out of the end that all have
    made     metadata `ucm-made` of a load's call: "<time> <number> <ticket>": when it was made, how
             many loads found no ticket since the client's last one, and whether it took one

Words have 64 bits in native byte order, times are nanoseconds of CLOCK_MONOTONIC: one machine, one
clock. A word is written with one store; the two need not belong together.

A page alone was not enough: a call takes milliseconds until the daemon sees it, and all that time
others find the place free that it will take. A ticket is taken once.

Invariants
    * CROWDED is a time, never a flag, and never more than `MAX_AHEAD_S` ahead: a daemon that dies
      or freezes, and a clock of another time namespace, refuse nobody.
    * Who took a ticket takes none for as long as others are told to stay away: it would always be
      there when its own place becomes free.
    * Both are advice. Who does not look, takes more tickets than it needs, or dies with one, costs
      others a moment: the daemon counts what is in service itself (`load_gate`).
    * Nothing here waits, and no client adds tickets: see `token_pipe`. One that shuts the pipe down
      loses them for all; `load_gate` notices.

Envelope: 10 us a look; a refused call took as long as a load.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from ucm.storage.arena import Arena, ArenaKind
from ucm.storage.tier import SlotId

from .errors import CapacityError, TierUnavailableError
from .layout import KvDtype, KvLayout
from .token_pipe import TokenPipe, take_tokens

MADE_METADATA: Final = "ucm-made"
"""Metadata key of a load's call."""

MAX_AHEAD_S: Final = 1.0
"""What is farther ahead on the page is not believed."""

MAX_WAITED_S: Final = 2.0
"""A call that says that it has waited longer has another clock."""

MAX_REFUSED: Final = 1000
"""A client that says that it was refused more often since its last load does not count right."""

MAX_RETRY_S: Final = 2.0
"""Longest hint; who has less time than that does not wait for a cache."""

MAX_TICKETS: Final = 1024
"""On the board, at most."""

SPREAD: Final = 0.5
"""Hints are told this share shorter or longer: who was refused together comes one by one."""

_NS: Final = 1_000_000_000
_CROWDED, _RETRY = range(2)
PAGE_BYTES: Final = 16
"""Of the page, what is used."""
_PAGE_LAYOUT: Final = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=512, block_tokens=1, dtype=KvDtype.FLOAT32
)
"""One "slot" of 4 KiB."""


def spread(mean_s: float, share: float) -> float:
    """A hint around `mean_s`, `MAX_RETRY_S` at most; `share` is random, from 0 to 1."""
    return min(mean_s * (1 - SPREAD + 2 * SPREAD * share), MAX_RETRY_S)


class LoadBoard:
    """The daemon's side. One thread at a time writes."""

    def __init__(self) -> None:
        """Create page and tickets; nobody needs one.

        Raises:
            CapacityError: the kernel has no memory for it.
        """
        self._tickets = TokenPipe()
        self._arena = Arena(_PAGE_LAYOUT, 1, ArenaKind.READ_ONLY)
        self._memory = self._arena.view(SlotId(0))
        self._words = self._memory.cast("Q")

    @property
    def fds(self) -> tuple[int, int]:
        """The descriptors to hand out: of the page, of the tickets."""
        return self._arena.fd, self._tickets.fd

    @property
    def size_bytes(self) -> int:
        """What a client maps."""
        return self._arena.size_bytes

    @property
    def memory(self) -> memoryview:
        """The page, read-only."""
        return self._memory.toreadonly()

    def post(self, crowded_until_s: float, retry_s: float) -> None:
        """Say until when a load needs a ticket, 0 for not at all, and when to look again."""
        self._words[_RETRY] = int(retry_s * _NS)
        self._words[_CROWDED] = int(crowded_until_s * _NS)

    def put_tickets(self, number: int) -> None:
        """Let so many more loads come, `MAX_TICKETS` at most."""
        self._tickets.put(min(number, MAX_TICKETS))

    def take_tickets(self) -> int:
        """Take back those that nobody took; how many that were."""
        return self._tickets.take(MAX_TICKETS)

    def close(self) -> None:
        """Give the memory back; who still maps it keeps it, open for loads. Idempotent."""
        self._tickets.close()
        with contextlib.suppress(ValueError):  # released before
            self._words[_CROWDED] = 0
            self._words.release()
            self._memory.release()
            self._arena.close()


class BoardReader:
    """The client's side. Thread-safe."""

    def __init__(
        self,
        memory: memoryview,
        tickets: int,
        clock_ns: Callable[[], int],
        share: Callable[[], float] = random.random,
    ) -> None:
        """Look at a daemon's board.

        Args:
            memory: the page.
            tickets: descriptor of the clients' end of the sockets, this object's from now on.
            clock_ns: CLOCK_MONOTONIC.
            share: random numbers from 0 to 1, for the spread of hints.

        Raises:
            OSError: that is no socket.
            ValueError: the page is too short.
        """
        if len(memory) < PAGE_BYTES:
            raise ValueError(f"a board has {PAGE_BYTES} bytes, not {len(memory)}")
        self._words = memory[:PAGE_BYTES].cast("Q")
        self._tickets = socket.socket(fileno=tickets)
        self._close_tickets = weakref.finalize(self, self._tickets.close)
        self._clock_ns = clock_ns
        self._share = share
        self._lock = threading.Lock()
        self._num_refused = 0
        self._rests_until_ns = 0

    def pass_load(self) -> tuple[tuple[str, str], ...]:
        """The metadata of a load's call that is made now.

        Raises:
            CapacityError: the daemon has as many as it can serve, with a hint.
            TierUnavailableError: closed.
        """
        now_ns = self._clock_ns()
        with self._lock:
            if not self._close_tickets.alive:
                raise TierUnavailableError("the session has ended; connect again")
            is_crowded = 0 < self._words[_CROWDED] - now_ns <= MAX_AHEAD_S * _NS
            retry_s = min(self._words[_RETRY] / _NS, MAX_RETRY_S)
            rest_s = (self._rests_until_ns - now_ns) / _NS if is_crowded else 0.0
            has_ticket = is_crowded and rest_s <= 0 and take_tokens(self._tickets, 1) > 0
            is_refused = is_crowded and not has_ticket
            num_refused = self._num_refused
            self._num_refused = num_refused + (rest_s <= 0) if is_refused else 0
            if has_ticket:
                self._rests_until_ns = now_ns + int(spread(retry_s, self._share()) * _NS)
        if is_refused:
            raise CapacityError(
                "the daemon has as many loads in service as it can; come again or compute",
                retry_after_s=rest_s if rest_s > 0 else spread(retry_s, self._share()),
            )
        return ((MADE_METADATA, f"{now_ns} {num_refused} {int(has_ticket)}"),)

    def close(self) -> None:
        """Give descriptor and memory back. Idempotent."""
        with self._lock:
            self._close_tickets()
            self._words.release()


@dataclass(frozen=True, slots=True)
class Made:
    """What a load's call says of itself."""

    waited_s: float = 0.0
    """Since it was made."""
    num_refused: int = 0
    """For want of a ticket, since the client's last one."""
    has_ticket: bool = False
    """Whether it took a ticket."""


_MADE: Final = re.compile(r"(\d{1,19}) (\d{1,9}) ([01])", re.ASCII)


def made_of(metadata: Iterable[tuple[str, str | bytes]] | None, now_s: float) -> Made:
    """Of a call with this metadata; nothing if it says nothing, or nothing that can be true."""
    for key, value in metadata or ():
        if key == MADE_METADATA and isinstance(value, str):
            found = _MADE.fullmatch(value)
            if found is None:
                break
            waited_s = now_s - int(found[1]) / _NS
            is_ours = 0 <= waited_s <= MAX_WAITED_S
            num_refused = min(int(found[2]), MAX_REFUSED)
            return Made(waited_s if is_ours else 0.0, num_refused, found[3] == "1")
    return Made()
