"""What every `CacheApi` says when a batch cannot be served whole: a status a key, nothing hidden.

Mix it into a subclass of `CacheApiTests`; the harness's staging holds 1 MiB.
"""

from __future__ import annotations

import pytest

from ucm.api import CacheApi, NamespaceHandle, StoreLease
from ucm.checksum import block_checksums
from ucm.config import MIB
from ucm.errors import UcmError
from ucm.types import ROOT_KEY, BlockKey, LoadStatus, StoreStatus

from .blocks import TINY_LAYOUT, chain, content, get, loaded, put, tiny_spec
from .cache_conformance import MEMORY_BLOCKS, CacheHarness

STAGING_BLOCKS = MIB // TINY_LAYOUT.block_bytes


def fill(handle: NamespaceHandle, lease: StoreLease) -> dict[BlockKey, tuple[int, ...]]:
    """Write the right bytes to every granted slot; their checksums."""
    checksums = {}
    for slot in lease.slots:
        if slot.data is not None:
            slot.data[:] = content(slot.key, handle.layout)
            checksums[slot.key] = block_checksums(handle.layout, slot.data)
    return checksums


class PartialResultTests:
    """Failures in the middle of a batch."""

    def test_staging_that_ends_at_some_key(self, cache: CacheApi, handle: NamespaceHandle) -> None:
        """That key and all behind it have no space; the others are stored."""
        keys = chain(handle.id, STAGING_BLOCKS + 3)
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        assert [slot.key for slot in lease.slots] == keys
        statuses = [slot.status for slot in lease.slots]
        assert statuses == [StoreStatus.WANTED] * STAGING_BLOCKS + [StoreStatus.NO_SPACE] * 3
        completed = cache.complete_store(lease.id, fill(handle, lease))
        accepted = completed.count(StoreStatus.ACCEPTED)
        assert len(completed) == len(keys)
        assert completed[:accepted] == (StoreStatus.ACCEPTED,) * accepted
        assert set(completed[accepted:]) == {StoreStatus.NO_SPACE}
        assert 0 < accepted <= MEMORY_BLOCKS
        assert cache.lookup(handle.id, keys).num_blocks == accepted
        assert get(cache, handle, keys[:accepted]) == [content(key) for key in keys[:accepted]]

    def test_an_arena_that_is_full_at_some_key_of_a_load(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """Blocks that find no slot free of leases say so, one by one."""
        chains = [chain(handle.id, MEMORY_BLOCKS // 2, seed) for seed in (1, 2, 3)]
        for keys in chains:
            put(cache, handle, keys)
            assert cache.flush(timeout_s=10)
        with loaded(cache, handle, chains[1]), loaded(cache, handle, chains[2]) as held:
            assert held.num_ready > 0
            with loaded(cache, handle, chains[0]) as lease:
                statuses = [block.status for block in lease.blocks]
        assert len(statuses) == len(chains[0])
        ready = statuses.count(LoadStatus.READY)
        assert statuses == [LoadStatus.READY] * ready + [LoadStatus.NO_SPACE] * (
            len(statuses) - ready
        )
        assert ready < len(statuses)
        assert get(cache, handle, chains[0]) == [content(key) for key in chains[0]]

    @pytest.mark.parametrize("stage", ["prepared", "filled"])
    @pytest.mark.parametrize("end", ["release", "close", "expire"])
    def test_a_store_that_is_given_up_is_never_visible(
        self, harness: CacheHarness, cache: CacheApi, handle: NamespaceHandle, stage: str, end: str
    ) -> None:
        """At whatever stage, however it ends; completing it afterwards is an error."""
        other = harness.open_session()
        other.open_namespace(tiny_spec())
        keys = chain(handle.id, 3)
        lease = other.prepare_store(handle.id, ROOT_KEY, keys)
        checksums = fill(handle, lease) if stage == "filled" else {}
        if end == "release":
            other.release(lease.id)
        elif end == "close":
            other.close()
        else:
            harness.pass_time(harness.lease_timeout_s + 1)
        with pytest.raises(UcmError):
            other.complete_store(lease.id, checksums)
        assert cache.lookup(handle.id, keys).num_blocks == 0
        assert harness.leased_bytes() == 0
        assert put(cache, handle, keys) == (StoreStatus.ACCEPTED,) * 3

    def test_a_batch_with_one_bad_block_names_it(
        self, cache: CacheApi, handle: NamespaceHandle
    ) -> None:
        """What is before it is stored, what is behind it would be an orphan."""
        keys = chain(handle.id, 4)
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        checksums = fill(handle, lease)
        bad = lease.slots[2].data
        assert bad is not None
        bad[0] ^= 1
        assert cache.complete_store(lease.id, checksums) == (
            StoreStatus.ACCEPTED,
            StoreStatus.ACCEPTED,
            StoreStatus.CORRUPT,
            StoreStatus.ORPHAN,
        )
        assert cache.lookup(handle.id, keys).num_blocks == 2
