"""Which blocks are worth writing to NVMe: all, or only those that were wanted twice.

In public traces 58 to 76 % of the blocks are never used again, so writing each of them wears the
disk for nothing. *Second touch* writes a block only when it is wanted again within a window: stored
once more after memory had forgotten it, or loaded from memory. The price is that a block's first
reuse after it has left memory is a miss.

A chain's blocks are wanted from the front, so a parent is touched at least as often as its child;
that a child never goes to NVMe before its parent is still the caller's to guarantee
(`placement.plan_flush`), because the memory of touches is bounded.

Pure: time is an argument; nothing locks, logs or sleeps. One thread at a time.
"""

from __future__ import annotations

from typing import Final, Protocol

from .config import NvmeConfig
from .errors import ConfigError
from .ghost import GhostSet
from .types import BlockKey

DEFAULT_WINDOW_S = 3600.0
"""Touches further apart do not count: 99 % of the reuse in public traces comes within 27 min."""
_US_PER_S = 1_000_000


MAX_REMEMBERED: Final = 1 << 20
"""Blocks touched once that are remembered at most: 8 MiB."""
_MIN_BLOCK_BYTES: Final = 64 << 10


class Admission(Protocol):
    """Says whether a block of the memory tier should be written to NVMe."""

    def admits(self, key: BlockKey, now_us: int) -> bool:
        """Note a touch (a store or a load) of a block that NVMe does not have.

        Args:
            key: the block.
            now_us: the clock's time; never goes back.

        Returns:
            Whether it should be written now. A block that is not gets another chance at its next
            touch.
        """


class AlwaysAdmit:
    """Every block is written."""

    def admits(self, key: BlockKey, now_us: int) -> bool:  # noqa: ARG002  the protocol's signature
        """See `Admission.admits`."""
        return True


class SecondTouch:
    """A block is written at its second touch within a window."""

    def __init__(self, capacity: int, window_s: float = DEFAULT_WINDOW_S) -> None:
        """Remember nothing yet.

        Args:
            capacity: keys touched once to remember, 8 bytes each; with the blocks that the NVMe
                tier can hold, a block is remembered about as long as it would have stayed there.
            window_s: seconds after which a touch is forgotten.
        """
        self._once = GhostSet(capacity)
        self._window_s = window_s

    def admits(self, key: BlockKey, now_us: int) -> bool:
        """See `Admission.admits`; a block that was admitted starts again from nothing."""
        now_s = now_us // _US_PER_S & 0xFFFFFFFF
        before_s = self._once.take(key)
        if before_s is not None and now_s - before_s <= self._window_s:
            return True
        self._once.add(key, now_s)
        return False


def admission_of(config: NvmeConfig) -> Admission:
    """The admission that the configuration names.

    Raises:
        ConfigError: it names none that there is.
    """
    if config.admission == "always":
        return AlwaysAdmit()
    if config.admission == "second-touch":
        return SecondTouch(min(MAX_REMEMBERED, config.capacity_bytes // _MIN_BLOCK_BYTES))
    raise ConfigError(
        f"nvme.admission is {config.admission!r}, expected one of always, second-touch"
    )
