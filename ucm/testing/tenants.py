"""Several tenants on one small real store, and what must hold of their shares at every moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ucm.api import NamespaceHandle
from ucm.clock import SimClock
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, QuotaConfig, ServiceConfig
from ucm.embedded import EmbeddedCache
from ucm.manager import Manager
from ucm.storage.format import HEADER_BYTES
from ucm.types import TierKind

from .blocks import TINY_LAYOUT, tiny_spec

BLOCK_BYTES = TINY_LAYOUT.block_bytes
SLOT_BYTES = HEADER_BYTES + BLOCK_BYTES
SLOTS_PER_SEGMENT = 4
SEGMENT_BYTES = SLOTS_PER_SEGMENT * SLOT_BYTES


def tenant_config(
    path: Path | None, quota: Mapping[str, QuotaConfig], *, blocks: int = 32, segments: int = 8
) -> Config:
    """Room for so many tiny blocks in memory and so many segments of four on the disk."""
    return Config(
        service=ServiceConfig(staging_bytes=1 * MIB, max_namespaces=8, drain_timeout_s=5.0),
        memory=MemoryConfig(capacity_bytes=blocks * BLOCK_BYTES),
        nvme=NvmeConfig(
            path=path,
            capacity_bytes=segments * SEGMENT_BYTES,
            segment_bytes=SEGMENT_BYTES,
            io_threads=2,
            commit_interval_s=0.0,
            index_map_bytes=16 << 20,
        ),
        quota=quota,
    )


class TenantStore:
    """One manager; a session and a namespace for each tenant that was opened."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clock = SimClock()
        self.manager = Manager(config, clock=self.clock)
        self.caches: dict[str, tuple[EmbeddedCache, NamespaceHandle]] = {}

    def open(self, tenant: str) -> tuple[EmbeddedCache, NamespaceHandle]:
        """The tenant's session and namespace; opened if need be."""
        if tenant not in self.caches:
            cache = EmbeddedCache(self.manager, owns_manager=False)
            spec = dataclasses.replace(tiny_spec(), tenant=tenant)
            self.caches[tenant] = cache, cache.open_namespace(spec)
        return self.caches[tenant]

    def leave(self, tenant: str) -> None:
        """End the tenant's session; its namespace is idle then."""
        if tenant in self.caches:
            self.caches.pop(tenant)[0].close()

    def held_bytes(self) -> dict[TierKind, dict[str, int]]:
        """What open namespaces of each tenant hold, by tier."""
        held: dict[TierKind, dict[str, int]] = {kind: {} for kind in TierKind}
        for namespace in self.manager.status().namespaces:
            for share in namespace.shares:
                by_tenant = held[share.kind]
                by_tenant[namespace.tenant] = by_tenant.get(namespace.tenant, 0) + share.held_bytes
        return held

    def check_shares(self) -> list[str]:
        """Every share that is not kept, in words."""
        problems: list[str] = []
        table = self.manager._state.namespaces  # noqa: SLF001  a look from outside
        for kind, used in self.held_bytes().items():
            shares = table.shares if kind is TierKind.MEMORY else table.nvme_shares
            if sum(used.values()) > shares.capacity_bytes:
                problems.append(f"{kind}: {used} is above the capacity {shares.capacity_bytes}")
            for tenant in used:
                quota_bytes = shares.of(tenant).quota_bytes
                if quota_bytes and used[tenant] > quota_bytes:
                    problems.append(f"{kind}: {tenant} holds {used[tenant]} of {quota_bytes}")
            for tenant in self.config.quota:
                missing = shares.of(tenant).reserved_bytes - used.get(tenant, 0)
                if shares.available_bytes(tenant, used) < missing:
                    problems.append(f"{kind}: {missing} bytes of {tenant} are taken: {used}")
        return problems

    def close(self) -> None:
        """End everything."""
        for tenant in list(self.caches):
            self.leave(tenant)
        self.manager.close()
