"""A bounded memory of block keys that are no longer, or not yet, cached: *ghosts*.

A table of buckets of eight; an entry is a 32-bit fingerprint of the key and a stamp that the caller
chooses (seconds, or a counter). A full bucket forgets its oldest entry, so the table never grows
and nothing needs sweeping, as S3-FIFO proposes for its ghost queue (Yang et al., "FIFO queues are
all you need for cache eviction", SOSP 2023, section 4). Two keys are taken for one another with a
probability of 8 / 2^32: harmless here, because a ghost only ever changes *when* a block is kept.

Envelope: 8 bytes an entry, allocated once; an operation reads one bucket, about 1 us.
Pure: never locks, logs, sleeps or reads a clock.
"""

from __future__ import annotations

from array import array

from .types import BlockKey

_WAYS = 8
_FINGERPRINT_MASK = (1 << 32) - 1


class GhostSet:
    """Stamps of up to `capacity` keys, the oldest of a bucket forgotten first."""

    def __init__(self, capacity: int) -> None:
        """Allocate the table.

        Args:
            capacity: keys to remember, about; rounded up to a power of two, and to eight.
        """
        self._num_buckets = max(1, 1 << (max(1, -(-capacity // _WAYS)) - 1).bit_length())
        num_entries = self._num_buckets * _WAYS
        self._fingerprints = array("I", bytes(4 * num_entries))
        self._stamps = array("I", bytes(4 * num_entries))

    @property
    def capacity(self) -> int:
        """Most keys that it can remember."""
        return self._num_buckets * _WAYS

    def add(self, key: BlockKey, stamp: int) -> None:
        """Remember `key` with `stamp`, or renew its stamp.

        Args:
            key: a block's key.
            stamp: 0 to 2^32 - 1, growing with age: the entry with the least is forgotten first.
        """
        fingerprint, start = self._place(key)
        found = self._find(fingerprint, start)
        if found < 0:
            found = start + self._oldest(start)
        self._fingerprints[found] = fingerprint
        self._stamps[found] = stamp

    def take(self, key: BlockKey) -> int | None:
        """Forget `key`; its stamp, or None if it was not remembered."""
        fingerprint, start = self._place(key)
        found = self._find(fingerprint, start)
        if found < 0:
            return None
        self._fingerprints[found] = 0
        return self._stamps[found]

    def _oldest(self, start: int) -> int:
        """Place in the bucket of a free entry, or else of the one of least stamp."""
        bucket = self._fingerprints[start : start + _WAYS]
        if 0 in bucket:
            return bucket.index(0)
        stamps = self._stamps[start : start + _WAYS]
        return stamps.index(min(stamps))

    def _place(self, key: BlockKey) -> tuple[int, int]:
        """Fingerprint (never 0, which marks a free entry) and the bucket's first entry.

        A key is a SHA-256, so its bytes are hash enough.
        """
        number = int.from_bytes(key[:8], "little")
        bucket = (number >> 32) & (self._num_buckets - 1)
        return (number & _FINGERPRINT_MASK) or 1, bucket * _WAYS

    def _find(self, fingerprint: int, start: int) -> int:
        bucket = self._fingerprints[start : start + _WAYS]
        return start + bucket.index(fingerprint) if fingerprint in bucket else -1
