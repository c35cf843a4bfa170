"""Who may hold how much of a tier: quotas and reservations of tenants, as arithmetic.

    available(t) = min(capacity - used - unmet reservations of all others,  quota(t) - used(t))

* A tenant never holds more than its quota: at its quota it evicts its own blocks.
* What a tenant holds below its reservation, and what it has not taken of it yet, is nobody else's.
  So as long as nobody took more than was available, a tenant below its reservation always finds
  the rest of it free.

Pure: no state, no lock. O(tenants) a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .config import Config, QuotaConfig
from .errors import ConfigError

ANY_TENANT = "*"
"""Name of the quota of tenants that have none of their own."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one tenant may hold of one tier, in bytes."""

    quota_bytes: int = 0
    """Most; 0 is no limit but the capacity."""
    reserved_bytes: int = 0
    """What nobody else may take."""


_NO_SHARE = Share()


class Shares:
    """The shares of all tenants in one tier."""

    def __init__(
        self, capacity_bytes: int, by_tenant: Mapping[str, Share] | None = None, what: str = "tier"
    ) -> None:
        """Check that the shares can be kept.

        Args:
            capacity_bytes: what all tenants hold together, at most.
            by_tenant: shares by the tenant's name; `ANY_TENANT` for those that are not named.
            what: the tier, for messages.

        Raises:
            ConfigError: a reservation for nobody in particular or above its own quota, or
                reservations that are more than the capacity.
        """
        self.capacity_bytes = capacity_bytes
        self._by_tenant = dict(by_tenant or {})
        self._others = self._by_tenant.pop(ANY_TENANT, _NO_SHARE)
        if self._others.reserved_bytes:
            raise ConfigError(
                f'[quota."{ANY_TENANT}"]: {what} cannot be reserved for tenants that are not '
                "named: name them, or give them a quota only"
            )
        for tenant, share in self._by_tenant.items():
            if 0 < share.quota_bytes < share.reserved_bytes:
                raise ConfigError(
                    f'[quota."{tenant}"]: {share.reserved_bytes} bytes of {what} are reserved, '
                    f"above the quota of {share.quota_bytes}"
                )
        reserved_bytes = sum(share.reserved_bytes for share in self._by_tenant.values())
        if reserved_bytes > capacity_bytes:
            raise ConfigError(
                f"[quota]: {reserved_bytes} bytes of {what} are reserved, but its capacity is "
                f"{capacity_bytes}: lower the reservations or raise {what}.capacity_bytes"
            )

    def of(self, tenant: str) -> Share:
        """The share of a tenant."""
        return self._by_tenant.get(tenant, self._others)

    def limit_bytes(self, tenant: str) -> int:
        """What the tenant may hold when all others hold no more than their reservations."""
        share = self.of(tenant)
        others_bytes = sum(each.reserved_bytes for each in self._by_tenant.values())
        room_bytes = self.capacity_bytes - others_bytes + share.reserved_bytes
        return min(room_bytes, share.quota_bytes) if share.quota_bytes else room_bytes

    def quota_room_bytes(self, tenant: str, used_bytes: int) -> int:
        """What its quota still allows a tenant that holds `used_bytes`; may be negative."""
        quota_bytes = self.of(tenant).quota_bytes or self.capacity_bytes
        return quota_bytes - used_bytes

    def available_bytes(self, tenant: str, used_bytes: Mapping[str, int]) -> int:
        """What the tenant may take now; negative when too much is taken.

        Args:
            tenant: who asks.
            used_bytes: what each tenant holds; those that are missing hold nothing.
        """
        unmet_bytes = sum(
            max(0, share.reserved_bytes - used_bytes.get(other, 0))
            for other, share in self._by_tenant.items()
            if other != tenant
        )
        room_bytes = self.capacity_bytes - sum(used_bytes.values()) - unmet_bytes
        return min(room_bytes, self.quota_room_bytes(tenant, used_bytes.get(tenant, 0)))

    def spare_bytes(self, tenant: str, used_bytes: Mapping[str, int]) -> int:
        """What the tenant holds above its reservation, so that others may ask for it."""
        return max(0, used_bytes.get(tenant, 0) - self.of(tenant).reserved_bytes)


def memory_shares(config: Config) -> Shares:
    """The shares of host memory.

    Raises:
        ConfigError: they cannot be kept.
    """
    shares = {
        tenant: Share(quota.memory_bytes, quota.memory_reserved_bytes)
        for tenant, quota in config.quota.items()
    }
    return Shares(config.memory.capacity_bytes, shares, "memory")


def nvme_shares(config: Config) -> Shares:
    """The shares of the NVMe tier, in whole segments: reservations rounded up, quotas down.

    Raises:
        ConfigError: they cannot be kept, or a quota is below one segment.
    """
    segment_bytes = config.nvme.segment_bytes
    shares = {
        tenant: _nvme_share(tenant, quota, segment_bytes) for tenant, quota in config.quota.items()
    }
    return Shares(config.nvme.capacity_bytes, shares, "nvme")


def _nvme_share(tenant: str, quota: QuotaConfig, segment_bytes: int) -> Share:
    if 0 < quota.nvme_bytes < segment_bytes:
        raise ConfigError(
            f'[quota."{tenant}"]: nvme_bytes {quota.nvme_bytes} is below nvme.segment_bytes '
            f"{segment_bytes}: raise the first or lower the second"
        )
    segments = -(-quota.nvme_reserved_bytes // segment_bytes)
    quota_bytes = quota.nvme_bytes // segment_bytes * segment_bytes
    return Share(quota_bytes, segments * segment_bytes)
