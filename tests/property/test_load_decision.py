"""Decisions on machines drawn by chance, held against a simulator that plays each of them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.cost_model import CostModel, CostOptions
from ucm.load_decision import (
    SLACK,
    Decision,
    LoadKind,
    LoadShape,
    claim_blocks,
    decide,
    forced,
)
from ucm.testing.load_simulator import SimulatedMachine
from ucm.types import LoadMode, LoadOrder, TierKind

BLOCK_TOKENS = 32
NVME = TierKind.NVME


class Case(NamedTuple):
    """A machine, a request, and a model that has seen the machine."""

    machine: SimulatedMachine
    shape: LoadShape
    model: CostModel

    def ttft_s(self, decision: Decision) -> float:
        return self.machine.ttft_s(
            decision,
            lambda first, end, partial: claim_blocks(
                self.model, self.shape, first, end, partial_bytes=partial
            ),
        )

    def best_of_all(self) -> float:
        return min(self.ttft_s(forced(kind)(self.model, self.shape)) for kind in LoadKind)


def case(machine: SimulatedMachine, shape: LoadShape, noise: float = 0.0) -> Case:
    model = CostModel(
        CostOptions(chunk_tokens=machine.chunk_tokens, joined_tokens=machine.joined_tokens)
    )
    machine.teach(model, random.Random(7), noise)
    return Case(machine, shape, model)


def request(num_tokens: int, num_hits: int, **more: object) -> LoadShape:
    options: dict[str, object] = {
        "num_tokens": num_tokens,
        "num_local_tokens": 0,
        "tiers": (NVME,) * num_hits,
        "block_tokens": BLOCK_TOKENS,
        "block_bytes": 30 * 24576,
        "num_layers": 30,
        "can_direct": True,
    }
    return LoadShape(**{**options, **more})  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    machine = SimulatedMachine(
        token_s=draw(st.floats(2e-4, 8e-3)),
        attention_tokens=draw(st.floats(1e3, 2e4)),
        pass_s=draw(st.floats(1e-3, 0.1)),
        bytes_per_s=10 ** draw(st.floats(6.0, 9.5)),
        contention_s_per_byte=draw(st.sampled_from([0.0, 2e-10])),
        chunk_tokens=draw(st.sampled_from([128, 512, 2048])),
    )
    num_blocks = draw(st.integers(2, 190))
    num_local = draw(st.integers(0, num_blocks // 2))
    num_hits = draw(st.integers(0, num_blocks - num_local))
    num_memory = draw(st.integers(0, num_hits)) if draw(st.booleans()) else 0
    shape = request(
        num_blocks * BLOCK_TOKENS + draw(st.integers(1, 400)),
        0,
        num_local_tokens=num_local * BLOCK_TOKENS,
        tiers=(TierKind.MEMORY,) * num_memory + (NVME,) * (num_hits - num_memory),
        queue_s=draw(st.sampled_from([0.0, 0.3])),
        is_alone=draw(st.booleans()),
    )
    return Case(machine, shape, machine.known())


@given(cases())
def test_predictions_are_what_happens(drawn: Case) -> None:
    for kind in LoadKind:
        decision = forced(kind)(drawn.model, drawn.shape)
        measured = drawn.ttft_s(decision)
        assert decision.predicted_ttft_s == pytest.approx(measured, rel=0.08, abs=2e-3), kind


@given(cases())
def test_the_choice_is_never_much_worse_than_the_best(drawn: Case) -> None:
    chosen = decide(drawn.model, drawn.shape)
    assert drawn.ttft_s(chosen) <= 1.05 * drawn.best_of_all() + 2e-3


@given(cases())
def test_a_decision_is_sound(drawn: Case) -> None:
    chosen, shape = decide(drawn.model, drawn.shape), drawn.shape
    assert chosen == decide(drawn.model, drawn.shape)
    assert chosen.predicted_ttft_s <= (1 + SLACK) * min(chosen.alternatives.values())
    assert chosen.first_block == shape.first_block
    assert 0 <= chosen.num_blocks <= len(shape.tiers)
    assert (chosen.num_blocks == 0) == (chosen.kind is LoadKind.COMPUTE)
    assert 1 <= chosen.read_ahead_layers <= shape.max_read_ahead_layers
    assert chosen.kind.value in chosen.explain()


@given(drawn=cases(), kind=st.none() | st.sampled_from(list(LoadKind)))
def test_a_chunk_is_loaded_whole_or_not_at_all(drawn: Case, kind: LoadKind | None) -> None:
    shape = replace(drawn.shape, is_whole=True)
    chosen = (forced(kind) if kind else decide)(drawn.model, shape)
    assert chosen.order is LoadOrder.LAYERS
    assert chosen.num_blocks in (0, len(shape.tiers))
    assert set(chosen.alternatives) <= {LoadKind.LOAD_ALL.value, LoadKind.COMPUTE.value}
    if kind not in (None, LoadKind.COMPUTE):
        assert chosen.num_blocks == len(shape.tiers)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_at_the_balance_a_hybrid_takes_half(noise: float) -> None:
    """T_c * T_l / (T_c + T_l): both ends share the work."""
    shape = request(3072, 95)
    machine = SimulatedMachine()
    compute_s = sum(machine.pass_seconds(i, i + 512) for i in range(0, 3072, 512))
    balanced = SimulatedMachine(bytes_per_s=95 * shape.block_bytes / compute_s)
    found = case(balanced, shape, noise)
    hybrid = found.ttft_s(forced(LoadKind.HYBRID)(found.model, shape))
    load = found.ttft_s(forced(LoadKind.LOAD_ALL)(found.model, shape))
    compute = found.ttft_s(forced(LoadKind.COMPUTE)(found.model, shape))
    assert hybrid <= 0.62 * min(load, compute)
    assert decide(found.model, shape).kind is LoadKind.HYBRID


@pytest.mark.parametrize("bandwidth", [1e6, 3e6, 10e6, 30e6, 100e6, 5e9])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_tokens", [1024, 3072, 6144])
def test_the_benchmarks_cells(bandwidth: float, share: float, num_tokens: int) -> None:
    num_hits = min(int(share * num_tokens) // BLOCK_TOKENS, (num_tokens - 1) // BLOCK_TOKENS)
    found = case(SimulatedMachine(bytes_per_s=bandwidth), request(num_tokens, num_hits), 0.05)
    hybrid = found.ttft_s(forced(LoadKind.HYBRID)(found.model, found.shape))
    load = found.ttft_s(forced(LoadKind.LOAD_ALL)(found.model, found.shape))
    compute = found.ttft_s(forced(LoadKind.COMPUTE)(found.model, found.shape))
    chosen = decide(found.model, found.shape)
    assert found.ttft_s(chosen) <= 1.05 * min(hybrid, load, compute)
    assert hybrid <= 1.05 * min(load, compute)
    assert chosen.predicted_ttft_s == pytest.approx(found.ttft_s(chosen), rel=0.15)


def test_the_pass_behind_a_load_hides_as_much_of_it_as_a_step_holds() -> None:
    """Half of 6 k tokens behind a slow disk: 2,048 of the other half are computed meanwhile."""
    shape, machine = request(6144, 96, is_alone=True), SimulatedMachine(bytes_per_s=3e6)
    found = case(machine, shape)
    layered = forced(LoadKind.LOAD_ALL)(found.model, shape)
    compute_s = sum(machine.pass_seconds(i, i + 512) for i in range(3072, 6144, 512))
    load_s = machine.load_seconds(TierKind.NVME, 96 * shape.block_bytes)
    hidden_s = machine.pass_seconds(3072, 3072 + 2048)
    assert found.ttft_s(layered) <= load_s + compute_s - 0.95 * hidden_s
    assert layered.predicted_ttft_s == pytest.approx(found.ttft_s(layered), rel=0.05)
    beside = case(machine, replace(shape, is_alone=False))
    layered_beside = forced(LoadKind.LOAD_ALL)(beside.model, beside.shape)
    assert beside.ttft_s(layered_beside) > found.ttft_s(layered) + 0.5 * hidden_s, "a chunk"


def test_a_fast_disk_is_read_and_a_slow_one_is_not() -> None:
    fast, slow = SimulatedMachine(bytes_per_s=2e9), SimulatedMachine(bytes_per_s=1e4)
    shape = request(3072, 86, can_hybrid=False)
    assert decide(case(fast, shape).model, shape).kind is LoadKind.LOAD_ALL
    assert decide(case(slow, shape).model, shape).kind is LoadKind.COMPUTE


def test_with_no_data_a_hit_is_loaded() -> None:
    chosen = decide(CostModel(), request(3072, 86))
    assert chosen.kind is LoadKind.LOAD_ALL
    assert chosen.mode is LoadMode.DIRECT
    assert "priors for computing" in chosen.explain()


def test_nothing_in_the_cache_is_computed() -> None:
    chosen = decide(CostModel(), request(3072, 0))
    assert (chosen.kind, chosen.num_blocks) == (LoadKind.COMPUTE, 0)
    assert forced(LoadKind.HYBRID)(CostModel(), request(3072, 0)).kind is LoadKind.COMPUTE


def test_blocks_in_memory_are_mapped() -> None:
    shape = request(3072, 0, tiers=(TierKind.MEMORY,) * 50)
    assert decide(CostModel(), shape).mode is LoadMode.MAPPED
    assert decide(CostModel(), request(3072, 50, can_direct=False)).mode is LoadMode.MAPPED


def test_a_part_is_loaded_where_the_rest_is_computed_meanwhile() -> None:
    machine = SimulatedMachine(bytes_per_s=20e6, chunk_tokens=4096)
    found = case(machine, request(3072, 95, can_hybrid=False))
    chosen = decide(found.model, found.shape)
    assert chosen.kind is LoadKind.LOAD_PART
    assert 0 < chosen.num_blocks < 95


def test_time_in_the_queue_is_free_loading_time() -> None:
    machine = SimulatedMachine(bytes_per_s=10e6)
    shape = request(3072, 95, queue_s=8.0)
    found = case(machine, shape)
    assert decide(found.model, shape).kind is LoadKind.LOAD_ALL


def test_a_claim_leaves_the_loader_its_share() -> None:
    machine = SimulatedMachine(bytes_per_s=5.6e6)
    found = case(machine, request(3072, 95))
    assert claim_blocks(found.model, found.shape, 0, 95) == 512 // BLOCK_TOKENS
    last = claim_blocks(found.model, found.shape, 80, 90)
    assert 2 <= last <= 7
    assert claim_blocks(found.model, found.shape, 90, 90) == 0


def test_a_load_that_spares_less_than_a_pass_is_left_alone() -> None:
    """One block could come until the others are computed, but a pass more would begin behind it."""
    shape = request(1024, 28)
    machine = SimulatedMachine(token_s=1e-3, pass_s=0.1, bytes_per_s=shape.block_bytes / 0.5)
    found = case(machine, shape)
    assert claim_blocks(found.model, shape, 16, 28) == 12
    assert claim_blocks(found.model, shape, 16, 27) < 11, "one has come: that pass is due anyway"
    hybrid = forced(LoadKind.HYBRID)(found.model, shape)
    compute = forced(LoadKind.COMPUTE)(found.model, shape)
    assert found.ttft_s(hybrid) <= 1.03 * found.ttft_s(compute)


def test_a_hybrid_that_gains_nothing_by_computing_loads_layer_by_layer() -> None:
    """Half of 3 k at 100 MB/s: the load is short, and what no cache has hides it in one step."""
    shape = request(3072, 48, is_alone=True)
    machine = SimulatedMachine(token_s=2e-3, pass_s=0.1, bytes_per_s=1e8)
    found = case(machine, shape)
    hybrid = forced(LoadKind.HYBRID)(found.model, shape)
    assert (hybrid.kind, hybrid.way) == (LoadKind.HYBRID, LoadKind.LOAD_ALL)
    assert (hybrid.order, hybrid.meeting_block) == (LoadOrder.LAYERS, 0)
    assert "layer by layer" in hybrid.explain()
    layered = forced(LoadKind.LOAD_ALL)(found.model, shape)
    assert found.ttft_s(hybrid) == found.ttft_s(layered)
    towards = forced(LoadKind.HYBRID, is_from_back=True)(found.model, shape)
    assert (towards.way, towards.order) == (LoadKind.HYBRID, LoadOrder.BLOCKS_FROM_BACK)
    assert found.ttft_s(towards) > found.ttft_s(layered)
    assert decide(found.model, shape).kind is LoadKind.LOAD_ALL


def test_what_a_hybrid_is_corrected_by_is_what_it_does() -> None:
    """Hybrids from both ends took twice their estimate; one that loads every hit is none."""
    found = case(SimulatedMachine(bytes_per_s=1e8), request(3072, 48, is_alone=True))
    for _ in range(3):
        found.model.observe_ttft(LoadKind.HYBRID.value, 1.0, 2.0)
    hybrid = forced(LoadKind.HYBRID)(found.model, found.shape)
    assert hybrid.way is LoadKind.LOAD_ALL
    assert hybrid.predicted_ttft_s == hybrid.estimated_ttft_s
