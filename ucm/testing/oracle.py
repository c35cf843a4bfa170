"""A dictionary that knows what a store may answer: the model of the whole-store state machine.

The store may forget (it is a cache) unless the test rules that out; it may never return bytes other
than those put under the key, nor a block whose store was not accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ucm.types import BlockKey, StoreStatus

from .blocks import content


@dataclass(slots=True)
class CacheOracle:
    """What was accepted, and what has been damaged since."""

    accepted: set[BlockKey] = field(default_factory=set)
    damaged: bool = False
    """Something on disk was damaged: a miss is always excused from then on."""

    def record_store(self, keys: Sequence[BlockKey], statuses: Sequence[StoreStatus]) -> None:
        """Note the outcome of a store."""
        assert len(keys) == len(statuses)
        for key, status in zip(keys, statuses, strict=True):
            if status is StoreStatus.ACCEPTED:
                self.accepted.add(key)
            elif status is StoreStatus.PRESENT:
                assert key in self.accepted, f"{key.hex()[:8]} is present but was never accepted"

    def check_get(self, keys: Sequence[BlockKey], found: Sequence[bytes]) -> None:
        """A get returned `found`: the exact bytes of a prefix of `keys`, all of it accepted."""
        assert len(found) <= len(keys)
        for key, data in zip(keys, found, strict=False):
            assert key in self.accepted, f"{key.hex()[:8]} was returned but never accepted"
            assert data == content(key), f"wrong bytes for {key.hex()[:8]}"

    def check_complete(self, keys: Sequence[BlockKey], num_found: int) -> None:
        """In a store that had no reason to forget, the whole accepted prefix is there."""
        if self.damaged:
            return
        expected = 0
        while expected < len(keys) and keys[expected] in self.accepted:
            expected += 1
        assert num_found == expected, f"{num_found} blocks found, {expected} were accepted"
