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
    @pytest.fixture(autouse=True)
    def _stores(self) -> Iterator[None]:
        self.stores: list[NvmeStore] = []
        yield
        for store in self.stores:
            store.close()

    def make_tier(self, folder: Path, num_slots: int) -> Tier:
        store = NvmeStore(nvme_config(folder / "data", num_slots, slots_per_segment=2))
        self.stores.append(store)
        return store.open_namespace(NAMESPACE, LAYOUT)
