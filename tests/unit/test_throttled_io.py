"""The token bucket, and reads that keep to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.clock import SimClock, SystemClock
from ucm.storage.file_io import IoRequest, PosixFileIo, aligned_buffer
from ucm.storage.throttled_io import ThrottledIo, TokenBucket, bucket_of, limit_of

RATE = 1_000_000


def test_a_burst_is_free_and_a_debt_is_paid() -> None:
    clock = SimClock()
    bucket = TokenBucket(RATE, 1000, clock)
    assert bucket.take(1000) == 0.0
    assert bucket.take(500) == pytest.approx(0.0005)
    assert bucket.take(500) == pytest.approx(0.001)
    clock.advance_us(1000)
    assert bucket.take(0) == 0.0
    clock.advance_us(10_000_000)
    assert bucket.take(2000) == pytest.approx(0.001)
    assert bucket.take(-1000) == 0.0
    assert limit_of(0, clock) is None


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (1, 0), (-1, 1), (float("nan"), 1)])
def test_a_bucket_must_let_something_through(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="bucket"):
        TokenBucket(rate, burst, SimClock())


@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 50_000)), min_size=1, max_size=50)
)
def test_no_more_passes_than_the_limit_allows(takes: list[tuple[int, int]]) -> None:
    """Whoever waits as told moves at most a burst more than the rate, over any time."""
    clock = SimClock()
    bucket = TokenBucket(RATE, 10_000, clock)
    moved = 0
    for num_bytes, pause_us in takes:
        clock.advance_us(pause_us)
        clock.advance_us(round(bucket.take(num_bytes) * 1e6))
        moved += num_bytes
        assert moved <= 10_000 + RATE * clock.now_us() / 1e6 + len(takes)


class RecordingIo(PosixFileIo):
    """Notes the batches that arrive."""

    def __init__(self) -> None:
        super().__init__(io_threads=1)
        self.batches: list[int] = []

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        self.batches.append(len(requests))
        return super().read_batch(requests)


def test_a_batch_is_cut_into_bursts(tmp_path: Path) -> None:
    """Every part waits for its tokens; results come in order."""
    clock = SimClock()
    inner, slept = RecordingIo(), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.advance_us(round(seconds * 1e6))

    io = ThrottledIo(inner, bucket_of(RATE, clock), sleep)
    path = tmp_path / "file"
    path.write_bytes(bytes(4096 * 8))
    file = io.open(path, create=False, writable=False)
    requests = [IoRequest(file, 4096 * number, (aligned_buffer(4096),)) for number in range(9)]
    codes = io.read_batch(requests)
    assert codes[:8] == [0] * 8
    assert codes[8]
    assert inner.batches == [3, 3, 3]
    assert sum(slept) == pytest.approx((9 * 4096 - 10_000) / RATE, abs=1e-5)
    io.close_file(file)
    io.close()


def test_a_real_limit_takes_its_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    io = ThrottledIo(PosixFileIo(io_threads=1), bucket_of(10 << 20, SystemClock()))
    file = io.open(path, create=False, writable=False)
    start = time.monotonic()
    assert io.read_batch([IoRequest(file, 0, (aligned_buffer(1 << 20),))]) == [0]
    assert time.monotonic() - start >= 0.085
    io.close_file(file)
    io.close()
