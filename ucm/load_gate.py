"""Who may load now: everybody, up to a limit, until more come than can be served; then few.

    open      up to `most` loads are in service; one more is refused
    crowded   refusals, or calls with more than `most` in front of them, for `STANDING_S`: up to
              `crowded` are in service or on their way, each with a ticket from the board
              (`load_board`), where all others see that they need not call
    open      again when hardly anybody was refused for a while, or few clients are left; at once
              when the sessions of the others have ended

Loads that are in service together share a processor and a disk: many of them take many times as
long each and are hardly more a second. As long as nobody is turned away that is what clients ask
for. Once somebody is, it serves nobody: who is refused computes or comes again, and who is admitted
should be as fast as alone.

While it is crowded a call without a ticket is admitted to a place that is free, but not if it
waited longer than `LATE_S` before it came here while others are in service: its answer would be
late, and it stood in a queue that must get shorter.

A ticket that was taken and not brought within `LOST_S` is issued again: its client has died. Nobody
may be left who tells: so while none is in service the board is believed for `IDLE_S` only. If more
are lost than brought somebody takes tickets for nothing; then the board is left open for a
while, and refusals cost a call again.

Hints make clients come again as fast as `TRIES_A_LOAD` looks for each load that ends, however many
they are: often enough that a place is taken soon, too seldom to cost much.

A load that takes longer than `STALLED_S` waits for a slow disk and slows nobody; it no longer
counts for `crowded`, so that loads from memory go on. `most` bounds those, too. Loads that their
clients read themselves (`begin_load`) are in service until the plan is made, however long they
stay open.

Sources: standing queues and the time that a call has waited: K. Nichols and V. Jacobson,
"Controlling Queue Delay", ACM Queue 10(5), 2012, as B. Maurer uses it in "Fail at Scale", ACM Queue
13(8), 2015; refusals in the client: "Handling Overload" in B. Beyer et al., "Site Reliability
Engineering", O'Reilly, 2016.

Decides by the times it is given, in seconds of CLOCK_MONOTONIC. Thread-safe; never blocks.

Envelope: 10 us a load.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from .config import ServiceConfig
from .credits import ThreadShares
from .errors import CapacityError
from .load_board import MAX_RETRY_S, LoadBoard, Made, spread

STANDING_S: Final = 0.1
"""Refusals for so long are no burst..."""

_GAP_S: Final = 0.25
"""...unless there was none for so long."""

LATE_S: Final = 0.004
"""What a call may have waited before it comes here, while it is crowded: about half a load."""

OPEN_RETRY_S: Final = 0.25
"""Hint while it is not crowded: some tens of loads later."""

TRIES_A_LOAD: Final = 3.0
"""Clients that should look at the board while one load is served."""

MIN_RETRY_S: Final = 0.005

CALLERS_S: Final = 5.0
"""A client that has not been here for so long does not wait for a place."""

WINDOW_S: Final = 0.5
FEW_REFUSALS: Final = 0.2
"""Refusals a load, over a window: there is no crowd."""

LOST_S: Final = 0.25
"""A ticket that was issued so long ago, and lies on the board no more, is lost."""

SOME_LOST: Final = 1
"""Lost in a window: clients may die."""

DISTRUST_S: Final = 10.0
"""How long the board stays open."""

STALLED_S: Final = 0.5
"""A load that is in service for so long holds up no other."""

BELIEVED_S: Final = 0.5
"""How long the board says that it is crowded, unless a load comes or ends before."""

IDLE_S: Final = 0.05
"""The same while no load is in service: in a crowd somebody takes the ticket within a few
milliseconds and its call is here soon after, or the ticket is lost."""

_FIRST_INTERVAL_S: Final = 0.01
_WEIGHT: Final = 0.05


@dataclass(frozen=True, slots=True)
class GateLimits:
    """Loads in service at once."""

    most: int
    """While there is no crowd."""
    crowded: int
    """While there is one, at most `most`."""
    waiting: int
    """That may wait for the disk: what is refused with so many in service is refused for them."""

    @classmethod
    def of(cls, service: ServiceConfig, num_processors: int) -> GateLimits:
        """What the configuration says, on a daemon that may use so many processors."""
        most = min(2 * service.max_waiting_loads, service.rpc_threads)
        crowded = service.max_crowded_loads or num_processors // 2
        waiting = min(service.max_waiting_loads, ThreadShares.of(service.rpc_threads).waiting)
        return cls(most, min(max(crowded, 1), most), waiting)


class LoadGate:
    """See the module."""

    def __init__(
        self, limits: GateLimits, board: LoadBoard, share: Callable[[], float] = random.random
    ) -> None:
        """Nothing is in service.

        Args:
            limits: how many may be.
            board: where it says how it stands.
            share: random numbers from 0 to 1, for the spread of hints.
        """
        self._limits = limits
        self._board = board
        self._share = share
        self._lock = threading.Lock()
        self._inside: list[float] = []
        self._is_crowded = False
        self._crowded_at_s = 0.0
        self._refused_s = (float("-inf"), float("-inf"))
        """The first and the last refusal of those that follow each other."""
        self._callers: OrderedDict[Hashable, float] = OrderedDict()
        self._interval_s = _FIRST_INTERVAL_S
        self._came_s: deque[float] = deque(maxlen=limits.most + 1)
        self._tickets_s: deque[float] = deque()
        """When those were issued that were not brought."""
        self._distrust_until_s = float("-inf")
        self._window = _Window(0.0)

    @property
    def is_crowded(self) -> bool:
        """Whether more come than can be served."""
        return self._is_crowded

    @property
    def num_inside(self) -> int:
        """Loads in service."""
        return len(self._inside)

    def enter(self, caller: Hashable, now_s: float, made: Made = Made()) -> None:  # noqa: B008
        """Take a place; `leave` with this time must follow.

        Args:
            caller: who loads.
            now_s: the time.
            made: what the call says of itself.

        Raises:
            CapacityError: there is none, with the time until it should come again.
        """
        with self._lock:
            self._note_caller(caller, now_s)
            self._note_time(now_s)
            self._window.refused += made.num_refused
            if made.has_ticket and self._tickets_s:
                self._tickets_s.popleft()
            if self._stood_in_a_queue(now_s, made.waited_s):
                self._note_refusal(now_s)
            is_admitted = self._has_place(now_s, made)
            if is_admitted:
                self._inside.append(now_s)
                self._window.admitted += 1
            else:
                self._note_refusal(now_s)
            self._post(now_s)
            if not is_admitted:
                raise CapacityError(
                    f"as many loads are in service as may, {len(self._inside)}; come again or "
                    "compute",
                    retry_after_s=spread(self._retry_s(), self._share()),
                )

    def leave(self, began_s: float, now_s: float, *, was_refused: bool = False) -> None:
        """Give back the place that was taken at `began_s`.

        Args:
            began_s: when it was taken.
            now_s: the time.
            was_refused: another limit has refused the load, perhaps one of its client's own.
        """
        with self._lock:
            took_s = min(now_s - began_s, STALLED_S) / len(self._inside)
            self._inside.remove(began_s)
            if was_refused and len(self._inside) >= self._limits.waiting:
                self._note_refusal(now_s)
            elif not was_refused:
                self._interval_s += _WEIGHT * (took_s - self._interval_s)
            self._post(now_s)

    def forget(self, caller: Hashable, now_s: float) -> None:
        """A caller is gone and waits for no place; as few as are served at once are no crowd."""
        with self._lock:
            self._callers.pop(caller, None)
            if len(self._callers) <= self._limits.crowded:
                self._is_crowded = False
            self._post(now_s)

    def _has_place(self, now_s: float, made: Made) -> bool:
        if len(self._inside) >= self._limits.most:
            return False
        if not self._is_crowded or made.has_ticket or not self._inside:
            return True
        return made.waited_s <= LATE_S and self._num_counted(now_s) < self._limits.crowded

    def _num_counted(self, now_s: float) -> int:
        """Of a crowd: in service, less what waits for a slow disk."""
        return sum(now_s - began_s <= STALLED_S for began_s in self._inside)

    def _stood_in_a_queue(self, now_s: float, waited_s: float) -> bool:
        """Whether more loads than may be in service came here since it was made."""
        self._came_s.append(now_s)
        is_long = len(self._came_s) > self._limits.most
        return waited_s > LATE_S and is_long and self._came_s[0] >= now_s - waited_s

    def _note_refusal(self, now_s: float) -> None:
        self._window.refused += 1
        first_s, last_s = self._refused_s
        if now_s - last_s > _GAP_S:
            first_s = now_s
        self._refused_s = (first_s, now_s)
        if not self._is_crowded and now_s - first_s >= STANDING_S:
            self._is_crowded = True
            self._crowded_at_s = now_s
            self._window = _Window(now_s)

    def _note_caller(self, caller: Hashable, now_s: float) -> None:
        self._callers[caller] = now_s
        self._callers.move_to_end(caller)
        while now_s - next(iter(self._callers.values())) > CALLERS_S:
            self._callers.popitem(last=False)

    def _note_time(self, now_s: float) -> None:
        """Look for the end of a crowd, once a window."""
        window = self._window
        if not self._is_crowded or now_s - window.began_s < WINDOW_S:
            return
        is_long = now_s - self._crowded_at_s >= CALLERS_S
        are_few = is_long and len(self._callers) <= self._limits.most // 2
        if window.refused <= FEW_REFUSALS * window.admitted or are_few:
            self._is_crowded = False
        if window.lost > max(SOME_LOST, window.admitted):
            self._distrust_until_s = now_s + DISTRUST_S
        self._window = _Window(now_s)

    def _retry_s(self) -> float:
        """About when who is refused should come again."""
        if not self._is_crowded:
            return OPEN_RETRY_S
        wanted_s = len(self._callers) * self._interval_s / TRIES_A_LOAD
        return min(max(wanted_s, MIN_RETRY_S), MAX_RETRY_S)

    def _post(self, now_s: float) -> None:
        """Bring the board up to date."""
        is_posted = self._is_crowded and now_s >= self._distrust_until_s
        self._renew_tickets(now_s, self._limits.crowded if is_posted else 0)
        until_s = now_s + (BELIEVED_S if self._inside else IDLE_S)
        self._board.post(until_s if is_posted else 0.0, self._retry_s())

    def _renew_tickets(self, now_s: float, wanted: int) -> None:
        """See to it that loads with tickets and in service are as many as wanted."""
        tickets = self._tickets_s
        if tickets and (not wanted or now_s - tickets[0] > LOST_S):
            self._window.lost += max(0, len(tickets) - self._board.take_tickets())
            tickets.clear()
        number = wanted - self._num_counted(now_s) - len(tickets)
        if number > 0:
            tickets.extend([now_s] * number)
            self._board.put_tickets(number)


@dataclass(slots=True)
class _Window:
    """What happened since it began."""

    began_s: float
    admitted: int = 0
    refused: int = 0
    """By the daemon and by the board."""
    lost: int = 0
    """Tickets."""
