"""`RemoteCache`: the `CacheApi` of an engine that talks to the daemon.

Names and leases go over gRPC, or through the door where that answers at once (`_quickly`); bytes
are in memory that the door handed out: the namespaces' arenas (read-only) and the session's staging
memory (writable). Leases carry `memoryview`s into them, which stay mapped as long as somebody holds
one, also after `close`.

Invariants
    * Every call has a deadline; a call with `timeout_s` returns within it (but see `MIN_RPC_S`).
    * A refused call raises `CapacityError` with `retry_after_s`; only calls that give something
      back, and a flush, are made again here.
    * Once the door is closed, by either side, every call raises `TierUnavailableError` at once.
      Connecting again is the caller's business: it starts a new session with no leases.
    * No thread of Python's is started here. A process that forks keeps the session in the parent;
      in the child every call raises `TierUnavailableError`.

Envelope: one call is one RPC, 0.3 to 0.5 ms on a Unix socket; at the door a third of that.
A load of 100 blocks of 30 slabs moves 30 kB of names and checksums.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc

from .api import (
    LoadLease,
    LookupResult,
    NamespaceHandle,
    PinLease,
    SlabChecksums,
    StoreLease,
)
from .door_client import DoorClient
from .door_wire import MAX_PACKET_BYTES, load_reply_bytes
from .enum_words import word_of
from .errors import (
    BlockNotFoundError,
    CapacityError,
    InvalidArgumentError,
    TierUnavailableError,
    UcmError,
)
from .hashing import NamespaceSpec, check_key, check_keys
from .load_plan import LoadPlan
from .plan_wire import LOAD_MODE_TO_WIRE
from .protos import cache_pb2 as pb
from .protos import cache_pb2_grpc as pb_grpc
from .remote_leases import OpenNamespace, known_words, load_lease, store_lease
from .remote_plans import RemotePlans
from .remote_selections import RemoteSelections
from .rpc import MIN_RPC_S, daemon_timeout_s, open_channel, patiently, translated
from .select_api import SelectRequest, SelectResult, SummaryLease
from .sockets import check_socket_path, door_path
from .types import BlockKey, LeaseId, LoadMode, NamespaceId, StoreStatus, SummaryKind
from .wire import (
    STORE_STATUS_FROM_WIRE,
    TIER_FROM_WIRE,
    TOKEN_METADATA,
    checked_timeout,
    checksums_to_wire,
    keys_to_wire,
)

_MAX_LEAVE_S: Final = 0.5
"""How long `close` waits for a daemon that does not react; it ends the session when it does."""

_MAX_TURN_S: Final = 0.1
"""How long `close` waits for another thread at the door before it fails that thread's call."""


_live: weakref.WeakSet[RemoteCache] = weakref.WeakSet()


def connect(socket_path: str | Path, *, timeout_s: float = 2.0) -> RemoteCache:
    """Begin a session with the daemon at `socket_path`.

    Args:
        socket_path: the daemon's gRPC socket; the door is beside it.
        timeout_s: deadline of connecting, and of every later call that names none.

    Raises:
        ConfigError: no socket can have this path.
        TierUnavailableError: no daemon answers there in time.
        PermissionDeniedError: the daemon does not serve this user.
        CapacityError: it has as many sessions as it may.
    """
    check_socket_path(Path(socket_path))
    return RemoteCache(Path(socket_path), timeout_s=timeout_s)


class RemoteCache:
    """See `ucm.api.CacheApi`. Thread-safe."""

    def __init__(self, socket_path: Path, *, timeout_s: float) -> None:
        """Connect; see `connect`."""
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._door_lock = threading.Lock()
        self._namespaces: dict[NamespaceId, OpenNamespace] = {}
        self._door = DoorClient(door_path(socket_path), timeout_s=timeout_s)
        self._plans = RemotePlans(self._door, self._at_door)
        try:
            greeting = self._door.hello(timeout_s=timeout_s)
        except UcmError:
            self._door.close()
            raise
        self._staging: memoryview | None = greeting.staging
        self._max_read_bytes_per_s = greeting.max_read_bytes_per_s
        self._metadata = ((TOKEN_METADATA, greeting.token.hex()),)
        self._board = greeting.board
        self._selections = RemoteSelections(self._door, self._at_door, greeting.max_message_bytes)
        self._channel = open_channel(socket_path, max_message_bytes=greeting.max_message_bytes)
        self._stub = pb_grpc.CacheStub(self._channel)
        _live.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open_namespace(
        self, spec: NamespaceSpec, *, summary: SummaryKind | None = None
    ) -> NamespaceHandle:
        """See `CacheApi.open_namespace`. A call that adds nothing asks the daemon nothing."""
        namespace = spec.fingerprint()
        if summary is not None:
            summary = word_of(SummaryKind, summary, "a kind of summaries")
        with self._at_door() as left_s:
            found = self._namespaces.get(namespace)
            if found is None or summary not in (None, found.handle.summary):
                opened = self._door.open_namespace(spec, namespace, summary, timeout_s=left_s)
                limit = self._max_read_bytes_per_s
                handle = NamespaceHandle(namespace, spec.layout, limit, opened.summary)
                found = self._namespaces[namespace] = OpenNamespace(handle, opened.arena)
            return found.handle

    @contextlib.contextmanager
    def _at_door(self) -> Iterator[float]:
        """One thread's turn at the door, with the seconds that it has left."""
        deadline_s = time.monotonic() + self._timeout_s
        if not self._door_lock.acquire(timeout=self._timeout_s):
            raise TierUnavailableError("another thread waits for the daemon's door")
        try:
            self._check_open()
            yield max(deadline_s - time.monotonic(), 0.01)
        finally:
            self._door_lock.release()

    def lookup(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> LookupResult:
        """See `CacheApi.lookup`."""
        request = pb.LookupRequest(namespace=namespace, keys=keys_to_wire(keys))
        reply = self._quickly(pb.DoorRequest(lookup=request), self._timeout_s)
        if reply is None:
            reply = self._call(self._stub.Lookup, request)
        return LookupResult(known_words(reply.tiers, TIER_FROM_WIRE))

    def _quickly(self, request: pb.DoorRequest, timeout_s: float) -> Any:
        """What the door answers; None when grpc has to be asked.

        That is when somebody else is at the door, when it is too long, or when it may have to wait.
        """
        if not self._door_lock.acquire(blocking=False):
            return None
        try:
            self._check_open()
            if not self._door.takes(request):
                return None
            return self._door.call(request, timeout_s=max(timeout_s, MIN_RPC_S))
        finally:
            self._door_lock.release()

    def prefetch(self, namespace: NamespaceId, keys: Sequence[BlockKey]) -> int:
        """See `CacheApi.prefetch`."""
        request = pb.PrefetchRequest(namespace=namespace, keys=keys_to_wire(keys))
        return int(self._call(self._stub.Prefetch, request).queued)

    def prepare_load(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float
    ) -> LoadLease:
        """See `CacheApi.prepare_load`."""
        timeout_s = checked_timeout(timeout_s)
        request = pb.PrepareLoadRequest(
            namespace=namespace, keys=keys_to_wire(keys), timeout_s=daemon_timeout_s(timeout_s)
        )
        reply = self._load_at_once(self._stub.PrepareLoad, request, len(keys), timeout_s)
        with self._kept(reply.lease_id):
            return load_lease(keys, reply, self._opened(namespace))

    def begin_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> LoadPlan:
        """See `CacheApi.begin_load`. Asks the door for what it needs for the first time."""
        request = pb.BeginLoadRequest(
            namespace=namespace,
            keys=keys_to_wire(keys),
            mode=LOAD_MODE_TO_WIRE[mode],
            timeout_s=timeout_s,
        )
        reply = self._load_at_once(self._stub.BeginLoad, request, len(keys), self._timeout_s)
        with self._kept(reply.lease_id):
            return self._plan(namespace, keys, mode, reply)

    @contextlib.contextmanager
    def _kept(self, lease_id: bytes) -> Iterator[None]:
        """Give a lease back if the block fails: nobody will know of it."""
        try:
            yield
        except UcmError:
            with contextlib.suppress(UcmError):  # else it ends by its deadline, or the session
                unused = pb.ReleaseRequest(lease_ids=[lease_id])
                self._call(self._stub.Release, unused, timeout_s=MIN_RPC_S)
            raise

    def _plan(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        mode: LoadMode,
        reply: pb.BeginLoadReply,
    ) -> LoadPlan:
        found = self._opened(namespace)
        return self._plans.plan(found.handle, keys, mode, reply, found.arena)

    def _opened(self, namespace: NamespaceId) -> OpenNamespace:
        found = self._namespaces.get(namespace)
        if found is None:
            self._check_open()
            raise BlockNotFoundError("this namespace is not open in this session")
        return found

    def complete_load(self, lease_id: LeaseId, corrupt: Sequence[BlockKey] = ()) -> None:
        """See `CacheApi.complete_load`."""
        request = pb.CompleteLoadRequest(lease_id=lease_id, corrupt=keys_to_wire(corrupt))
        quick = pb.DoorRequest(complete_load=request)
        if corrupt or self._quickly(quick, self._timeout_s) is None:
            self._call_patiently(self._stub.CompleteLoad, request)

    def prepare_store(
        self, namespace: NamespaceId, parent: BlockKey, keys: Sequence[BlockKey]
    ) -> StoreLease:
        """See `CacheApi.prepare_store`."""
        request = pb.PrepareStoreRequest(
            namespace=namespace, parent=check_key(parent), keys=keys_to_wire(keys)
        )
        reply = self._call(self._stub.PrepareStore, request)
        open_namespace = self._namespaces.get(namespace)
        staging = self._staging
        if open_namespace is None or staging is None:
            raise TierUnavailableError("the session was closed during the call")
        with self._kept(reply.lease_id):
            return store_lease(keys, reply, open_namespace.handle.layout, staging)

    def complete_store(
        self, lease_id: LeaseId, checksums: Mapping[BlockKey, SlabChecksums]
    ) -> tuple[StoreStatus, ...]:
        """See `CacheApi.complete_store`. Refused for want of capacity, it is tried again in time.

        Raises:
            CapacityError: the daemon copied others' stores all the time; the lease stays.
        """
        if len({len(block) for block in checksums.values()}) > 1:
            raise InvalidArgumentError("the blocks of one lease have as many checksums each")
        request = pb.CompleteStoreRequest(
            lease_id=lease_id,
            keys=keys_to_wire(list(checksums)),
            checksums=checksums_to_wire(checksums.values()),
        )
        reply = self._call_patiently(self._stub.CompleteStore, request)
        return known_words(reply.statuses, STORE_STATUS_FROM_WIRE)

    def pin(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        hold_s: float = 3600.0,
        timeout_s: float,
    ) -> PinLease:
        """See `CacheApi.pin`."""
        request = pb.PinRequest(
            namespace=namespace,
            keys=keys_to_wire(keys),
            hold_s=hold_s,
            timeout_s=daemon_timeout_s(timeout_s),
        )
        reply = self._load(self._stub.Pin, request, timeout_s)
        return PinLease(LeaseId(reply.lease_id), reply.num_blocks, reply.hold_s)

    def select(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        timeout_s: float,
    ) -> SelectResult:
        """See `CacheApi.select`."""
        layout = self._opened(namespace).handle.layout
        message = self._selections.message(
            (namespace, layout), keys, request, daemon_timeout_s(timeout_s)
        )
        reply = self._call(self._stub.Select, message, timeout_s=timeout_s)
        return self._selections.result(reply, request, layout, len(keys))

    def select_and_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        request: SelectRequest,
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> tuple[SelectResult, LoadPlan]:
        """See `CacheApi.select_and_load`. Asks the door for what it needs for the first time."""
        layout = self._opened(namespace).handle.layout
        message = self._selections.message(
            (namespace, layout), keys, request, daemon_timeout_s(timeout_s)
        )
        whole = pb.SelectAndLoadRequest(select=message, mode=LOAD_MODE_TO_WIRE[mode])
        reply = self._load(self._stub.SelectAndLoad, whole, timeout_s)
        with self._kept(reply.load.lease_id):
            result = self._selections.result(reply.selection, request, layout, len(keys))
            chosen = [keys[index] for index in result.union()]
            return result, self._plan(namespace, chosen, mode, reply.load)

    def map_summaries(
        self, namespace: NamespaceId, keys: Sequence[BlockKey], *, timeout_s: float
    ) -> SummaryLease:
        """See `CacheApi.map_summaries`. Asks the door for the memory once a namespace."""
        checked, kind = check_keys(keys), self._opened(namespace).handle.summary
        message = pb.MapSummariesRequest(
            namespace=namespace, keys=checked.packed, timeout_s=daemon_timeout_s(timeout_s)
        )
        reply = self._call(self._stub.MapSummaries, message, timeout_s=timeout_s)
        with self._kept(reply.lease_id):
            return self._selections.lease((namespace, kind), checked, reply)

    def release(self, lease_id: LeaseId) -> None:
        """See `CacheApi.release`."""
        request = pb.ReleaseRequest(lease_ids=[lease_id])
        if self._quickly(pb.DoorRequest(release=request), self._timeout_s) is None:
            self._call_patiently(self._stub.Release, request)

    def flush(self, *, timeout_s: float) -> bool:
        """See `CacheApi.flush`. Refused a place to wait, it comes again until the time-out."""

        def flush(left_s: float) -> bool:
            request = pb.FlushRequest(timeout_s=daemon_timeout_s(left_s))
            return bool(self._call(self._stub.Flush, request, timeout_s=left_s).flushed)

        try:
            return patiently(flush, timeout_s)
        except CapacityError:
            return False

    def close(self) -> None:
        """See `CacheApi.close`. Waits until the daemon has ended the session, but not for long.

        Calls of other threads that are under way fail.
        """
        if os.getpid() == self._pid:
            self._channel.close()
            leave_s = min(self._timeout_s, _MAX_LEAVE_S)
            # A lookup is over in a millisecond. What takes longer is ended, so that nobody reads
            # from a socket that is closed here.
            is_ours = self._door_lock.acquire(timeout=min(leave_s, _MAX_TURN_S))
            if is_ours:
                self._door.leave(timeout_s=leave_s)
            else:
                self._door.hang_up()
                is_ours = self._door_lock.acquire(timeout=leave_s)
            self._door.close()
            if is_ours:
                self._door_lock.release()
        self._door.close()
        # Leases that the caller still holds keep the memory mapped; ours was the last use else.
        self._staging = None
        self._board.close()
        self._namespaces.clear()
        self._plans.close()
        self._selections.close()
        _live.discard(self)

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise TierUnavailableError("this session belongs to the parent process; connect again")
        if not self._door.is_open():
            raise TierUnavailableError("the session has ended; connect again")

    def _call(
        self,
        method: Callable[..., Any],  # generated code carries no types
        request: object,
        *,
        timeout_s: float | None = None,
        made: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        self._check_open()
        metadata = self._metadata + made
        deadline_s = max(self._timeout_s if timeout_s is None else timeout_s, MIN_RPC_S)
        try:
            return method(request, timeout=deadline_s, metadata=metadata)
        except grpc.RpcError as error:
            raise translated(error) from error
        except ValueError as error:
            # What grpc raises when the channel was closed by another thread.
            raise TierUnavailableError("the session has ended; connect again") from error

    def _pass_load(self) -> tuple[tuple[str, str], ...]:
        """Leave to load, as metadata of the one load that it is for."""
        self._check_open()
        return self._board.pass_load()

    def _load(self, method: Callable[..., Any], request: object, timeout_s: float) -> Any:
        return self._call(method, request, timeout_s=timeout_s, made=self._pass_load())

    def _load_at_once(
        self,
        method: Callable[..., Any],
        request: pb.PrepareLoadRequest | pb.BeginLoadRequest,
        num_keys: int,
        timeout_s: float,
    ) -> Any:
        """As `_load`, but by the door if that can answer."""
        num_layers = self._opened(NamespaceId(request.namespace)).handle.layout.num_layers
        made, deadline_s = self._pass_load(), time.monotonic() + timeout_s
        if load_reply_bytes(num_keys, num_layers) <= MAX_PACKET_BYTES:
            if isinstance(request, pb.PrepareLoadRequest):
                quick = pb.DoorRequest(made=made[0][1], prepare_load=request)
            else:
                quick = pb.DoorRequest(made=made[0][1], begin_load=request)
            reply = self._quickly(quick, timeout_s)
            if reply is not None:
                return reply
        left_s = max(deadline_s - time.monotonic(), 0.0)
        if isinstance(request, pb.PrepareLoadRequest):
            request.timeout_s = daemon_timeout_s(left_s)
        return self._call(method, request, timeout_s=left_s, made=made)

    def _call_patiently(self, method: Callable[..., Any], request: object) -> Any:
        """A call that gives something back: refused, it is made again until its deadline."""
        return patiently(
            lambda left_s: self._call(method, request, timeout_s=left_s), self._timeout_s
        )

    def _abandon_in_child(self) -> None:
        # A copy of the door's descriptor would keep the session alive after the parent's death.
        self._door.close()


def _abandon_all_in_child() -> None:
    for cache in list(_live):
        cache._abandon_in_child()  # noqa: SLF001  this module's own


os.register_at_fork(after_in_child=_abandon_all_in_child)
