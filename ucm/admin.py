"""`AdminClient`: what `ucm status`, `ucm collection` and other operators' tools say to a daemon.

Every call has a deadline and raises `TierUnavailableError` when no daemon answers in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc

from .collection_api import CollectionApi
from .collection_client import RemoteCollections
from .errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    TierUnavailableError,
    UcmError,
)
from .grants import ManagerStatus
from .protos import cache_pb2 as pb
from .protos import cache_pb2_grpc as pb_grpc
from .sockets import admin_path, check_socket_path, grpc_target
from .status_wire import status_from_wire
from .wire import error_from_metadata

_GRACE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """A snapshot of a running daemon."""

    version: str
    pid: int
    uptime_s: float
    socket_path: str
    store_path: str
    """Empty when there is no NVMe tier."""
    store: ManagerStatus


class AdminClient:
    """One operator's connection; use it as a context manager."""

    def __init__(self, socket_path: Path, *, timeout_s: float = 2.0) -> None:
        """Prepare to talk to the daemon whose gRPC socket is `socket_path`; sends nothing yet.

        Raises:
            ConfigError: no socket can have this path.
        """
        check_socket_path(socket_path)
        self._socket_path = socket_path
        self._path = admin_path(socket_path)
        self._timeout_s = timeout_s
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(grpc_target(self._path), options=options)
        self._stub = pb_grpc.AdminStub(self._channel)
        self.collections: CollectionApi = RemoteCollections(self._channel, self._call)
        """The daemon's collections of documents."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def status(self) -> DaemonStatus:
        """How the daemon is doing."""
        reply = self._call(self._stub.Status, pb.StatusRequest(), self._timeout_s)
        return DaemonStatus(
            version=reply.version,
            pid=reply.pid,
            uptime_s=reply.uptime_s,
            socket_path=reply.socket_path,
            store_path=reply.store_path,
            store=status_from_wire(reply),
        )

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until all that was accepted is flushed; False on time-out."""
        request = pb.FlushRequest(timeout_s=timeout_s)
        return bool(self._call(self._stub.Flush, request, timeout_s + _GRACE_S).flushed)

    def drain(self) -> None:
        """Ask the daemon to stop as SIGTERM does; returns when it has begun."""
        self._call(self._stub.Drain, pb.DrainRequest(), self._timeout_s)

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._channel.close()

    def _call(self, method: Any, request: object, timeout_s: float) -> Any:  # generated code
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _translated(self, error: grpc.RpcError) -> UcmError:
        assert isinstance(error, grpc.Call)
        details = error.details() or "no details"
        ours = error_from_metadata(error.trailing_metadata() or (), details)
        if ours is not None:
            return ours
        if "Permission denied" in details:
            return PermissionDeniedError(
                f"{self._path} belongs to another user; ask as the daemon's user"
            )
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "message" in details:
            return InvalidArgumentError(
                f"too large for the daemon ({details}): send less at once, or raise "
                "service.max_message_bytes"
            )
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and self._path.exists():
            return TierUnavailableError(
                f"the daemon at {self._path} does not answer in time: it hangs or is overloaded; "
                "wait longer, or look at its log and restart it"
            )
        return TierUnavailableError(
            f"no daemon answers at {self._path} ({error.code().name}); start one with "
            f"`ucm serve --socket {self._socket_path}`, or name its socket with --socket"
        )
