"""The gRPC services over one manager: engines' `Cache`, operators' `Admin`.

Who may call, and how errors travel, is in `call_guard`; what is answered at the door too, in
`answers`.

Envelope: one call is one RPC of 0.5 ms, of which nothing here is more than a third.
"""

# ruff: noqa: N802, ARG002  generated base classes name the methods and their arguments
from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Final

import grpc

from . import __version__
from .answers import Answers, load_to_wire
from .call_guard import Serving, translated
from .config import Config, ServiceConfig
from .credits import Credit, ThreadShares
from .door import SessionTokens
from .hashing import check_key
from .load_board import made_of
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
    STORE_STATUS_TO_WIRE,
    checked_timeout,
    checksums_from_wire,
    lease_from_wire,
    words_to_wire,
)

_log = logging.getLogger(__name__)

CALL_RETRY_S: Final = 0.05
"""Hint to a session that has all its calls in service: about what one of them takes."""

SELECT_RETRY_S: Final = 0.01
"""Hint to a selection that found all places taken: one of 30 layers takes about as long."""

COPY_RETRY_S: Final = 0.01
"""Hint to a store that found all copying places taken: a batch of 64 MiB takes about as long."""


class CacheService(pb_grpc.CacheServicer):
    """What engines call."""

    def __init__(self, answers: Answers, tokens: SessionTokens, config: ServiceConfig) -> None:
        self._answers = answers
        self._manager = answers.manager
        self._tokens = tokens
        shares = ThreadShares.of(config.rpc_threads)
        self._calls = Credit(
            config.max_calls_per_session,
            "this session has {limit} calls in service, the limit is "
            "service.max_calls_per_session; wait for one of them",
            retry_after_s=CALL_RETRY_S,
        )
        self._max_message_bytes = config.max_message_bytes
        self._selections = Credit(
            shares.selecting,
            "{limit} selections are in service, as many as may; come again or attend densely",
            retry_after_s=SELECT_RETRY_S,
        )
        self._copies = Credit(
            shares.copying,
            "{limit} stores are being copied, as many as may; the lease stays, complete it again",
            retry_after_s=COPY_RETRY_S,
        )

    def _serving(self, context: grpc.ServicerContext) -> Serving:
        """The session that calls, which pays for this call with one of its credits."""
        return Serving(context, self._tokens, self._calls)

    def _loading(
        self, session: SessionId, context: grpc.ServicerContext
    ) -> contextlib.AbstractContextManager[None]:
        began_s = time.monotonic()
        made = made_of(context.invocation_metadata(), began_s)
        return self._answers.loading(session, made, began_s)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        started_s = time.monotonic()
        self._answers.pacer.check(started_s)
        with self._copies.taken():
            try:
                yield
            finally:
                self._answers.pacer.note_done(started_s, time.monotonic())

    def Lookup(self, request: pb.LookupRequest, context: grpc.ServicerContext) -> pb.LookupReply:
        """Longest cached prefix."""
        with self._serving(context) as session:
            return self._answers.lookup(session, request)

    def Prefetch(
        self, request: pb.PrefetchRequest, context: grpc.ServicerContext
    ) -> pb.PrefetchReply:
        """Start promotions."""
        with self._serving(context) as session:
            keys = self._answers.keys(request.keys)
            queued = self._manager.prefetch(session, NamespaceId(request.namespace), keys)
            return pb.PrefetchReply(queued=queued)

    def PrepareLoad(
        self, request: pb.PrepareLoadRequest, context: grpc.ServicerContext
    ) -> pb.PrepareLoadReply:
        """Pin blocks in the arena."""
        with self._serving(context) as session:
            keys = self._answers.keys(request.keys)
            timeout_s = checked_timeout(request.timeout_s)
            with self._loading(session, context):
                grants = self._manager.prepare_load(
                    session, NamespaceId(request.namespace), keys, timeout_s=timeout_s
                )
            if not context.is_active():
                # Nobody will read this answer: its caller gave up or died.
                self._manager.release(session, grants.lease_id)
            return load_to_wire(grants)

    def BeginLoad(
        self, request: pb.BeginLoadRequest, context: grpc.ServicerContext
    ) -> pb.BeginLoadReply:
        """Pin blocks where they are."""
        with self._serving(context) as session:
            keys = self._answers.keys(request.keys)
            mode, timeout_s = mode_from_wire(request.mode), checked_timeout(request.timeout_s)
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
            return self._answers.complete_load(session, request)

    def PrepareStore(
        self, request: pb.PrepareStoreRequest, context: grpc.ServicerContext
    ) -> pb.PrepareStoreReply:
        """Grant staging slots."""
        with self._serving(context) as session:
            keys = self._answers.keys(request.keys)
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
            keys = self._answers.keys(request.keys)
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
            keys = self._answers.keys(request.keys)
            timeout_s = checked_timeout(request.timeout_s)
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
            keys = self._answers.keys(request.keys)
            timeout_s = checked_timeout(request.timeout_s)
            with self._selections_taken():
                grants = self._manager.selections.map_summaries(
                    session, NamespaceId(request.namespace), keys, timeout_s=timeout_s
                )
            if not context.is_active():
                self._manager.release(session, grants.lease_id)
            return summaries_to_wire(grants)

    def _asked(self, request: pb.SelectRequest) -> AskedSelection:
        keys = self._answers.keys(request.keys)
        asked = request_from_wire(request)
        check_reply_size(asked, len(keys), self._max_message_bytes)
        return AskedSelection(keys, asked, checked_timeout(request.timeout_s))

    def _selections_taken(self) -> contextlib.AbstractContextManager[None]:
        return self._selections.taken()

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseReply:
        """Drop leases."""
        with self._serving(context) as session:
            return self._answers.release(session, request)

    def Flush(self, request: pb.FlushRequest, context: grpc.ServicerContext) -> pb.FlushReply:
        """Wait for durability."""
        with self._serving(context), self._manager.waiting_place():
            timeout_s = checked_timeout(request.timeout_s)
            flushed = self._manager.flush_while(context.is_active, timeout_s=timeout_s)
            return pb.FlushReply(flushed=flushed)


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
            timeout_s = checked_timeout(request.timeout_s)
            flushed = self._manager.flush_while(context.is_active, timeout_s=timeout_s)
            return pb.FlushReply(flushed=flushed)

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainReply:
        """Begin to stop, as SIGTERM does."""
        with translated(context):
            self._drain()
            return pb.DrainReply()
