"""Every error of the product: one base, one leaf a kind of failure.

A miss is a value, never an exception. Each leaf names the gRPC status it travels as, so that the
service and the client translate by table, and says whether the same call may succeed later.
"""

from __future__ import annotations

from typing import ClassVar


class UcmError(Exception):
    """Base of all errors that callers may catch. The message says what to do next."""

    grpc_status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False


class ConfigError(UcmError):
    """A setting, a path or a command line cannot work as given."""

    grpc_status = "INVALID_ARGUMENT"


class InvalidArgumentError(UcmError):
    """A call's argument is malformed, for example a block key of the wrong length."""

    grpc_status = "INVALID_ARGUMENT"


class BlockNotFoundError(UcmError):
    """A handle names a block, lease or namespace that does not exist (any more)."""

    grpc_status = "NOT_FOUND"


class LayoutMismatchError(UcmError):
    """Bytes or a layout do not fit the namespace they are meant for."""

    grpc_status = "FAILED_PRECONDITION"


class LeaseExpiredError(UcmError):
    """The lease's deadline passed, or its connection ended, before it was completed."""

    grpc_status = "ABORTED"


class CapacityError(UcmError):
    """A bounded queue, pool, arena or disk is full, or a client's credit is used up."""

    grpc_status = "RESOURCE_EXHAUSTED"
    retryable = True

    def __init__(self, message: str = "", *, retry_after_s: float = 0.1) -> None:
        """As other errors.

        Args:
            message: what is full and what to do.
            retry_after_s: the same call made earlier than this is likely to be refused again.
        """
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CorruptionError(UcmError):
    """Stored bytes do not match their checksum, or a file its format."""

    grpc_status = "DATA_LOSS"


class TierUnavailableError(UcmError):
    """A tier, or the daemon itself, does not answer."""

    grpc_status = "UNAVAILABLE"
    retryable = True


class PermissionDeniedError(UcmError):
    """The caller is not who may do this: no session token, another user, another namespace."""

    grpc_status = "PERMISSION_DENIED"


LEAVES: tuple[type[UcmError], ...] = (
    ConfigError,
    InvalidArgumentError,
    BlockNotFoundError,
    LayoutMismatchError,
    LeaseExpiredError,
    CapacityError,
    CorruptionError,
    TierUnavailableError,
    PermissionDeniedError,
)
