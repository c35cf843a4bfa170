"""A daemon's collections, over its admin socket, keep every promise of `CollectionApi`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ucm import collection_service
from ucm.testing.collection_conformance import CollectionHarness, CollectionTests
from ucm.testing.daemon import short_folder
from ucm.testing.store_harness import COLLECTION_SIZE, remote_harness


class TestRemoteCollections(CollectionTests):
    @pytest.fixture
    def harness(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[CollectionHarness]:
        monkeypatch.setattr(collection_service, "PAGE_DOCUMENTS", 3)
        with short_folder() as folder, remote_harness(folder, COLLECTION_SIZE) as harness:
            yield harness
