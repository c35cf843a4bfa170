"""Load plans over a file of our own: real slots, real headers, and hands on every read.

`GatedIo` lets reads end in whatever order a test says, fail, lie, or hang until they may go.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ucm.checksum import block_checksums, checksum
from ucm.layout import KvDtype, KvLayout
from ucm.load_plan import Extent, LoadPlan, LoadProgress, PlannedBlock, SegmentFile
from ucm.storage.file_io import IoRequest, PosixFileIo
from ucm.storage.format import HEADER_BYTES, SlotHeader, Superblock, encode_header
from ucm.storage.tier import SlotId
from ucm.types import (
    ROOT_KEY,
    BlockKey,
    LeaseId,
    LoadMode,
    LoadStatus,
    NamespaceId,
    SourceKind,
    TierKind,
)

from .blocks import content

PAGE_LAYOUT = KvLayout(
    num_layers=4, num_kv_heads=1, head_dim=64, block_tokens=8, dtype=KvDtype.FLOAT32
)
"""Slabs of exactly one page: what O_DIRECT takes as it is."""

NAMESPACE = NamespaceId(bytes(range(32)))

WAIT_S = 10.0
"""Longest that a test waits for a read to arrive at a gate."""


class ExtentFile:
    """Blocks in a file as the NVMe tier would have written them."""

    def __init__(self, path: Path, layout: KvLayout, num_blocks: int) -> None:
        """Write the file; block i lies in slot i and has generation 100 + i."""
        self.path = path
        self.layout = layout
        self.slot_bytes = HEADER_BYTES + layout.block_bytes
        self.keys = [BlockKey(bytes([number + 1]) * 32) for number in range(num_blocks)]
        self.data = [content(key, layout) for key in self.keys]
        path.touch()
        for number in range(num_blocks):
            self.write(number)

    def write(self, number: int, *, generation: int = -1, key: BlockKey | None = None) -> None:
        """Write a slot whole, with another generation or key if asked for."""
        superblock = Superblock(
            namespace=NAMESPACE, layout=self.layout, segment_bytes=self.slot_bytes
        )
        header = SlotHeader(
            key=key or self.keys[number],
            parent=ROOT_KEY,
            slot=SlotId(number),
            generation=100 + number if generation < 0 else generation,
            checksums=block_checksums(self.layout, memoryview(self.data[number])),
        )
        packed = bytearray(HEADER_BYTES)
        encode_header(superblock, header, memoryview(packed))
        self.poke(number, bytes(packed) + self.data[number])

    def poke(self, number: int, data: bytes, offset: int = 0) -> None:
        """Overwrite bytes of a slot, from its header on."""
        fd = os.open(self.path, os.O_WRONLY)
        try:
            os.pwrite(fd, data, number * self.slot_bytes + offset)
        finally:
            os.close(fd)

    def reseal(self, number: int) -> None:
        """Make the header's own checksum right again, whatever it says."""
        start = number * self.slot_bytes
        header = self.path.read_bytes()[start : start + HEADER_BYTES - 8]
        self.poke(number, struct.pack("<Q", checksum(header)), HEADER_BYTES - 8)

    def damage(self, number: int, layer: int) -> None:
        """Flip a bit of one slab."""
        start = self.layout.slab_slice(layer).start
        self.poke(number, bytes([self.data[number][start] ^ 1]), HEADER_BYTES + start)

    def plan(
        self,
        sources: Sequence[SourceKind] | None = None,
        *,
        timeout_s: float = 60.0,
        progress: LoadProgress | None = None,
    ) -> LoadPlan:
        """A plan of all blocks: each an extent unless `sources` says where else it is."""
        file = SegmentFile(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), is_direct=False)
        kinds = sources or [SourceKind.EXTENT] * len(self.keys)
        blocks = [self._planned(number, kind, file) for number, kind in enumerate(kinds)]
        lease = LeaseId(bytes(16))
        return LoadPlan(lease, NAMESPACE, LoadMode.DIRECT, tuple(blocks), timeout_s, progress)

    def _planned(self, number: int, source: SourceKind, file: SegmentFile) -> PlannedBlock:
        key, ready = self.keys[number], LoadStatus.READY
        if source is SourceKind.EXTENT:
            extent = Extent(file, number, number * self.slot_bytes, 100 + number)
            return PlannedBlock(key, ready, source, TierKind.NVME, extent=extent)
        data = memoryview(bytearray(self.data[number])).toreadonly()
        is_there = source is SourceKind.MEMORY
        sums = block_checksums(self.layout, data) if is_there else ()
        tier = TierKind.MEMORY if is_there else TierKind.NVME
        return PlannedBlock(key, ready, source, tier, data, sums)


class GatedIo(PosixFileIo):
    """Reads that arrive at a gate, and go on when the test says so."""

    def __init__(self, seed: int = 0) -> None:
        """Let nothing pass yet; `seed` decides who goes first."""
        super().__init__(io_threads=1)
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._waiting: list[IoRequest] = []
        self._passed: list[IoRequest] = []
        self._is_open = False
        self.num_reads = 0
        self.codes: dict[int, int] = {}
        """errno of the read that begins at an offset of the file."""

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """See `FileIo.read_batch`. The bytes arrive after the gate was passed."""
        for request in requests:
            self._wait_for_turn(request)
        return [
            self.codes.get(request.offset) or super(GatedIo, self).read_batch([request])[0]
            for request in requests
        ]

    def _wait_for_turn(self, request: IoRequest) -> None:
        with self._changed:
            self.num_reads += 1
            self._waiting.append(request)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_open or request in self._passed)
            if request in self._waiting:
                self._waiting.remove(request)

    def wait_arrived(self, count: int = 1) -> bool:
        """Whether so many reads wait at the gate, soon."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._waiting) >= count, WAIT_S)

    def let_one_pass(self) -> bool:
        """Any one of those that wait, by the seed; False when none does."""
        with self._changed:
            if not self._waiting:
                return False
            request = self._waiting.pop(self._random.randrange(len(self._waiting)))
            self._passed.append(request)
            self._changed.notify_all()
            return True

    def let_pass(self, count: int) -> None:
        """Let `count` reads pass, waiting for each to arrive.

        Raises:
            AssertionError: one does not arrive.
        """
        for _ in range(count):
            assert self.wait_arrived(), "no read waits at the gate"
            self.let_one_pass()

    def shut_gate(self) -> None:
        """Let nothing pass from now on."""
        with self._changed:
            self._is_open = False

    def open_gate(self) -> None:
        """Let all pass, from now on."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()


class ShortIo(PosixFileIo):
    """Ends every read of some offsets early, as a truncated file does."""

    def __init__(self, offsets: set[int]) -> None:
        super().__init__(io_threads=1)
        self._offsets = offsets

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """See `FileIo.read_batch`."""
        return [
            errno.ENODATA
            if request.offset in self._offsets
            else super(ShortIo, self)._read(request)
            for request in requests
        ]


class FakeProgress:
    """`LoadProgress` that a test moves by hand."""

    def __init__(self, num_blocks: int, checksums: Callable[[int], tuple[int, ...]]) -> None:
        self._num_blocks = num_blocks
        self._usable = num_blocks
        self._done = 0
        self._checksums = checksums
        self._changed = threading.Condition()
        self.is_closed = False

    @property
    def num_blocks(self) -> int:
        """See `LoadProgress.num_blocks`."""
        return self._num_blocks

    def move(self, done: int, usable: int | None = None) -> None:
        """So many slabs are done, so many blocks usable."""
        with self._changed:
            self._done = done
            self._usable = self._usable if usable is None else usable
            self._changed.notify_all()

    def num_done(self) -> int:
        """See `LoadProgress.num_done`."""
        return self._done

    def num_usable(self) -> int:
        """See `LoadProgress.num_usable`."""
        return self._usable

    def checksums(self, index: int) -> tuple[int, ...]:
        """See `LoadProgress.checksums`."""
        return self._checksums(index)

    def wait(self, num_slabs: int, timeout_s: float) -> bool:
        """See `LoadProgress.wait`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._done >= num_slabs, timeout_s)

    def close(self) -> None:
        """See `LoadProgress.close`."""
        self.is_closed = True


def wait_for(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> bool:
    """Whether another thread gets somewhere in time."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.001)
    return True
