"""The door: the side socket that checks who comes, starts sessions and hands out descriptors.

A SOCK_SEQPACKET socket, so one packet is one `DoorRequest` or `DoorReply`. A connection is a
session: it begins with `Hello` and ends with the connection, however that ends, and with it go the
session's leases and staging memory. One thread a session, because opening a namespace may take as
long as its recovery; the number of sessions is bounded.

    client                                       daemon
    connect                                      SO_PEERCRED: our user, or one allowed
    Hello(protocol_version)              ->
                                         <-      Welcome(token, staging_bytes) + staging and board
    OpenNamespace(spec, fingerprint)     ->
                                         <-      NamespaceOpened(arena_bytes) + arena memfd
    OpenSegment(namespace, number)       ->
                                         <-      SegmentOpened(file_id) + the file, read-only
    OpenProgress                         ->
                                         <-      ProgressOpened(area_bytes) + memfd + socket
    OpenSummaries(namespace)             ->
                                         <-      SummariesOpened(area_bytes) + memfd
    a call of Cache                      ->      waits for no disk
                                         <-      its reply, or Elsewhere: make it by gRPC
    GiveUp                               ->      gives back what the call before it leased
    close, or death                      ->      end of the session

Anything else gets a `DoorError` and, unless a well-formed request was merely refused, a hang-up.

A call wakes one thread that waits for this client alone, where grpc's server goes through its
poller and its pool and back: 0.43 ms, not 1.3, for a lookup of 1,000 keys. Calls: Lookup,
PrepareLoad, BeginLoad, CompleteLoad, Release; `answers` has what they do, here and by gRPC.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from . import __version__
from .answers import Answers
from .config import ServiceConfig
from .door_wire import CALLS, MAX_PACKET_BYTES, new_packet_buffer
from .errors import (
    CapacityError,
    ConfigError,
    InvalidArgumentError,
    PermissionDeniedError,
    TierUnavailableError,
    UcmError,
)
from .hashing import NamespaceSpec
from .manager import Manager
from .protos import cache_pb2 as pb
from .select_wire import kind_from_wire, kind_to_wire
from .sockets import SOCKET_MODE
from .types import LeaseId, NamespaceId, SessionId
from .wire import (
    PROTOCOL_VERSION,
    TOKEN_BYTES,
    retry_after_ms,
    spec_from_wire,
)

_log = logging.getLogger(__name__)

HELLO_TIMEOUT_S: Final = 5.0
"""A connection that has not said hello by then is closed."""

_SEND_TIMEOUT_S: Final = 5
_LISTEN_BACKLOG: Final = 64
_STOP_TIMEOUT_S: Final = 10.0

_Answer = tuple[pb.DoorReply, AbstractContextManager[tuple[int, ...]]]
"""A reply and the descriptors that go with it, in a context that outlasts the sending."""


@dataclass(slots=True)
class _Visitor:
    """A client behind its Hello."""

    connection: socket.socket
    session: SessionId
    packets: bytearray
    """What comes, one packet at a time."""
    lease: LeaseId | None = None
    """What the last answer leased, and its client may give up."""

    def send(self, reply: pb.DoorReply, *descriptors: int) -> None:
        """Answer; who gives this answer up gives its lease back."""
        lease = reply.prepared.lease_id or reply.begun.lease_id
        self.lease = LeaseId(lease) if lease else None
        _send(self.connection, reply, *descriptors)

    def give_back(self, manager: Manager) -> None:
        """Nobody will read the last answer."""
        lease, self.lease = self.lease, None
        if lease is not None:
            manager.release(self.session, lease)


class SessionTokens:
    """Which token belongs to which live session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_token: dict[bytes, SessionId] = {}

    def issue(self, session: SessionId) -> bytes:
        """A fresh token for `session`: 32 random bytes."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._by_token[token] = session
        return token

    def revoke(self, token: bytes) -> None:
        """Forget a token; unknown ones are ignored."""
        with self._lock:
            self._by_token.pop(token, None)

    def session_of(self, token: bytes) -> SessionId:
        """The session that `token` was issued to.

        Raises:
            PermissionDeniedError: there is none (any more).
        """
        with self._lock:
            session = self._by_token.get(token)
        if session is None:
            raise PermissionDeniedError(
                "no session has this token; its connection to the door has ended, connect again"
            )
        return session


class Door:
    """The listening door of one daemon."""

    def __init__(
        self, path: Path, answers: Answers, tokens: SessionTokens, config: ServiceConfig
    ) -> None:
        """Bind and listen; nothing is answered before `start`.

        Raises:
            ConfigError: the path cannot be bound.
        """
        self._answers = answers
        self._manager = answers.manager
        self._tokens = tokens
        self._config = config
        self._allowed_uids = frozenset({os.geteuid(), *config.allowed_uids})
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._draining = False
        self._stopped = False
        self._listener = _listen(path)
        self._openings: Mapping[str, Callable[[SessionId, pb.DoorRequest], _Answer]] = {
            "open_namespace": self._open_namespace,
            "open_segment": self._open_segment,
            "open_progress": self._open_progress,
            "open_summaries": self._open_summaries,
        }
        self._acceptor = threading.Thread(target=self._accept_loop, name="ucm-door", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._acceptor.start()

    @property
    def num_connections(self) -> int:
        """Connections now, greeted or not."""
        with self._lock:
            return len(self._connections)

    def drain(self) -> None:
        """Refuse new sessions from now on; the present ones stay."""
        self._draining = True

    def stop(self) -> None:
        """End every session and stop listening; returns when all of its threads ended."""
        with self._lock:
            self._stopped = True
            threads = list(self._connections.values())
            for connection in self._connections:
                _hang_up(connection)
        _hang_up(self._listener)
        if self._acceptor.is_alive():
            self._acceptor.join(_STOP_TIMEOUT_S)
        self._listener.close()
        for thread in threads:
            thread.join(_STOP_TIMEOUT_S)

    def _accept_loop(self) -> None:
        while not self._stopped:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._stopped:
                    return
                # Out of descriptors, most likely: the connection waits in the backlog.
                _log.warning("the door cannot accept: %s", error)
                threading.Event().wait(0.1)
                continue
            self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        timeout = struct.pack("@ll", _SEND_TIMEOUT_S, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        try:
            peer = self._check_peer(connection)
            thread = threading.Thread(
                target=self._serve, args=(connection, peer), name="ucm-session", daemon=True
            )
            with self._lock:
                self._check_room()
                _start(thread)
                self._connections[connection] = thread
        except UcmError as error:
            _log.warning("the door refused a client: %s", error)
            _try_send(connection, _error_reply(error))
            connection.close()

    def _check_peer(self, connection: socket.socket) -> str:
        size = struct.calcsize("3i")
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, uid, _ = struct.unpack("3i", packed)
        if uid not in self._allowed_uids:
            raise PermissionDeniedError(
                f"user {uid} may not connect; the operator can add it to service.allowed_uids"
            )
        return f"pid {pid} uid {uid}"

    def _check_room(self) -> None:
        if self._stopped or self._draining:
            raise TierUnavailableError("the daemon is stopping; connect again later")
        if len(self._connections) >= self._config.max_sessions:
            raise CapacityError(
                f"{len(self._connections)} sessions are connected, the limit is "
                "service.max_sessions; close one or raise it"
            )

    def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            self._serve_session(connection, peer)
        except UcmError as error:
            _log.warning("session of %s ended: %s", peer, error)
        except OSError as error:
            _log.warning("session of %s broke off: %s", peer, error)
        finally:
            # Hanging up comes last: it tells the client that its place is free again.
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _serve_session(self, connection: socket.socket, peer: str) -> None:
        packets = new_packet_buffer()
        hello = _receive_hello(connection, packets)
        if hello is None:
            return
        client = hello.client[:64]
        try:
            session = self._manager.open_session(f"{client!r} {peer}")
        except UcmError as error:
            _try_send(connection, _error_reply(error))
            raise
        token = self._tokens.issue(session)
        _log.info("session %d began: %s %r", session, peer, client)
        try:
            staging = self._manager.staging_arena(session)
            welcome = self._welcome(staging.size_bytes, token)
            _send(connection, welcome, staging.fd, *self._answers.board.fds)
            visitor = _Visitor(connection, session, packets)
            while self._answer_one(visitor):
                pass
        finally:
            # The token first: a call that arrives now must not find a session half ended.
            self._tokens.revoke(token)
            self._manager.close_session(session)
            self._answers.forget(session)
            _log.info("session %d ended", session)

    def _welcome(self, staging_bytes: int, token: bytes) -> pb.DoorReply:
        return pb.DoorReply(
            welcome=pb.Welcome(
                protocol_version=PROTOCOL_VERSION,
                daemon_version=__version__,
                token=token,
                staging_bytes=staging_bytes,
                max_keys_per_call=self._config.max_keys_per_call,
                max_message_bytes=self._config.max_message_bytes,
                max_read_bytes_per_s=self._manager.config.nvme.max_read_bytes_per_s,
                board_bytes=self._answers.board.size_bytes,
            )
        )

    def _answer_one(self, visitor: _Visitor) -> bool:
        """Answer the next request; False when the client hung up."""
        try:
            request = _receive(visitor.connection, visitor.packets)
        except InvalidArgumentError as error:
            _try_send(visitor.connection, _error_reply(error))
            raise
        if request is None:
            return False
        kind = request.WhichOneof("request") or ""
        if kind == "give_up":
            visitor.give_back(self._manager)
            return True
        if kind not in CALLS and kind not in self._openings:
            refusal = InvalidArgumentError("the door expects a request for something here")
            _try_send(visitor.connection, _error_reply(refusal))
            raise refusal
        try:
            reply, descriptors = self._answer(visitor.session, kind, request)
        except UcmError as error:
            level = logging.DEBUG if kind in CALLS else logging.WARNING
            _log.log(level, "session %d is refused %s: %s", visitor.session, kind, error)
            visitor.send(_error_reply(error))
            return True
        with descriptors as fds:
            visitor.send(reply, *fds)
        return True

    def _answer(self, session: SessionId, kind: str, request: pb.DoorRequest) -> _Answer:
        if kind in CALLS:
            return self._answers.at_once(session, kind, request), contextlib.nullcontext(())
        return self._openings[kind](session, request)

    def _open_namespace(self, session: SessionId, request: pb.DoorRequest) -> _Answer:
        spec = _checked_spec(request.open_namespace)
        kind = kind_from_wire(request.open_namespace.summary)
        handle = self._manager.open_namespace(session, spec, summary=kind)
        arena = self._manager.arena(session, handle.id)
        opened = pb.NamespaceOpened(
            namespace=handle.id,
            arena_bytes=arena.size_bytes,
            summary=kind_to_wire(handle.summary),
        )
        return pb.DoorReply(opened=opened), contextlib.nullcontext((arena.fd,))

    def _open_segment(self, session: SessionId, request: pb.DoorRequest) -> _Answer:
        asked = request.open_segment
        loads = self._manager.layer_loads
        opened = loads.open_segment(session, NamespaceId(asked.namespace), asked.segment)
        reply = pb.SegmentOpened(file_id=opened.file_id, is_direct=opened.is_direct)
        return pb.DoorReply(segment=reply), _closing(opened.fd)

    def _open_progress(self, session: SessionId, _request: pb.DoorRequest) -> _Answer:
        area = self._manager.layer_loads.progress_area(session)
        reply = pb.ProgressOpened(area_bytes=area.arena.size_bytes)
        fds = (area.arena.fd, area.signal_fd)
        return pb.DoorReply(progress=reply), contextlib.nullcontext(fds)

    def _open_summaries(self, session: SessionId, request: pb.DoorRequest) -> _Answer:
        namespace = NamespaceId(request.open_summaries.namespace)
        arena = self._manager.selections.arena(session, namespace)
        reply = pb.SummariesOpened(area_bytes=arena.size_bytes)
        return pb.DoorReply(summaries=reply), contextlib.nullcontext((arena.fd,))


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[tuple[int]]:
    """A descriptor that is closed once it was passed on."""
    try:
        yield (fd,)
    finally:
        os.close(fd)


def _checked_spec(request: pb.OpenNamespace) -> NamespaceSpec:
    spec = spec_from_wire(request.spec)
    if spec.fingerprint() != NamespaceId(request.namespace):
        raise InvalidArgumentError(
            "the client and the daemon compute different ids for this namespace: a field has "
            "another type than declared (an int where a float is meant), or their versions differ"
        )
    return spec


def _listen(path: Path) -> socket.socket:
    kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        listener.bind(str(path))
        path.chmod(SOCKET_MODE)
        listener.listen(_LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror}") from error
    return listener


def _receive_hello(connection: socket.socket, packets: bytearray) -> pb.Hello | None:
    """The client's greeting, or None if it hung up; a bad one is answered before it raises."""
    connection.settimeout(HELLO_TIMEOUT_S)
    try:
        request = _receive(connection, packets)
        if request is not None:
            _check_hello(request)
    except InvalidArgumentError as error:
        _try_send(connection, _error_reply(error))
        raise
    connection.settimeout(None)
    return request.hello if request else None


def _check_hello(request: pb.DoorRequest) -> None:
    if request.WhichOneof("request") != "hello":
        raise InvalidArgumentError("the door expects Hello first")
    if request.hello.protocol_version != PROTOCOL_VERSION:
        raise InvalidArgumentError(
            f"this daemon speaks protocol version {PROTOCOL_VERSION}, the client "
            f"{request.hello.protocol_version}; run the same release of ucm on both sides"
        )


def _receive(connection: socket.socket, packets: bytearray) -> pb.DoorRequest | None:
    """One request, by way of `packets`, or None at the end of the connection.

    Raises:
        InvalidArgumentError: not a message of ours, too long, with descriptors, or too late.
    """
    # recvmsg without room for ancillary data: the kernel closes descriptors nobody asked for.
    try:
        size, _, flags, _ = connection.recvmsg_into([packets])
    except TimeoutError as error:
        raise InvalidArgumentError("no Hello in time") from error
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise InvalidArgumentError(
            f"a door message is above {MAX_PACKET_BYTES} bytes or carries descriptors"
        )
    if not size:
        return None
    try:
        return pb.DoorRequest.FromString(bytes(memoryview(packets)[:size]))
    except DecodeError as error:
        raise InvalidArgumentError("this is not a door message") from error


def _error_reply(error: UcmError) -> pb.DoorReply:
    return pb.DoorReply(
        error=pb.DoorError(
            error=type(error).__name__,
            message=str(error)[:4096],
            retry_after_ms=retry_after_ms(error),
        )
    )


def _send(connection: socket.socket, reply: pb.DoorReply, *descriptors: int) -> None:
    socket.send_fds(connection, [reply.SerializeToString()], list(descriptors))


def _start(thread: threading.Thread) -> None:
    """Start a session's thread.

    Raises:
        CapacityError: the system has no more threads.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise CapacityError(f"no thread for another session: {error}", retry_after_s=1.0) from error


def _try_send(connection: socket.socket, reply: pb.DoorReply) -> None:
    try:
        _send(connection, reply)
    except OSError as error:
        _log.debug("a refused client was gone before its answer: %s", error)


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        _log.debug("hanging up: %s", error)
