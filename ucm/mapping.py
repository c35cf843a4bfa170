"""Shared memory, mapped where the kernel can put large pages under it.

    reserved | gap, given back | byte 0 of the file ... its end | gap, given back |
                               2 MiB boundary

A page table can point to a whole 2 MiB page only where address and offset in the file agree to
2 MiB. `mmap(NULL)` does not see to that for a memfd, so address space is reserved first and the
file mapped over it.

Invariants
    * A mapping lives as long as anything that looks into it: a slice, an array. Nobody unmaps it.
    * What was mapped to be read only is a read-only view: writing raises, it does not fault.
    * Where no address space can be reserved the mapping is made all the same, anywhere.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from typing import Any, Final

import numpy as np

HUGE_PAGE_BYTES: Final = 2 << 20
"""A page-table entry of the second level on x86-64, and on ARM with pages of 4 KiB."""

_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value


class _Region:
    """Owns mapped addresses; numpy reads what they are from `__array_interface__`."""

    __slots__ = ("__array_interface__", "__weakref__")

    def __init__(self, address: int, size_bytes: int, *, writable: bool) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, not writable),
        }
        end = weakref.finalize(self, _libc().munmap, address, size_bytes)
        end.atexit = False  # daemon threads may still look into it; the kernel unmaps it then


def map_shared(fd: int, size_bytes: int, *, writable: bool) -> memoryview:
    """Map the first `size_bytes` of `fd`, shared with whoever else maps it.

    Args:
        fd: may be closed afterwards.
        size_bytes: positive; not behind the end of the file, where a touch would kill (SIGBUS).
        writable: else the view is read-only.

    Returns:
        Bytes ("B"), contiguous, page-aligned; 2 MiB-aligned wherever there is address space.

    Raises:
        OSError: the kernel refuses.
    """
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        address = _map_aligned(fd, size_bytes, prot)
    except OSError:
        return memoryview(mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, prot))
    return np.asarray(_Region(address, size_bytes, writable=writable)).data


def address_of(view: memoryview) -> int:
    """Where the view's first byte is in this process."""
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def _map_aligned(fd: int, size_bytes: int, prot: int) -> int:
    """Map the file at a 2 MiB boundary; its address.

    Raises:
        OSError: no address space, or the kernel refuses the mapping.
    """
    reserved_bytes = size_bytes + HUGE_PAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    start = _mmap(0, reserved_bytes, _PROT_NONE, flags, -1)
    address = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        _mmap(address, size_bytes, prot, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc().munmap(start, reserved_bytes)
        raise
    page = mmap.PAGESIZE
    gaps = (
        (start, address),
        (address + -(-size_bytes // page) * page, start + -(-reserved_bytes // page) * page),
    )
    for first, end in gaps:
        if end > first:
            _libc().munmap(first, end - first)
    return address


def _mmap(address: int, size_bytes: int, prot: int, flags: int, fd: int) -> int:
    found: int | None = _libc().mmap(address, size_bytes, prot, flags, fd, 0)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


@functools.cache
def _libc() -> Any:
    """The C library, with argument types that are nobody else's."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
