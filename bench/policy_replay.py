"""A trace against one tier of limited size, block by block: what was hit, and what that saved.

Every decision is the daemon's own code: `BlockIndex` says what is usable, `placement.evict` and the
policy who goes, `ucm.admission` what is stored at all. Only bytes are missing. For each request:

    the longest cached prefix is a hit: its blocks are touched and its end is pinned
    the rest is computed and stored, if there is room when leaves have gone for it

A GPU's own cache, batching and the time that a computation takes are not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucm.admission import Admission
from ucm.block_columns import NO_ROW
from ucm.block_index import BlockIndex
from ucm.eviction import EvictionPolicy, LruPolicy
from ucm.placement import evict
from ucm.storage.tier import SlotId
from ucm.types import BlockKey, TierKind

from .traces import TraceRequest

_KEY_BYTES = 32
_NS_PER_US = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeModel:
    """What a block costs to compute and to keep, for one model on one machine."""

    name: str
    weights: float
    """Parameters that every token passes."""
    attention_flops: float
    """4*L*H*D: of one token, for each token before it."""
    kv_bytes_per_token: int
    flops_per_s: float
    """Of the engine in prefill."""

    def block_s(self, depth: int, block_tokens: int) -> float:
        """Seconds to compute the block that `depth` others precede.

        T(n tokens at p) = n * (2P + 4*L*H*D*p) / F, p the mean position in the block.
        """
        position = (depth + 0.5) * block_tokens
        flops = block_tokens * (2 * self.weights + self.attention_flops * position)
        return flops / self.flops_per_s

    @property
    def attention_tokens(self) -> float:
        """Position at which attention costs as much as the weights."""
        return 2 * self.weights / self.attention_flops


MODELS = {
    model.name: model
    for model in (
        ComputeModel(
            name="smollm2-135m",
            weights=106e6,
            attention_flops=4 * 30 * 9 * 64,
            kv_bytes_per_token=23_040,
            flops_per_s=50e9,
        ),
        ComputeModel(
            name="llama-3-8b",
            weights=7.0e9,
            attention_flops=4 * 32 * 32 * 128,
            kv_bytes_per_token=131_072,
            flops_per_s=300e12,
        ),
    )
}
"""SmolLM2-135M in fp16 on two CPU cores; Llama-3-8B in bf16 on one H100 at 300 TFLOP/s."""


@dataclass(frozen=True, slots=True)
class Step:
    """One request, ready to replay."""

    now_us: int
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of a trace."""

    num_blocks: int
    """Blocks that requests referred to."""
    num_hits: int
    hit_depths: tuple[int, ...]
    """How many hits there were on blocks that 0, 1, 2... others precede."""
    num_written: int
    """Blocks stored."""
    num_evicted: int

    @property
    def hit_ratio(self) -> float:
        """Hits over references."""
        return self.num_hits / max(1, self.num_blocks)

    def saved_s(self, model: ComputeModel, block_tokens: int) -> float:
        """Seconds of computing that the hits saved."""
        return sum(
            hits * model.block_s(depth, block_tokens) for depth, hits in enumerate(self.hit_depths)
        )


def steps_of(requests: Sequence[TraceRequest]) -> list[Step]:
    """Give every block id a key."""
    keys: dict[int, BlockKey] = {}
    for request in requests:
        for block in request.block_ids:
            if block not in keys:  # the fingerprint of a ghost is the key's first eight bytes
                mixed = (block + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
                keys[block] = BlockKey(
                    mixed.to_bytes(8, "little") + (block + 1).to_bytes(_KEY_BYTES - 8, "little")
                )
    return [
        Step(request.t_ns // _NS_PER_US, tuple(keys[block] for block in request.block_ids))
        for request in requests
    ]


class Tier:
    """One tier of `capacity` blocks over a real index."""

    def __init__(self, policy: EvictionPolicy, admission: Admission, capacity: int) -> None:
        self.index = BlockIndex((LruPolicy(), policy))
        self.num_evicted = 0
        self.num_written = 0
        self._admission = admission
        self._capacity = capacity

    def serve(self, step: Step) -> int:
        """Serve one request.

        Returns:
            Blocks of its prefix that were hits.
        """
        index, keys = self.index, step.keys
        rows = index.usable_prefix(keys)
        index.pin_all(rows, step.now_us)
        self._store(step, len(rows), rows[-1] if rows else NO_ROW)
        index.unpin_all(rows)
        return len(rows)

    def _store(self, step: Step, start: int, parent: int) -> None:
        wanted = [self._admission.admits(key, step.now_us) for key in step.keys[start:]]
        count = wanted.index(False) if False in wanted else len(wanted)
        surplus = self.index.num_copies(TierKind.NVME) + count - self._capacity
        if surplus > 0:
            self.num_evicted += len(evict(self.index, TierKind.NVME, surplus))
        room = self._capacity - self.index.num_copies(TierKind.NVME)
        for key in step.keys[start : start + min(count, room)]:
            parent = self.index.add_row(key, parent)
            self.index.touch(parent, step.now_us)
            self.index.place(parent, TierKind.NVME, SlotId(self.num_written))
            self.num_written += 1


def count_reused(steps: Sequence[Step]) -> int:
    """Different blocks that are referred to more than once: all that a cache can ever hit."""
    seen: set[BlockKey] = set()
    reused: set[BlockKey] = set()
    for step in steps:
        reused.update(key for key in step.keys if key in seen)
        seen.update(step.keys)
    return len(reused)


def replay(
    steps: Sequence[Step], policy: EvictionPolicy, admission: Admission, capacity: int
) -> Replay:
    """Serve a whole trace from an empty tier of `capacity` blocks."""
    tier = Tier(policy, admission, capacity)
    longest = max((len(step.keys) for step in steps), default=0)
    ends = [0] * (longest + 1)
    for step in steps:
        ends[tier.serve(step)] += 1
    depths: list[int] = []
    reached = sum(ends)
    for depth in range(longest):
        reached -= ends[depth]
        depths.append(reached)
    return Replay(
        num_blocks=sum(len(step.keys) for step in steps),
        num_hits=sum(depths),
        hit_depths=tuple(depths),
        num_written=tier.num_written,
        num_evicted=tier.num_evicted,
    )


def replay_ideal(steps: Sequence[Step]) -> Replay:
    """The same with room for everything: no policy can hit more."""
    seen: set[BlockKey] = set()
    hits: dict[int, int] = {}
    for step in steps:
        for depth, key in enumerate(step.keys):
            if key in seen:
                hits[depth] = hits.get(depth, 0) + 1
        seen.update(step.keys)
    depths = tuple(hits.get(depth, 0) for depth in range(max(hits, default=-1) + 1))
    num_blocks = sum(len(step.keys) for step in steps)
    return Replay(num_blocks, sum(depths), depths, len(seen), 0)
