"""`DeviceLoader`: blocks of a load into a pool in device memory, layer by layer, checked there.

    FileBlock   NVMe  --DeviceFileIo: cuFile, or preadv and pinned pages-->  staging ring
    HostBlock   arena --asynchronous copy from registered memory--------->  staging ring
                staging ring --checksums, computed where the bytes arrived--> right or not
                staging ring --scatter kernel--> the pool's blocks; behind it the layer's event

Invariants: those of `ucm.layer_pipeline`; and no byte that was not verified reaches the pool, and
the pool needs no registration with cuFile, which maps what it registers into a window of the bus
that is smaller than a pool. The price is one copy within device memory, at a hundredth of the time
that the disk takes.

Envelope: a 4 MiB step from one NVMe drive takes 600 us; its checksums 10 us (ADR 0006), its scatter
5 us, the two hand-overs between threads 40 us, beside the reads of the next steps.

It has run on doubles of the driver and of cuFile only, not yet on a GPU.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ucm.kernels.cuda.host_registry import HostRegistry, address_of
from ucm.kernels.cuda.slab_kernels import PagedSlabs, SlabKernels
from ucm.kernels.cuda.streams import CudaStreams
from ucm.kernels.streams import CpuStreams
from ucm.storage.device import DeviceBuffer, DeviceFileIo, DeviceRequest
from ucm.storage.throttled_io import bucket_of

from .clock import SystemClock
from .errors import CapacityError, InvalidArgumentError, TierUnavailableError
from .layer_pipeline import (
    LayerPipeline,
    PipelineShape,
    PipelineStreams,
    RowFailure,
    Step,
)
from .layout import ALIGNMENT_BYTES, round_up

if TYPE_CHECKING:
    from ucm.kernels.cuda.driver import CudaDriver
    from ucm.kernels.cuda.slab_kernels import BlockTable
    from ucm.kernels.cuda.streams import CudaEvent, CudaStream
    from ucm.kernels.streams import Stream
    from ucm.storage.file_io import FileHandle

    from .api import SlabChecksums
    from .layout import KvLayout


log = logging.getLogger(__name__)


def _is_there(_layer: int) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class FileBlock:
    """A block that lies in a file as it is."""

    file: FileHandle
    """Of the loader's `DeviceFileIo`: from its `adopt`."""
    offset: int
    """Of its first slab in the file, a multiple of 4 KiB."""
    checksums: Callable[[], SlabChecksums]
    """Asked for when the first slab is verified; () when they cannot be had: the block failed."""


@dataclass(frozen=True, slots=True)
class HostBlock:
    """A block that is in a mapping, or arrives there layer by layer."""

    data: memoryview
    """`layout.block_bytes` long; registered with the driver at its first use."""
    checksums: Callable[[], SlabChecksums]
    """As in `FileBlock`."""
    wait_layer: Callable[[int], bool] = _is_there
    """Blocks until a layer's slab is there; False when it never will be."""


SourceBlock: TypeAlias = FileBlock | HostBlock


@dataclass(frozen=True, slots=True)
class DevicePool:
    """A paged pool: [num_layers, num_blocks, slab_bytes], contiguous, in device memory."""

    address: int
    num_blocks: int
    layout: KvLayout

    def layer_address(self, layer: int) -> int:
        """Of block 0 of a layer."""
        return self.address + layer * self.num_blocks * self.layout.slab_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLoadOptions:
    """Limits of a loader."""

    read_ahead_layers: int = 2
    """Layers that may be under way beyond the one that is waited for."""
    request_bytes: int = 4 << 20
    """Bytes of one layer that are read, checked and placed together."""
    staging_bytes: int = 64 << 20
    """Device memory of one load that is under way."""
    max_loads: int = 4
    """Loads under way at once; what comes then is refused."""
    max_read_bytes_per_s: int = 0
    """What all loads together read from files, as `NamespaceHandle.max_read_bytes_per_s` says; 0 is
    no limit."""


class DeviceLoader:
    """Loads into one pool, by streams and staging memory that they share. Thread-safe."""

    def __init__(
        self,
        driver: CudaDriver,
        io: DeviceFileIo,
        pool: DevicePool,
        options: DeviceLoadOptions | None = None,
    ) -> None:
        """Compile the kernels and make the streams; staging memory comes with the loads.

        Args:
            driver: the pool's device.
            io: reads files into device memory; stays the caller's.
            pool: where blocks go; stays as long as the loader.
            options: limits; the defaults when None.

        Raises:
            ConfigError: the kernels cannot be compiled.
            InvalidArgumentError: the staging memory has no room for a slab, or the layout's slabs
                are not multiples of 16 bytes.
            TierUnavailableError: the driver refuses.
        """
        self.pool = pool
        self.options = options or DeviceLoadOptions()
        layout = pool.layout
        if self.options.staging_bytes < layout.slab_stride_bytes or layout.slab_bytes % 16:
            raise InvalidArgumentError(
                f"device loads: slabs of {layout.slab_bytes} bytes, staging memory of "
                f"{self.options.staging_bytes}"
            )
        self.driver = driver
        self.io = io
        limit = self.options.max_read_bytes_per_s
        self.bucket = bucket_of(limit, SystemClock()) if limit else None
        self.kernels = SlabKernels(driver)
        self.registry = HostRegistry(driver)
        self.streams = CudaStreams(driver)
        self._threads = CpuStreams()
        self._idle: list[_Staging] = []
        self._num_loads = 0
        self._is_closed = False
        self._lock = threading.Lock()

    def adopt(self, handle: int) -> CudaStream:
        """The stream that attention runs on, by torch's `cuda_stream`."""
        return self.streams.adopt("compute", handle)

    def begin(self, blocks: Sequence[SourceBlock], block_ids: Sequence[int]) -> DeviceLoad:
        """Begin to load; returns after the ids were brought to the device.

        Args:
            blocks: a prefix's blocks, in order.
            block_ids: [n] of the pool, this load's alone until it has ended.

        Raises:
            CapacityError: too many loads are under way, or the loader is closed.
            InvalidArgumentError: an id is outside the pool or there twice, or a block has another
                length.
            TierUnavailableError: the driver refuses.
        """
        _check_blocks(blocks, block_ids, self.pool.layout)
        with ExitStack() as undo:
            staging = self._take()
            undo.callback(self._give, staging)
            table = self.kernels.upload_ids(block_ids, self.pool.num_blocks)
            undo.callback(self.kernels.free_ids, table)
            for block in blocks:
                if isinstance(block, HostBlock):
                    self.registry.ensure(block.data)
            # Also copies of steps that were given up: nobody else waits for them.
            undo.callback(self.streams.stream("copy").synchronize)
            shape = self._shape(len(blocks))
            work = _DeviceWork(self, blocks, _Target(staging, table, shape.rows_per_step))
            load = DeviceLoad(work, shape, self._stages(), undo.pop_all())
        load.start()
        return load

    def close(self) -> None:
        """Give streams and memory back; loads must have been cancelled before. Idempotent."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        self._threads.close()
        self.streams.close()
        self.registry.close()
        for staging in idle:
            staging.close()

    def _stages(self) -> PipelineStreams:
        read, verify = self._threads.stream("read"), self._threads.stream("verify")
        return PipelineStreams(read, verify, self.streams.stream("place"))

    def _shape(self, num_rows: int) -> PipelineShape:
        options, stride = self.options, self.pool.layout.slab_stride_bytes
        step_bytes = min(options.request_bytes, options.staging_bytes)
        rows = max(1, min(num_rows, step_bytes // stride))
        ahead = (1 + options.read_ahead_layers) * max(1, math.ceil(num_rows / rows))
        return PipelineShape(
            num_layers=self.pool.layout.num_layers,
            num_rows=num_rows,
            rows_per_step=rows,
            read_ahead_steps=max(1, min(ahead, options.staging_bytes // (rows * stride))),
        )

    def _take(self) -> _Staging:
        with self._lock:
            if self._is_closed or self._num_loads >= self.options.max_loads:
                raise CapacityError(f"{self._num_loads} loads into device memory are under way")
            staging = self._idle.pop() if self._idle else None
            staging = staging or _Staging(self.driver, self.io, self.options.staging_bytes)
            self._num_loads += 1
            return staging

    def _give(self, staging: _Staging) -> None:
        with self._lock:
            self._num_loads -= 1
            if not self._is_closed:
                self._idle.append(staging)
                return
        staging.close()


class DeviceLoad:
    """One load under way; end it with `cancel`, also when it is done."""

    def __init__(
        self, work: _DeviceWork, shape: PipelineShape, streams: PipelineStreams, ends: ExitStack
    ) -> None:
        self._pipeline = LayerPipeline(work, shape, streams)
        self._step_bytes = shape.rows_per_step * work.slab_stride_bytes
        self._ends = ends
        self._lock = threading.Lock()

    def start(self) -> None:
        """See `LayerPipeline.start`; `DeviceLoader.begin` calls it."""
        self._pipeline.start()

    @property
    def failures(self) -> tuple[RowFailure, ...]:
        """See `LayerPipeline.failures`."""
        return self._pipeline.failures

    @property
    def is_done(self) -> bool:
        """See `LayerPipeline.is_done`."""
        return self._pipeline.is_done

    @property
    def bytes_left(self) -> int:
        """Bytes that are not verified yet, rounded up to whole steps."""
        return self._pipeline.num_steps_left * self._step_bytes

    def num_layers_ready(self) -> int:
        """See `LayerPipeline.num_layers_ready`."""
        return self._pipeline.num_layers_ready()

    def wait_layer(self, layer: int, timeout_s: float, compute: Stream | None = None) -> int:
        """See `LayerPipeline.wait_layer`; `compute` from `DeviceLoader.adopt`."""
        return self._pipeline.wait_layer(layer, timeout_s, compute)

    def cancel(self, timeout_s: float) -> bool:
        """Begin nothing more; True when nobody writes to the pool's blocks any more.

        Then the load's memory is the loader's again. False when a read still hangs after
        `timeout_s`: the pool's blocks stay this load's, and cancel must be called again.
        """
        if not self._pipeline.cancel(timeout_s):
            return False
        with self._lock:
            try:
                self._ends.close()
            except TierUnavailableError as error:
                log.warning("memory of a load was not given back: %s", error)
        return True


class _Staging:
    """Device memory for the steps under way, on a page boundary."""

    def __init__(self, driver: CudaDriver, io: DeviceFileIo, nbytes: int) -> None:
        self._driver = driver
        self._io = io
        self._allocated = driver.allocate(nbytes + ALIGNMENT_BYTES)
        self.address = round_up(self._allocated, ALIGNMENT_BYTES)
        self.buffer = DeviceBuffer(self.address, nbytes, (self.address, nbytes), self)

    def close(self) -> None:
        """Give it back; nothing may be in flight."""
        self._io.forget(self.buffer)
        self._driver.free(self._allocated)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a load's steps go."""

    staging: _Staging
    table: BlockTable
    rows_per_step: int


class _DeviceWork:
    """`LayerWork` of one load."""

    def __init__(
        self, loader: DeviceLoader, blocks: Sequence[SourceBlock], target: _Target
    ) -> None:
        self._loader = loader
        self._layout = loader.pool.layout
        self._blocks = tuple(blocks)
        self._staging = target.staging
        self._table = target.table
        self._copy = loader.streams.stream("copy")
        self._check = loader.streams.stream("check")
        self._copied: dict[int, CudaEvent] = {}
        """By slot: behind the copies from host memory."""
        self._slot_bytes = target.rows_per_step * self._layout.slab_stride_bytes

    @property
    def slab_stride_bytes(self) -> int:
        """Distance of slabs in a slot."""
        return self._layout.slab_stride_bytes

    def read(self, step: Step) -> Collection[int]:
        """See `LayerWork.read`. Copies from host memory run beside the reads from files."""
        rows = list(step.rows)
        if step.slot in self._copied:  # of a step that was given up, and so never verified
            self._copied[step.slot].wait()
        failed = self._copy_from_host(step, rows)
        of_files = [row for row in rows if isinstance(self._blocks[row], FileBlock)]
        requests = [self._request(step, row) for row in of_files]
        self._wait_for_tokens(len(requests) * self._layout.slab_stride_bytes)
        codes = self._loader.io.read_batch(requests) if requests else []
        return failed + [row for row, code in zip(of_files, codes, strict=True) if code]

    def verify(self, step: Step) -> Collection[int]:
        """See `LayerWork.verify`: on the device, over what arrived there."""
        self._check.wait_for(self._copied[step.slot])
        offsets = [self._offset(step, row) for row in step.rows]
        found = self._loader.kernels.checksums(
            self._staging.address, offsets, self._layout.slab_bytes, stream=self._check.handle
        )
        pairs = zip(step.rows, found, strict=True)
        return [row for row, sum_ in pairs if not self._is_right(row, step.layer, sum_)]

    def place(self, step: Step, handle: int) -> None:
        """See `LayerWork.place`."""
        pool = self._loader.pool
        slabs = PagedSlabs(
            staging=self._staging.address + self._offset(step, step.first_row),
            pool=pool.layer_address(step.layer),
            slab_bytes=self._layout.slab_bytes,
            slab_stride_bytes=self._layout.slab_stride_bytes,
            num_pool_blocks=pool.num_blocks,
        )
        ids = self._table.rows(step.first_row, step.last_row)
        self._loader.kernels.enqueue_scatter(slabs, ids, stream=handle)

    def _wait_for_tokens(self, num_bytes: int) -> None:
        bucket = self._loader.bucket
        delay_s = bucket.take(num_bytes) if bucket is not None and num_bytes else 0.0
        if delay_s > 0:
            time.sleep(delay_s)

    def _copy_from_host(self, step: Step, rows: Sequence[int]) -> list[int]:
        """Begin to copy; the rows that never will be there."""
        failed = []
        try:
            for row in rows:
                block = self._blocks[row]
                if isinstance(block, FileBlock):
                    continue
                if block.wait_layer(step.layer):
                    self._copy_row(step, row, block)
                else:
                    failed.append(row)
        finally:
            self._copied[step.slot] = self._copy.record()
        return failed

    def _copy_row(self, step: Step, row: int, block: HostBlock) -> None:
        stride = self._layout.slab_stride_bytes
        source = address_of(block.data) + step.layer * stride
        target = self._staging.address + self._offset(step, row)
        self._loader.driver.copy(target, source, stride, self._copy.handle)

    def _request(self, step: Step, row: int) -> DeviceRequest:
        block, stride = self._blocks[row], self._layout.slab_stride_bytes
        assert isinstance(block, FileBlock)
        start = self._offset(step, row)
        buffer = self._staging.buffer[start : start + stride]
        return DeviceRequest(block.file, block.offset + step.layer * stride, (buffer,))

    def _offset(self, step: Step, row: int) -> int:
        """Where a row's slab is in the staging memory."""
        within = (row - step.first_row) * self._layout.slab_stride_bytes
        return step.slot * self._slot_bytes + within

    def _is_right(self, row: int, layer: int, found: int) -> bool:
        expected = self._blocks[row].checksums()
        return len(expected) == self._layout.num_layers and expected[layer] == found


def _check_blocks(
    blocks: Sequence[SourceBlock], block_ids: Sequence[int], layout: KvLayout
) -> None:
    if len(blocks) != len(block_ids):
        raise InvalidArgumentError(f"{len(blocks)} blocks for {len(block_ids)} places in the pool")
    for block in blocks:
        if isinstance(block, HostBlock) and block.data.nbytes != layout.block_bytes:
            raise InvalidArgumentError(
                f"a block of {block.data.nbytes} bytes, the layout has {layout.block_bytes}"
            )
