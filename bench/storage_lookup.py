"""Lookups in a daemon, and an index of many blocks: how fast it opens, what memory it takes.

A lookup is timed as a client sees it: from its list of keys to the tier of every block. Which way
it goes is the client's business: 1,000 keys fit a packet of the door, 10,000 go by gRPC.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ucm.api import CacheApi, NamespaceHandle
from ucm.config import GIB, NvmeConfig
from ucm.layout import KvDtype, KvLayout
from ucm.storage.format import HEADER_BYTES
from ucm.storage.index import BlockIndex, IndexRecord
from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import SlotId
from ucm.types import KEY_BYTES, ROOT_KEY, BlockKey, NamespaceId

from .storage_daemon import bench_daemon, private_memory
from .storage_dram import put_chain
from .storage_measure import (
    Plan,
    Progress,
    Result,
    StorageBenchOptions,
    interleave,
    percentile,
    rounded,
)
from .storage_payload import Payload, bench_chain, bench_spec, require

PAGE_LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=32, block_tokens=32, dtype=KvDtype.BFLOAT16
)
"""Blocks of one page: as many as possible in as little room."""

FLUSH_TIMEOUT_S = 60.0
CHAIN_BLOCKS = 1000
CHAINS_PER_COMMIT = 50
PILOT_CHAINS = 20
OPENING_SHARE = 4
"""A daemon's opening takes so many times what its NVMe tier alone takes."""
INDEX_MAP_BYTES = 4 * GIB
LOOKUPS_AT_SIZE = 50
FIRST_GENERATION = (1 << 40) + 1


def measure_lookup(cache: CacheApi, sizes: tuple[int, ...], plan: Plan) -> Result:
    """Round trips of a lookup of so many keys, all of which are there."""
    handle = cache.open_namespace(bench_spec(PAGE_LAYOUT, "lookup"))
    keys = bench_chain(handle.id, PAGE_LAYOUT, max(sizes))
    put_chain(cache, handle, Payload(PAGE_LAYOUT), keys)
    # Ten thousand writes behind would be measured otherwise.
    require(cache.flush(timeout_s=FLUSH_TIMEOUT_S), "the store did not flush")
    tasks = [lambda size=size: _lookup(cache, handle, keys[:size]) for size in sizes]
    return {name: _percentiles(values) for name, values in interleave(tasks, plan).items()}


def _lookup(cache: CacheApi, handle: NamespaceHandle, keys: list[BlockKey]) -> Mapping[str, float]:
    begin = time.perf_counter()
    found = cache.lookup(handle.id, keys)
    took_s = time.perf_counter() - begin
    require(found.num_blocks == len(keys), f"{found.num_blocks} of {len(keys)} keys found")
    return {str(len(keys)): took_s * 1e3}


def _percentiles(values_ms: list[float]) -> Result:
    figures = {"p50_ms": percentile(values_ms, 50), "p99_ms": percentile(values_ms, 99)}
    return {**rounded(figures), "n": len(values_ms)}


def measure_index(folder: Path, options: StorageBenchOptions, progress: Progress) -> Result:
    """A daemon that opens a namespace of many blocks after a clean stop.

    The blocks' records are put through the index itself, their segments are sparse: what is
    measured reads no block. Times are the client's, from asking for the namespace to its handle.
    """
    progress(f"index: putting {options.index_blocks} records")
    chains = build_index(folder, options.index_blocks, options.index_budget_s)
    num_blocks, openings = sum(map(len, chains)), options.index_openings
    settings = {
        "memory.capacity_bytes": "64MiB",
        "nvme.capacity_bytes": str(_num_segments(options.index_blocks) * GIB),
        "nvme.segment_bytes": str(GIB),
        "nvme.index_map_bytes": str(INDEX_MAP_BYTES),
    }
    opened: list[Result] = []
    try:
        for number in range(openings):
            progress(f"index of {num_blocks} blocks: opening {number + 1} of {openings}")
            opened.append(_open_once(folder, settings, chains))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    middle = {name: statistics.median(row[name] for row in opened) for name in opened[0]}
    return {"blocks": num_blocks, **rounded(middle), "n": len(opened)}


def _open_once(folder: Path, settings: Mapping[str, str], chains: list[list[BlockKey]]) -> Result:
    spec = bench_spec(PAGE_LAYOUT, "index")
    begin = time.perf_counter()
    with bench_daemon(folder, settings) as daemon, daemon.connect() as cache:
        started_s = time.perf_counter() - begin
        before = private_memory(daemon.process.pid)
        begin = time.perf_counter()
        handle = cache.open_namespace(spec)
        open_s = time.perf_counter() - begin
        after = private_memory(daemon.process.pid)
        lookups = [
            _lookup(cache, handle, chains[number % len(chains)])
            for number in range(LOOKUPS_AT_SIZE)
        ]
    times_ms = [value for lookup in lookups for value in lookup.values()]
    return {
        "open_s": open_s,
        "private_mib": after.total_mib,
        "private_anonymous_mib": after.anonymous_mib,
        "private_before_mib": before.total_mib,
        "daemon_start_s": started_s,
        f"lookup_{len(chains[0])}_p50_ms": percentile(times_ms, 50),
        f"lookup_{len(chains[0])}_p99_ms": percentile(times_ms, 99),
    }


def _num_segments(num_blocks: int) -> int:
    slots = GIB // (HEADER_BYTES + PAGE_LAYOUT.block_bytes)
    return -(-num_blocks // slots)


def build_index(folder: Path, num_blocks: int, budget_s: float) -> list[list[BlockKey]]:
    """A namespace of up to `num_blocks` records in chains of 1,000, cleanly closed.

    Returns:
        The keys of its chains; fewer where opening so many would take longer than `budget_s`, by
        what opening the first of them takes.
    """
    config = _index_config(folder, num_blocks)
    namespace = bench_spec(PAGE_LAYOUT, "index").fingerprint()
    _open_tier_s(config, namespace)
    home = folder / "ns" / namespace.hex()
    for number in range(_num_segments(num_blocks)):
        with (home / "segments" / f"{number:04d}.seg").open("wb") as file:
            file.truncate(GIB)
    chains = _chains(num_blocks)
    _put_chains(home / "index", chains, range(PILOT_CHAINS))
    each_s = OPENING_SHARE * _open_tier_s(config, namespace) / PILOT_CHAINS
    chains = chains[: max(PILOT_CHAINS, int(budget_s / each_s))]
    _put_chains(home / "index", chains, range(PILOT_CHAINS, len(chains)))
    return chains


def _open_tier_s(config: NvmeConfig, namespace: NamespaceId) -> float:
    """How long the namespace's tier takes to open, here; it is closed cleanly."""
    store = NvmeStore(config)
    begin = time.perf_counter()
    store.open_namespace(namespace, PAGE_LAYOUT)
    took_s = time.perf_counter() - begin
    store.close()
    return took_s


def _put_chains(folder: Path, chains: list[list[BlockKey]], numbers: range) -> None:
    """Add chains to a closed index and close it again."""
    index = BlockIndex(folder, INDEX_MAP_BYTES)
    for start in numbers[::CHAINS_PER_COMMIT]:
        part = chains[start : min(start + CHAINS_PER_COMMIT, numbers.stop)]
        index.put(_records(part, start * CHAIN_BLOCKS))
    index.close(clean=True)


def _index_config(folder: Path, num_blocks: int) -> NvmeConfig:
    return NvmeConfig(
        path=folder,
        capacity_bytes=_num_segments(num_blocks) * GIB,
        segment_bytes=GIB,
        index_map_bytes=INDEX_MAP_BYTES,
    )


def _chains(num_blocks: int) -> list[list[BlockKey]]:
    raw = np.random.default_rng(num_blocks).bytes(num_blocks * KEY_BYTES)
    keys = [BlockKey(raw[at : at + KEY_BYTES]) for at in range(0, len(raw), KEY_BYTES)]
    return [keys[at : at + CHAIN_BLOCKS] for at in range(0, num_blocks, CHAIN_BLOCKS)]


def _records(chains: list[list[BlockKey]], first_slot: int) -> list[IndexRecord]:
    """Records of chains in neighbouring slots, by key: a B-tree takes sorted keys faster."""
    rows = [
        (key, parent)
        for chain in chains
        for key, parent in zip(chain, [ROOT_KEY, *chain[:-1]], strict=True)
    ]
    records = [
        IndexRecord(key, parent, SlotId(slot), FIRST_GENERATION + slot)
        for slot, (key, parent) in enumerate(rows, first_slot)
    ]
    return sorted(records, key=lambda record: record.key)
