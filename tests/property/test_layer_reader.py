"""Whatever the order in which reads end: no block counts before its slabs are in and verified."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.slab_ledger import SlabLedger
from ucm.storage.format import HEADER_BYTES
from ucm.testing.extent_files import PAGE_LAYOUT, ExtentFile, FakeProgress, GatedIo, wait_for
from ucm.testing.slab_pool import SlabPool
from ucm.types import LoadOrder, SourceKind

LAYERS = PAGE_LAYOUT.num_layers
WAIT_S = 10.0


@dataclass
class Load:
    """One reader, the file behind it, and what was broken in it."""

    file: ExtentFile
    pool: SlabPool
    io: GatedIo
    reader: LayerReader
    damaged: dict[int, int]
    """First damaged layer by block."""

    def right_slab(self, layer: int, index: int) -> bool:
        """Whether the pool holds just what was stored."""
        start = self.file.layout.slab_slice(layer)
        return bytes(self.pool.view(layer, index)) == self.file.data[index][start]

    def check_layer(self, layer: int) -> int:
        """What `wait_layer` says without waiting must be true of the pool."""
        num_good = self.reader.wait_layer(layer, 0.0)
        for index in range(num_good):
            assert self.damaged.get(index, LAYERS) > layer
            assert all(self.right_slab(each, index) for each in range(layer + 1))
        return num_good

    def check_back(self) -> int:
        """As `check_layer`, for the blocks at the end."""
        num_good, num_blocks = self.reader.num_blocks_ready_from_back(), len(self.file.keys)
        for index in range(num_blocks - num_good, num_blocks):
            assert all(self.right_slab(each, index) for each in range(LAYERS))
        return num_good


@contextlib.contextmanager
def load(
    sources: Sequence[SourceKind], damage: dict[int, int], options: ReaderOptions, seed: int
) -> Iterator[Load]:
    with tempfile.TemporaryDirectory(prefix="ucm") as folder:
        file = ExtentFile(Path(folder) / "0000.seg", PAGE_LAYOUT, len(sources))
        whole = file.plan([SourceKind.MEMORY] * len(sources)).blocks
        for index, layer in damage.items():
            file.damage(index, layer)
        promoting = [i for i, source in enumerate(sources) if source is SourceKind.PROMOTING]
        progress = FakeProgress(len(promoting), lambda rank: whole[promoting[rank]].checksums)
        progress.move(len(promoting) * LAYERS)
        io, pool = GatedIo(seed), SlabPool(PAGE_LAYOUT, len(sources))
        plan = file.plan(sources, progress=progress)
        reader = LayerReader(plan, PAGE_LAYOUT, pool, io, options)
        damaged = {i: layer for i, layer in damage.items() if sources[i] is SourceKind.EXTENT}
        yield Load(file, pool, io, reader, damaged)
        io.open_gate()
        assert reader.cancel(WAIT_S)
        io.close()


SOURCES = st.lists(
    st.sampled_from([SourceKind.EXTENT, SourceKind.EXTENT, *SourceKind]), min_size=1, max_size=6
)
DAMAGE = st.dictionaries(st.integers(0, 5), st.integers(0, LAYERS - 1), max_size=2)


@given(
    sources=SOURCES,
    damage=DAMAGE,
    request_slabs=st.integers(1, LAYERS),
    num_threads=st.integers(1, 4),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=60, deadline=None)
def test_no_block_counts_too_early(
    sources: list[SourceKind],
    damage: dict[int, int],
    request_slabs: int,
    num_threads: int,
    seed: int,
) -> None:
    """After every single read that ends, in any order, what is reported is in the pool."""
    damage = {index: layer for index, layer in damage.items() if index < len(sources)}
    options = ReaderOptions(
        request_bytes=request_slabs * PAGE_LAYOUT.slab_stride_bytes,
        num_threads=num_threads,
        read_ahead_layers=LAYERS,
    )
    with load(sources, damage, options, seed) as found:
        found.reader.start()
        while not found.reader.is_done:
            for layer in range(LAYERS):
                found.check_layer(layer)
            if not found.io.let_one_pass():
                wait_for(lambda: found.reader.is_done, 0.001)
        expected = min([len(sources), *found.damaged])
        for layer in range(LAYERS):
            seen = [index for index, first in found.damaged.items() if first <= layer]
            assert expected <= found.check_layer(layer) <= min([len(sources), *seen])
        assert found.check_layer(LAYERS - 1) == expected


@given(
    num_blocks=st.integers(1, 6),
    steps=st.lists(st.integers(0, 6), max_size=8),
    num_threads=st.integers(1, 4),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_written_below_what_was_given_up(
    num_blocks: int, steps: list[int], num_threads: int, seed: int
) -> None:
    """Reads and give-ups in any order; the blocks at the end that are reported are whole."""
    options = ReaderOptions(order=LoadOrder.BLOCKS_FROM_BACK, num_threads=num_threads)
    with load([SourceKind.EXTENT] * num_blocks, {}, options, seed) as found:
        found.reader.start()
        floor = 0
        for step in steps:
            if step % 2:
                found.io.let_one_pass()
            else:
                floor = max(floor, min(step, num_blocks))
                found.reader.give_up_below(step)
                overwrite(found.pool, floor)
            found.check_back()
        found.io.open_gate()
        assert wait_for(lambda: found.reader.is_done)
        assert found.check_back() == num_blocks - floor
        assert is_overwritten(found.pool, floor)


COMPUTED = 0x5C
"""What the caller's own computation writes into blocks that it took over."""


def overwrite(pool: SlabPool, stop: int) -> None:
    for index in range(stop):
        for layer in range(LAYERS):
            pool.view(layer, index)[:] = bytes([COMPUTED]) * PAGE_LAYOUT.slab_bytes


def is_overwritten(pool: SlabPool, stop: int) -> bool:
    return all(
        set(bytes(pool.view(layer, index))) == {COMPUTED}
        for index in range(stop)
        for layer in range(LAYERS)
    )


@given(
    order=st.sampled_from(LoadOrder),
    passes=st.integers(0, 3),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_written_after_cancel_said_so(
    order: LoadOrder, passes: int, num_threads: int, seed: int
) -> None:
    """True means the memory is the caller's; False means that a read into it still hangs."""
    options = ReaderOptions(
        order=order, num_threads=num_threads, request_bytes=1, read_ahead_layers=LAYERS
    )
    with load([SourceKind.EXTENT] * 4, {}, options, seed) as found:
        found.reader.start()
        for _ in range(passes):
            assert found.io.wait_arrived()
            found.io.let_one_pass()
        # from the back only copies are waited for, and they end
        patience_s = 0.0 if order is LoadOrder.LAYERS else WAIT_S
        if not found.reader.cancel(patience_s):
            assert order is LoadOrder.LAYERS
            found.io.open_gate()
            assert found.reader.cancel(WAIT_S)
        overwrite(found.pool, 4)
        found.io.open_gate()
        assert wait_for(lambda: not found.reader.num_threads_alive)
        assert is_overwritten(found.pool, 4)


@given(
    header=st.binary(min_size=1, max_size=64),
    offset=st.integers(0, HEADER_BYTES - 64),
    is_resealed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_garbled_header_is_never_believed(header: bytes, offset: int, is_resealed: bool) -> None:
    """Random bytes anywhere in it, with the header's own checksum made right or not.

    If they leave every field and checksum as it was, the block is right all the same.
    """
    options = ReaderOptions(num_threads=1)
    with load([SourceKind.EXTENT] * 2, {}, options, 0) as found:
        found.file.poke(1, header, offset)
        if is_resealed:
            found.file.reseal(1)
        found.io.open_gate()
        found.reader.start()
        num_good = found.reader.wait_layer(LAYERS - 1, WAIT_S)
        assert num_good >= 1
        assert found.check_layer(LAYERS - 1) == num_good
        assert (num_good == 2) == (found.reader.corrupt_keys() == ())


@given(data=st.data(), num_blocks=st.integers(1, 5), from_back=st.booleans())
def test_the_ledger_counts_like_a_table(
    data: st.DataObject, num_blocks: int, *, from_back: bool
) -> None:
    """Against a plain table of booleans."""
    ledger = SlabLedger(num_blocks, LAYERS, from_back=from_back)
    table = [[False] * LAYERS for _ in range(num_blocks)]
    order = data.draw(st.permutations([(b, g) for b in range(num_blocks) for g in (0, 2)]))
    floor, limit = 0, num_blocks
    for block, first in order:
        if data.draw(st.integers(0, 9)) == 0:
            ledger.fail(block)
            floor, limit = (
                (max(floor, block + 1), limit) if from_back else (floor, min(limit, block))
            )
            continue
        ledger.arrive(block, first, first + 2)
        table[block][first : first + 2] = [True, True]
        wanted = table[floor:limit]
        for layer in range(LAYERS):
            through = [all(row[: layer + 1]) for row in table[:limit]]
            leading = through.index(False) if False in through else limit
            assert ledger.num_leading(layer) == leading
            assert ledger.is_settled(layer) == all(all(row[: layer + 1]) for row in wanted)
        assert ledger.num_missing() == sum(not cell for row in wanted for cell in row)
