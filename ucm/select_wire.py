"""Selections as messages, both ways; see "Numbers of a selection" in `protos/cache.proto`.

As in `ucm.wire`, what does not say what it should is an `InvalidArgumentError` and nothing else.

Envelope: 30 layers of 128 blocks, 9 heads, 38 blocks chosen in each: 69 kB there, 128 kB back, of
which all but 10 kB are bounds; 0.1 ms a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from ucm.kernels.block_scores import Budget

from .errors import InvalidArgumentError
from .grants import MappedGrants
from .hashing import CheckedKeys
from .layout import KvLayout
from .protos import cache_pb2 as pb
from .select_api import LayerSelection, SelectMode, SelectRequest, SelectResult
from .types import NamespaceId, SummaryKind, SummaryStatus

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODE_TO_WIRE: Final[Mapping[SelectMode, pb.SelectMode]] = {
    SelectMode.SHARED: pb.SELECT_MODE_SHARED,
    SelectMode.PER_HEAD: pb.SELECT_MODE_PER_HEAD,
}
MODE_FROM_WIRE: Final = {int(wire): word for word, wire in MODE_TO_WIRE.items()}

STATUS_TO_WIRE: Final[Mapping[SummaryStatus, pb.SummaryStatus]] = {
    SummaryStatus.READY: pb.SUMMARY_STATUS_READY,
    SummaryStatus.NO_SUMMARY: pb.SUMMARY_STATUS_NO_SUMMARY,
    SummaryStatus.MISS: pb.SUMMARY_STATUS_MISS,
}
STATUS_FROM_WIRE: Final = {int(wire): word for word, wire in STATUS_TO_WIRE.items()}

_F32: Final = np.dtype("<f4")
_U32: Final = np.dtype("<u4")


def statuses_to_wire(statuses: Sequence[SummaryStatus]) -> bytes:
    """One byte a status."""
    return bytes(map(STATUS_TO_WIRE.__getitem__, statuses))


def statuses_from_wire(packed: bytes, *, num_keys: int) -> tuple[SummaryStatus, ...]:
    """The statuses of an answer about `num_keys` keys.

    Raises:
        InvalidArgumentError: not as many, or a number that this release does not know.
    """
    if len(packed) != num_keys:
        raise InvalidArgumentError(f"{len(packed)} statuses for {num_keys} keys")
    try:
        return tuple(map(STATUS_FROM_WIRE.__getitem__, packed))
    except KeyError as error:
        raise InvalidArgumentError(f"no status of a summary has the number {error}") from error


def kind_to_wire(kind: SummaryKind | None) -> str:
    """The word for a kind in a message; another one for none."""
    return pb.SummaryKind.Name(0 if kind is None else kind.number)


def kind_from_wire(number: int) -> SummaryKind | None:
    """The kind that was asked for; None for none.

    Raises:
        InvalidArgumentError: this release knows no such kind.
    """
    if not number:
        return None
    kind = SummaryKind.from_number(number)
    if kind is None:
        raise InvalidArgumentError(
            f"this daemon knows no summaries of kind {number}; run the same release on both sides"
        )
    return kind


def request_to_wire(
    namespace: NamespaceId, keys: CheckedKeys, request: SelectRequest, timeout_s: float
) -> pb.SelectRequest:
    """A request that `SelectRequest.check` has passed, as a message."""
    return pb.SelectRequest(
        namespace=namespace,
        keys=keys.packed,
        layers=request.layers,
        queries=np.ascontiguousarray(request.queries, _F32).tobytes(),
        num_queries=request.num_queries,
        num_heads=request.num_heads,
        budget=budget_to_wire(request.budget),
        must_blocks=request.must_blocks,
        mode=MODE_TO_WIRE[request.mode],
        bounds=request.bounds,
        timeout_s=timeout_s,
    )


def request_from_wire(message: pb.SelectRequest) -> SelectRequest:
    """The request that `request_to_wire` described; `SelectRequest.check` is still to come.

    Raises:
        InvalidArgumentError: its numbers do not fit each other.
    """
    mode = MODE_FROM_WIRE.get(message.mode)
    if mode is None:
        raise InvalidArgumentError(f"no select mode has the number {message.mode}")
    shape = (len(message.layers), message.num_queries, message.num_heads)
    rows = shape[0] * shape[1] * shape[2]
    queries = _array(message.queries, _F32)
    if not rows or not queries.size or queries.size % rows:
        raise InvalidArgumentError(
            f"{queries.size} numbers are no queries of {shape[0]} layers, {shape[1]} queries and "
            f"{shape[2]} heads"
        )
    return SelectRequest(
        layers=tuple(message.layers),
        queries=queries.reshape(*shape, -1),
        budget=budget_from_wire(message.budget),
        must_blocks=tuple(message.must_blocks),
        mode=mode,
        bounds=message.bounds,
    )


def budget_to_wire(budget: Budget) -> pb.Budget:
    """A budget as a message."""
    limit = {
        name: value
        for name in ("ratio", "tokens", "eps")
        if (value := getattr(budget, name)) is not None
    }
    return pb.Budget(**limit, min_ratio=budget.min_ratio, max_ratio=budget.max_ratio)


def budget_from_wire(message: pb.Budget) -> Budget:
    """The budget that a message describes.

    Raises:
        InvalidArgumentError: it names none, or one out of range.
    """
    limit = message.WhichOneof("limit")
    if limit is None:
        raise InvalidArgumentError("a selection needs a budget: a ratio, tokens or eps")
    return Budget(
        **{limit: getattr(message, limit)},
        min_ratio=message.min_ratio,
        max_ratio=message.max_ratio,
    )


class AskedSelection(NamedTuple):
    """What a call asks for, unpacked."""

    keys: CheckedKeys
    request: SelectRequest
    timeout_s: float


def check_reply_size(request: SelectRequest, num_keys: int, max_message_bytes: int) -> None:
    """Refuse what could not be answered in one message.

    Raises:
        InvalidArgumentError: the answer could be longer.
    """
    rows = len(request.layers) * request.num_queries * request.num_heads
    numbers = 3 * rows if request.bounds else 0
    if request.mode is SelectMode.SHARED:
        numbers += 2 * len(request.layers)
    else:
        numbers += 2 * len(request.layers) * request.num_heads
    num_bytes = 4 * numbers * num_keys + 4 * rows
    if num_bytes > max_message_bytes // 2:
        raise InvalidArgumentError(
            f"the answer could have {num_bytes} bytes, half of a message's "
            f"{max_message_bytes} at most: ask for fewer layers or queries in one call, without "
            "bounds, or raise service.max_message_bytes"
        )


def summaries_to_wire(grants: MappedGrants) -> pb.MapSummariesReply:
    """A lease of summaries as a message."""
    return pb.MapSummariesReply(
        lease_id=grants.lease_id,
        timeout_s=grants.timeout_s,
        statuses=statuses_to_wire(grants.statuses),
        offsets=grants.offsets,
        contents=grants.contents,
        summary_bytes=grants.summary_bytes,
    )


def result_to_wire(result: SelectResult) -> pb.SelectReply:
    """An answer as a message."""
    layers = result.layers
    return pb.SelectReply(
        statuses=statuses_to_wire(result.statuses),
        counts=[len(each.blocks) for each in layers],
        blocks=_packed([each.blocks for each in layers], _U32),
        shares=_packed([each.shares for each in layers], _F32),
        masses=np.array([each.mass for each in layers], _F32).tobytes(),
        log_masses=_packed([each.log_mass for each in layers], _F32),
        lowers=_packed([each.lower for each in layers], _F32),
        uppers=_packed([each.upper for each in layers], _F32),
        skipped_uppers=_packed([each.skipped_upper for each in layers], _F32),
    )


def result_from_wire(
    reply: pb.SelectReply, request: SelectRequest, layout: KvLayout, num_keys: int
) -> SelectResult:
    """The answer to `request` that `result_to_wire` described.

    Raises:
        InvalidArgumentError: it does not fit the request.
    """
    columns = _Columns(reply, request, layout, num_keys)
    groups = range(layout.num_kv_heads) if request.mode is SelectMode.PER_HEAD else (None,)
    owners = [(layer, group) for layer in request.layers for group in groups]
    if len(reply.counts) != len(owners):
        raise InvalidArgumentError(f"{len(reply.counts)} selections, {len(owners)} were asked for")
    layers = tuple(
        columns.next_selection(layer, group, count)
        for (layer, group), count in zip(owners, reply.counts, strict=True)
    )
    columns.check_used_up()
    return SelectResult(statuses_from_wire(reply.statuses, num_keys=num_keys), layers)


class _Columns:
    """Takes from an answer's arrays what each selection has, in order."""

    def __init__(
        self, reply: pb.SelectReply, request: SelectRequest, layout: KvLayout, num_keys: int
    ) -> None:
        shared = request.mode is SelectMode.SHARED
        self._num_heads = request.num_heads // (1 if shared else layout.num_kv_heads)
        self._num_queries = request.num_queries
        self._num_keys = num_keys
        self._bounds = request.bounds
        self._masses = iter(_array(reply.masses, _F32).tolist())
        self._blocks = _Column(reply.blocks, _U32)
        self._shares = _Column(reply.shares, _F32)
        self._by_head = [
            _Column(each, _F32) for each in (reply.log_masses, reply.lowers, reply.uppers)
        ]
        self._skipped = _Column(reply.skipped_uppers, _F32)

    def next_selection(self, layer: int, kv_head: int | None, count: int) -> LayerSelection:
        blocks = self._blocks.take((count,)).astype(np.int64)
        if count and (blocks[-1] >= self._num_keys or (np.diff(blocks) <= 0).any()):
            raise InvalidArgumentError("the chosen blocks are no ascending indexes of the keys")
        mass = next(self._masses, None)
        if mass is None:
            raise InvalidArgumentError("a selection lacks its mass")
        shares = self._shares.take((count,))
        if not self._bounds:
            return LayerSelection(layer, blocks, shares, mass, kv_head)
        heads = (self._num_queries, self._num_heads)
        log_mass, lower, upper = (each.take((*heads, count)) for each in self._by_head)
        skipped = self._skipped.take(heads)
        return LayerSelection(
            *(layer, blocks, shares, mass, kv_head, log_mass, lower, upper, skipped)
        )

    def check_used_up(self) -> None:
        columns = (self._blocks, self._shares, *self._by_head, self._skipped)
        if any(each.num_left for each in columns) or next(self._masses, None) is not None:
            raise InvalidArgumentError("the arrays of a selection are longer than its counts say")


class _Column:
    """An array that is taken from the front."""

    def __init__(self, packed: bytes, dtype: np.dtype[Any]) -> None:
        self._left = _array(packed, dtype)

    @property
    def num_left(self) -> int:
        return self._left.size

    def take(self, shape: tuple[int, ...]) -> NDArray[Any]:
        count = int(np.prod(shape))
        if count > self._left.size:
            raise InvalidArgumentError("the arrays of a selection are shorter than its counts say")
        taken, self._left = self._left[:count], self._left[count:]
        return taken.reshape(shape)


def _array(packed: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    if len(packed) % dtype.itemsize:
        raise InvalidArgumentError(f"{len(packed)} bytes are no array of {dtype.name}")
    return np.frombuffer(packed, dtype)


def _packed(arrays: Sequence[NDArray[Any] | None], dtype: np.dtype[Any]) -> bytes:
    return b"".join(_bytes_of(arrays, dtype))


def _bytes_of(arrays: Sequence[NDArray[Any] | None], dtype: np.dtype[Any]) -> Iterator[bytes]:
    return (each.astype(dtype, copy=False).tobytes() for each in arrays if each is not None)
