"""The manager's side of selections: which blocks a query will attend to, without reading them.

    begin    lock: the usable prefix, pinned | request checked
    gather   summaries that are on NVMe only are read without their blocks, bounded in time
             lock: pin the summaries that speak for the blocks' present content
    answer   score them in the sequence's table, no lock | map: lease them where they are
    end      lock: unpin

Nothing here touches a tier's blocks: what has no summary in time is NO_SUMMARY and included.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ucm.kernels.summary_record import HEADER_BYTES, layout_dtype

from .errors import CapacityError
from .grants import MappedGrants
from .layer_choice import Candidates, choose_layers
from .leases import LeaseKind
from .manager_state import MAX_WAIT_S, US_PER_S, ManagerState
from .namespaces import Namespace
from .select_api import LayerSelection, SelectMode, SelectResult
from .summary_tables import NO_CONTENT, SummaryTables, TableOwner
from .types import LoadMode, SummaryStatus

if TYPE_CHECKING:
    from ucm.kernels.summary_record import Records
    from ucm.storage.arena import Arena

    from .hashing import CheckedKeys
    from .layer_loads import LayerLoads
    from .plan_grants import PlanGrants
    from .select_api import SelectRequest
    from .summary_fills import SummaryFills, SummaryGrants
    from .types import BlockKey, LeaseId, NamespaceId, SessionId

MIN_SCORE_S = 0.25
"""What scoring may take whatever the caller allows: less would be no answer at all. The client's
shortest deadline of a call is the same."""

SCORE_S = 0.1
"""What is left for scoring, at most, of the time that a call may wait for summaries."""

SHORT_RETRY_S = 0.05
"""Hint to a selection that ran out of time: the table that it began is there next time."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One call while it is served: its blocks and their summaries are pinned."""

    session: SessionId
    namespace: Namespace
    keys: CheckedKeys
    """Of the usable prefix."""
    num_keys: int
    """That were asked for."""
    summaries: SummaryGrants
    """Of the usable prefix."""
    deadline_s: float

    @property
    def statuses(self) -> tuple[SummaryStatus, ...]:
        """One for every key asked for."""
        lacking = self.num_keys - len(self.keys)
        return (*self.summaries.statuses, *[SummaryStatus.MISS] * lacking)

    def content(self, index: int) -> int:
        """See `RowSource.content`."""
        return self.summaries.contents[index]

    def records(self, index: int) -> Records | None:
        """See `RowSource.records`. It was checked before it came into the book."""
        data, layout = self.summaries.view(index), self.namespace.layout
        if data is None:
            return None
        found = np.frombuffer(data[HEADER_BYTES:], layout_dtype(layout, self.summaries.book.kind))
        return found.reshape(layout.num_layers, layout.num_kv_heads)


class Selections:
    """Selections of one manager. Thread-safe."""

    def __init__(self, state: ManagerState, fills: SummaryFills, loads: LayerLoads) -> None:
        self._state = state
        self._fills = fills
        self._loads = loads
        self.tables = SummaryTables(state.config.summaries.table_bytes)

    def select(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        timeout_s: float,
    ) -> SelectResult:
        """See `CacheApi.select`. Scores on the calling thread."""
        with self._serving((session, namespace), keys, timeout_s, request) as call:
            return self._select(call, request)

    def select_and_load(
        self,
        owner: tuple[SessionId, NamespaceId],
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> tuple[SelectResult, PlanGrants]:
        """See `CacheApi.select_and_load`; the session and the namespace are `owner`."""
        with self._serving(owner, keys, timeout_s, request) as call:
            result = self._select(call, request)
            grants = self._loads.begin_load(
                *owner, keys, mode=mode, timeout_s=timeout_s, chosen=result.union().tolist()
            )
            return result, grants

    def map_summaries(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        timeout_s: float,
    ) -> MappedGrants:
        """See `CacheApi.map_summaries`."""
        hold_s = self._state.config.transfer.lease_timeout_s
        with self._serving((session, namespace), keys, timeout_s) as call:
            lease_id = self._lease(call, hold_s)
            book = call.summaries.book
            return MappedGrants(
                lease_id=lease_id,
                kind=book.kind,
                statuses=call.statuses,
                offsets=tuple(slot * book.slot_bytes for slot in call.summaries.ready_slots),
                contents=tuple(each for each in call.summaries.contents if each != NO_CONTENT),
                summary_bytes=book.summary_bytes,
                timeout_s=hold_s,
            )

    def _lease(self, call: _Call, hold_s: float) -> LeaseId:
        """Pin a call's summaries for longer."""
        state, book, slots = self._state, call.summaries.book, call.summaries.ready_slots
        with state.lock:
            state.session_locked(call.session)
            deadline_us = state.clock.now_us() + int(hold_s * US_PER_S)
            lease = state.grant_locked(
                call.session, call.namespace, LeaseKind.SUMMARIES, deadline_us
            )
            book.pin(slots)
            lease.at_end = functools.partial(book.unpin, slots)
            lease.num_bytes = len(slots) * book.slot_bytes
            return lease.id

    def arena(self, session: SessionId, namespace: NamespaceId) -> Arena:
        """The memory that the offsets of `map_summaries` point into; read-only for clients.

        Raises:
            BlockNotFoundError: the session has not opened the namespace.
            InvalidArgumentError: it has no summaries of it.
        """
        with self._state.lock:
            found = self._state.namespace_locked(session, namespace)
            return self._fills.book_locked(session, found).arena

    # ------------------------------------------------------------------ parts

    @contextlib.contextmanager
    def _serving(
        self,
        owner: tuple[SessionId, NamespaceId],
        keys: Sequence[BlockKey],
        timeout_s: float,
        request: SelectRequest | None = None,
    ) -> Iterator[_Call]:
        """Check the call, pin the usable prefix and its summaries for the length of the block."""
        state, (session, namespace) = self._state, owner
        timeout_s = min(max(0.0, timeout_s), MAX_WAIT_S)
        deadline_s = time.monotonic() + max(timeout_s, MIN_SCORE_S)
        wait_s = timeout_s - min(timeout_s / 2, SCORE_S)
        checked = state.checked_keys(keys)
        with state.lock:
            found, _ = state.begin_locked(session, namespace)
            self._fills.book_locked(session, found)
            if request is not None:
                request.check(found.layout, len(checked))
            rows = found.index.usable_prefix(checked)
            for row in rows:  # without a touch: an engine selects in every step, that is no reuse
                found.index.pin(row)
            found.num_copying += 1  # the end of the store waits for it
        try:
            usable = checked[: len(rows)]
            summaries = self._fills.await_summaries(session, namespace, usable, timeout_s=wait_s)
            try:
                yield _Call(session, found, usable, len(checked), summaries, deadline_s)
            finally:
                self._fills.release(summaries)
        finally:
            with state.lock:
                found.index.unpin_all(rows)
                found.num_copying -= 1
                state.copied.notify_all()

    def _select(self, call: _Call, request: SelectRequest) -> SelectResult:
        started_s, layout = time.perf_counter(), call.namespace.layout
        if not call.keys:
            return _nothing(request, layout.num_kv_heads, call.num_keys)
        owner = TableOwner(call.namespace.id, call.summaries.book.kind, layout)
        with self.tables.using(owner, call.keys, call, call.deadline_s) as table:
            layers = choose_layers(
                Candidates(
                    table=table.scores,
                    count=len(call.keys),
                    known=table.known(len(call.keys)),
                    num_kv_heads=layout.num_kv_heads,
                    block_tokens=layout.block_tokens,
                ),
                request,
                _time_check(call.deadline_s, len(request.layers)),
            )
        self._count(layers, len(call.keys), time.perf_counter() - started_s)
        return SelectResult(call.statuses, layers)

    def _count(self, layers: Sequence[LayerSelection], num_blocks: int, took_s: float) -> None:
        metrics = self._state.metrics
        metrics.add("ucm_selects_total")
        metrics.add("ucm_select_candidates_total", num_blocks * len(layers))
        metrics.add("ucm_select_chosen_total", sum(len(each.blocks) for each in layers))
        metrics.observe("ucm_select_duration_seconds", took_s)
        metrics.set("ucm_select_table_bytes", self.tables.num_bytes)


def _time_check(deadline_s: float, num_layers: int) -> Callable[[int], None]:
    """What refuses to go on after the deadline; the first part of the work is always done."""
    begun = False

    def check(done: int) -> None:
        nonlocal begun
        if begun and time.monotonic() > deadline_s:
            raise CapacityError(
                f"time was over when {done} of {num_layers} layers were scored: allow more time, "
                "or ask for fewer layers or queries",
                retry_after_s=SHORT_RETRY_S,
            )
        begun = True

    return check


def _nothing(request: SelectRequest, num_groups: int, num_keys: int) -> SelectResult:
    """The answer about a chain of which nothing is cached."""
    groups: tuple[int | None, ...] = (None,)
    num_heads = request.num_heads
    if request.mode is SelectMode.PER_HEAD:
        groups, num_heads = tuple(range(num_groups)), num_heads // num_groups
    rows = (request.num_queries, num_heads)
    shares = np.empty(0, np.float32)
    by_head = np.empty((*rows, 0), np.float32) if request.bounds else None
    skipped = np.full(rows, -np.inf, np.float32) if request.bounds else None
    layers = tuple(
        LayerSelection(
            *(layer, np.empty(0, np.int64), shares, 1.0, group),
            *(by_head, by_head, by_head, skipped),
        )
        for layer in request.layers
        for group in groups
    )
    return SelectResult((SummaryStatus.MISS,) * num_keys, layers)
