"""A session's staging memory: where its client puts blocks on their way in.

One sealed memfd a session, writable by the client, cut into page-aligned runs because the blocks
of different namespaces differ in size. Nothing in it is believed: the manager copies a run into an
arena and verifies the copy.
"""

from __future__ import annotations

import bisect

from ucm.storage.arena import Arena, ArenaKind
from ucm.storage.prefault import STEP_BYTES

from .errors import InvalidArgumentError, TierUnavailableError
from .layout import ALIGNMENT_BYTES, KvDtype, KvLayout, round_up
from .mapping import map_shared

_PAGE = KvLayout(num_layers=1, num_kv_heads=1, head_dim=512, block_tokens=1, dtype=KvDtype.FLOAT32)
"""A "block" of exactly one page: 2 x 512 x 4 bytes."""


class RunAllocator:
    """First-fit runs of bytes in `0..capacity_bytes`, neighbours joined when freed.

    O(number of holes) a call; blocks of one size leave few.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._holes: list[tuple[int, int]] = [(0, capacity_bytes)] if capacity_bytes else []
        self._free_bytes = capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes reserved now."""
        return self.capacity_bytes - self._free_bytes

    def reserve(self, num_bytes: int) -> int | None:
        """Offset of a free run of `num_bytes` (above 0); None when no hole is large enough."""
        for number, (start, length) in enumerate(self._holes):
            if length >= num_bytes:
                rest = (start + num_bytes, length - num_bytes)
                self._holes[number : number + 1] = [rest] if rest[1] else []
                self._free_bytes -= num_bytes
                return start
        return None

    def free(self, offset: int, num_bytes: int) -> None:
        """Give back a run that `reserve` answered."""
        number = bisect.bisect(self._holes, (offset, 0))
        start, end = offset, offset + num_bytes
        if number < len(self._holes) and self._holes[number][0] == end:
            end += self._holes.pop(number)[1]
        if number and sum(self._holes[number - 1]) == start:
            number -= 1
            start = self._holes.pop(number)[0]
        self._holes.insert(number, (start, end - start))
        self._free_bytes += num_bytes

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words."""
        problems = []
        if sum(length for _, length in self._holes) != self._free_bytes:
            problems.append("staging: free bytes are miscounted")
        edges = [edge for start, length in self._holes for edge in (start, start + length)]
        if edges != sorted(set(edges)) or any(edge > self.capacity_bytes for edge in edges):
            problems.append("staging: holes overlap, touch or leave the arena")
        return problems


class Staging:
    """The staging arena of one session. Not thread-safe but for `view`."""

    def __init__(self, capacity_bytes: int) -> None:
        """Create the memory, rounded down to whole pages.

        Raises:
            ConfigError: less than one page.
            CapacityError: the kernel refuses so large a mapping.
        """
        self.arena = Arena(_PAGE, capacity_bytes // ALIGNMENT_BYTES, ArenaKind.STAGING)
        self.runs = RunAllocator(self.arena.size_bytes)
        self._view = map_shared(self.arena.fd, self.arena.size_bytes, writable=True)

    def prefault(self, num_bytes: int) -> None:
        """Make the first `num_bytes` real memory, in the background; the lowest are reused most."""
        if num_bytes >= STEP_BYTES:
            self.arena.prefault(num_bytes // ALIGNMENT_BYTES)

    def reserve(self, num_bytes: int) -> int | None:
        """See `RunAllocator.reserve`; whole pages."""
        return self.runs.reserve(round_up(num_bytes, ALIGNMENT_BYTES))

    def free(self, offset: int, num_bytes: int) -> None:
        """See `RunAllocator.free`; whole pages."""
        self.runs.free(offset, round_up(num_bytes, ALIGNMENT_BYTES))

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """The bytes of a run, writable; no copy.

        Raises:
            InvalidArgumentError: outside the arena.
            TierUnavailableError: it is closed.
        """
        if not 0 <= offset <= offset + num_bytes <= self.arena.size_bytes:
            raise InvalidArgumentError(f"{num_bytes} bytes at {offset} are outside the staging")
        try:
            return self._view[offset : offset + num_bytes]
        except ValueError as error:  # released
            raise TierUnavailableError("the session has ended") from error

    def close(self) -> None:
        """Give the memory back. Idempotent. Views that are still held keep it alive."""
        self._view.release()  # the end of the last view ends the mapping
        self.arena.close()
