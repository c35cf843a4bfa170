"""How far promotions are, in memory that a session shares with its daemon: no call a layer.

    area     one memfd a session, sealed: the daemon writes, the client maps it read-only
    region   of one load:   | serial | done | usable | num_blocks | checksums of block 0, 1, ... |
             64-bit words, native byte order (one machine), on a 64-byte boundary; num_layers
             checksums a block
    signal   a `TokenPipe` a session; the daemon puts one in after it wrote, if there is room

    serial   of the load, from the plan; anything else: the load has ended, its region is another's
    done     see `LoadProgress.num_done`; never falls within a load
    usable   see `LoadProgress.num_usable`; never grows within a load
    checksums of a block are there before `done` counts its slab of layer 0

The daemon writes a word with one store, in the order checksums, usable, done. Nothing here is
believed: a reader verifies the bytes that it copied.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm.storage.arena import Arena, ArenaKind
from ucm.storage.tier import SlotId

from .layout import KvDtype, KvLayout
from .staging import RunAllocator
from .token_pipe import TokenPipe, take_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .api import SlabChecksums

    Words = NDArray[np.uint64]

WORD_BYTES: Final = 8
HEADER_WORDS: Final = 4
REGION_ALIGNMENT_BYTES: Final = 64
_SERIAL, _DONE, _USABLE, _NUM_BLOCKS = range(HEADER_WORDS)

_MOST_SIGNALS: Final = 4096
"""Taken at once; more than fit."""

TURN_S: Final = 0.05
"""How long a waiter waits before it looks whether its cache is still there."""


@dataclass(frozen=True, slots=True)
class ProgressPlace:
    """Where the progress of one load is."""

    offset: int
    """Of its region in the session's area, in bytes."""
    serial: int
    """What the region's first word says as long as it is this load's."""


def region_bytes(num_blocks: int, num_layers: int) -> int:
    """Room that a load of so many PROMOTING blocks takes."""
    num_bytes = (HEADER_WORDS + num_blocks * num_layers) * WORD_BYTES
    return -(-num_bytes // REGION_ALIGNMENT_BYTES) * REGION_ALIGNMENT_BYTES


class ProgressArea:
    """The daemon's side: a session's area. Not thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        """Create the memory, rounded down to whole pages, and the sockets.

        Raises:
            CapacityError: the kernel refuses it.
        """
        pages = max(1, capacity_bytes // 4096)
        whole = KvLayout(
            num_layers=1,
            num_kv_heads=1,
            head_dim=pages * 512,
            block_tokens=1,
            dtype=KvDtype.FLOAT32,
        )  # one "slot" of all of it: 2 x head_dim x 4 bytes
        self._signals = TokenPipe()
        self.arena = Arena(whole, 1, ArenaKind.READ_ONLY)
        self._runs = RunAllocator(self.arena.size_bytes)
        self._memory = self.arena.view(SlotId(0))
        self._next_serial = 1

    @property
    def signal_fd(self) -> int:
        """The client's end of the signal; -1 when closed."""
        return self._signals.fd

    @property
    def memory(self) -> memoryview:
        """All of it, read-only; for a client in this process."""
        return self._memory.toreadonly()

    @property
    def used_bytes(self) -> int:
        """Of regions that are in use."""
        return self._runs.used_bytes

    def has_room(self, num_blocks: int, num_layers: int) -> bool:
        """Whether `reserve` would find room."""
        size = region_bytes(num_blocks, num_layers)
        offset = self._runs.reserve(size)
        if offset is not None:
            self._runs.free(offset, size)
        return offset is not None

    def reserve(self, num_blocks: int, num_layers: int) -> ProgressRegion | None:
        """A region for a load; None when there is no room."""
        size = region_bytes(num_blocks, num_layers)
        offset = self._runs.reserve(size)
        if offset is None:
            return None
        place = ProgressPlace(offset, self._next_serial)
        self._next_serial += 1
        view = self._memory[offset : offset + size]
        return ProgressRegion(place, view, (num_blocks, num_layers), self._signal)

    def free(self, region: ProgressRegion) -> None:
        """Take a region back; whoever still looks at it finds that its load has ended."""
        region.end()
        num_bytes = region_bytes(region.num_blocks, region.num_layers)
        self._runs.free(region.place.offset, num_bytes)
        self._signal()

    def _signal(self) -> None:
        # No room: it is awake. Closed: the session has ended; a lease that is rechecked has not.
        self._signals.put(1)

    def close(self) -> None:
        """Give everything back. Idempotent. Views that are still held keep their memory alive."""
        if self.signal_fd < 0:
            return
        self._signals.close()
        with contextlib.suppress(BufferError):  # a region that was not freed: its session ends
            self._memory.release()
        self.arena.close()


class ProgressRegion:
    """The daemon's side of one load. Not thread-safe."""

    def __init__(
        self,
        place: ProgressPlace,
        memory: memoryview,
        shape: tuple[int, int],
        signal: Callable[[], None],
    ) -> None:
        """Begin at nothing done; `shape` is blocks and layers."""
        self.place = place
        self.num_blocks, self.num_layers = shape
        self._signal = signal
        self._words: Words = np.frombuffer(memory, np.uint64)
        self._words[_SERIAL] = 0
        self._words[_DONE] = 0
        self._words[_USABLE] = self.num_blocks
        self._words[_NUM_BLOCKS] = self.num_blocks
        self._words[_SERIAL] = place.serial

    def put_checksums(self, index: int, checksums: SlabChecksums) -> None:
        """Of PROMOTING block `index`; before its first slab is published."""
        start = HEADER_WORDS + index * self.num_layers
        self._words[start : start + self.num_layers] = checksums

    def publish(self, done: int, usable: int) -> None:
        """Say how far it is, and wake who waits."""
        if (int(self._words[_DONE]), int(self._words[_USABLE])) == (done, usable):
            return
        self._words[_USABLE] = usable
        self._words[_DONE] = done
        self._signal()

    def end(self) -> None:
        """Nothing more will be published."""
        self._words[_SERIAL] = 0
        self._words = np.zeros(0, np.uint64)  # the area can be closed


class ProgressSignal:
    """The client's side of a session's signal. Thread-safe.

    One of several waiters looks at it, the others wait for that one. `count` taken before looking
    at the progress makes sure that no wake-up is lost.
    """

    def __init__(self, signal_fd: int, is_gone: Callable[[], bool]) -> None:
        """Wait on `signal_fd`, and own it; `is_gone` says that nobody will write any more."""
        self._socket = socket.socket(fileno=signal_fd)
        weakref.finalize(self, self._socket.close)
        self._is_gone = is_gone
        self._changed = threading.Condition()
        self._is_watched = False
        self._found_gone = False
        self._look_again_s = 0.0
        self.count = 0
        """Wake-ups so far."""

    @property
    def is_gone(self) -> bool:
        """Whether nothing will come any more; looks once in `TURN_S`, because looking is a call."""
        now_s = time.monotonic()
        if not self._found_gone and now_s >= self._look_again_s:
            self._look_again_s = now_s + TURN_S
            self._found_gone = self._is_gone()
        return self._found_gone

    def wait(self, count: int, timeout_s: float) -> None:
        """Wait until `self.count` is no longer `count`, at most `timeout_s`, or `TURN_S`."""
        turn_s = min(max(0.0, timeout_s), TURN_S)
        with self._changed:
            if self.count != count:
                return
            if self._is_watched:
                self._changed.wait(turn_s)
                return
            self._is_watched = True
        came = False
        try:
            came = _take_signals(self._socket, turn_s)
        finally:
            with self._changed:
                self._is_watched = False
                self.count += came
                self._changed.notify_all()


def _take_signals(heard: socket.socket, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(heard, select.POLLIN)
    if not poller.poll(timeout_s * 1000):
        return False
    if not take_tokens(heard, _MOST_SIGNALS):
        # Another process of the session took them, or it has ended: look again, not all the time.
        time.sleep(0.001)
    return True


class SharedProgress:
    """`LoadProgress` over a region that a daemon writes. Thread-safe."""

    def __init__(
        self,
        memory: memoryview,
        place: ProgressPlace,
        shape: tuple[int, int],
        signal: ProgressSignal,
    ) -> None:
        """Look at a region of the session's area.

        Args:
            memory: the area, read-only.
            place: from the plan.
            shape: PROMOTING blocks of the plan, and layers of a block.
            signal: the session's.

        Raises:
            ValueError: the region does not lie in the area.
        """
        self._num_blocks, self._num_layers = shape
        size = region_bytes(*shape)
        if place.offset % WORD_BYTES or not 0 <= place.offset <= len(memory) - size:
            raise ValueError("the progress of a load is outside its area")
        self._words: Words = np.frombuffer(memory[place.offset : place.offset + size], np.uint64)
        self._serial = place.serial
        self._signal = signal
        self._is_closed = False

    @property
    def num_blocks(self) -> int:
        """See `LoadProgress.num_blocks`."""
        return self._num_blocks

    def num_done(self) -> int:
        """See `LoadProgress.num_done`. All, once the load has ended: nothing more will come."""
        total = self._num_blocks * self._num_layers
        done = int(self._words[_DONE])
        return min(done, total) if self._is_alive() else total

    def num_usable(self) -> int:
        """See `LoadProgress.num_usable`. None, once the load has ended."""
        usable = int(self._words[_USABLE])
        return min(usable, self._num_blocks) if self._is_alive() else 0

    def checksums(self, index: int) -> SlabChecksums:
        """See `LoadProgress.checksums`."""
        start = HEADER_WORDS + index * self._num_layers
        found = tuple(self._words[start : start + self._num_layers].tolist())
        return found if self._is_alive() else ()

    def wait(self, num_slabs: int, timeout_s: float) -> bool:
        """See `LoadProgress.wait`."""
        end_s = time.monotonic() + timeout_s
        while True:
            count = self._signal.count
            if self.num_done() >= num_slabs:
                return True
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return False
            self._signal.wait(count, left_s)

    def close(self) -> None:
        """See `LoadProgress.close`."""
        self._is_closed = True

    def _is_alive(self) -> bool:
        # after the word that was read: the region may have become another load's in between
        ours = int(self._words[_SERIAL]) == self._serial
        return ours and not self._is_closed and not self._signal.is_gone


@dataclass(frozen=True, slots=True)
class SessionProgress:
    """A session's area and signal, as its client has them."""

    memory: memoryview
    signal: ProgressSignal

    def of(
        self, place: ProgressPlace | None, num_blocks: int, num_layers: int
    ) -> SharedProgress | None:
        """The progress of one load; None when nothing is promoted for it.

        Raises:
            ValueError: blocks without a place, or a place outside the area.
        """
        if place is None and not num_blocks:
            return None
        if place is None:
            raise ValueError("blocks are being promoted, and nothing says how far they are")
        return SharedProgress(self.memory, place, (num_blocks, num_layers), self.signal)


class PromotionTally:
    """What the daemon counts of one load's PROMOTING blocks, and publishes. Not thread-safe."""

    def __init__(self, rows: Sequence[int], region: ProgressRegion) -> None:
        """Of rows in the order of the keys; nothing is done yet."""
        self.region = region
        self._ranks = {row: rank for rank, row in enumerate(rows)}
        self._layers = np.zeros(len(rows), np.int32)
        self._usable = len(rows)

    def advance(self, row: int, num_layers: int, checksums: SlabChecksums) -> None:
        """The block's leading `num_layers` slabs are in the arena and verified."""
        rank = self._ranks[row]
        if not self._layers[rank] and num_layers:
            self.region.put_checksums(rank, checksums)
        self._layers[rank] = max(num_layers, self._layers[rank])

    def fail(self, row: int) -> None:
        """The block will not come; those behind it are of no use either."""
        self._usable = min(self._usable, self._ranks[row])

    def useless_rows(self) -> list[int]:
        """Rows that nobody needs to read for this load any more."""
        return [row for row, rank in self._ranks.items() if rank >= self._usable]

    def publish(self) -> None:
        """Tell the client."""
        self.region.publish(self._num_done(), self._usable)

    def _num_done(self) -> int:
        layers = self._layers[: self._usable]
        if not len(layers):
            return self.region.num_blocks * self.region.num_layers
        behind = int(layers.argmin())  # the first of those that are farthest behind
        fewest = int(layers[behind])
        if fewest >= self.region.num_layers:
            return self.region.num_blocks * self.region.num_layers
        return fewest * self.region.num_blocks + behind
