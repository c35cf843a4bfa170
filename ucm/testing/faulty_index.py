"""LMDB losing power: what of `data.mdb` survives a cut before, during and after a commit.

LMDB's file is written by C code, so its commits are cut from outside: the environment that the
index opens counts its commits and syncs as calls of the same `FaultyFileIo`, and when the power
goes the file is made what a disk could have left of it:

    commit, step            durable before the cut           may survive besides
    write data pages        the state of the last sync       any 512-byte sectors of the new pages
    fdatasync, write meta   all data pages                   the new meta page, or the old one
    sync                    everything                       -

This is the order of writes with sync=True, metasync=False, writemap=False (`mdb_txn_commit`,
LMDB 0.9); the tests that pull the plug of a real file system check that LMDB keeps to it. A fault
planned for a commit or a sync fails it as an I/O error does.
"""

from __future__ import annotations

import contextlib
import errno
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import lmdb

from .faulty_io import FaultyFileIo, PowerCut
from .faulty_media import SECTOR_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

META_BYTES = 2 * 4096
"""The first two pages say which tree is the current one."""


class _CommitError(lmdb.DiskError):
    """What LMDB raises, with the code that it sets."""

    code = errno.EIO  # type: ignore[misc]


@contextlib.contextmanager
def faulty_index(power: FaultyFileIo, seed: int) -> Iterator[None]:
    """Let every index that is opened inside lose power together with `power`."""
    opened = lmdb.open

    def open_faulty(path: str, **options: Any) -> FaultyEnvironment:
        data = Path(path) / "data.mdb"
        before = data.read_bytes() if data.exists() else b""
        return FaultyEnvironment(opened(path, **options), (data, before), power, seed)

    with mock.patch("ucm.storage.index.lmdb.open", open_faulty):
        yield


class FaultyEnvironment:
    """An `lmdb.Environment`; see the module."""

    def __init__(
        self, env: lmdb.Environment, file: tuple[Path, bytes], power: FaultyFileIo, seed: int
    ) -> None:
        """Wrap `env`, whose file held the given bytes, durably, before it was opened."""
        self._env = env
        self._data, self._durable = file
        self._new_meta: bytes = self._durable[:META_BYTES]
        self._power = power
        self._random = random.Random(seed)
        self._survivor: bytes | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    @contextlib.contextmanager
    def begin(self, *, write: bool = False) -> Iterator[lmdb.Transaction]:
        """A transaction; the commit of a writing one is a call that can fail or be cut."""
        with self._env.begin(write=write) as transaction:
            yield transaction
            if write:
                self._call("commit")  # a failure here ends the transaction
        if write:
            self._after_commit(self._data.read_bytes())

    def _after_commit(self, present: bytes) -> None:
        with contextlib.suppress(OSError):  # a commit can fail, a commit that is done cannot
            try:
                self._power.call("committed")
            except PowerCut:
                self._survivor = self._some_of(present)
                raise
        self._durable = self._new_meta + present[META_BYTES:]
        self._new_meta = present[:META_BYTES]

    def sync(self, force: bool = False) -> None:
        """Make the last commit final."""
        self._call("sync")
        self._env.sync(force)
        self._durable = self._data.read_bytes()
        self._new_meta = self._durable[:META_BYTES]

    def close(self) -> None:
        """Close; after a power cut the file becomes what survived."""
        self._env.close()
        if self._power.is_dead:
            survivor = self._survivor
            self._data.write_bytes(self._at_rest() if survivor is None else survivor)

    def _call(self, name: str) -> None:
        """Count a call; a planned fault fails as LMDB does."""
        try:
            self._power.call(name)
        except OSError as error:
            raise _CommitError(f"{name}: {error}") from error

    def _at_rest(self) -> bytes:
        """What is durable, and the old or the new meta pages: nobody has synced them yet."""
        old = self._durable[:META_BYTES]
        meta = {"none": old, "all": self._new_meta}.get(
            self._power.survival, self._random.choice((old, self._new_meta))
        )
        return meta + self._durable[META_BYTES:]

    def _some_of(self, present: bytes) -> bytes:
        """The durable state and some sectors of the pages that a commit was writing."""
        survivor = bytearray(self._at_rest().ljust(len(present), b"\0"))
        share = self._power.survival_share()
        for start in range(META_BYTES, len(present), SECTOR_BYTES):
            if self._random.random() < share:
                survivor[start : start + SECTOR_BYTES] = present[start : start + SECTOR_BYTES]
        return bytes(survivor)
