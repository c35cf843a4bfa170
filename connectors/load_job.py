"""`LoadJob`: one request's load, from the decision to its end.

    desk's thread    open(plan)                      the cache's answer: reading begins
    engine's thread  state, wait_layer, claim        how far it is
                     end                             what is good; nothing is written after it

Invariants
    * Until the plan is there nothing is good, and nothing is written.
    * What the engine has claimed is not written any more, whether or not the plan was there.
    * `end` is called once. A plan that arrives after it is given back, unread.
    * All waiting of one job, over all its layers, ends `patience_s` after the first wait for it:
      what is not there by then is a miss, and later waits return at once.
    * A job to which nothing came for `patience_s` is done, whoever hangs: its request computes.

Envelope: a call costs some 20 us, the waiting left out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ucm.cost_model import CostModel
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.load_decision import Decision, claim_blocks
from ucm.load_pipeline import layerwise
from ucm.load_steps import LEAST_LAYERS
from ucm.types import BlockKey, LoadOrder, TierKind

if TYPE_CHECKING:
    from ucm.layout import KvLayout
    from ucm.load_plan import LoadPlan
    from ucm.slab_mover import SlabTarget

SLOW_SLAB_S = 3e-4
"""A slab that takes longer to come is read by itself: asking for it, 0.1 ms of processor time, is
little beside that, and with two at a time a pass that is hardly slower than its load would wait for
two. 172 blocks of 48 KiB at 100 MB/s: 0.48 ms a slab, 84 ms a layer."""
CHUNK_THREADS = 1
"""That copy a chunk out of memory. A prompt's chunks are loads of their own, all at once, and what
they are for is computed meanwhile: 8 x 4 threads on two cores made its first pass, of some 0.3 s
with the load, 60 ms longer than 8 x 1."""
MAX_LEASE_SHARE = 0.5
"""Of the time that a plan lasts, for a pass that reads some layers ahead of what it computes."""
HOLD_TIMEOUT_S = 0.2
"""How long the end of a load waits for a read that goes straight to the pool; then the read's
blocks are held for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTask:
    """What to load and where to."""

    request_id: str
    keys: tuple[BlockKey, ...]
    """Of the blocks to load, in the chain's order."""
    tiers: tuple[TierKind, ...]
    """Where they were found."""
    target: SlabTarget
    """Places of the blocks, by their index in `keys`."""
    hold: Callable[[Sequence[int]], Callable[[], None]]
    """Keeps the places with these indexes out of use until what it returns is called."""
    decision: Decision
    patience_s: float
    """What all waiting for it may take."""
    spent_s: float = 0.0
    """What its request waited for the cache before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """How far a job is; blocks are counted in the task."""

    is_done: bool
    num_good: int
    """Leading blocks that have not failed."""
    num_layers_ready: int
    num_from_back: int
    """Blocks at the end, the last one included, that are complete."""
    bytes_left: int
    stall_s: float
    """Estimate of what a pass that began now would wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A reader with a read that hangs, and the release of the places that it may yet write to."""

    reader: LayerReader
    release: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """What came of a job."""

    plan: LoadPlan | None
    """To be completed; None when the cache never answered."""
    num_good: int
    """Complete, verified blocks: leading ones, or those at the end of a load from the back."""
    corrupt: tuple[BlockKey, ...] = ()
    moved_bytes: int = 0
    beside_bytes: int = 0
    """Of these, what came while nobody waited for a layer."""
    busy_s: float = 0.0
    num_steps: int = 0
    was_beside: bool = False
    """A pass computed for most of the time."""
    straggler: Straggler | None = None


class LoadJob:
    """See the module. Thread-safe."""

    def __init__(self, task: LoadTask, layout: KvLayout, model: CostModel) -> None:
        self.task = task
        self._layout = layout
        self._model = model
        self._changed = threading.Condition()
        self._plan: LoadPlan | None = None
        self._reader: LayerReader | None = None
        self._is_failed = False
        self._is_ended = False
        self._is_joined = False
        self._given_up = 0
        """From the back: end of the blocks that the engine computes itself."""
        self._stop_s: float | None = None
        self._known_layers, self._known_good = 0, 0
        """Leading layers that need not be asked for again, and the blocks that are good in them."""
        self._news_s = time.monotonic()
        """When something came, as far as the engine has looked."""
        self._bytes_left = self.total_bytes
        self.stalled_s = 0.0
        """What the engine has waited for its layers."""
        self._stalled_bytes = 0
        """What came meanwhile."""

    @property
    def total_bytes(self) -> int:
        """Slab bytes of all its blocks."""
        return len(self.task.keys) * self._layout.num_layers * self._layout.slab_bytes

    @property
    def _is_from_back(self) -> bool:
        return self.task.decision.order is LoadOrder.BLOCKS_FROM_BACK

    # The desk's thread

    def open(
        self,
        plan: LoadPlan | None,
        make_reader: Callable[[LoadPlan, ReaderOptions], LayerReader],
        on_progress: Callable[[], None] | None = None,
    ) -> bool:
        """Begin to read what the cache granted; None: it granted nothing.

        Args:
            plan: for the task's keys.
            make_reader: makes a reader that has not started.
            on_progress: see `LayerReader.start`.

        Returns:
            False when the job has ended meanwhile: the plan is the caller's to give back.
        """
        with self._changed:
            if self._is_ended:
                return False
            self._changed.notify_all()
            self._plan, self._is_failed = plan, True  # and so it stays if making a reader fails
            if plan is not None and self._is_of_use(plan):
                reader = make_reader(plan, self._reader_options(plan.timeout_s))
                if self._given_up:  # before anything is read: the engine computes into it
                    reader.give_up_below(self._given_up)
                self._reader, self._is_failed = reader, False
                reader.start(on_progress)
            return True

    def fail(self) -> None:
        """Nothing will come."""
        with self._changed:
            self._is_failed = True
            self._changed.notify_all()

    def _is_of_use(self, plan: LoadPlan) -> bool:
        """From the back, a plan without the last block would leave a gap in the chain."""
        return plan.num_ready >= (len(self.task.keys) if self._is_from_back else 1)

    def _reader_options(self, lease_s: float) -> ReaderOptions:
        decision, load_s = self.task.decision, self._load_s(self.total_bytes)
        shape, num_layers = decision.shape, self._layout.num_layers
        slab_s = load_s / (num_layers * len(self.task.keys))
        known = self._model
        most_tokens = known.options.joined_tokens if shape.is_alone else known.options.chunk_tokens
        pass_s = num_layers * self._comp_layer_s(most_tokens)
        beside = min(1.0, pass_s / load_s)
        pass_s += known.contention_s(int(beside * self.total_bytes))
        # A pass must not outlive what it reads behind: then nothing is read behind it.
        is_long = pass_s > MAX_LEASE_SHARE * lease_s
        options = ReaderOptions(
            read_ahead_layers=num_layers if is_long else decision.read_ahead_layers,
            order=decision.order,
            compute_per_load=pass_s / load_s,
            least_layers=1 if slab_s > SLOW_SLAB_S else LEAST_LAYERS,
        )
        is_copy = self._slowest_tier is TierKind.MEMORY
        if shape.is_whole and is_copy:
            return replace(options, num_threads=CHUNK_THREADS)
        return options

    # The engine's thread

    def state(self) -> JobState:
        """How far it is; reads on ahead while nobody waits for a layer yet."""
        with self._changed:
            reader, is_failed = self._reader, self._is_failed
        if reader is None:
            return self._unread_state(is_done=is_failed or self._is_hung(self.total_bytes))
        num_ready = reader.num_layers_ready()
        is_behind = not self._is_from_back and num_ready < self._layout.num_layers
        if is_behind and not self._is_joined:
            # The pool's blocks are reserved anyway: nothing is saved by reading later.
            reader.wait_layer(num_ready, 0.0)
        bytes_left = reader.bytes_left()
        return JobState(
            is_done=reader.is_done or self._is_hung(bytes_left),
            num_good=reader.wait_layer(-1, 0.0),
            num_layers_ready=num_ready,
            num_from_back=self._num_from_back(reader),
            bytes_left=bytes_left,
            stall_s=self._stall_s(num_ready, bytes_left),
        )

    def _is_hung(self, bytes_left: int) -> bool:
        """Whether nothing came for so long that the request is better off without."""
        now_s = time.monotonic()
        if bytes_left != self._bytes_left:
            self._bytes_left, self._news_s = bytes_left, now_s
        return now_s - self._news_s >= self.task.patience_s

    def _unread_state(self, *, is_done: bool) -> JobState:
        num_bytes = 0 if is_done else self.total_bytes
        return JobState(
            is_done=is_done,
            num_good=0 if is_done else len(self.task.keys),
            num_layers_ready=0,
            num_from_back=0,
            bytes_left=num_bytes,
            stall_s=self._stall_s(0, num_bytes),
        )

    def _stall_s(self, num_ready: int, bytes_left: int) -> float:
        num_layers = self._layout.num_layers
        if not bytes_left or num_ready >= num_layers:
            return 0.0
        # Of a pass that others take part in: one that has nothing else to do begins anyway.
        comp_layer_s = self._comp_layer_s(self._model.options.chunk_tokens)
        num_left = num_layers - num_ready
        return layerwise(
            num_layers=num_left,
            load_layer_s=self._load_s(bytes_left) / num_left,
            comp_layer_s=comp_layer_s,
            begin_s=num_ready * comp_layer_s,
        ).stall_s

    def _load_s(self, num_bytes: int) -> float:
        """Estimate of what that much takes to come while a pass computes."""
        mode = self.task.decision.mode
        return self._model.load_s(self._slowest_tier, num_bytes, mode=mode, is_computing=True)

    def _comp_layer_s(self, most_tokens: int) -> float:
        """Estimate of what a layer of the pass behind the load takes."""
        shape = self.task.decision.shape
        start = shape.num_local_tokens + len(self.task.keys) * shape.block_tokens
        stop = min(start + most_tokens, shape.num_tokens)
        return self._model.layer_compute_s(start, stop, self._layout.num_layers)

    @property
    def _slowest_tier(self) -> TierKind:
        return TierKind.NVME if TierKind.NVME in self.task.tiers else TierKind.MEMORY

    def _num_from_back(self, reader: LayerReader) -> int:
        """At the task's end."""
        return reader.num_blocks_ready_from_back() if self._is_from_back else 0

    def wait_layer(self, layer: int) -> int:
        """Block until the layer is settled or patience is over.

        Returns:
            Leading blocks that are good in layers 0..layer.
        """
        if layer < self._known_layers:
            return self._known_good
        now_s = time.monotonic()
        if self._stop_s is None:
            self._stop_s = now_s + self.task.patience_s
        self._is_joined = True
        with self._changed:
            self._changed.wait_for(
                lambda: self._reader is not None or self._is_failed,
                timeout=max(0.0, self._stop_s - now_s),
            )
            reader = self._reader
        num_good = 0
        if reader is not None:
            num_good = self._wait_reader(reader, layer, self._stop_s)
        self.stalled_s += time.monotonic() - now_s
        return num_good

    def _wait_reader(self, reader: LayerReader, layer: int, stop_s: float) -> int:
        """Wait for a layer, and note how many are there behind it.

        These are not asked for again: a call costs 0.1 ms beside threads that read, and lets them
        read one more layer, for which all of them wake up. So it is made once for half of what is
        read ahead, or once more if all is there.
        """
        before = reader.moved_bytes()
        num_good = reader.wait_layer(layer, max(0.0, stop_s - time.monotonic()))
        self._stalled_bytes += reader.moved_bytes() - before
        num_ready = reader.num_layers_ready()
        if num_ready < self._layout.num_layers:
            num_ready = min(num_ready, layer + 1 + reader.options.read_ahead_layers // 2)
        if num_ready > layer:
            num_good = reader.wait_layer(num_ready - 1, 0.0)
            self._known_layers, self._known_good = num_ready, num_good
        return num_good

    def claim(self, first: int, last: int) -> int:
        """The engine wants to compute the task's blocks `first` to `last` - 1.

        Returns:
            The end of what it may; `first` when it should wait for the loader instead.
        """
        self._is_joined = True
        with self._changed:
            reader, is_failed = self._reader, self._is_failed
            if reader is None:
                end = last if is_failed else first + self._num_claimable(None, first, last)
                self._given_up = max(self._given_up, end)
                return end
        end = first + self._num_claimable(reader, first, last)
        reader.give_up_below(end)
        self._given_up = max(self._given_up, end)
        return end

    def _num_claimable(self, reader: LayerReader | None, first: int, last: int) -> int:
        """Without a reader all is still to be loaded: the plan is on its way."""
        num_wanted = last - first
        now_s = time.monotonic()
        is_done = reader is not None and reader.is_done
        if is_done or (self._stop_s is not None and now_s >= self._stop_s):
            return num_wanted
        offset = self.task.decision.first_block
        end = len(self.task.keys) - (self._num_from_back(reader) if reader is not None else 0)
        whole = (end - first) * self._layout.num_layers * self._layout.slab_bytes
        bytes_left = whole if reader is None else reader.bytes_left()
        count = claim_blocks(
            self._model,
            self.task.decision.shape,
            offset + first,
            offset + end,
            partial_bytes=max(0, whole - bytes_left),
        )
        if not count and self._stop_s is None:
            self._stop_s = now_s + self.task.patience_s
        return min(count, num_wanted)

    def end(self) -> JobOutcome:
        """Stop; what is in the pool and verified counts. Called once."""
        with self._changed:
            self._is_ended = True
            reader, plan = self._reader, self._plan
        if reader is None:
            return JobOutcome(plan=plan, num_good=0)
        is_free = reader.cancel(HOLD_TIMEOUT_S)
        good = self._num_from_back(reader)
        if not self._is_from_back:
            good = reader.wait_layer(self._layout.num_layers - 1, 0.0)
        straggler = None
        if not is_free:
            straggler = Straggler(reader=reader, release=self.task.hold(self._unsettled(good)))
        num_steps, busy_s = reader.effort()
        return JobOutcome(
            plan=plan,
            num_good=good,
            corrupt=reader.corrupt_keys(),
            moved_bytes=reader.moved_bytes(),
            beside_bytes=self.beside_bytes(),
            busy_s=busy_s,
            num_steps=num_steps,
            was_beside=self._is_joined and self.stalled_s < 0.5 * busy_s,
            straggler=straggler,
        )

    def corrupt_keys(self) -> tuple[BlockKey, ...]:
        """Blocks that were found bad so far."""
        reader = self._reader
        return reader.corrupt_keys() if reader is not None else ()

    def _unsettled(self, num_good: int) -> range:
        """Blocks that a read may yet write to: neither good nor the engine's own."""
        places = range(len(self.task.keys))
        if self._is_from_back:
            return places[self._given_up : len(places) - num_good]
        return places[num_good:]

    def beside_bytes(self) -> int:
        """Slab bytes that came, verified, while nobody waited for a layer."""
        with self._changed:
            reader = self._reader
        return reader.moved_bytes() - self._stalled_bytes if reader is not None else 0
