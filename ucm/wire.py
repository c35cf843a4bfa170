"""Between the words of this code and the messages of `protos/cache.proto`, both ways.

What arrives is checked here and nowhere else: every function named `*_from_wire` raises
`InvalidArgumentError` for a message that does not say what it should, and for nothing else.

Envelope: a load of 100 blocks of 30 slabs carries 24 kB of checksums; packed and unpacked by
`struct` in under 0.2 ms a side.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from .api import SlabChecksums
from .errors import LEAVES, CapacityError, InvalidArgumentError, UcmError
from .hashing import CheckedKeys, NamespaceSpec, check_keys
from .layout import KvDtype, KvLayout
from .protos import cache_pb2 as pb
from .types import BlockKey, LeaseId, LoadStatus, SourceKind, StoreStatus, TierKind

PROTOCOL_VERSION: Final = 5
"""Both ends of the door must name the same one."""

TOKEN_BYTES: Final = 32
"""Length of a session token."""

LEASE_ID_BYTES: Final = 16
"""Length of a lease id."""

TOKEN_METADATA: Final = "ucm-session"  # noqa: S105  the name of the header
"""Metadata key of every call of service Cache: the token in hexadecimal."""

ERROR_METADATA: Final = "ucm-error"
"""Trailing metadata key of a failed call: the name of the error's class."""

RETRY_AFTER_METADATA: Final = "ucm-retry-after-ms"
"""Trailing metadata key of a refusal: how long to wait before the next try, in milliseconds."""

MAX_RETRY_AFTER_S: Final = 60.0
"""Longest wait that a client believes."""

MAX_TIMEOUT_S: Final = 3600.0
"""Longest time-out that a call is given."""

CHECKSUM_BYTES: Final = 8

TIER_TO_WIRE: Final[Mapping[TierKind, pb.Tier]] = {
    TierKind.MEMORY: pb.TIER_MEMORY,
    TierKind.NVME: pb.TIER_NVME,
}
TIER_FROM_WIRE: Final = {int(wire): word for word, wire in TIER_TO_WIRE.items()}

LOAD_STATUS_TO_WIRE: Final[Mapping[LoadStatus, pb.LoadStatus]] = {
    LoadStatus.READY: pb.LOAD_STATUS_READY,
    LoadStatus.MISS: pb.LOAD_STATUS_MISS,
    LoadStatus.CORRUPT: pb.LOAD_STATUS_CORRUPT,
    LoadStatus.TIMED_OUT: pb.LOAD_STATUS_TIMED_OUT,
    LoadStatus.NO_SPACE: pb.LOAD_STATUS_NO_SPACE,
}
LOAD_STATUS_FROM_WIRE: Final = {int(wire): word for word, wire in LOAD_STATUS_TO_WIRE.items()}

STORE_STATUS_TO_WIRE: Final[Mapping[StoreStatus, pb.StoreStatus]] = {
    StoreStatus.WANTED: pb.STORE_STATUS_WANTED,
    StoreStatus.ACCEPTED: pb.STORE_STATUS_ACCEPTED,
    StoreStatus.PRESENT: pb.STORE_STATUS_PRESENT,
    StoreStatus.NO_SPACE: pb.STORE_STATUS_NO_SPACE,
    StoreStatus.ORPHAN: pb.STORE_STATUS_ORPHAN,
    StoreStatus.CORRUPT: pb.STORE_STATUS_CORRUPT,
    StoreStatus.REFUSED: pb.STORE_STATUS_REFUSED,
}
STORE_STATUS_FROM_WIRE: Final = {int(wire): word for word, wire in STORE_STATUS_TO_WIRE.items()}

DTYPE_TO_WIRE: Final[Mapping[KvDtype, pb.Dtype]] = {
    KvDtype.FLOAT32: pb.DTYPE_FLOAT32,
    KvDtype.FLOAT16: pb.DTYPE_FLOAT16,
    KvDtype.BFLOAT16: pb.DTYPE_BFLOAT16,
}
DTYPE_FROM_WIRE: Final = {wire: word for word, wire in DTYPE_TO_WIRE.items()}

ERROR_BY_NAME: Final[Mapping[str, type[UcmError]]] = {leaf.__name__: leaf for leaf in LEAVES}


def error_from_wire(name: str, message: str, retry_after_ms: int = 0) -> UcmError:
    """The error that the other side raised; plain `UcmError` for a class this side lacks.

    A retry hint of 0 says nothing; one that is too long is cut.
    """
    error = ERROR_BY_NAME.get(name, UcmError)(message)
    if isinstance(error, CapacityError) and retry_after_ms:
        error.retry_after_s = min(retry_after_ms / 1000, MAX_RETRY_AFTER_S)
    return error


def retry_after_ms(error: UcmError) -> int:
    """The retry hint of a refusal as it travels; 0 for what is none."""
    if not isinstance(error, CapacityError):
        return 0
    return max(1, round(error.retry_after_s * 1000))


def error_to_metadata(error: UcmError) -> tuple[tuple[str, str], ...]:
    """The trailing metadata of a call that failed with `error`."""
    name = (ERROR_METADATA, type(error).__name__)
    hint_ms = retry_after_ms(error)
    return (name, (RETRY_AFTER_METADATA, str(hint_ms))) if hint_ms else (name,)


def error_from_metadata(
    metadata: Iterable[tuple[str, str | bytes]], message: str
) -> UcmError | None:
    """The error that `error_to_metadata` described; None if it describes none.

    A retry hint that is no number, or out of bounds, is left out.
    """
    texts = {
        key: value if isinstance(value, str) else value.decode("ascii", "replace")
        for key, value in metadata
        if key in (ERROR_METADATA, RETRY_AFTER_METADATA)
    }
    if ERROR_METADATA not in texts:
        return None
    hint = texts.get(RETRY_AFTER_METADATA, "")
    is_number = hint.isascii() and hint.isdecimal() and len(hint) < 10
    return error_from_wire(texts[ERROR_METADATA], message, int(hint) if is_number else 0)


def keys_to_wire(keys: Sequence[BlockKey]) -> bytes:
    """Pack keys back to back.

    Raises:
        InvalidArgumentError: one is not 32 bytes.
    """
    return check_keys(keys).packed


def keys_from_wire(packed: bytes, *, limit: int) -> CheckedKeys:
    """A call's keys.

    Raises:
        InvalidArgumentError: more than `limit`, or the bytes do not divide into keys.
    """
    keys = CheckedKeys(packed)
    if len(keys) > limit:
        raise InvalidArgumentError(
            f"{len(keys)} keys in one call, at most {limit} are taken; split the call "
            "or raise service.max_keys_per_call"
        )
    return keys


Word = TypeVar("Word", LoadStatus, StoreStatus, TierKind, SourceKind)


def words_to_wire(words: Sequence[Word], numbers: Mapping[Word, int]) -> bytes:
    """One byte a word: its number. Equal words, the usual case, cost one look-up."""
    if words and words.count(words[0]) == len(words):
        return bytes((numbers[words[0]],)) * len(words)
    return bytes(map(numbers.__getitem__, words))


def words_from_wire(packed: bytes, words: Mapping[int, Word]) -> tuple[Word, ...]:
    """The words that `words_to_wire` packed.

    Raises:
        InvalidArgumentError: a number that this release does not know.
    """
    try:
        if packed and packed.count(packed[0]) == len(packed):
            return (words[packed[0]],) * len(packed)
        return tuple(map(words.__getitem__, packed))
    except KeyError as error:
        raise InvalidArgumentError(f"no word has the number {error}") from error


def lease_from_wire(lease_id: bytes) -> LeaseId:
    """Check a lease id's length."""
    if len(lease_id) != LEASE_ID_BYTES:
        raise InvalidArgumentError(
            f"a lease id has {LEASE_ID_BYTES} bytes, this one has {len(lease_id)}"
        )
    return LeaseId(lease_id)


def checked_timeout(timeout_s: float) -> float:
    """A call's time-out, bounded.

    Raises:
        InvalidArgumentError: negative or not a number.
    """
    if not timeout_s >= 0:
        raise InvalidArgumentError(f"a time-out of {timeout_s} s; it must be 0 or more")
    return min(timeout_s, MAX_TIMEOUT_S)


def checksums_to_wire(blocks: Iterable[SlabChecksums]) -> bytes:
    """Pack the checksums of several blocks back to back.

    Raises:
        InvalidArgumentError: one of them is not a number of 64 bits.
    """
    try:
        return b"".join(struct.pack(f"<{len(block)}Q", *block) for block in blocks)
    except struct.error as error:
        raise InvalidArgumentError(f"a checksum is a number of 64 bits: {error}") from error


def checksums_from_wire(packed: bytes, *, num_blocks: int) -> list[SlabChecksums]:
    """Unpack `num_blocks` equally long groups of checksums.

    Raises:
        InvalidArgumentError: the bytes do not divide into as many.
    """
    num_slabs = _slabs_in(packed, num_blocks)
    return list(struct.iter_unpack(f"<{num_slabs}Q", packed)) if num_slabs else []


def checksum_rows_from_wire(packed: bytes, *, num_blocks: int) -> NDArray[np.uint64]:
    """As `checksums_from_wire`, without an object for each: [blocks, slabs], read-only.

    Raises:
        InvalidArgumentError: see there.
    """
    shape = (num_blocks, _slabs_in(packed, num_blocks))
    return np.frombuffer(packed, "<u8").reshape(shape)


def _slabs_in(packed: bytes, num_blocks: int) -> int:
    """Slabs of each block, by their packed checksums; 0 for no block."""
    if num_blocks == 0:
        if packed:
            raise InvalidArgumentError(f"{len(packed)} bytes of checksums for no block")
        return 0
    block_bytes, rest = divmod(len(packed), num_blocks)
    if rest or block_bytes % CHECKSUM_BYTES or not block_bytes:
        raise InvalidArgumentError(
            f"{len(packed)} bytes of checksums are not a whole number of {CHECKSUM_BYTES}-byte "
            f"checksums for each of {num_blocks} blocks"
        )
    return block_bytes // CHECKSUM_BYTES


def layout_to_wire(layout: KvLayout) -> pb.Layout:
    """The layout as a message."""
    return pb.Layout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        dtype=DTYPE_TO_WIRE[layout.dtype],
    )


def layout_from_wire(message: pb.Layout) -> KvLayout:
    """The layout that a message describes.

    Raises:
        InvalidArgumentError: the dtype is not one of ours.
        LayoutMismatchError: the numbers are out of range.
    """
    dtype = DTYPE_FROM_WIRE.get(message.dtype)
    if dtype is None:
        raise InvalidArgumentError(f"unknown dtype number {message.dtype} in a layout")
    return KvLayout(
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        block_tokens=message.block_tokens,
        dtype=dtype,
    )


_SPEC_FIELDS: Final = tuple(item.name for item in fields(NamespaceSpec) if item.name != "layout")


def spec_to_wire(spec: NamespaceSpec) -> pb.NamespaceSpec:
    """The namespace's description as a message.

    Raises:
        InvalidArgumentError: a number above 64 bits, or text that is not Unicode.
    """
    values = {name: getattr(spec, name) for name in _SPEC_FIELDS}
    try:
        return pb.NamespaceSpec(layout=layout_to_wire(spec.layout), **values)
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"this namespace cannot be sent: {error}") from error


def spec_from_wire(message: pb.NamespaceSpec) -> NamespaceSpec:
    """The namespace that a message describes.

    Raises:
        InvalidArgumentError: the dtype is not one of ours.
        LayoutMismatchError: the layout's numbers are out of range.
    """
    values = {name: getattr(message, name) for name in _SPEC_FIELDS}
    return NamespaceSpec(layout=layout_from_wire(message.layout), **values)
