"""The recorder: off by default, bounded, ordered, and fit for threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from ucm import tracing
from ucm.tracing import TraceRecorder, Track


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    tracing.stop_recording()


def test_nobody_records_unless_asked() -> None:
    assert tracing.active() is None
    assert tracing.stop_recording() == ()


def test_events_come_back_in_the_order_of_their_begin() -> None:
    recorder = tracing.start_recording()
    assert tracing.active() is recorder
    recorder.add(Track.COMPUTE, 30, 40, layers=(1, 1))
    recorder.add(Track.LOAD, 10, 20, layers=(1, 2), blocks=(3, 2), request_id="a")
    load, compute = tracing.stop_recording()
    assert (load.track, load.layer, load.first_block, load.num_blocks) == (Track.LOAD, 1, 3, 2)
    assert (load.request_id, load.end_us, load.num_layers) == ("a", 20, 2)
    assert (compute.track, compute.first_block, compute.num_blocks) == (Track.COMPUTE, -1, 0)
    assert tracing.active() is None


def test_a_recorder_is_bounded_and_counts_what_it_dropped() -> None:
    recorder = TraceRecorder(max_events=3)
    for begin_us in range(5):
        recorder.add(Track.STALL, begin_us, begin_us + 1)
    assert [event.begin_us for event in recorder.events()] == [0, 1, 2]
    assert recorder.num_dropped == 2


def test_threads_lose_nothing() -> None:
    recorder = tracing.start_recording()
    barrier = threading.Barrier(4)

    def work(layer: int) -> None:
        barrier.wait()
        for begin_us in range(500):
            recorder.add(Track.LOAD, begin_us, begin_us + 1, layers=(layer, 1))

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = tracing.stop_recording()
    assert len(events) == 2000
    assert len({(event.layer, event.begin_us) for event in events}) == 2000


def test_the_clock_does_not_go_back() -> None:
    assert tracing.now_us() <= tracing.now_us()
