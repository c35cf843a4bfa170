"""Selections of a session with a daemon: requests there, answers back, the memory of summaries.

Requests are checked before they are sent, so that a caller's mistake costs no call. The memory is
mapped at the first lease of summaries of a namespace, read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final

from .door_client import DoorClient
from .errors import InvalidArgumentError, TierUnavailableError
from .grants import MappedGrants, summary_lease
from .hashing import CheckedKeys, check_keys
from .layout import KvLayout
from .protos import cache_pb2 as pb
from .select_api import SelectRequest, SelectResult, SummaryLease
from .select_wire import request_to_wire, result_from_wire, statuses_from_wire
from .types import BlockKey, LeaseId, NamespaceId, SummaryKind, SummaryStatus

_ENVELOPE_BYTES: Final = 4096
"""What a message has besides keys and queries."""


class RemoteSelections:
    """What a session keeps for its selections: mapped summaries. Thread-safe."""

    def __init__(
        self,
        door: DoorClient,
        at_door: Callable[[], AbstractContextManager[float]],
        max_message_bytes: int,
    ) -> None:
        """Map nothing yet; `at_door` is a turn at the door, with the seconds that are left."""
        self._door = door
        self._at_door = at_door
        self._max_message_bytes = max_message_bytes
        self._areas: dict[tuple[NamespaceId, SummaryKind], memoryview] = {}

    def message(
        self,
        namespace: tuple[NamespaceId, KvLayout],
        keys: Sequence[BlockKey],
        request: SelectRequest,
        timeout_s: float,
    ) -> pb.SelectRequest:
        """The request as a message.

        Raises:
            InvalidArgumentError: it cannot be answered, or is too long to be sent.
        """
        checked = check_keys(keys)
        request.check(namespace[1], len(checked))
        num_bytes = len(checked.packed) + request.queries.nbytes + 5 * len(request.must_blocks)
        if num_bytes + _ENVELOPE_BYTES > self._max_message_bytes:
            raise InvalidArgumentError(
                f"keys and queries of {num_bytes} bytes, a message has at most "
                f"{self._max_message_bytes}: ask for fewer layers or queries in one call, or raise "
                "service.max_message_bytes"
            )
        return request_to_wire(namespace[0], checked, request, timeout_s)

    def result(
        self, reply: pb.SelectReply, request: SelectRequest, layout: KvLayout, num_keys: int
    ) -> SelectResult:
        """The daemon's answer.

        Raises:
            TierUnavailableError: it is garbled.
        """
        try:
            return result_from_wire(reply, request, layout, num_keys)
        except InvalidArgumentError as error:
            raise TierUnavailableError(f"the daemon's selection is garbled: {error}") from error

    def lease(
        self,
        namespace: tuple[NamespaceId, SummaryKind | None],
        keys: CheckedKeys,
        reply: pb.MapSummariesReply,
    ) -> SummaryLease:
        """The lease that the daemon granted for `keys`. Asks the door for the memory once.

        Raises:
            TierUnavailableError: the answer is garbled.
        """
        name, kind = namespace
        try:
            statuses = statuses_from_wire(reply.statuses, num_keys=len(keys))
        except InvalidArgumentError as error:
            raise TierUnavailableError(f"the daemon's summaries are garbled: {error}") from error
        offsets, size = tuple(reply.offsets), reply.summary_bytes
        num_ready = statuses.count(SummaryStatus.READY)
        if kind is None or not len(offsets) == len(reply.contents) == num_ready:
            raise TierUnavailableError("the daemon's summaries do not match the keys asked for")
        area = self._area(name, kind) if offsets else memoryview(b"")
        if offsets and max(offsets) + size > len(area):
            raise TierUnavailableError("the daemon granted a summary behind the end of its memory")
        grants = MappedGrants(
            lease_id=LeaseId(reply.lease_id),
            kind=kind,
            statuses=statuses,
            offsets=offsets,
            contents=tuple(reply.contents),
            summary_bytes=size,
            timeout_s=reply.timeout_s,
        )
        return summary_lease(grants, area)

    def _area(self, namespace: NamespaceId, kind: SummaryKind) -> memoryview:
        name = (namespace, kind)
        found = self._areas.get(name)
        if found is not None:
            return found
        with self._at_door() as left_s:
            if name not in self._areas:
                self._areas[name] = self._door.open_summaries(namespace, timeout_s=left_s)
            return self._areas[name]

    def close(self) -> None:
        """Keep nothing but what leases still use. Idempotent."""
        self._areas.clear()
