"""In which order a layer by layer reader gets the slabs of a plan: steps, made one at a time.

    LAYERS            | layer 0 of block 0, of block 1, ... | layers 1..g of block 0, ... | ...
    BLOCKS_FROM_BACK  | the last block, all layers | the one before it | ...

A step is what one thread does in one go: a request of one block's adjacent layers (they are
adjacent on disk, too), or the copies of several blocks' slabs out of the arena. Blocks that are
being promoted are a queue of their own, because they come when they come.

Envelope: a pass waits for all of layer 0. 31 reads of 52 KiB took 7.5 ms on one thread, 7.0 on two
or four, 12 on eight (the interpreter is one) and 6.5 with four reads a step; a disk of 10,000 reads
a second takes 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from .layout import KvLayout
from .types import LoadOrder, SourceKind

COPIED_BYTES: Final = 512 << 10
"""One step's copies: long enough to be worth the hand-over, short enough to share out."""

LEAST_LAYERS: Final = 2
"""Of one read, but of layer 0. On two cores that also compute, 28 blocks of 30 layers at 100 MB/s:
840 reads of one layer cost the pass 100 ms and more, 448 of two nothing that could be measured."""

FIRST_LAYERS: Final = 4
"""Of these none is read with the next one where that would delay a computation that is slower than
the load: it has nothing in hand yet, and what it waits for here it never makes up."""


@dataclass(frozen=True, slots=True)
class Step:
    """Slabs `first_layer..stop_layer-1` of blocks `first_block..stop_block-1` of a plan."""

    source: SourceKind
    first_block: int
    stop_block: int
    first_layer: int
    stop_layer: int
    num_promoted: int = 0
    """PROMOTING: slabs that the plan's progress must have done before."""


def layer_groups(
    num_layers: int, most: int, compute_per_load: float, least: int = LEAST_LAYERS
) -> list[range]:
    """Layers that are read together, in order; layer 0 alone.

    Reads in units of the time to load a layer, computing a layer in r of them, both at a steady
    pace: the computation begins when layer 0 is there, at 1, and comes to layer a at 1 + a * r.
    Layers a .. a+n-1 have been read together at a + n, so n <= 1 + a * (r - 1) delays nothing.
    Two at a time delay the computation by a layer at most, and take half of the interpreter's time
    that single ones take from it: the least behind `FIRST_LAYERS`, also where loading takes longer,
    as long as a slab comes about as fast as the interpreter asks for it.

    Args:
        num_layers: of the model.
        most: layers of one read, at most.
        compute_per_load: r, how many times as long computing a layer takes as loading it.
        least: layers of one read, at least, but of the first ones.
    """
    groups: list[range] = []
    first = 0
    while first < num_layers:
        spare = first * max(0.0, compute_per_load - 1)
        is_early = compute_per_load > 1 and first < FIRST_LAYERS
        wanted = max(1 if is_early else least, 1 + int(min(spare, most))) if first else 1
        stop = min(first + min(wanted, most), num_layers)
        groups.append(range(first, stop))
        first = stop
    return groups


def own_steps(
    sources: Sequence[SourceKind],
    layout: KvLayout,
    order: LoadOrder,
    request_bytes: int,
    compute_per_load: float = math.inf,
    least_layers: int = LEAST_LAYERS,
) -> Iterator[Step]:
    """The steps of EXTENT and MEMORY blocks, in order.

    Args:
        sources: of the plan's READY blocks.
        layout: of every block.
        order: what comes first.
        request_bytes: of one read, at most, but one slab at least.
        compute_per_load: see `layer_groups`.
        least_layers: of one read, but of the first layers.
    """
    if order is LoadOrder.BLOCKS_FROM_BACK:
        for block in reversed(range(len(sources))):
            if sources[block] is not SourceKind.PROMOTING:
                yield Step(sources[block], block, block + 1, 0, layout.num_layers)
        return
    most = max(1, request_bytes // layout.slab_stride_bytes)
    for layers in layer_groups(layout.num_layers, most, compute_per_load, least_layers):
        copied = max(1, COPIED_BYTES // (len(layers) * layout.slab_stride_bytes))
        for source, start, end in _runs(sources):
            size = {SourceKind.EXTENT: 1, SourceKind.MEMORY: copied}.get(source, 0)
            for block in range(start, end, size) if size else ():
                yield Step(source, block, min(block + size, end), layers.start, layers.stop)


def promoted_steps(
    sources: Sequence[SourceKind], layout: KvLayout, order: LoadOrder
) -> Iterator[Step]:
    """The steps of PROMOTING blocks, in order; arguments as for `own_steps`."""
    kind, count = SourceKind.PROMOTING, sources.count(SourceKind.PROMOTING)
    ranks = list(itertools.accumulate((source is kind for source in sources), initial=0))
    if order is LoadOrder.BLOCKS_FROM_BACK:
        for block in reversed(range(len(sources))):
            if sources[block] is kind:
                needed = (layout.num_layers - 1) * count + ranks[block + 1]
                yield Step(kind, block, block + 1, 0, layout.num_layers, needed)
        return
    size = max(1, COPIED_BYTES // layout.slab_stride_bytes)
    for layer in range(layout.num_layers):
        for source, start, end in _runs(sources):
            for block in range(start, end, size) if source is kind else ():
                stop = min(block + size, end)
                yield Step(kind, block, stop, layer, layer + 1, layer * count + ranks[stop])


def _runs(sources: Sequence[SourceKind]) -> list[tuple[SourceKind, int, int]]:
    """Neighbours of one source: (source, first block, stop block)."""
    runs, start = [], 0
    for source, members in itertools.groupby(sources):
        end = start + sum(1 for _ in members)
        runs.append((source, start, end))
        start = end
    return runs
