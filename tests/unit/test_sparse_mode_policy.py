"""The policy's pairs of thresholds, its patience and its dwell."""

from __future__ import annotations

import pytest

from ucm.errors import ConfigError
from ucm.sparse.mode_policy import LoadSignals, ModePolicy, ModeThresholds, SparseMode

QUICK = ModeThresholds(patience_steps=1, dwell_steps=1)


def signals(context: int = 4000, batch: int = 1, pressure: float = 0.1) -> LoadSignals:
    return LoadSignals(context_tokens=context, batch_size=batch, pool_pressure=pressure)


def follow(policy: ModePolicy, load: LoadSignals, steps: int = 3) -> SparseMode:
    return [policy.observe(load) for _ in range(steps)][-1]


def test_a_long_context_turns_it_on_and_a_short_one_off() -> None:
    policy = ModePolicy(QUICK)
    assert follow(policy, signals(context=2047)) is SparseMode.REUSE
    assert follow(policy, signals(context=2048)) is SparseMode.LATENCY
    assert follow(policy, signals(context=1536)) is SparseMode.LATENCY
    assert follow(policy, signals(context=1535)) is SparseMode.REUSE


@pytest.mark.parametrize("crowd", [signals(batch=4), signals(pressure=0.85)])
@pytest.mark.parametrize(
    "between", [signals(batch=3), signals(pressure=0.75), signals(batch=3, pressure=0.75)]
)
def test_a_crowd_and_a_full_pool(crowd: LoadSignals, between: LoadSignals) -> None:
    policy = ModePolicy(QUICK)
    assert follow(policy, between) is SparseMode.LATENCY
    assert follow(policy, crowd) is SparseMode.CONCURRENCY
    assert follow(policy, between) is SparseMode.CONCURRENCY
    assert follow(policy, signals(batch=2, pressure=0.70)) is SparseMode.LATENCY
    assert policy.num_switches == 3


def test_patience_forgets_an_interrupted_call() -> None:
    policy = ModePolicy(ModeThresholds(patience_steps=3, dwell_steps=1))
    for load in (signals(), signals(), signals(context=10), signals(), signals()):
        assert policy.observe(load) is SparseMode.REUSE
    assert policy.observe(signals()) is SparseMode.LATENCY


def test_a_mode_is_held_for_its_dwell() -> None:
    policy = ModePolicy(ModeThresholds(patience_steps=1, dwell_steps=5))
    modes = [policy.observe(signals())]
    modes += [policy.observe(signals(context=10)) for _ in range(6)]
    assert modes == [SparseMode.LATENCY] * 6 + [SparseMode.REUSE]


def test_steps_without_decodes_say_nothing() -> None:
    policy = ModePolicy(QUICK)
    follow(policy, signals())
    assert follow(policy, signals(context=0, batch=0), 100) is SparseMode.LATENCY


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"enter_context_tokens": 10, "leave_context_tokens": 10}, "leave_context_tokens is 10"),
        ({"leave_batch": 9}, "leave_batch is 9"),
        ({"leave_pressure": -0.1}, "leave_pressure is -0.1"),
        ({"leave_pressure": float("nan")}, "leave_pressure is nan"),
        ({"patience_steps": 0}, "patience_steps is 0"),
        ({"dwell_steps": 0}, "dwell_steps 0"),
    ],
)
def test_thresholds_that_would_flap_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModeThresholds(**settings)
