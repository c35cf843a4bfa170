"""The pool and group commit: priorities, limits, batches, the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from ucm.errors import CapacityError, TierUnavailableError
from ucm.testing.stores import wait_until
from ucm.transfer import FAIR_EVERY, CommitLimits, GroupCommit, Priority, TransferPool


@pytest.fixture
def pool() -> Iterator[TransferPool]:
    made = TransferPool(1, 100)
    yield made
    assert made.close(timeout_s=5)


def block(pool: TransferPool) -> threading.Event:
    """Occupy the only thread until the event is set."""
    go, running = threading.Event(), threading.Event()

    def wait() -> None:
        running.set()
        go.wait()

    pool.submit(Priority.LOAD, wait)
    running.wait()
    return go


def _wait(event: threading.Event) -> None:
    event.wait()


def _divide_by_zero() -> None:
    raise ZeroDivisionError


class TestPool:
    def test_urgent_work_comes_first(self, pool: TransferPool) -> None:
        go = block(pool)
        order: list[str] = []
        for name in ("w", "p", "l"):
            priority = {"w": Priority.WRITE, "p": Priority.PREFETCH, "l": Priority.LOAD}[name]
            pool.submit(priority, partial(order.append, name))
        go.set()
        wait_until(lambda: len(order) == 3)
        assert order == ["l", "p", "w"]

    def test_a_write_is_not_starved(self, pool: TransferPool) -> None:
        go = block(pool)
        order: list[str] = []
        pool.submit(Priority.WRITE, lambda: order.append("w"))
        for _ in range(3 * FAIR_EVERY):
            pool.submit(Priority.LOAD, lambda: order.append("l"))
        go.set()
        wait_until(lambda: len(order) == 3 * FAIR_EVERY + 1)
        assert order.index("w") <= FAIR_EVERY

    def test_the_queue_is_bounded_by_weight(self, pool: TransferPool) -> None:
        go = block(pool)
        pool.submit(Priority.LOAD, lambda: None, weight=90)
        with pytest.raises(CapacityError):
            pool.submit(Priority.LOAD, lambda: None, weight=11)
        pool.submit(Priority.LOAD, lambda: None, weight=10)
        assert pool.num_queued == 100
        go.set()
        wait_until(lambda: pool.num_queued == 0)

    def test_a_job_without_weight_runs_too(self, pool: TransferPool) -> None:
        done = threading.Event()
        pool.submit(Priority.WRITE, done.set, weight=0)
        assert done.wait(5)

    def test_a_job_that_raises_does_not_end_the_thread(
        self, pool: TransferPool, caplog: pytest.LogCaptureFixture
    ) -> None:
        done = threading.Event()
        with caplog.at_level(logging.ERROR):
            pool.submit(Priority.LOAD, _divide_by_zero)
            pool.submit(Priority.LOAD, done.set)
            assert done.wait(5)
        assert "unforeseen" in caplog.text

    def test_close_finishes_what_is_queued(self) -> None:
        pool = TransferPool(2, 100)
        ran: list[int] = []
        go = threading.Event()
        for _ in range(2):
            pool.submit(Priority.LOAD, partial(_wait, go))
        for number in range(20):
            pool.submit(Priority.WRITE, partial(ran.append, number))
        go.set()
        assert pool.close(timeout_s=5)
        assert sorted(ran) == list(range(20))
        with pytest.raises(TierUnavailableError):
            pool.submit(Priority.LOAD, lambda: None)

    def test_close_gives_up_in_time(self) -> None:
        pool = TransferPool(1, 10)
        go = block(pool)
        assert not pool.close(timeout_s=0.01)
        go.set()
        assert pool.close(timeout_s=5)


class Committer:
    """Records batches; holds the commit back while `go` is clear."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, batch: list[int]) -> None:
        self.go.wait()
        self.batches.append(batch)


def limits(max_items: int = 4, interval_s: float = 60.0) -> CommitLimits:
    return CommitLimits(max_items=max_items, max_queued_bytes=100, interval_s=interval_s)


class TestGroupCommit:
    def test_a_full_batch_does_not_wait_for_company(self, pool: TransferPool) -> None:
        committer = Committer()
        commits: GroupCommit[int] = GroupCommit(committer, limits(), pool)
        for number in range(4):
            commits.offer(number, 1)
        wait_until(lambda: committer.batches == [[0, 1, 2, 3]])
        assert commits.close(timeout_s=5)

    def test_a_lone_item_waits_for_the_interval_only(self, pool: TransferPool) -> None:
        committer = Committer()
        commits: GroupCommit[int] = GroupCommit(committer, limits(interval_s=0.01), pool)
        commits.offer(7, 1)
        wait_until(lambda: committer.batches == [[7]])
        assert commits.close(timeout_s=5)

    def test_a_flush_does_not_wait_for_the_interval(self, pool: TransferPool) -> None:
        committer = Committer()
        commits: GroupCommit[int] = GroupCommit(committer, limits(), pool)
        commits.offer(1, 1)
        assert commits.wait_settled(timeout_s=5)
        assert committer.batches == [[1]]
        assert commits.close(timeout_s=5)

    def test_order_and_size_of_batches(self, pool: TransferPool) -> None:
        committer = Committer()
        committer.go.clear()
        commits: GroupCommit[int] = GroupCommit(committer, limits(), pool)
        for number in range(11):
            commits.offer(number, 1)
        committer.go.set()
        assert commits.wait_settled(timeout_s=5)
        assert [each for batch in committer.batches for each in batch] == list(range(11))
        assert max(len(batch) for batch in committer.batches) <= 4
        assert commits.close(timeout_s=5)

    def test_bytes_are_bounded_until_they_are_committed(self, pool: TransferPool) -> None:
        committer = Committer()
        committer.go.clear()
        commits: GroupCommit[int] = GroupCommit(committer, limits(max_items=1), pool)
        commits.offer(1, 60)
        commits.offer(2, 40)
        with pytest.raises(CapacityError):
            commits.offer(3, 1)
        assert (commits.queued_bytes, commits.num_queued) == (100, 2)
        assert not commits.wait_settled(timeout_s=0.01)
        committer.go.set()
        assert commits.wait_settled(timeout_s=5)
        assert commits.queued_bytes == 0
        commits.offer(3, 100)
        assert commits.close(timeout_s=5)

    def test_close_commits_what_waits(self, pool: TransferPool) -> None:
        committer = Committer()
        commits: GroupCommit[int] = GroupCommit(committer, limits(), pool)
        commits.offer(1, 1)
        assert commits.close(timeout_s=5)
        assert committer.batches == [[1]]
        with pytest.raises(TierUnavailableError):
            commits.offer(2, 1)

    def test_a_pool_that_is_gone_settles_without_writing(self) -> None:
        pool, committer = TransferPool(1, 10), Committer()
        commits: GroupCommit[int] = GroupCommit(committer, limits(), pool)
        assert pool.close(timeout_s=5)
        commits.offer(1, 1)
        assert commits.wait_settled(timeout_s=5)
        assert committer.batches == []
        assert commits.close(timeout_s=5)
