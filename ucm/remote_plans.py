"""Load plans of a session with a daemon: its answer, joined with what the door hands out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from ucm.storage.extents import SegmentFd
from ucm.storage.throttled_io import TokenBucket, limit_of

from .api import NamespaceHandle
from .clock import SystemClock
from .door_client import DoorClient
from .errors import InvalidArgumentError, TierUnavailableError
from .load_plan import LoadPlan
from .plan_grants import PlanMemory, planned_blocks
from .plan_wire import plan_from_wire
from .progress import ProgressSignal, SessionProgress
from .protos import cache_pb2 as pb
from .segment_files import SegmentFiles
from .types import BlockKey, LoadMode, NamespaceId, SourceKind
from .wire import checksums_from_wire


class RemotePlans:
    """What a session keeps for its plans: open files, the progress area. Thread-safe."""

    def __init__(
        self, door: DoorClient, at_door: Callable[[], AbstractContextManager[float]]
    ) -> None:
        """Open nothing yet; `at_door` is a turn at the door, with the seconds that are left."""
        self._door = door
        self._at_door = at_door
        self._files = SegmentFiles(self._open_segment)
        self._progress: SessionProgress | None = None
        self._read_limit: TokenBucket | None = None

    def plan(
        self,
        handle: NamespaceHandle,
        keys: Sequence[BlockKey],
        mode: LoadMode,
        reply: pb.BeginLoadReply,
        arena: memoryview,
    ) -> LoadPlan:
        """The plan that the daemon answered. Asks the door for what is needed for the first time.

        Raises:
            TierUnavailableError: the answer is garbled.
        """
        layout = handle.layout
        try:
            grants = plan_from_wire(reply, num_keys=len(keys))
            num_ready = grants.sources.count(SourceKind.MEMORY)
            sums = checksums_from_wire(grants.checksums, num_blocks=num_ready)
            memory = PlanMemory(
                view=lambda offset: _block_view(arena, offset, layout.block_bytes),
                checksums=sums,
                file=lambda place: self._files.get(handle.id, place),
            )
            blocks = planned_blocks(keys, grants, memory)
            promoting = grants.sources.count(SourceKind.PROMOTING)
            shared = self._shared_progress() if promoting else None
            progress = shared.of(grants.progress, promoting, layout.num_layers) if shared else None
        except (InvalidArgumentError, ValueError) as error:
            raise TierUnavailableError(f"the daemon's load plan is garbled: {error}") from error
        plan = LoadPlan(grants.lease_id, handle.id, mode, blocks, grants.timeout_s, progress)
        return replace(plan, read_limit=self._limit(handle.max_read_bytes_per_s))

    def _limit(self, bytes_per_s: int) -> TokenBucket | None:
        """The session's one bucket; the daemon says what it lets through."""
        if self._read_limit is None:
            self._read_limit = limit_of(bytes_per_s, SystemClock())
        return self._read_limit

    def close(self) -> None:
        """Keep nothing but what plans still use. Idempotent."""
        self._files.close()
        self._progress = None

    def _open_segment(self, namespace: NamespaceId, segment: int) -> SegmentFd:
        with self._at_door() as left_s:
            return self._door.open_segment(namespace, segment, timeout_s=left_s)

    def _shared_progress(self) -> SessionProgress:
        found = self._progress
        if found is not None:
            return found
        with self._at_door() as left_s:
            if self._progress is None:
                memory, signal_fd = self._door.open_progress(timeout_s=left_s)
                signal = ProgressSignal(signal_fd, lambda: not self._door.is_open())
                self._progress = SessionProgress(memory, signal)
            return self._progress


def _block_view(arena: memoryview, offset: int, size_bytes: int) -> memoryview:
    if offset + size_bytes > len(arena):
        raise ValueError("a block lies behind the end of the arena")
    return arena[offset : offset + size_bytes]
