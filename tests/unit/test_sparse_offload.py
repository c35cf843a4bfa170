"""Attention of a sequence beyond the pool equals attention over all of its keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ucm.clock import SystemClock
from ucm.errors import CapacityError, ConfigError
from ucm.kernels.attention import PagedSequence, tiled_attention
from ucm.kernels.block_attention import attend_blocks
from ucm.sparse.offload import Chooser, OffloadedAttention, OffloadOptions, Wanted
from ucm.sparse.slab_queue import SlabLostError
from ucm.sparse.slab_source import HostSlabSource
from ucm.sparse.wave_stream import WaveStream
from ucm.storage.throttled_io import TokenBucket

LAYERS, KV_HEADS, HEADS, B, D = 3, 2, 6, 4, 16
POOL_BLOCKS = 20
OPTIONS = OffloadOptions(resident_blocks=10, wave_blocks=3, num_waves=2)


@pytest.fixture
def source() -> Iterator[HostSlabSource]:
    made = HostSlabSource(64 << 20)
    yield made
    made.close()


class Sequence:
    """A sequence that is written to a small pool and, for comparison, to one with room for all."""

    def __init__(
        self,
        source: HostSlabSource,
        chooser: Chooser | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (2, KV_HEADS, B, D)
        self.pool = torch.full((LAYERS, POOL_BLOCKS, *shape), float("nan"), dtype=dtype)
        self.whole = torch.zeros((LAYERS, 64, *shape), dtype=dtype)
        self.ids = list(range(3, 13))
        self.pool[:, self.ids] = 0
        self.random = torch.Generator().manual_seed(7)
        self.num_tokens = 0
        self.attention = OffloadedAttention(OPTIONS, self.pool, self.ids, source.open("s"), chooser)

    def run(self, count: int, *, queries: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Compute `count` tokens; returns each layer's result and what it should be."""
        start, stop = self.num_tokens, self.num_tokens + count
        table = self.attention.begin_pass(start, count, is_decode=count == 1)
        results = []
        for layer in range(LAYERS):
            kv = torch.randn(count, 2, KV_HEADS, D, generator=self.random).to(self.pool.dtype)
            for row, position in enumerate(range(start, stop)):
                block, offset = divmod(position, B)
                self.pool[layer, table[block], :, :, offset] = kv[row]
                self.whole[layer, block, :, :, offset] = kv[row]
            q = torch.randn(count, HEADS, D, generator=self.random).to(self.pool.dtype)
            if layer + 1 < LAYERS:
                self.attention.look_ahead(layer + 1, q)
            got = self.attention(layer, q, self.pool[layer])
            whole = PagedSequence.build(start, count, range(64), self.whole[layer])
            results.append((got, tiled_attention(q, self.whole[layer], whole)[0]))
        self.attention.end_pass(range(stop), stop, 1000)
        self.num_tokens = stop
        assert self.attention.check_integrity() == []
        return results


def check(results: list[tuple[Tensor, Tensor]], tolerance: float = 1e-5) -> None:
    for got, expected in results:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_chunks_and_decodes_equal_dense_attention(
    source: HostSlabSource, dtype: torch.dtype, tolerance: float
) -> None:
    sequence = Sequence(source, dtype=dtype)
    for count in (13, 24, 1, 22, 5, 24, 24, *[1] * 19):
        check(sequence.run(count), tolerance)
    assert sequence.num_tokens > 10 * B
    assert sequence.attention.stream.num_slabs > 0
    blocks = {i for i in range(POOL_BLOCKS) if not torch.isnan(sequence.pool[0, i]).any()}
    assert blocks == set(sequence.ids)


class SealsNothing:
    """Needs no summaries."""

    def predict(self, _layer: int, _q: Tensor, _position: int, /) -> Wanted | None:
        return None

    def seal(self, _slabs: Tensor, /) -> None: ...

    def truncate(self, _num_blocks: int, /) -> None: ...


class Everything(SealsNothing):
    """Wants all blocks, as if they had been chosen; the first ones most."""

    def choose(self, _layer: int, _q: Tensor, position: int, /) -> Wanted:
        count = position // B + 1
        return Wanted(np.arange(count), np.linspace(1, 0, count, dtype=np.float32))


class Some(SealsNothing):
    """Wants the sink, two blocks that change slowly, and the last three."""

    def choose(self, layer: int, _q: Tensor, position: int, /) -> Wanted:
        count = position // B + 1
        chosen = {0, position // 7 % count, (position // 3 + layer) % count}
        chosen |= set(range(max(0, count - 3), count))
        blocks = np.array(sorted(chosen))
        mass = np.zeros(count, dtype=np.float32)
        mass[blocks] = 1 / len(blocks)
        mass[(blocks + 1) % count] += 0.01
        return Wanted(blocks, mass)


def test_choosing_everything_equals_dense_attention(source: HostSlabSource) -> None:
    sequence = Sequence(source, Everything())
    for count in (24, 24, 24, *[1] * 40):
        check(sequence.run(count))


def test_chosen_blocks_are_attended_to_and_stay(source: HostSlabSource) -> None:
    sequence = Sequence(source, Some())
    for count in (24, 24, 24, 13):
        check(sequence.run(count))
    for _ in range(60):
        position = sequence.num_tokens
        results = sequence.run(1)
        for layer, (got, _) in enumerate(results):
            blocks = Some().choose(layer, got, position).blocks.tolist()
            assert position // B == blocks[-1]
    stats = sequence.attention.resident.stats
    assert stats.hits > 3 * stats.misses > 0
    assert stats.useful_ahead + stats.late_ahead > 0


class Foretold(Some):
    """Knows beforehand what it will choose."""

    def predict(self, layer: int, q: Tensor, position: int, /) -> Wanted | None:
        return self.choose(layer, q, position)


def test_what_is_foretold_is_read_ahead(source: HostSlabSource) -> None:
    ahead = []
    for chooser in (Some(), Foretold()):
        sequence = Sequence(source, chooser)
        for count in (24, 24, 24, 13, *[1] * 60):
            sequence.run(count)
        stats = sequence.attention.resident.stats
        ahead.append(stats.useful_ahead + stats.late_ahead)
        sequence.attention.stop()
    assert ahead[1] > ahead[0]


def test_a_chosen_subset_is_the_attention_over_it(source: HostSlabSource) -> None:
    sequence = Sequence(source, Some())
    for count in (24, 24, 24, 13):
        sequence.run(count)
    position = sequence.num_tokens
    table = sequence.attention.begin_pass(position, 1, is_decode=True)
    kv = torch.randn(2, KV_HEADS, D)
    q = torch.randn(1, HEADS, D)
    for layer in range(LAYERS):
        block, offset = divmod(position, B)
        sequence.pool[layer, table[block], :, :, offset] = kv
        sequence.whole[layer, block, :, :, offset] = kv
        got = sequence.attention(layer, q, sequence.pool[layer])
        chosen = Some().choose(layer, q, position).blocks.tolist()
        start = (len(chosen) - 1) * B + offset
        subset = PagedSequence.build(start, 1, chosen, sequence.whole[layer])
        expected = tiled_attention(q, sequence.whole[layer], subset)[0]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_pass_that_failed_is_repeated(source: HostSlabSource) -> None:
    sequence = Sequence(source, Some())
    for count in (24, 24, 24):
        check(sequence.run(count))
    for count in (7, 1, 1):
        sequence.attention.begin_pass(sequence.num_tokens, count, is_decode=count == 1)
        q = torch.zeros(count, HEADS, D)
        sequence.attention(0, q, sequence.pool[0])
        sequence.run(count)


def test_a_lost_slab_ends_the_pass_and_spoils_nothing(source: HostSlabSource) -> None:
    sequence = Sequence(source)
    for count in (24, 24, 24):
        check(sequence.run(count))
    kept = sequence.attention.shelf.num_kept
    sequence.attention.shelf.truncate(2)
    sequence.attention.begin_pass(sequence.num_tokens, 1, is_decode=True)
    with pytest.raises(SlabLostError, match="block"):
        sequence.attention(0, torch.zeros(1, HEADS, D), sequence.pool[0])
    assert kept > 2
    sequence.attention.stop()
    assert sequence.attention.stream.is_idle


def test_reads_that_are_refused_cost_no_buffer(source: HostSlabSource) -> None:
    shelf = source.open("s")
    slabs = torch.arange(6.0).reshape(1, 6, 1, 1, 1, 1)
    shelf.put(range(6), slabs, num_exact=6)
    stream = WaveStream(shelf, torch.zeros(2, 2, 1, 1, 1, 1))
    for _ in range(2):
        with pytest.raises(SlabLostError, match="not on the shelf"):
            stream.expect(0, np.array([0, 9]))
        stream.reset()
    stream.expect(0, np.arange(6))
    assert torch.cat([wave.clone() for wave in stream.waves(0)]).flatten().tolist() == [*range(6)]
    assert stream.is_idle


def test_a_full_source_says_so(source: HostSlabSource) -> None:
    small = HostSlabSource(3 * LAYERS * 2 * KV_HEADS * B * D * 4)
    sequence = Sequence(small)
    with pytest.raises(CapacityError, match="capacity"):
        sequence.run(24)
    small.close()


def test_reads_keep_to_the_limit() -> None:
    slept: list[float] = []
    clock = SystemClock()
    source = HostSlabSource(64 << 20, TokenBucket(1e6, 1.0, clock), slept.append)
    sequence = Sequence(source)
    for count in (24, 24, 24, 1):
        check(sequence.run(count))
    assert sum(slept) > 0
    assert source.read_bytes == sequence.attention.stream.num_slabs * sequence.pool[0, 0].nbytes
    source.close()


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_that_all_queries_see(num_tokens: int, dtype: torch.dtype) -> None:
    blocks = torch.randn(5, 2, KV_HEADS, B, D).to(dtype)
    q = torch.randn(num_tokens, HEADS, D).to(dtype)
    out, lse = attend_blocks(q, blocks)
    k, v = blocks.permute(1, 2, 0, 3, 4).float().flatten(2, 3)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    scores = q.float().transpose(0, 1) @ k.transpose(1, 2) * D**-0.5
    expected = (scores.softmax(-1) @ v).transpose(0, 1)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, scores.logsumexp(-1).T, rtol=1e-3, atol=1e-3)


def test_options_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 5"):
        OffloadOptions(resident_blocks=4)
    with pytest.raises(ConfigError, match="num_waves"):
        OffloadOptions(resident_blocks=9, num_waves=1)


@pytest.mark.parametrize("capacity", [0, -5, "1GiB", 1.5, None, True])
def test_a_source_of_no_size_is_refused(capacity: Any) -> None:
    with pytest.raises(ConfigError, match="capacity_bytes is"):
        HostSlabSource(capacity)
