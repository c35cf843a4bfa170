"""The gate of loads on a clock set by hand: open, crowded, and open again; and whole crowds."""

from __future__ import annotations

import heapq
import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from ucm.config import ServiceConfig
from ucm.errors import CapacityError
from ucm.load_board import BoardReader, LoadBoard, Made, made_of
from ucm.load_gate import (
    CALLERS_S,
    DISTRUST_S,
    IDLE_S,
    LATE_S,
    LOST_S,
    OPEN_RETRY_S,
    STALLED_S,
    STANDING_S,
    WINDOW_S,
    GateLimits,
    LoadGate,
)

MOST, CROWDED = 4, 2
LIMITS = GateLimits(MOST, CROWDED, waiting=2)
TICKET = Made(has_ticket=True)
NS = 1_000_000_000


class Place:
    """A gate with its board, and how a client sees it."""

    def __init__(self, limits: GateLimits = LIMITS) -> None:
        self.now_s = 100.0
        self.board = LoadBoard()
        self.gate = LoadGate(limits, self.board, share=lambda: 0.5)
        self.inside: list[float] = []

    def enter(self, caller: int = 0, made: Made | None = None) -> float:
        """Take a place a moment later."""
        self.now_s += 1e-6
        self.gate.enter(caller, self.now_s, made or Made())
        self.inside.append(self.now_s)
        return self.now_s

    def leave(self, took_s: float = 0.0, *, was_refused: bool = False) -> None:
        self.now_s += took_s
        self.gate.leave(self.inside.pop(0), self.now_s, was_refused=was_refused)

    def refused(self, caller: int = 0, made: Made | None = None) -> float:
        """The hint of a refusal, which must come."""
        with pytest.raises(CapacityError, match="in service") as caught:
            self.enter(caller, made)
        return caught.value.retry_after_s

    def crowd(self, callers: int = 8) -> None:
        """All places are taken, and others are refused until that is no burst."""
        while len(self.inside) < MOST:
            self.enter(len(self.inside))
        while not self.gate.is_crowded:
            for caller in range(callers):
                self.refused(caller)
            self.now_s += STANDING_S / 2

    def new_reader(self) -> BoardReader:
        """Of another client."""
        tickets = os.dup(self.board.fds[1])
        clock = lambda: int(self.now_s * NS)  # noqa: E731
        return BoardReader(self.board.memory, tickets, clock, lambda: 0.5)

    def passes(self) -> Made | None:
        """What a client that has not been here would tell the daemon; None if it is refused."""
        try:
            made = made_of(self.new_reader().pass_load(), self.now_s)
            return Made(0.0, made.num_refused, made.has_ticket)
        except CapacityError:
            return None


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.board.close()


@pytest.mark.parametrize(
    ("configured", "num_processors", "expected"),
    [(0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 8, 4), (0, 64, 12), (3, 2, 3), (99, 2, 12)],
)
def test_a_crowd_gets_half_of_the_processors_unless_told_otherwise(
    configured: int, num_processors: int, expected: int
) -> None:
    service = ServiceConfig(max_crowded_loads=configured, max_waiting_loads=6, rpc_threads=16)
    assert GateLimits.of(service, num_processors) == GateLimits(12, expected, 6)


def test_up_to_the_limit_nobody_is_refused_however_long_it_lasts(place: Place) -> None:
    for caller in range(1_000):
        while len(place.inside) < MOST:
            place.enter(caller % MOST, Made(waited_s=0.02))
        assert place.passes() == Made()
        place.leave(0.01)
    assert not place.gate.is_crowded


def test_a_burst_is_refused_but_is_no_crowd(place: Place) -> None:
    for _ in range(MOST):
        place.enter()
    for _ in range(20):
        assert place.refused() == pytest.approx(OPEN_RETRY_S)
    place.now_s += 1.0
    place.refused()
    assert not place.gate.is_crowded
    assert place.passes() == Made()


def test_a_crowd_is_let_in_by_tickets(place: Place) -> None:
    place.crowd()
    assert place.passes() is None  # more than it takes are in service
    for _ in range(MOST - CROWDED):
        place.leave()
    assert place.passes() is None
    place.leave()
    found = place.passes()
    assert found is not None
    assert found.has_ticket
    assert place.passes() is None
    place.enter(7, TICKET)
    assert place.passes() is None
    place.refused(8)


def test_a_call_without_a_ticket_gets_a_place_that_is_free_if_it_is_not_late(place: Place) -> None:
    place.crowd()
    for _ in range(MOST - CROWDED + 1):
        place.leave()
    place.refused(1, Made(waited_s=2 * LATE_S))
    place.enter(2, Made(waited_s=LATE_S / 2))
    place.leave()
    place.leave()
    place.enter(1, Made(waited_s=2 * LATE_S))  # with nobody in service it is no queue


def test_calls_that_queue_in_front_of_the_gate_make_a_crowd(place: Place) -> None:
    for caller in range(100):
        place.enter(caller % 10, Made(waited_s=0.005 * MOST))
        place.leave(0.004)
    assert place.gate.is_crowded


def test_hints_grow_with_those_who_come(place: Place) -> None:
    place.crowd(callers=10)
    few_s = place.refused(0)
    for caller in range(40):
        place.refused(caller)
    assert place.refused(0) == pytest.approx(4 * few_s)


def test_a_lost_ticket_is_issued_again(place: Place) -> None:
    place.crowd()
    for _ in range(MOST):
        place.leave()
    assert place.passes() is not None
    assert place.passes() is not None
    assert place.passes() is None
    place.now_s += LOST_S + 0.01
    place.enter(1, Made(waited_s=0.0))
    place.leave()
    assert place.passes() is not None


def test_who_takes_all_tickets_opens_the_board(place: Place) -> None:
    place.crowd()
    for _ in range(MOST):
        place.leave()
    step_s = LOST_S + 0.01
    for caller in range(int(2 * WINDOW_S / step_s)):
        place.board.take_tickets()
        place.now_s += step_s
        place.enter(caller % 20, Made(num_refused=9))
        place.leave()
    assert place.gate.is_crowded
    assert place.passes() == Made(), "the board still asks for tickets"
    for caller in range(int(DISTRUST_S / step_s)):
        place.now_s += step_s
        place.enter(caller % 20, Made(num_refused=9))
        place.leave()
    found = place.passes()
    assert found is not None
    assert found.has_ticket


def test_a_crowd_ends_when_hardly_anybody_is_refused(place: Place) -> None:
    place.crowd()
    for _ in range(MOST):
        place.leave()
    for caller in range(200):
        place.enter(caller % 8, place.passes())
        place.leave(0.01)
    assert not place.gate.is_crowded
    assert place.passes() == Made()
    assert place.board.take_tickets() == 0


def test_a_crowd_ends_when_few_are_left(place: Place) -> None:
    place.crowd()
    for _ in range(MOST):
        place.leave()
    for _ in range(int((CALLERS_S + 2 * WINDOW_S) / 0.01)):
        place.enter(1, Made(num_refused=3, has_ticket=True))
        place.leave(0.01)
    assert not place.gate.is_crowded


def test_a_crowd_ends_with_the_sessions_of_those_who_wait(place: Place) -> None:
    place.crowd(callers=8)
    for _ in range(MOST):
        place.leave()
    for caller in range(8 - CROWDED):
        assert place.gate.is_crowded
        place.gate.forget(caller, place.now_s)
    assert not place.gate.is_crowded
    assert place.passes() == Made()
    assert place.board.take_tickets() == 0


def test_a_caller_that_is_not_known_is_forgotten_too(place: Place) -> None:
    place.gate.forget("nobody", place.now_s)
    assert place.passes() == Made()


def test_who_dies_with_the_only_ticket_keeps_others_away_for_a_moment(place: Place) -> None:
    place.crowd()
    for _ in range(MOST):
        place.leave()
    for _ in range(CROWDED):
        assert place.passes() == Made(has_ticket=True)
    assert place.passes() is None
    place.now_s += IDLE_S
    assert place.passes() == Made()


def test_loads_that_wait_for_a_slow_disk_hold_up_no_others(place: Place) -> None:
    place.crowd()
    for _ in range(MOST - CROWDED):
        place.leave()
    place.refused(1)
    place.now_s += STALLED_S + 0.01
    place.enter(1, Made())
    place.enter(2, Made())
    place.refused(3, TICKET)  # as many as may, stalled or not


def test_a_clients_own_limit_makes_no_crowd(place: Place) -> None:
    for _ in range(100):
        place.enter(1)
        place.leave(0.01, was_refused=True)
    assert not place.gate.is_crowded


def test_refusals_for_want_of_the_disk_do(place: Place) -> None:
    for _ in range(2):
        place.enter(1)
    for _ in range(int(STANDING_S / 0.01) + 2):
        if place.gate.is_crowded:
            return
        began_s = place.enter(2)
        place.now_s += 0.011
        place.inside.remove(began_s)
        place.gate.leave(began_s, place.now_s, was_refused=True)
    raise AssertionError("refused all the time, and no crowd")


class Machine:
    """Clients and a daemon whose loads share a processor: each takes as long as all inside.

    Calls take `TRAVEL_S` to the gate, as they do from one process to another.
    """

    ALONE_S, TRAVEL_S = 0.01, 0.004

    def __init__(self, num_clients: int, seed: int) -> None:
        self.place = Place(GateLimits(16, 2, waiting=8))
        self.readers = [self.place.new_reader() for _ in range(num_clients)]
        self.random = random.Random(seed)
        self.events: list[tuple[float, int, str, float, Made]] = []
        for client in range(num_clients):
            self._later(client, "look", self.random.random() * 0.1)
        self.loads: list[tuple[float, float]] = []
        self.by_client: Counter[int] = Counter()
        self.stays = num_clients
        self.num_calls_refused = self.num_looks_refused = 0

    def _later(
        self, client: int, what: str, in_s: float, began_s: float = 0.0, made: Made | None = None
    ) -> None:
        at_s = self.place.now_s + in_s
        heapq.heappush(self.events, (at_s, client, what, began_s, made or Made()))

    def _hinted(self, client: int, hint_s: float) -> None:
        self._later(client, "look", hint_s * self.random.uniform(0.5, 1.5))

    def run(self, duration_s: float) -> None:
        stop_s = self.place.now_s + duration_s
        while self.events and self.events[0][0] < stop_s:
            now_s, client, what, began_s, made = heapq.heappop(self.events)
            self.place.now_s = now_s
            if what == "look":
                if client >= self.stays:
                    continue
                try:
                    made = made_of(self.readers[client].pass_load(), now_s)
                except CapacityError as error:
                    self.num_looks_refused += 1
                    self._hinted(client, error.retry_after_s)
                else:
                    self._later(client, "call", self.TRAVEL_S, now_s, made)
            elif what == "call":
                self._call(client, began_s, made)
            else:
                self.place.gate.leave(made.waited_s, now_s)  # the time when it entered
                self.place.inside.remove(made.waited_s)
                self.loads.append((began_s, now_s))
                self.by_client[client] += 1
                self._later(client, "look", self.random.random() * 0.002)

    def _call(self, client: int, began_s: float, made: Made) -> None:
        told = Made(self.TRAVEL_S * 0.9, made.num_refused, made.has_ticket)
        try:
            entered_s = self.place.enter(client, told)
        except CapacityError as error:
            self.num_calls_refused += 1
            self._hinted(client, error.retry_after_s)
            return
        took_s = self.ALONE_S * max(1.0, len(self.place.inside) / 1.6)
        self._later(client, "end", took_s, began_s, Made(entered_s))

    def p99_s(self, after_s: float) -> float:
        took = sorted(end_s - began_s for began_s, end_s in self.loads if began_s >= after_s)
        return took[int(0.99 * len(took))]


@pytest.mark.parametrize("num_clients", [80, 320])
def test_ten_times_the_capacity_hardly_slows_who_is_admitted(num_clients: int) -> None:
    alone, two, crowd = Machine(1, seed=1), Machine(2, seed=1), Machine(num_clients, seed=2)
    alone.run(5.0)
    two.run(5.0)
    began_s = crowd.place.now_s
    crowd.run(15.0)
    assert crowd.place.gate.is_crowded
    assert crowd.p99_s(began_s + 5.0) <= 2 * alone.p99_s(0.0)
    served = [load for load in crowd.loads if load[0] >= began_s + 5.0]
    assert len(served) / 10.0 >= 0.9 * len(two.loads) / 5.0
    assert crowd.num_calls_refused <= 0.3 * len(crowd.loads)
    assert crowd.num_looks_refused <= 6 * len(crowd.loads)
    assert len(crowd.by_client) >= 0.97 * num_clients
    assert max(crowd.by_client.values()) <= 4 * len(crowd.loads) / num_clients


def test_who_is_left_alone_is_served_as_before_a_moment_later() -> None:
    machine = Machine(80, seed=4)
    machine.run(5.0)
    machine.stays = 1
    machine.run(1.5)
    begun = len(machine.loads)
    machine.run(2.0)
    assert not machine.place.gate.is_crowded
    assert len(machine.loads) - begun >= 0.95 * 2.0 / (Machine.ALONE_S + Machine.TRAVEL_S + 0.001)


@pytest.mark.parametrize("num_clients", [1, 4, 16])
def test_as_many_as_it_takes_are_never_refused(num_clients: int) -> None:
    machine = Machine(num_clients, seed=3)
    machine.run(5.0)
    assert (machine.num_calls_refused, machine.num_looks_refused) == (0, 0)
    assert len(machine.by_client) == num_clients
