"""One request's load: when it waits, when it gives up, and what it says is in the pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ucm.connectors.load_job import CHUNK_THREADS, LoadJob, LoadTask
from ucm.cost_model import CostModel, CostOptions
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.load_decision import LoadKind, LoadShape, forced
from ucm.load_plan import LoadPlan
from ucm.storage.file_io import FileIo, PosixFileIo
from ucm.testing.extent_files import PAGE_LAYOUT, ExtentFile, GatedIo, wait_for
from ucm.testing.slab_pool import SlabPool, slabs_of
from ucm.types import LoadStatus, TierKind

NUM_BLOCKS = 4
LAST = PAGE_LAYOUT.num_layers - 1
BLOCK_BYTES = PAGE_LAYOUT.num_layers * PAGE_LAYOUT.slab_bytes
PATIENCE_S = 0.1
LONG_S = 10.0


class Desk:
    """A job over a file of our own, and what the desk does for it."""

    def __init__(
        self,
        folder: Path,
        kind: LoadKind,
        io: FileIo,
        patience_s: float,
        contention_s_per_byte: float = 1e-9,
    ) -> None:
        self.file = ExtentFile(folder / "0000.seg", PAGE_LAYOUT, NUM_BLOCKS)
        self.pool = SlabPool(PAGE_LAYOUT, NUM_BLOCKS)
        self.held: list[int] = []
        self._io = io
        self.model = CostModel(CostOptions(contention_s_per_byte=contention_s_per_byte))
        shape = LoadShape(
            num_tokens=(NUM_BLOCKS + 1) * PAGE_LAYOUT.block_tokens,
            num_local_tokens=0,
            tiers=(TierKind.NVME,) * NUM_BLOCKS,
            block_tokens=PAGE_LAYOUT.block_tokens,
            block_bytes=BLOCK_BYTES,
            num_layers=PAGE_LAYOUT.num_layers,
            can_direct=True,
        )
        task = LoadTask(
            request_id="r",
            keys=tuple(self.file.keys),
            tiers=shape.tiers,
            target=self.pool,
            hold=self._hold,
            decision=forced(kind, is_from_back=True)(self.model, shape),
            patience_s=patience_s,
        )
        self.job = LoadJob(task, PAGE_LAYOUT, self.model)

    def _hold(self, places: Sequence[int]) -> Callable[[], None]:
        self.held.extend(places)
        return self.held.clear

    def reader(self, plan: LoadPlan, options: ReaderOptions) -> LayerReader:
        return LayerReader(plan, PAGE_LAYOUT, self.pool, self._io, options)

    def stuck_reader(self, plan: LoadPlan, options: ReaderOptions) -> LayerReader:
        return StuckReader(plan, PAGE_LAYOUT, self.pool, self._io, options)

    def eager_reader(self, plan: LoadPlan, options: ReaderOptions) -> LayerReader:
        return EagerReader(plan, PAGE_LAYOUT, self.pool, self._io, options)

    def open(self, plan: LoadPlan | None = None) -> bool:
        return self.job.open(plan or self.file.plan(), self.reader)


class StuckReader(LayerReader):
    """One with a copy under way that does not end in time."""

    def cancel(self, timeout_s: float = 0.0) -> bool:
        super().cancel(timeout_s)
        return False


class EagerReader(LayerReader):
    """One that has read what there is before whoever starts it runs on."""

    def start(self, on_progress: Callable[[], None] | None = None) -> None:
        super().start(on_progress)
        assert wait_for(lambda: self.is_done)


def test_reads_are_as_long_as_a_pass_beside_them_allows(tmp_path: Path) -> None:
    """What the load itself takes from the pass makes the pass longer: there is time to hide in."""
    found = []

    def note(plan: LoadPlan, options: ReaderOptions) -> LayerReader:
        found.append(options.compute_per_load)
        return desk.reader(plan, options)

    for contention in (1e-9, 1e-6):
        folder = tmp_path / str(contention)
        folder.mkdir()
        desk = Desk(folder, LoadKind.LOAD_ALL, PosixFileIo(io_threads=1), LONG_S, contention)
        assert desk.job.open(desk.file.plan(), note)
        desk.job.end()
    lost_s = NUM_BLOCKS * BLOCK_BYTES * 1e-6
    load_s = desk.model.load_s(TierKind.NVME, NUM_BLOCKS * BLOCK_BYTES, is_computing=True)
    assert found[1] - found[0] == pytest.approx(lost_s / load_s, rel=0.01)


def lacking_last(plan: LoadPlan) -> LoadPlan:
    """The cache had lost the chain's last block by the time it was asked."""
    lost = replace(plan.blocks[-1], status=LoadStatus.MISS, source=None)
    return replace(plan, blocks=(*plan.blocks[:-1], lost))


@pytest.fixture
def gate() -> Iterator[GatedIo]:
    io = GatedIo()
    yield io
    io.open_gate()


def no_reader(_plan: LoadPlan, _options: ReaderOptions) -> LayerReader:
    raise AssertionError("there is nothing to read")


@pytest.mark.parametrize("lease_s", [0.1, 60.0])
def test_behind_a_pass_that_may_outlast_the_lease_all_is_read_at_once(
    tmp_path: Path, lease_s: float
) -> None:
    """A pass of 0.3 s, by what is believed of an engine that was never measured."""
    desk, seen = Desk(tmp_path, LoadKind.LOAD_ALL, PosixFileIo(io_threads=1), LONG_S), []

    def note(plan: LoadPlan, options: ReaderOptions) -> LayerReader:
        seen.append(options.read_ahead_layers)
        return desk.reader(plan, options)

    assert desk.job.open(replace(desk.file.plan(), timeout_s=lease_s), note)
    desk.job.end()
    decided = desk.job.task.decision.read_ahead_layers
    assert seen == [PAGE_LAYOUT.num_layers if lease_s < 1 else decided]


@pytest.mark.parametrize("kind", [LoadKind.LOAD_ALL, LoadKind.HYBRID])
def test_a_load_that_nobody_hurries_comes_whole(tmp_path: Path, kind: LoadKind) -> None:
    desk = Desk(tmp_path, kind, PosixFileIo(io_threads=1), LONG_S)
    assert desk.job.state().bytes_left == NUM_BLOCKS * BLOCK_BYTES
    assert desk.open()
    assert wait_for(lambda: desk.job.state().is_done)
    state = desk.job.state()
    assert (state.bytes_left, state.stall_s) == (0, 0.0)
    outcome = desk.job.end()
    assert (outcome.num_good, outcome.corrupt, outcome.straggler) == (NUM_BLOCKS, (), None)
    for number in range(NUM_BLOCKS):
        assert desk.pool.block(number) == slabs_of(desk.file.data[number], PAGE_LAYOUT)


@pytest.mark.parametrize(
    ("tier", "is_whole", "num_threads"),
    [
        (TierKind.MEMORY, True, CHUNK_THREADS),
        (TierKind.MEMORY, False, ReaderOptions().num_threads),
        (TierKind.NVME, True, ReaderOptions().num_threads),
    ],
)
def test_a_chunk_is_copied_out_of_memory_by_few_threads(
    tmp_path: Path, tier: TierKind, is_whole: bool, num_threads: int
) -> None:
    desk = Desk(tmp_path, LoadKind.LOAD_ALL, PosixFileIo(io_threads=1), LONG_S)
    task = desk.job.task
    shape = replace(task.decision.shape, is_whole=is_whole)
    task = replace(task, tiers=(tier,) * NUM_BLOCKS, decision=replace(task.decision, shape=shape))
    found: list[ReaderOptions] = []

    def reader(plan: LoadPlan, options: ReaderOptions) -> LayerReader:
        found.append(options)
        return desk.reader(plan, options)

    job = LoadJob(task, PAGE_LAYOUT, CostModel())
    assert job.open(desk.file.plan(), reader)
    assert wait_for(lambda: job.state().is_done)
    assert job.end().num_good == NUM_BLOCKS
    assert [options.num_threads for options in found] == [num_threads]


@pytest.mark.parametrize("kind", [LoadKind.LOAD_ALL, LoadKind.HYBRID])
def test_while_others_compute_a_hung_read_costs_its_request_no_more_than_patience(
    tmp_path: Path, gate: GatedIo, kind: LoadKind
) -> None:
    """Nobody waits for a layer, and the plan's own time is half a minute."""
    desk = Desk(tmp_path, kind, gate, PATIENCE_S)
    assert desk.open()
    assert gate.wait_arrived()
    assert not desk.job.state().is_done
    started_s = time.monotonic()
    assert wait_for(lambda: desk.job.state().is_done, timeout_s=20 * PATIENCE_S)
    assert time.monotonic() - started_s >= PATIENCE_S / 2
    outcome = desk.job.end()
    assert outcome.num_good == 0
    if kind is LoadKind.LOAD_ALL:
        assert outcome.straggler is not None
        assert desk.held == list(range(NUM_BLOCKS))
        gate.open_gate()
        assert outcome.straggler.reader.cancel(LONG_S)
        outcome.straggler.release()
    assert not desk.held


def test_a_load_to_which_something_comes_goes_on_for_longer_than_patience(
    tmp_path: Path, gate: GatedIo
) -> None:
    desk = Desk(tmp_path, LoadKind.LOAD_ALL, gate, PATIENCE_S)
    assert desk.open()
    started_s = time.monotonic()
    while left := desk.job.state().bytes_left:
        assert not desk.job.state().is_done
        assert gate.wait_arrived()
        gate.let_one_pass()
        # The first read of a block brings its checksums: a later one may have to wait for it.
        while not wait_for(lambda: desk.job.state().bytes_left < left, PATIENCE_S / 10):
            gate.let_one_pass()
        time.sleep(PATIENCE_S / 4)
    assert time.monotonic() - started_s > PATIENCE_S
    assert desk.job.state().is_done
    assert desk.job.end().num_good == NUM_BLOCKS


@pytest.mark.parametrize("num_ready", range(1, LAST + 1))
def test_a_layer_is_good_when_it_is_there_not_when_the_one_before_is(
    tmp_path: Path, num_ready: int
) -> None:
    class HalfwayReader(LayerReader):
        """One that has read so many layers and reads no more."""

        def start(self, on_progress: Callable[[], None] | None = None) -> None:
            pass

        def num_layers_ready(self) -> int:
            return num_ready

        def wait_layer(self, layer: int, timeout_s: float) -> int:
            return NUM_BLOCKS if layer < num_ready else 0

    desk = Desk(tmp_path, LoadKind.LOAD_ALL, PosixFileIo(io_threads=1), PATIENCE_S)
    target = desk.pool
    assert desk.job.open(
        desk.file.plan(),
        lambda plan, options: HalfwayReader(
            plan, PAGE_LAYOUT, target, PosixFileIo(io_threads=1), options
        ),
    )
    counts = [desk.job.wait_layer(layer) for layer in range(LAST + 1)]
    assert counts == [NUM_BLOCKS] * num_ready + [0] * (LAST + 1 - num_ready)


def test_a_cache_that_never_answers_costs_no_more_than_patience(tmp_path: Path) -> None:
    desk = Desk(tmp_path, LoadKind.LOAD_ALL, PosixFileIo(io_threads=1), PATIENCE_S)
    assert not desk.job.state().is_done
    assert wait_for(lambda: desk.job.state().is_done, timeout_s=20 * PATIENCE_S)
    outcome = desk.job.end()
    assert (outcome.num_good, outcome.plan) == (0, None)
    assert not desk.job.open(desk.file.plan(), no_reader), "the plan is the caller's to give back"


def test_waits_for_all_layers_share_one_patience(tmp_path: Path, gate: GatedIo) -> None:
    desk = Desk(tmp_path, LoadKind.LOAD_ALL, gate, PATIENCE_S)
    assert desk.open()
    started_s = time.monotonic()
    assert [desk.job.wait_layer(layer) for layer in range(LAST + 1)] == [0] * (LAST + 1)
    assert PATIENCE_S <= time.monotonic() - started_s < 5 * PATIENCE_S
    gate.open_gate()
    desk.job.end()


def test_from_the_back_a_plan_without_the_last_block_is_of_no_use(tmp_path: Path) -> None:
    """It would be read for nothing, while the engine is told to wait for it."""
    desk = Desk(tmp_path, LoadKind.HYBRID, PosixFileIo(io_threads=1), LONG_S)
    plan = lacking_last(desk.file.plan())
    assert desk.job.open(plan, no_reader)
    state = desk.job.state()
    assert (state.is_done, state.num_from_back) == (True, 0)
    assert desk.job.claim(0, NUM_BLOCKS) == NUM_BLOCKS
    outcome = desk.job.end()
    assert (outcome.num_good, outcome.plan) == (0, plan)


def test_in_layers_a_plan_without_the_last_block_is_loaded_as_far_as_it_goes(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, LoadKind.LOAD_ALL, PosixFileIo(io_threads=1), LONG_S)
    assert desk.open(lacking_last(desk.file.plan()))
    assert desk.job.wait_layer(LAST) == NUM_BLOCKS - 1
    assert desk.job.end().num_good == NUM_BLOCKS - 1


def test_what_was_claimed_before_the_plan_came_is_never_written(tmp_path: Path) -> None:
    desk = Desk(tmp_path, LoadKind.HYBRID, PosixFileIo(io_threads=1), PATIENCE_S / 10)
    assert wait_for(lambda: desk.job.claim(0, 2) == 2)
    assert desk.job.open(desk.file.plan(), desk.eager_reader)
    assert wait_for(lambda: desk.job.state().is_done)
    assert desk.job.end().num_good == NUM_BLOCKS - 2
    for number in range(2):
        assert all(desk.pool.is_untouched(layer, number) for layer in range(LAST + 1))


def test_a_reader_that_cannot_be_made_fails_the_load_and_the_plan_is_still_given_back(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, LoadKind.LOAD_ALL, PosixFileIo(io_threads=1), LONG_S)
    plan = desk.file.plan()
    with pytest.raises(AssertionError):
        desk.job.open(plan, no_reader)
    assert desk.job.state().is_done
    assert desk.job.wait_layer(0) == 0
    assert desk.job.end().plan is plan


def test_what_was_claimed_while_it_was_read_is_not_held_at_the_end(
    tmp_path: Path, gate: GatedIo
) -> None:
    """The engine computed those blocks, and may have shared them: they are nobody else's."""
    desk = Desk(tmp_path, LoadKind.HYBRID, gate, PATIENCE_S / 10)
    assert desk.job.open(desk.file.plan(), desk.stuck_reader)
    assert gate.wait_arrived()
    assert wait_for(lambda: desk.job.claim(0, 2) == 2)
    outcome = desk.job.end()
    assert outcome.straggler is not None
    assert (outcome.num_good, desk.held) == (0, [2, 3])


def test_what_was_all_claimed_holds_nothing(tmp_path: Path, gate: GatedIo) -> None:
    desk = Desk(tmp_path, LoadKind.HYBRID, gate, PATIENCE_S / 10)
    assert desk.job.open(desk.file.plan(), desk.stuck_reader)
    assert wait_for(lambda: desk.job.claim(0, NUM_BLOCKS) == NUM_BLOCKS)
    assert desk.job.end().straggler is not None
    assert desk.held == []
