"""Every metric of the daemon, declared in one table; `docs/metrics.md` is checked against it.

`Metrics` wraps one private Prometheus registry, so that two daemons in one process (tests) do not
share counters. Nothing here opens a port. Never a label that a client can choose freely.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .types import LoadStatus, StoreStatus, TierKind

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One row of the table."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    help: str


METRICS: Final[tuple[MetricSpec, ...]] = (
    MetricSpec("ucm_lookups_total", "counter", "calls", (), "Lookups answered."),
    MetricSpec("ucm_lookup_blocks_total", "counter", "blocks", (), "Blocks asked for in lookups."),
    MetricSpec(
        "ucm_hit_blocks_total", "counter", "blocks", ("tier",), "Blocks found by lookups, by tier."
    ),
    MetricSpec(
        "ucm_loaded_blocks_total", "counter", "blocks", ("tier",), "Blocks leased for reading."
    ),
    MetricSpec(
        "ucm_load_failures_total", "counter", "blocks", ("reason",), "Blocks a load did not get."
    ),
    MetricSpec(
        "ucm_refused_loads_total",
        "counter",
        "calls",
        ("by",),
        "Loads refused because too many are in service: by the daemon, or by the client itself "
        "without a call, as it told with its next one.",
    ),
    MetricSpec(
        "ucm_stored_blocks_total", "counter", "blocks", ("status",), "Outcome of offered blocks."
    ),
    MetricSpec("ucm_flushed_blocks_total", "counter", "blocks", (), "Blocks made durable."),
    MetricSpec(
        "ucm_dropped_writes_total", "counter", "blocks", ("reason",), "Accepted, but not flushed."
    ),
    MetricSpec(
        "ucm_rejected_admissions_total",
        "counter",
        "blocks",
        (),
        "Stored or loaded, but not written to NVMe: wanted too seldom (nvme.admission).",
    ),
    MetricSpec(
        "ucm_corrupt_blocks_total", "counter", "blocks", ("tier",), "Checksum failures: misses."
    ),
    MetricSpec(
        "ucm_evicted_blocks_total", "counter", "blocks", ("tier",), "Blocks evicted for room."
    ),
    MetricSpec(
        "ucm_released_segments_total", "counter", "segments", (), "Segments that were given back."
    ),
    MetricSpec("ucm_io_bytes_total", "counter", "bytes", ("tier", "op"), "Block bytes moved."),
    MetricSpec(
        "ucm_io_duration_seconds", "histogram", "seconds", ("tier", "op"), "Time of one batch."
    ),
    MetricSpec(
        "ucm_summaries_kept_total",
        "counter",
        "summaries",
        ("source",),
        "Summaries of blocks taken into memory: a client's, read from NVMe, or computed.",
    ),
    MetricSpec(
        "ucm_summaries_refused_total",
        "counter",
        "summaries",
        (),
        "Summaries that came with a store and did not speak for their block: not used.",
    ),
    MetricSpec(
        "ucm_summaries_evicted_total", "counter", "summaries", (), "Summaries that made room."
    ),
    MetricSpec(
        "ucm_summaries_dropped_total",
        "counter",
        "blocks",
        (),
        "Blocks that found no place in the queue for computing summaries; asked for, they get one.",
    ),
    MetricSpec("ucm_summaries_bytes", "gauge", "bytes", (), "Memory that summaries have touched."),
    MetricSpec("ucm_tier_used_bytes", "gauge", "bytes", ("tier",), "Slots in use."),
    MetricSpec("ucm_tier_capacity_bytes", "gauge", "bytes", ("tier",), "Configured capacity."),
    MetricSpec("ucm_selects_total", "counter", "calls", (), "Selections answered."),
    MetricSpec(
        "ucm_select_candidates_total", "counter", "blocks", (), "Blocks to choose from, by layer."
    ),
    MetricSpec("ucm_select_chosen_total", "counter", "blocks", (), "Blocks chosen, by layer."),
    MetricSpec(
        "ucm_select_duration_seconds", "histogram", "seconds", (), "Time of one selection's scores."
    ),
    MetricSpec(
        "ucm_select_table_bytes", "gauge", "bytes", (), "Tables that selections are scored in."
    ),
    MetricSpec("ucm_leases", "gauge", "leases", (), "Leases held now."),
    MetricSpec("ucm_leased_bytes", "gauge", "bytes", (), "Bytes that leases pin now."),
    MetricSpec("ucm_pinned_bytes", "gauge", "bytes", (), "Bytes that pins keep in memory now."),
    MetricSpec("ucm_expired_leases_total", "counter", "leases", (), "Leases ended by deadline."),
    MetricSpec("ucm_sessions", "gauge", "sessions", (), "Clients connected."),
    MetricSpec("ucm_write_queue_bytes", "gauge", "bytes", (), "Accepted blocks not yet flushed."),
    MetricSpec(
        "ucm_deleted_documents_total", "counter", "documents", (), "Removed, replaced or expired."
    ),
    MetricSpec(
        "ucm_erased_blocks_total",
        "counter",
        "blocks",
        (),
        "Blocks of deleted documents of which nothing is left in any tier.",
    ),
    MetricSpec(
        "ucm_deletions_waiting",
        "gauge",
        "blocks",
        (),
        "Deleted blocks whose bytes may still be somewhere: leased, or refused by the disk.",
    ),
    MetricSpec(
        "ucm_barred_blocks", "gauge", "blocks", (), "Deleted blocks that no store brings back."
    ),
    MetricSpec("ucm_nvme_writable", "gauge", "bool", (), "0 when the disk refuses writes."),
    MetricSpec("ucm_build_info", "gauge", "info", ("version",), "Always 1."),
)


KNOWN_LABEL_VALUES: Final[Mapping[str, tuple[str, ...]]] = {
    "tier": tuple(TierKind),
    "op": ("read", "write"),
    "source": ("client", "nvme", "computed"),
    "status": tuple(status for status in StoreStatus if status is not StoreStatus.WANTED),
    "by": ("daemon", "client"),
}
"""Series of counters that exist, at 0, from the start: `rate()` cannot see the step from nothing to
one, so an alert would miss the first corrupt block."""

KNOWN_REASONS: Final[Mapping[str, tuple[str, ...]]] = {
    "ucm_load_failures_total": tuple(each for each in LoadStatus if each is not LoadStatus.READY),
    "ucm_dropped_writes_total": ("orphan", "queue_full", "closing", "no_space", "lost", "held"),
}
"""Likewise for the label `reason`, which means something else in each metric."""


class Metrics:
    """The daemon's counters, gauges and histograms, by name."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._by_name: dict[str, Counter | Gauge | Histogram] = {
            spec.name: self._create(spec) for spec in METRICS
        }
        self._counts: dict[tuple[str, ...], Counter | Gauge] = {}
        """What `add` was called for, by name, label names and values: labels cost 3 us to find."""
        for spec in METRICS:
            if spec.kind == "counter":
                self._begin_at_zero(spec)

    def _begin_at_zero(self, spec: MetricSpec) -> None:
        known = {**KNOWN_LABEL_VALUES, "reason": KNOWN_REASONS.get(spec.name, ())}
        if spec.labels:
            for values in itertools.product(*(known[label] for label in spec.labels)):
                self._by_name[spec.name].labels(*values)

    def _create(self, spec: MetricSpec) -> Counter | Gauge | Histogram:
        if spec.kind == "counter":
            return Counter(spec.name, spec.help, spec.labels, registry=self.registry)
        if spec.kind == "gauge":
            return Gauge(spec.name, spec.help, spec.labels, registry=self.registry)
        return Histogram(spec.name, spec.help, spec.labels, registry=self.registry)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter (a negative amount is an error there) or a gauge."""
        count = self._counts.get((name, *labels, *labels.values()))
        if count is None:
            metric = self._by_name[name]
            assert not isinstance(metric, Histogram), name
            count = metric.labels(**labels) if labels else metric
            self._counts[(name, *labels, *labels.values())] = count
        count.inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        metric = self._by_name[name]
        assert isinstance(metric, Gauge), name
        (metric.labels(**labels) if labels else metric).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record one observation of a histogram, in the metric's unit."""
        metric = self._by_name[name]
        assert isinstance(metric, Histogram), name
        (metric.labels(**labels) if labels else metric).observe(value)

    def value(self, name: str, **labels: str) -> float:
        """Current value of a counter or gauge; 0.0 when it was never touched."""
        return self.registry.get_sample_value(name, labels) or 0.0
