"""Blocks of a real store into device memory: the cache's plans, through `DeviceLoader`.

Run by tests/conformance/test_on_doubles.py in a process of its own. It runs on a double of the CUDA
driver: it proves our code, not NVIDIA's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ucm.api import NamespaceHandle
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.device_load import DeviceLoad, DeviceLoader, DevicePool, FileBlock, HostBlock
from ucm.device_plan import DevicePlan, open_device_io
from ucm.embedded import EmbeddedCache
from ucm.errors import TierUnavailableError
from ucm.kernels.cuda.driver import CudaDriver
from ucm.load_plan import LoadPlan
from ucm.manager import Manager
from ucm.storage.device import DeviceBuffer, DeviceFileIo
from ucm.storage.format import HEADER_BYTES
from ucm.storage.gds import GdsFileIo, GdsOptions
from ucm.storage.io_choice import Machine
from ucm.storage.pinned_io import PinnedFileIo
from ucm.testing.blocks import TINY_LAYOUT, content, get, tiny_spec
from ucm.testing.cache_conformance import MEMORY_BLOCKS
from ucm.testing.doubles import Doubles, device_bytes
from ucm.testing.load_plan_conformance import damage, on_nvme_only
from ucm.types import BlockKey, LoadMode, SourceKind

DOUBLES = Doubles(Path(os.environ["UCM_DOUBLES"]))
POOL_BLOCKS = 8
IO: dict[str, Callable[[], DeviceFileIo]] = {
    "gds": lambda: GdsFileIo(GdsOptions(direct=True, io_threads=2)),
    "pinned": lambda: PinnedFileIo(2),
}


@dataclass
class Bench:
    """A cache whose chain of six is on NVMe, two of them in memory, too; and a loader."""

    cache: EmbeddedCache
    handle: NamespaceHandle
    keys: list[BlockKey]
    folder: Path
    io: DeviceFileIo
    loader: DeviceLoader
    pool: DeviceBuffer

    def begin(self, mode: LoadMode) -> LoadPlan:
        return self.cache.begin_load(self.handle.id, self.keys, mode=mode, timeout_s=5)

    def load(self, plan: DevicePlan) -> DeviceLoad:
        """To the pool's blocks 1, 2, ..."""
        return self.loader.begin(plan.blocks, range(1, 1 + len(plan.blocks)))

    def slab(self, layer: int, block_id: int) -> bytes:
        start = (layer * POOL_BLOCKS + block_id) * TINY_LAYOUT.slab_bytes
        return bytes(device_bytes(self.pool)[start : start + TINY_LAYOUT.slab_bytes])

    def check(self, num_good: int) -> None:
        """The leading blocks are right in the pool; nothing wrong is anywhere."""
        for row, key in enumerate(self.keys):
            right = [content(key)[TINY_LAYOUT.slab_slice(layer)] for layer in (0, 1)]
            found = [self.slab(layer, row + 1) for layer in (0, 1)]
            assert found == right or row >= num_good
            assert all(a in (b, bytes(len(b))) for a, b in zip(found, right, strict=True))


@pytest.fixture(params=IO)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    folder = tmp_path / "store"
    config = Config(
        service=ServiceConfig(staging_bytes=1 * MIB),
        memory=MemoryConfig(capacity_bytes=MEMORY_BLOCKS * TINY_LAYOUT.block_bytes),
        nvme=NvmeConfig(
            path=folder, capacity_bytes=16 * MIB, segment_bytes=2 * MIB, io_threads=2, io="posix"
        ),
    )
    nbytes = TINY_LAYOUT.num_layers * POOL_BLOCKS * TINY_LAYOUT.slab_bytes
    with contextlib.ExitStack() as ends:
        cache = EmbeddedCache(Manager(config), owns_manager=True)
        ends.callback(cache.close)
        handle = cache.open_namespace(tiny_spec())
        keys = on_nvme_only(cache, handle)
        assert len(get(cache, handle, keys[:2])) == 2
        pool = ends.enter_context(DOUBLES.device_memory(nbytes))
        device_bytes(pool)[:] = bytes(nbytes)
        io = IO[request.param]()
        ends.callback(io.close)
        loader = DeviceLoader(CudaDriver(), io, DevicePool(pool.address, POOL_BLOCKS, TINY_LAYOUT))
        ends.callback(loader.close)
        yield Bench(cache, handle, keys, folder, io, loader, pool)


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("mode", LoadMode)
def test_a_chain_reaches_the_pool(mode: LoadMode, lazily: bool, bench: Bench) -> None:
    """From the arena, from the disk, and while it is promoted."""
    with DOUBLES.lazy_streams() if lazily else contextlib.nullcontext():
        lease = bench.begin(mode)
        rest = SourceKind.EXTENT if mode is LoadMode.DIRECT else SourceKind.PROMOTING
        assert [b.source for b in lease.blocks] == [SourceKind.MEMORY] * 2 + [rest] * 4
        plan = DevicePlan(lease, TINY_LAYOUT, bench.io)
        kinds = [FileBlock if mode is LoadMode.DIRECT else HostBlock] * 4
        assert [type(block) for block in plan.blocks] == [HostBlock, HostBlock, *kinds]
        load = bench.load(plan)
        assert [load.wait_layer(layer, 10.0) for layer in (0, 1)] == [6, 6]
        bench.check(6)
        finish(bench, plan, load, lease)
    assert bench.cache.lookup(bench.handle.id, bench.keys).num_blocks == 6


def finish(bench: Bench, plan: DevicePlan, load: DeviceLoad, lease: LoadPlan) -> Sequence[BlockKey]:
    plan.stop()
    assert load.cancel(5.0)
    plan.close()
    corrupt = plan.corrupt_keys(load.failures)
    bench.cache.complete_load(lease.id, corrupt)
    return corrupt


@pytest.mark.parametrize("where", ["header", "slab"])
def test_a_damaged_block_is_found_and_reported(where: str, bench: Bench) -> None:
    """What is before it is right; the cache then quarantines its copy."""
    lease = bench.begin(LoadMode.DIRECT)
    extent = lease.blocks[4].extent
    assert extent is not None
    at = 0 if where == "header" else HEADER_BYTES + TINY_LAYOUT.slab_stride_bytes
    for path in bench.folder.rglob("*.seg"):
        damage(path, extent.offset + at)
    plan = DevicePlan(lease, TINY_LAYOUT, bench.io)
    load = bench.load(plan)
    assert load.wait_layer(1, 10.0) == 4
    bench.check(4)
    assert finish(bench, plan, load, lease) == (bench.keys[4],)
    assert bench.cache.lookup(bench.handle.id, bench.keys).num_blocks == 4


def test_another_generation_is_another_block(bench: Bench) -> None:
    """A slot that was used again has a header that says so."""
    lease = bench.begin(LoadMode.DIRECT)
    extent = lease.blocks[3].extent
    assert extent is not None
    stale = dataclasses.replace(extent, generation=extent.generation + 1)
    blocks = list(lease.blocks)
    blocks[3] = dataclasses.replace(blocks[3], extent=stale)
    plan = DevicePlan(dataclasses.replace(lease, blocks=tuple(blocks)), TINY_LAYOUT, bench.io)
    load = bench.load(plan)
    assert load.wait_layer(1, 10.0) == 3
    finish(bench, plan, load, lease)


class Stuck:
    """`LoadProgress` of a daemon that was stopped."""

    num_blocks = 4

    def __init__(self) -> None:
        self.asked = threading.Event()

    def num_done(self) -> int:
        return 0

    def num_usable(self) -> int:
        return 4

    def checksums(self, index: int) -> tuple[int, ...]:
        raise AssertionError(f"nobody knows them yet: {index}")

    def wait(self, num_slabs: int, timeout_s: float) -> bool:
        assert num_slabs >= 1
        self.asked.set()
        threading.Event().wait(timeout_s)
        return False

    def close(self) -> None:
        """Nothing to do."""


def test_a_promotion_that_never_comes_ends_with_stop(bench: Bench) -> None:
    lease, progress = bench.begin(LoadMode.MAPPED), Stuck()
    stuck = dataclasses.replace(lease, progress=progress)
    plan = DevicePlan(stuck, TINY_LAYOUT, bench.io)
    load = bench.load(plan)
    assert progress.asked.wait(5)
    assert load.wait_layer(0, 0.05) == 0
    assert not load.cancel(0.01)
    plan.stop()
    assert load.cancel(5.0)
    plan.close()
    bench.cache.release(lease.id)


def test_files_that_may_not_be_opened_are_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kvikio opens a file once more, which may be another user's."""

    def refuse(_fd: int) -> None:
        raise PermissionError("injected")

    monkeypatch.setattr(bench.io, "adopt", refuse)
    lease = bench.begin(LoadMode.DIRECT)
    plan = DevicePlan(lease, TINY_LAYOUT, bench.io)
    assert len(plan.blocks) == 2
    load = bench.load(plan)
    assert load.wait_layer(1, 10.0) == 2
    finish(bench, plan, load, lease)


def test_the_best_way_to_device_memory_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found as the daemon finds it; a machine without one is told why."""
    monkeypatch.setenv("LD_PRELOAD", str(Path(os.environ["UCM_DOUBLES"]) / "libcuda.so.1"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    io = open_device_io(2, Machine(device_nodes=(tmp_path,)))
    assert isinstance(io, PinnedFileIo)
    io.close()
    with pytest.raises(TierUnavailableError, match="cannot be read into: no GPU"):
        open_device_io(2, Machine(device_nodes=(tmp_path / "none",)))
