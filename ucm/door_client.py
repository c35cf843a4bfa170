"""The client's end of the door: one connection, one session, the memory that comes with it.

`DoorClient` is not thread-safe but for `hang_up`; `ucm.client` serialises its calls. Every wait is
bounded. A request whose answer was not read as what it asks for ends the connection, whatever cut
in, an interrupt too: a late answer, perhaps with memory, would be taken for the next request's.
Only a call that was sent and is not answered in time does not: its answer is dropped when it comes,
and until then no other call is taken. What it leases goes back at once: a `GiveUp` follows it.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from ucm.storage.extents import SegmentFd

from . import __version__
from .door_wire import ANSWERS, CALLS, LEASING, MAX_PACKET_BYTES, new_packet_buffer
from .errors import InvalidArgumentError, PermissionDeniedError, TierUnavailableError
from .hashing import NamespaceSpec
from .load_board import BoardReader
from .mapping import map_shared
from .protos import cache_pb2 as pb
from .select_wire import kind_to_wire
from .types import NamespaceId, SummaryKind
from .wire import PROTOCOL_VERSION, TOKEN_BYTES, error_from_wire, spec_to_wire

_log = logging.getLogger(__name__)

_MAX_FDS: Final = max(num_fds for _, num_fds in ANSWERS.values())
_ANCILLARY_BYTES: Final = socket.CMSG_LEN(_MAX_FDS * array.array("i").itemsize)
_GIVE_UP: Final = pb.DoorRequest(give_up=pb.GiveUp()).SerializeToString()


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the daemon said to `Hello`."""

    token: bytes
    max_keys_per_call: int
    max_message_bytes: int
    max_read_bytes_per_s: int
    """For who reads segment files itself; 0 is no limit."""
    staging: memoryview
    """The session's staging memory, writable."""
    board: BoardReader
    """How the daemon stands with loads."""


@dataclass(frozen=True, slots=True)
class OpenedNamespace:
    """What the daemon said to `OpenNamespace`."""

    arena: memoryview
    """Its blocks in memory, read-only."""
    summary: SummaryKind | None
    """The kind of summaries that this session has of them."""


class DoorClient:
    """One connection to a daemon's door."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """Connect; nothing is sent yet.

        Raises:
            TierUnavailableError: nobody listens there.
            PermissionDeniedError: who listens there could be anybody.
        """
        self._path = path
        self._owes_answer = False
        self._packets = new_packet_buffer()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
            _check_listener(self._socket, path)
        except OSError as error:
            self.close()
            raise TierUnavailableError(
                f"no daemon answers at {path} ({error.strerror or error}); "
                "start one with `ucm serve`"
            ) from error
        except PermissionDeniedError:
            self.close()
            raise

    def hello(self, *, timeout_s: float) -> Greeting:
        """Begin the session.

        Raises:
            UcmError: whatever the daemon refused it with.
            TierUnavailableError: it does not answer in time.
        """
        request = pb.DoorRequest(
            hello=pb.Hello(protocol_version=PROTOCOL_VERSION, client=f"ucm-python/{__version__}")
        )
        reply, (fd, board_fd, tickets) = self._ask(request, timeout_s=timeout_s)
        welcome = reply.welcome
        if welcome.protocol_version != PROTOCOL_VERSION or len(welcome.token) != TOKEN_BYTES:
            for each in (fd, board_fd, tickets):
                os.close(each)
            raise TierUnavailableError(f"what answers at {self._path} is not a daemon of ours")
        with contextlib.ExitStack() as unused:
            unused.callback(os.close, tickets)
            try:
                staging = _map(fd, welcome.staging_bytes, writable=True)
            finally:
                board = _map(board_fd, welcome.board_bytes, writable=False)
            try:
                reader = BoardReader(board, tickets, time.monotonic_ns)
            except (OSError, ValueError) as error:
                raise TierUnavailableError(f"the daemon passed no board: {error}") from error
            unused.pop_all()
        return Greeting(
            token=welcome.token,
            max_keys_per_call=welcome.max_keys_per_call,
            max_message_bytes=welcome.max_message_bytes,
            max_read_bytes_per_s=welcome.max_read_bytes_per_s,
            staging=staging,
            board=reader,
        )

    def open_namespace(
        self,
        spec: NamespaceSpec,
        namespace: NamespaceId,
        summary: SummaryKind | None = None,
        *,
        timeout_s: float,
    ) -> OpenedNamespace:
        """Open a namespace, with summaries of a kind or without, and map its arena, read-only.

        Raises:
            UcmError: whatever the daemon refused it with.
            TierUnavailableError: it does not answer in time; the connection is of no use then.
        """
        message = pb.OpenNamespace(
            spec=spec_to_wire(spec), namespace=namespace, summary=kind_to_wire(summary)
        )
        reply, (fd,) = self._ask(pb.DoorRequest(open_namespace=message), timeout_s=timeout_s)
        arena = _map(fd, reply.opened.arena_bytes, writable=False)
        # A daemon that knows no summaries says nothing of them: the session then has none.
        return OpenedNamespace(arena, SummaryKind.from_number(reply.opened.summary))

    def open_summaries(self, namespace: NamespaceId, *, timeout_s: float) -> memoryview:
        """The memory of an open namespace's summaries, mapped read-only.

        Raises:
            UcmError: whatever the daemon refused it with.
            TierUnavailableError: it does not answer in time; the connection is of no use then.
        """
        message = pb.OpenSummaries(namespace=namespace)
        reply, (fd,) = self._ask(pb.DoorRequest(open_summaries=message), timeout_s=timeout_s)
        return _map(fd, reply.summaries.area_bytes, writable=False)

    def open_segment(self, namespace: NamespaceId, segment: int, *, timeout_s: float) -> SegmentFd:
        """A descriptor of a segment file of an open namespace, read-only; the caller closes it.

        Raises:
            UcmError: whatever the daemon refused it with.
            TierUnavailableError: it does not answer in time; the connection is of no use then.
        """
        message = pb.OpenSegment(namespace=namespace, segment=segment)
        reply, (fd,) = self._ask(pb.DoorRequest(open_segment=message), timeout_s=timeout_s)
        return SegmentFd(fd, reply.segment.file_id, reply.segment.is_direct)

    def open_progress(self, *, timeout_s: float) -> tuple[memoryview, int]:
        """The session's progress area, mapped read-only, and its signal; the caller closes that.

        Raises:
            UcmError: whatever the daemon refused it with.
            TierUnavailableError: it does not answer in time; the connection is of no use then.
        """
        request = pb.DoorRequest(open_progress=pb.OpenProgress())
        reply, (fd, signal_fd) = self._ask(request, timeout_s=timeout_s)
        try:
            return _map(fd, reply.progress.area_bytes, writable=False), signal_fd
        except TierUnavailableError:
            os.close(signal_fd)
            raise

    def takes(self, request: pb.DoorRequest) -> bool:
        """Whether `call` may be called with it; does not wait."""
        if self._owes_answer and _has(self._socket.fileno(), select.POLLIN):
            with contextlib.suppress(OSError):  # it broke off: the next call finds out
                self._drop_answer(time.monotonic())
        return not self._owes_answer and request.ByteSize() <= MAX_PACKET_BYTES

    def call(self, request: pb.DoorRequest, *, timeout_s: float) -> Any:
        """A call of `Cache` without grpc. `takes` has just said that it may be made.

        Returns:
            What the call replies; None when it has to be made by gRPC.

        Raises:
            UcmError: whatever the daemon refused it with.
            TierUnavailableError: it does not answer in time; the connection stays.
        """
        reply, _ = self._ask(request, timeout_s=timeout_s)
        answered = reply.WhichOneof("reply") or ""
        return None if answered == "elsewhere" else getattr(reply, answered)

    def is_open(self) -> bool:
        """Whether the daemon still holds its end; does not wait."""
        return not _has(self._socket.fileno(), select.POLLRDHUP)

    def leave(self, *, timeout_s: float) -> None:
        """End the session and wait until the daemon has ended it too, then `close`."""
        try:
            self._socket.settimeout(timeout_s)
            self._socket.shutdown(socket.SHUT_WR)
            # The daemon hangs up last, when everything was given back: the end of its stream.
            while self._socket.recv(MAX_PACKET_BYTES):
                pass
        except OSError as error:
            _log.debug("leaving: %s", error)
        self.close()

    def hang_up(self) -> None:
        """End the session without waiting; who waits for an answer on another thread fails now."""
        with contextlib.suppress(OSError):  # the daemon was the first
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up without waiting, but for no other thread: see `hang_up`. Idempotent."""
        self._socket.close()

    def _ask(self, request: pb.DoorRequest, *, timeout_s: float) -> tuple[pb.DoorReply, list[int]]:
        """Send one request and return its reply with the descriptors that came along."""
        packet = request.SerializeToString()
        if len(packet) > MAX_PACKET_BYTES:
            raise InvalidArgumentError(
                f"this namespace's description has {len(packet)} bytes, at most "
                f"{MAX_PACKET_BYTES} pass the door; shorten its texts"
            )
        asked = request.WhichOneof("request") or ""
        deadline_s = time.monotonic() + timeout_s
        is_in_step = False
        try:
            if self._owes_answer:
                self._drop_answer(deadline_s)
            self._socket.settimeout(timeout_s)
            # A door that refuses a client answers before it hears it, and hangs up: then sending
            # fails, but the reason is there to be read.
            with contextlib.suppress(BrokenPipeError):
                self._socket.sendall(packet)
            try:
                data, fds, flags = self._receive(deadline_s)
            except TimeoutError:
                if asked in LEASING:
                    self._socket.settimeout(0)
                    self._socket.sendall(_GIVE_UP)
                self._owes_answer = asked in CALLS
                is_in_step = self._owes_answer
                raise
            reply = _parse(data, fds, flags, request)
            is_in_step = True
        except OSError as error:
            raise TierUnavailableError(
                f"the daemon at {self._path} does not answer ({error.strerror or 'timed out'})"
            ) from error
        finally:
            # Whatever cut in, an interrupt too: a late answer would be taken for the next one's.
            if not is_in_step:
                self.close()
        if reply.WhichOneof("reply") == "error":
            refusal = reply.error
            raise error_from_wire(refusal.error, refusal.message, refusal.retry_after_ms)
        return reply, fds

    def _drop_answer(self, deadline_s: float) -> None:
        """Take what a call that was given up is answered; cut off, it ends the connection."""
        is_dropped = False
        try:
            _, fds, _ = self._receive(deadline_s)
            for fd in fds:
                os.close(fd)
            self._owes_answer = False
            is_dropped = True
        finally:
            if not is_dropped:
                self.close()

    def _receive(self, deadline_s: float) -> tuple[bytes, list[int], int]:
        """One packet with its descriptors and flags."""
        attempts = 2
        while True:
            self._socket.settimeout(max(deadline_s - time.monotonic(), 0.001))
            try:
                size, passed, flags, _ = self._socket.recvmsg_into(
                    [self._packets], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError:
                # Reported once, ahead of what the other side sent before it hung up.
                attempts -= 1
                if not attempts:
                    raise
            else:
                return bytes(memoryview(self._packets)[:size]), _descriptors(passed), flags


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors among what came beside a packet."""
    fds = array.array("i")
    for level, kind, packed in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(packed[: len(packed) // fds.itemsize * fds.itemsize])
    return fds.tolist()


def _has(fd: int, event: int) -> bool:
    """Whether something waits at a socket; whatever it is, where it is closed."""
    if fd < 0:
        return True
    poller = select.poll()
    poller.register(fd, event)
    return bool(poller.poll(0))


def _check_listener(connection: socket.socket, path: Path) -> None:
    """Refuse a stranger's daemon where everybody could have put one.

    A block is as private as its prompt. In a folder such as /tmp/ucm-1000 any user may have been
    first, so there the daemon must run as this user or as root. Elsewhere, who may write the
    folder was the administrator's choice.
    """
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", packed)
    if uid in (os.geteuid(), 0):
        return
    folder = path.absolute().parent
    for each in (folder, folder.parent):
        if each.stat().st_mode & stat.S_IWOTH:
            raise PermissionDeniedError(
                f"user {uid} listens at {path}, in a place where everybody can make a socket; "
                "put the daemon's socket in a folder such as /run/ucm"
            )


def _parse(data: bytes, fds: list[int], flags: int, request: pb.DoorRequest) -> pb.DoorReply:
    """The answer to a request: the one that it asks for, with its descriptors, or an error.

    Raises:
        TierUnavailableError: it is neither; its descriptors are closed.
    """
    asked = request.WhichOneof("request") or ""
    wanted, num_fds = ANSWERS[asked]
    try:
        reply = pb.DoorReply.FromString(data)
    except DecodeError:
        reply = pb.DoorReply()
    kind = reply.WhichOneof("reply")
    is_whole = len(fds) == num_fds and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    if kind == wanted and is_whole and _is_of_the_namespace(reply, request):
        return reply
    for fd in fds:
        os.close(fd)
    if kind == "error" or (kind == "elsewhere" and asked in CALLS):
        return reply
    raise TierUnavailableError("the daemon closed the door" if not data else "a garbled answer")


def _is_of_the_namespace(reply: pb.DoorReply, request: pb.DoorRequest) -> bool:
    """Whether what was opened is what was asked for, where the answer says what it is."""
    return reply.opened.namespace in (b"", request.open_namespace.namespace)


def _map(fd: int, size_bytes: int, *, writable: bool) -> memoryview:
    """Map `fd`, then close it: the mapping outlives it."""
    try:
        if size_bytes < 1 or os.fstat(fd).st_size < size_bytes:
            # Touching a page behind the end of the file would kill this process (SIGBUS).
            raise TierUnavailableError(
                f"the daemon passed memory of {os.fstat(fd).st_size} bytes and says {size_bytes}"
            )
        return map_shared(fd, size_bytes, writable=writable)
    except (OSError, OverflowError) as error:
        raise TierUnavailableError(
            f"cannot map {size_bytes} bytes of the daemon's memory: {error}"
        ) from error
    finally:
        os.close(fd)
