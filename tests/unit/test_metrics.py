"""The table of metrics, and the registry made from it."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from ucm.metrics import METRICS, Metrics, MetricSpec


def test_names_are_unique_and_follow_the_rules() -> None:
    names = [spec.name for spec in METRICS]
    assert len(set(names)) == len(names)
    for spec in METRICS:
        assert spec.name.startswith("ucm_")
        assert spec.help.endswith(".")
        assert spec.name.endswith("_total") == (spec.kind == "counter")


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_every_metric_can_be_used_as_declared(spec: MetricSpec) -> None:
    metrics = Metrics()
    labels = dict.fromkeys(spec.labels, "x")
    if spec.kind == "counter":
        metrics.add(spec.name, 2, **labels)
        assert metrics.value(spec.name, **labels) == 2
    elif spec.kind == "gauge":
        metrics.set(spec.name, 3, **labels)
        metrics.add(spec.name, -1, **labels)
        assert metrics.value(spec.name, **labels) == 2
    else:
        metrics.observe(spec.name, 0.5, **labels)
        assert metrics.registry.get_sample_value(f"{spec.name}_sum", labels) == 0.5
    assert spec.name.removesuffix("_total").encode() in generate_latest(metrics.registry)


def test_two_daemons_in_a_process_do_not_share() -> None:
    first, second = Metrics(), Metrics()
    first.add("ucm_lookups_total")
    assert (first.value("ucm_lookups_total"), second.value("ucm_lookups_total")) == (1, 0)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        Metrics().add("ucm_nonsense_total")


def test_what_was_never_touched_is_zero() -> None:
    assert Metrics().value("ucm_hit_blocks_total", tier="nvme") == 0


def test_the_first_corrupt_block_is_a_step_from_zero() -> None:
    """`rate()` of a series that is not there yet is nothing, so it must be there before."""
    text = generate_latest(Metrics().registry).decode()
    assert 'ucm_corrupt_blocks_total{tier="nvme"} 0.0' in text
    assert 'ucm_load_failures_total{reason="corrupt"} 0.0' in text
    assert 'ucm_dropped_writes_total{reason="no_space"} 0.0' in text
    assert 'status="wanted"' not in text
    for spec in METRICS:
        if spec.kind == "counter":
            assert f"\n{spec.name}" in text, f"{spec.name} begins without a series"
