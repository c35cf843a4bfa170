"""Collections of a store in this process keep every promise of `CollectionApi`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ucm.testing.collection_conformance import CollectionHarness, CollectionTests
from ucm.testing.nvme import quick_folder
from ucm.testing.store_harness import COLLECTION_SIZE, embedded_harness


class TestEmbeddedCollections(CollectionTests):
    @pytest.fixture
    def harness(self) -> Iterator[CollectionHarness]:
        with quick_folder() as folder, embedded_harness(folder, COLLECTION_SIZE) as harness:
            yield harness
