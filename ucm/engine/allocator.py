"""Who owns which block of the KV pool; pure bookkeeping, no tensors.

Every block is in exactly one of three roles, and `check_integrity` proves it:

    free      refs == 0, content meaningless                      `_is_free`
    idle      refs == 0, content final and findable by its chain  `_idle`, least recently used first
    in use    refs >= 1, findable or not

A block is found by its `ChainLink`: hash *and* parent hash *and* token ids must be equal, so a
collision of hashes never shares wrong KV. A chain is released tail first, so that a block is never
reused before its children. Allocation prefers ascending runs, because attention over a run needs
no gather. Nothing that the engine outputs depends on which ids are handed out.

Envelope: `find` is one dictionary look-up and one tuple comparison a block; `allocate` is O(pool)
in NumPy (about 20 us for 10,000 blocks) and runs once a request and once every `block_tokens`
decoded tokens; `acquire` and `release` are O(blocks).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ucm.errors import CapacityError, InvalidArgumentError
from ucm.types import BlockKey


class ChainLink(NamedTuple):
    """One full block of a token chain: what makes two blocks the same."""

    key: BlockKey
    parent: BlockKey
    token_ids: tuple[int, ...]


class BlockAllocator:
    """Reference counts, free blocks and the prefix cache. Owned by one thread."""

    def __init__(self, num_blocks: int) -> None:
        """Start with every block free.

        Raises:
            InvalidArgumentError: `num_blocks` is below 1.
        """
        if num_blocks < 1:
            raise InvalidArgumentError(f"a KV pool needs at least 1 block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._lives = [0] * num_blocks
        self._is_free = np.ones(num_blocks, dtype=np.bool_)
        self._num_free = num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._links: dict[int, ChainLink] = {}
        self._blocks: dict[BlockKey, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and idle ones."""
        return self._num_free + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that a chain can be found in, in use or idle."""
        return len(self._links)

    def refs(self, block_id: int) -> int:
        """Number of owners of a block."""
        return self._refs[block_id]

    def is_findable(self, block_id: int) -> bool:
        """Whether a chain leads to the block."""
        return block_id in self._links

    def life(self, block_id: int) -> int:
        """How often a block was handed out: what was learnt of it holds for one life only."""
        return self._lives[block_id]

    def find(self, chain: Sequence[ChainLink]) -> list[int]:
        """Blocks of the longest cached prefix of `chain`. Changes nothing, not even recency."""
        found: list[int] = []
        for link in chain:
            block_id = self._blocks.get(link.key)
            if block_id is None or self._links[block_id] != link:
                break
            found.append(block_id)
        return found

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Add an owner to blocks that are in use or idle."""
        for block_id in block_ids:
            assert not self._is_free[block_id], f"block {block_id} is free: nobody can share it"
            if self._refs[block_id] == 0:
                del self._idle[block_id]
            self._refs[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Take one owner from each block, the last one first: children go idle before parents."""
        for block_id in reversed(block_ids):
            assert self._refs[block_id] > 0, f"block {block_id} has no owner to release"
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                self._retire(block_id)

    def allocate(self, count: int, *, after: int | None = None, growth: int = 0) -> list[int]:
        """Hand out `count` blocks with one owner each, reusing idle ones when none is free.

        Args:
            count: how many.
            after: the block that the first new one should follow, if it can.
            growth: blocks that the owner may ask for later; room for it is left where there is
                plenty.

        Raises:
            CapacityError: fewer than `count` blocks are available; nothing was changed.
        """
        if count > self.num_available:
            raise CapacityError(
                f"KV pool: {count} blocks wanted, {self.num_available} of {self.num_blocks} "
                "available; finish requests or give the pool more blocks"
            )
        while self._num_free < count:
            self._forget(next(iter(self._idle)))
        block_ids = pick_runs(self._is_free, count, after=after, growth=growth)
        for block_id in block_ids:
            self._refs[block_id] = 1
            self._lives[block_id] += 1
            self._is_free[block_id] = False
        self._num_free -= count
        return block_ids

    def register(self, block_id: int, link: ChainLink) -> bool:
        """Make a block that is in use, and whose content is final, findable.

        Returns:
            False when that chain is findable already, or the block is under another one.
        """
        assert self._refs[block_id] > 0, f"block {block_id} is registered without an owner"
        if link.key in self._blocks or block_id in self._links:
            return False
        self._blocks[link.key] = block_id
        self._links[block_id] = link
        return True

    def forget_all(self) -> int:
        """Empty the prefix cache; blocks in use stay with their owners.

        Returns:
            Number of blocks that can no longer be found.
        """
        block_ids = list(self._links)
        for block_id in block_ids:
            self._forget(block_id)
        return len(block_ids)

    def _retire(self, block_id: int) -> None:
        if block_id in self._links:
            self._idle[block_id] = None
        else:
            self._make_free(block_id)

    def _forget(self, block_id: int) -> None:
        link = self._links.pop(block_id)
        del self._blocks[link.key]
        if block_id in self._idle:
            del self._idle[block_id]
            self._make_free(block_id)

    def _make_free(self, block_id: int) -> None:
        self._is_free[block_id] = True
        self._num_free += 1

    def check_integrity(self, owners: Iterable[Sequence[int]] | None = None) -> list[str]:
        """Every violated invariant, in words; empty when sound. O(pool), for tests and when idle.

        Args:
            owners: every owner's blocks; when given, reference counts must add up to them.
        """
        faults: list[str] = []
        for block_id, refs in enumerate(self._refs):
            roles = (bool(self._is_free[block_id]), block_id in self._idle, refs > 0)
            if sum(roles) != 1:
                faults.append(f"block {block_id} has roles (free, idle, in use) {roles}")
            if block_id in self._idle and block_id not in self._links:
                faults.append(f"block {block_id} is idle and not findable")
            if self._is_free[block_id] and block_id in self._links:
                faults.append(f"block {block_id} is free and findable")
        if int(self._is_free.sum()) != self._num_free:
            faults.append(f"{int(self._is_free.sum())} blocks are free, counted {self._num_free}")
        if {link.key: block_id for block_id, link in self._links.items()} != self._blocks:
            faults.append("the two directions of the prefix cache differ")
        if owners is not None:
            faults.extend(self._check_owners(owners))
        return faults

    def _check_owners(self, owners: Iterable[Sequence[int]]) -> list[str]:
        counts = Counter(block_id for block_ids in owners for block_id in block_ids)
        return [
            f"block {block_id} has {refs} references and {counts[block_id]} owners"
            for block_id, refs in enumerate(self._refs)
            if refs != counts[block_id]
        ]


def pick_runs(
    is_free: npt.NDArray[np.bool_], count: int, *, after: int | None, growth: int
) -> list[int]:
    """Choose `count` free blocks in as few ascending runs as is easy to find.

    First what follows `after`, then the smallest run that holds the rest with room to grow, then
    the smallest that holds it at all, then the longest ones. Inside a run up to `growth` blocks are
    skipped, for whoever lies in front of it.

    Args:
        is_free: [num_blocks]; at least `count` are True.
        count: how many to choose.
        after: block to continue, or None.
        growth: blocks that the owner may ask for later.
    """
    chosen: list[int] = []
    if after is not None:
        stop = after + 1
        while len(chosen) < count and stop < len(is_free) and is_free[stop]:
            chosen.append(stop)
            stop += 1
    if len(chosen) == count:
        return chosen
    taken = is_free.copy()
    taken[chosen] = False
    starts, lengths = _runs(taken)
    missing = count - len(chosen)
    for wanted in (missing + 2 * growth, missing):
        fitting = np.flatnonzero(lengths >= wanted)
        if len(fitting):
            best = fitting[np.argmin(lengths[fitting])]
            start, spare = int(starts[best]), int(lengths[best]) - missing
            start += min(growth, spare // 2) if start > 0 else 0
            return chosen + list(range(start, start + missing))
    return chosen + _longest_first(starts, lengths, missing)


def _runs(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Starts and lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).astype(np.int64)
    return edges[::2], edges[1::2] - edges[::2]


def _longest_first(
    starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], count: int
) -> list[int]:
    chosen: list[int] = []
    for run in np.argsort(-lengths, kind="stable"):
        length = min(int(lengths[run]), count - len(chosen))
        chosen.extend(range(int(starts[run]), int(starts[run]) + length))
        if len(chosen) == count:
            break
    return chosen
