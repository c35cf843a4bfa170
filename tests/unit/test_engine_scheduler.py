"""The scheduler's plans: order, budgets, admission, preemption. Nothing is executed here."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest

from ucm.engine.allocator import BlockAllocator
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions, StepPlan, plan_step
from ucm.engine.sequence import TokenSequence
from ucm.errors import ConfigError
from ucm.types import BlockKey

OPTIONS = SchedulerOptions(max_sequences=4, max_step_tokens=16, prefill_chunk_tokens=8)


def new_sequence(arrival: int, num_tokens: int, *, num_forks: int = 0) -> TokenSequence:
    return TokenSequence(
        request_id=f"r{arrival}",
        index=0,
        arrival=(arrival, 0),
        params=SamplingParams(),
        tokens=[arrival, *range(num_tokens - 1)],
        num_prompt=num_tokens,
        max_length=100,
        block_tokens=4,
        num_forks=num_forks,
    )


def run(sequence: TokenSequence, pool: BlockAllocator, num_computed: int) -> TokenSequence:
    num_blocks = sequence.num_blocks_for(max(num_computed, sequence.num_tokens - 1))
    sequence.block_ids = pool.allocate(num_blocks)
    sequence.num_computed = num_computed
    return sequence


def works(plan: StepPlan) -> list[tuple[str, int]]:
    return [(work.sequence.request_id, work.num_tokens) for work in plan.work]


def admissions(plan: StepPlan) -> list[tuple[str, int]]:
    return [(item.sequence.request_id, item.max_tokens) for item in plan.admit]


def test_decodes_come_first_then_chunks_then_waiting_requests() -> None:
    pool = BlockAllocator(32)
    prefill = run(new_sequence(0, 14), pool, 4)
    decode = run(new_sequence(1, 6), pool, 5)
    plan = plan_step([prefill, decode], [new_sequence(2, 20)], pool, OPTIONS)
    assert works(plan) == [("r1", 1), ("r0", 8)]
    assert admissions(plan) == [("r2", 7)], "what the budget of 16 leaves"
    assert plan.preempt == ()


def test_planning_changes_nothing() -> None:
    pool = BlockAllocator(5)
    running = [run(new_sequence(0, 5), pool, 4), run(new_sequence(1, 13), pool, 12)]
    before = copy.deepcopy((pool.__dict__, [item.block_ids for item in running]))
    first = plan_step(running, [new_sequence(2, 3)], pool, OPTIONS)
    assert first == plan_step(running, first_waiting := [new_sequence(2, 3)], pool, OPTIONS)
    assert len(first_waiting) == 1
    after = (pool.__dict__, [item.block_ids for item in running])
    assert str(before) == str(after)


def test_waiting_requests_start_in_order_and_only_if_all_their_blocks_fit() -> None:
    pool = BlockAllocator(4)
    plan = plan_step([], [new_sequence(0, 17), new_sequence(1, 2)], pool, OPTIONS)
    assert plan == StepPlan(), "the first one waits, so the second does"
    plan = plan_step([], [new_sequence(0, 16), new_sequence(1, 2)], pool, OPTIONS)
    assert admissions(plan) == [("r0", 8)], "a block a running sequence stays in reserve"


def test_shared_blocks_in_use_need_no_room() -> None:
    pool = BlockAllocator(5)
    holder, twin = new_sequence(0, 14), new_sequence(0, 14)
    run(holder, pool, 13)
    for block_id, item in zip(holder.block_ids, holder.chain, strict=False):
        pool.register(block_id, item)
    plan = plan_step([holder], [twin], pool, OPTIONS)
    assert [item.max_tokens for item in plan.admit] == [], "one block, and one in reserve"
    pool = BlockAllocator(6)
    run(holder, pool, 13)
    for block_id, item in zip(holder.block_ids, holder.chain, strict=False):
        pool.register(block_id, item)
    plan = plan_step([holder], [twin], pool, OPTIONS)
    assert [item.max_tokens for item in plan.admit] == [2]


def test_a_request_takes_the_places_of_its_forks() -> None:
    pool = BlockAllocator(32)
    decode = run(new_sequence(0, 5), pool, 4)
    plan = plan_step([decode], [new_sequence(1, 3, num_forks=3)], pool, OPTIONS)
    assert plan.admit == ()
    plan = plan_step([decode], [new_sequence(1, 3, num_forks=2), new_sequence(2, 1)], pool, OPTIONS)
    assert admissions(plan) == [("r1", 3)]


def test_the_youngest_is_preempted_for_an_older_ones_block() -> None:
    pool = BlockAllocator(8)
    old = run(new_sequence(0, 5), pool, 4)
    middle = run(new_sequence(1, 6), pool, 5)
    young = run(new_sequence(2, 20), pool, 19)
    assert pool.num_available == 0
    plan = plan_step([old, middle, young], [new_sequence(3, 1)], pool, OPTIONS)
    assert plan.preempt == (young,)
    assert works(plan) == [("r0", 1), ("r1", 1)]
    assert plan.admit == (), "nobody starts in a step that had to preempt"


def test_the_youngest_itself_misses_a_step() -> None:
    pool = BlockAllocator(3)
    old = run(new_sequence(0, 6), pool, 5)
    young = run(new_sequence(1, 5), pool, 4)
    plan = plan_step([old, young], [], pool, OPTIONS)
    assert plan.preempt == ()
    assert works(plan) == [("r0", 1)]


def test_a_prefill_under_way_can_be_preempted() -> None:
    pool = BlockAllocator(4)
    old = run(new_sequence(0, 5), pool, 4)
    young = run(new_sequence(1, 12), pool, 4)
    plan = plan_step([old, young], [], pool, OPTIONS)
    assert plan.preempt == (young,)
    assert works(plan) == [("r0", 1)]


def test_preempting_a_sharer_frees_only_what_it_alone_holds() -> None:
    pool = BlockAllocator(3)
    old = run(new_sequence(0, 5), pool, 4)
    parent = run(new_sequence(1, 7), pool, 6)
    fork = parent.fork(1)
    pool.acquire(fork.block_ids)
    plan = plan_step([old, parent, fork], [], pool, OPTIONS)
    assert plan.preempt == (fork, parent), "the fork alone would have freed nothing"
    assert works(plan) == [("r0", 1)]


def test_a_shared_tail_needs_a_block_for_all_but_the_last_owner() -> None:
    pool = BlockAllocator(3)
    parent = run(new_sequence(0, 7), pool, 6)
    fork = parent.fork(1)
    pool.acquire(fork.block_ids)
    plan = plan_step([parent, fork], [], pool, OPTIONS)
    assert works(plan) == [("r0", 1), ("r0", 1)], "one free block is enough for two owners"
    assert plan.preempt == ()
    pool.allocate(1)
    plan = plan_step([parent, fork], [], pool, OPTIONS)
    assert plan.preempt == (fork,)
    assert works(plan) == [("r0", 1)], "now the only owner, so it writes in place"


def test_the_budget_is_shared_by_chunks() -> None:
    pool = BlockAllocator(64)
    running = [run(new_sequence(i, 30), pool, 0) for i in range(3)]
    assert works(plan_step(running, [], pool, OPTIONS)) == [("r0", 8), ("r1", 8)]


# Loads


@dataclass
class Ahead:
    """A load that is nearly there."""

    sequence: TokenSequence
    num_uncomputed: int


@dataclass
class Loads:
    """Loads by hand."""

    num_free: int | None = 4
    loading: tuple[TokenSequence, ...] = ()
    near: tuple[Ahead, ...] = ()
    keys: frozenset[BlockKey] = frozenset()

    def is_loading(self, sequence: TokenSequence, /) -> bool:
        return sequence in self.loading

    def is_awaited(self, key: BlockKey, /) -> bool:
        return key in self.keys

    def joinable(self) -> tuple[Ahead, ...]:
        return self.near


def test_a_loading_sequence_computes_nothing_until_it_joins() -> None:
    pool = BlockAllocator(32)
    slow, near = run(new_sequence(0, 14), pool, 4), run(new_sequence(1, 14), pool, 4)
    decode = run(new_sequence(2, 6), pool, 5)
    loads = Loads(loading=(slow, near), near=(Ahead(near, 2),))
    plan = plan_step([slow, near, decode], [new_sequence(3, 20)], pool, OPTIONS, loads)
    assert works(plan) == [("r2", 1)]
    assert [(work.sequence.request_id, work.num_tokens) for work in plan.join] == [("r1", 2)]
    assert admissions(plan) == [("r3", 8)]


def test_a_preempted_sequence_does_not_join() -> None:
    pool = BlockAllocator(8)
    old = run(new_sequence(0, 5), pool, 4)
    near = run(new_sequence(1, 25), pool, 4)
    pool.allocate(pool.num_available)
    plan = plan_step([old, near], [], pool, OPTIONS, Loads(loading=(near,), near=(Ahead(near, 3),)))
    assert (plan.preempt, plan.join, works(plan)) == ((near,), (), [("r0", 1)])
    assert plan.num_new_blocks == 1


def test_with_a_hook_requests_start_to_load_before_there_is_room_to_compute() -> None:
    pool = BlockAllocator(64)
    running = [run(new_sequence(i, 30), pool, 0) for i in range(2)]
    waiting = [new_sequence(5, 20), new_sequence(6, 20)]
    assert plan_step(running, waiting, pool, OPTIONS).admit == ()
    assert admissions(plan_step(running, waiting, pool, OPTIONS, Loads(1))) == [("r5", 0)]
    assert plan_step(running, waiting, pool, OPTIONS, Loads(0)).admit == ()


def test_who_needs_a_block_that_is_being_loaded_waits_and_others_pass() -> None:
    pool = BlockAllocator(64)
    twin, other = new_sequence(0, 20), new_sequence(1, 7)
    loads = Loads(keys=frozenset({twin.chain[0].key}))
    assert admissions(plan_step([], [twin, other], pool, OPTIONS, loads)) == [("r1", 7)]
    behind = Loads(keys=frozenset({twin.chain[1].key}))
    assert len(plan_step([], [twin, other], pool, OPTIONS, behind).admit) == 2


def test_a_chunk_ends_before_what_was_loaded_ahead() -> None:
    pool = BlockAllocator(64)
    hybrid = run(new_sequence(0, 30), pool, 4)
    hybrid.loaded_ahead = (2, 6)
    assert works(plan_step([hybrid], [], pool, OPTIONS)) == [("r0", 4)]
    hybrid.advance(4)
    assert (hybrid.num_computed, hybrid.num_hook_tokens, hybrid.num_computable) == (24, 16, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens is 0"),
        ({"max_loading": 0}, "max_loading is 0"),
        ({"max_load_stall_s": -1.0}, "max_load_stall_s is -1"),
        ({"max_load_s": float("nan")}, "max_load_s is nan"),
        ({"max_sequences": 8, "max_step_tokens": 4}, "must be at least max_sequences"),
    ],
)
def test_impossible_options_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerOptions(**settings)
