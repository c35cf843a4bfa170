"""Prefaulting: memory is made real up to the target, in large pages, and nothing depends on it."""

from __future__ import annotations

import errno
import mmap
import os
import threading

import numpy as np
import pytest

from ucm.layout import KvDtype, KvLayout
from ucm.mapping import HUGE_PAGE_BYTES, address_of, map_shared
from ucm.storage import prefault
from ucm.storage.arena import Arena, ArenaKind
from ucm.storage.prefault import MADV_COLLAPSE, STEP_BYTES, Prefaulter, huge_page_errno
from ucm.storage.tier import SlotId

WAIT_S = 20.0
LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=64, block_tokens=2048, dtype=KvDtype.FLOAT32
)
"""Blocks of 1 MiB."""


def resident_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def refuse_collapse(monkeypatch: pytest.MonkeyPatch, code: int) -> list[int]:
    """Have the kernel refuse large pages with `code`; the addresses that were asked for."""
    asked: list[int] = []
    real = prefault._advise

    def advise(address: int, length: int, advice: int) -> int:
        if advice != MADV_COLLAPSE:
            return real(address, length, advice)
        asked.append(address)
        return code

    monkeypatch.setattr(prefault, "_advise", advise)
    return asked


@pytest.mark.parametrize("refused", [None, errno.EINVAL, errno.EAGAIN])
def test_an_arena_costs_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, refused: int | None
) -> None:
    if refused is not None:
        refuse_collapse(monkeypatch, refused)
    arena = Arena(LAYOUT, 33, ArenaKind.READ_ONLY)
    try:
        assert resident_bytes(arena.fd) == 0
        arena.prefault(9)
        arena.wait_prefaulted(WAIT_S)
        assert resident_bytes(arena.fd) == arena.prefaulted_bytes == 9 * LAYOUT.block_bytes
        arena.prefault(5)
        arena.wait_prefaulted(WAIT_S)
        assert arena.prefaulted_bytes == 9 * LAYOUT.block_bytes, "it is never taken back"
        arena.prefault(100)
        arena.wait_prefaulted(WAIT_S)
        assert resident_bytes(arena.fd) == arena.size_bytes
        assert arena.huge_bytes == 0 or refused is None
    finally:
        arena.close()


def test_whole_chunks_become_large_pages_for_every_process() -> None:
    makes_them = huge_page_errno() == 0
    arena = Arena(LAYOUT, 9, ArenaKind.READ_ONLY)
    try:
        for num_slots, num_huge in ((1, 0), (5, 4), (9, 8)):
            arena.prefault(num_slots)
            arena.wait_prefaulted(WAIT_S)
            expected = num_huge * LAYOUT.block_bytes * makes_them
            assert arena.huge_bytes == expected, "none reaches behind the target"
        client = map_shared(arena.fd, arena.size_bytes, writable=False)
        assert np.frombuffer(client, np.uint8).sum() == 0
        assert huge_mapped_bytes(address_of(client)) == arena.huge_bytes
    finally:
        arena.close()


def huge_mapped_bytes(address: int) -> int:
    """How much of the mapping at `address` this process sees through large pages."""
    wanted = f"{address:08x}-"
    is_it = False
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            name = line.split()[0]
            is_it = line.startswith(wanted) if not name.endswith(":") else is_it
            if is_it and name == "ShmemPmdMapped:":
                return int(line.split()[1]) * 1024
    return 0


def test_what_is_there_stays_while_it_is_read_and_written() -> None:
    arena = Arena(LAYOUT, 32, ArenaKind.STAGING)
    slots = [np.frombuffer(arena.view(SlotId(n)), np.uint64) for n in range(32)]
    for number, slot in enumerate(slots[:16]):
        slot[:] = number
    ended = threading.Event()
    wrong: list[int] = []

    def use() -> None:
        turn = 0
        while not ended.is_set():
            turn += 1
            slots[20][turn % 1000 :: 1000] = turn
            wrong.extend(n for n in range(16) if slots[n][turn % 512] != n)
            wrong.extend([20] * int((slots[20][turn % 1000 :: 1000] != turn).any()))

    user = threading.Thread(target=use)
    user.start()
    try:
        for target in range(1, 33):
            arena.prefault(target)
            arena.wait_prefaulted(WAIT_S)
    finally:
        ended.set()
        user.join()
    assert not wrong
    assert all((slot == number).all() for number, slot in enumerate(slots[:16]))
    assert not slots[31].any()
    arena.close()


def test_closing_ends_it_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = memoryview(mmap.mmap(-1, 4 * STEP_BYTES))
    prefaulter = Prefaulter(mapping)
    prefaulter._makes_huge = False
    steps: list[int] = []

    def close_after_first(address: int, length: int) -> int:
        steps.append(length)
        prefaulter._closed = True
        return 0

    monkeypatch.setattr(prefault, "_populate", close_after_first)
    prefaulter.request(4 * STEP_BYTES)
    prefaulter.wait(WAIT_S)
    prefaulter.close()
    prefaulter.close()
    assert steps == [STEP_BYTES]
    prefaulter.request(4 * STEP_BYTES)
    prefaulter.wait(WAIT_S)
    assert steps == [STEP_BYTES]


def test_a_kernel_that_does_not_populate_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def refuse(address: int, length: int) -> int:
        calls.append(length)
        return errno.EINVAL

    monkeypatch.setattr(prefault, "_populate", refuse)
    arena = Arena(LAYOUT, 8, ArenaKind.READ_ONLY)
    try:
        for _ in range(2):
            arena.prefault(8)
            arena.wait_prefaulted(WAIT_S)
        assert calls == [mmap.PAGESIZE, STEP_BYTES]
        assert resident_bytes(arena.fd) == 0
    finally:
        arena.close()


@pytest.mark.parametrize(("code", "times"), [(errno.EINVAL, 1), (errno.EAGAIN, 4)])
def test_large_pages_are_given_up_when_they_cannot_come(
    monkeypatch: pytest.MonkeyPatch, code: int, times: int
) -> None:
    asked = refuse_collapse(monkeypatch, code)
    arena = Arena(LAYOUT, 8, ArenaKind.READ_ONLY)
    try:
        arena.prefault(8)
        arena.wait_prefaulted(WAIT_S)
        assert len(asked) == times
        assert resident_bytes(arena.fd) == arena.prefaulted_bytes == arena.size_bytes
    finally:
        arena.close()
    assert huge_page_errno() == code


def test_off_the_boundary_no_large_page_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse_collapse(monkeypatch, 0)
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4 * HUGE_PAGE_BYTES)
    view = map_shared(fd, 4 * HUGE_PAGE_BYTES, writable=True)
    prefaulter = Prefaulter(view[mmap.PAGESIZE :])
    prefaulter.request(3 * HUGE_PAGE_BYTES)
    prefaulter.wait(WAIT_S)
    prefaulter.close()
    assert not asked
    assert prefaulter.huge_bytes == 0
    assert resident_bytes(fd) == prefaulter.done_bytes == 3 * HUGE_PAGE_BYTES
    os.close(fd)


def test_the_probe_says_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSYS, "injected")

    monkeypatch.setattr(prefault, "map_shared", refuse)
    assert huge_page_errno() == errno.ENOSYS
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert huge_page_errno() == errno.ENOSYS


def test_who_fills_slots_waits_until_they_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Semaphore(0)
    real = prefault._populate

    def slowly(address: int, length: int) -> int:
        if length == STEP_BYTES:
            assert may_go_on.acquire(timeout=WAIT_S)
        return real(address, length)

    monkeypatch.setattr(prefault, "_populate", slowly)
    arena = Arena(LAYOUT, 16, ArenaKind.READ_ONLY)
    arena.wait_real([])
    arena.wait_real([SlotId(3)])  # nothing was asked for
    arena.prefault(12)
    seen: list[int] = []

    def fill() -> None:
        for slots in ([SlotId(3)], [SlotId(7), SlotId(4)], [SlotId(15)]):
            arena.wait_real(slots)
            seen.append(arena.prefaulted_bytes // LAYOUT.block_bytes)

    filler = threading.Thread(target=fill)
    filler.start()
    for _ in range(3):
        may_go_on.release()
    filler.join(WAIT_S)
    assert not filler.is_alive()
    assert all(found >= slots for found, slots in zip(seen, (4, 8, 12), strict=True))
    arena.close()


def test_nobody_waits_for_memory_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    stepping, go_on = threading.Event(), threading.Event()

    def stuck(_address: int, _length: int) -> int:
        stepping.set()
        assert go_on.wait(WAIT_S)
        return errno.EINVAL

    monkeypatch.setattr(prefault, "_populate", stuck)
    prefaulter = Prefaulter(memoryview(mmap.mmap(-1, 4 * STEP_BYTES)))
    prefaulter.request(4 * STEP_BYTES)
    assert stepping.wait(WAIT_S)
    prefaulter.wait_for(STEP_BYTES, 0.01)
    assert prefaulter.done_bytes == 0, "its time was up"
    waiter = threading.Thread(target=prefaulter.wait_for, args=(STEP_BYTES, WAIT_S))
    waiter.start()
    go_on.set()  # and the kernel refuses
    waiter.join(WAIT_S)
    prefaulter.close()
    assert not waiter.is_alive()


def test_closing_ends_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    stepping, go_on = threading.Event(), threading.Event()

    def step(_address: int, _length: int) -> int:
        stepping.set()
        assert go_on.wait(WAIT_S)
        return 0

    monkeypatch.setattr(prefault, "_populate", step)
    prefaulter = Prefaulter(memoryview(mmap.mmap(-1, 4 * STEP_BYTES)))
    prefaulter.request(4 * STEP_BYTES)
    assert stepping.wait(WAIT_S)
    waiter = threading.Thread(target=prefaulter.wait_for, args=(4 * STEP_BYTES, WAIT_S))
    waiter.start()
    closer = threading.Thread(target=prefaulter.close)
    closer.start()
    while not prefaulter._closed:
        pass
    go_on.set()
    for thread in (waiter, closer):
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert prefaulter.done_bytes < 4 * STEP_BYTES
