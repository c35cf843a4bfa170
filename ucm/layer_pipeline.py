"""`LayerPipeline`: rows of slabs on their way into a pool, layer by layer, an event a layer.

    step      some rows of one layer; layer-major: all of layer 0, then all of layer 1, ...
    read      step 0 | step 1 | step 2 | ...            a stream that blocks on files
    verify             step 0 | step 1 | ...            a stream that blocks on checksums
    place                       step 0 | step 1 | ...   the pool's: threads or CUDA; records events
    compute                              wait_layer(0) -> layer 0 | wait_layer(1) -> ...

Invariants
* A row counts for layer l only when its slabs of layers 0..l were read *and* verified; only rows
  that are verified are placed, and what is computed after `wait_layer` is ordered behind that. So
  no attention starts before its last slab was verified.
* Rows are a prefix's blocks: one that fails takes those behind it along, from its layer on. They
  are not read any more.
* At most `read_ahead_steps` steps are begun and not settled, and each has a staging slot of its own
  until it is placed: a slot is read into again only behind the placement that empties it.
* A step is begun when an earlier one is settled, so pipelines that share streams take turns.
* A step is settled when its placement was carried out (threads) or enqueued (CUDA): in order, on
  the place stream.

What the work raises is a failure of its rows when it is an error that I/O has (`WORK_ERRORS`); any
other ends the pipeline and comes out of `wait_layer`. The streams themselves never fail by it.

Pipelining by layers: "Cost-Efficient Large Language Model Serving for Multi-turn Conversations with
CachedAttention" (arXiv 2403.19708), section 3.2.
"""

from __future__ import annotations

import enum
import math
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from .errors import CapacityError, InvalidArgumentError, UcmError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from ucm.kernels.streams import Event, Stream

WORK_ERRORS: Final = (UcmError, OSError)
"""What reading, verifying and placing may fail with."""


class Stage(enum.StrEnum):
    """Where a row can fail."""

    READ = "read"
    VERIFY = "verify"
    PLACE = "place"


@dataclass(frozen=True, slots=True)
class Step:
    """Rows `first_row .. last_row - 1` of one layer, in a staging slot."""

    layer: int
    first_row: int
    last_row: int
    slot: int
    """0..read_ahead_steps-1: nobody else's until the step is placed."""

    @property
    def rows(self) -> range:
        """Its rows."""
        return range(self.first_row, self.last_row)


@dataclass(frozen=True, slots=True)
class RowFailure:
    """A row that did not arrive."""

    layer: int
    row: int
    stage: Stage


class LayerWork(Protocol):
    """What is done to one step. Calls of one stage come in the order of the steps."""

    def read(self, step: Step) -> Collection[int]:
        """Bring the rows to the step's slot; blocks. Returns the rows that could not be read."""

    def verify(self, step: Step) -> Collection[int]:
        """Compare the rows in the slot with their checksums; blocks. Returns the wrong ones."""

    def place(self, step: Step, handle: int) -> None:
        """Bring the rows from the slot to the pool, in the order of the stream `handle`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineShape:
    """How much there is, and in which portions."""

    num_layers: int
    num_rows: int
    rows_per_step: int
    """Rows read together: more are fewer requests, fewer are an earlier first layer."""
    read_ahead_steps: int
    """Steps begun and not settled, at most: the number of staging slots."""

    def __post_init__(self) -> None:
        if min(self.num_layers, self.rows_per_step, self.read_ahead_steps) < 1 or self.num_rows < 0:
            raise InvalidArgumentError(f"a pipeline of no size: {self}")

    @property
    def steps_per_layer(self) -> int:
        """Steps of one layer."""
        return math.ceil(self.num_rows / self.rows_per_step)

    def step(self, index: int) -> Step:
        """Step number `index`, in layer-major order."""
        layer, part = divmod(index, self.steps_per_layer)
        first = part * self.rows_per_step
        last = min(self.num_rows, first + self.rows_per_step)
        return Step(layer, first, last, index % self.read_ahead_steps)


@dataclass(frozen=True, slots=True)
class PipelineStreams:
    """Where the stages run; several pipelines may share them."""

    read: Stream
    """Of threads: reads block."""
    verify: Stream
    """Of threads; another one than `read`."""
    place: Stream
    """Of whichever moves the pool's memory."""


class LayerPipeline:
    """One load; see the module. `wait_layer` is for one thread, the rest for any."""

    def __init__(self, work: LayerWork, shape: PipelineShape, streams: PipelineStreams) -> None:
        self._work = work
        self._shape = shape
        self._streams = streams
        self._num_steps = shape.num_layers * shape.steps_per_layer
        self._placed: list[Event | None] = []
        """For each settled step the event behind its placement; None when nothing was placed."""
        self._num_begun = 0
        self._num_good = shape.num_rows
        self._failures: list[RowFailure] = []
        self._error: BaseException | None = None
        self._is_cancelled = False
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return (
            f"LayerPipeline({len(self._placed)} of {self._num_steps} steps, "
            f"{self._num_good} of {self._shape.num_rows} rows)"
        )

    @property
    def failures(self) -> tuple[RowFailure, ...]:
        """Rows that failed, each where it did so first; those that it took along are not listed."""
        return tuple(self._failures)

    @property
    def num_good_rows(self) -> int:
        """Leading rows that have not failed so far."""
        return self._num_good

    @property
    def num_steps_left(self) -> int:
        """Steps that are not settled and still of use."""
        return self._num_steps - len(self._placed) if self._num_good else 0

    @property
    def is_done(self) -> bool:
        """Whether nothing is going on any more: all settled, nothing good left, or cancelled."""
        with self._changed:
            return self._is_settled_up_to(self._num_steps) and self._is_idle()

    def start(self) -> None:
        """Begin to read; returns at once. Call once."""
        for _ in range(min(self._shape.read_ahead_steps, self._num_steps)):
            self._begin_next()

    def wait_layer(self, layer: int, timeout_s: float, compute: Stream | None = None) -> int:
        """Wait until a layer's rows are verified, and order a stream behind their placement.

        Blocks until all of the layer's steps are settled, but not longer than `timeout_s`; what is
        not settled then does not count now.

        Args:
            layer: of the attention that comes next.
            timeout_s: longest wait, for the verification and, without `compute`, the placement.
            compute: what is submitted to it from now on happens behind the placement; None waits
                for that here.

        Returns:
            Leading rows whose slabs of layers 0..`layer` are verified and placed (in `compute`'s
            order). Rows that have failed in a later layer already do not count: the sooner the
            caller knows, the less it computes in vain.

        Raises:
            BaseException: a defect of the work; what it raised.
        """
        stop_s = time.monotonic() + timeout_s
        target = (layer + 1) * self._shape.steps_per_layer
        with self._changed:
            self._changed.wait_for(lambda: self._is_settled_up_to(target), timeout_s)
            if self._error is not None:
                raise self._error
            num_settled = min(len(self._placed), target)
            placed = self._last_placed(num_settled)
        if placed is not None and not self._is_ordered(placed, compute, stop_s):
            return 0
        with self._changed:
            if self._num_good == 0 or num_settled == target:
                return self._num_good
            late = self._shape.step(num_settled)
            return min(self._num_good, late.first_row) if late.layer == layer else 0

    def num_layers_ready(self) -> int:
        """Layers that `wait_layer` would not wait for."""
        with self._changed:
            if self._num_good == 0:
                return self._shape.num_layers
            ready = len(self._placed) // max(1, self._shape.steps_per_layer)
            while ready:
                placed = self._last_placed(ready * self._shape.steps_per_layer)
                if placed is None or placed.is_reached:
                    break
                ready -= 1
            return ready

    def cancel(self, timeout_s: float) -> bool:
        """Begin nothing more, and wait for what is under way.

        Returns:
            True when nobody writes to the pool or to the slots any more; False when something still
            may after `timeout_s`, such as a read that hangs. Ask again later, and keep both.
        """
        stop_s = time.monotonic() + timeout_s
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()
            if not self._changed.wait_for(self._is_idle, timeout_s):
                return False
        try:
            placed = self._streams.place.record()
            return placed.wait(max(0.0, stop_s - time.monotonic()))
        except CapacityError:
            return False
        except UcmError:  # a device that failed does nothing any more
            return True

    def _is_idle(self) -> bool:
        return self._num_begun == len(self._placed)

    def _is_settled_up_to(self, target: int) -> bool:
        is_over = self._is_cancelled or self._num_good == 0 or self._error is not None
        return is_over or len(self._placed) >= target

    def _last_placed(self, num_settled: int) -> Event | None:
        """The event behind all placements of the first steps; their stream is in order."""
        placed = (event for event in reversed(self._placed[:num_settled]) if event is not None)
        return next(placed, None)

    def _is_ordered(self, placed: Event, compute: Stream | None, stop_s: float) -> bool:
        try:
            if compute is not None:
                compute.wait_for(placed)
                return True
            return placed.wait(max(0.0, stop_s - time.monotonic()))
        except UcmError:  # found by the device afterwards: nothing of it can be trusted
            self._fail_all()
            return False

    def _fail_all(self) -> None:
        with self._changed:
            self._num_good = 0
            self._changed.notify_all()

    # ------------------------------------------------------------ the stages, each on its stream

    def _begin_next(self) -> None:
        with self._changed:
            is_over = self._is_cancelled or self._num_good == 0 or self._error is not None
            if is_over or self._num_begun == self._num_steps:
                return
            index = self._num_begun
            self._num_begun += 1
        self._hop(self._streams.read, self._read, index)

    def _read(self, index: int) -> None:
        step = self._wanted(index)
        self._try(step, Stage.READ, lambda: self._read_into_slot(index, step))
        self._hop(self._streams.verify, self._verify, index)

    def _read_into_slot(self, index: int, step: Step) -> Collection[int]:
        last_use = index - self._shape.read_ahead_steps
        emptied = self._last_placed(last_use + 1) if last_use >= 0 else None
        if emptied is not None:
            emptied.wait()
        return self._work.read(step)

    def _verify(self, index: int) -> None:
        step = self._wanted(index)
        self._try(step, Stage.VERIFY, lambda: self._work.verify(step))
        verified, place, event = self._wanted(index), self._streams.place, None
        if verified.rows:
            place.submit(lambda handle: self._place(verified, handle))
            event = place.record()
        # There, too, so that steps settle in order, and not before `_place` had its say.
        place.submit(lambda _handle: self._settle(event))

    def _place(self, step: Step, handle: int) -> None:
        def place() -> tuple[int, ...]:
            self._work.place(step, handle)
            return ()

        self._try(step, Stage.PLACE, place)

    def _settle(self, event: Event | None) -> None:
        with self._changed:
            self._placed.append(event)
            self._changed.notify_all()
        self._begin_next()

    def _hop(self, stream: Stream, stage: Callable[[int], None], index: int) -> None:
        """Run a step's next stage on its stream; a defect ends the pipeline, not the stream."""

        def run(_handle: int) -> None:
            try:
                stage(index)
            except BaseException as error:  # noqa: BLE001  belongs to who waits
                self._abort(error)

        try:
            stream.submit(run)
        except UcmError as error:
            self._abort(error)

    def _abort(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._placed.append(None)
            self._changed.notify_all()

    def _wanted(self, index: int) -> Step:
        """A step without the rows that are no use any more."""
        step = self._shape.step(index)
        num_wanted = 0 if self._is_cancelled else self._num_good
        last = max(step.first_row, min(step.last_row, num_wanted))
        return Step(step.layer, step.first_row, last, step.slot)

    def _try(self, step: Step, stage: Stage, action: Callable[[], Collection[int]]) -> None:
        """Do a stage's work, if there is any; its failures are the rows'."""
        if not step.rows:
            return
        try:
            failed = action()
        except WORK_ERRORS:
            failed = step.rows
        except BaseException as error:  # noqa: BLE001  belongs to who waits, as a future's does
            with self._changed:
                self._error = error
            failed = step.rows
        if failed:
            self._fail(step, stage, failed)

    def _fail(self, step: Step, stage: Stage, rows: Collection[int]) -> None:
        with self._changed:
            found = [row for row in sorted(rows) if row < self._num_good]
            self._failures += [RowFailure(step.layer, row, stage) for row in found]
            self._num_good = min([self._num_good, *found])
            self._changed.notify_all()
