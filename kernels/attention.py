"""Causal attention of one sequence over the paged KV pool, with its log-sum-exp.

    pool layer   [num_blocks, 2 (K, V), G, B, D]
    queries      positions start .. start + T - 1, attending to positions 0 .. own position
    positions    | block_ids[0]: 0 .. B-1 | block_ids[1]: B .. 2B-1 | ... | last: partly filled |

Three implementations of one contract, equal to `scaled_dot_product_attention` within rounding:
`tiled` (plain torch, any device and dtype), `flash` (prefill: PyTorch's CPU flash kernel over a
gathered copy, past and diagonal merged by log-sum-exp) and `split_flash` (decode: each pool block
is an entry of the kernel's batch, so nothing is copied; merged by log-sum-exp).

Sources: FlashAttention-2 (arXiv 2307.08691); Flash-Decoding (merging splits of the KV by their
log-sum-exp); PagedAttention (arXiv 2309.06180).

Envelope: decode reads 2 * G * D * S elements a layer once; at 4,096 tokens, 3 KV heads x 64, fp32
that is 6.3 MB, 0.4 ms at 16 GB/s. Prefill's gather adds one read and one write of the same bytes.

Shapes: T query tokens, H query heads, G KV heads, R = H / G, S = start + T, B block tokens, D.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from ucm.errors import LayoutMismatchError

from .dispatch import Implementation, Operation, TensorProblem, Thunk, always, coarse

AttentionFn: TypeAlias = Callable[[Tensor, Tensor, "PagedSequence"], tuple[Tensor, Tensor]]
"""(q_THD, kv_layer, sequence) -> (out_THD in q's dtype, lse_TH fp32)."""

TILE_TOKENS = 1024
"""Keys that the tiled version scores at once: bounds its memory to H * T * 1024 fp32."""
MAX_RUNS = 4
"""Above this many runs of consecutive blocks one gather is cheaper than a call for each run."""


@dataclass(frozen=True, slots=True)
class PagedSequence:
    """Where one sequence's KV lies, and which of its tokens are asked about.

    Built once a step and used for every layer.
    """

    start: int
    """Position of the first query token."""
    num_tokens: int
    """Query tokens T; their KV is in the pool already."""
    block_ids: Tensor
    """[ceil(S / B)] int64, on the pool's device."""
    runs: tuple[tuple[int, int], ...]
    """(first block id, count) of each run of consecutive ids, in order."""
    block_tokens: int
    tail_mask: Tensor = field(repr=False)
    """[num_blocks, B] fp32: 0 where a position is below S, -inf behind it."""

    @classmethod
    def build(
        cls, start: int, num_tokens: int, block_ids: Sequence[int], kv_layer: Tensor
    ) -> PagedSequence:
        """Describe a sequence over a pool whose layers look like `kv_layer`.

        Args:
            start: position of the first query token.
            num_tokens: number of query tokens, at least 1.
            block_ids: blocks from position 0 on; those behind the last position are ignored.
            kv_layer: [num_blocks, 2, G, B, D].

        Raises:
            LayoutMismatchError: fewer blocks than the positions need, or an id outside the pool.
        """
        block_tokens = kv_layer.shape[3]
        length = start + num_tokens
        needed = -(-length // block_tokens)
        if start < 0 or num_tokens < 1 or len(block_ids) < needed:
            raise LayoutMismatchError(
                f"positions {start}..{length - 1} need {needed} blocks of {block_tokens} tokens, "
                f"{len(block_ids)} were given"
            )
        used = list(block_ids[:needed])
        if min(used) < 0 or max(used) >= kv_layer.shape[0]:
            raise LayoutMismatchError(f"a block id is outside the pool of {kv_layer.shape[0]}")
        mask = torch.zeros(needed * block_tokens, dtype=torch.float32, device=kv_layer.device)
        mask[length:] = float("-inf")
        return cls(
            start=start,
            num_tokens=num_tokens,
            block_ids=torch.tensor(used, dtype=torch.int64, device=kv_layer.device),
            runs=runs_of(used),
            block_tokens=block_tokens,
            tail_mask=mask.view(needed, block_tokens),
        )

    @property
    def length(self) -> int:
        """Positions that the last query token attends to: S."""
        return self.start + self.num_tokens

    def blocks(self, kv_layer: Tensor) -> Tensor:
        """The sequence's blocks, [n, 2, G, B, D]: a view where they are consecutive."""
        if len(self.runs) == 1:
            first, count = self.runs[0]
            return kv_layer[first : first + count]
        return kv_layer.index_select(0, self.block_ids)

    def contiguous_kv(self, kv_layer: Tensor) -> Tensor:
        """A copy of the sequence's KV in position order, [2, G, n * B, D]."""
        blocks = self.blocks(kv_layer)
        count, _, kv_heads, block_tokens, head_dim = blocks.shape
        return blocks.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, count * block_tokens, head_dim)


def runs_of(block_ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(first block id, count) of each run of consecutive ids, in order."""
    breaks = [0]
    breaks += [i + 1 for i, (a, b) in enumerate(pairwise(block_ids)) if b != a + 1]
    breaks.append(len(block_ids))
    return tuple((block_ids[begin], end - begin) for begin, end in pairwise(breaks))


def merge_partials(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint parts of the keys, given each part's log-sum-exp.

    Args:
        outs: [parts, ..., D], each part normalised by itself.
        lses: [parts, ...] fp32; -inf marks a part without keys, not every part may be.

    Returns:
        The attention over all keys, [..., D] fp32, and its log-sum-exp, [...] fp32.
    """
    # From the peak part's own weight: logsumexp is a dozen small kernels, softmax is one.
    weights = torch.softmax(lses, 0)
    merged = (outs * weights.unsqueeze(-1)).sum(0)
    peak, part = lses.max(0)
    return merged, peak - weights.gather(0, part.unsqueeze(0))[0].log()


def merge_two(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_partials` of two parts, in a's dtype and without stacking them: 4x as fast.

    Args:
        a: [..., D].
        lse_a: [...] fp32, not -inf where `lse_b` is.
        b: as `a`.
        lse_b: as `lse_a`.

    Returns:
        As `merge_partials`, in a's dtype.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    weight = torch.exp(lse_b - lse).unsqueeze(-1).to(a.dtype)
    return torch.lerp(a, b, weight), lse


def tiled_attention(
    q_THD: Tensor, kv_layer: Tensor, sequence: PagedSequence
) -> tuple[Tensor, Tensor]:
    """Online-softmax attention, tile after tile of keys, in fp32.

    Args:
        q_THD: [T, H, D], may be strided.
        kv_layer: [num_blocks, 2, G, B, D] in q's dtype.
        sequence: what to attend to.

    Returns:
        [T, H, D] in q's dtype and the log-sum-exp of the scaled scores, [T, H] fp32.
    """
    num_tokens, heads, dim = q_THD.shape
    kv_heads = kv_layer.shape[2]
    shape = (num_tokens, kv_heads, heads // kv_heads, dim)
    q_GTRD = q_THD.reshape(shape).transpose(0, 1).float() * dim**-0.5
    q_GXD = q_GTRD.reshape(kv_heads, -1, dim)
    rows = torch.arange(num_tokens, device=q_THD.device) + sequence.start
    row_positions = rows.repeat_interleave(heads // kv_heads)
    peak = q_GXD.new_full((kv_heads, q_GXD.shape[1]), float("-inf"))
    total = torch.zeros_like(peak)
    acc = torch.zeros_like(q_GXD)
    tile_blocks = max(1, TILE_TOKENS // sequence.block_tokens)
    for first in range(0, len(sequence.block_ids), tile_blocks):
        blocks = kv_layer.index_select(0, sequence.block_ids[first : first + tile_blocks])
        k_GSD, v_GSD = blocks.permute(1, 2, 0, 3, 4).float().flatten(2, 3)
        scores = q_GXD @ k_GSD.transpose(1, 2)
        columns = torch.arange(k_GSD.shape[1], device=q_THD.device)
        hidden = columns + first * sequence.block_tokens > row_positions.unsqueeze(1)
        scores.masked_fill_(hidden, float("-inf"))
        new_peak = torch.maximum(peak, scores.amax(-1))
        shrink = torch.exp(peak - new_peak)
        weights = torch.exp(scores - new_peak.unsqueeze(-1))
        # Weight 0 times a stale NaN behind the sequence's end is NaN: such rows count as zero.
        v_GSD = v_GSD.masked_fill((hidden.all(0)).unsqueeze(-1), 0.0)
        total = total * shrink + weights.sum(-1)
        acc = acc * shrink.unsqueeze(-1) + weights @ v_GSD
        peak = new_peak
    out_GTRD = (acc / total.unsqueeze(-1)).view(kv_heads, num_tokens, -1, dim)
    lse_GTR = (peak + total.log()).view(kv_heads, num_tokens, -1)
    out = out_GTRD.transpose(0, 1).reshape(num_tokens, heads, dim).to(q_THD.dtype)
    return out, lse_GTR.transpose(0, 1).reshape(num_tokens, heads)


def _flash_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """PyTorch's CPU flash attention, which the public function does not expose the lse of."""
    packet = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return packet.default if packet is not None else None


_FLASH = _flash_kernel()


def flash_attention(
    q_THD: Tensor, kv_layer: Tensor, sequence: PagedSequence
) -> tuple[Tensor, Tensor]:
    """Prefill with the CPU flash kernel; arguments and result as `tiled_attention`.

    The kernel's causal mask is aligned to the first key, so a chunk that starts late is done as
    its past, without a mask, and its diagonal, and merged. A single query sees every key.
    """
    assert _FLASH is not None
    num_tokens, heads, dim = q_THD.shape
    kv_heads = kv_layer.shape[2]
    repeat = heads // kv_heads
    k_GSD, v_GSD = sequence.contiguous_kv(kv_layer)[:, :, : sequence.length]
    # KV heads are the batch and the queries of a group its heads: grouping costs no copy.
    q_GRTD = q_THD.view(num_tokens, kv_heads, repeat, dim).permute(1, 2, 0, 3).contiguous()
    shape = (kv_heads, repeat, sequence.length, dim)
    k, v = k_GSD.unsqueeze(1).expand(shape), v_GSD.unsqueeze(1).expand(shape)
    split = sequence.start
    if num_tokens == 1:
        out, lse = _FLASH(q_GRTD, k, v)
    else:
        out, lse = _FLASH(q_GRTD, k[:, :, split:], v[:, :, split:], 0.0, True)
    if split and num_tokens > 1:
        past, past_lse = _FLASH(q_GRTD, k[:, :, :split], v[:, :, :split])
        out, lse = merge_two(past, past_lse, out, lse)
    out_THD = out.permute(2, 0, 1, 3).reshape(num_tokens, heads, dim)
    return out_THD, lse.permute(2, 0, 1).reshape(num_tokens, heads)


def attend_folded(
    q_GXD: Tensor, kv_2GTD: Tensor, mask_XT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to keys that lie in one piece, X queries a KV head.

    The queries of a group are rows of one product: 165 GFLOP/s on two cores, where heads of their
    own get 146 (3 KV heads x 64, 1,536 queries each, 3,180 keys, fp32).

    No operation of `dispatch`, for there is nothing to choose: where the flash kernel is, it takes
    every dtype and was 1.1 to 4.5 times as fast as the plain products at all sizes tried (3 to
    1,536 queries, 32 to 3,072 keys, fp32 and bf16). Tests take `_FLASH` away to run the latter.

    Args:
        q_GXD: contiguous in D.
        kv_2GTD: T keys and values, at least one, in q's dtype.
        mask_XT: added to the scores: 0 or -inf, in q's dtype, no row all -inf; None: nothing.

    Returns:
        [G, X, D] in q's dtype and the log-sum-exp of the scaled scores, [G, X]: fp32, of fp64 fp64.
    """
    if _FLASH is not None and q_GXD.device.type == "cpu":
        mask = None if mask_XT is None else mask_XT.expand(1, len(q_GXD), -1, -1)
        out, lse = _FLASH(q_GXD[None], kv_2GTD[None, 0], kv_2GTD[None, 1], attn_mask=mask)
        return out[0], lse[0]
    wide = torch.promote_types(q_GXD.dtype, torch.float32)
    k_GTD, v_GTD = kv_2GTD.to(wide)
    scores = (q_GXD.to(wide) * q_GXD.shape[-1] ** -0.5) @ k_GTD.transpose(1, 2)
    if mask_XT is not None:
        scores += mask_XT
    plain = scores.softmax(-1) @ v_GTD
    return plain.to(q_GXD.dtype), scores.logsumexp(-1)


def split_flash_attention(
    q_THD: Tensor, kv_layer: Tensor, sequence: PagedSequence
) -> tuple[Tensor, Tensor]:
    """Decode with each pool block as a batch entry; as `tiled_attention`, but T must be 1."""
    assert _FLASH is not None
    _, heads, dim = q_THD.shape
    kv_heads = kv_layer.shape[2]
    repeat = heads // kv_heads
    q_GRD = q_THD.reshape(kv_heads, repeat, dim)
    if len(sequence.runs) > MAX_RUNS:
        parts = [(sequence.blocks(kv_layer), sequence.tail_mask)]
    else:
        parts = _views_of_runs(kv_layer, sequence)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for blocks, mask in parts:
        count = blocks.shape[0]
        q = q_GRD.expand(count, kv_heads, repeat, dim)
        bias = mask.view(count, 1, 1, -1).expand(-1, kv_heads, repeat, -1)
        out, lse = _FLASH(q, blocks[:, 0], blocks[:, 1], attn_mask=bias)
        outs.append(out)
        lses.append(lse)
    merged, total = merge_partials(
        outs[0] if len(outs) == 1 else torch.cat(outs),
        lses[0] if len(lses) == 1 else torch.cat(lses),
    )
    return merged.reshape(1, heads, dim).to(q_THD.dtype), total.reshape(1, heads)


def _views_of_runs(kv_layer: Tensor, sequence: PagedSequence) -> list[tuple[Tensor, Tensor]]:
    parts = []
    done = 0
    for first, count in sequence.runs:
        mask = sequence.tail_mask[done : done + count]
        parts.append((kv_layer[first : first + count], mask))
        done += count
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem(TensorProblem):
    """One sequence's attention in one layer."""

    num_queries: int
    """Query tokens of the sequence."""
    num_keys: int
    """Keys that they attend to."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int

    def bucket(self) -> str:
        """See `Problem.bucket`."""
        queries, keys = coarse(self.num_queries, 8), coarse(self.num_keys, 4)
        return f"T{queries} S{keys} H{self.num_heads} G{self.num_kv_heads} D{self.head_dim}"


def _flash_refuses(problem: AttentionProblem) -> str | None:
    if _FLASH is None:
        return "this release of torch has no flash attention for CPUs"
    if problem.device != "cpu":
        return "it runs on a CPU only"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return "it takes float32 and bfloat16 only"
    return None


def _split_flash_refuses(problem: AttentionProblem) -> str | None:
    return _flash_refuses(problem) or (
        None if problem.num_queries == 1 else "it takes a single query only"
    )


def _mega_products(problem: AttentionProblem) -> float:
    """Millions of multiply-adds in the two matrix products."""
    per_pair = 2 * problem.num_heads * problem.head_dim
    return per_pair * problem.num_queries * problem.num_keys / 1e6


def _mega_elements(problem: AttentionProblem) -> float:
    """Millions of elements of KV."""
    return 2 * problem.num_kv_heads * problem.head_dim * problem.num_keys / 1e6


# Measured on one thread of a Xeon with AVX-512 (9 query and 3 KV heads x 64, 512 and 4,096 keys).
def _tiled_cost_us(problem: AttentionProblem) -> float:
    return 400 + 60 * _mega_products(problem) + 3000 * _mega_elements(problem)


def _flash_cost_us(problem: AttentionProblem) -> float:
    per_element = 1700 if problem.dtype is torch.float32 else 920
    return 60 + 20 * _mega_products(problem) + per_element * _mega_elements(problem)


def _split_flash_cost_us(problem: AttentionProblem) -> float:
    per_element = 1150 if problem.dtype is torch.float32 else 1350
    return 60 + per_element * _mega_elements(problem)


def _examples() -> list[AttentionProblem]:
    """Decode and prefill in the shape of SmolLM2-135M, up to 4,096 tokens."""
    sizes = [(1, 64), (1, 256), (1, 1024), (1, 4096), (64, 64), (64, 1024), (512, 1024)]
    sizes.append((512, 4096))
    return [
        AttentionProblem(
            device="cpu",
            dtype=dtype,
            num_queries=num_queries,
            num_keys=num_keys,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for num_queries, num_keys in sizes
    ]


def _bench(problem: AttentionProblem) -> Callable[[AttentionFn], Thunk]:
    """Inputs as a step has them: each call reads another layer's KV."""
    block_tokens, p = 32, problem
    num_blocks = -(-p.num_keys // block_tokens)
    shape = (4, num_blocks, 2, p.num_kv_heads, block_tokens, p.head_dim)
    pool = torch.randn(shape).to(p.dtype)
    q_THD = torch.randn(p.num_queries, p.num_heads, p.head_dim).to(p.dtype)
    sequence = PagedSequence.build(
        p.num_keys - p.num_queries, p.num_queries, range(num_blocks), pool[0]
    )
    layers = itertools.cycle(pool)
    return lambda run: lambda: run(q_THD, next(layers), sequence)


ATTENTION: Operation[AttentionProblem, AttentionFn] = Operation(
    "attention",
    [
        Implementation(name="tiled", run=tiled_attention, refuses=always, cost_us=_tiled_cost_us),
        Implementation(
            name="flash", run=flash_attention, refuses=_flash_refuses, cost_us=_flash_cost_us
        ),
        Implementation(
            name="split_flash",
            run=split_flash_attention,
            refuses=_split_flash_refuses,
            cost_us=_split_flash_cost_us,
        ),
    ],
    examples=_examples,
    bench=_bench,
)


def select_attention(
    sequence: PagedSequence, q_shape: tuple[int, int], kv_layer: Tensor, override: str | None = None
) -> AttentionFn:
    """The implementation for one sequence of one step.

    Args:
        sequence: what will be attended to.
        q_shape: (query heads, head size).
        kv_layer: [num_blocks, 2, G, B, D], for its device, dtype and KV heads.
        override: name of the implementation to take instead, for tests.

    Raises:
        ConfigError: none admits the problem.
    """
    problem = AttentionProblem(
        device=kv_layer.device.type,
        dtype=kv_layer.dtype,
        num_queries=sequence.num_tokens,
        num_keys=sequence.length,
        num_heads=q_shape[0],
        num_kv_heads=kv_layer.shape[2],
        head_dim=q_shape[1],
    )
    return ATTENTION.select(problem, override).run
