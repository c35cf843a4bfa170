"""Copies of blocks: every implementation writes the same bytes and answers for what it wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import mmap
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucm.checksum import block_checksums, checksum
from ucm.errors import ConfigError, LayoutMismatchError
from ucm.kernels import fused_copy
from ucm.kernels.block_copy import BLOCK_COPY, BlockCopies, block_copy
from ucm.kernels.fused_copy import FusedCopyUnavailableError, SlabPairs
from ucm.layout import KvDtype, KvLayout
from ucm.testing.tier_conformance import make_block

EDGE = 64
"""Bytes around a target that nobody may touch."""
RACE_ROUNDS = 300


def layout_of(num_layers: int, tokens: int) -> KvLayout:
    """Slabs of 64 bytes a token."""
    return KvLayout(
        num_layers=num_layers,
        num_kv_heads=1,
        head_dim=8,
        block_tokens=tokens,
        dtype=KvDtype.FLOAT32,
    )


LAYOUTS = [layout_of(1, 4), layout_of(3, 24), layout_of(2, 17), layout_of(4, 64), layout_of(2, 800)]
"""Less than a KiB, with padding, a stripe over a KiB, no padding, many KiB."""
TOO_SHORT = layout_of(2, 3)


def sums_of(copies: BlockCopies) -> list[tuple[int, ...]]:
    """Make them, on this thread."""
    copies.work_off()
    return [tuple(sums) for sums in copies.sums().tolist()]


@pytest.fixture(params=BLOCK_COPY.names)
def implementation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.slab_bytes} bytes")
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 32])
def test_the_copy_is_whole_and_nothing_else_is_written(
    implementation: str, layout: KvLayout, around: bool, shift: int
) -> None:
    source = make_block("source", layout)
    memory = np.zeros(layout.block_bytes + 3 * EDGE, np.uint8)
    start = -memory.ctypes.data % EDGE + EDGE + shift
    into = memory[start : start + layout.block_bytes]
    copy = block_copy(layout, override=implementation)
    assert sums_of(copy(layout, [source], [into.data], around)) == [block_checksums(layout, source)]
    assert into.data == source
    assert not memory[:start].any()
    assert not memory[start + layout.block_bytes :].any()


def test_several_blocks_are_copied_each_to_its_target(implementation: str) -> None:
    layout = LAYOUTS[1]
    sources = [make_block(number, layout) for number in range(5)]
    targets = [memoryview(bytearray(layout.block_bytes)) for _ in sources]
    copy = block_copy(layout, override=implementation)
    copies = copy(layout, sources, targets, False)
    assert sums_of(copies) == [block_checksums(layout, source) for source in sources]
    assert targets == sources
    assert sums_of(copy(layout, [], [], False)) == []


def test_threads_share_the_slabs_out_and_stop_when_they_are_told_to() -> None:
    num_slabs, size = 4000, 4096
    source = np.random.default_rng(0).integers(0, 256, num_slabs * size, np.uint8)
    target = np.zeros_like(source)
    starts = np.arange(num_slabs, dtype=np.uint64) * np.uint64(size)
    slabs = SlabPairs(
        starts + np.uint64(target.ctypes.data), starts + np.uint64(source.ctypes.data), size, 0
    )
    copy = fused_copy.fused_copy().share(slabs, group=3, around=False)
    threads = [threading.Thread(target=copy.work_off) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(target, source)
    assert copy.sums.tolist() == [checksum(slab.data) for slab in source.reshape(num_slabs, size)]
    target[:] = 0
    stopped = fused_copy.fused_copy().share(slabs, group=3, around=False)
    stopped.stop()
    stopped.work_off()
    assert not target.any()


@given(
    data=st.binary(min_size=4 * 64, max_size=40 * 64).map(lambda data: data[: len(data) // 64 * 64])
)
def test_the_fused_checksum_is_the_librarys(data: bytes) -> None:
    source, target = np.frombuffer(data, np.uint8), np.empty(len(data), np.uint8)
    slabs = SlabPairs(
        np.array([target.ctypes.data], np.uint64),
        np.array([source.ctypes.data], np.uint64),
        len(data),
        0,
    )
    copy = fused_copy.fused_copy().share(slabs, group=1, around=False)
    copy.work_off()
    assert copy.sums.tolist() == [checksum(data)]
    assert target.tobytes() == data


@pytest.mark.parametrize("around", [False, True])
def test_a_source_that_is_written_meanwhile_cannot_pass_off_other_bytes(
    implementation: str, around: bool
) -> None:
    layout = layout_of(2, 4096)
    words = np.zeros(layout.block_bytes // 8, np.uint64)
    into = memoryview(bytearray(layout.block_bytes))
    copy = block_copy(layout, override=implementation)
    with _scribbling(words):
        for _ in range(RACE_ROUNDS):
            found = copy(layout, [words.view(np.uint8).data], [into], around)
            assert sums_of(found) == [block_checksums(layout, into)]


@contextlib.contextmanager
def _scribbling(words: NDArray[np.uint64]) -> Iterator[None]:
    """Another thread writes to an array."""
    is_over = threading.Event()

    def write() -> None:
        while not is_over.is_set():
            words[:] += np.uint64(1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_buffers_of_other_lengths_are_refused(implementation: str) -> None:
    layout = LAYOUTS[1]
    copy = block_copy(layout, override=implementation)
    right, short = (memoryview(bytearray(layout.block_bytes - cut)) for cut in (0, 1))
    for source, into in ((right, short), (short, right)):
        with pytest.raises(LayoutMismatchError):
            copy(layout, [source], [into], False).work_off()


@pytest.mark.parametrize(("num_sources", "num_targets"), [(1, 2), (2, 1), (0, 1)])
def test_as_many_targets_as_sources(
    implementation: str, num_sources: int, num_targets: int
) -> None:
    layout = LAYOUTS[1]
    sources, targets = (
        [memoryview(bytearray(layout.block_bytes)) for _ in range(count)]
        for count in (num_sources, num_targets)
    )
    with pytest.raises(ValueError, match="do not go into"):
        block_copy(layout, override=implementation)(layout, sources, targets, False)


def test_a_read_only_target_is_refused(implementation: str) -> None:
    layout = LAYOUTS[1]
    target = memoryview(bytes(layout.block_bytes))
    copy = block_copy(layout, override=implementation)
    with pytest.raises(ValueError, match="read-only"):
        copy(layout, [make_block(1, layout)], [target], False).work_off()


def test_what_the_code_does_not_take_is_copied_in_pieces() -> None:
    with pytest.raises(ConfigError, match="multiples of 64"):
        block_copy(TOO_SHORT, override="fused")
    source, into = make_block(1, TOO_SHORT), memoryview(bytearray(TOO_SHORT.block_bytes))
    copies = block_copy(TOO_SHORT)(TOO_SHORT, [source], [into], True)
    assert sums_of(copies) == [block_checksums(TOO_SHORT, into)]
    assert into == source


@pytest.fixture
def without_llvm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def compiled(_llvm: object, _source: str) -> None:
        raise RuntimeError("no executable memory")

    monkeypatch.setattr(fused_copy, "_compiled", compiled)
    fused_copy.fused_copy.cache_clear()
    yield
    fused_copy.fused_copy.cache_clear()


@pytest.mark.usefixtures("without_llvm")
def test_where_no_code_can_be_made_blocks_are_copied_in_pieces() -> None:
    layout = LAYOUTS[1]
    with pytest.raises(FusedCopyUnavailableError, match="no executable memory"):
        fused_copy.fused_copy()
    source, into = make_block(1, layout), memoryview(bytearray(layout.block_bytes))
    copies = block_copy(layout)(layout, [source], [into], True)
    assert sums_of(copies) == [block_checksums(layout, source)]
    with pytest.raises(ConfigError, match="no executable memory"):
        block_copy(layout, override="fused")


def test_another_version_of_the_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("llvmlite.binding.create_mcjit_compiler")
    fused_copy.fused_copy.cache_clear()
    with pytest.raises(FusedCopyUnavailableError, match="create_mcjit_compiler"):
        fused_copy.fused_copy()


def run_script(script: str) -> str:
    """What a process of its own prints; it must end well within half a minute."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_without_address_space_nothing_is_built() -> None:
    """LLVM would end the process."""
    assert "Cannot allocate memory" in run_script("""if True:
        import resource
        from pathlib import Path
        import llvmlite.binding
        from ucm.kernels import fused_copy
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 20), resource.RLIM_INFINITY))
        try:
            fused_copy.fused_copy()
        except fused_copy.FusedCopyUnavailableError as error:
            print(error)
    """)


def test_who_forks_while_code_is_built_leaves_no_lock_to_the_child() -> None:
    """LLVM's binding has one, which its builder holds nearly all the time."""
    run_script("""if True:
        import os, signal, threading, time
        from ucm.kernels import fused_copy
        for step in range(6):
            fused_copy.fused_copy.cache_clear()
            builder = threading.Thread(target=fused_copy.fused_copy)
            builder.start()
            time.sleep(0.01 + 0.015 * step)
            child = os.fork()
            if child == 0:
                signal.alarm(5)
                fused_copy.fused_copy()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            builder.join()
    """)


def test_a_process_that_may_have_no_executable_memory_copies_in_pieces() -> None:
    """As under systemd's MemoryDenyWriteExecute: LLVM says nothing, its code would be a fault."""
    script = """if True:
        import ctypes, sys
        if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, Linux 6.3
            sys.exit(77)
        from ucm.checksum import block_checksums
        from ucm.kernels.block_copy import BLOCK_COPY, block_copy
        from ucm.testing.tier_conformance import LAYOUT, make_block
        source, into = make_block(1), memoryview(bytearray(LAYOUT.block_bytes))
        copies = block_copy(LAYOUT)(LAYOUT, [source], [into], True)
        copies.work_off()
        assert tuple(copies.sums()[0].tolist()) == block_checksums(LAYOUT, source)
        try:
            block_copy(LAYOUT, override="fused")
        except Exception as error:
            print(error)
    """
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the kernel is older than Linux 6.3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no executable memory" in done.stdout


@pytest.mark.parametrize(("around", "shift", "goes_round"), [(1, 0, 1), (0, 0, 0), (1, 1, 0)])
def test_only_aligned_targets_are_written_round_the_cache(
    around: bool, shift: int, goes_round: bool
) -> None:
    made = dataclasses.replace(fused_copy.fused_copy(), _through="through", _around="around")
    slabs = SlabPairs(np.array([4096, 8192 + shift], np.uint64), np.zeros(2, np.uint64), 4096, 0)
    chosen = made.share(slabs, group=1, around=bool(around))._code
    assert chosen == ("around" if goes_round else "through")
    through, round_it = str(fused_copy._build_module()).split("define")[1:]
    assert ("!nontemporal" in through, "!nontemporal" in round_it) == (False, True)


def test_code_that_copies_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_copy, "PRIME64_1", 1)
    fused_copy.fused_copy.cache_clear()
    with pytest.raises(FusedCopyUnavailableError, match="wrongly"):
        fused_copy.fused_copy()


def test_a_thread_that_nobody_waits_for_keeps_what_it_copies(implementation: str) -> None:
    layout = layout_of(3, 24)
    source, target = (np.ones(layout.block_bytes, np.uint8) for _ in range(2))
    kept = [weakref.ref(source), weakref.ref(target)]
    run = block_copy(layout, override=implementation)
    work_off = run(layout, [source.data], [target.data], True).work_off
    del source, target
    gc.collect()
    assert all(each() is not None for each in kept)
    work_off()


def test_what_a_fused_copy_works_on_cannot_be_taken_away() -> None:
    """Neither by emptying the caller's lists nor by releasing its views: machine code sees none."""
    layout = layout_of(3, 24)
    memory = mmap.mmap(-1, layout.block_bytes)
    sources, targets = [memoryview(bytes(layout.block_bytes))], [memoryview(memory)]
    copies = block_copy(layout, override="fused")(layout, sources, targets, True)
    targets[0].release()
    sources.clear()
    targets.clear()
    with pytest.raises(BufferError):
        memory.close()
    copies.work_off()
    assert sums_of(copies) == [block_checksums(layout, memoryview(bytes(layout.block_bytes)))]


def test_a_copy_keeps_its_code_when_other_code_takes_its_place() -> None:
    class Engine:
        pass

    owner = Engine()
    kept = weakref.ref(owner)
    made = dataclasses.replace(fused_copy.fused_copy(), _engine=owner)
    source, target = np.ones(4096, np.uint8), np.zeros(4096, np.uint8)
    into, origin = (np.array([each.ctypes.data], np.uint64) for each in (target, source))
    work_off = made.share(SlabPairs(into, origin, 4096, 0), group=1, around=False).work_off
    del made, owner
    gc.collect()
    assert kept() is not None
    work_off()
    assert np.array_equal(target, source)
