"""Who may call which method, and what every call goes through.

Denied by default: `PolicyInterceptor` lets a method through only if the table of its socket names
it. Every method of `Cache` needs the token of a live session; health and reflection are open to
whoever can open the socket. Errors travel by the table in `ucm.errors`, the class's name in the
trailing metadata.

Envelope: 10 us a call.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final

import grpc

from .credits import Credit
from .door import SessionTokens
from .errors import CapacityError, PermissionDeniedError, UcmError
from .protos import cache_pb2 as pb
from .types import SessionId
from .wire import TOKEN_METADATA, error_to_metadata

_log = logging.getLogger(__name__)

CACHE_METHODS: Final = tuple(
    f"/ucm.v1.Cache/{method.name}" for method in pb.DESCRIPTOR.services_by_name["Cache"].methods
)
ADMIN_METHODS: Final = tuple(
    f"/ucm.v1.{service}/{method.name}"
    for service in ("Admin", "Collections")
    for method in pb.DESCRIPTOR.services_by_name[service].methods
)

MAX_REFLECTION_STREAMS: Final = 2
"""A stream holds one of the threads that answer calls for as long as its client likes."""


class Policy(enum.Enum):
    """Who may call a method."""

    OPEN = "open"
    """Whoever can open the socket."""
    SESSION = "session"
    """Who has the token of a live session."""


_REFLECTION: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

_COMMON_POLICIES: Final[Mapping[str, Policy]] = {
    "/grpc.health.v1.Health/Check": Policy.OPEN,
    "/grpc.health.v1.Health/List": Policy.OPEN,
    "/grpc.health.v1.Health/Watch": Policy.OPEN,
    _REFLECTION: Policy.OPEN,
}
ENGINE_POLICIES: Final[Mapping[str, Policy]] = {
    **dict.fromkeys(CACHE_METHODS, Policy.SESSION),
    **_COMMON_POLICIES,
}
ADMIN_POLICIES: Final[Mapping[str, Policy]] = {
    # The socket's mode is the check: only the daemon's own user can open it.
    **dict.fromkeys(ADMIN_METHODS, Policy.OPEN),
    **_COMMON_POLICIES,
}


class PolicyInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Refuses every method without a policy, and those whose policy the caller does not meet."""

    def __init__(self, policies: Mapping[str, Policy], tokens: SessionTokens) -> None:
        self._policies = policies
        self._tokens = tokens
        self._streams = threading.Semaphore(MAX_REFLECTION_STREAMS)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See `grpc.ServerInterceptor`."""
        try:
            self._check(handler_call_details)
        except PermissionDeniedError as error:
            return _refusal(error)
        handler = continuation(handler_call_details)
        if handler_call_details.method == _REFLECTION and handler is not None:
            return _limited(handler, self._streams)
        return handler

    def _check(self, call: grpc.HandlerCallDetails) -> None:
        policy = self._policies.get(call.method)
        if policy is None:
            raise PermissionDeniedError(f"no caller may use {call.method}")
        if policy is Policy.SESSION:
            self._tokens.session_of(_token(call.invocation_metadata))


def _refusal(error: UcmError) -> grpc.RpcMethodHandler[bytes, bytes]:
    def refuse(_request: bytes, context: grpc.ServicerContext) -> bytes:
        _abort(context, error)
        return b""

    return grpc.unary_unary_rpc_method_handler(refuse)


def _limited(handler: Any, places: threading.Semaphore) -> Any:  # grpc's handlers carry no types
    """A stream's handler that refuses a client when `places` are taken."""

    def serve(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if not places.acquire(blocking=False):
            _abort(context, CapacityError("too many reflection streams are open; try again later"))
        try:
            yield from handler.stream_stream(requests, context)
        finally:
            places.release()

    return grpc.stream_stream_rpc_method_handler(
        serve,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _token(metadata: Any) -> bytes:
    """The token that a call carries.

    Raises:
        PermissionDeniedError: none, or not hexadecimal.
    """
    for key, value in metadata or ():
        if key == TOKEN_METADATA:
            try:
                return bytes.fromhex(value)
            except (ValueError, TypeError) as error:
                raise PermissionDeniedError("the session token is not hexadecimal") from error
    raise PermissionDeniedError(
        f"this call needs the session token in the metadata {TOKEN_METADATA}; say hello at the door"
    )


def _abort(context: grpc.ServicerContext, error: UcmError) -> None:
    context.set_trailing_metadata(error_to_metadata(error))
    context.abort(grpc.StatusCode[error.grpc_status], str(error))


@contextlib.contextmanager
def translated(context: grpc.ServicerContext) -> Iterator[None]:
    """Turn our errors into gRPC's; anything else is a bug, which grpc logs and answers UNKNOWN."""
    try:
        yield
    except UcmError as error:
        _refuse(context, error)


def _refuse(context: grpc.ServicerContext, error: UcmError) -> None:
    _log.debug("call refused: %s: %s", type(error).__name__, error)
    _abort(context, error)


class Serving:
    """What every call of a session goes through, for the length of a `with` block.

    A class, not a generator: three generators around each other cost a tenth of a lookup.
    """

    __slots__ = ("_calls", "_context", "_session", "_tokens")

    def __init__(self, context: grpc.ServicerContext, tokens: SessionTokens, calls: Credit) -> None:
        self._context = context
        self._tokens = tokens
        self._calls = calls

    def __enter__(self) -> SessionId:
        try:
            token = _token(self._context.invocation_metadata())
            self._session = self._tokens.session_of(token)
            self._calls.take(self._session)
        except UcmError as error:
            _refuse(self._context, error)
        return self._session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._calls.give_back(self._session)
        if isinstance(error, UcmError):
            _refuse(self._context, error)
