"""Staging: runs of bytes that do not overlap, and memory of one session."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.errors import ConfigError, InvalidArgumentError, TierUnavailableError
from ucm.layout import ALIGNMENT_BYTES
from ucm.staging import RunAllocator, Staging
from ucm.storage.tier import SlotId


@given(
    actions=st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 99)), max_size=60)
)
def test_runs_never_overlap_and_all_come_back(actions: list[tuple[bool, int, int]]) -> None:
    runs = RunAllocator(100)
    held: list[tuple[int, int]] = []
    for reserve, size, choice in actions:
        if reserve:
            offset = runs.reserve(size)
            if offset is not None:
                assert all(offset + size <= at or at + length <= offset for at, length in held)
                assert offset + size <= 100
                held.append((offset, size))
        elif held:
            runs.free(*held.pop(choice % len(held)))
        assert runs.used_bytes == sum(length for _, length in held)
        assert runs.check_integrity() == []
    for offset, size in held:
        runs.free(offset, size)
    assert runs.reserve(100) == 0


def test_full_means_none() -> None:
    runs = RunAllocator(10)
    assert runs.reserve(11) is None
    assert runs.reserve(10) == 0
    assert runs.reserve(1) is None


def test_the_memory_is_the_descriptors() -> None:
    staging = Staging(8 * ALIGNMENT_BYTES + 1)
    offset = staging.reserve(ALIGNMENT_BYTES + 1)
    assert offset is not None
    assert staging.runs.used_bytes == 2 * ALIGNMENT_BYTES
    with mmap.mmap(staging.arena.fd, staging.arena.size_bytes) as client:
        client[offset : offset + 3] = b"abc"
    assert bytes(staging.view(offset, 3)) == b"abc"
    staging.free(offset, ALIGNMENT_BYTES + 1)
    assert staging.runs.used_bytes == 0
    staging.close()
    staging.close()


def test_a_view_outside_is_refused() -> None:
    staging = Staging(ALIGNMENT_BYTES)
    for offset, size in ((-1, 1), (0, ALIGNMENT_BYTES + 1), (ALIGNMENT_BYTES, 1)):
        with pytest.raises(InvalidArgumentError):
            staging.view(offset, size)
    staging.close()


def test_closing_under_a_view_keeps_the_bytes() -> None:
    staging = Staging(ALIGNMENT_BYTES)
    view = staging.view(0, 4)
    view[:] = b"keep"
    staging.close()
    assert bytes(view) == b"keep"


def test_less_than_a_page_is_no_staging() -> None:
    with pytest.raises(ConfigError):
        Staging(ALIGNMENT_BYTES - 1)


def test_closed_memory_is_an_error_of_ours() -> None:
    staging = Staging(4 * 4096)
    view = staging.view(0, 4096)
    staging.close()
    view[0] = 1
    with pytest.raises(TierUnavailableError):
        staging.view(0, 4096)
    with pytest.raises(TierUnavailableError):
        staging.arena.view(SlotId(0))
