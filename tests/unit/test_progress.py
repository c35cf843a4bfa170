"""The shared progress area: what a daemon writes and its client reads, and when neither may."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.progress import (
    ProgressArea,
    ProgressPlace,
    ProgressSignal,
    PromotionTally,
    SessionProgress,
    SharedProgress,
    region_bytes,
)

WAIT_S = 10.0


@pytest.fixture
def area() -> Iterator[ProgressArea]:
    found = ProgressArea(8192)
    yield found
    found.close()
    found.close()


def client_of(area: ProgressArea) -> SessionProgress:
    signal = ProgressSignal(os.dup(area.signal_fd), lambda: False)
    return SessionProgress(area.memory, signal)


def test_what_is_written_is_read(area: ProgressArea) -> None:
    region = area.reserve(2, 3)
    assert region is not None
    progress = client_of(area).of(region.place, 2, 3)
    assert progress is not None
    assert (progress.num_blocks, progress.num_done(), progress.num_usable()) == (2, 0, 2)
    region.put_checksums(1, (7, 8, 2**64 - 1))
    region.publish(4, 1)
    assert (progress.num_done(), progress.num_usable()) == (4, 1)
    assert progress.checksums(1) == (7, 8, 2**64 - 1)
    assert progress.wait(4, 0.0)
    assert not progress.wait(5, 0.0)
    progress.close()
    assert (progress.num_done(), progress.num_usable()) == (6, 0)


def test_a_region_that_was_freed_is_over_for_its_old_reader(area: ProgressArea) -> None:
    """Also when another load has it: nothing usable, and nothing to wait for."""
    region = area.reserve(2, 3)
    assert region is not None
    old = client_of(area).of(region.place, 2, 3)
    assert old is not None
    area.free(region)
    assert (old.num_done(), old.num_usable()) == (6, 0)
    again = area.reserve(2, 3)
    assert again is not None
    assert again.place.offset == region.place.offset
    again.publish(3, 2)
    assert (old.num_done(), old.num_usable()) == (6, 0)
    area.free(again)
    assert area.used_bytes == 0


def test_an_area_has_an_end(area: ProgressArea) -> None:
    assert not area.has_room(1000, 30)
    assert area.reserve(1000, 30) is None
    regions = []
    while area.has_room(10, 4):
        regions.append(area.reserve(10, 4))
    assert len(regions) == 8192 // region_bytes(10, 4)
    assert area.reserve(10, 4) is None


@pytest.mark.parametrize("offset", [-64, 3, 8192, 8192 - 64, 1 << 60])
def test_a_place_outside_the_area_is_refused(area: ProgressArea, offset: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        client_of(area).of(ProgressPlace(offset, 1), 10, 3)


def test_promoting_blocks_need_a_place(area: ProgressArea) -> None:
    assert client_of(area).of(None, 0, 3) is None
    with pytest.raises(ValueError, match="nothing says"):
        client_of(area).of(None, 1, 3)


def test_the_client_cannot_write(area: ProgressArea) -> None:
    """Nor change its size: the daemon does not die of it."""
    with pytest.raises(PermissionError):
        mmap.mmap(area.arena.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.ftruncate(area.arena.fd, 0)


@pytest.mark.timeout(5)
def test_a_client_that_does_not_listen_does_not_stop_the_daemon(area: ProgressArea) -> None:
    """Whatever it does to what it shares with the daemon."""
    with socket.socket(fileno=os.dup(area.signal_fd)) as client:
        client.setblocking(True)
        client.send(bytes(1_000))
    region = area.reserve(1, 2)
    assert region is not None
    for number in range(10_000):  # more than the sockets hold
        region.publish(number % 2, 1)
    region.publish(2, 1)
    progress = client_of(area).of(region.place, 1, 2)
    assert progress is not None
    assert progress.wait(2, 0.0)


def test_every_waiter_is_woken(area: ProgressArea) -> None:
    """Several threads and loads on one signal; each wake-up is seen by all."""
    region, other = area.reserve(4, 4), area.reserve(4, 4)
    assert region is not None
    assert other is not None
    session = client_of(area)
    reached: list[int] = []

    def follow(place: ProgressPlace) -> None:
        progress = session.of(place, 4, 4)
        assert progress is not None
        for number in range(1, 17):
            if not progress.wait(number, WAIT_S):
                return
        reached.append(progress.num_done())

    threads = [
        threading.Thread(target=follow, args=(each.place,))
        for each in (region, region, other, other)
    ]
    for thread in threads:
        thread.start()
    for number in range(1, 17):
        region.publish(number, 4)
        other.publish(number, 4)
    for thread in threads:
        thread.join(2 * WAIT_S)
    assert reached == [16] * 4


def test_a_cache_that_is_gone_is_not_waited_for(area: ProgressArea) -> None:
    """What it may have said is worth nothing, and there is nothing to come."""
    is_gone = threading.Event()
    region = area.reserve(2, 2)
    assert region is not None
    signal = ProgressSignal(os.dup(area.signal_fd), is_gone.is_set)
    progress = SharedProgress(area.memory, region.place, (2, 2), signal)
    assert not progress.wait(1, 0.01)
    is_gone.set()
    assert progress.wait(4, WAIT_S)
    assert progress.num_usable() == 0


@given(data=st.data(), num_blocks=st.integers(1, 5), num_layers=st.integers(1, 4))
def test_the_tally_counts_like_a_table(
    data: st.DataObject, num_blocks: int, num_layers: int
) -> None:
    """Leading slabs in layer-major order, given up ones included; never back."""
    area = ProgressArea(4096)
    region = area.reserve(num_blocks, num_layers)
    assert region is not None
    rows = [10 * number for number in range(num_blocks)]
    tally = PromotionTally(rows, region)
    progress = client_of(area).of(region.place, num_blocks, num_layers)
    assert progress is not None
    layers, usable, before = [0] * num_blocks, num_blocks, 0
    for _ in range(data.draw(st.integers(0, 12))):
        rank = data.draw(st.integers(0, num_blocks - 1))
        if data.draw(st.integers(0, 5)) == 0:
            tally.fail(rows[rank])
            usable = min(usable, rank)
        else:
            layers[rank] = max(layers[rank], data.draw(st.integers(0, num_layers)))
            tally.advance(rows[rank], layers[rank], (rank,) * num_layers)
        tally.publish()
        slabs = [(layer, i) for layer in range(num_layers) for i in range(num_blocks)]
        pending = [n for n, (layer, i) in enumerate(slabs) if i < usable and layers[i] <= layer]
        expected = min([*pending, len(slabs)])
        assert (progress.num_done(), progress.num_usable()) == (expected, usable)
        assert expected >= before
        before = expected
        for i in range(usable):
            assert not layers[i] or progress.checksums(i) == (i,) * num_layers
    area.free(region)
    area.close()


def test_checksums_of_the_next_load_in_a_region_are_not_taken_for_ones_own(
    area: ProgressArea,
) -> None:
    first = area.reserve(1, 3)
    assert first is not None
    first.put_checksums(0, (1, 2, 3))
    first.publish(3, 1)
    held_up = client_of(area).of(first.place, 1, 3)
    assert held_up is not None
    assert held_up.num_usable() == 1
    area.free(first)
    second = area.reserve(1, 3)
    assert second is not None
    assert second.place.offset == first.place.offset
    second.put_checksums(0, (7, 8, 9))
    second.publish(3, 1)
    assert held_up.checksums(0) == ()


def test_a_load_may_outlive_its_session(area: ProgressArea) -> None:
    """Corrupt blocks are looked at again under their lease, and the client dies meanwhile."""
    region = area.reserve(1, 3)
    assert region is not None
    area.close()
    region.publish(1, 1)
    area.free(region)
    assert area.used_bytes == 0
