"""`LayerReader`: brings the blocks of a load plan into an engine's pool, layer by layer.

    connector              reader's threads
    start()         ->     step, step, step ...      as far ahead as `read_ahead_layers` allows
    wait_layer(0)   <-     every slab of layer 0 is in the pool and verified, or given up
    wait_layer(1)   <-     ...                       while the engine computes layer 0
    cancel()        ->     nothing is begun any more; what writes to the pool is waited for

Invariants
    * `wait_layer(l)` counts a block only when its slabs of layers 0..l are all in the target and
      each had its checksum there, after the last write to it.
    * When `cancel` has returned True, nobody writes to the target any more. It returns False while
      a read hangs that goes straight to the target: that memory must not be used for anything
      else until a later `cancel` says True.
    * In the order from the back every read goes through scratch, so `give_up_below` returns soon
      whatever the disk does, and nothing below is written after it.
    * Nothing raises for a block. Threads are at most `MAX_THREADS` in the process, so that hung
      reads cannot pile up: a reader that gets none says so (`error`) and every block is missing.
    * A plan whose time is up is not begun on any more. Its limit on reads is kept to.

Envelope: a step's hand-over costs some 15 us; threads of a reader start in 0.1 ms each.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from . import tracing
from .errors import InvalidArgumentError
from .layout import MAX_LAYERS
from .load_steps import LEAST_LAYERS, Step, own_steps, promoted_steps
from .slab_ledger import SlabLedger
from .slab_mover import Outcome, Scratch, SlabMover, SlabTarget
from .tracing import Track
from .types import BlockKey, LoadOrder, SourceKind

if TYPE_CHECKING:
    from ucm.storage.file_io import FileIo

    from .api import SlabChecksums
    from .layout import KvLayout
    from .load_plan import LoadPlan

_log = logging.getLogger(__name__)

MAX_THREADS: Final = 64
"""Of all readers of a process."""

PROGRESS_TURN_S: Final = 0.1
"""How long a thread waits for promotions before it looks whether somebody cancelled."""

_threads = threading.BoundedSemaphore(MAX_THREADS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderOptions:
    """How far ahead, how large, how many at once."""

    read_ahead_layers: int = 4
    """Layers that may be read beyond the one that was last waited for; at least 1. Before the
    first wait so many are read."""
    request_bytes: int = 256 << 10
    """Longest read; adjacent layers of a block are one. Smaller ones bring a layer sooner, larger
    ones cost less processor time."""
    compute_per_load: float = math.inf
    """How many times as long computing a layer takes as loading it; where that is little, reads
    are of fewer layers. See `layer_groups`."""
    least_layers: int = LEAST_LAYERS
    """Of one read, but of layer 0: 1 where a slab takes long beside asking for it."""
    num_threads: int = 4
    """Reads at once, 1 to `MAX_THREADS`."""
    order: LoadOrder = LoadOrder.LAYERS

    def __post_init__(self) -> None:
        if not 1 <= self.read_ahead_layers <= MAX_LAYERS:
            raise InvalidArgumentError(f"read_ahead_layers: 1 to {MAX_LAYERS}")
        if self.request_bytes < 1 or not 1 <= self.num_threads <= MAX_THREADS:
            raise InvalidArgumentError(f"request_bytes: from 1; num_threads: 1 to {MAX_THREADS}")

    @property
    def sizes(self) -> tuple[int, float, int]:
        """What `own_steps` asks about reads."""
        return self.request_bytes, self.compute_per_load, self.least_layers


class _Queue:
    """Steps in order, looked at before they are taken."""

    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps
        self.head: Step | None = next(steps, None)

    def take(self) -> Step:
        assert self.head is not None, "there is a step"
        step, self.head = self.head, next(self._steps, None)
        return step

    def skip(self, ledger: SlabLedger) -> None:
        """Drop steps in front of which nothing is wanted any more."""
        while self.head is not None and (
            self.head.stop_block <= ledger.floor or self.head.first_block >= ledger.limit
        ):
            self.head = next(self._steps, None)


class LayerReader:
    """Loads one plan. Thread-safe.

    The end is the caller's: first `cancel`, then `complete_load` with `corrupt_keys()`.
    """

    def __init__(
        self,
        plan: LoadPlan,
        layout: KvLayout,
        target: SlabTarget,
        io: FileIo,
        options: ReaderOptions | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            plan: from `CacheApi.begin_load`; of its blocks the leading READY ones are loaded.
            layout: of the namespace.
            target: where slabs go.
            io: how extents are read; see `ucm.reader_io`. The caller closes it.
            options: see `ReaderOptions`.
        """
        self.plan = plan
        self.options = options or ReaderOptions()
        blocks = plan.blocks[: plan.num_ready]
        sources = [block.source or SourceKind.MEMORY for block in blocks]
        order = self.options.order
        self._from_back = order is LoadOrder.BLOCKS_FROM_BACK
        self._layout = layout
        self._deadline_s = time.monotonic() + plan.timeout_s
        self._ledger = SlabLedger(len(blocks), layout.num_layers, from_back=self._from_back)
        self._mover = SlabMover(plan, layout, target, io, self)
        self._own = _Queue(own_steps(sources, layout, order, *self.options.sizes))
        self._promoted = _Queue(promoted_steps(sources, layout, order))
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        """Steps may have become possible."""
        self._settled = threading.Condition(lock)
        """Slabs have settled, or a write ended."""
        self._horizon = self.options.read_ahead_layers
        self._awaited: list[int] = []
        """Layers that somebody waits for."""
        self._num_isolating = 0
        """Callers that wait for writes to end."""
        self._writing: dict[int, int] = {}
        self._bad: set[int] = set()
        self._suspects: list[BlockKey] = []
        self._num_threads = 0
        self._is_watched = False
        self._is_started = False
        self._is_cancelled = False
        self._error = ""
        self._num_busy = 0
        """Threads that read, copy or wait for promotions."""
        self._busy_since_s = 0.0
        self._busy_s = 0.0
        self._num_steps = 0
        self._on_progress: Callable[[], None] | None = None

    # ------------------------------------------------------------ for the engine's side

    def start(self, on_progress: Callable[[], None] | None = None) -> None:
        """Begin; returns at once. A second call does nothing.

        Args:
            on_progress: called when a layer is complete, a block from the back, or one failed, on
                the reader's threads, without its lock; it must not block.
        """
        with self._work:
            if self._is_started or self._is_cancelled:
                return
            self._is_started, self._on_progress = True, on_progress
            wanted = self.options.num_threads if self._ledger.num_missing() else 0
            self._num_threads = wanted
        # Without the lock: the first thread reads while the others start.
        num_refused = [_started(self._run, number) for number in range(wanted)].count(False)
        if wanted and num_refused == wanted:
            with self._work:
                self._give_up_locked("every thread for reads is taken: earlier ones hang")
        if num_refused or not wanted:
            self._leave(num_refused)

    def wait_layer(self, layer: int, timeout_s: float) -> int:
        """Wait until layers 0..layer are settled, or time is up.

        Lets the layers up to `read_ahead_layers` beyond be read.

        Returns:
            How many leading blocks of the plan have all their slabs of layers 0..layer in the
            target, verified.
        """
        with self._work:
            horizon = layer + 1 + self.options.read_ahead_layers
            if horizon > self._horizon:
                self._horizon = horizon
                if self._in_reach(self._promoted.head) or self._in_reach(self._own.head):
                    self._work.notify_all()  # else threads wake up for nothing, layer by layer
            self._awaited.append(layer)
            self._settled.wait_for(
                lambda: self._is_cancelled or self._ledger.is_settled(layer), max(0.0, timeout_s)
            )
            self._awaited.remove(layer)
            return self._ledger.num_leading(layer)

    def num_layers_ready(self) -> int:
        """Layers 0, 1, ... of which no slab is still to come."""
        with self._work:
            return self._ledger.num_layers_ready()

    def num_blocks_ready_from_back(self) -> int:
        """Blocks at the end of the plan's READY ones, the last included, that are complete."""
        with self._work:
            return self._ledger.num_from_back()

    def bytes_left(self) -> int:
        """Bytes of slabs that are still to come."""
        with self._work:
            return self._ledger.num_missing() * self._layout.slab_bytes

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come: all is settled, or the reader was cancelled."""
        with self._work:
            return self._is_cancelled or not self._ledger.num_missing()

    @property
    def error(self) -> str:
        """What kept the reader from working at all; empty when nothing did."""
        return self._error

    def moved_bytes(self) -> int:
        """Bytes of slabs that came into the target and were right."""
        with self._work:
            return self._ledger.num_arrived() * self._layout.slab_bytes

    def effort(self) -> tuple[int, float]:
        """Steps begun, and seconds during which at least one was under way."""
        with self._work:
            now_s = time.monotonic() if self._num_busy else self._busy_since_s
            return self._num_steps, self._busy_s + now_s - self._busy_since_s

    @property
    def num_threads_alive(self) -> int:
        """Threads that have not ended; one that hangs in a read has not."""
        return self._num_threads

    def corrupt_keys(self) -> tuple[BlockKey, ...]:
        """Blocks that could not be read, or were not what they should be: for `complete_load`."""
        with self._work:
            return tuple(self._suspects)

    def give_up_below(self, block: int) -> None:
        """The caller computes the plan's blocks below `block`: nothing of them is written any more.

        Waits for copies under way, not for reads.

        Raises:
            InvalidArgumentError: not in the order from the back.
        """
        if not self._from_back:
            raise InvalidArgumentError("blocks are given up in the order from the back only")
        with self._work:
            self._ledger.give_up_below(block)
            self._work.notify_all()
            self._settled.notify_all()
            self._wait_unwritten_locked(lambda index: index < block, None)

    def cancel(self, timeout_s: float = 0.0) -> bool:
        """Begin nothing more, and wait until nobody writes to the target; may be repeated.

        Returns:
            Whether the target is the caller's again. False: a read into it hangs.
        """
        with self._work:
            self._is_cancelled = True
            self._work.notify_all()
            self._settled.notify_all()
            return self._wait_unwritten_locked(lambda _: True, max(0.0, timeout_s))

    def _wait_unwritten_locked(
        self, concerns: Callable[[int], bool], timeout_s: float | None
    ) -> bool:
        """Wait until no block that `concerns` the caller is being written."""
        self._num_isolating += 1
        try:
            return self._settled.wait_for(lambda: not any(map(concerns, self._writing)), timeout_s)
        finally:
            self._num_isolating -= 1

    # ------------------------------------------------------------ for the mover

    def begin_write(self, block: int) -> bool:
        """See `WriteGate.begin_write`."""
        with self._work:
            if self._is_cancelled or not self._ledger.is_wanted(block):
                return False
            self._writing[block] = self._writing.get(block, 0) + 1
            return True

    def end_write(self, block: int) -> None:
        """See `WriteGate.end_write`."""
        with self._work:
            self._writing[block] -= 1
            if not self._writing[block]:
                del self._writing[block]
            if self._num_isolating:
                self._settled.notify_all()

    def wait_turn(self, block: int, num_bytes: int) -> bool:
        """See `WriteGate.wait_turn`. Nothing is being written meanwhile: `cancel` need not wait."""
        limit = self.plan.read_limit
        if limit is None or (delay_s := limit.take(num_bytes)) <= 0:
            return True
        with self._work:
            is_useless = self._work.wait_for(
                lambda: self._is_cancelled or not self._ledger.is_wanted(block), delay_s
            )
        if is_useless:
            limit.take(-num_bytes)
        return not is_useless

    def wait_checksums(self, block: int) -> SlabChecksums | None:
        """See `WriteGate.wait_checksums`."""
        sums = self._mover.checksums.get(block)
        if sums is not None:
            return sums
        with self._work:
            self._work.wait_for(
                lambda: (
                    block in self._mover.checksums
                    or self._is_cancelled
                    or not self._ledger.is_wanted(block)
                )
            )
            return self._mover.checksums.get(block)

    # ------------------------------------------------------------ the threads

    def _run(self) -> None:
        scratch = Scratch()
        try:
            while (step := self._next_step()) is not None:
                begun_us = tracing.now_us()
                outcomes = self._mover.move(step, scratch, in_scratch=self._from_back)
                self._trace(step, begun_us)
                self._settle(step, outcomes)
        except Exception as error:  # noqa: BLE001  the thread's outermost loop
            _log.exception("a load failed in an unforeseen way")
            with self._work:
                self._give_up_locked(f"{type(error).__name__}: {error}")
            self._call_back()
        finally:
            _threads.release()
            self._leave(1)

    def _trace(self, step: Step, begun_us: int) -> None:
        """Tell who looks; from the back, blocks are read whole and belong to no layer."""
        trace = tracing.active()
        if trace is None:
            return
        count = step.stop_layer - step.first_layer
        layers = (-1, 0) if self._from_back else (step.first_layer, count)
        blocks = (step.first_block, step.stop_block - step.first_block)
        trace.add(Track.LOAD, begun_us, tracing.now_us(), layers=layers, blocks=blocks)

    def _leave(self, num_threads: int) -> None:
        with self._work:
            self._num_threads -= num_threads
            is_last = not self._num_threads
        if is_last and self.plan.progress is not None:
            self.plan.progress.close()

    def _next_step(self) -> Step | None:
        """The next step that may be done; None when there is nothing left to do."""
        with self._work:
            while not self._is_over_locked():
                step = self._pick_locked()
                if step is not None:
                    self._num_steps += 1
                    self._begin_busy_locked()
                    return step
                awaited = self._promoted.head
                if awaited is not None and not self._is_watched and self._in_reach(awaited):
                    self._watch_locked(awaited)
                else:
                    self._work.wait(max(0.0, self._deadline_s - time.monotonic()))
            return None

    def _begin_busy_locked(self) -> None:
        if not self._num_busy:
            self._busy_since_s = time.monotonic()
        self._num_busy += 1

    def _end_busy_locked(self) -> None:
        self._num_busy -= 1
        if not self._num_busy:
            now_s = time.monotonic()
            self._busy_s += now_s - self._busy_since_s
            self._busy_since_s = now_s

    def _is_over_locked(self) -> bool:
        self._promoted.skip(self._ledger)
        self._own.skip(self._ledger)
        if self._is_cancelled or (self._own.head is None and self._promoted.head is None):
            return True
        if time.monotonic() >= self._deadline_s:
            self._give_up_locked("the plan's time is up")
            return True
        return False

    def _pick_locked(self) -> Step | None:
        promoted, own = self._promoted.head, self._own.head
        if promoted is not None and self._in_reach(promoted) and self._has_come(promoted):
            return self._promoted.take()
        return self._own.take() if self._in_reach(own) else None

    def _has_come(self, step: Step) -> bool:
        progress = self.plan.progress  # without one they never come: the mover will say so
        return progress is None or progress.num_done() >= step.num_promoted

    def _in_reach(self, step: Step | None) -> bool:
        return step is not None and step.first_layer < self._horizon

    def _watch_locked(self, step: Step) -> None:
        """Wait for promotions, outside the lock, one thread at a time."""
        progress = self.plan.progress
        self._is_watched = True
        self._begin_busy_locked()
        self._work.release()
        try:
            if progress is not None:
                progress.wait(step.num_promoted, PROGRESS_TURN_S)
        finally:
            self._work.acquire()
            self._end_busy_locked()
            self._is_watched = False
            self._work.notify_all()

    def _settle(self, step: Step, outcomes: list[Outcome]) -> None:
        with self._work:
            self._end_busy_locked()
            if self._is_cancelled:  # the target may be used for something else: this is history
                return
            ledger = self._ledger
            before = ledger.num_layers_ready(), ledger.floor, ledger.limit
            for outcome in outcomes:
                self._settle_one_locked(step, outcome)
            is_news = before != (ledger.num_layers_ready(), ledger.floor, ledger.limit)
            if is_news and any(map(ledger.is_settled, self._awaited)):
                self._settled.notify_all()
            if is_news or step.first_layer == 0:
                # nothing left to wait for, or a header whose checksums others wait for
                self._work.notify_all()
        if is_news or self._from_back:
            self._call_back()

    def _settle_one_locked(self, step: Step, outcome: Outcome) -> None:
        index = outcome.block
        if outcome.is_good:
            self._ledger.arrive(index, step.first_layer, step.stop_layer)
        elif not outcome.is_dropped:
            self._ledger.fail(index)
            if outcome.is_suspect and index not in self._bad:
                self._bad.add(index)
                self._suspects.append(self.plan.blocks[index].key)

    def _call_back(self) -> None:
        if self._on_progress is not None:
            self._on_progress()

    def _give_up_locked(self, why: str) -> None:
        """Nothing more will come; what came so far counts."""
        self._error = self._error or why
        self._is_cancelled = True
        self._work.notify_all()
        self._settled.notify_all()


def _started(run: Callable[[], None], number: int) -> bool:
    """Start one thread, if there may be one more."""
    if not _threads.acquire(blocking=False):
        return False
    try:
        threading.Thread(target=run, name=f"ucm-load-{number}", daemon=True).start()
    except RuntimeError:  # the system has no more threads
        _threads.release()
        return False
    return True
