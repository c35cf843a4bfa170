"""What waits to be stored: who joins whom, who waits for what, and for how long."""

from __future__ import annotations

from collections.abc import Sequence

from ucm.api import SlabChecksums
from ucm.connectors.store_queue import QueueLimits, StoreJob, StoreQueue
from ucm.errors import TierUnavailableError
from ucm.types import ROOT_KEY, BlockKey

LIMITS = QueueLimits(max_blocks=8, run_blocks=4, delay_s=5.0)
KEYS = [BlockKey(bytes([number]) * 32) for number in range(1, 12)]


class Request:
    """Offers its chain piece by piece."""

    def __init__(self, name: str, keys: Sequence[BlockKey] = KEYS) -> None:
        self.name = name
        self.keys = keys
        self.num_offered = 0
        self.released: list[int] = []
        self.fails_at: int | None = None

    def job(self, count: int) -> StoreJob:
        """The next `count` blocks."""
        first = self.num_offered
        self.num_offered += count

        def fill(indexes: Sequence[int], slots: Sequence[memoryview]) -> list[SlabChecksums]:
            if self.fails_at == first:
                raise TierUnavailableError("the pass failed")
            for index, slot in zip(indexes, slots, strict=True):
                slot[0] = first + index
            return [(first + index,) for index in indexes]

        return StoreJob(
            request_id=self.name,
            parent=self.keys[first - 1] if first else ROOT_KEY,
            keys=tuple(self.keys[first : self.num_offered]),
            fill=fill,
            release=lambda: self.released.append(first),
        )


def test_a_block_waits_for_those_that_continue_it_but_not_for_ever() -> None:
    queue, request = StoreQueue(LIMITS), Request("a")
    assert queue.seconds_to_due(0.0) is None
    assert queue.add(request.job(1), 10.0)
    assert queue.add(request.job(1), 12.0)
    assert queue.take(14.9) is None
    assert queue.seconds_to_due(14.0) == 1.0, "the first block's time counts"
    run = queue.take(15.0)
    assert run is not None
    assert (run.parent, run.keys) == (ROOT_KEY, KEYS[:2])
    run.release()
    assert request.released == [0, 1]
    assert not queue


def test_many_blocks_wait_for_nothing() -> None:
    queue, request = StoreQueue(LIMITS), Request("a")
    assert queue.add(request.job(4), 0.0)
    assert queue.seconds_to_due(0.0) == 0.0
    run = queue.take(0.0)
    assert run is not None
    assert run.keys == KEYS[:4]
    assert queue.take(100.0) is None


def test_a_run_is_due_when_it_is_long_enough() -> None:
    queue, request = StoreQueue(LIMITS), Request("a")
    for _ in range(3):
        assert queue.add(request.job(1), 0.0)
        assert queue.take(0.0) is None
    assert queue.add(request.job(1), 0.0)
    run = queue.take(0.0)
    assert run is not None
    assert run.keys == KEYS[:4]


def test_the_end_of_a_request_ends_its_waiting_and_no_other() -> None:
    queue, one, other = StoreQueue(LIMITS), Request("a"), Request("b", KEYS[5:])
    assert queue.add(one.job(1), 0.0)
    assert queue.add(other.job(1), 0.0)
    assert queue.hurry("b", 1.0)
    assert not queue.hurry("c", 1.0)
    run = queue.take(1.0)
    assert run is not None
    assert run.keys == KEYS[5:6]
    assert queue.take(1.0) is None
    assert queue.take(1.0, awaits_none=True) is not None


def test_parents_go_before_their_children() -> None:
    queue, one, other = StoreQueue(LIMITS), Request("a"), Request("b")
    assert queue.add(one.job(2), 0.0)
    other.num_offered = 1
    assert queue.add(other.job(4), 0.0), "it branches off in the middle of the first run"
    first, second = queue.take(0.0), queue.take(0.0)
    assert first is not None
    assert second is not None
    assert (first.keys, second.keys) == (KEYS[:2], KEYS[1:5])


def test_what_does_not_fit_is_refused() -> None:
    queue, request = StoreQueue(LIMITS), Request("a")
    assert queue.add(request.job(6), 0.0)
    assert not queue.add(request.job(3), 0.0)
    assert queue.take(0.0) is not None
    assert queue.add(Request("b").job(8), 0.0)


def test_a_run_is_filled_by_its_jobs() -> None:
    queue, request = StoreQueue(LIMITS), Request("a")
    for count in (1, 2, 1):
        assert queue.add(request.job(count), 0.0)
    run = queue.take(0.0)
    assert run is not None
    slots = [memoryview(bytearray(1)) for _ in range(3)]
    assert run.fill([0, 2, 3], slots) == ([(0,), (2,), (3,)], None)
    assert [slot[0] for slot in slots] == [0, 2, 3]


def test_what_was_copied_before_a_failed_pass_counts() -> None:
    queue, request = StoreQueue(LIMITS), Request("a")
    request.fails_at = 1
    for count in (1, 2, 1):
        assert queue.add(request.job(count), 0.0)
    run = queue.take(0.0)
    assert run is not None
    checksums, error = run.fill(range(4), [memoryview(bytearray(1)) for _ in range(4)])
    assert checksums == [(0,)]
    assert isinstance(error, TierUnavailableError)
