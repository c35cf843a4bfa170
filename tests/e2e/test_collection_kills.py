"""`kill -9` of the real daemon while documents come, change and go: what is deleted stays deleted.

The test's own process keeps the expected state: which documents were put, stored and flushed, and
which calls that delete them were answered, or sent. After each kill the next daemon must list what
was answered, serve what is listed and was flushed, find nothing of what is not listed, and leave
files in which `fsck` proves it. `UCM_DOC_KILLS_SEED=N` replays a run's choices.
"""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from ucm.admin import AdminClient
from ucm.api import NamespaceHandle
from ucm.client import RemoteCache, connect
from ucm.errors import CapacityError, TierUnavailableError, UcmError
from ucm.storage.fsck import check_store
from ucm.storage.fsck_report import FindingKind
from ucm.testing.blocks import chain, content, get, put, tiny_spec
from ucm.testing.daemon import DaemonNursery, ForkedDaemon, short_folder, small_settings
from ucm.testing.documents import bytes_on_disk, document, names_on_disk
from ucm.testing.lanes import IS_DEEP
from ucm.types import StoreStatus

NUM_KILLS: Final = 200 if IS_DEEP else 5
CHAIN_BLOCKS: Final = 3
MAX_LIFE_S: Final = 0.6
DEADLINE_S: Final = 20.0


@dataclass
class Journal:
    """What the daemon was told and has answered. A document is named by its seed."""

    listed: set[int] = field(default_factory=set)
    """Put, and the answer came."""
    flushed: set[int] = field(default_factory=set)
    """And its blocks are durable."""
    unsure: set[int] = field(default_factory=set)
    """In a call that was not answered: listed or not."""
    deleted: set[int] = field(default_factory=set)
    next_seed: int = 0


class Life:
    """One daemon's life: an operator and an engine in one thread, until it is killed."""

    def __init__(self, daemon: ForkedDaemon, journal: Journal, rng: random.Random) -> None:
        self.daemon = daemon
        self.journal = journal
        self.rng = rng
        self.failure: BaseException | None = None

    def run(self) -> None:
        thread = threading.Thread(target=self.work)
        thread.start()
        time.sleep(self.rng.uniform(0.05, MAX_LIFE_S))  # the moment of death is what is tested
        self.daemon.kill()
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "a client hangs after the daemon's death"
        if self.failure is not None:
            raise self.failure

    def work(self) -> None:
        try:
            with (
                connect(self.daemon.socket_path, timeout_s=DEADLINE_S) as cache,
                AdminClient(self.daemon.socket_path) as admin,
            ):
                handle = cache.open_namespace(tiny_spec())
                while True:
                    self.rng.choice((self.add, self.add, self.remove))(cache, admin, handle)
        except TierUnavailableError:
            pass  # the kill
        except (UcmError, AssertionError) as error:
            self.failure = error

    def add(self, cache: RemoteCache, admin: AdminClient, handle: NamespaceHandle) -> None:
        journal = self.journal
        journal.next_seed += 1
        seed = journal.next_seed
        keys = chain(handle.id, CHAIN_BLOCKS, seed)
        journal.unsure.add(seed)
        admin.collections.put_document("docs", document(handle.id, f"{seed}", keys))
        journal.unsure.discard(seed)
        journal.listed.add(seed)
        assert set(put(cache, handle, keys)) == {StoreStatus.ACCEPTED}
        if cache.flush(timeout_s=DEADLINE_S):
            journal.flushed.add(seed)

    def remove(self, cache: RemoteCache, admin: AdminClient, handle: NamespaceHandle) -> None:
        journal = self.journal
        if not journal.listed:
            return
        seed = self.rng.choice(sorted(journal.listed))
        journal.listed.discard(seed)
        journal.unsure.add(seed)
        admin.collections.remove("docs", [f"{seed}"])
        journal.unsure.discard(seed)
        journal.deleted.add(seed)
        keys = chain(handle.id, CHAIN_BLOCKS, seed)
        assert cache.lookup(handle.id, keys).num_blocks == 0
        assert set(put(cache, handle, keys)) == {StoreStatus.REFUSED}


def check(daemon: ForkedDaemon, journal: Journal) -> None:
    """The next daemon knows what was answered, and nothing of what is gone."""
    with (
        connect(daemon.socket_path, timeout_s=DEADLINE_S) as cache,
        AdminClient(daemon.socket_path) as admin,
    ):
        handle = cache.open_namespace(tiny_spec())
        names = {each.name for each in admin.collections.list_collections()}
        listed = admin.collections.list_documents("docs") if "docs" in names else ()
        found = {int(each.id) for each in listed}
        assert journal.listed <= found <= journal.listed | journal.unsure
        journal.deleted |= journal.unsure - found
        journal.listed, journal.unsure = found, set()
        for seed in journal.deleted:
            assert cache.lookup(handle.id, chain(handle.id, CHAIN_BLOCKS, seed)).num_blocks == 0
        for seed in journal.flushed & journal.listed:
            keys = chain(handle.id, CHAIN_BLOCKS, seed)
            assert cache.lookup(handle.id, keys).num_blocks == CHAIN_BLOCKS
        for seed in sorted(journal.flushed & journal.listed)[-3:]:
            keys = chain(handle.id, CHAIN_BLOCKS, seed)
            try:
                assert get(cache, handle, keys) == [content(key) for key in keys]
            except CapacityError:
                continue
        wait_until_erased(admin)


def wait_until_erased(admin: AdminClient) -> None:
    """What a kill left over is finished by the next daemon."""
    end_s = time.monotonic() + DEADLINE_S
    while admin.collections.deletions().num_waiting:
        assert time.monotonic() < end_s, admin.collections.deletions()
        time.sleep(0.02)


def check_files(store: Path, journal: Journal) -> None:
    namespace = tiny_spec().fingerprint()
    gone = [key for seed in journal.deleted for key in chain(namespace, CHAIN_BLOCKS, seed)]
    assert not any(bytes_on_disk(store, gone) + names_on_disk(store, gone))
    report = check_store(store, repair=False)
    cut_short = [found for found in report.findings if found.kind is FindingKind.UNINDEXED]
    assert report.findings == cut_short  # by the last kill; of no deleted document, as seen above
    assert report.num_documents == len(journal.listed)
    assert report.num_deleted_blocks >= CHAIN_BLOCKS * (len(journal.deleted) > 0)


@pytest.mark.timeout(3600 if IS_DEEP else 120)
def test_kills_while_documents_come_and_go() -> None:
    seed = int(os.environ.get("UCM_DOC_KILLS_SEED") or time.time_ns() % 2**32)
    print(f"UCM_DOC_KILLS_SEED={seed}")
    rng, journal = random.Random(seed), Journal()
    with short_folder() as folder:
        nursery = DaemonNursery(
            [*small_settings(folder), "--set", "nvme.capacity_bytes=256MiB"], folder / "log"
        )
        try:
            for _ in range(NUM_KILLS):
                daemon = nursery.start()
                check(daemon, journal)
                Life(daemon, journal, rng).run()
            daemon = nursery.start()
            check(daemon, journal)
            assert daemon.stop() == 0
        finally:
            nursery.close()
        check_files(folder / "store", journal)
    print(f"{len(journal.listed)} documents kept, {len(journal.deleted)} deleted")
    assert journal.deleted
    assert journal.listed
