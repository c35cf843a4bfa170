"""`LoadDesk`: a session's loads. Decides what to load, asks the cache for it, has it read, learns.

    engine's thread   start -> decide -> job ... end            never waits for the cache
    desk's thread     begin_load -> job.open     complete_load     stragglers: look, release

Invariants
    * Nothing raises because of the cache: a load that does not come is an empty load.
    * Every plan that was granted is completed once, with the keys of the blocks that were bad.
    * A place that a hung read may still write to is held until the read has returned.
    * After `close` every load is done and empty: the engine may still ask.
    * What a load and a pass took is told to the cost model, which decides on the next ones.

Envelope: a start costs one decision (0.3 ms at 3 k tokens), an end some 50 us.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ucm.cost_model import CostModel
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.load_decision import Decide, Decision, LoadKind, LoadShape, decide, forced
from ucm.reader_io import open_reader_io
from ucm.types import BlockKey, LeaseId, LoadMode, LoadOrder, LoadStatus, SourceKind, TierKind

from .deadline import DeadlineCaller
from .link import CallKind
from .load_job import JobOutcome, JobState, LoadJob, LoadTask, Straggler

if TYPE_CHECKING:
    from ucm.engine.hook import StepReport
    from ucm.layout import KvLayout
    from ucm.load_plan import LoadPlan

    from .link import Connection, Link
    from .session_stats import StatsCounter

log = logging.getLogger(__name__)

STRAGGLER_POLL_S = 0.05
MAX_DECISIONS = 64
MAIN_SOURCE_SHARE = 0.9
"""A load teaches the rate of one tier only: that of so much of its blocks, or none."""


NOTHING_LEFT = JobState(
    is_done=True, num_good=0, num_layers_ready=0, num_from_back=0, bytes_left=0, stall_s=0.0
)
"""Of a load that `close` has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskOptions:
    """Limits of the loads of one session."""

    deadline_s: float
    """What one request may wait in all."""
    max_read_ahead_layers: int
    decide: Decide = decide


class LoadDesk:
    """See the module. `start` to `end` belong to the engine's thread."""

    def __init__(
        self,
        link: Link,
        counter: StatsCounter,
        layout: KvLayout,
        options: DeskOptions,
        model: CostModel,
    ) -> None:
        """Start the desk's thread; it ends with `close`."""
        self.model = model
        self.decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        """The last ones, oldest first."""
        self._link = link
        self._counter = counter
        self._layout = layout
        self._options = options
        self._io = open_reader_io()
        self._jobs: dict[str, LoadJob] = {}
        self._unfinished: dict[int, tuple[float, Decision]] = {}
        """By prompt length: when it was decided on, and how, until its last pass is over."""
        self._ended_bytes = 0
        """What came beside computing, of jobs that ended."""
        self._bytes_before = 0
        """The same of all jobs, before the pass that comes next or is under way."""
        self._is_in_pass = False
        self._can_direct = True
        self._unreported: dict[LeaseId, tuple[BlockKey, ...]] = {}
        """Bad blocks of loads that have ended, by their plans, until the cache has been told."""
        self._errands: deque[Callable[[], None]] = deque()
        self._stragglers: list[Straggler] = []
        self._work = threading.Condition()
        self._is_closing = False
        self._progress = threading.Event()
        self._caller = DeadlineCaller("ucm-session-loads")
        self._thread = threading.Thread(target=self._run, name="ucm-loads", daemon=True)
        self._thread.start()

    # The engine's thread

    def choose(self, shape: LoadShape) -> Decision:
        """What to do with a request's hits; remembers it for `observe_pass`."""
        shape = replace(
            shape,
            can_direct=self._can_direct,
            max_read_ahead_layers=self._options.max_read_ahead_layers,
        )
        decision = self._options.decide(self.model, shape)
        if decision.order is LoadOrder.LAYERS and self._is_too_slow(decision):
            # It would be cut off half way: better to compute meanwhile.
            kind = LoadKind.COMPUTE if shape.is_whole else LoadKind.HYBRID
            decision = forced(kind, decision.mode, is_from_back=True)(self.model, shape)
        self.decisions.append(decision)
        if shape.is_whole:  # no pass ends where a chunk does
            return decision
        self._unfinished[shape.num_tokens] = (time.monotonic(), decision)
        while len(self._unfinished) > MAX_DECISIONS:
            del self._unfinished[next(iter(self._unfinished))]
        return decision

    def _is_too_slow(self, decision: Decision) -> bool:
        shape = decision.shape
        tiers = Counter(shape.tiers[: decision.num_blocks])
        load_s = sum(
            self.model.load_s(tier, count * shape.block_bytes, mode=decision.mode)
            for tier, count in tiers.items()
        )
        is_default = self._options.decide is decide
        has_choice = shape.can_hybrid or shape.is_whole
        return is_default and has_choice and load_s > self._options.deadline_s

    def start(self, task: LoadTask) -> None:
        """Begin a load; returns at once."""
        job = LoadJob(task, self._layout, self.model)
        self._jobs[task.request_id] = job
        if self._is_closing:
            job.fail()
        else:
            self._submit(lambda: self._open(job))

    def state(self, request_id: str) -> JobState:
        """How far a load is; asked before each pass, at least."""
        job = self._jobs.get(request_id)
        if not self._is_in_pass:
            self._bytes_before = self._beside_bytes()
        return NOTHING_LEFT if job is None else job.state()

    def wait_layer(self, layer: int, request_id: str) -> int:
        """See `LoadJob.wait_layer`."""
        self._is_in_pass = True
        job = self._jobs.get(request_id)
        return 0 if job is None else job.wait_layer(layer)

    def claim(self, request_id: str, first: int, last: int) -> int:
        """See `LoadJob.claim`."""
        job = self._jobs.get(request_id)
        return last if job is None else job.claim(first, last)

    def wait_some(self, timeout_s: float) -> None:
        """Block until a load made progress, at most `timeout_s`."""
        self._progress.wait(timeout_s)
        self._progress.clear()

    def end(self, request_id: str) -> int:
        """End a load; returns its good blocks, none when `close` has ended it."""
        job = self._jobs.get(request_id)
        if job is None:
            return 0
        try:
            outcome = job.end()
            plan, straggler = outcome.plan, outcome.straggler
            if plan is not None:
                self._unreported[plan.id] = outcome.corrupt
        finally:
            self._jobs.pop(request_id, None)
        if plan is not None:
            self._submit(lambda: self._complete(plan, outcome.corrupt))
        if straggler is not None:
            with self._work:
                self._stragglers.append(straggler)
                self._work.notify_all()
        self._counter.add_stall(job.stalled_s, job.task.spent_s + job.stalled_s)
        self._ended_bytes += outcome.beside_bytes
        self._count(job.task, outcome)
        self._learn(outcome)
        return outcome.num_good

    def observe_pass(self, report: StepReport) -> None:
        """Learn from a forward pass."""
        self._is_in_pass = False
        now_bytes = self._beside_bytes()
        num_bytes, self._bytes_before = now_bytes - self._bytes_before, now_bytes
        if report.num_decodes or not report.parts:
            return
        seconds = report.seconds - report.stall_s
        self.model.observe_pass(report.parts, seconds, loaded_bytes=num_bytes)
        for start, count in report.parts:
            self._observe_end(start + count)

    def _beside_bytes(self) -> int:
        return self._ended_bytes + sum(job.beside_bytes() for job in self._jobs.values())

    def _observe_end(self, num_tokens: int) -> None:
        found = self._unfinished.pop(num_tokens, None)
        if found is not None:
            decided_s, decision = found
            took_s = time.monotonic() - decided_s
            self.model.observe_ttft(decision.way.value, decision.estimated_ttft_s, took_s)

    def close(self) -> None:
        """End every load and the thread. Idempotent. Places that reads hang in stay held."""
        for request_id in list(self._jobs):
            self.end(request_id)
        with self._work:
            self._is_closing = True
            self._work.notify_all()
        self._thread.join(2 * self._options.deadline_s)
        self._caller.close()
        with self._work:
            self._release_stragglers_locked()
            is_idle = not self._stragglers
        if is_idle:
            self._io.close()

    def _count(self, task: LoadTask, outcome: JobOutcome) -> None:
        layout, num_good = self._layout, outcome.num_good
        is_from_back = task.decision.order is LoadOrder.BLOCKS_FROM_BACK
        places = range(len(task.keys))
        good = places[len(places) - num_good :] if is_from_back else places[:num_good]
        for tier, count in Counter(task.tiers[place] for place in good).items():
            self._counter.add_hit(tier, count * layout.block_tokens)
        num_bad = len(outcome.corrupt)
        refused = [] if outcome.plan is None else [block.status for block in outcome.plan.blocks]
        self._counter.add(
            loaded_blocks=num_good,
            loaded_bytes=num_good * layout.num_layers * layout.slab_bytes,
            loaded_chunk_blocks=num_good if task.decision.shape.is_whole else 0,
            missed_blocks=0 if is_from_back else len(places) - num_good,
            corrupt_blocks=num_bad + refused.count(LoadStatus.CORRUPT),
            wrong_slabs=num_bad,
            wrong_bytes=num_bad * layout.slab_bytes,
        )
        if num_bad:
            log.error("blocks that failed on their way into the pool, recomputed: %d", num_bad)

    def _learn(self, outcome: JobOutcome) -> None:
        plan = outcome.plan
        if plan is None or not outcome.num_steps or not outcome.busy_s:
            return
        sources = Counter(block.source for block in plan.blocks[: plan.num_ready])
        source, count = sources.most_common(1)[0]
        if plan.mode is LoadMode.DIRECT and source is SourceKind.PROMOTING:
            self._can_direct = False  # this namespace's blocks are encoded
        if count < MAIN_SOURCE_SHARE * plan.num_ready:
            return
        self.model.observe_load(
            TierKind.MEMORY if source is SourceKind.MEMORY else TierKind.NVME,
            outcome.moved_bytes,
            outcome.busy_s,
            num_requests=outcome.num_steps,
            mode=plan.mode,
            is_computing=outcome.was_beside,
        )

    # Any thread

    def wait_reported(self, keys: Sequence[BlockKey], timeout_s: float) -> bool:
        """Wait until none of these blocks is one that a load has found bad and the cache has not.

        Where one is, that is the end of its load: of the pass that goes on with it.

        Returns:
            False when time is up.
        """
        wanted = set(keys)
        with self._work:
            return self._work.wait_for(
                lambda: self._is_closing or wanted.isdisjoint(self._unreported_now()), timeout_s
            )

    def _unreported_now(self) -> Iterator[BlockKey]:
        for job in list(self._jobs.values()):
            yield from job.corrupt_keys()
        for corrupt in list(self._unreported.values()):
            yield from corrupt

    # The desk's thread

    def _submit(self, errand: Callable[[], None]) -> None:
        with self._work:
            self._errands.append(errand)
            self._work.notify_all()

    def _run(self) -> None:
        while (errand := self._next()) is not None:
            try:
                errand()
            except Exception:
                log.exception("a load failed in an unforeseen way")

    def _next(self) -> Callable[[], None] | None:
        """What to do now; None when all is done and the desk closes."""
        with self._work:
            while not self._errands:
                if self._is_closing:
                    return None
                self._work.wait(STRAGGLER_POLL_S if self._stragglers else None)
                self._release_stragglers_locked()
            return self._errands.popleft()

    def _release_stragglers_locked(self) -> None:
        waiting = []
        for straggler in self._stragglers:
            if straggler.reader.cancel(0.0):
                straggler.release()
            else:
                waiting.append(straggler)
        self._stragglers = waiting

    def _open(self, job: LoadJob) -> None:
        task = job.task

        def begin(connection: Connection) -> LoadPlan:
            namespace, mode = connection.namespace.id, task.decision.mode
            cache = connection.cache
            return cache.begin_load(namespace, task.keys, mode=mode, timeout_s=task.patience_s)

        plan = self._link.attempt(
            self._caller,
            begin,
            # Not the patience that is left: a cache that is a little late for it is not broken.
            self._options.deadline_s,
            on_late=lambda link, late: link.cache.release(late.id),
            kind=CallKind.LOAD,
        ).value
        is_taken = job.open(plan, lambda *wanted: self._reader(job, *wanted), self._progress.set)
        if not is_taken and plan is not None:
            self._complete(plan, ())
        self._progress.set()

    def _reader(self, job: LoadJob, plan: LoadPlan, options: ReaderOptions) -> LayerReader:
        return LayerReader(plan, self._layout, job.task.target, self._io, options)

    def _complete(self, plan: LoadPlan, corrupt: tuple[BlockKey, ...]) -> None:
        try:
            self._link.attempt(
                self._caller,
                lambda connection: connection.cache.complete_load(plan.id, corrupt),
                self._options.deadline_s,
                kind=CallKind.LOAD,
            )
        finally:
            with self._work:
                self._unreported.pop(plan.id, None)
                self._work.notify_all()
