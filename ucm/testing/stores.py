"""Small stores for tests: a manager over a fake disk, with hooks to fault it and to wait."""

from __future__ import annotations

import time
from collections.abc import Callable

from ucm.api import NamespaceHandle
from ucm.clock import SimClock
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig, TransferConfig
from ucm.embedded import EmbeddedCache
from ucm.manager import Manager
from ucm.namespaces import TierFactory

from .blocks import TINY_LAYOUT, tiny_spec
from .fake_tier import FakeDisk, FakeTier

LEASE_TIMEOUT_S = 30.0


def small_store_config(memory_blocks: int = 16, queue_blocks: int = 1024) -> Config:
    """Room for so many tiny blocks in memory and in the write queue."""
    return Config(
        service=ServiceConfig(
            staging_bytes=1 * MIB, max_sessions=4, max_namespaces=3, drain_timeout_s=5.0
        ),
        memory=MemoryConfig(capacity_bytes=memory_blocks * TINY_LAYOUT.block_bytes),
        nvme=NvmeConfig(
            write_queue_bytes=queue_blocks * TINY_LAYOUT.block_bytes, commit_interval_s=0.0
        ),
        transfer=TransferConfig(lease_timeout_s=LEASE_TIMEOUT_S),
    )


class FakeStore:
    """A manager over a `FakeDisk`, one session and one namespace on it, and a clock by hand."""

    def __init__(
        self,
        config: Config | None = None,
        *,
        disk: FakeDisk | None = None,
        with_disk: bool = True,
    ) -> None:
        self.config = config or small_store_config()
        self.clock = SimClock()
        self.disk = disk or FakeDisk()
        self.manager = Manager(
            self.config,
            clock=self.clock,
            tiers=TierFactory(nvme=self.disk if with_disk else None),
        )
        self.cache = EmbeddedCache(self.manager)
        self.handle: NamespaceHandle = self.cache.open_namespace(tiny_spec())

    @property
    def tier(self) -> FakeTier:
        """The fake disk's tier of the open namespace."""
        return self.disk.tiers[self.handle.id]

    def metric(self, name: str, **labels: str) -> float:
        """A counter's or gauge's value."""
        return self.manager.metrics.value(name, **labels)

    def drop_from_memory(self) -> None:
        """Restart over the same disk: only what is durable stays."""
        self.cache.close()
        self.manager = Manager(self.config, clock=self.clock, tiers=TierFactory(nvme=self.disk))
        self.cache = EmbeddedCache(self.manager)
        self.handle = self.cache.open_namespace(tiny_spec())

    def close(self) -> None:
        """End everything; nothing may hang on a held-back disk."""
        self.disk.faults.reads_may_go.set()
        self.disk.faults.writes_may_go.set()
        self.cache.close()


def wait_until(
    condition: Callable[[], bool],
    timeout_s: float = 5.0,
    *,
    what: str = "waited in vain",
    every_s: float = 0.001,
) -> None:
    """Wait for another thread or process to get somewhere; `what` says where it did not.

    Raises:
        AssertionError: it did not in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(every_s)
