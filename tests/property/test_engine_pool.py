"""The KV pool under random use, against an oracle that knows what every owner's rows must hold.

Each owner writes its own number into the rows it appends; whatever the pool does (share, copy on
write, evict, pin, reset), every owner reads back exactly its rows, and no block has two roles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ucm.engine.allocator import ChainLink
from ucm.engine.pool import KvPool
from ucm.engine.sequence import POOL_NAMESPACE
from ucm.hashing import chain_keys
from ucm.layout import KvDtype, KvLayout
from ucm.types import ROOT_KEY

BLOCK_TOKENS = 2
NUM_BLOCKS = 8
LAYOUT = KvLayout(
    num_layers=2, num_kv_heads=1, head_dim=2, block_tokens=BLOCK_TOKENS, dtype=KvDtype.FLOAT32
)


@dataclass(eq=False)
class Owner:
    """A chain of tokens; row i must hold the value of the tokens up to i, as KV does."""

    tokens: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)

    def value(self, position: int) -> float:
        return float(hash(tuple(self.tokens[: position + 1])) % 100_003)


@dataclass(eq=False)
class Pin:
    """What a store holds, and the bytes it must find there until it releases."""

    release: Callable[[], None]
    block_ids: list[int]
    bytes_then: torch.Tensor


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = KvPool(LAYOUT, NUM_BLOCKS)
        self.owners: list[Owner] = []
        self.pins: list[Pin] = []
        self.num_undrained = 0

    def pick(self, index: int) -> Owner:
        return self.owners[index % len(self.owners)]

    def chain(self, tokens: list[int]) -> list[ChainLink]:
        keys = chain_keys(POOL_NAMESPACE, tokens, BLOCK_TOKENS)
        parents = [ROOT_KEY, *keys]
        return [
            ChainLink(key, parents[i], tuple(tokens[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]))
            for i, key in enumerate(keys)
        ]

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def start(self, tokens: list[int]) -> None:
        """Share what is cached, then append the rest."""
        owner = Owner()
        shared = self.pool.blocks.find(self.chain(tokens))
        self.pool.blocks.acquire(shared)
        owner.block_ids = shared
        owner.tokens = tokens[: len(shared) * BLOCK_TOKENS]
        self.owners.append(owner)
        for token in tokens[len(owner.tokens) :]:
            self.write(owner, token)

    def write(self, owner: Owner, token: int) -> None:
        index, row = divmod(len(owner.tokens), BLOCK_TOKENS)
        available = self.pool.blocks.num_available
        if index == len(owner.block_ids):
            if available == 0:
                return
            after = owner.block_ids[-1] if owner.block_ids else None
            owner.block_ids += self.pool.blocks.allocate(1, after=after, growth=row)
        else:
            if available == 0 and self.pool.blocks.refs(owner.block_ids[index]) > 1:
                return
            owner.block_ids[index] = self.pool.make_writable(owner.block_ids[index], row)
        owner.tokens.append(token)
        self.pool.tensor[:, owner.block_ids[index], :, :, row] = owner.value(len(owner.tokens) - 1)

    @precondition(lambda self: self.owners)
    @rule(index=st.integers(0, 7), token=st.integers(0, 1))
    def append(self, index: int, token: int) -> None:
        self.write(self.pick(index), token)

    @precondition(lambda self: self.owners)
    @rule(index=st.integers(0, 7))
    def fork(self, index: int) -> None:
        parent = self.pick(index)
        self.pool.blocks.acquire(parent.block_ids)
        self.owners.append(Owner(list(parent.tokens), list(parent.block_ids)))

    @precondition(lambda self: self.owners)
    @rule(index=st.integers(0, 7))
    def register(self, index: int) -> None:
        owner = self.pick(index)
        for block_id, item in zip(owner.block_ids, self.chain(owner.tokens), strict=False):
            self.pool.blocks.register(block_id, item)

    @precondition(lambda self: self.owners)
    @rule(index=st.integers(0, 7))
    def finish(self, index: int) -> None:
        owner = self.pick(index)
        self.owners.remove(owner)
        self.pool.blocks.release(owner.block_ids)

    @precondition(lambda self: self.owners)
    @rule(index=st.integers(0, 7))
    def pin(self, index: int) -> None:
        owner = self.pick(index)
        block_ids = owner.block_ids[: len(owner.tokens) // BLOCK_TOKENS]
        copy = self.pool.tensor[:, block_ids].clone()
        self.pins.append(Pin(self.pool.pin(block_ids), block_ids, copy))

    @precondition(lambda self: self.pins)
    @rule(index=st.integers(0, 7), twice=st.booleans())
    def release_pin(self, index: int, twice: bool) -> None:
        pin = self.pins.pop(index % len(self.pins))
        pin.release()
        if twice:
            pin.release()

    @rule()
    def drain(self) -> None:
        self.pool.drain()
        assert self.pool.num_pinned == sum(len(pin.block_ids) for pin in self.pins)

    @rule()
    def reset(self) -> None:
        self.pool.reset()
        assert self.pool.blocks.num_cached == 0

    @invariant()
    def every_owner_reads_its_own_rows(self) -> None:
        for owner in self.owners:
            for position in range(len(owner.tokens)):
                index, row = divmod(position, BLOCK_TOKENS)
                rows = self.pool.tensor[:, owner.block_ids[index], :, :, row]
                assert (rows == owner.value(position)).all(), (owner, position)

    @invariant()
    def pinned_bytes_stay(self) -> None:
        for pin in self.pins:
            assert torch.equal(self.pool.tensor[:, pin.block_ids], pin.bytes_then)

    @invariant()
    def references_are_conserved(self) -> None:
        assert self.pool.check_integrity([owner.block_ids for owner in self.owners]) == []

    def teardown(self) -> None:
        for owner in self.owners:
            self.pool.blocks.release(owner.block_ids)
        for pin in self.pins:
            pin.release()
        self.pool.reset()
        assert self.pool.blocks.num_available == NUM_BLOCKS, "something leaked"


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
