"""A session that opens its namespace with another kind of summaries while it stores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ucm.api import NamespaceHandle
from ucm.checksum import block_checksums
from ucm.config import MIB, Config, MemoryConfig, ServiceConfig, SummariesConfig
from ucm.embedded import EmbeddedCache
from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import encode_summary
from ucm.manager import Manager
from ucm.stores import StorePath
from ucm.testing.selections import (
    SELECT_LAYOUT,
    block_bytes_of,
    put_blocks,
    select_chain,
    select_spec,
    slabs_of,
)
from ucm.types import ROOT_KEY, StoreStatus, SummaryKind, SummaryStatus

WAIT_S = 10.0


@pytest.fixture
def cache() -> Iterator[EmbeddedCache]:
    manager = Manager(
        Config(
            service=ServiceConfig(staging_bytes=2 * (SELECT_LAYOUT.block_bytes + 4096)),
            memory=MemoryConfig(capacity_bytes=64 * SELECT_LAYOUT.block_bytes),
            summaries=SummariesConfig(capacity_bytes=MIB, table_bytes=MIB),
        )
    )
    cache = EmbeddedCache(manager)
    yield cache
    problems = manager.check_integrity()
    cache.close()
    assert manager.close()
    assert problems == []


def open_as(cache: EmbeddedCache, kind: SummaryKind) -> NamespaceHandle:
    return cache.open_namespace(select_spec(), summary=kind)


def reopen_between_copy_and_acceptance(
    monkeypatch: pytest.MonkeyPatch, cache: EmbeddedCache, kind: SummaryKind
) -> None:
    """What another call of the same session may do in the middle of a `complete_store`."""
    copy = StorePath._copy

    def copied(path: StorePath, *arguments: Any) -> None:
        copy(path, *arguments)
        open_as(cache, kind)

    monkeypatch.setattr(StorePath, "_copy", copied)


@pytest.mark.parametrize("other", [SummaryKind.CUBOID, SummaryKind.GSA_2])
def test_a_summary_never_gets_into_the_book_of_another_kind(
    cache: EmbeddedCache, monkeypatch: pytest.MonkeyPatch, other: SummaryKind
) -> None:
    """Boxes and cuboids are equally long: only who carries the kind along can tell them apart."""
    handle = open_as(cache, SummaryKind.BOX)
    reopen_between_copy_and_acceptance(monkeypatch, cache, other)
    key = select_chain(handle, 1)[0]
    assert put_blocks(cache, handle, [key]) == (StoreStatus.ACCEPTED,)
    lease = cache.map_summaries(handle.id, [key], timeout_s=WAIT_S)
    assert (lease.kind, lease.statuses) == (other, (SummaryStatus.READY,))
    block = memoryview(block_bytes_of(slabs_of(key)))
    sums = block_checksums(SELECT_LAYOUT, block)
    records = summarize_blocks(SELECT_LAYOUT, other, [block])[0]
    assert lease.entries[0] is not None
    assert bytes(lease.entries[0]) == encode_summary(SELECT_LAYOUT, other, records, sums)
    cache.release(lease.id)
    assert all(found.num_copying == 0 for found in cache.manager._state.namespaces)


def test_a_store_begun_before_there_were_summaries_is_completed(cache: EmbeddedCache) -> None:
    """Its runs have no room for summaries, and the last one ends where the staging memory does."""
    handle = cache.open_namespace(select_spec())
    count = (2 * (SELECT_LAYOUT.block_bytes + 4096)) // SELECT_LAYOUT.block_bytes
    keys = select_chain(handle, count)
    lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
    checksums = {}
    for slot in lease.slots:
        assert slot.data is not None
        slot.data[:] = block_bytes_of(slabs_of(slot.key))
        checksums[slot.key] = block_checksums(SELECT_LAYOUT, slot.data)
    open_as(cache, SummaryKind.SHADOW4)
    assert set(cache.complete_store(lease.id, checksums)) == {StoreStatus.ACCEPTED}
    assert cache.manager.metrics.value("ucm_summaries_refused_total") == 0
