"""The memory tier passes the suite of all tiers."""

from __future__ import annotations

from pathlib import Path

from ucm.storage.memory import MemoryTier
from ucm.storage.tier import Tier
from ucm.testing.tier_conformance import LAYOUT, TierTests


class TestMemoryTier(TierTests):
    def make_tier(self, folder: Path, num_slots: int) -> Tier:
        return MemoryTier(LAYOUT, num_slots)
