"""Files that a session reads itself: opened once, kept, and never another's."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm import segment_files
from ucm.client import RemoteCache, connect
from ucm.config import MIB
from ucm.errors import BlockNotFoundError, TierUnavailableError, UcmError
from ucm.load_plan import SegmentFile
from ucm.segment_files import SegmentFiles
from ucm.storage.extents import SegmentFd, SlotPlace
from ucm.storage.tier import SlotId
from ucm.testing.blocks import chain, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.types import LoadMode, NamespaceId

NAMESPACE = NamespaceId(bytes(32))


def place(file_id: int, segment: int = 0) -> SlotPlace:
    return SlotPlace(SlotId(0), segment, file_id, 0, 1)


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class Opener:
    """Gives descriptors of a file."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"x" * 4096)
        self.path = path
        self.file_id = 5
        self.num_opened = 0
        self.error: UcmError | None = None

    def __call__(self, namespace: NamespaceId, segment: int) -> SegmentFd:
        if self.error is not None:
            raise self.error
        self.num_opened += 1
        return SegmentFd(os.open(self.path, os.O_RDONLY), self.file_id, is_direct=False)


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    return Opener(tmp_path / "segment")


def test_a_file_is_opened_once(opener: Opener) -> None:
    files = SegmentFiles(opener)
    assert files.get(NAMESPACE, place(5)) is files.get(NAMESPACE, place(5))
    assert (opener.num_opened, len(files)) == (1, 1)


def test_another_file_under_the_same_number_is_not_taken(opener: Opener) -> None:
    """The segment left and came back between the plan and the opening."""
    before = open_fds()
    files = SegmentFiles(opener)
    assert files.get(NAMESPACE, place(6)) is None
    assert (len(files), open_fds()) == (0, before)


def test_a_refusal_is_a_miss(opener: Opener) -> None:
    opener.error = TierUnavailableError("gone")
    assert SegmentFiles(opener).get(NAMESPACE, place(5)) is None


def test_files_are_kept_up_to_a_number(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was used last stays; what a plan holds stays open all the same."""
    monkeypatch.setattr(segment_files, "MAX_FILES", 2)
    files, before = SegmentFiles(opener), open_fds()
    held: list[SegmentFile | None] = []
    for number in (1, 2, 1, 3):
        opener.file_id = number
        held.append(files.get(NAMESPACE, place(number)))
    assert (opener.num_opened, len(files)) == (3, 2)
    assert open_fds() == before + 3
    held.clear()
    assert open_fds() == before + 2
    files.close()
    assert open_fds() == before


def test_a_closed_session_keeps_nothing(opener: Opener) -> None:
    before = open_fds()
    files = SegmentFiles(opener)
    files.close()
    file = files.get(NAMESPACE, place(5))
    assert file is not None
    del file
    assert open_fds() == before


def open_segments() -> int:
    """Descriptors of segment files in this process: the daemon's and its clients'."""
    gc.collect()
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(".seg" in str(link.readlink()) for link in links if link.is_symlink())


@pytest.fixture
def cache() -> Iterator[RemoteCache]:
    with short_folder() as folder, running_daemon(small_config(folder)) as daemon:
        cache = connect(daemon.config.service.socket_path, timeout_s=5)
        yield cache
        cache.close()


def test_the_door_gives_files_of_open_namespaces_only(cache: RemoteCache) -> None:
    """A refusal leaves the session usable; all descriptors go back with it."""
    handle = cache.open_namespace(tiny_spec())
    keys = chain(handle.id, 4)
    put(cache, handle, keys)
    assert cache.flush(timeout_s=10)
    before = open_segments()
    with pytest.raises(BlockNotFoundError):
        cache._door.open_segment(NAMESPACE, 0, timeout_s=5)
    for number in (7, 1 << 31):
        with pytest.raises(TierUnavailableError, match="out of use"):
            cache._door.open_segment(handle.id, number, timeout_s=5)
    opened = cache._door.open_segment(handle.id, 0, timeout_s=5)
    assert not os.get_inheritable(opened.fd)
    assert os.fstat(opened.fd).st_size == 16 * MIB
    assert (opened.file_id, open_segments()) == (1, before + 1)
    os.close(opened.fd)
    plan = cache.begin_load(handle.id, keys, mode=LoadMode.DIRECT, timeout_s=1)
    assert plan.num_ready == 4
    cache.close()
    assert open_segments() == before


def test_a_store_without_files_gives_none() -> None:
    with short_folder() as folder, running_daemon(small_config(folder, nvme=False)) as daemon:
        cache = connect(daemon.config.service.socket_path, timeout_s=5)
        handle = cache.open_namespace(tiny_spec())
        with pytest.raises(TierUnavailableError, match="no files"):
            cache._door.open_segment(handle.id, 0, timeout_s=5)
        cache.close()
