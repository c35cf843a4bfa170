"""Whatever the load does, the policy does not flap."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ucm.sparse.mode_policy import LoadSignals, ModePolicy, ModeThresholds, SparseMode

LIMITS = ModeThresholds(patience_steps=3, dwell_steps=7)

loads = st.builds(
    LoadSignals,
    context_tokens=st.integers(0, 5000),
    batch_size=st.integers(0, 12),
    pool_pressure=st.floats(0.0, 1.0),
)
inside = st.builds(
    LoadSignals,
    context_tokens=st.integers(LIMITS.leave_context_tokens, LIMITS.enter_context_tokens - 1),
    batch_size=st.integers(LIMITS.leave_batch + 1, LIMITS.enter_batch - 1),
    pool_pressure=st.floats(
        LIMITS.leave_pressure, LIMITS.enter_pressure, exclude_min=True, exclude_max=True
    ),
)


def modes_of(policy: ModePolicy, history: list[LoadSignals]) -> list[SparseMode]:
    return [policy.observe(load) for load in history]


def switches(modes: list[SparseMode]) -> list[int]:
    return [step for step in range(1, len(modes)) if modes[step] is not modes[step - 1]]


@given(st.lists(loads, max_size=120))
def test_never_two_switches_within_a_dwell(history: list[LoadSignals]) -> None:
    busy = [load for load in history if load.batch_size]
    policy = ModePolicy(LIMITS)
    found = switches(modes_of(policy, busy))
    assert all(b - a > LIMITS.dwell_steps for a, b in itertools.pairwise(found))
    assert SparseMode.AUTO not in {policy.mode}


@given(st.lists(loads, max_size=60), st.lists(inside, max_size=60))
def test_wavering_between_the_thresholds_switches_nothing(
    before: list[LoadSignals], wavering: list[LoadSignals]
) -> None:
    policy = ModePolicy(LIMITS)
    modes_of(policy, before)
    settled = policy.mode
    assert set(modes_of(policy, wavering)) <= {settled}


@given(st.lists(loads, max_size=60), loads.filter(lambda load: load.batch_size > 0))
def test_a_steady_load_settles_in_one_mode(before: list[LoadSignals], load: LoadSignals) -> None:
    """At most two switches: on, and then to what the load calls for while on."""
    policy = ModePolicy(LIMITS)
    modes_of(policy, before)
    num_before = policy.num_switches
    modes = modes_of(policy, [load] * 40)
    assert policy.num_switches - num_before <= 2
    assert len(set(modes[-12:])) == 1


@given(st.lists(loads, max_size=60))
def test_the_same_history_gives_the_same_modes(history: list[LoadSignals]) -> None:
    assert modes_of(ModePolicy(LIMITS), history) == modes_of(ModePolicy(LIMITS), history)
