"""No attention before its last slab was verified: in any schedule, with failures, on any stream.

A simulated world: slabs on a medium, some wrong or unreadable, a staging slot that a late copy
still reads, a pool with old bytes. Hypothesis chooses which stream goes on, and when the engine
asks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucm.errors import CorruptionError
from ucm.kernels.streams import CpuStreams, Stream, Streams
from ucm.layer_pipeline import (
    LayerPipeline,
    PipelineShape,
    PipelineStreams,
    RowFailure,
    Stage,
    Step,
)
from ucm.testing.simulated_streams import SimulatedStream, SimulatedStreams

Place = tuple[int, int]
"""Layer and row."""
OLD, TORN = "old", "torn"


@dataclass
class World:
    """`LayerWork` over dictionaries; a slab's right content is its place."""

    shape: PipelineShape
    failures: dict[Place, Stage]
    is_rude: bool = False
    """Raises where it could say which rows failed."""
    slots: dict[tuple[int, int], object] = field(default_factory=dict)
    pool: dict[Place, object] = field(default_factory=dict)
    verified: set[Place] = field(default_factory=set)
    reads: list[Place] = field(default_factory=list)
    num_begun: int = 0
    enqueue: Callable[[int, Callable[[], None]], None] = lambda _handle, effect: effect()

    def read(self, step: Step) -> Collection[int]:
        """Fills the slot, also with what is wrong."""
        self.num_begun += 1
        for row in step.rows:
            place = (step.layer, row)
            self.reads.append(place)
            is_wrong = self.failures.get(place) is Stage.VERIFY
            self.slots[step.slot, row - step.first_row] = TORN if is_wrong else place
        return self._failed(step, Stage.READ)

    def verify(self, step: Step) -> Collection[int]:
        """Looks at what the slot holds."""
        found = {row: self.slots[step.slot, row - step.first_row] for row in step.rows}
        self.verified |= {(step.layer, row) for row in step.rows if found[row] != TORN}
        return [row for row in step.rows if found[row] == TORN]

    def place(self, step: Step, handle: int) -> None:
        """Copies late: what the slot holds by then."""
        self._failed(step, Stage.PLACE)
        self.enqueue(handle, lambda: self._copy(step))

    def _copy(self, step: Step) -> None:
        for row in step.rows:
            place = (step.layer, row)
            assert place in self.verified, "placed before it was verified"
            self.pool[place] = self.slots[step.slot, row - step.first_row]

    def _failed(self, step: Step, stage: Stage) -> list[int]:
        rows = [row for row in step.rows if self.failures.get((step.layer, row)) is stage]
        if rows and (self.is_rude or stage is Stage.PLACE):
            raise CorruptionError("injected")
        return rows

    def attend(self, layer: int, num_rows: int) -> None:
        """What a layer's attention reads: every slab of the rows, right and verified."""
        for row in range(num_rows):
            assert self.pool.get((layer, row), OLD) == (layer, row), "attention read old bytes"
            assert (layer, row) in self.verified

    def good_rows(self, layer: int) -> int:
        """Leading rows without a failure in layers 0..layer; as coarse as the failures are."""
        first_bad = [row for (at, row) in self.failures if at <= layer]
        return min([self.shape.num_rows, *first_bad])


@st.composite
def worlds(draw: st.DrawFn) -> World:
    num_layers, num_rows = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    shape = PipelineShape(
        num_layers=num_layers,
        num_rows=num_rows,
        rows_per_step=draw(st.integers(1, 4)),
        read_ahead_steps=draw(st.integers(1, 4)),
    )
    places = st.tuples(st.integers(0, num_layers - 1), st.integers(0, max(0, num_rows - 1)))
    failing = draw(st.dictionaries(places, st.sampled_from(Stage), max_size=2))
    return World(shape, failing if num_rows else {}, is_rude=draw(st.booleans()))


def streams_of(streams: Streams, name: str = "") -> PipelineStreams:
    return PipelineStreams(*(streams.stream(name + stage) for stage in ("read", "verify", "place")))


def simulated(
    streams: SimulatedStreams, world: World, *, on_device: bool
) -> tuple[PipelineStreams, Stream]:
    """The pipeline's streams and the one that computes."""
    if not on_device:
        return streams_of(streams), streams.stream("compute")
    world.enqueue = streams.enqueue
    read, verify = streams.stream("read"), streams.stream("verify")
    place = streams.device_stream("place")
    return PipelineStreams(read, verify, place), streams.device_stream("compute")


class Schedule:
    """Picks streams by Hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def __call__(self, able: Sequence[SimulatedStream]) -> SimulatedStream:
        return able[self._data.draw(st.integers(0, len(able) - 1))] if len(able) > 1 else able[0]


@given(world=worlds(), data=st.data())
@settings(deadline=None)
def test_attention_reads_what_was_verified_in_every_schedule(
    world: World, data: st.DataObject
) -> None:
    """The engine asks at any time, takes what there is, and computes on a stream of its own."""
    streams = SimulatedStreams(Schedule(data))
    own, compute = simulated(streams, world, on_device=data.draw(st.booleans()))
    pipeline = LayerPipeline(world, world.shape, own)
    pipeline.start()
    last_good = world.shape.num_rows
    for layer in range(world.shape.num_layers):
        while data.draw(st.booleans()) and streams.step():
            check_read_ahead(world, pipeline)
        is_ready = pipeline.num_layers_ready() > layer
        good = pipeline.wait_layer(layer, 0.0, compute)
        assert good == pipeline.num_good_rows or not is_ready
        last_good = min(last_good, good)
        submit_attention(world, compute, layer, last_good)
    streams.close()
    assert pipeline.is_done
    assert_settled(world, pipeline)


def check_read_ahead(world: World, pipeline: LayerPipeline) -> None:
    shape = world.shape
    num_settled = shape.num_layers * shape.steps_per_layer - pipeline.num_steps_left
    if not world.failures:  # a step without rows is not read
        assert world.num_begun - num_settled <= shape.read_ahead_steps


def submit_attention(world: World, compute: Stream, layer: int, num_rows: int) -> None:
    compute.submit(lambda h: world.enqueue(h, lambda: world.attend(layer, num_rows)))


def assert_settled(world: World, pipeline: LayerPipeline) -> None:
    """What is reported when all is over."""
    shape = world.shape
    for layer in range(shape.num_layers):
        good = pipeline.wait_layer(layer, 0.0)
        assert good == pipeline.num_good_rows
        world.attend(layer, good)
    if world.failures and shape.num_rows:
        assert pipeline.failures
    else:
        assert (pipeline.num_good_rows, pipeline.failures) == (shape.num_rows, ())
    if not world.is_rude and Stage.PLACE not in world.failures.values():
        assert pipeline.num_good_rows == world.good_rows(shape.num_layers - 1)
        assert {(f.layer, f.row): f.stage for f in pipeline.failures}.items() <= (
            world.failures.items()
        )
    assert len(set(world.reads)) == len(world.reads), "a slab is read once"


@given(world=worlds(), data=st.data())
@settings(deadline=None)
def test_after_a_cancel_nobody_writes(world: World, data: st.DataObject) -> None:
    """Neither to the pool nor to a slot, whatever the moment."""
    streams = SimulatedStreams(Schedule(data))
    own, _ = simulated(streams, world, on_device=data.draw(st.booleans()))
    pipeline = LayerPipeline(world, world.shape, own)
    pipeline.start()
    for _ in range(data.draw(st.integers(0, 20))):
        streams.step()
    if not pipeline.cancel(0.0):
        streams.close()
        assert pipeline.cancel(0.0) or pipeline.is_done
    before = dict(world.pool), dict(world.slots)
    streams.close()
    assert (world.pool, world.slots) == before
    assert pipeline.wait_layer(0, 0.0) <= world.shape.num_rows


@given(worlds_=st.lists(worlds(), min_size=2, max_size=3), data=st.data())
@settings(deadline=None)
def test_pipelines_that_share_streams_do_not_disturb_each_other(
    worlds_: list[World], data: st.DataObject
) -> None:
    """A failing one neither."""
    streams = SimulatedStreams(Schedule(data))
    shared = streams_of(streams)
    pipelines = [LayerPipeline(world, world.shape, shared) for world in worlds_]
    for pipeline in pipelines:
        pipeline.start()
    streams.close()
    for world, pipeline in zip(worlds_, pipelines, strict=True):
        assert_settled(world, pipeline)


@given(world=worlds(), delays=st.lists(st.sampled_from([0.0, 0.0, 0.0005, 0.002]), min_size=8))
@settings(deadline=None, max_examples=40)
def test_attention_reads_what_was_verified_on_threads(world: World, delays: list[float]) -> None:
    """The same on real streams, with delays wherever something is done."""
    with closing(CpuStreams()) as streams:
        slow = SlowWork(world, delays)
        pipeline = LayerPipeline(slow, world.shape, streams_of(streams))
        compute = streams.stream("compute")
        pipeline.start()
        good = world.shape.num_rows
        for layer in range(world.shape.num_layers):
            good = min(good, pipeline.wait_layer(layer, 10.0, compute))
            submit_attention(world, compute, layer, good)
            slow.pause()
        compute.synchronize()
        assert pipeline.cancel(10.0)
        assert_settled(world, pipeline)


class SlowWork:
    """A world where everything takes some time."""

    def __init__(self, world: World, delays: list[float]) -> None:
        self._world, self._delays, self._turn = world, delays, 0
        self._never = threading.Event()

    def pause(self) -> None:
        self._turn += 1
        self._never.wait(self._delays[self._turn % len(self._delays)])

    def read(self, step: Step) -> Collection[int]:
        self.pause()
        return self._world.read(step)

    def verify(self, step: Step) -> Collection[int]:
        self.pause()
        return self._world.verify(step)

    def place(self, step: Step, handle: int) -> None:
        self.pause()
        self._world.place(step, handle)


# ---------------------------------------------------------------- what a schedule cannot show


SHAPE = PipelineShape(num_layers=3, num_rows=4, rows_per_step=2, read_ahead_steps=2)


def test_a_failed_row_takes_those_behind_it_along() -> None:
    world = World(SHAPE, {(1, 1): Stage.VERIFY, (1, 3): Stage.READ})
    with closing(CpuStreams()) as streams:
        pipeline = LayerPipeline(world, SHAPE, streams_of(streams))
        pipeline.start()
        assert [pipeline.wait_layer(layer, 5.0) for layer in range(3)][1:] == [1, 1]
        assert pipeline.num_layers_ready() == 3
        assert RowFailure(1, 1, Stage.VERIFY) in pipeline.failures
        assert "1 of 4 rows" in repr(pipeline)
        assert not [place for place in world.reads if place[0] == 2 and place[1] >= 2]


def test_a_read_that_hangs_costs_no_more_than_the_time_out() -> None:
    """What was settled before it counts; the target is not given back before the read ended."""
    held = threading.Event()

    class Hanging(World):
        def read(self, step: Step) -> Collection[int]:
            if (step.layer, step.first_row) == (1, 2):
                held.wait(10)
            return super().read(step)

    world = Hanging(SHAPE, {})
    with closing(CpuStreams()) as streams:
        pipeline = LayerPipeline(world, SHAPE, streams_of(streams))
        pipeline.start()
        assert pipeline.wait_layer(0, 5.0) == 4
        assert pipeline.wait_layer(1, 0.2) == 2
        assert pipeline.wait_layer(2, 0.0) == 0
        assert pipeline.num_layers_ready() == 1
        assert not pipeline.cancel(0.05)
        assert not pipeline.is_done
        held.set()
        assert pipeline.cancel(5.0)
        assert pipeline.is_done
        assert (2, 0) not in world.reads


@pytest.mark.parametrize("stage", ["read", "verify", "place"])
def test_a_defect_comes_out_of_the_wait_and_hurts_no_other(stage: str) -> None:
    class Defect(World):
        pass

    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError("injected")

    setattr(Defect, stage, fail)
    with closing(CpuStreams()) as streams:
        bad = LayerPipeline(Defect(SHAPE, {}), SHAPE, streams_of(streams))
        good = LayerPipeline(World(SHAPE, {}), SHAPE, streams_of(streams))
        bad.start()
        good.start()
        with pytest.raises(ZeroDivisionError, match="injected"):
            bad.wait_layer(0, 5.0)
        assert good.wait_layer(2, 5.0) == 4
        assert bad.cancel(5.0)


def test_nothing_to_load_is_done_at_once() -> None:
    shape = PipelineShape(num_layers=3, num_rows=0, rows_per_step=2, read_ahead_steps=2)
    with closing(CpuStreams()) as streams:
        pipeline = LayerPipeline(World(shape, {}), shape, streams_of(streams))
        pipeline.start()
        assert (pipeline.wait_layer(2, 0.0), pipeline.num_layers_ready()) == (0, 3)
        assert pipeline.is_done
