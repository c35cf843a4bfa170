"""When deleted blocks are erased: rounds of `deletion`, until nothing of them is left.

    a round    on the commit thread: `Deletions.finish` | registry: erased | lock: forget
    closed     a namespace that nobody has open is opened for it by what its superblock says
    opening    lock: what is doomed leaves the index before anybody has the namespace

A key is *barred* from the moment its document is deleted, and *doomed* as well until nothing of it
is left. Every deletion has a number: a round erases what was doomed when it began, and a key that
was put and deleted again meanwhile is not mistaken for what it erased. What cannot be erased is
tried again later, and at the next start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ucm.storage.closed_namespaces import erase_closed, remove_aside

from .collection_api import DeletionStatus
from .deletion import Deletions, Round
from .errors import UcmError
from .manager_state import ManagerState
from .namespaces import Namespace, NvmeStoreLike
from .shrink import Delete
from .types import BlockKey, NamespaceId
from .write_behind import WriteBehind

if TYPE_CHECKING:
    from ucm.storage.registry_change import DoomedKeys

_log = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
"""How long a removal waits for the disk, whatever it is told about leases."""
GRACE_S: Final = 0.2
"""How long it waits for leases at least: some are over in milliseconds."""
POLL_S: Final = 0.02
MAX_POLL_S: Final = 0.25
"""Between looks for leases that have ended: soon at first, as most end soon."""
RETRY_S: Final = 5.0
"""After the disk refused to erase: how long until the next attempt."""

MarkErased = Callable[[NamespaceId, Sequence[BlockKey]], str]
"""Notes durably that nothing is left of blocks; why it could not, or the empty string."""


@dataclass(frozen=True, slots=True)
class ErasedDisk:
    """Where namespaces lie."""

    store: NvmeStoreLike
    path: Path | None
    """The data folder; None when a test stands in for it."""


@dataclass(slots=True)
class _Progress:
    """How far deletion is in one namespace. Changed under the manager's lock."""

    barred: set[BlockKey] = field(default_factory=set)
    doomed: dict[BlockKey, int] = field(default_factory=dict)
    settled: int = 0
    """Everything doomed up to this number was tried."""
    is_woken: bool = False
    """A round is about to begin."""
    problem: str = ""
    retry_s: float = 0.0


class DeletionRounds:
    """Deletion in one manager's namespaces, open or not. Thread-safe where not named `_locked`."""

    def __init__(
        self,
        state: ManagerState,
        write_behind: WriteBehind | None,
        disk: ErasedDisk | None,
        registry: tuple[threading.Lock, MarkErased],
    ) -> None:
        """Begin with nothing barred.

        Args:
            state: of the manager.
            write_behind: whose commits erase; None without NVMe.
            disk: where closed namespaces are; None without NVMe.
            registry: the lock that orders its changes, and how blocks are noted in it, under that.
        """
        self._state = state
        self._write_behind = write_behind
        self._disk = disk
        self._lock, self._mark_erased = registry
        self._deletions = Deletions(state)
        self._changed = threading.Condition(state.lock)
        self._progress: dict[NamespaceId, _Progress] = {}
        self._number = 0
        state.namespaces.on_open = self._attach_locked
        if write_behind is not None:
            write_behind.on_commit = self._run

    # ------------------------------------------------------------- dooming

    def _of(self, namespace: NamespaceId) -> _Progress:
        return self._progress.setdefault(namespace, _Progress())

    def bar_locked(self, namespace: NamespaceId, keys: Iterable[BlockKey]) -> None:
        """Let no store bring blocks back."""
        self._of(namespace).barred.update(keys)

    def lift_locked(self, namespace: NamespaceId, keys: Collection[BlockKey]) -> None:
        """Let blocks be stored again; what was doomed of them need not go any more."""
        progress = self._of(namespace)
        for key in keys:
            progress.barred.discard(key)
            progress.doomed.pop(key, None)
        found = self._state.namespaces.get_locked(namespace)
        if found is not None:
            self._deletions.show_locked(found, keys)
        self._gauge_locked()

    def lift_all_locked(self, keys: DoomedKeys) -> None:
        """As `lift_locked`, in several namespaces."""
        for namespace, own in keys.items():
            self.lift_locked(namespace, own)

    def doom_locked(self, doomed: DoomedKeys) -> int:
        """Bar keys and hide their blocks from now on; the number of this deletion."""
        self._number += 1
        for namespace, keys in doomed.items():
            progress = self._of(namespace)
            progress.barred.update(keys)
            progress.doomed.update(dict.fromkeys(keys, self._number))
            progress.problem = ""
            found = self._state.namespaces.get_locked(namespace)
            if found is not None:
                self._deletions.hide_locked(found)
        self._gauge_locked()
        return self._number

    def _attach_locked(self, found: Namespace) -> None:
        """A namespace was opened: what is deleted is not in it, whatever its disk holds."""
        progress = self._progress.get(found.id)
        if progress is None:
            progress = self._of(found.id)
        found.barred, found.doomed = progress.barred, progress.doomed
        back = [key for key in progress.barred if found.index.find(key) >= 0]
        self._number += bool(back)
        for key in back:
            progress.doomed.setdefault(key, self._number)
        self._deletions.hide_locked(found)

    def _gauge_locked(self) -> None:
        every = self._progress.values()
        metrics = self._state.metrics
        metrics.set("ucm_deletions_waiting", sum(len(each.doomed) for each in every))
        metrics.set("ucm_barred_blocks", sum(len(each.barred) for each in every))

    # -------------------------------------------------------------- erasing

    def wait(self, doomed: DoomedKeys, number: int, timeout_s: float) -> int:
        """Wait until all of it is erased, the disk has tried, or time is over; what is left."""
        now_s = time.monotonic()
        end_s, patience_s = now_s + max(timeout_s, GRACE_S), now_s + PATIENCE_S
        poll_s = POLL_S
        while True:
            self.advance(doomed)
            with self._state.lock:
                left = sum(
                    key in self._of(name).doomed for name, keys in doomed.items() for key in keys
                )
                is_held = not any(self._has_work_locked(name, number) for name in doomed)
                now_s = time.monotonic()
                if not left or (now_s >= end_s and (is_held or now_s >= patience_s)):
                    return left
                self._changed.wait(poll_s)
            poll_s = min(1.5 * poll_s, MAX_POLL_S)

    def _has_work_locked(self, namespace: NamespaceId, number: int) -> bool:
        """Whether a deletion was not tried yet, or waits for a transfer and not for a lease."""
        found, progress = self._state.namespaces.get_locked(namespace), self._of(namespace)
        if progress.problem or progress.settled < number:
            return not progress.problem
        return found is not None and self._deletions.has_work_locked(found)

    def advance(self, namespaces: Iterable[NamespaceId]) -> None:
        """Begin a round wherever one would get further."""
        here: list[Namespace] = []
        now_s = time.monotonic()
        with self._state.lock:
            self._state.expire_locked(self._state.clock.now_us())
            for namespace in namespaces:
                found, progress = self._state.namespaces.get_locked(namespace), self._of(namespace)
                if found is None or progress.is_woken or not (found.doomed or found.detached):
                    continue
                has_work = self._deletions.has_work_locked(found) or progress.settled < self._number
                if not has_work or (progress.problem and now_s < progress.retry_s):
                    continue
                if self._write_behind is not None and found.nvme is not None:
                    progress.is_woken = self._write_behind.wake_locked(found)
                else:
                    progress.is_woken = True
                    found.num_copying += 1
                    here.append(found)
        for found in here:
            self._run(found, None)
            with self._state.lock:
                found.num_copying -= 1
                self._state.copied.notify_all()

    def _run(self, found: Namespace, delete: Delete | None) -> None:
        """One round; on the commit thread, but without NVMe on any."""
        with self._state.lock:
            progress, number = self._of(found.id), self._number
            progress.is_woken = False
            if not (found.doomed or found.detached):
                progress.settled = number
                return
        done = self._deletions.finish(found, delete)
        if self._disk is not None and done.batch and not done.problem:
            done = self._without_aside(found, done, self._disk)
        self._complete(found, done, number)

    def _without_aside(self, found: Namespace, done: Round, disk: ErasedDisk) -> Round:
        """A round, with what may be left of its namespace elsewhere on the disk."""
        if found.nvme is None:
            return Round(done.batch, f"{found.problem}: deleted blocks may still be there")
        try:
            if disk.path is not None:
                remove_aside(disk.path, found.id)
        except UcmError as error:
            return Round(done.batch, str(error))
        return done

    def _complete(self, found: Namespace, done: Round, number: int) -> None:
        """Note what is erased: durably, then here."""
        problem = done.problem
        with self._lock:
            with self._state.lock:
                left = self._deletions.left_locked(found)
                erased = [
                    key
                    for key, own in done.batch.items()
                    if not problem and found.doomed.get(key) == own and key not in left
                ]
            problem = (self._mark_erased(found.id, erased) if erased else "") or problem
            with self._state.lock:
                self._note_locked(found.id, () if problem else erased, problem)
                self._of(found.id).settled = number

    def _note_locked(
        self, namespace: NamespaceId, erased: Sequence[BlockKey], problem: str
    ) -> None:
        progress = self._of(namespace)
        for key in erased:
            progress.doomed.pop(key, None)
        if problem and problem != progress.problem:
            _log.warning("deleted blocks are not erased yet: %s", problem)
        progress.problem = problem
        progress.retry_s = time.monotonic() + RETRY_S
        if erased:
            self._state.metrics.add("ucm_erased_blocks_total", len(erased))
        self._gauge_locked()
        self._changed.notify_all()

    def erase_closed(self, namespace: NamespaceId) -> None:
        """Erase what is doomed in a namespace that is not open; blocks for its recovery."""
        with self._state.lock:
            progress, number = self._of(namespace), self._number
            batch = dict(progress.doomed)
        if not batch:
            return
        with self._state.namespaces.closed(namespace) as is_closed:
            if not is_closed:
                return
            problem = self._try_closed(namespace, batch)
            with self._lock:
                with self._state.lock:
                    same = {key for key, own in batch.items() if progress.doomed.get(key) == own}
                erased = [] if problem else list(same)
                problem = (self._mark_erased(namespace, erased) if erased else "") or problem
                with self._state.lock:
                    self._note_locked(namespace, () if problem else erased, problem)
                    progress.settled = number

    def _try_closed(self, namespace: NamespaceId, batch: Iterable[BlockKey]) -> str:
        if self._disk is None:
            return ""
        if self._disk.path is None:
            return "this store's files are unknown"
        try:
            erase_closed(self._disk.store, self._disk.path, namespace, set(batch))
        except (UcmError, OSError) as error:
            return f"namespace {namespace.hex()[:8]}: {error}"
        return ""

    # ----------------------------------------------------------------- time

    def opened(self, namespace: NamespaceId) -> None:
        """A namespace was opened: go on with what is to be erased in it."""
        self.advance((namespace,))

    def tick(self) -> None:
        """Go on with what a lease or the disk held back. Cheap when nothing waits."""
        now_s = time.monotonic()
        with self._state.lock:
            waiting = [name for name, each in self._progress.items() if each.doomed]
            waiting += [found.id for found in self._state.namespaces if found.detached]
            opened = {found.id for found in self._state.namespaces}
        for namespace in waiting:
            if namespace not in opened and now_s >= self._of(namespace).retry_s:
                self.erase_closed(namespace)
        if waiting:
            self.advance(waiting)

    def finish(self) -> None:
        """Begin the last rounds: no lease is left. Before the end of the commits."""
        with self._state.lock:
            opened = [found.id for found in self._state.namespaces]
        self.advance(opened)

    def status_locked(self) -> DeletionStatus:
        """See `CollectionApi.deletions`."""
        every = self._progress.values()
        return DeletionStatus(
            num_waiting=sum(len(each.doomed) for each in every),
            num_barred=sum(len(each.barred) for each in every),
            problems=tuple(each.problem for each in every if each.problem),
        )
