"""What every back-end of `ucm.kernels.streams` must do. A test subclasses `StreamTests`.

Work here is `copy`: it moves a number between cells that streams of the back-end can move, so that
the same tests run with threads and with a driver that does everything as late as it may.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import pytest

from ucm.errors import TierUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ucm.kernels.streams import Streams, Work


class StreamTests(abc.ABC):
    """Behaviour that `ucm.layer_pipeline` relies on."""

    @abc.abstractmethod
    def make_streams(self) -> Streams:
        """A fresh back-end."""

    @abc.abstractmethod
    def copy(self, to: int, source: int) -> Work:
        """Work that copies cell `source` to cell `to`; cell n holds n at first."""

    @abc.abstractmethod
    def cells(self) -> list[int]:
        """All cells, as they are now; at least 8."""

    @pytest.fixture
    def streams(self) -> Iterator[Streams]:
        """One, closed afterwards."""
        streams = self.make_streams()
        yield streams
        streams.close()

    def test_work_happens_in_order(self, streams: Streams) -> None:
        """A chain of copies carries the first value to the end."""
        stream = streams.stream("copy")
        for cell in range(1, 8):
            stream.submit(self.copy(cell, cell - 1))
        stream.synchronize()
        assert self.cells()[:8] == [0] * 8

    def test_a_name_is_one_stream(self, streams: Streams) -> None:
        """Wherever it is asked for."""
        assert streams.stream("a") is streams.stream("a")
        assert streams.stream("a") is not streams.stream("b")
        assert streams.stream("b").name == "b"

    def test_an_event_stands_for_what_was_before(self, streams: Streams) -> None:
        """And is reached once that is done."""
        stream = streams.stream("copy")
        stream.submit(self.copy(1, 5))
        event = stream.record()
        assert event.wait()
        assert self.cells()[1] == 5
        assert event.is_reached
        assert event.wait(timeout_s=0)

    def test_a_stream_waits_for_another(self, streams: Streams) -> None:
        """A value that crosses four streams arrives, whichever of them runs first."""
        last = streams.stream("0")
        last.submit(self.copy(1, 7))
        for hop in range(1, 4):
            stream = streams.stream(str(hop))
            stream.wait_for(last.record())
            stream.submit(self.copy(hop + 1, hop))
            last = stream
        last.synchronize()
        assert self.cells()[1:5] == [7] * 4

    def test_an_event_is_of_its_time(self, streams: Streams) -> None:
        """What is submitted behind it does not move it."""
        first, second = streams.stream("1"), streams.stream("2")
        first.submit(self.copy(1, 7))
        event = first.record()
        first.submit(self.copy(2, 7))
        second.wait_for(event)
        second.submit(self.copy(3, 1))
        second.synchronize()
        assert self.cells()[3] == 7
        first.synchronize()

    def test_an_error_fails_what_is_behind_it(self, streams: Streams) -> None:
        """On its stream and on those that wait, and on no other."""
        bad, after, other = (streams.stream(name) for name in ("bad", "after", "other"))
        bad.submit(self.copy(1, 7))
        before = bad.record()
        bad.submit(_refuse)
        bad.submit(self.copy(2, 7))
        event = bad.record()
        after.wait_for(event)
        after.submit(self.copy(3, 7))
        other.submit(self.copy(4, 7))
        other.synchronize()
        assert before.wait()
        waits: list[Callable[[], object]] = [event.wait, bad.synchronize, after.synchronize]
        for wait in waits:
            with pytest.raises(TierUnavailableError, match="injected"):
                wait()
        assert event.is_reached
        with pytest.raises(TierUnavailableError):
            after.record().wait(timeout_s=1)
        assert self.cells()[1:5] == [7, 2, 3, 7]

    def test_closing_waits_and_closes_twice(self) -> None:
        """What was submitted is done."""
        streams = self.make_streams()
        streams.stream("copy").submit(self.copy(1, 6))
        streams.close()
        assert self.cells()[1] == 6
        streams.close()


def _refuse(_handle: int) -> None:
    raise TierUnavailableError("injected")
