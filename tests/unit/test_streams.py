"""Streams that are threads, held to what every back-end must do."""

from __future__ import annotations

import threading

import pytest

from ucm.errors import CapacityError
from ucm.kernels import streams as streams_module
from ucm.kernels.streams import CpuStream, CpuStreams, Work
from ucm.testing.stream_conformance import StreamTests


class TestCpuStreams(StreamTests):
    @pytest.fixture(autouse=True)
    def _cells(self) -> None:
        self.values = list(range(16))

    def make_streams(self) -> CpuStreams:
        return CpuStreams()

    def copy(self, to: int, source: int) -> Work:
        def work(handle: int) -> None:
            assert handle == 0
            self.values[to] = self.values[source]

        return work

    def cells(self) -> list[int]:
        return self.values


def test_streams_run_side_by_side() -> None:
    streams = CpuStreams()
    held = threading.Event()
    streams.stream("held").submit(lambda _handle: None if held.wait(5) else pytest.fail("late"))
    event = streams.stream("held").record()
    streams.stream("free").synchronize()
    assert not event.is_reached
    assert not event.wait(timeout_s=0.01)
    held.set()
    assert event.wait(timeout_s=5)
    assert "0 waiting" in repr(streams.stream("held"))
    streams.close()


def test_a_stream_takes_only_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "MAX_QUEUED", 2)
    stream, held, begun = CpuStream("small"), threading.Event(), threading.Event()

    def hold(_handle: int) -> None:
        begun.set()
        held.wait(5)

    stream.submit(hold)
    assert begun.wait(5)
    stream.submit(hold)
    stream.submit(hold)
    with pytest.raises(CapacityError, match="small"):
        stream.submit(hold)
    held.set()
    stream.close()


def test_threads_are_named_and_end() -> None:
    streams = CpuStreams()
    streams.stream("load").synchronize()
    assert "ucm-stream-load" in {thread.name for thread in threading.enumerate()}
    streams.close()
    assert "ucm-stream-load" not in {thread.name for thread in threading.enumerate()}
