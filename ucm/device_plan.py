"""A load plan's blocks for a `DeviceLoader`: what `ucm.layer_reader` does for host memory.

    source      becomes      checksums from                      there when
    MEMORY      HostBlock    the plan                            now
    PROMOTING   HostBlock    the plan's progress                 the progress says so, by layers
    EXTENT      FileBlock    the slot's header, checked on the   now
                             host: magic, key, generation

The headers of all extents are read in one batch when the first checksum is asked for, beside the
reads of their slabs. Its end is the caller's: `stop`, then `DeviceLoad.cancel` until it is True,
then `close`, then `complete_load` with `corrupt_keys`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, cast

from ucm.storage.file_io import FileHandle, IoRequest, aligned_buffer
from ucm.storage.format import HEADER_BYTES, Superblock, decode_header
from ucm.storage.io_choice import IoKind, Machine, open_file_io
from ucm.storage.tier import SlotId

from .config import NvmeConfig
from .device_load import FileBlock, HostBlock, SourceBlock
from .errors import TierUnavailableError
from .types import SourceKind

if TYPE_CHECKING:
    from ucm.storage.device import DeviceFileIo

    from .api import SlabChecksums
    from .layer_pipeline import RowFailure
    from .layout import KvLayout
    from .load_plan import LoadPlan, LoadProgress, PlannedBlock
    from .types import BlockKey

PROGRESS_TURN_S: Final = 0.05
"""How long a wait for promotions goes on before it looks whether somebody stopped it."""


def open_device_io(io_threads: int = 8, machine: Machine | None = None) -> DeviceFileIo:
    """The best way from files to device memory that works here; see `ucm.storage.io_choice`.

    Blocks for as long as its preflight. The caller closes it, after its loaders.

    Raises:
        TierUnavailableError: there is none, and why.
    """
    io, choice = open_file_io(NvmeConfig(io_threads=io_threads), machine)
    if choice.kind is IoKind.POSIX:
        io.close()
        raise TierUnavailableError(f"device memory cannot be read into: {choice.reason}")
    return cast("DeviceFileIo", io)


class DevicePlan:
    """The leading READY blocks of one plan. `blocks` go to `DeviceLoader.begin`."""

    def __init__(self, plan: LoadPlan, layout: KvLayout, io: DeviceFileIo) -> None:
        """Make the plan's files known to `io`, the loader's.

        A block whose file this process may not open is left out, with those behind it.
        """
        self._plan = plan
        self._io = io
        self._superblock = Superblock(
            namespace=plan.namespace,
            layout=layout,
            segment_bytes=HEADER_BYTES + plan.summary_bytes + layout.block_bytes,
            summary_bytes=plan.summary_bytes,
        )
        self._deadline_s = time.monotonic() + plan.timeout_s
        self._files: dict[int, FileHandle] = {}
        self._headers: dict[int, SlabChecksums] | None = None
        self._headers_lock = threading.Lock()
        self._is_stopped = False
        self.blocks: tuple[SourceBlock, ...] = self._sources()

    def corrupt_keys(self, failures: Sequence[RowFailure]) -> tuple[BlockKey, ...]:
        """The blocks that failed, for `complete_load`: the cache looks at its copies."""
        rows = dict.fromkeys(failure.row for failure in failures)
        return tuple(self._plan.blocks[row].key for row in rows)

    def stop(self) -> None:
        """Wait for promotions no more: what is not there yet never will be."""
        self._is_stopped = True

    def close(self) -> None:
        """Close the files; nothing may read them any more. Idempotent."""
        while self._files:
            self._io.close_file(self._files.popitem()[1])
        if self._plan.progress is not None:
            self._plan.progress.close()

    def _sources(self) -> tuple[SourceBlock, ...]:
        found: list[SourceBlock] = []
        rank = 0
        for row, block in enumerate(self._plan.blocks[: self._plan.num_ready]):
            source = self._source(row, block, rank)
            if source is None:
                break
            rank += block.source is SourceKind.PROMOTING
            found.append(source)
        return tuple(found)

    def _source(self, row: int, block: PlannedBlock, rank: int) -> SourceBlock | None:
        progress = self._plan.progress
        if block.extent is not None:
            file = self._file(block.extent.fd)
            offset = block.extent.payload_offset
            return (
                FileBlock(file, offset, functools.partial(self._of_header, row)) if file else None
            )
        if block.data is None:
            return None
        if block.source is SourceKind.PROMOTING:
            if progress is None:
                return None
            sums = functools.partial(progress.checksums, rank)
            return HostBlock(block.data, sums, functools.partial(self._wait, progress, rank))
        return HostBlock(block.data, lambda: block.checksums)

    def _file(self, fd: int) -> FileHandle | None:
        if fd not in self._files:
            try:
                self._files[fd] = self._io.adopt(fd)
            except OSError:
                return None
        return self._files[fd]

    def _wait(self, progress: LoadProgress, rank: int, layer: int) -> bool:
        """Whether a promotion's slab is there; blocks until it is, or never will be."""
        target = layer * progress.num_blocks + rank + 1
        while not progress.wait(target, PROGRESS_TURN_S):
            if self._is_stopped or time.monotonic() >= self._deadline_s:
                return False
        return rank < progress.num_usable()

    def _of_header(self, row: int) -> SlabChecksums:
        """An extent's checksums; () when its header is not the block's."""
        with self._headers_lock:
            if self._headers is None:
                self._headers = self._read_headers()
            return self._headers.get(row, ())

    def _read_headers(self) -> dict[int, SlabChecksums]:
        rows = [row for row, block in enumerate(self.blocks) if isinstance(block, FileBlock)]
        memory = aligned_buffer(HEADER_BYTES * len(rows))
        parts = [memory[n * HEADER_BYTES : (n + 1) * HEADER_BYTES] for n in range(len(rows))]
        requests = [self._request(row, part) for row, part in zip(rows, parts, strict=True)]
        codes = self._io.read_batch(requests)
        read = zip(rows, parts, codes, strict=True)
        return {row: self._checked(row, part) for row, part, code in read if not code}

    def _request(self, row: int, part: memoryview) -> IoRequest:
        block = self.blocks[row]
        assert isinstance(block, FileBlock)
        extent = self._plan.blocks[row].extent
        assert extent is not None
        return IoRequest(block.file, extent.offset, (part,))

    def _checked(self, row: int, data: memoryview) -> SlabChecksums:
        block = self._plan.blocks[row]
        assert block.extent is not None
        header = decode_header(self._superblock, SlotId(block.extent.slot), data)
        if header is None or header.generation != block.extent.generation:
            return ()
        return header.checksums if header.key == block.key else ()
