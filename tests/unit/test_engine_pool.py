"""The KV pool: roles of blocks, prefix sharing, copy-on-write, pins."""

from __future__ import annotations

import mmap
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from ucm.engine.allocator import BlockAllocator, ChainLink, pick_runs
from ucm.engine.pool import KvPool
from ucm.errors import CapacityError, InvalidArgumentError
from ucm.layout import KvDtype, KvLayout
from ucm.types import ROOT_KEY, BlockKey

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=4, block_tokens=4, dtype=KvDtype.FLOAT32)


def link(name: str, parent: str = "", tokens: tuple[int, ...] = (1, 2, 3, 4)) -> ChainLink:
    parent_key = BlockKey(parent.encode().ljust(32)) if parent else ROOT_KEY
    return ChainLink(BlockKey(name.encode().ljust(32)), parent_key, tokens)


def test_allocate_prefers_one_ascending_run() -> None:
    blocks = BlockAllocator(16)
    first = blocks.allocate(5)
    assert first == list(range(5))
    second = blocks.allocate(4, growth=2)
    assert [b - a for a, b in pairwise(second)] == [1, 1, 1]
    assert second[0] == 7, "room for the first owner to grow"
    assert blocks.allocate(2, after=first[-1]) == [5, 6]


def test_allocate_takes_the_longest_runs_when_none_is_long_enough() -> None:
    mask = np.array([1, 1, 0, 1, 1, 1, 0, 1, 0, 1], dtype=np.bool_)
    assert pick_runs(mask, 5, after=None, growth=0) == [3, 4, 5, 0, 1]
    assert pick_runs(mask, 2, after=None, growth=0) == [0, 1]
    assert pick_runs(mask, 3, after=8, growth=0) == [9, 0, 1]
    assert pick_runs(mask, 7, after=2, growth=5) == [3, 4, 5, 0, 1, 7, 9]


def test_allocate_more_than_there_is_changes_nothing() -> None:
    blocks = BlockAllocator(4)
    blocks.allocate(3)
    with pytest.raises(CapacityError, match="2 blocks wanted, 1 of 4"):
        blocks.allocate(2)
    assert blocks.num_available == 1
    assert blocks.check_integrity([[0, 1, 2]]) == []


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least 1 block"):
        BlockAllocator(0)


def test_a_released_chain_is_found_again_and_reused_leaf_first() -> None:
    blocks = BlockAllocator(4)
    chain = [link("a"), link("b", "a"), link("c", "b")]
    owned = blocks.allocate(3)
    for block_id, item in zip(owned, chain, strict=True):
        assert blocks.register(block_id, item)
    blocks.release(owned)
    assert blocks.num_available == 4
    assert blocks.find(chain) == owned
    blocks.allocate(2)
    assert blocks.find(chain) == owned[:2], "the leaf went, its ancestors stayed"
    blocks.allocate(1)
    assert blocks.find(chain) == owned[:1]


def test_a_block_lives_from_one_allocation_to_the_next() -> None:
    blocks = BlockAllocator(3)
    (block_id,) = blocks.allocate(1)
    life = blocks.life(block_id)
    blocks.acquire([block_id])
    blocks.release([block_id])
    assert blocks.life(block_id) == life
    blocks.release([block_id])
    while block_id not in (taken := blocks.allocate(1)):
        blocks.release(taken)
    assert blocks.life(block_id) > life


def test_least_recently_used_goes_first() -> None:
    blocks = BlockAllocator(2)
    old, new = blocks.allocate(2)
    blocks.register(old, link("old"))
    blocks.register(new, link("new"))
    blocks.release([old])
    blocks.release([new])
    blocks.acquire([old])
    blocks.release([old])
    blocks.allocate(1)
    assert blocks.find([link("new")]) == []
    assert blocks.find([link("old")]) == [old]


@pytest.mark.parametrize(
    "other",
    [
        link("a", tokens=(1, 2, 3, 5)),
        link("a", parent="z"),
        link("b"),
    ],
)
def test_neither_hash_nor_tokens_alone_share_a_block(other: ChainLink) -> None:
    blocks = BlockAllocator(2)
    (owned,) = blocks.allocate(1)
    blocks.register(owned, link("a"))
    assert blocks.find([other]) == []
    assert blocks.find([link("a")]) == [owned]


def test_a_chain_is_registered_once() -> None:
    blocks = BlockAllocator(3)
    first, second, third = blocks.allocate(3)
    assert blocks.register(first, link("a"))
    assert not blocks.register(second, link("a"))
    assert not blocks.register(first, link("b"))
    blocks.release([first, second, third])
    assert blocks.num_cached == 1
    assert blocks.check_integrity([]) == []


def test_forget_all_frees_idle_blocks_and_keeps_used_ones() -> None:
    blocks = BlockAllocator(3)
    used, idle = blocks.allocate(2)
    blocks.register(used, link("used"))
    blocks.register(idle, link("idle"))
    blocks.release([idle])
    assert blocks.forget_all() == 2
    assert blocks.find([link("used")]) == []
    assert blocks.num_available == 2
    assert blocks.check_integrity([[used]]) == []
    blocks.release([used])
    assert blocks.num_available == 3


def test_free_blocks_cannot_be_shared_and_unowned_ones_not_released() -> None:
    blocks = BlockAllocator(1)
    with pytest.raises(AssertionError):
        blocks.acquire([0])
    with pytest.raises(AssertionError):
        blocks.release([0])


def test_check_integrity_names_a_lost_reference() -> None:
    blocks = BlockAllocator(2)
    owned = blocks.allocate(1)
    assert blocks.check_integrity([]) == [f"block {owned[0]} has 1 references and 0 owners"]
    blocks._is_free[owned[0]] = True
    assert any("has roles" in fault for fault in blocks.check_integrity())


def test_pool_shape_and_dtype() -> None:
    pool = KvPool(LAYOUT, 3)
    assert pool.tensor.shape == (2, 3, 2, 2, 4, 4)
    assert pool.tensor.is_contiguous()
    assert pool.tensor.dtype is torch.float32
    assert not pool.tensor.any()


def test_copy_on_write_copies_filled_rows_only() -> None:
    pool = KvPool(LAYOUT, 4)
    (shared,) = pool.blocks.allocate(1)
    pool.tensor.normal_()
    before = pool.tensor.clone()
    assert pool.make_writable(shared, 3) == shared, "a sole owner writes in place"
    pool.blocks.acquire([shared])
    copy = pool.make_writable(shared, 3)
    assert copy != shared
    assert pool.blocks.refs(shared) == pool.blocks.refs(copy) == 1
    assert torch.equal(pool.tensor[:, copy, :, :, :3], before[:, shared, :, :, :3])
    assert torch.equal(pool.tensor[:, copy, :, :, 3:], before[:, copy, :, :, 3:])
    assert torch.equal(pool.tensor[:, shared], before[:, shared])


def test_clear_removes_nan() -> None:
    pool = KvPool(LAYOUT, 3)
    pool.tensor.fill_(float("nan"))
    pool.clear([0, 2])
    pool.clear([])
    assert not pool.tensor[:, [0, 2]].any()
    assert pool.tensor[:, 1].isnan().all()


def test_a_pin_holds_until_released_and_drained() -> None:
    pool = KvPool(LAYOUT, 2)
    owned = pool.blocks.allocate(2)
    release = pool.pin(owned)
    pool.blocks.release(owned)
    assert pool.blocks.num_available == 0
    assert pool.check_integrity([]) == []
    release()
    release()
    assert pool.blocks.num_available == 0, "only the engine's thread changes the pool"
    pool.drain()
    assert pool.blocks.num_available == 2
    assert pool.num_pinned == 0
    assert pool.check_integrity([]) == []


def test_releases_come_from_many_threads() -> None:
    pool = KvPool(LAYOUT, 64)
    owned = pool.blocks.allocate(64)
    releases = [pool.pin([block_id]) for block_id in owned for _ in range(4)]
    pool.blocks.release(owned)
    threads = [
        threading.Thread(target=lambda part: [call() for call in part], args=(releases[i::8],))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    while pool.num_pinned:
        pool.wait_release(timeout_s=5)
    for thread in threads:
        thread.join()
    assert pool.blocks.num_available == 64


def test_wait_release_gives_up() -> None:
    pool = KvPool(LAYOUT, 1)
    release = pool.pin(pool.blocks.allocate(1))
    pool.wait_release(timeout_s=0.001)
    assert pool.num_pinned == 1
    release()
    pool.wait_release(timeout_s=5)
    assert pool.num_pinned == 0


def test_reset_empties_the_prefix_cache() -> None:
    pool = KvPool(LAYOUT, 2)
    owned = pool.blocks.allocate(1)
    pool.blocks.register(owned[0], link("a"))
    release = pool.pin(owned)
    pool.blocks.release(owned)
    assert pool.reset() == 1
    assert pool.blocks.find([link("a")]) == []
    assert pool.blocks.num_available == 1
    release()
    pool.drain()
    assert pool.blocks.num_available == 2


def test_memory_starts_at_a_page() -> None:
    for num_blocks in (1, 3, 64):
        assert KvPool(LAYOUT, num_blocks).tensor.data_ptr() % mmap.PAGESIZE == 0


def test_a_held_block_is_nobodys_until_released_and_comes_back_zeroed() -> None:
    pool = KvPool(LAYOUT, 3)
    owned = pool.blocks.allocate(2)
    release = pool.hold(owned[:1])
    pool.blocks.release(owned)
    assert pool.is_held(owned[0])
    assert not pool.is_held(owned[1])
    assert pool.blocks.num_available == 2
    pool.tensor[:, owned[0]] = torch.nan  # the write that could not be stopped
    release()
    release()
    assert pool.is_held(owned[0]), "until the engine's thread looks"
    pool.drain()
    assert pool.blocks.num_available == 3
    assert not pool.is_held(owned[0])
    assert not pool.tensor.any()
    assert pool.check_integrity([]) == []


def test_a_released_hold_zeroes_what_is_its_own_only() -> None:
    """What somebody computed meanwhile, or can be found, is not a loader's rest."""
    pool = KvPool(LAYOUT, 4)
    chain = [link("a")]
    found, shared, own = block_ids = pool.blocks.allocate(3)
    pool.tensor[:, block_ids] = 7.0
    release = pool.hold(block_ids)
    pool.blocks.register(found, chain[0])
    pool.blocks.release([found, own])
    release()
    pool.drain()
    assert bool((pool.tensor[:, [found, shared]] == 7.0).all())
    assert not pool.tensor[:, own].any()
    assert pool.blocks.find(chain) == [found]
    assert pool.check_integrity([[shared]]) == []


def test_a_block_that_is_held_twice_is_zeroed_with_the_last_release() -> None:
    pool = KvPool(LAYOUT, 2)
    owned = pool.blocks.allocate(1)
    first, second = pool.hold(owned), pool.hold(owned)
    pool.blocks.release(owned)
    for release, is_zero in ((first, False), (second, True)):
        pool.tensor[:, owned] = 7.0
        release()
        pool.drain()
        assert bool((pool.tensor[:, owned] == 0).all()) is is_zero
    assert pool.check_integrity([]) == []
