"""What the cost model answers with nothing, something and too much to go by."""

from __future__ import annotations

import random
import threading

import pytest

from ucm.cost_model import CostModel, CostOptions
from ucm.errors import ConfigError
from ucm.testing.load_simulator import SimulatedMachine
from ucm.types import LoadMode, TierKind

MIB = 1 << 20


def taught(machine: SimulatedMachine, noise: float = 0.05, seed: int = 0) -> CostModel:
    model = CostModel()
    machine.teach(model, random.Random(seed), noise)
    return model


def test_with_no_data_the_priors_answer_and_say_so() -> None:
    model = CostModel(CostOptions(token_s=1e-3, attention_tokens=1000.0, pass_tokens=10.0))
    assert model.compute_s(0, 100) == pytest.approx(1e-3 * (100 + 10 + 5))
    long_s = 1e-3 * (2000 + 2000)
    assert model.compute_s(0, 2000) == pytest.approx(long_s + 4 * 0.01), "in chunks"
    assert model.layer_compute_s(0, 2000, 10) == pytest.approx((long_s + 0.01) / 10), "in one pass"
    assert model.load_s(TierKind.NVME, 10**9) == pytest.approx(1.0, rel=0.1)
    assert model.contention_s(0) == 0.0
    estimates = model.snapshot()
    assert estimates.source == "priors for computing, memory loads, nvme loads"
    assert "priors for computing" in str(estimates)


@pytest.mark.parametrize("empty", [(5, 5), (9, 3)])
def test_nothing_to_compute_or_load_costs_nothing(empty: tuple[int, int]) -> None:
    model = CostModel()
    assert model.compute_s(*empty) == 0.0
    assert model.layer_compute_s(*empty, 30) == 0.0
    assert model.load_s(TierKind.MEMORY, 0) == 0.0


@pytest.mark.parametrize("token_s", [2e-5, 4e-3])
@pytest.mark.parametrize("bytes_per_s", [1e6, 30e6, 5e9])
def test_what_was_seen_is_predicted(token_s: float, bytes_per_s: float) -> None:
    machine = SimulatedMachine(token_s=token_s, pass_s=10 * token_s, bytes_per_s=bytes_per_s)
    model = taught(machine)
    for start in (0, 1000, 5000):
        expected = machine.pass_seconds(start, start + 300)
        assert model.compute_s(start, start + 300) == pytest.approx(expected, rel=0.06)
    expected = machine.load_seconds(TierKind.NVME, 20 * MIB)
    assert model.load_s(TierKind.NVME, 20 * MIB) == pytest.approx(expected, rel=0.06)
    assert model.snapshot().source == "measured"


def test_a_long_computation_pays_for_each_of_its_passes() -> None:
    machine = SimulatedMachine(pass_s=0.5)
    model = taught(machine)
    expected = sum(machine.pass_seconds(i, i + 512) for i in range(0, 2048, 512))
    assert model.compute_s(0, 2048) == pytest.approx(expected, rel=0.05)


def test_a_change_of_bandwidth_is_learnt_in_a_few_loads() -> None:
    model = taught(SimulatedMachine(bytes_per_s=100e6))
    slow = SimulatedMachine(bytes_per_s=3e6)
    for size in (8 * MIB, 20 * MIB, 14 * MIB, 9 * MIB):
        model.observe_load(TierKind.NVME, size, slow.load_seconds(TierKind.NVME, size))
    expected = slow.load_seconds(TierKind.NVME, 10 * MIB)
    assert model.load_s(TierKind.NVME, 10 * MIB) == pytest.approx(expected, rel=0.1)


def test_one_pass_that_the_machine_interrupted_changes_little() -> None:
    machine = SimulatedMachine()
    model = taught(machine)
    before = model.compute_s(0, 1000)
    model.observe_compute(0, 512, 60.0)
    model.observe_load(TierKind.NVME, MIB, 60.0)
    assert model.compute_s(0, 1000) == pytest.approx(before, rel=0.01)


def test_decodes_do_not_spoil_what_is_known_of_prefills() -> None:
    model = taught(SimulatedMachine())
    before = model.compute_s(0, 1000)
    for position in range(500):
        model.observe_compute(position, 1, 0.05)
    assert model.compute_s(0, 1000) == before


def test_contention_is_what_passes_lose_beyond_their_stalls() -> None:
    machine = SimulatedMachine(bytes_per_s=1e9, contention_s_per_byte=4e-10)
    model = taught(machine, noise=0.02)
    assert model.contention_s(10**9) == pytest.approx(0.4, rel=0.2)


def test_passes_that_lost_nothing_teach_no_contention() -> None:
    machine = SimulatedMachine(bytes_per_s=10e6)
    model = taught(machine, noise=0.02)
    alone_s = machine.pass_seconds(0, 512)
    for _ in range(20):
        model.observe_pass(((0, 512),), alone_s, loaded_bytes=50 * MIB)
    assert model.contention_s(50 * MIB) < 0.1 * alone_s


def test_short_passes_behind_loads_tell_what_a_pass_costs() -> None:
    """Where nearly all is loaded, they are all there is; a pass of its own costs a tenth of one."""
    machine = SimulatedMachine(token_s=1e-3, pass_s=0.096, contention_s_per_byte=1.2e-9)
    model, size = CostModel(), 40 * MIB
    for start in range(0, 2048, 512):
        model.observe_compute(start, 512, machine.pass_seconds(start, start + 512))
    lost_s = size * machine.contention_s_per_byte
    for start in (900, 1800, 450):
        alone_s = machine.pass_seconds(start, start + 128)
        model.observe_pass(((start, 128),), alone_s)
        model.observe_pass(((start, 128),), alone_s + lost_s, loaded_bytes=size)
    for count in (64, 256):
        expected = machine.pass_seconds(900, 900 + count)
        assert model.compute_s(900, 900 + count) == pytest.approx(expected, rel=0.05)
    assert model.contention_s(size) == pytest.approx(lost_s, rel=0.2)


def test_rates_beside_a_computation_stand_in_for_each_other() -> None:
    model = CostModel()
    for size in (10**7, 2 * 10**7, 3 * 10**7):
        model.observe_load(TierKind.NVME, size, size / 5e6, is_computing=True)
    assert model.load_s(TierKind.NVME, 10**7) == pytest.approx(2.0, rel=0.05)
    for size in (10**7, 2 * 10**7, 3 * 10**7):
        model.observe_load(TierKind.NVME, size, size / 2e7)
    assert model.load_s(TierKind.NVME, 10**7) == pytest.approx(0.5, rel=0.05)
    assert model.load_s(TierKind.NVME, 10**7, is_computing=True) == pytest.approx(2.0, rel=0.05)


def test_a_way_of_reading_that_was_never_tried_is_judged_by_the_other() -> None:
    model = CostModel()
    for size in (10**7, 2 * 10**7, 3 * 10**7):
        model.observe_load(TierKind.NVME, size, size / 5e6, mode=LoadMode.DIRECT)
    mapped_s = model.load_s(TierKind.NVME, 10**7, mode=LoadMode.MAPPED)
    assert mapped_s == pytest.approx(2.0 * model.options.mapped_penalty, rel=0.05)


def test_how_decisions_turned_out_corrects_the_next_ones() -> None:
    model = CostModel()
    for ratio in (1.2, 1.3):
        model.observe_ttft("hybrid", 1.0, ratio)
    assert model.bias("hybrid") == 1.0
    for ratio in (1.25, 40.0):
        model.observe_ttft("hybrid", 1.0, ratio)
    assert model.bias("hybrid") == pytest.approx(1.275)
    assert model.bias("compute") == 1.0


def test_another_disk_is_learnt_from_nothing() -> None:
    model = taught(SimulatedMachine(bytes_per_s=3e6))
    before = model.compute_s(0, 1000)
    model.observe_ttft("hybrid", 1.0, 1.5)
    model.forget_loads()
    assert model.compute_s(0, 1000) == before
    assert model.load_s(TierKind.NVME, 10**9) == CostModel().load_s(TierKind.NVME, 10**9)
    assert model.snapshot().bias == {}


def test_reloading_is_weighed_against_computing_again() -> None:
    model = taught(SimulatedMachine(bytes_per_s=1e6))
    assert not model.should_reload(0, 320, TierKind.NVME, 10 * 720 * 1024)
    assert model.should_reload(0, 320, TierKind.MEMORY, 10 * 720 * 1024)


def test_priors_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="must be > 0"):
        CostOptions(token_s=0.0)
    with pytest.raises(ConfigError, match="must be > 0"):
        CostOptions(chunk_tokens=0)
    with pytest.raises(ConfigError, match="must be > 0"):
        CostOptions(joined_tokens=0)


def test_many_threads_may_ask_and_tell() -> None:
    model = CostModel()
    machine = SimulatedMachine()

    def work(seed: int) -> None:
        machine.teach(model, random.Random(seed), 0.05)
        model.snapshot()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = machine.pass_seconds(0, 512)
    assert model.compute_s(0, 512) == pytest.approx(expected, rel=0.1)
