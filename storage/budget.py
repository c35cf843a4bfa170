"""How many bytes of segments there may be, in all and of each tenant.

Segments of namespaces that nobody has open make way when there is no room otherwise: after a
change of model, say, the old one's blocks must not keep the new one's out for ever. What a tenant
has reserved does not make way for another tenant, and at its quota only its own segments do.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucm.shares import Shares

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping


@dataclass(frozen=True, slots=True)
class IdleSegments:
    """What could make way, and how; made by the store, which knows its folders."""

    num_bytes: Callable[[], Mapping[str, int]]
    """Idle bytes of each tenant; must not block."""
    drop: Callable[[Collection[str]], tuple[str, int]]
    """Makes one segment of one of these tenants go; whose it was and its bytes, 0 when there is
    none. May block."""


_NONE_IDLE = IdleSegments(dict, lambda _tenants: ("", 0))


class SegmentBudget:
    """Bytes of segments that all namespaces of a store may have. Thread-safe."""

    def __init__(
        self, capacity_bytes: int, *, shares: Shares | None = None, idle: IdleSegments = _NONE_IDLE
    ) -> None:
        """Begin with nothing reserved.

        Args:
            capacity_bytes: the limit.
            shares: quotas and reservations of tenants; none when None.
            idle: what could make way.
        """
        self.shares = shares or Shares(capacity_bytes)
        self._idle = idle
        self._used_bytes: dict[str, int] = {}
        self._stuck_bytes: Mapping[str, int] = {}
        """Idle bytes of which none could be dropped when that was tried."""
        self._lock = threading.Lock()

    @property
    def reserved_bytes(self) -> int:
        """What all segments take."""
        with self._lock:
            return sum(self._used_bytes.values())

    def used_bytes(self, tenant: str) -> int:
        """What the segments of a tenant take."""
        with self._lock:
            return self._used_bytes.get(tenant, 0)

    def used_bytes_by_tenant(self) -> dict[str, int]:
        """What the segments of each tenant take."""
        with self._lock:
            return dict(self._used_bytes)

    def of(self, tenant: str) -> TenantBudget:
        """The budget as one tenant's namespaces see it."""
        return TenantBudget(self, tenant)

    def remaining_bytes(self, tenant: str) -> int:
        """What the tenant may still reserve; 0 when too much is there already."""
        idle_bytes = dict(self._idle.num_bytes())
        with self._lock:
            used_bytes = dict(self._used_bytes)
        if idle_bytes == self._stuck_bytes:
            idle_bytes = {}
        for other in self._helpful(tenant, used_bytes):
            spare_bytes = idle_bytes.get(other, 0)
            if other != tenant:
                spare_bytes = min(spare_bytes, self.shares.spare_bytes(other, used_bytes))
            used_bytes[other] = used_bytes.get(other, 0) - spare_bytes
        return max(0, self.shares.available_bytes(tenant, used_bytes))

    def excess_bytes(self, tenant: str) -> int:
        """By how much the tenant holds too much; 0 when all is well.

        Too much is above its quota, or above its reservation while all together are above the
        capacity.
        """
        with self._lock:
            used_bytes = dict(self._used_bytes)
        over_quota = -self.shares.quota_room_bytes(tenant, used_bytes.get(tenant, 0))
        over_all = sum(used_bytes.values()) - self.shares.capacity_bytes
        over_all = min(over_all, self.shares.spare_bytes(tenant, used_bytes))
        return max(0, over_quota, over_all)

    def could_take(self, tenant: str, donor: str, size_bytes: int) -> bool:
        """Whether `tenant` could reserve `size_bytes` if `donor` released as many.

        Not what `donor` has reserved for itself.
        """
        with self._lock:
            used_bytes = dict(self._used_bytes)
        if donor != tenant and self.shares.spare_bytes(donor, used_bytes) < size_bytes:
            return False
        used_bytes[donor] = used_bytes.get(donor, 0) - size_bytes
        return self.shares.available_bytes(tenant, used_bytes) >= size_bytes

    def reserve(self, tenant: str, size_bytes: int) -> bool:
        """Take `size_bytes` if there are as many or idle segments can make way. May block."""
        while not self._take(tenant, size_bytes):
            if not self.drop_idle_for(tenant):
                self._stuck_bytes = dict(self._idle.num_bytes())
                return False
        return True

    def drop_idle_for(self, tenant: str) -> bool:
        """Make one idle segment go that stands in the tenant's way; False when none does."""
        with self._lock:
            helpful = self._helpful(tenant, self._used_bytes)
        owner, dropped_bytes = self._idle.drop(helpful)
        self.release(owner, dropped_bytes)
        return dropped_bytes > 0

    def _helpful(self, tenant: str, used_bytes: Mapping[str, int]) -> list[str]:
        """Tenants whose idle segments would make room for `tenant`: itself last."""
        own_bytes = used_bytes.get(tenant, 0)
        if self.shares.quota_room_bytes(tenant, own_bytes) <= 0:
            return [tenant]
        others = (other for other in used_bytes if other != tenant)
        return [
            *(other for other in others if self.shares.spare_bytes(other, used_bytes) > 0),
            tenant,
        ]

    def _take(self, tenant: str, size_bytes: int) -> bool:
        with self._lock:
            if self.shares.available_bytes(tenant, self._used_bytes) < size_bytes:
                return False
            self._used_bytes[tenant] = self._used_bytes.get(tenant, 0) + size_bytes
            return True

    def count_existing(self, tenant: str, size_bytes: int) -> None:
        """Count a segment that is on the disk already, even above the capacity."""
        with self._lock:
            self._used_bytes[tenant] = self._used_bytes.get(tenant, 0) + size_bytes

    def release(self, tenant: str, size_bytes: int) -> None:
        """Give `size_bytes` back."""
        with self._lock:
            self._used_bytes[tenant] = self._used_bytes.get(tenant, 0) - size_bytes


@dataclass(frozen=True, slots=True)
class TenantBudget:
    """A `SegmentBudget` as one tenant sees it. Thread-safe."""

    whole: SegmentBudget
    tenant: str = ""

    @property
    def remaining_bytes(self) -> int:
        """See `SegmentBudget.remaining_bytes`."""
        return self.whole.remaining_bytes(self.tenant)

    @property
    def excess_bytes(self) -> int:
        """See `SegmentBudget.excess_bytes`."""
        return self.whole.excess_bytes(self.tenant)

    def reserve(self, size_bytes: int) -> bool:
        """See `SegmentBudget.reserve`."""
        return self.whole.reserve(self.tenant, size_bytes)

    def count_existing(self, size_bytes: int) -> None:
        """See `SegmentBudget.count_existing`."""
        self.whole.count_existing(self.tenant, size_bytes)

    def release(self, size_bytes: int) -> None:
        """See `SegmentBudget.release`."""
        self.whole.release(self.tenant, size_bytes)
