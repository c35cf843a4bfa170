"""Launching the kernels on slabs: checksums, and copies between staging memory and a paged pool.

Works on device addresses, whoever allocated them (torch's `data_ptr`, `DeviceBuffer.address`).
What each computes is what `ucm.kernels.slab_checksum` and `ucm.kernels.paged_copy` compute on the
CPU; one test holds them to that. Envelope of the checksum: ADR 0006.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm.errors import InvalidArgumentError, UcmError

from .nvrtc import compile_cubin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .driver import CudaDriver

VECTOR_BYTES: Final = 16
"""Addresses, offsets and lengths are multiples of it: one load of a thread."""

CHUNK_BYTES: Final = 32768
"""What one thread block of a copy moves; UCM_CHUNK_BYTES in paged_copy.cu."""

_THREADS: Final = 256
_ID_BYTES: Final = 4
_WARP_LANES: Final = 32
_NAMES: Final = {
    "slab_checksum.cu": ("ucm_slab_checksums",),
    "paged_copy.cu": ("ucm_scatter_slabs", "ucm_gather_slabs"),
}


@dataclass(frozen=True, slots=True)
class PagedSlabs:
    """Where slabs lie: contiguous staging memory, and the blocks of a pool of one layer."""

    staging: int
    """Device address; [n] slabs, `slab_stride_bytes` apart."""
    pool: int
    """Device address; [num_pool_blocks, 2, heads, tokens, dim], contiguous."""
    slab_bytes: int
    """Length of a slab and of a block of the pool."""
    slab_stride_bytes: int
    num_pool_blocks: int


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Block ids in device memory, checked when they were brought there."""

    address: int
    count: int

    def rows(self, first: int, last: int) -> BlockTable:
        """The ids `first .. last - 1`."""
        assert 0 <= first <= last <= self.count
        return BlockTable(self.address + _ID_BYTES * first, last - first)


class SlabKernels:
    """The compiled kernels on one device. Thread-safe."""

    def __init__(self, driver: CudaDriver) -> None:
        """Compile for the driver's device and load.

        Raises:
            ConfigError: NVRTC is missing or does not know the device.
            TierUnavailableError: the driver refuses.
        """
        self._driver = driver
        self._functions: dict[str, ctypes.c_void_p] = {}
        for source, names in _NAMES.items():
            cubin = compile_cubin(source, driver.arch)
            self._functions |= driver.load_functions(cubin, names)

    def checksums(
        self, base: int, offsets: Sequence[int], slab_bytes: int, *, stream: int = 0
    ) -> list[int]:
        """xxh3_64 of each slab, in device memory; blocks until the stream is done.

        Args:
            base: device address, a multiple of 16.
            offsets: [n] of each slab from `base`, multiples of 16.
            slab_bytes: length of every slab, any.
            stream: after whose work the slabs are read.

        Raises:
            InvalidArgumentError: an address or offset is not a multiple of 16.
            TierUnavailableError: the driver refuses.
        """
        _check_aligned("slabs", base, *offsets)
        if not offsets:
            return []
        table = np.array(offsets, np.uint64)
        sums = np.zeros(len(offsets), np.uint64)
        driver, nbytes = self._driver, table.nbytes
        num_threads = len(offsets) * _WARP_LANES
        with driver.memory(nbytes, stream) as table_on, driver.memory(nbytes, stream) as sums_on:
            driver.copy(table_on, table.ctypes.data, nbytes, stream)
            arguments = (
                ctypes.c_uint64(base),
                ctypes.c_uint64(table_on),
                ctypes.c_uint64(slab_bytes),
                ctypes.c_uint32(len(offsets)),
                ctypes.c_uint64(sums_on),
            )
            shape = (-(-num_threads // _THREADS), _THREADS)
            driver.launch(self._functions["ucm_slab_checksums"], shape, arguments, stream)
            driver.copy(sums.ctypes.data, sums_on, nbytes, stream)
            driver.synchronize(stream)
        return [int(value) for value in sums]

    def scatter(self, slabs: PagedSlabs, block_ids: Sequence[int], *, stream: int = 0) -> None:
        """pool[block_ids[i]] = staging[i]; blocks until the stream is done.

        Args:
            slabs: where; every address, length and stride a multiple of 16.
            block_ids: [n], unique.
            stream: in whose order it happens.

        Raises:
            InvalidArgumentError: not aligned, or an id twice or outside the pool.
            TierUnavailableError: the driver refuses.
        """
        self._copy("ucm_scatter_slabs", slabs, block_ids, stream)

    def gather(self, slabs: PagedSlabs, block_ids: Sequence[int], *, stream: int = 0) -> None:
        """staging[i] = pool[block_ids[i]]; padding between slabs stays. As `scatter`."""
        self._copy("ucm_gather_slabs", slabs, block_ids, stream)

    def upload_ids(self, block_ids: Sequence[int], num_pool_blocks: int) -> BlockTable:
        """Bring ids to the device, for many copies; blocks. `free_ids` gives the memory back.

        Raises:
            InvalidArgumentError: an id is outside the pool, or there twice.
            TierUnavailableError: the driver refuses.
        """
        check_block_ids(block_ids, num_pool_blocks)
        ids = np.array(block_ids, np.uint32)
        table = BlockTable(self._driver.allocate(max(1, ids.nbytes)), len(ids))
        try:
            self._driver.copy(table.address, ids.ctypes.data, ids.nbytes)
            self._driver.synchronize()
        except UcmError:
            self.free_ids(table)
            raise
        return table

    def free_ids(self, table: BlockTable) -> None:
        """Undo `upload_ids`; no copy may be under way."""
        self._driver.free(table.address)

    def enqueue_scatter(self, slabs: PagedSlabs, ids: BlockTable, *, stream: int) -> None:
        """As `scatter`, but returns before it is done; `ids` and the staging memory stay till then.

        Raises:
            InvalidArgumentError: an address, length or stride is not a multiple of 16.
            TierUnavailableError: the driver refuses.
        """
        self._enqueue("ucm_scatter_slabs", slabs, ids, stream)

    def _copy(self, name: str, slabs: PagedSlabs, block_ids: Sequence[int], stream: int) -> None:
        _check_slabs(slabs)
        check_block_ids(block_ids, slabs.num_pool_blocks)
        table, driver = np.array(block_ids, np.uint32), self._driver
        with driver.memory(max(1, table.nbytes), stream) as table_on:
            driver.copy(table_on, table.ctypes.data, table.nbytes, stream)
            self._enqueue(name, slabs, BlockTable(table_on, len(table)), stream)
            driver.synchronize(stream)

    def _enqueue(self, name: str, slabs: PagedSlabs, ids: BlockTable, stream: int) -> None:
        _check_slabs(slabs)
        if not ids.count:
            return
        arguments = (
            ctypes.c_uint64(slabs.staging),
            ctypes.c_uint64(slabs.slab_stride_bytes),
            ctypes.c_uint64(slabs.pool),
            ctypes.c_uint64(slabs.slab_bytes),
            ctypes.c_uint64(ids.address),
        )
        shape = (ids.count * -(-slabs.slab_bytes // CHUNK_BYTES), _THREADS)
        self._driver.launch(self._functions[name], shape, arguments, stream)


def _check_slabs(slabs: PagedSlabs) -> None:
    numbers = (slabs.staging, slabs.pool, slabs.slab_bytes, slabs.slab_stride_bytes)
    _check_aligned("a paged copy", *numbers)


def check_block_ids(block_ids: Sequence[int], num_pool_blocks: int) -> None:
    """Refuse ids that a copy must not see: the kernel trusts them.

    Raises:
        InvalidArgumentError: one is outside 0..num_pool_blocks - 1, or there twice.
    """
    if not all(0 <= block < num_pool_blocks for block in block_ids):
        raise InvalidArgumentError(f"a block id is outside 0..{num_pool_blocks - 1}: {block_ids}")
    if len(set(block_ids)) != len(block_ids):
        raise InvalidArgumentError(f"a block id is there twice: {block_ids}")


def _check_aligned(what: str, *numbers: int) -> None:
    if any(number % VECTOR_BYTES for number in numbers):
        raise InvalidArgumentError(f"{what}: {numbers} must be multiples of {VECTOR_BYTES}")
