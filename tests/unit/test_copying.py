"""Copying many blocks: whose threads, what is found wrong, what happens when something fails."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ucm import copying
from ucm.api import LoadedBlock
from ucm.checksum import block_checksums
from ucm.copying import BYTES_PER_THREAD, BlockCopier
from ucm.errors import InvalidArgumentError, LayoutMismatchError
from ucm.kernels.block_copy import BLOCK_COPY, BlockCopies, block_copy
from ucm.layout import KvDtype, KvLayout
from ucm.testing.tier_conformance import make_block
from ucm.types import BlockKey, LoadStatus, TierKind

LAYOUT = KvLayout(
    num_layers=3, num_kv_heads=2, head_dim=64, block_tokens=1001, dtype=KvDtype.FLOAT32
)
"""Blocks of 3 MB, slabs with padding: every one is worth a thread."""
NUM_BLOCKS = 5
WAIT_S = 15.0


@pytest.fixture(scope="module")
def sources() -> list[memoryview]:
    return [make_block(number, LAYOUT) for number in range(NUM_BLOCKS)]


@pytest.fixture(params=BLOCK_COPY.names)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCM_KERNEL_BLOCK_COPY", request.param)


@pytest.fixture(params=[1, 2, 4])
def copier(request: pytest.FixtureRequest, implementation: None) -> Iterator[BlockCopier]:
    with BlockCopier(LAYOUT, request.param) as made:
        yield made


@pytest.fixture
def pair() -> Iterator[BlockCopier]:
    """With one helper."""
    with BlockCopier(LAYOUT, 2) as made:
        yield made


def buffers(count: int = NUM_BLOCKS) -> list[memoryview]:
    return [memoryview(bytearray(LAYOUT.block_bytes)) for _ in range(count)]


def ready(number: int, data: memoryview) -> LoadedBlock:
    key = BlockKey(bytes([number]) * 32)
    sums = block_checksums(LAYOUT, data)
    return LoadedBlock(key, LoadStatus.READY, TierKind.MEMORY, data, sums)


def test_the_layout_is_worth_helpers() -> None:
    assert LAYOUT.block_bytes > BYTES_PER_THREAD
    assert LAYOUT.slab_bytes < LAYOUT.slab_stride_bytes


def test_every_block_arrives_with_the_checksums_of_its_copy(
    copier: BlockCopier, sources: list[memoryview]
) -> None:
    targets = buffers()
    found = copier.copy_blocks(sources, targets)
    assert targets == sources
    assert found == [block_checksums(LAYOUT, block) for block in sources]


def test_what_is_wrong_or_missing_is_told_apart_from_the_rest(
    copier: BlockCopier, sources: list[memoryview]
) -> None:
    blocks = [ready(number, data) for number, data in enumerate(sources)]
    rotten = memoryview(bytearray(sources[1]))
    rotten[LAYOUT.slab_stride_bytes + 7] ^= 4
    blocks[1] = LoadedBlock(
        blocks[1].key, LoadStatus.READY, TierKind.MEMORY, rotten, blocks[1].checksums
    )
    blocks[3] = LoadedBlock(blocks[3].key, LoadStatus.MISS)
    targets = buffers()
    expected = [True, False, True, False, True]
    assert copier.copy_verified(blocks, targets) == expected
    assert copier.verify_in_place(blocks) == expected
    assert all(targets[number] == sources[number] for number in (0, 2, 4))


def test_a_block_that_is_not_ready_is_wrong_whatever_it_holds(
    copier: BlockCopier, sources: list[memoryview]
) -> None:
    blocks = [ready(0, sources[0]), ready(1, sources[1])._replace(status=LoadStatus.MISS)]
    assert copier.copy_verified(blocks, buffers(2)) == [True, False]


def test_lengths_are_checked(copier: BlockCopier, sources: list[memoryview]) -> None:
    with pytest.raises(ValueError, match="5 blocks do not go into 4"):
        copier.copy_blocks(sources, buffers(NUM_BLOCKS - 1))
    targets = buffers()
    targets[2] = targets[2][:-1]
    with pytest.raises(LayoutMismatchError):
        copier.copy_blocks(sources, targets)


def test_nothing_to_copy(copier: BlockCopier) -> None:
    assert copier.copy_verified([], []) == []


def test_many_small_blocks_are_shared_out_and_all_arrive(implementation: None) -> None:
    small = KvLayout(
        num_layers=2, num_kv_heads=2, head_dim=64, block_tokens=128, dtype=KvDtype.FLOAT32
    )
    count = 3 * BYTES_PER_THREAD // small.block_bytes + 1
    sources = [make_block(number, small) for number in range(count)]
    targets = [memoryview(bytearray(small.block_bytes)) for _ in sources]
    blocks = [
        LoadedBlock(
            BlockKey(number.to_bytes(32)),
            LoadStatus.READY,
            TierKind.MEMORY,
            data,
            block_checksums(small, data),
        )
        for number, data in enumerate(sources)
    ]
    missing = 7
    blocks[missing] = LoadedBlock(blocks[missing].key, LoadStatus.MISS)
    with BlockCopier(small, 3) as copier:
        right = copier.copy_verified(blocks, targets)
    assert [index for index, is_right in enumerate(right) if not is_right] == [missing]
    assert not any(targets.pop(missing))
    del sources[missing]
    assert targets == sources


def test_two_threads_copy_at_once(pair: BlockCopier) -> None:
    both = threading.Barrier(2, timeout=WAIT_S)

    def work(index: int) -> str:
        both.wait()
        return f"{index} on {threading.current_thread().name}"

    first, second = pair.each(work, 2)
    names = {found.partition(" on ")[2] for found in (first, second)}
    assert (first[0], second[0]) == ("0", "1")
    assert threading.current_thread().name in names
    assert any(name.startswith("ucm-copy") for name in names)


def test_a_little_work_stays_on_the_caller() -> None:
    small = KvLayout(
        num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=8, dtype=KvDtype.FLOAT32
    )
    with BlockCopier(small, 4) as copier:
        found = copier.each(lambda _: threading.get_ident(), 20)
    assert set(found) == {threading.get_ident()}


def test_after_an_error_nothing_begins_and_nothing_runs_on(pair: BlockCopier) -> None:
    helper_began, caller_failed = threading.Event(), threading.Event()
    ended: list[int] = []

    def work(index: int) -> None:
        if threading.current_thread() is threading.main_thread():
            assert helper_began.wait(WAIT_S)
            caller_failed.set()
            raise OSError(f"no copy of {index}")
        helper_began.set()
        assert caller_failed.wait(WAIT_S)
        ended.append(index)

    with pytest.raises(OSError, match="no copy of"):
        pair.each(work, 50)
    assert len(ended) == 1, "the helper's call was waited for, and it began no other"
    assert pair.each(lambda index: index, 3) == [0, 1, 2]


def test_a_helpers_error_reaches_the_caller(pair: BlockCopier) -> None:
    helper_failed = threading.Event()

    def work(_index: int) -> None:
        if threading.current_thread() is threading.main_thread():
            assert helper_failed.wait(WAIT_S)
            return
        helper_failed.set()
        raise OSError("of the helper's")

    with pytest.raises(OSError, match="of the helper's"):
        pair.each(work, 50)


def test_a_batch_does_not_wait_for_helpers_of_another(pair: BlockCopier) -> None:
    began, release = threading.Barrier(3, timeout=WAIT_S), threading.Event()

    def hold(_index: int) -> None:
        began.wait()
        assert release.wait(WAIT_S)

    other = threading.Thread(target=pair.each, args=(hold, 2))
    other.start()
    began.wait()  # the other caller and the only helper are busy now
    assert pair.each(lambda index: index, 4) == [0, 1, 2, 3]
    release.set()
    other.join(WAIT_S)
    assert not other.is_alive()


def test_work_that_was_queued_for_no_thread_is_waited_for_or_not_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pool may queue a piece of work before it finds that it cannot start a thread for it."""
    start = threading.Thread.start
    began, release, returned = threading.Barrier(3), threading.Event(), threading.Event()
    late: list[int] = []
    allowed = iter(["the first helper"])

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("ucm-copy") and next(allowed, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    def hold(_index: int) -> None:
        began.wait(WAIT_S)
        assert release.wait(WAIT_S)

    def work(index: int) -> int:
        if threading.current_thread() is threading.main_thread():
            release.set()  # the helper comes to what is queued
            time.sleep(0.1)
        else:
            time.sleep(0.3)
            late.extend([index] * returned.is_set())
        return index

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with BlockCopier(LAYOUT, 3) as copier:
        both = threading.Barrier(2, timeout=WAIT_S)
        copier.each(lambda _: both.wait(), 2)  # one helper, of two that there may be
        other = threading.Thread(target=copier.each, args=(hold, 2))
        other.start()
        began.wait(WAIT_S)
        assert copier.each(work, 6) == list(range(6))
        returned.set()
        time.sleep(0.4)
        other.join(WAIT_S)
    assert late == []


def test_an_interrupt_while_helpers_are_called_leaves_them_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start
    began: list[int] = []

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("ucm-copy"):
            time.sleep(0.1)
            raise KeyboardInterrupt

    def work(index: int) -> None:
        began.append(index)
        time.sleep(0.05)

    with BlockCopier(LAYOUT, 3) as copier:
        monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            copier.each(work, 50)
        count = len(began)
        time.sleep(0.3)
        assert len(began) == count <= 2


def test_helpers_end_with_the_last_reference() -> None:
    before = set(threading.enumerate())
    copier = BlockCopier(LAYOUT, 2)
    both = threading.Barrier(2, timeout=WAIT_S)
    copier.each(lambda _: both.wait(), 2)
    (helper,) = set(threading.enumerate()) - before
    del copier
    gc.collect()
    helper.join(WAIT_S)
    assert not helper.is_alive()


def test_interrupts_leave_nothing_locked() -> None:
    """Whenever they come: later batches are copied, and the threads end."""
    script = """if True:
        import random, signal, threading, time
        from ucm.copying import BYTES_PER_THREAD, BlockCopier
        from ucm.layout import KvDtype, KvLayout
        layout = KvLayout(
            num_layers=16, num_kv_heads=1, head_dim=64, block_tokens=125, dtype=KvDtype.FLOAT32
        )
        def interrupt(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        count = 16
        assert count * layout.block_bytes > 2 * BYTES_PER_THREAD
        source = memoryview(bytes(layout.block_bytes))
        targets = [memoryview(bytearray(layout.block_bytes)) for _ in range(count)]
        copier, num_interrupts = BlockCopier(layout, 2), 0
        rng = random.Random(2)
        for _ in range(2000):
            time.sleep(1e-3)
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-4, 3e-3))
                try:
                    copier.copy_blocks([source] * count, targets)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                num_interrupts += 1
        copier.copy_blocks([source] * count, targets)
        helpers = [each for each in threading.enumerate() if each.name.startswith("ucm-copy")]
        copier.close()
        for helper in helpers:
            helper.join(5)
        assert num_interrupts > 100 and not any(helper.is_alive() for helper in helpers)
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_closed_it_copies_alone_and_leaves_no_thread(sources: list[memoryview]) -> None:
    before = set(threading.enumerate())
    copier = BlockCopier(LAYOUT, 4)
    copier.copy_blocks(sources, buffers())
    helpers = set(threading.enumerate()) - before
    assert 0 < len(helpers) <= 3
    copier.close()
    copier.close()
    for helper in helpers:
        helper.join(WAIT_S)
        assert not helper.is_alive()
    assert set(copier.each(lambda _: threading.get_ident(), 8)) == {threading.get_ident()}
    targets = buffers()
    copier.copy_blocks(sources, targets)
    assert targets == sources


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_copies_with_threads_of_its_own(
    pair: BlockCopier, sources: list[memoryview]
) -> None:
    pair.copy_blocks(sources, buffers())
    child = os.fork()
    if child == 0:
        both = threading.Barrier(2, timeout=WAIT_S)
        targets = buffers()
        try:
            pair.each(lambda _: both.wait(), 2)
            pair.copy_blocks(sources, targets)
        finally:
            os._exit(0 if targets == sources else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("is_large", [False, True])
def test_a_batch_that_no_cache_holds_goes_round_it(
    is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "AROUND_BYTES", NUM_BLOCKS * LAYOUT.block_bytes + (not is_large))
    seen: list[bool] = []

    def copies(*args: Any) -> BlockCopies:
        seen.append(args[-1])
        return block_copy(LAYOUT)(*args)

    monkeypatch.setattr(copying, "block_copy", lambda _: copies)
    BlockCopier(LAYOUT).copy_blocks(buffers(), buffers())
    assert seen == [is_large]


def test_the_default_is_bounded() -> None:
    assert 1 <= BlockCopier(LAYOUT).num_threads <= min(4, len(os.sched_getaffinity(0)))
    with pytest.raises(InvalidArgumentError):
        BlockCopier(LAYOUT, 0)
