"""The whole store against a dictionary: a get returns exactly the bytes put, or a miss.

Real tiers in a folder each: a roomy store, which may forget nothing; a tight one, where every few
blocks push others out of memory and off the disk; and a tight one with summaries of its blocks, of
which each is the right one or missing.
"""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ucm.api import LoadLease, NamespaceHandle, StoreLease
from ucm.checksum import block_checksums
from ucm.clock import SimClock
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig, SummariesConfig
from ucm.embedded import EmbeddedCache
from ucm.errors import LeaseExpiredError
from ucm.hashing import chain_keys
from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import encode_summary
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.load_plan import LoadPlan
from ucm.manager import Manager
from ucm.reader_io import open_reader_io
from ucm.testing.blocks import TINY_LAYOUT, chain, content, get, loaded, meaning, put, tiny_spec
from ucm.testing.extent_files import wait_for
from ucm.testing.lanes import IS_DEEP, LANE
from ucm.testing.oracle import CacheOracle
from ucm.testing.slab_pool import SlabPool
from ucm.types import ROOT_KEY, BlockKey, LoadMode, LoadOrder, LoadStatus, StoreStatus, SummaryKind

KIB = 1 << 10
NUM_CHAINS = 5
CHAIN_BLOCKS = 8
SEGMENT_BYTES = 128 * KIB

chains = st.integers(0, NUM_CHAINS - 1)
lengths = st.integers(1, CHAIN_BLOCKS)


class StoreMachine(RuleBasedStateMachine):
    """Rules shared by both stores."""

    memory_blocks = 64
    nvme_bytes = 8 * MIB
    may_forget = False
    summary: SummaryKind | None = None

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="ucm", dir=memory if memory.is_dir() else None))
        self.clock = SimClock()
        self.oracle = CacheOracle()
        self.loads: list[tuple[LoadLease, int]] = []
        self.stores: list[tuple[StoreLease, int]] = []
        self.plans: list[LoadPlan] = []
        self.io = open_reader_io()
        self.generation = 0
        self.open()

    def open(self) -> None:
        config = Config(
            service=ServiceConfig(staging_bytes=1 * MIB, drain_timeout_s=20.0),
            memory=MemoryConfig(capacity_bytes=self.memory_blocks * TINY_LAYOUT.block_bytes),
            nvme=NvmeConfig(
                path=self.folder / "store",
                capacity_bytes=self.nvme_bytes,
                segment_bytes=SEGMENT_BYTES,
                io_threads=2,
                commit_interval_s=0.0,
                index_map_bytes=16 * MIB,
            ),
            summaries=SummariesConfig(capacity_bytes=24 * 4096, max_queued_blocks=4),
        )
        self.manager = Manager(config, clock=self.clock)
        self.cache = EmbeddedCache(self.manager)
        self.handle: NamespaceHandle = self.cache.open_namespace(tiny_spec(), summary=self.summary)
        self.generation += 1

    def keys(self, number: int, length: int) -> list[BlockKey]:
        """Chains 0 and 1 share their first half."""
        seed = 100 + number
        if number != 1:
            return chain(self.handle.id, length, seed)
        shared = chain(self.handle.id, CHAIN_BLOCKS // 2, 100)
        tail = _continue(self.handle, shared[-1], CHAIN_BLOCKS // 2)
        return (shared + tail)[:length]

    @initialize(number=chains)
    def first_put(self, number: int) -> None:
        self.put(number, CHAIN_BLOCKS // 2)

    @rule(number=chains, length=lengths)
    def put(self, number: int, length: int) -> None:
        keys = self.keys(number, length)
        self.oracle.record_store(keys, put(self.cache, self.handle, keys))

    @rule(number=chains, length=lengths)
    def get(self, number: int, length: int) -> None:
        keys = self.keys(number, length)
        found = get(self.cache, self.handle, keys)
        self.oracle.check_get(keys, found)
        if not self.may_forget:
            self.oracle.check_complete(keys, len(found))

    @rule(number=chains, length=lengths, start=st.integers(0, CHAIN_BLOCKS))
    def get_from_the_middle(self, number: int, length: int, start: int) -> None:
        keys = self.keys(number, length)[start:]
        self.oracle.check_get(keys, get(self.cache, self.handle, keys))

    @rule(number=chains, wrong=st.integers(0, CHAIN_BLOCKS - 1))
    def put_with_wrong_bytes(self, number: int, wrong: int) -> None:
        keys = self.keys(number, CHAIN_BLOCKS)
        lease = self.cache.prepare_store(self.handle.id, ROOT_KEY, keys)
        checksums = {}
        for slot in lease.slots:
            if slot.data is not None:
                slot.data[:] = content(slot.key)
                checksums[slot.key] = block_checksums(TINY_LAYOUT, slot.data)
        damaged = lease.slots[wrong].data
        if damaged is not None:
            damaged[0] ^= 255
        statuses = self.cache.complete_store(lease.id, checksums)
        assert damaged is None or statuses[wrong] is not StoreStatus.ACCEPTED
        self.oracle.record_store(keys, statuses)

    @rule(number=chains, length=lengths)
    def prefetch(self, number: int, length: int) -> None:
        self.cache.prefetch(self.handle.id, self.keys(number, length))

    @rule(number=chains, length=lengths, timeout_s=st.sampled_from([0.0, 5.0]))
    @precondition(lambda self: len(self.loads) < 3)
    def hold(self, number: int, length: int, timeout_s: float) -> None:
        keys = self.keys(number, length)
        lease = self.cache.prepare_load(self.handle.id, keys, timeout_s=timeout_s)
        self.loads.append((lease, self.clock.now_us()))

    @rule()
    @precondition(lambda self: self.loads)
    def check_held(self) -> None:
        """Under a live lease the bytes stay; that is asserted even while others are evicted."""
        lease, granted_us = self.loads[-1]
        if self.clock.now_us() - granted_us >= lease.timeout_s * 1_000_000:
            return
        for block in lease.blocks[: lease.num_ready]:
            assert block.data is not None
            assert meaning(block.data) == content(block.key)

    @rule(as_corrupt=st.booleans())
    @precondition(lambda self: self.loads)
    def let_go(self, as_corrupt: bool) -> None:
        lease, _ = self.loads.pop()
        ready = [block.key for block in lease.blocks if block.status is LoadStatus.READY]
        self.cache.complete_load(lease.id, ready[:1] if as_corrupt else ())

    @rule(number=chains, length=lengths, mode=st.sampled_from(LoadMode))
    @precondition(lambda self: len(self.plans) < 3)
    def begin_layers(self, number: int, length: int, mode: LoadMode) -> None:
        keys = self.keys(number, length)
        self.plans.append(self.cache.begin_load(self.handle.id, keys, mode=mode, timeout_s=1))

    @rule(order=st.sampled_from(LoadOrder), is_read=st.booleans())
    @precondition(lambda self: self.plans)
    def end_layers(self, order: LoadOrder, is_read: bool) -> None:
        """Whatever happened to its blocks since, also after its time: right bytes, or none."""
        plan = self.plans.pop(0)
        if not is_read:
            self.cache.release(plan.id)
            return
        pool = SlabPool(TINY_LAYOUT, len(plan.blocks))
        options = ReaderOptions(order=order, num_threads=2, request_bytes=1)
        reader = LayerReader(plan, TINY_LAYOUT, pool, self.io, options)
        reader.start()
        count = reader.wait_layer(TINY_LAYOUT.num_layers - 1, 10.0)
        assert reader.is_done
        assert reader.cancel(10.0)
        keys = [block.key for block in plan.blocks]
        padding = bytes(TINY_LAYOUT.slab_stride_bytes - TINY_LAYOUT.slab_bytes)
        slabs = range(TINY_LAYOUT.num_layers)
        found = [
            b"".join(bytes(pool.view(layer, index)) + padding for layer in slabs)
            for index in range(count)
        ]
        self.oracle.check_get(keys, found)
        self.cache.complete_load(plan.id, reader.corrupt_keys())

    @rule(number=chains, length=lengths)
    @precondition(lambda self: len(self.stores) < 3)
    def begin_store(self, number: int, length: int) -> None:
        keys = self.keys(number, length)
        lease = self.cache.prepare_store(self.handle.id, ROOT_KEY, keys)
        self.stores.append((lease, self.clock.now_us()))

    @rule()
    @precondition(lambda self: self.stores)
    def end_store(self) -> None:
        lease, granted_us = self.stores.pop(0)
        late = self.clock.now_us() - granted_us >= lease.timeout_s * 1_000_000
        if late:
            with pytest.raises(LeaseExpiredError):
                self.cache.complete_store(lease.id, {})
            return
        checksums = {}
        for slot in lease.slots:
            if slot.data is not None:
                slot.data[:] = content(slot.key)
                checksums[slot.key] = block_checksums(TINY_LAYOUT, slot.data)
        statuses = self.cache.complete_store(lease.id, checksums)
        self.oracle.record_store([slot.key for slot in lease.slots], statuses)

    @rule()
    @precondition(lambda self: self.stores)
    def drop_store(self) -> None:
        self.cache.release(self.stores.pop()[0].id)

    @rule(seconds=st.sampled_from([0.5, 10.0, 31.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance_us(int(seconds * 1_000_000))
        self.manager.tick()

    @rule()
    def flush(self) -> None:
        flushed = self.cache.flush(timeout_s=20)
        assert flushed or self.may_forget

    @rule()
    def restart(self) -> None:
        self.loads.clear()
        self.stores.clear()
        self.plans.clear()
        self.cache.close()
        self.open()

    @rule(seed=st.integers(0, 2**16), while_open=st.booleans())
    def damage_the_disk(self, seed: int, while_open: bool) -> None:
        """Flip a bit somewhere in a segment, behind the store's back."""
        self.cache.flush(timeout_s=20)  # so that what follows does not depend on timing
        segments = sorted((self.folder / "store").rglob("*.seg"))
        if not segments:
            return
        self.oracle.damaged = True
        if not while_open:
            self.loads.clear()
            self.stores.clear()
            self.plans.clear()
            self.cache.close()
        rng = random.Random(seed)
        with rng.choice(segments).open("r+b") as file:
            offset = rng.randrange(SEGMENT_BYTES)
            file.seek(offset)
            old = file.read(1)
            if old:
                file.seek(offset)
                file.write(bytes([old[0] ^ (1 << rng.randrange(8))]))
        if not while_open:
            self.open()

    @rule(number=chains)
    def another_session(self, number: int) -> None:
        """A second session sees what is accepted and takes nothing with it when it ends."""
        other = EmbeddedCache(self.manager, owns_manager=False)
        handle = other.open_namespace(tiny_spec())
        keys = self.keys(number, CHAIN_BLOCKS)
        self.oracle.check_get(keys, get(other, handle, keys))
        other.prepare_load(handle.id, keys, timeout_s=0)
        other.prepare_store(handle.id, ROOT_KEY, keys)
        before = self.manager.status().num_leases
        other.close()
        assert self.manager.status().num_leases == before - 2

    @invariant()
    def is_sound(self) -> None:
        with self.manager._state.lock:
            assert self.manager._state.leases.check_integrity() == []

    def teardown(self) -> None:
        try:
            self.cache.flush(timeout_s=20)
            for plan in self.plans:
                self.cache.release(plan.id)
            spaces = self.manager._state.namespaces
            assert wait_for(lambda: not any(each.promotions for each in spaces))
            for number in range(NUM_CHAINS):  # a load waits for promotions that are under way
                with loaded(self.cache, self.handle, self.keys(number, CHAIN_BLOCKS)):
                    pass
            self.cache.flush(timeout_s=20)
            assert self.manager.check_integrity() == []
        finally:
            self.cache.close()
            self.io.close()
            shutil.rmtree(self.folder)


def _continue(handle: NamespaceHandle, parent: BlockKey, num_blocks: int) -> list[BlockKey]:
    tokens = list(range(num_blocks * TINY_LAYOUT.block_tokens))
    return chain_keys(handle.id, tokens, TINY_LAYOUT.block_tokens, parent=parent)


class TightStoreMachine(StoreMachine):
    """Memory for 12 blocks, disk for about 20: everything is evicted all the time."""

    memory_blocks = 12
    nvme_bytes = 2 * SEGMENT_BYTES
    may_forget = True


class SummarisedStoreMachine(TightStoreMachine):
    """Room for 12 summaries too; some stores bring them along, some bring wrong ones."""

    summary = SummaryKind.GSA_K4

    @rule(number=chains, length=lengths, wrong=st.integers(0, 2 * CHAIN_BLOCKS))
    def put_with_summaries(self, number: int, length: int, wrong: int) -> None:
        keys = self.keys(number, length)
        lease = self.cache.prepare_store(self.handle.id, ROOT_KEY, keys)
        checksums = {}
        for index, slot in enumerate(lease.slots):
            if slot.data is not None:
                assert slot.summary is not None
                slot.data[:] = content(slot.key)
                data = summary_of(keys[index - 1] if index == wrong else slot.key)
                slot.summary[: len(data)] = data
                checksums[slot.key] = block_checksums(TINY_LAYOUT, slot.data)
        self.oracle.record_store(keys, self.cache.complete_store(lease.id, checksums))

    @rule(number=chains, length=lengths, timeout_s=st.sampled_from([0.0, 5.0]))
    def ask(self, number: int, length: int, timeout_s: float) -> None:
        keys = self.keys(number, length)
        lease = self.cache.map_summaries(self.handle.id, keys, timeout_s=timeout_s)
        for key, entry in zip(keys, lease.entries, strict=True):
            if entry is not None:
                assert bytes(entry[: len(summary_of(key))]) == summary_of(key)
        self.cache.release(lease.id)


@functools.lru_cache(maxsize=256)
def summary_of(key: BlockKey) -> bytes:
    """The one right summary of a block."""
    data = content(key)
    records = summarize_blocks(TINY_LAYOUT, SummaryKind.GSA_K4, [data])[0]
    sums = block_checksums(TINY_LAYOUT, memoryview(data))
    return encode_summary(TINY_LAYOUT, SummaryKind.GSA_K4, records, sums)


PROFILE = settings(
    max_examples=LANE.state_machine_runs,
    stateful_step_count=LANE.state_machine_steps,
    deadline=None,
    print_blob=True,
)

TestRoomyStore = pytest.mark.timeout(43_200 if IS_DEEP else 300)(StoreMachine.TestCase)
TestRoomyStore.settings = PROFILE
TestTightStore = pytest.mark.timeout(43_200 if IS_DEEP else 300)(TightStoreMachine.TestCase)
TestTightStore.settings = PROFILE
TestSummarisedStore = pytest.mark.timeout(43_200 if IS_DEEP else 300)(
    SummarisedStoreMachine.TestCase
)
TestSummarisedStore.settings = settings(PROFILE, max_examples=LANE.state_machine_runs // 10)
