"""The NVMe tier passes the suite of all tiers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.storage.nvme import NvmeStore
from ucm.storage.tier import Tier
from ucm.testing.nvme import NAMESPACE, nvme_config
from ucm.testing.tier_conformance import LAYOUT, TierTests


class TestNvmeTier(TierTests):
    codec = "raw"

    @pytest.fixture(autouse=True)
    def _stores(self) -> Iterator[None]:
        self.stores: list[NvmeStore] = []
        yield
        for store in self.stores:
            store.close()

    def make_tier(self, folder: Path, num_slots: int) -> Tier:
        config = nvme_config(folder / "data", num_slots, slots_per_segment=2, codec=self.codec)
        store = NvmeStore(config)
        self.stores.append(store)
        return store.open_namespace(NAMESPACE, LAYOUT, accepts_lossy=True)


class TestNvmeTierWithBpZstd(TestNvmeTier):
    codec = "bp-zstd"


class TestNvmeTierWithInt8(TestNvmeTier):
    """The suite's blocks are such that eight bits keep them: equality is asked of this one too."""

    codec = "int8"
