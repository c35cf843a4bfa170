"""Every codec, policy, admission, capacity and quota together, against a dictionary.

One run draws a configuration and some steps of several tenants, half of whom accept a loss. What
must hold whatever was drawn: a get returns the bytes that were put or, for who accepts a loss, what
the codec makes of them *once*; nobody else ever gets anything but the bytes that were put; a
roomy store forgets nothing that was flushed, also over a restart; and at the end nothing is held.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ucm.api import NamespaceHandle
from ucm.checksum import block_checksums, verify
from ucm.clock import SimClock
from ucm.config import (
    MIB,
    POLICY_NAMES,
    Config,
    MemoryConfig,
    NvmeConfig,
    QuotaConfig,
    ServiceConfig,
)
from ucm.embedded import EmbeddedCache
from ucm.errors import CapacityError
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.layout import KvDtype, KvLayout
from ucm.manager import Manager
from ucm.namespaces import TierFactory
from ucm.shares import nvme_shares
from ucm.storage.codec_values import from_float
from ucm.storage.codecs import codec_named
from ucm.storage.encoding import block_words, decode_block, encode_block
from ucm.storage.file_io import FileHandle, IoRequest
from ucm.storage.format import HEADER_BYTES, compact_payload_bytes
from ucm.storage.nvme import NvmeStore
from ucm.testing.faulty_io import FaultyFileIo
from ucm.testing.nvme import quick_folder
from ucm.types import ROOT_KEY, BlockKey, LeaseId, StoreStatus

LAYOUT = KvLayout(
    num_layers=2, num_kv_heads=1, head_dim=64, block_tokens=32, dtype=KvDtype.BFLOAT16
)
"""In bfloat16, what a lossy codec made changes once more when it is coded again."""
SLOT_BYTES = HEADER_BYTES + LAYOUT.block_bytes
CHAIN_BLOCKS = 12
NUM_CHAINS = 4
LOSSY = ("int8", "fp8", "int4")
CODECS = ("raw", "bp-zstd", *LOSSY)
TENANTS = ("", "a", "b")
ROOMY_SLOTS = 3 * len(TENANTS) * 2 * CHAIN_BLOCKS * NUM_CHAINS // 2
"""Half as many again as there are blocks: some segments are full ones, some half empty."""


def spec_of(tenant: str, *, lossy: bool) -> NamespaceSpec:
    return NamespaceSpec(
        layout=LAYOUT, model_id="m", weights_digest="0" * 64, tenant=tenant, accepts_lossy=lossy
    )


def keys_of(handle: NamespaceHandle, number: int, length: int) -> list[BlockKey]:
    """Chains 0 and 1 share their first half."""
    tokens = [number * 10_000 + n for n in range(CHAIN_BLOCKS * LAYOUT.block_tokens)]
    if number == 1:
        half = len(tokens) // 2
        tokens[:half] = range(half)
    return chain_keys(handle.id, tokens[: length * LAYOUT.block_tokens], LAYOUT.block_tokens)


@functools.lru_cache(maxsize=4096)
def content(key: BlockKey) -> bytes:
    """Values as a model makes them; of one block in six any bit patterns, which fit no codec."""
    if key[0] < 43:
        return random.Random(key).randbytes(LAYOUT.block_bytes)
    data = memoryview(bytearray(LAYOUT.block_bytes))
    words = block_words(LAYOUT, data)
    seed = int.from_bytes(key[:8], "little")
    values = np.random.default_rng(seed).standard_normal(words.shape)
    from_float(values.astype(np.float32), LAYOUT.dtype, words)
    return bytes(data)


@functools.lru_cache(maxsize=4096)
def coded_once(key: BlockKey, codec_name: str, *, is_first: bool) -> bytes:
    """What a lossy codec makes of the block; its bytes where it does not fit."""
    codec, data = codec_named(codec_name), content(key)
    target = memoryview(bytearray(compact_payload_bytes(LAYOUT, codec)))
    encoded = encode_block(codec, LAYOUT, memoryview(data), target, is_first=is_first)
    if encoded is None:
        return data
    decoded = memoryview(bytearray(LAYOUT.block_bytes))
    decode_block(codec, LAYOUT, target, decoded)
    return bytes(decoded)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One configuration."""

    codec: str
    policies: tuple[str, str]
    admission: str
    memory_blocks: int
    segments: int
    slots_per_segment: int
    quota: bool
    prefault: bool
    faults: tuple[tuple[int, int], ...] = ()
    """Number of a call of the disk, counted from each opening, and the errno that it fails with."""

    @property
    def is_roomy(self) -> bool:
        """Whether the disk has room for all there is, and takes all of it."""
        num_slots = self.segments * self.slots_per_segment
        is_tight = num_slots < ROOMY_SLOTS or self.quota or self.faults
        return self.admission == "always" and not is_tight

    def config(self, path: Path, *, less: bool) -> Config:
        """The store's; with fewer bytes on the disk if `less`."""
        segment_bytes = self.slots_per_segment * SLOT_BYTES
        segments = max(1, self.segments // 2) if less else self.segments
        quota = {}
        if self.quota:
            quota["a"] = QuotaConfig(
                memory_bytes=max(2, self.memory_blocks // 2) * LAYOUT.block_bytes,
                memory_reserved_bytes=self.memory_blocks // 4 * LAYOUT.block_bytes,
                nvme_bytes=max(1, segments // 2) * segment_bytes,
                nvme_reserved_bytes=segments // 4 * segment_bytes,
            )
        return Config(
            service=ServiceConfig(staging_bytes=1 * MIB, max_namespaces=4, drain_timeout_s=20.0),
            memory=MemoryConfig(
                capacity_bytes=self.memory_blocks * LAYOUT.block_bytes,
                policy=self.policies[0],
                prefault_bytes=256 * MIB if self.prefault else 0,
            ),
            nvme=NvmeConfig(
                path=path,
                capacity_bytes=segments * segment_bytes,
                segment_bytes=segment_bytes,
                codec=self.codec,
                admission=self.admission,
                policy=self.policies[1],
                io="posix",
                io_threads=2,
                commit_interval_s=0.0,
                index_map_bytes=16 * MIB,
            ),
            quota=quota,
        )


class SerialFaultyIo(FaultyFileIo):
    """A faulty disk for the many threads of a whole store."""

    def __init__(self, *, faults: dict[int, int]) -> None:
        super().__init__(faults=faults)
        self._one = threading.RLock()

    def open(self, path: Path, *, create: bool, writable: bool) -> FileHandle:
        with self._one:
            return super().open(path, create=create, writable=writable)

    def preallocate(self, file: FileHandle, size_bytes: int) -> None:
        with self._one:
            super().preallocate(file, size_bytes)

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        with self._one:
            return super().read_batch(requests)

    def write_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        with self._one:
            return super().write_batch(requests)

    def fdatasync(self, file: FileHandle) -> None:
        with self._one:
            super().fdatasync(file)

    def close_file(self, file: FileHandle) -> None:
        with self._one:
            super().close_file(file)


class Run:
    """One store and what must be true of it."""

    def __init__(self, drawn: Drawn, path: Path) -> None:
        self.drawn = drawn
        self.path = path
        self.less = False
        self.clock = SimClock()
        self.accepted: set[BlockKey] = set()
        self.flushed: set[BlockKey] = set()
        self.pins: list[tuple[tuple[str, bool], LeaseId, list[BlockKey]]] = []
        self.open()

    def open(self) -> None:
        config = self.drawn.config(self.path, less=self.less)
        tiers = None
        if self.drawn.faults:
            io = SerialFaultyIo(faults=dict(self.drawn.faults))
            tiers = TierFactory(nvme=NvmeStore(config.nvme, io, shares=nvme_shares(config)))
        self.manager = Manager(config, clock=self.clock, tiers=tiers)
        self.sessions: dict[tuple[str, bool], tuple[EmbeddedCache, NamespaceHandle]] = {}

    def session(self, who: tuple[str, bool]) -> tuple[EmbeddedCache, NamespaceHandle] | None:
        """The tenant's session; None when there is no place for one more namespace."""
        if who not in self.sessions:
            cache = EmbeddedCache(self.manager, owns_manager=False)
            try:
                handle = cache.open_namespace(spec_of(who[0], lossy=who[1]))
            except CapacityError:
                cache.close()
                return None
            self.sessions[who] = cache, handle
        return self.sessions[who]

    def step(self, action: str, who: tuple[str, bool], number: int, length: int) -> None:
        self.clock.advance_us(700_000)
        if action in ("restart", "shrunk", "wait"):
            getattr(self, action)()
        elif action == "leave":
            self.leave(who)
        elif (found := self.session(who)) is not None:
            getattr(self, action)(who, *found, keys_of(found[1], number, length))

    def put(
        self, who: tuple[str, bool], cache: EmbeddedCache, handle: NamespaceHandle, keys: list[Any]
    ) -> None:
        del who
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        sums = {}
        for slot in lease.slots:
            if slot.data is not None:
                slot.data[:] = content(slot.key)
                sums[slot.key] = block_checksums(LAYOUT, slot.data)
        statuses = cache.complete_store(lease.id, sums)
        good = (StoreStatus.ACCEPTED, StoreStatus.PRESENT)
        self.accepted |= {key for key, each in zip(keys, statuses, strict=True) if each in good}

    def get(
        self, who: tuple[str, bool], cache: EmbeddedCache, handle: NamespaceHandle, keys: list[Any]
    ) -> None:
        lease = cache.prepare_load(handle.id, keys, timeout_s=10)
        for number, block in enumerate(lease.blocks[: lease.num_ready]):
            assert block.data is not None
            data = bytes(block.data)
            assert verify(LAYOUT, memoryview(data), block.checksums)
            self.check(who, block.key, data, is_first=number == 0)
        cache.complete_load(lease.id)

    def check(self, who: tuple[str, bool], key: BlockKey, data: bytes, *, is_first: bool) -> None:
        assert key in self.accepted, "a block that was never accepted"
        if data == content(key):
            return
        assert who[1], f"{who} accepts no loss"
        assert self.drawn.codec in LOSSY, "nobody asked for a loss"
        once = coded_once(key, self.drawn.codec, is_first=is_first)
        assert data == once, "coded more than once"

    def pin(
        self, who: tuple[str, bool], cache: EmbeddedCache, handle: NamespaceHandle, keys: list[Any]
    ) -> None:
        try:
            pin = cache.pin(handle.id, keys[:3], hold_s=60.0, timeout_s=10)
        except CapacityError:
            return
        self.pins.append((who, pin.id, keys[: pin.num_blocks]))

    def unpin(
        self, who: tuple[str, bool], cache: EmbeddedCache, handle: NamespaceHandle, keys: list[Any]
    ) -> None:
        del who, cache, handle, keys
        if self.pins:
            owner, lease, _ = self.pins.pop()
            if owner in self.sessions:
                self.sessions[owner][0].release(lease)

    def prefetch(
        self, who: tuple[str, bool], cache: EmbeddedCache, handle: NamespaceHandle, keys: list[Any]
    ) -> None:
        del who
        cache.prefetch(handle.id, keys)

    def flush(
        self, who: tuple[str, bool], cache: EmbeddedCache, handle: NamespaceHandle, keys: list[Any]
    ) -> None:
        del who, handle, keys
        done = cache.flush(timeout_s=20)
        if self.drawn.is_roomy and not self.less:
            assert done
            self.flushed |= self.accepted

    def wait(self) -> None:
        """Pins and leases end, and what could not shrink is tried again."""
        self.clock.advance_us(61_000_000)
        self.manager.tick()

    def leave(self, who: tuple[str, bool]) -> None:
        if who in self.sessions:
            self.sessions.pop(who)[0].close()
            self.pins = [pin for pin in self.pins if pin[0] != who]

    def restart(self) -> None:
        self.close()
        self.open()

    def shrunk(self) -> None:
        """A restart with half of the disk, or with all of it again."""
        self.close()
        self.less = not self.less
        self.flushed.clear()
        self.open()

    def close(self) -> None:
        done = self.manager.flush(timeout_s=20)
        assert done or not self.drawn.is_roomy
        # Integrity is that of a store at rest; a commit may have woken one that no flush waits for.
        writes, stop_s = self.manager._write_behind, time.monotonic() + 20
        while writes is not None and writes.num_queued and time.monotonic() < stop_s:
            time.sleep(0.001)
        assert self.manager.check_integrity() == []
        for who in list(self.sessions):
            self.leave(who)
        self.pins.clear()
        status = self.manager.status()
        assert (status.num_leases, status.leased_bytes) == (0, 0)
        assert sum(each.pinned_bytes for each in status.namespaces) == 0
        is_durable = self.manager.close()
        if self.drawn.is_roomy and not self.less:
            assert is_durable
            self.flushed |= self.accepted

    def check_flushed(self) -> None:
        """After a restart, all that was flushed in a roomy store is there."""
        for who in [(tenant, lossy) for tenant in TENANTS for lossy in (False, True)]:
            found = self.session(who)
            if found is None:
                continue
            cache, handle = found
            for number in range(NUM_CHAINS):
                keys = keys_of(handle, number, CHAIN_BLOCKS)
                there = cache.lookup(handle.id, keys).num_blocks
                assert not self.flushed & set(keys[there:]), "flushed and forgotten"
                self.get(who, cache, handle, keys)
            self.leave(who)


drawn_configurations = st.builds(
    Drawn,
    codec=st.sampled_from(CODECS),
    policies=st.tuples(st.sampled_from(POLICY_NAMES), st.sampled_from(POLICY_NAMES)),
    admission=st.sampled_from(["always", "always", "second-touch"]),
    memory_blocks=st.sampled_from([4, 10, 24, 200]),
    segments=st.sampled_from([1, 4, 8, 80]),
    slots_per_segment=st.sampled_from([2, 4, 12]),
    quota=st.booleans(),
    prefault=st.booleans(),
    faults=st.one_of(
        st.just(()),
        st.lists(
            st.tuples(st.integers(1, 120), st.sampled_from([errno.EIO, errno.ENOSPC])), max_size=5
        ).map(tuple),
    ),
)
"""From a few blocks in all to more than there are."""

ACTIONS = (
    *("put", "put", "put", "get", "get", "flush", "pin", "unpin"),
    *("prefetch", "leave", "restart", "shrunk", "wait"),
)

drawn_steps = st.lists(
    st.tuples(
        st.sampled_from(ACTIONS),
        st.tuples(st.sampled_from(TENANTS), st.booleans()),
        st.integers(0, NUM_CHAINS - 1),
        st.integers(1, CHAIN_BLOCKS),
    ),
    min_size=15,
    max_size=40,
)


@pytest.mark.timeout(180)  # a failure is made smaller for a while
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=drawn_configurations, steps=drawn_steps)
def test_a_get_is_what_was_put_in_every_configuration(
    drawn: Drawn, steps: list[tuple[str, tuple[str, bool], int, int]]
) -> None:
    with quick_folder() as folder:
        run = Run(drawn, folder / "store")
        for step in steps:
            run.step(*step)
        run.restart()
        run.check_flushed()
        run.close()
