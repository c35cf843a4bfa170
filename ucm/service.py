"""The gRPC services over one manager: engines' `Cache`, operators' `Admin`.

Who may call, and how errors travel, is in `call_guard`.

Envelope: one call is one RPC of 0.5 ms, of which nothing here is more than a third: 0.06 ms for a
lookup of 1,000 keys, 0.15 for a load of 64 blocks of 16 slabs that are all in memory.
"""

# ruff: noqa: N802, ARG002  generated base classes name the methods and their arguments
from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Final

import grpc

from . import __version__
from .call_guard import Serving, translated
from .config import Config
from .credits import Credit, Pacer, ThreadShares
from .door import SessionTokens, answer_lookup
from .errors import CapacityError, InvalidArgumentError
from .hashing import check_key
from .load_board import LoadBoard, made_of, spread
from .load_gate import GateLimits, LoadGate
from .manager import Manager
from .plan_wire import mode_from_wire, plan_to_wire
from .protos import cache_pb2 as pb
from .protos import cache_pb2_grpc as pb_grpc
from .select_wire import (
    AskedSelection,
    check_reply_size,
    request_from_wire,
    result_to_wire,
    summaries_to_wire,
)
from .status_wire import status_to_wire
from .types import NamespaceId, SessionId, StoreStatus
from .wire import (
    LOAD_STATUS_TO_WIRE,
    STORE_STATUS_TO_WIRE,
    TIER_TO_WIRE,
    checksums_from_wire,
    keys_from_wire,
    lease_from_wire,
    words_to_wire,
)

_log = logging.getLogger(__name__)

MAX_RELEASES_PER_CALL: Final = 1024

CALL_RETRY_S: Final = 0.05
"""Hint to a session that has all its calls in service: about what one of them takes."""

STORE_SHARE: Final = 0.1
"""Of the time, for the copies of stores while loads go on: behind a copy come as long a write to
disk and its commit, and loads may lose a quarter of their speed to all of it."""

LOADS_QUIET_S: Final = 0.1
"""No load for so long: stores may take all the time there is."""

SELECT_RETRY_S: Final = 0.01
"""Hint to a selection that found all places taken: one of 30 layers takes about as long."""

COPY_RETRY_S: Final = 0.01
"""Hint to a store that found all copying places taken: a batch of 64 MiB takes about as long."""


class CacheService(pb_grpc.CacheServicer):
    """What engines call."""

    def __init__(
        self, manager: Manager, tokens: SessionTokens, config: Config, board: LoadBoard
    ) -> None:
        self._manager = manager
        self._tokens = tokens
        self._max_keys = config.service.max_keys_per_call
        self._shares = ThreadShares.of(config.service.rpc_threads)
        self._calls = Credit(
            config.service.max_calls_per_session,
            "this session has {limit} calls in service, the limit is "
            "service.max_calls_per_session; wait for one of them",
            retry_after_s=CALL_RETRY_S,
        )
        num_processors = len(os.sched_getaffinity(0))
        self._gate = LoadGate(GateLimits.of(config.service, num_processors), board)
        self._max_message_bytes = config.service.max_message_bytes
        self._selections = Credit(
            self._shares.selecting,
            "{limit} selections are in service, as many as may; come again or attend densely",
            retry_after_s=SELECT_RETRY_S,
        )
        self._pacer = Pacer(STORE_SHARE, LOADS_QUIET_S)
        self._copies = Credit(
            self._shares.copying,
            "{limit} stores are being copied, as many as may; the lease stays, complete it again",
            retry_after_s=COPY_RETRY_S,
        )

    def _serving(self, context: grpc.ServicerContext) -> Serving:
        """The session that calls, which pays for this call with one of its credits."""
        return Serving(context, self._tokens, self._calls)

    @contextlib.contextmanager
    def _loading(self, session: SessionId, context: grpc.ServicerContext) -> Iterator[None]:
        began_s = time.monotonic()
        self._pacer.note_urgent(began_s)
        made = made_of(context.invocation_metadata(), began_s)
        self._manager.metrics.add("ucm_refused_loads_total", made.num_refused, by="client")
        was_refused = False
        try:
            self._gate.enter(session, began_s, made)
            try:
                yield
            except CapacityError as error:
                was_refused = True
                error.retry_after_s = spread(error.retry_after_s, random.random())
                raise
            finally:
                self._gate.leave(began_s, time.monotonic(), was_refused=was_refused)
        except CapacityError:
            self._manager.metrics.add("ucm_refused_loads_total", 1, by="daemon")
            raise
        finally:
            self._pacer.note_urgent(time.monotonic())

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        started_s = time.monotonic()
        self._pacer.check(started_s)
        with self._copies.taken():
            try:
                yield
            finally:
                self._pacer.note_done(started_s, time.monotonic())

    def Lookup(self, request: pb.LookupRequest, context: grpc.ServicerContext) -> pb.LookupReply:
        """Longest cached prefix."""
        with self._serving(context) as session:
            return answer_lookup(self._manager, session, request, limit=self._max_keys)

    def Prefetch(
        self, request: pb.PrefetchRequest, context: grpc.ServicerContext
    ) -> pb.PrefetchReply:
        """Start promotions."""
        with self._serving(context) as session:
            keys = keys_from_wire(request.keys, limit=self._max_keys)
            queued = self._manager.prefetch(session, NamespaceId(request.namespace), keys)
            return pb.PrefetchReply(queued=queued)

    def PrepareLoad(
        self, request: pb.PrepareLoadRequest, context: grpc.ServicerContext
    ) -> pb.PrepareLoadReply:
        """Pin blocks in the arena."""
        with self._serving(context) as session:
            keys = keys_from_wire(request.keys, limit=self._max_keys)
            timeout_s = _checked_timeout(request.timeout_s)
            with self._loading(session, context):
                grants = self._manager.prepare_load(
                    session, NamespaceId(request.namespace), keys, timeout_s=timeout_s
                )
            if not context.is_active():
                # Nobody will read this answer: its caller gave up or died.
                self._manager.release(session, grants.lease_id)
            return pb.PrepareLoadReply(
                lease_id=grants.lease_id,
                timeout_s=grants.timeout_s,
                statuses=words_to_wire(grants.statuses, LOAD_STATUS_TO_WIRE),
                tiers=words_to_wire(grants.tiers, TIER_TO_WIRE),
                offsets=grants.offsets,
                checksums=grants.checksums,
            )

    def BeginLoad(
        self, request: pb.BeginLoadRequest, context: grpc.ServicerContext
    ) -> pb.BeginLoadReply:
        """Pin blocks where they are."""
        with self._serving(context) as session:
            keys = keys_from_wire(request.keys, limit=self._max_keys)
            mode, timeout_s = mode_from_wire(request.mode), _checked_timeout(request.timeout_s)
            namespace = NamespaceId(request.namespace)
            with self._loading(session, context):
                grants = self._manager.begin_load(
                    session, namespace, keys, mode=mode, timeout_s=timeout_s
                )
            if not context.is_active():
                self._manager.release(session, grants.lease_id)
            return plan_to_wire(grants)

    def CompleteLoad(
        self, request: pb.CompleteLoadRequest, context: grpc.ServicerContext
    ) -> pb.CompleteLoadReply:
        """Give a load lease back."""
        with self._serving(context) as session:
            corrupt = keys_from_wire(request.corrupt, limit=self._max_keys)
            self._manager.complete_load(session, lease_from_wire(request.lease_id), corrupt)
            return pb.CompleteLoadReply()

    def PrepareStore(
        self, request: pb.PrepareStoreRequest, context: grpc.ServicerContext
    ) -> pb.PrepareStoreReply:
        """Grant staging slots."""
        with self._serving(context) as session:
            keys = keys_from_wire(request.keys, limit=self._max_keys)
            parent = check_key(request.parent)
            namespace = NamespaceId(request.namespace)
            grants = self._manager.prepare_store(session, namespace, parent, keys)
            if not context.is_active():
                self._manager.release(session, grants.lease_id)
            return pb.PrepareStoreReply(
                lease_id=grants.lease_id,
                timeout_s=grants.timeout_s,
                statuses=words_to_wire(
                    [slot.status for slot in grants.slots], STORE_STATUS_TO_WIRE
                ),
                offsets=[slot.offset for slot in grants.slots if slot.status is StoreStatus.WANTED],
                summary_bytes=grants.summary_bytes,
            )

    def CompleteStore(
        self, request: pb.CompleteStoreRequest, context: grpc.ServicerContext
    ) -> pb.CompleteStoreReply:
        """Copy, verify and accept what was staged."""
        with self._serving(context) as session:
            keys = keys_from_wire(request.keys, limit=self._max_keys)
            checksums = checksums_from_wire(request.checksums, num_blocks=len(keys))
            lease_id = lease_from_wire(request.lease_id)
            given = dict(zip(keys, checksums, strict=True))
            if not context.is_active():
                # Cancelled while it waited for a thread: nobody is to see it.
                self._manager.release(session, lease_id)
                return pb.CompleteStoreReply()
            with self._copying():
                statuses = self._manager.complete_store(session, lease_id, given)
            return pb.CompleteStoreReply(statuses=words_to_wire(statuses, STORE_STATUS_TO_WIRE))

    def Pin(self, request: pb.PinRequest, context: grpc.ServicerContext) -> pb.PinReply:
        """Keep a prefix in memory."""
        with self._serving(context) as session:
            keys = keys_from_wire(request.keys, limit=self._max_keys)
            timeout_s = _checked_timeout(request.timeout_s)
            with self._loading(session, context):
                pin = self._manager.pin(
                    session,
                    NamespaceId(request.namespace),
                    keys,
                    hold_s=request.hold_s,
                    timeout_s=timeout_s,
                )
            if not context.is_active():
                self._manager.release(session, pin.id)
            return pb.PinReply(lease_id=pin.id, num_blocks=pin.num_blocks, hold_s=pin.hold_s)

    def Select(self, request: pb.SelectRequest, context: grpc.ServicerContext) -> pb.SelectReply:
        """Choose blocks by their summaries."""
        with self._serving(context) as session:
            asked = self._asked(request)
            with self._selections_taken():
                result = self._manager.selections.select(
                    session,
                    NamespaceId(request.namespace),
                    asked.keys,
                    asked.request,
                    timeout_s=asked.timeout_s,
                )
            return result_to_wire(result)

    def SelectAndLoad(
        self, request: pb.SelectAndLoadRequest, context: grpc.ServicerContext
    ) -> pb.SelectAndLoadReply:
        """Choose blocks and pin what was chosen where it is."""
        with self._serving(context) as session:
            asked, mode = self._asked(request.select), mode_from_wire(request.mode)
            with self._selections_taken(), self._loading(session, context):
                result, grants = self._manager.selections.select_and_load(
                    (session, NamespaceId(request.select.namespace)),
                    asked.keys,
                    asked.request,
                    mode=mode,
                    timeout_s=asked.timeout_s,
                )
            if not context.is_active():
                self._manager.release(session, grants.lease_id)
            return pb.SelectAndLoadReply(
                selection=result_to_wire(result), load=plan_to_wire(grants)
            )

    def MapSummaries(
        self, request: pb.MapSummariesRequest, context: grpc.ServicerContext
    ) -> pb.MapSummariesReply:
        """Pin summaries where they are."""
        with self._serving(context) as session:
            keys = keys_from_wire(request.keys, limit=self._max_keys)
            timeout_s = _checked_timeout(request.timeout_s)
            with self._selections_taken():
                grants = self._manager.selections.map_summaries(
                    session, NamespaceId(request.namespace), keys, timeout_s=timeout_s
                )
            if not context.is_active():
                self._manager.release(session, grants.lease_id)
            return summaries_to_wire(grants)

    def _asked(self, request: pb.SelectRequest) -> AskedSelection:
        keys = keys_from_wire(request.keys, limit=self._max_keys)
        asked = request_from_wire(request)
        check_reply_size(asked, len(keys), self._max_message_bytes)
        return AskedSelection(keys, asked, _checked_timeout(request.timeout_s))

    def _selections_taken(self) -> contextlib.AbstractContextManager[None]:
        return self._selections.taken()

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseReply:
        """Drop leases."""
        with self._serving(context) as session:
            if len(request.lease_ids) > MAX_RELEASES_PER_CALL:
                raise InvalidArgumentError(
                    f"{len(request.lease_ids)} leases, at most {MAX_RELEASES_PER_CALL} a call"
                )
            for lease_id in request.lease_ids:
                self._manager.release(session, lease_from_wire(lease_id))
            return pb.ReleaseReply()

    def Flush(self, request: pb.FlushRequest, context: grpc.ServicerContext) -> pb.FlushReply:
        """Wait for durability."""
        with self._serving(context), self._manager.waiting_place():
            timeout_s = _checked_timeout(request.timeout_s)
            flushed = self._manager.flush_while(context.is_active, timeout_s=timeout_s)
            return pb.FlushReply(flushed=flushed)


MAX_TIMEOUT_S: Final = 3600.0


def _checked_timeout(timeout_s: float) -> float:
    """A call's time-out, bounded.

    Raises:
        InvalidArgumentError: negative or not a number.
    """
    if not timeout_s >= 0:
        raise InvalidArgumentError(f"a time-out of {timeout_s} s; it must be 0 or more")
    return min(timeout_s, MAX_TIMEOUT_S)


class AdminService(pb_grpc.AdminServicer):
    """What operators call, on a socket of its own."""

    def __init__(self, manager: Manager, config: Config, drain: Callable[[], None]) -> None:
        self._manager = manager
        self._socket_path = config.service.socket_path
        self._store_path = config.nvme.path
        self._drain = drain
        self._started_s = time.monotonic()

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        """How the daemon is doing."""
        with translated(context):
            reply = status_to_wire(self._manager.status())
            reply.version = __version__
            reply.pid = os.getpid()
            reply.uptime_s = time.monotonic() - self._started_s
            reply.socket_path = str(self._socket_path)
            reply.store_path = str(self._store_path or "")
            return reply

    def Flush(self, request: pb.FlushRequest, context: grpc.ServicerContext) -> pb.FlushReply:
        """Wait until all that was accepted is flushed."""
        with translated(context):
            timeout_s = _checked_timeout(request.timeout_s)
            flushed = self._manager.flush_while(context.is_active, timeout_s=timeout_s)
            return pb.FlushReply(flushed=flushed)

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainReply:
        """Begin to stop, as SIGTERM does."""
        with translated(context):
            self._drain()
            return pb.DrainReply()
