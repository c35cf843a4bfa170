"""Replays: by hand on a few blocks, against libcachesim, and on a whole trace."""

from __future__ import annotations

import os
import random
from pathlib import Path

import libcachesim
import pytest

from ucm.admission import AlwaysAdmit, SecondTouch
from ucm.bench.policy_replay import MODELS, Replay, Tier, replay, replay_ideal, steps_of
from ucm.bench.synthetic import SyntheticOptions, synthesize
from ucm.bench.traces import MOONCAKE_BUCKET_NS, TraceRequest, read_mooncake, smear
from ucm.config import POLICY_NAMES
from ucm.eviction import LruPolicy
from ucm.eviction_gdsf import CostModel
from ucm.eviction_policies import make_policy

TRACES = Path(os.environ.get("UCM_TRACES") or Path(__file__).parents[3] / "shared" / "traces")
CONVERSATION = TRACES / "mooncake_conversation_trace.jsonl"


def requests_of(*chains: tuple[int, ...]) -> list[TraceRequest]:
    return [
        TraceRequest(number * 10**9, 512 * len(chain), 1, 512, chain)
        for number, chain in enumerate(chains)
    ]


def lru(requests: list[TraceRequest], capacity: int) -> Replay:
    return replay(steps_of(requests), LruPolicy(), AlwaysAdmit(), capacity)


def conversations() -> list[TraceRequest]:
    """The public conversation trace, or one made by chance where it is not at hand."""
    if CONVERSATION.exists():
        return smear(read_mooncake(CONVERSATION), 0, MOONCAKE_BUCKET_NS)
    return synthesize(SyntheticOptions(kind="chat", num_requests=12_000))


def libcachesim_hits(blocks: list[int], capacity: int) -> int:
    cache, hits = libcachesim.LRU(cache_size=capacity), 0
    for block in blocks:
        request = libcachesim.Request()
        request.obj_id, request.obj_size = block, 1
        hits += cache.get(request)
    return hits


def test_hits_are_the_cached_prefix() -> None:
    trace = requests_of((1, 2, 3), (1, 2, 4), (5,), (1, 2, 3))
    outcome = lru(trace, 100)
    assert outcome == Replay(10, 5, (2, 2, 1), 5, 0)
    assert outcome == replay_ideal(steps_of(trace))
    # Two free after the fifth block is stored means that a leaf goes: 3, the oldest.
    assert lru(trace, 4) == Replay(10, 4, (2, 2, 0), 6, 2)


def test_a_request_that_is_longer_than_the_cache_keeps_its_beginning() -> None:
    outcome = lru(requests_of((1, 2, 3, 4), (1, 2, 3, 4)), 3)
    assert (outcome.num_hits, outcome.num_written) == (3, 3)


def test_seconds_saved_grow_with_the_position() -> None:
    model = MODELS["smollm2-135m"]
    assert model.attention_tokens == pytest.approx(3067, abs=1)
    assert model.block_s(0, 512) == pytest.approx(512 * (212e6 + 69_120 * 256) / 50e9)
    outcome = Replay(10, 3, (2, 1), 0, 0)
    by_hand = 2 * model.block_s(0, 512) + model.block_s(1, 512)
    assert outcome.saved_s(model, 512) == pytest.approx(by_hand)


def test_second_touch_stores_what_comes_twice() -> None:
    trace = requests_of((1, 2), (3,), (1, 2), (1, 2))
    outcome = replay(steps_of(trace), LruPolicy(), SecondTouch(64), 10)
    assert (outcome.num_hits, outcome.num_written) == (2, 2)


@pytest.mark.parametrize("capacity", [1, 7, 60, 300])
def test_lru_is_libcachesim_s_lru(capacity: int) -> None:
    """On chains of one block there is no tree, so both must hit the very same references."""
    rng = random.Random(capacity)
    blocks = [int(rng.paretovariate(0.6)) % 500 for _ in range(5000)]
    ours = lru(requests_of(*((block,) for block in blocks)), capacity)
    assert ours.num_hits == libcachesim_hits(blocks, capacity)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_tier_stays_sound_and_within_its_size(policy: str) -> None:
    requests = synthesize(SyntheticOptions(kind="mixed", num_requests=400))
    cost = CostModel(block_tokens=512)
    tier = Tier(make_policy(policy, cost=cost, capacity=700), AlwaysAdmit(), 700)
    for number, step in enumerate(steps_of(requests)):
        tier.serve(step)
        assert len(tier.index) <= 700
        if number % 50 == 0:
            assert tier.index.check_integrity() == []
    assert tier.num_evicted > 1000
    assert tier.index.check_integrity() == []


@pytest.mark.timeout(90)
def test_tree_gdsf_saves_more_than_lru() -> None:
    steps = steps_of(conversations()[:3000])
    capacity = replay_ideal(steps).num_written // 10
    model, cost = MODELS["smollm2-135m"], CostModel(block_tokens=512)
    saved_s = {
        name: replay(
            steps, make_policy(name, cost=cost, capacity=capacity), AlwaysAdmit(), capacity
        ).saved_s(model, 512)
        for name in ("lru", "tree-gdsf")
    }
    assert saved_s["tree-gdsf"] > 1.05 * saved_s["lru"]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("capacity", [1000, 10_000, 50_000])
def test_lru_on_a_whole_trace_is_libcachesim_s(capacity: int) -> None:
    """Every block a chain of its own: the curve of the public trace, where it is at hand."""
    blocks = [block for request in conversations() for block in request.block_ids]
    ours = lru(requests_of(*((block,) for block in blocks)), capacity)
    assert ours.num_hits == libcachesim_hits(blocks, capacity)
