"""The pure parts of the storage benchmark: rounds, medians, fio's JSON, /proc, what is compared."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ucm.bench.storage_ceilings import (
    Scout,
    Setting,
    Target,
    ThreadCeiling,
    Trial,
    best_trials,
    fio_jobs,
    parse_fio,
)
from ucm.bench.storage_concurrent import Turn, compare_turns, spread
from ucm.bench.storage_daemon import parse_smaps
from ucm.bench.storage_dram import runs_in_arena
from ucm.bench.storage_manifest import cpu_model, parse_mounts
from ucm.bench.storage_measure import (
    SLAB_LAYOUTS,
    Plan,
    StorageBenchOptions,
    interleave,
    jain_fairness,
    medians,
    percentile,
    rounds,
)
from ucm.bench.storage_payload import Audit, BlockBuffer, Payload, bench_chain, bench_spec, require
from ucm.errors import CorruptionError

LAYOUT = SLAB_LAYOUTS["64KiB"]
NAMESPACE = bench_spec(LAYOUT).fingerprint()


def fio_json(*jobs: tuple[str, int, int]) -> str:
    """fio's answer for (job name, bytes a second, error)."""
    sides = {"io_bytes": 0, "bw_bytes": 0}
    rows = []
    for name, rate, error in jobs:
        op = name.partition(":")[0]
        row = {"jobname": name, "error": error, "read": sides, "write": sides}
        rows.append({**row, op: {"io_bytes": 4096, "bw_bytes": rate}})
    return json.dumps({"fio version": "fio-3.33", "jobs": rows})


def test_parse_fio_reads_each_direction_behind_warnings() -> None:
    text = "fio: some warning\n" + fio_json(
        ("read:libaio-32-64KiB", 1_500_000_000, 0), ("write:psync-8-64KiB", 250_000_000, 0)
    )
    assert parse_fio(text) == {"read:libaio-32-64KiB": 1.5, "write:psync-8-64KiB": 0.25}


def test_parse_fio_leaves_out_what_failed() -> None:
    assert parse_fio(fio_json(("read:io_uring-8-64KiB", 9, 38), ("read:psync-4-64KiB", 0, 0))) == {}
    assert parse_fio("fio: engine libaio not loadable") == {}
    assert parse_fio("{ not json") == {}


def test_fio_jobs_share_the_bytes_and_sync_writes(tmp_path: Path) -> None:
    target = Target(tmp_path / "a:b.seg", tmp_path / "w.bin", 64 << 20)
    trials = [
        Trial("read", Setting("psync", 8, 65536)),
        Trial("write", Setting("io_uring", 32, 1 << 20)),
    ]
    head, read, write = fio_jobs(target, trials, direct=True).split("\n\n")
    assert "direct=1" in head
    assert "a\\:b.seg" in read
    assert {"numjobs=8", f"size={8 << 20}", f"offset_increment={8 << 20}"} <= set(read.split("\n"))
    assert "end_fsync=1" not in read
    assert {"end_fsync=1", "iodepth=32", f"size={64 << 20}", "bs=1048576"} <= set(write.split("\n"))


def test_best_trials_keeps_the_fastest_of_each_direction() -> None:
    settings = [Setting("psync", 4, 4096), Setting("libaio", 8, 4096), Setting("none", 1, 4096)]
    trials = [Trial(op, setting) for op in ("read", "write") for setting in settings]
    found = {
        "read:psync-4-4KiB": 2.0,
        "read:libaio-8-4KiB": 1.0,
        "write:psync-4-4KiB": 1.0,
        "write:libaio-8-4KiB": 2.0,
    }
    names = [trial.name for trial in best_trials(found, trials, 1)]
    assert names == ["read:psync-4-4KiB", "write:libaio-8-4KiB"]
    assert len(best_trials(found, trials, 3)) == 4


class FakeCeiling:
    """Deeper is faster to read, shallower to write."""

    tool = "fake"

    def __init__(self) -> None:
        self.calls = 0

    def engines(self) -> Mapping[str, tuple[int, ...]]:
        return {"a": (1, 2, 3), "b": (4, 5, 6)}

    def measure(self, target: Target, trials: Sequence[Trial]) -> dict[str, float]:
        self.calls += 1
        sign = {"read": 1, "write": -1}
        return {t.name: 10.0 + sign[t.op] * t.setting.depth for t in trials}


def test_a_quick_scout_looks_once_and_asks_for_slabs(tmp_path: Path) -> None:
    ceiling, target = FakeCeiling(), Target(tmp_path, tmp_path, 1 << 20)
    scout = Scout(ceiling, 1, thorough=False)
    assert scout.find(target, 65536, 1 << 20) == [
        Trial("read", Setting("b", 5, 65536)),
        Trial("write", Setting("a", 2, 65536)),
    ]
    assert scout.find(target, 1 << 18, 1 << 20)[0].setting == Setting("b", 5, 1 << 18)
    assert ceiling.calls == 1


def test_a_thorough_scout_tries_every_depth_and_both_sizes(tmp_path: Path) -> None:
    ceiling, target = FakeCeiling(), Target(tmp_path, tmp_path, 1 << 20)
    scout = Scout(ceiling, 2, thorough=True)
    chosen = scout.find(target, 65536, 1 << 20)
    assert {trial.setting.depth for trial in chosen if trial.op == "read"} == {6}
    assert {trial.setting.request_bytes for trial in chosen} == {65536, 1 << 20}
    scout.find(target, 65536, 1 << 20)
    assert ceiling.calls == 2


def test_threads_of_our_own_measure_where_fio_is_missing(tmp_path: Path) -> None:
    target = Target(tmp_path / "r", tmp_path / "w", 1 << 20)
    target.read_path.write_bytes(bytes(1 << 20))
    ceiling = ThreadCeiling()
    trials = [Trial(op, Setting(ceiling.tool, 4, 65536)) for op in ("read", "write")]
    assert all(rate > 0 for rate in ceiling.measure(target, trials).values())
    assert target.write_path.stat().st_size == 1 << 20


def test_interleave_turns_the_order_and_drops_the_warm_up() -> None:
    order: list[str] = []

    def task(name: str) -> dict[str, float]:
        order.append(name)
        return {name: float(len(order))}

    samples = interleave([lambda: task("a"), lambda: task("b")], Plan(repeats=3, budget_s=60))
    assert "".join(order) == "abbaabba"
    assert samples == {"a": [4.0, 5.0, 8.0], "b": [3.0, 6.0, 7.0]}
    assert medians(samples) == {"a": 5.0, "b": 6.0}


def test_a_phase_behind_its_budget_stops_after_one_round_that_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    assert list(rounds(Plan(repeats=9, budget_s=1).within(5))) == [0, 1]


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (
        50,
        99,
        100,
    )
    assert percentile([7.0], 99) == 7.0


def test_jain_fairness() -> None:
    assert jain_fairness([3, 3, 3]) == 1.0
    assert jain_fairness([5, 0, 0, 0]) == 0.25


def test_spread_is_even_and_respects_room() -> None:
    assert spread(4, [8, 8]) == [2, 2]
    assert spread(1, [4, 4]) == [1, 0]
    assert spread(5, [1, 4]) == [1, 4]


def test_compare_turns_puts_both_kinds_side_by_side() -> None:
    quiet = [Turn([[1.0, 1.0], [2.0]], 0), Turn([[1.0], [2.0, 2.0]], 0)]
    busy = [Turn([[2.0], [2.0]], 1 << 30), Turn([[2.0], [3.0]], 1 << 30)]
    found = compare_turns(quiet, busy, 2.0)
    assert found["n"] == 6
    assert found["jain"] == 1.0
    assert found["slowdown_by_stores"] == 1.0
    assert found["with_stores"]["p50_ms"] == 2.0
    assert found["store_gb_s"] == pytest.approx((1 << 30) / 1e9, abs=1e-3)


def test_private_memory_leaves_arenas_out() -> None:
    text = (
        "7f00-7f01 rw-s 00000000 00:01 1 /memfd:ucm-read_only (deleted)\n"
        "Private_Dirty:    999999 kB\nAnonymous: 0 kB\nVmFlags: rd wr\n"
        "7f02-7f03 rw-p 00000000 00:00 0 \n"
        "Private_Clean:    1024 kB\nPrivate_Dirty:    2048 kB\nAnonymous:    2048 kB\n"
        "7f04-7f05 r--s 00000000 08:01 7 /x/data.mdb\nPrivate_Clean:    1024 kB\nAnonymous: 0 kB\n"
    )
    found = parse_smaps(text)
    assert (found.total_mib, found.anonymous_mib) == (4.0, 2.0)


def test_the_innermost_mount_counts() -> None:
    table = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n"
        "30 22 0:5 / /mnt/with\\040space rw - xfs /dev/nvme0n1 rw,noquota\n"
        "31 22 0:6 / /mnt rw - tmpfs tmpfs rw\n"
    )
    assert parse_mounts(table, Path("/mnt/with space/x")).kind == "xfs"
    assert parse_mounts(table, Path("/mnt/other")).kind == "tmpfs"
    assert parse_mounts(table, Path("/home")).options == "rw,relatime,rw,discard"


def test_cpu_model() -> None:
    assert cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n") == "Some CPU @ 2 GHz"
    assert cpu_model("")


def test_the_audit_finds_planted_wrong_bytes() -> None:
    payload, audit = Payload(LAYOUT), Audit()
    keys = bench_chain(NAMESPACE, LAYOUT, 2)
    buffer = BlockBuffer(LAYOUT, 2)
    for key, block in zip(keys, buffer.blocks, strict=True):
        payload.fill(key, block)
    audit.check(payload, keys, buffer.blocks)
    assert (audit.wrong_bytes, audit.checked_bytes) == (0, buffer.nbytes)
    buffer.blocks[1][12345] ^= 1
    buffer.blocks[1][-1] ^= 0x80
    audit.check(payload, keys, buffer.blocks)
    assert audit.wrong_bytes == 2


def test_another_block_slab_or_page_is_wrong_almost_everywhere() -> None:
    payload = Payload(LAYOUT)
    one, other = bench_chain(NAMESPACE, LAYOUT, 2)
    block = BlockBuffer(LAYOUT, 1).blocks[0]
    payload.fill(other, block)
    assert payload.wrong_bytes(one, block) > 0.9 * block.nbytes
    payload.fill(one, block)
    slab = bytes(block[: LAYOUT.slab_bytes])
    block[LAYOUT.slab_bytes : 2 * LAYOUT.slab_bytes] = slab
    assert payload.wrong_bytes(one, block) > 0.9 * LAYOUT.slab_bytes
    payload.fill(one, block)
    block[4096:8192] = bytes(block[:4096])
    assert payload.wrong_bytes(one, block) > 0.9 * 4096


def test_a_wiped_buffer_is_no_block() -> None:
    payload, buffer = Payload(LAYOUT), BlockBuffer(LAYOUT, 1)
    key = bench_chain(NAMESPACE, LAYOUT, 1)[0]
    payload.fill(key, buffer.blocks[0])
    buffer.wipe()
    assert payload.wrong_bytes(key, buffer.blocks[0]) > 0.9 * buffer.nbytes


def test_the_payload_does_not_compress() -> None:
    payload, buffer = Payload(LAYOUT), BlockBuffer(LAYOUT, 2)
    for key, block in zip(bench_chain(NAMESPACE, LAYOUT, 2), buffer.blocks, strict=True):
        payload.fill(key, block)
    assert len(zlib.compress(buffer.memory, 1)) > 0.99 * buffer.nbytes


def test_layouts_have_the_slabs_that_their_names_say() -> None:
    sizes = {name: layout.slab_bytes for name, layout in SLAB_LAYOUTS.items()}
    assert sizes == {"64KiB": 1 << 16, "256KiB": 1 << 18, "1MiB": 1 << 20, "4MiB": 1 << 22}


def test_quick_measures_the_same_things() -> None:
    full, quick = StorageBenchOptions(), StorageBenchOptions().quick()
    assert (quick.slabs, quick.clients, quick.lookup_keys) == (
        full.slabs,
        full.clients,
        full.lookup_keys,
    )
    assert quick.index_blocks == 200_000
    assert quick.size_bytes < full.size_bytes
    assert full.nvme.repeats >= 5


def test_require_stops_the_run() -> None:
    require(True, "all is well")
    with pytest.raises(CorruptionError, match="lost a block"):
        require(False, "it lost a block")


@pytest.mark.parametrize(
    ("slots", "lengths"),
    [([0, 1, 2], [3]), ([1, 2, 5, 6, 4], [2, 2, 1]), ([3, 2, 1], [1, 1, 1]), ([2], [1])],
)
def test_neighbours_in_the_arena_are_copied_in_one_call(
    slots: list[int], lengths: list[int]
) -> None:
    arena = memoryview(bytes(range(7 * 16)))
    runs = list(runs_in_arena([arena[slot * 16 : slot * 16 + 16] for slot in slots]))
    assert [len(run) // 16 for run in runs] == lengths
    expected = b"".join(bytes(arena[slot * 16 : slot * 16 + 16]) for slot in slots)
    assert b"".join(run.tobytes() for run in runs) == expected
