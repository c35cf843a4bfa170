"""CUDA streams, and loads into device memory, on the driver's double.

Run by tests/conformance/test_on_doubles.py in a process of its own. It runs on a double of the CUDA
driver: it proves our code, not NVIDIA's. On lazy streams everything is done as late as a GPU may:
who waits too little finds old bytes.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ucm.errors import InvalidArgumentError
from ucm.kernels.cuda.driver import CudaDriver
from ucm.kernels.cuda.streams import CudaStreams
from ucm.kernels.streams import CpuStreams, Work
from ucm.testing.doubles import Doubles, device_bytes
from ucm.testing.stream_conformance import StreamTests

DOUBLES = Doubles(Path(os.environ["UCM_DOUBLES"]))


class TestCudaStreams(StreamTests):
    @pytest.fixture(autouse=True)
    def _memory(self) -> Iterator[None]:
        self.driver = CudaDriver()
        with DOUBLES.device_memory(16 * 8) as self.memory:
            self.numbers = np.frombuffer(device_bytes(self.memory), np.int64)
            self.numbers[:] = np.arange(16)
            yield

    def make_streams(self) -> CudaStreams:
        return CudaStreams(self.driver)

    def copy(self, to: int, source: int) -> Work:
        base = self.memory.address
        return lambda handle: self.driver.copy(base + 8 * to, base + 8 * source, 8, handle)

    def cells(self) -> list[int]:
        return [int(number) for number in self.numbers]


class TestCudaStreamsLazily(TestCudaStreams):
    @pytest.fixture(autouse=True)
    def _lazily(self, _memory: None) -> Iterator[None]:
        with DOUBLES.lazy_streams():
            yield

    def test_nothing_is_done_before_somebody_waits(self) -> None:
        """What the other tests count on."""
        streams = self.make_streams()
        stream = streams.stream("copy")
        stream.submit(self.copy(1, 5))
        event = stream.record()
        assert self.cells()[1] == 1
        assert not event.wait(timeout_s=0)
        assert event.wait(timeout_s=5)
        assert self.cells()[1] == 5
        streams.close()

    def test_a_stream_of_torch_waits_like_ours(self) -> None:
        """By its handle; it is not ours to destroy."""
        streams, theirs = self.make_streams(), self.driver.create_stream()
        compute = streams.adopt("compute", theirs)
        streams.stream("load").submit(self.copy(1, 5))
        compute.wait_for(streams.stream("load").record())
        compute.submit(self.copy(2, 1))
        compute.synchronize()
        assert self.cells()[2] == 5
        streams.close()
        self.driver.copy(self.memory.address, self.memory.address + 8, 8, theirs)
        self.driver.destroy_stream(theirs)
        assert self.cells()[0] == 5


def test_a_gpu_does_not_wait_for_a_thread() -> None:
    streams, threads = CudaStreams(CudaDriver()), CpuStreams()
    with pytest.raises(InvalidArgumentError):
        streams.stream("load").wait_for(threads.stream("read").record())
    threads.stream("read").wait_for(streams.stream("load").record())
    threads.stream("read").synchronize()
    with contextlib.closing(streams), contextlib.closing(threads):
        pass


def test_streams_and_events_are_given_back() -> None:
    before = DOUBLES.driver_counts()
    streams = CudaStreams(CudaDriver())
    events = [streams.stream(str(n)).record() for n in range(3)]
    assert DOUBLES.driver_counts().events - before.events == 3
    assert all(event.wait() for event in events)
    events.clear()
    gc.collect()
    streams.close()
    after = DOUBLES.driver_counts()
    assert (after.streams, after.events) == (before.streams, before.events)
