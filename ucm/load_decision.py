"""`decide`: whether to load a request's cached blocks, compute them, or do some of both.

Each way is played through with the rates that `CostModel` has learnt, and the one that ends first
is taken:

    load all    read every hit, computing the rest behind it layer by layer
    load part   read the first k blocks only: the others are computed while those arrive
    hybrid      compute from the front, read from the back, until both meet (Cake,
                arXiv:2410.03065); where that gains nothing over it, as `load all`
    compute     read nothing

For uniform costs the last but one takes T_c * T_l / (T_c + T_l) of what computing (T_c) and loading
(T_l) take alone. A simpler way is preferred while it costs at most `SLACK` more, for the estimates
are not that good.

Invariants: pure; the same model and shape give the same decision; the prediction of what is chosen
is at most (1 + SLACK) times that of every alternative.

Envelope: 0.4 ms at 3 k tokens (96 blocks) and 0.5 ms at 6 k on a core of a busy machine, once a
request; a claim 0.1 ms, once a pass of a hybrid.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate

from .cost_model import CostEstimates, CostModel
from .load_pipeline import BackLoad, claim, layerwise, meet, read_ahead_layers
from .plurals import counted
from .types import LoadMode, LoadOrder, TierKind

SLACK = 0.02
_PART_STEPS = 16


class LoadKind(enum.StrEnum):
    """What to do with the blocks that the cache has; the simplest first."""

    LOAD_ALL = "load_all"
    COMPUTE = "compute"
    LOAD_PART = "load_part"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadShape:
    """One request, as far as its costs are concerned."""

    num_tokens: int
    """Of the prompt."""
    num_local_tokens: int
    """Leading tokens whose KV the engine's pool holds; a multiple of `block_tokens`."""
    tiers: tuple[TierKind, ...]
    """Where each block that the cache has and the pool has not is, in the prompt's order."""
    block_tokens: int
    block_bytes: int
    """Of one block, over all layers."""
    num_layers: int
    can_direct: bool
    """Whether blocks on NVMe can be read without the daemon."""
    can_hybrid: bool = True
    """Whether the engine can compute towards a load."""
    is_whole: bool = False
    """Whether it is all hits or none, layer by layer: of a chunk nothing is computed beside it."""
    is_alone: bool = False
    """Whether the engine has nothing else to do: the pass behind a load is a whole step then."""
    queue_s: float = 0.0
    """How long until the request's first pass can begin."""
    max_read_ahead_layers: int = 8
    """What a reader may have in flight."""

    @property
    def first_block(self) -> int:
        """Index in the prompt's chain of the first block that could be loaded."""
        return self.num_local_tokens // self.block_tokens

    @property
    def first_suffix_token(self) -> int:
        """First token that is neither in the pool nor in the cache."""
        return self.num_local_tokens + len(self.tiers) * self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do with a request's hits, and what was expected of each way."""

    kind: LoadKind
    first_block: int
    """Index in the chain of the first block to load."""
    num_blocks: int
    """How many to load; 0 when all is computed. From the back, the last of them comes first."""
    order: LoadOrder
    mode: LoadMode
    read_ahead_layers: int
    predicted_ttft_s: float
    """From the decision to the first token, corrected by how such decisions turned out."""
    estimated_ttft_s: float
    """The same uncorrected; what `CostModel.observe_ttft` is told."""
    meeting_block: int
    """Chain index of the first block that is loaded and not computed."""
    alternatives: dict[str, float] = field(default_factory=dict)
    """Predicted seconds of every way, by `LoadKind` value, this one included."""
    shape: LoadShape
    estimates: CostEstimates

    @property
    def way(self) -> LoadKind:
        """What is done, and learnt from: LOAD_ALL also for a hybrid that loads every hit."""
        is_layered = self.kind is LoadKind.HYBRID and self.order is LoadOrder.LAYERS
        return LoadKind.LOAD_ALL if is_layered else self.kind

    def explain(self) -> str:
        """The decision and what it rests on, for people."""
        shape = self.shape
        last = shape.first_block + len(shape.tiers)
        tiers = ", ".join(
            f"{shape.tiers.count(tier)} in {tier.value}" for tier in TierKind if tier in shape.tiers
        )
        what = {
            LoadKind.LOAD_ALL: "load every hit, compute the rest behind it layer by layer",
            LoadKind.LOAD_PART: f"load the first {counted(self.num_blocks, 'hit')}, compute the "
            "rest",
            LoadKind.HYBRID: f"compute from block {shape.first_block} on, load from block {last} "
            f"back; they should meet at block {self.meeting_block}",
            LoadKind.COMPUTE: "compute everything",
        }[self.way]
        lines = [
            f"{self.kind.value}: {what}",
            (
                f"{counted(shape.num_tokens, 'token')}: {shape.num_local_tokens:,} in the engine's "
                f"pool, {counted(len(shape.tiers), 'block')} of {shape.block_tokens} in the cache "
                f"({tiers or 'none'}), {shape.num_tokens - shape.first_suffix_token:,} in neither"
            ),
        ]
        for name, seconds in sorted(self.alternatives.items(), key=lambda item: item[1]):
            mark = "*" if name == self.kind.value else " "
            lines.append(f"{mark} {name:<10} {1e3 * seconds:>10,.1f} ms to the first token")
        if self.num_blocks:
            order = {
                LoadOrder.LAYERS: "layer by layer",
                LoadOrder.BLOCKS_FROM_BACK: "block by block from the last one back",
            }[self.order]
            ahead = counted(self.read_ahead_layers, "layer")
            lines.append(f"read {self.mode.value}, {order}, {ahead} ahead")
        return "\n".join([*lines, str(self.estimates)])


Decide = Callable[[CostModel, LoadShape], Decision]
"""The seam: `decide`, or what `forced` returns."""


def decide(model: CostModel, shape: LoadShape) -> Decision:
    """The way with the soonest first token; see the module. Does not block."""
    plan = _Plan(model, shape, _best_mode(model, shape))
    ways = plan.all_ways()
    best_s = min(way.predicted_ttft_s for way in ways)
    chosen = next(way for way in ways if way.predicted_ttft_s <= (1 + SLACK) * best_s)
    return _with_alternatives(chosen, ways)


def forced(kind: LoadKind, mode: LoadMode | None = None, *, is_from_back: bool = False) -> Decide:
    """A `decide` that always answers `kind`; for measurements and tests.

    Args:
        kind: what to answer; COMPUTE where there is nothing to load, LOAD_ALL for any kind of load
            of a whole chunk.
        mode: how to read; None takes the better one.
        is_from_back: a hybrid computes towards its load also where reading layer by layer is
            quicker.
    """

    def decide_so(model: CostModel, shape: LoadShape) -> Decision:
        plan = _Plan(model, shape, mode or _best_mode(model, shape))
        ways = plan.all_ways(is_from_back=is_from_back)
        if shape.is_whole and kind is not LoadKind.COMPUTE:
            return _with_alternatives(ways[0], ways)
        found = [way for way in ways if way.kind is kind]
        chosen = found[0] if found else next(way for way in ways if way.kind is LoadKind.COMPUTE)
        return _with_alternatives(chosen, ways)

    return decide_so


def claim_blocks(
    model: CostModel,
    shape: LoadShape,
    first_block: int,
    end_block: int,
    *,
    partial_bytes: int = 0,
) -> int:
    """How many blocks from `first_block` on a hybrid should compute next.

    Args:
        model: the rates.
        shape: the request's.
        first_block: chain index of the first block that is not computed.
        end_block: chain index of the first block that is loaded.
        partial_bytes: what has arrived of the blocks before `end_block`.

    Returns:
        0 to `end_block - first_block`: so many that they and the loading of the others end
        together, or all where nothing came yet and loading the others gains less than the pass
        costs that begins behind them; cut to one pass of the engine; 0: wait for the loader.
    """
    plan = _Plan(model, shape, _best_mode(model, shape))
    offset = shape.first_block
    seconds = plan.block_s[first_block - offset : end_block - offset]
    back = BackLoad.of(seconds)
    spared_s = seconds[-1] * partial_bytes / shape.block_bytes if seconds else 0.0
    if end_block - offset == len(shape.tiers) and plan.is_quicker_alone(
        first_block - offset, back, spared_s
    ):
        return min(len(seconds), plan.most_blocks)
    return claim(
        len(seconds),
        lambda count: plan.comp_blocks_s(first_block - offset, first_block - offset + count),
        lambda count: max(0.0, back.when(count) - spared_s),
        most=plan.most_blocks,
    )


def _best_mode(model: CostModel, shape: LoadShape) -> LoadMode:
    if TierKind.NVME not in shape.tiers or not shape.can_direct:
        return LoadMode.MAPPED

    def seconds(mode: LoadMode) -> float:
        return model.load_s(TierKind.NVME, shape.block_bytes, mode=mode, is_computing=True)

    is_mapped = seconds(LoadMode.MAPPED) < seconds(LoadMode.DIRECT)
    return LoadMode.MAPPED if is_mapped else LoadMode.DIRECT


def _with_alternatives(chosen: Decision, ways: list[Decision]) -> Decision:
    return replace(chosen, alternatives={way.kind.value: way.predicted_ttft_s for way in ways})


class _Plan:
    """One request's costs, in blocks that could be loaded, counted from the first of them."""

    def __init__(self, model: CostModel, shape: LoadShape, mode: LoadMode) -> None:
        self._model, self._shape, self._mode = model, shape, mode
        self._estimates = model.snapshot()
        self._chunk_tokens = model.options.chunk_tokens
        per_tier = {
            tier: model.load_s(tier, shape.block_bytes, mode=mode, is_computing=True)
            for tier in set(shape.tiers)
        }
        self.block_s = [per_tier[tier] for tier in shape.tiers]
        """Seconds to load each block."""
        self.most_blocks = max(1, self._chunk_tokens // shape.block_tokens)
        """Blocks of one pass."""
        total_s = sum(self.block_s)
        lost_s = model.contention_s(shape.block_bytes * len(shape.tiers))
        self._slowdown = 1.0 + (lost_s / total_s if total_s else 0.0)
        self._loaded_s = [0.0, *accumulate(self.block_s)]
        self._suffix_s = self._comp_s(shape.first_suffix_token, shape.num_tokens)

    def all_ways(self, *, is_from_back: bool = False) -> list[Decision]:
        """Every way that is open to the request, the simplest first; see `forced`."""
        num_blocks = len(self._shape.tiers)
        compute = self._way(LoadKind.COMPUTE, 0, self._loading(0))
        if not num_blocks:
            return [compute]
        ways = [self._way(LoadKind.LOAD_ALL, num_blocks, self._loading(num_blocks)), compute]
        if self._shape.is_whole:
            return ways
        if num_blocks > 1:
            part = self._best_part()
            ways.append(self._way(LoadKind.LOAD_PART, part, self._loading(part)))
        if self._shape.can_hybrid:
            hybrid, layered = self._from_both_ends(), ways[0]
            # Not by what was learnt: a way that is taken no more is learnt about no more.
            if layered.estimated_ttft_s < hybrid.estimated_ttft_s and not is_from_back:
                hybrid = replace(layered, kind=LoadKind.HYBRID)
            ways.append(hybrid)
        return ways

    def comp_blocks_s(self, first: int, last: int) -> float:
        """Seconds to compute blocks `first` to `last - 1` while others are being loaded."""
        size, start = self._shape.block_tokens, self._shape.num_local_tokens
        alone_s = self._comp_s(start + first * size, start + last * size)
        return alone_s * self._slowdown

    def is_quicker_alone(self, front: int, back: BackLoad, spared_s: float = 0.0) -> bool:
        """Whether computing all from block `front` on takes no longer than meeting the load.

        Alone, the passes run on into what no cache has; behind blocks that were loaded, another
        one begins.

        Args:
            front: first block that is not computed.
            back: the load of all that follow.
            spared_s: what of it is over.
        """
        num_left = len(back.done_s)

        def comp_s(count: int) -> float:
            return self.comp_blocks_s(front, front + count)

        def load_s(count: int) -> float:
            return max(0.0, back.when(count) - spared_s)

        count = claim(num_left, comp_s, load_s, most=num_left)
        met_s = max(comp_s(count), load_s(num_left - count)) + self._suffix_s
        start = self._shape.num_local_tokens + front * self._shape.block_tokens
        return self._comp_s(start, self._shape.num_tokens) <= met_s

    def _comp_s(self, start: int, stop: int, num_passes: int | None = None) -> float:
        """`CostModel.compute_s` on the snapshot: without the lock, a few hundred times."""
        count = stop - start
        if count <= 0:
            return 0.0
        e = self._estimates
        passes = num_passes or -(-count // self._chunk_tokens)
        attended = count * (start + 0.5 * count)
        return passes * e.pass_s + e.token_s * (count + attended / e.attention_tokens)

    def _loading(self, num_blocks: int) -> float:
        """Seconds to the first token when the first `num_blocks` are loaded layer by layer."""
        shape = self._shape
        end, first_pass_s = self._first_pass(num_blocks)
        if num_blocks:
            beside_s = min(self._loaded_s[num_blocks], first_pass_s)
            first_pass_s += beside_s * (self._slowdown - 1.0)
        overlap = layerwise(
            num_layers=shape.num_layers,
            load_layer_s=self._loaded_s[num_blocks] / shape.num_layers,
            comp_layer_s=first_pass_s / shape.num_layers,
            begin_s=shape.queue_s,
            spread_s=self._estimates.compute_noise * first_pass_s if num_blocks else 0.0,
        )
        return overlap.done_s + self._comp_s(end, shape.num_tokens)

    def _first_pass(self, num_blocks: int) -> tuple[int, float]:
        """The pass behind the load of the first `num_blocks`: its end, its seconds alone."""
        shape = self._shape
        start = shape.num_local_tokens + num_blocks * shape.block_tokens
        is_joined = shape.is_alone and num_blocks
        most = self._model.options.joined_tokens if is_joined else self._chunk_tokens
        end = min(start + most, shape.num_tokens)
        return end, self._comp_s(start, end, 1)

    def _best_part(self) -> int:
        """How many leading blocks to load: the best of a grid, then of its neighbours."""
        num_blocks = len(self._shape.tiers)
        step = max(1, num_blocks // _PART_STEPS)
        best = min(range(1, num_blocks, step), key=self._loading)
        near = range(max(1, best - step + 1), min(num_blocks, best + step), max(1, step // 4))
        found: int = min([best, *near], key=self._loading)
        return found

    def _from_both_ends(self) -> Decision:
        shape, back = self._shape, BackLoad.of(self.block_s)
        num_blocks = len(shape.tiers)
        meeting = meet(back, self.comp_blocks_s, begin_s=shape.queue_s, most=self.most_blocks)
        seconds, num_computed = meeting.done_s + self._suffix_s, meeting.num_computed
        is_alone = not shape.queue_s and self.is_quicker_alone(0, back)
        if is_alone or num_computed == num_blocks:  # no pass begins behind loaded blocks
            seconds, num_computed = self._loading(0), num_blocks
        return replace(
            self._way(LoadKind.HYBRID, num_blocks, seconds),
            order=LoadOrder.BLOCKS_FROM_BACK,
            meeting_block=shape.first_block + num_computed,
        )

    def _way(self, kind: LoadKind, num_blocks: int, seconds: float) -> Decision:
        shape = self._shape
        return Decision(
            kind=kind,
            first_block=shape.first_block,
            num_blocks=num_blocks,
            order=LoadOrder.LAYERS,
            mode=self._mode,
            read_ahead_layers=self._depth(num_blocks),
            predicted_ttft_s=seconds * self._model.bias(kind.value),
            estimated_ttft_s=seconds,
            meeting_block=shape.first_block,
            shape=shape,
            estimates=self._estimates,
        )

    def _depth(self, num_blocks: int) -> int:
        shape = self._shape
        _, first_pass_s = self._first_pass(num_blocks)
        # For the bad moments of both: a loader that stands still cannot make up for it later.
        noise = self._estimates.compute_noise
        return read_ahead_layers(
            shape.num_layers,
            (1 + noise) * self._loaded_s[num_blocks] / shape.num_layers,
            (1 - noise) * first_pass_s / shape.num_layers,
            most=shape.max_read_ahead_layers,
        )
