"""How a session's gRPC calls are made: the channel, deadlines, patience, errors that are ours.

A call that gives something back is made again when it was refused (`patiently`): a lease that
nobody ends keeps its memory for half a minute, and a store that was staged is too good to drop for
a short wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

import grpc

from .errors import (
    BlockNotFoundError,
    CapacityError,
    InvalidArgumentError,
    TierUnavailableError,
    UcmError,
)
from .sockets import grpc_target
from .wire import error_from_metadata

MIN_RPC_S: Final = 0.25
"""Shortest deadline of a call: below it the round trip itself would be what times out."""

_REPLY_MARGIN_S: Final = 0.1
"""What the daemon gets less than the caller allows, so that its answer arrives in time."""

_ERROR_BY_CODE: Final[Mapping[grpc.StatusCode, type[UcmError]]] = {
    grpc.StatusCode.UNAVAILABLE: TierUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TierUnavailableError,
    grpc.StatusCode.CANCELLED: TierUnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CapacityError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: BlockNotFoundError,
}

Answer = TypeVar("Answer")


def patiently(call: Callable[[float], Answer], timeout_s: float) -> Answer:
    """Make a call that is given the seconds left; refused, it is made again when told to.

    None but the first begins with less than `MIN_RPC_S` left: it may take that long, and who waits
    for it until the same deadline would take a refusal for a daemon that does not answer.

    Raises:
        CapacityError: refused, and the next time would be too late.
    """
    deadline_s = time.monotonic() + timeout_s
    last_s = deadline_s - MIN_RPC_S
    while True:
        try:
            return call(max(deadline_s - time.monotonic(), 0.0))
        except CapacityError as error:
            if time.monotonic() + error.retry_after_s > last_s:
                raise
            time.sleep(error.retry_after_s)
            if time.monotonic() > last_s:  # it slept too long
                raise


def open_channel(socket_path: Path, *, max_message_bytes: int) -> grpc.Channel:
    """A channel to the daemon at `socket_path`; nothing is sent yet."""
    options = [
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]
    return grpc.insecure_channel(grpc_target(socket_path), options=options)


def daemon_timeout_s(timeout_s: float) -> float:
    """How long the daemon may wait for a caller who waits for `timeout_s`."""
    return max(timeout_s - min(_REPLY_MARGIN_S, timeout_s / 10), 0.0)


def translated(error: grpc.RpcError) -> UcmError:
    """What the daemon refused a call with, or what became of the call."""
    assert isinstance(error, grpc.Call)
    details = error.details() or "no details"
    ours = error_from_metadata(error.trailing_metadata() or (), details)
    if ours is not None:
        return ours
    kind = _ERROR_BY_CODE.get(error.code(), UcmError)
    return kind(f"the daemon's call failed ({error.code().name}): {details}")
