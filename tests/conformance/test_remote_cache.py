"""The daemon's client keeps every promise of `CacheApi`, as embedded mode does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ucm.testing.cache_conformance import CacheApiTests, CacheHarness
from ucm.testing.daemon import short_folder
from ucm.testing.load_plan_conformance import LoadPlanTests
from ucm.testing.partial_conformance import PartialResultTests
from ucm.testing.select_conformance import SelectTests
from ucm.testing.store_harness import CACHE_SIZE, remote_harness


class TestRemoteCache(CacheApiTests, PartialResultTests, LoadPlanTests, SelectTests):
    @pytest.fixture
    def harness(self) -> Iterator[CacheHarness]:
        with short_folder() as folder, remote_harness(folder, CACHE_SIZE) as harness:
            yield harness
