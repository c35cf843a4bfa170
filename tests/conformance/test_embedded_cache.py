"""Embedded mode keeps every promise of `CacheApi`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.testing.cache_conformance import CacheApiTests, CacheHarness
from ucm.testing.load_plan_conformance import LoadPlanTests
from ucm.testing.partial_conformance import PartialResultTests
from ucm.testing.select_conformance import SelectTests
from ucm.testing.store_harness import CACHE_SIZE, embedded_harness


class TestEmbeddedCache(CacheApiTests, PartialResultTests, LoadPlanTests, SelectTests):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[CacheHarness]:
        with embedded_harness(tmp_path, CACHE_SIZE) as harness:
            yield harness
