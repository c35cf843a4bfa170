"""Prefaulting: memory is made real up to the target, and nothing depends on it."""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from ucm.layout import KvDtype, KvLayout
from ucm.storage import prefault
from ucm.storage.arena import Arena, ArenaKind
from ucm.storage.prefault import STEP_BYTES, Prefaulter

WAIT_S = 20.0
LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=64, block_tokens=2048, dtype=KvDtype.FLOAT32
)
"""Blocks of 1 MiB."""


def resident_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_an_arena_costs_what_was_asked_for() -> None:
    arena = Arena(LAYOUT, 32, ArenaKind.READ_ONLY)
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
    finally:
        arena.close()


def test_what_is_there_stays() -> None:
    arena = Arena(LAYOUT, 8, ArenaKind.STAGING)
    try:
        arena.view(arena.slots.allocate(3)[2])[:4] = b"kept"
        arena.prefault(8)
        arena.wait_prefaulted(WAIT_S)
        assert arena.view(arena.slots.allocate(1)[0])[:4] == bytes(4)
        assert bytes(arena._view[2 << 20 : (2 << 20) + 4]) == b"kept"
    finally:
        arena.close()


def test_closing_ends_it_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = mmap.mmap(-1, 4 * STEP_BYTES)
    prefaulter = Prefaulter(mapping)
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
    mapping.close()


def test_a_kernel_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert calls == [STEP_BYTES]
        assert resident_bytes(arena.fd) == 0
    finally:
        arena.close()
