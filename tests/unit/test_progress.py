"""The progress area: what a reader may still believe when its load, or its session, has ended."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ucm.progress import ProgressArea, ProgressSignal, SessionProgress, SharedProgress

NUM_LAYERS = 3


@pytest.fixture
def area() -> Iterator[ProgressArea]:
    found = ProgressArea(1 << 16)
    yield found
    found.close()


def client_of(area: ProgressArea) -> SessionProgress:
    return SessionProgress(area.memory, ProgressSignal(os.dup(area.event_fd), lambda: False))


def test_what_is_published_is_seen(area: ProgressArea) -> None:
    region = area.reserve(2, NUM_LAYERS)
    assert region is not None
    seen = client_of(area).of(region.place, 2, NUM_LAYERS)
    assert seen is not None
    assert (seen.num_done(), seen.num_usable()) == (0, 2)
    region.put_checksums(1, (4, 5, 6))
    region.publish(3, 2)
    assert seen.wait(3, 0.0)
    assert (seen.num_done(), seen.num_usable()) == (3, 2)
    assert seen.checksums(1) == (4, 5, 6)


def test_the_checksums_of_the_next_load_in_a_region_are_not_taken_for_ones_own(
    area: ProgressArea,
) -> None:
    first = area.reserve(1, NUM_LAYERS)
    assert first is not None
    first.put_checksums(0, (1, 2, 3))
    first.publish(NUM_LAYERS, 1)
    session = client_of(area)
    seen = session.of(first.place, 1, NUM_LAYERS)
    assert isinstance(seen, SharedProgress)
    assert seen.num_usable() == 1, "a reader that is held up here ..."
    area.free(first)
    second = area.reserve(1, NUM_LAYERS)
    assert second is not None
    assert second.place.offset == first.place.offset
    second.put_checksums(0, (7, 8, 9))
    second.publish(NUM_LAYERS, 1)
    assert seen.checksums(0) == (), "... must not verify its bytes by another load's checksums"
    assert (seen.num_done(), seen.num_usable()) == (NUM_LAYERS, 0)


def test_a_load_that_outlives_its_session_ends_without_an_error(area: ProgressArea) -> None:
    """A recheck of corrupt blocks holds a lease while the client's death closes the area."""
    region = area.reserve(1, NUM_LAYERS)
    assert region is not None
    area.close()
    region.publish(1, 1)
    area.free(region)
    assert area.used_bytes == 0
