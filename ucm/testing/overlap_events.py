"""Timelines with known lengths, for what draws them."""

from __future__ import annotations

from typing import Any

from ucm.bench.overlap_trace import Timeline
from ucm.tracing import TraceEvent, Track

LOAD_US, COMPUTE_US = 90_000, 60_000
NUM_LAYERS, NUM_BLOCKS = 30, 86


def event(
    track: Track, begin_us: int, end_us: int, layer: int = -1, blocks: tuple[int, int] = (-1, 0)
) -> TraceEvent:
    """One event of the request `r`."""
    return TraceEvent(track, begin_us, end_us, layer, int(layer >= 0), *blocks, "r", 1)


def layerwise_timeline(begin_us: int = 0) -> Timeline:
    """Layer l is computed when it is loaded and layer l-1 is computed."""
    events, now_us = [], begin_us
    for layer in range(NUM_LAYERS):
        loaded_us = begin_us + (layer + 1) * LOAD_US
        events.append(event(Track.LOAD, loaded_us - LOAD_US, loaded_us, layer))
        if loaded_us > now_us:
            events.append(event(Track.STALL, now_us, loaded_us, layer))
        start_us = max(now_us, loaded_us)
        now_us = start_us + COMPUTE_US
        events.append(event(Track.COMPUTE, start_us, now_us, layer))
    return Timeline(name="overlapped", events=tuple(events), begin_us=begin_us, end_us=now_us)


def hybrid_timeline() -> Timeline:
    """Sixteen blocks a pass from the front, one after the other from the back."""
    events, now_us = [], 0
    for first, count in ((0, 16), (16, 16), (32, 13)):
        events.append(event(Track.STEP, now_us, now_us + count * 32_000, -1, (first, count)))
        now_us += count * 32_000
    for step, block in enumerate(range(NUM_BLOCKS - 1, 44, -1)):
        events.append(event(Track.LOAD, step * 33_000, (step + 1) * 33_000, -1, (block, 1)))
    events.append(event(Track.STEP, now_us, now_us + 500_000, -1, (NUM_BLOCKS, 10)))
    end_us = now_us + 500_000
    return Timeline(name="hybrid", events=tuple(events), begin_us=0, end_us=end_us)


def overlap_cell(**changes: Any) -> dict[str, Any]:
    """One cell of a result, as long as its numbers get."""
    ways = ("compute_only", "load_only", "load_then_compute", "overlapped", "hybrid", "chosen")
    return {
        "name": "nvme 10 MB/s",
        "bandwidth_mb_s": 10.0,
        "hit_ratio": 0.9,
        "context_tokens": 6144,
        "tier": "nvme",
        "ttft_ms": {**dict.fromkeys(ways, 123_456.78), "predicted": 123_456.78},
        "chosen_kind": "hybrid",
        "overlap_efficiency": -0.25,
        "identical_tokens": True,
        "wrong_bytes": 0,
        **changes,
    }


def overlap_result(*cells: dict[str, Any]) -> dict[str, Any]:
    """What the benchmark found in `cells`, or in one."""
    return {
        "model": "tiny",
        "dtype": "fp32",
        "threads": 2,
        "cells": list(cells) or [overlap_cell()],
        "store": {"ratio": 0.01},
        "wrong_bytes": 0,
    }
