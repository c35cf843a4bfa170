"""Host memory that is handed to other processes: one memfd, cut into slots of one block.

    kind       | the daemon        | a client that gets the descriptor
    READ_ONLY  | mapped read-write | may map it read-only; cannot write, map it writable, resize it
    STAGING    | mapped read-write | may map it read-write; cannot resize it

Seals make this the kernel's promise (`memfd_create(2)`, `F_SEAL_FUTURE_WRITE`): the daemon's own
mapping is made before the seal and stays writable. A size that cannot shrink means that nobody can
make the daemon die by SIGBUS. The file is sparse, so an arena costs only what was ever written
or `prefault`ed; a sealed one cannot give pages back. It has no name, so nothing is left behind by
a crash.

Slots are page-aligned and 4 KiB multiples: O_DIRECT reads go straight into `view(slot)`. What is
prefaulted gets 2 MiB pages where the kernel makes them (`prefault.py`), here and at every client.
"""

from __future__ import annotations

import enum
import fcntl
import os
from typing import TYPE_CHECKING

import numpy as np

from ucm.errors import CapacityError, ConfigError, InvalidArgumentError, TierUnavailableError
from ucm.mapping import map_shared

from .prefault import Prefaulter
from .slots import SlotTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm.layout import KvLayout

    from .tier import SlotId

F_SEAL_FUTURE_WRITE = 0x0010
"""From linux/fcntl.h (Linux 5.1); Python names it from 3.13 on."""

MAX_WAIT_S = 1.0
"""How long somebody who fills slots waits for prefaulting: nothing depends on it."""

_FIXED_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ArenaKind(enum.Enum):
    """What a client may do with the descriptor."""

    READ_ONLY = "read_only"
    STAGING = "staging"

    @property
    def seals(self) -> int:
        """The seals that enforce it."""
        read_only = self is ArenaKind.READ_ONLY
        return _FIXED_SIZE_SEALS | (F_SEAL_FUTURE_WRITE if read_only else 0)


class Arena:
    """`num_slots` slots of one block each in one sealed memfd.

    `slots` says which are in use; `checksums` [num_slots, num_layers] <u8 holds each slot's
    slab checksums, in this process only. Allocation and views are thread-safe.
    """

    def __init__(self, layout: KvLayout, num_slots: int, kind: ArenaKind) -> None:
        """Create and seal the memory.

        Raises:
            ConfigError: no slot would fit.
            CapacityError: the kernel refuses so large a mapping.
        """
        if num_slots < 1:
            raise ConfigError(
                f"an arena needs room for one block of {layout.block_bytes} bytes: "
                "raise the memory tier's (or the staging) size"
            )
        self.kind = kind
        self.layout = layout
        self.num_slots = num_slots
        self.slot_bytes = layout.block_bytes
        self.slots = SlotTable(num_slots)
        self.checksums: NDArray[np.uint64] = np.zeros((num_slots, layout.num_layers), "<u8")
        self._fd, self._view = _create_memfd(self.size_bytes, kind)
        self._prefaulter = Prefaulter(self._view)

    def __repr__(self) -> str:
        return f"Arena({self.kind.value}, {self.num_slots} x {self.slot_bytes} B, {self.slots!r})"

    @property
    def fd(self) -> int:
        """The memfd; valid until `close`. Duplicate it (SCM_RIGHTS does) to keep it longer."""
        return self._fd

    @property
    def size_bytes(self) -> int:
        """Length of the memfd."""
        return self.num_slots * self.slot_bytes

    def offset(self, slot: SlotId) -> int:
        """Where the slot begins in the memfd, in bytes.

        Raises:
            InvalidArgumentError: there is no such slot.
        """
        if not 0 <= slot < self.num_slots:
            raise InvalidArgumentError(f"slot {slot} is outside 0..{self.num_slots - 1}")
        return slot * self.slot_bytes

    def view(self, slot: SlotId) -> memoryview:
        """The slot's bytes, writable, `slot_bytes` long; no copy.

        Raises:
            InvalidArgumentError: there is no such slot.
            TierUnavailableError: it is closed.
        """
        start = self.offset(slot)
        try:
            return self._view[start : start + self.slot_bytes]
        except ValueError as error:  # released
            raise TierUnavailableError("the arena is closed") from error

    def memory(self) -> memoryview:
        """All of it, read-only; no copy.

        Raises:
            TierUnavailableError: it is closed.
        """
        try:
            return self._view.toreadonly()
        except ValueError as error:  # released
            raise TierUnavailableError("the arena is closed") from error

    def prefault(self, num_slots: int) -> None:
        """Make the first `num_slots` slots real memory, in the background; see `prefault.py`.

        From now on they cost what they hold, used or not. Does not block.
        """
        self._prefaulter.request(num_slots * self.slot_bytes)

    def wait_real(self, slots: Sequence[SlotId]) -> None:
        """Wait until slots that are about to be filled are real memory, if they are to be made so.

        Blocks while the prefaulting passes them: 0.4 s/GB, at most `MAX_WAIT_S`.
        """
        if slots:
            self._prefaulter.wait_for((max(slots) + 1) * self.slot_bytes, MAX_WAIT_S)

    @property
    def prefaulted_bytes(self) -> int:
        """How much of it, from its start, was made real ahead of its use."""
        return self._prefaulter.done_bytes

    @property
    def huge_bytes(self) -> int:
        """How much of that was given 2 MiB pages."""
        return self._prefaulter.huge_bytes

    def wait_prefaulted(self, timeout_s: float) -> None:
        """Wait until what was asked of `prefault` is done or given up."""
        self._prefaulter.wait(timeout_s)

    def close(self) -> None:
        """Give the memory back. Idempotent. Views that are still held keep their pages alive."""
        if self._fd < 0:
            return
        self._prefaulter.close()
        os.close(self._fd)
        self._fd = -1
        self._view.release()  # the end of the last view ends the mapping


def _create_memfd(size_bytes: int, kind: ArenaKind) -> tuple[int, memoryview]:
    fd = os.memfd_create(f"ucm-{kind.value}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        mapping = map_shared(fd, size_bytes, writable=True)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, kind.seals)
    except OSError as error:
        os.close(fd)
        raise CapacityError(f"cannot map an arena of {size_bytes} bytes: {error}") from error
    return fd, mapping
