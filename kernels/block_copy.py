"""Copying blocks with a checksum for each slab of the copies.

    implementation   how                                                          admits
    pieces           copy what fits a core's cache, checksum it there, go on      everything
    fused            each byte read once, copied and checksummed (`fused_copy`)   slabs of whole
                                                                                  64 bytes, 256 on

Host memory only. Both write all of the targets, padding too, and both answer for the copies: the
checksums are of what was written, whatever happens to a source meanwhile.

Several threads copy one batch together. They do not go through Python for each block: that takes
some 10 us, more where nothing of it is cached, and only one of them can at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ucm.block_rows import BlockRows
from ucm.checksum import check_block_length, copy_block
from ucm.joint_work import JointCalls, JointWork
from ucm.layout import KvDtype, KvLayout

from . import fused_copy
from .dispatch import Implementation, Operation, Problem, Thunk, always, coarse

BENCH_BYTES: Final = 64 << 20

SlabSums: TypeAlias = NDArray[np.uint64]
"""[blocks, layers] checksums."""
Blocks: TypeAlias = Sequence[memoryview]


class BlockCopies(JointWork, Protocol):
    """Copies of blocks, each a piece of work."""

    def sums(self) -> SlabSums:
        """Of the copies; every `work_off` must have returned."""
        ...


CopyBlocksFn: TypeAlias = Callable[[KvLayout, Blocks, Blocks, bool], BlockCopies]
"""(layout, sources, as many targets, around the cache) -> the copies to be made.

The buffers are contiguous, `layout.block_bytes` long and do not overlap. What does not fit raises
at once or when the work is done: LayoutMismatchError for another length, ValueError for a target
that is read-only, or missing. `work_off` blocks, without the interpreter lock for the most part.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopyProblem(Problem):
    """Blocks to copy."""

    layout: KvLayout

    def bucket(self) -> str:
        """See `Problem.bucket`."""
        layout = self.layout
        return f"N{coarse(layout.num_layers, 4)} bytes{coarse(layout.slab_bytes, 4)}"


def block_copy(layout: KvLayout, *, override: str | None = None) -> CopyBlocksFn:
    """What copies blocks of a layout here; the first call in a process may take 0.2 s.

    Raises:
        ConfigError: `override` is not possible.
    """
    return BLOCK_COPY.select(_problem(layout), override).run


def check_counts(blocks: Sequence[object], targets: Sequence[object]) -> None:
    """Refuse targets that are not as many as the blocks.

    Raises:
        ValueError: they are not.
    """
    if len(blocks) != len(targets):
        raise ValueError(f"{len(blocks)} blocks do not go into {len(targets)} targets")


class _CopiesInPieces:
    """See `BlockCopies`."""

    def __init__(self, layout: KvLayout, sources: Blocks, targets: Blocks, _around: bool) -> None:
        check_counts(sources, targets)

        def copy(number: int) -> tuple[int, ...]:
            return copy_block(layout, sources[number], targets[number])

        self._calls = JointCalls(copy, len(sources))
        self._shape = (len(sources), layout.num_layers)
        self.work_off, self.stop = self._calls.work_off, self._calls.stop

    def sums(self) -> SlabSums:
        """See `BlockCopies.sums`."""
        return np.array(self._calls.results(), np.uint64).reshape(self._shape)


class _FusedCopies:
    """See `BlockCopies`."""

    def __init__(self, layout: KvLayout, sources: Blocks, targets: Blocks, around: bool) -> None:
        check_counts(sources, targets)
        if any(target.readonly for target in targets):
            raise ValueError("the target of a copy is read-only")
        size, stride = layout.slab_bytes, layout.slab_stride_bytes
        starts = np.arange(layout.num_layers, dtype=np.uint64) * np.uint64(stride)
        into, into_owner = _located(layout, targets)
        origin, origin_owner = _located(layout, sources)
        slabs = fused_copy.SlabPairs(
            np.add.outer(into, starts).ravel(),
            np.add.outer(origin, starts).ravel(),
            size,
            stride - size,
            owners=(into_owner, origin_owner),
        )
        self._shape = (len(sources), layout.num_layers)
        self._copy = fused_copy.fused_copy().share(slabs, group=layout.num_layers, around=around)
        self.work_off, self.stop = self._copy.work_off, self._copy.stop

    def sums(self) -> SlabSums:
        """See `BlockCopies.sums`."""
        return self._copy.sums.reshape(self._shape)


def _located(layout: KvLayout, blocks: Blocks) -> tuple[fused_copy.Addresses, object]:
    """Where blocks lie, and what keeps them there: views that nobody can release."""
    if isinstance(blocks, BlockRows) and blocks.block_bytes == layout.block_bytes:
        return blocks.addresses(), blocks
    for block in blocks:
        check_block_length(layout, block)
    arrays = [np.frombuffer(block, np.uint8) for block in blocks]
    return np.array([array.ctypes.data for array in arrays], np.uint64), arrays


def _fused_refuses(problem: BlockCopyProblem) -> str | None:
    layout = problem.layout
    size = layout.slab_bytes
    if why_not := fused_copy.why_not(size, layout.slab_stride_bytes - size):
        return why_not
    try:
        fused_copy.fused_copy()
    except fused_copy.FusedCopyUnavailableError as error:
        return str(error)
    return None


def _cost_us(
    block_us: float, slab_us: float, bytes_per_us: float
) -> Callable[[BlockCopyProblem], float]:
    def cost_us(problem: BlockCopyProblem) -> float:
        layout = problem.layout
        return block_us + layout.num_layers * slab_us + layout.block_bytes / bytes_per_us

    return cost_us


def _problem(layout: KvLayout) -> BlockCopyProblem:
    return BlockCopyProblem(device="cpu", dtype=np.dtype(np.uint8), layout=layout)


def _examples() -> list[BlockCopyProblem]:
    return [
        _problem(
            KvLayout(
                num_layers=30,
                num_kv_heads=3,
                head_dim=64,
                block_tokens=tokens,
                dtype=KvDtype.BFLOAT16,
            )
        )
        for tokens in (8, 32, 128)
    ]


def _bench(problem: BlockCopyProblem) -> Callable[[CopyBlocksFn], Thunk]:
    """A batch that no cache holds: what a load copies was long not touched."""
    layout, size = problem.layout, problem.layout.block_bytes
    count = max(2, BENCH_BYTES // size)
    sources, targets = (np.ones(count * size, np.uint8) for _ in range(2))

    def cut(whole: NDArray[np.uint8]) -> Blocks:
        return [whole[start : start + size].data for start in range(0, count * size, size)]

    def prepare(run: CopyBlocksFn) -> Thunk:
        def once() -> None:
            run(layout, cut(sources), cut(targets), True).work_off()

        return once

    return prepare


BLOCK_COPY = Operation[BlockCopyProblem, CopyBlocksFn](
    "block_copy",
    [
        Implementation(
            name="pieces", run=_CopiesInPieces, refuses=always, cost_us=_cost_us(5.0, 1.0, 17_700)
        ),
        Implementation(
            name="fused",
            run=_FusedCopies,
            refuses=_fused_refuses,
            cost_us=_cost_us(8.0, 0.1, 20_900),
        ),
    ],
    examples=_examples,
    bench=_bench,
)
