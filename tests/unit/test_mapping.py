"""Mappings on a 2 MiB boundary: who may write, how long they live, what happens without one."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ucm import mapping
from ucm.mapping import HUGE_PAGE_BYTES, address_of, map_shared

ODD_SIZES = (1, mmap.PAGESIZE, mmap.PAGESIZE + 1, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES - 5)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("test")
    os.ftruncate(made, 4 * HUGE_PAGE_BYTES)
    yield made
    os.close(made)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.partition(" ")[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return "memfd:test" in line
    return False


@pytest.mark.parametrize("size", ODD_SIZES)
def test_it_is_on_a_boundary_whatever_its_size(fd: int, size: int) -> None:
    view = map_shared(fd, size, writable=True)
    assert address_of(view) % HUGE_PAGE_BYTES == 0
    assert (view.nbytes, view.format, view.contiguous) == (size, "B", True)
    view[size - 1] = 77
    assert os.pread(fd, 1, size - 1) == b"\x4d"


@pytest.mark.parametrize("size", ODD_SIZES)
def test_address_space_that_was_not_used_goes_back(fd: int, size: int) -> None:
    def reserved() -> int:
        return Path("/proc/self/maps").read_text().count(" ---p 00000000 00:00")

    map_shared(fd, size, writable=False)  # whatever is imported only now
    gc.collect()
    before = reserved()
    view = map_shared(fd, size, writable=False)
    assert reserved() == before
    del view


def test_what_is_for_reading_cannot_be_written(fd: int) -> None:
    os.pwrite(fd, b"hello", 0)
    view = map_shared(fd, HUGE_PAGE_BYTES, writable=False)
    assert bytes(view[:5]) == b"hello"
    assert view.readonly
    assert not np.frombuffer(view[:5], np.uint8).flags.writeable
    with pytest.raises(TypeError):
        view[:5] = b"HELLO"


def test_it_lives_as_long_as_its_last_view(fd: int) -> None:
    view = map_shared(fd, HUGE_PAGE_BYTES, writable=True)
    address = address_of(view)
    part = view[4096:8192]
    array = np.frombuffer(part, np.uint8)
    view.release()
    del view, part
    gc.collect()
    assert is_mapped(address), "the array looks into it"
    assert array.sum() == 0
    del array
    gc.collect()
    assert not is_mapped(address)


def test_a_refused_reservation_costs_only_the_boundary(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOMEM, "injected")

    monkeypatch.setattr(mapping, "_mmap", refuse)
    writable = map_shared(fd, HUGE_PAGE_BYTES, writable=True)
    readable = map_shared(fd, HUGE_PAGE_BYTES, writable=False)
    writable[:5] = b"hello"
    assert bytes(readable[:5]) == b"hello"
    assert (writable.readonly, readable.readonly) == (False, True)


def test_what_may_not_be_mapped_raises_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "read_only"
    path.write_bytes(bytes(mmap.PAGESIZE))
    fd = os.open(path, os.O_RDONLY)
    try:
        before = len(Path("/proc/self/maps").read_text().splitlines())
        for _ in range(20):
            with pytest.raises(PermissionError):
                map_shared(fd, mmap.PAGESIZE, writable=True)
        assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 10
    finally:
        os.close(fd)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_shares_it_and_its_end_is_its_own(fd: int) -> None:
    view = map_shared(fd, HUGE_PAGE_BYTES, writable=True)
    child = os.fork()
    if child == 0:
        view[:5] = b"child"
        del view
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes(view[:5]) == b"child"


def test_threads_that_still_look_survive_the_interpreters_end() -> None:
    program = """
import os, threading
from ucm.mapping import map_shared
fd = os.memfd_create("test")
os.ftruncate(fd, 4096)
view = map_shared(fd, 4096, writable=True)
def look():
    while True:
        view[0] = 1
threading.Thread(target=look, daemon=True).start()
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
