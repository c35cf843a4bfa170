"""What engine and reader tell a recorder: every layer of every pass, and every read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm import tracing
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import load_model
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.reader_io import open_reader_io
from ucm.testing.extent_files import PAGE_LAYOUT, ExtentFile
from ucm.testing.models import write_tiny_model
from ucm.testing.slab_pool import SlabPool
from ucm.tracing import TraceEvent, Track
from ucm.types import LoadOrder

CHUNK, BLOCK, NUM_LAYERS = 64, 32, 3


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    tracing.stop_recording()


def of(events: tuple[TraceEvent, ...], track: Track) -> list[TraceEvent]:
    return [event for event in events if event.track is track]


def test_a_prefill_is_its_passes_and_their_layers(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path)).model
    scheduler = SchedulerOptions(prefill_chunk_tokens=CHUNK)
    options = EngineOptions(num_blocks=16, block_tokens=BLOCK, scheduler=scheduler)
    engine = Engine(model, None, options)
    tokens = list(range(10, 10 + CHUNK + 40))
    params = SamplingParams(max_tokens=1)
    unseen = engine.generate_all([tokens], params)[0].outputs[0].token_ids
    engine.reset_cache()
    tracing.start_recording()
    seen = engine.generate_all([tokens], params)[0].outputs[0].token_ids
    events = tracing.stop_recording()
    assert seen == unseen
    assert [event.layer for event in of(events, Track.COMPUTE)] == [*range(NUM_LAYERS)] * 2
    steps = of(events, Track.STEP)
    assert [(step.first_block, step.num_blocks) for step in steps] == [(0, 2), (2, 2)]
    for layer in of(events, Track.COMPUTE):
        assert any(s.begin_us <= layer.begin_us <= layer.end_us <= s.end_us for s in steps)
    assert not of(events, Track.STALL)


@pytest.mark.parametrize("order", LoadOrder)
def test_a_load_is_its_reads(tmp_path: Path, order: LoadOrder) -> None:
    file = ExtentFile(tmp_path / "0000.seg", PAGE_LAYOUT, 4)
    pool, io = SlabPool(PAGE_LAYOUT, 4), open_reader_io()
    recorder = tracing.start_recording()
    options = ReaderOptions(order=order, request_bytes=1, num_threads=2, read_ahead_layers=99)
    reader = LayerReader(file.plan(), PAGE_LAYOUT, pool, io, options)
    reader.start()
    assert reader.wait_layer(PAGE_LAYOUT.num_layers - 1, 10.0) == 4
    events = recorder.events()
    reader.cancel(10.0)
    io.close()
    assert {event.track for event in events} == {Track.LOAD}
    if order is LoadOrder.LAYERS:
        read = [(e.layer, e.num_layers, e.first_block, e.num_blocks) for e in events]
        layers, blocks = range(PAGE_LAYOUT.num_layers), range(4)
        assert sorted(read) == [(layer, 1, block, 1) for layer in layers for block in blocks]
    else:
        assert sorted((e.layer, e.first_block) for e in events) == [(-1, b) for b in range(4)]
