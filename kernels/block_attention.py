"""Attention over whole blocks of keys that every query sees: what lies in the past of all of them.

    past block   | seen by all queries |  this module, in any order, from anywhere, part by part
    own chunk    | causal              |  `attention`, over a `PagedSequence`

The parts are merged by their log-sum-exp (`merge_partials` here, `attention.merge_two` by who
attends part by part, as `ucm.sparse.offload` does), so a context can be attended
to in pieces that never lie in memory together. Equal to attention over all of it within rounding.

Sources: FlashAttention-2 (arXiv 2307.08691); Flash-Decoding.

Envelope: reads the blocks once: 48 KiB a block and layer of SmolLM2-135M in fp32, 3 us.

Shapes: N blocks, T query tokens, H query heads, G KV heads, B block tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import _FLASH, merge_partials


def attend_blocks(q_THD: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Attend to all keys of `blocks`.

    Args:
        q_THD: [T, H, D], may be strided.
        blocks: [N, 2, G, B, D] in q's dtype, at least one block, every row filled.

    Returns:
        [T, H, D] and the log-sum-exp of the scaled scores [T, H] fp32.
    """
    is_flash = _FLASH is not None and q_THD.device.type == "cpu"
    if not is_flash or q_THD.dtype not in (torch.float32, torch.bfloat16):
        return _attend_plainly(q_THD, blocks)
    return _attend_one(q_THD, blocks) if q_THD.shape[0] == 1 else _attend_many(q_THD, blocks)


def _attend_one(q_THD: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A single query: each block is an entry of the kernel's batch, so nothing is copied."""
    assert _FLASH is not None
    _, heads, dim = q_THD.shape
    count, _, kv_heads, _, _ = blocks.shape
    q_NGRD = q_THD.reshape(kv_heads, heads // kv_heads, dim).expand(count, -1, -1, -1)
    outs, lses = _FLASH(q_NGRD, blocks[:, 0], blocks[:, 1])
    out, lse = merge_partials(outs, lses)
    return out.reshape(1, heads, dim), lse.reshape(1, heads)


def _attend_many(q_THD: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """KV heads are the batch and the queries of a group its heads, as in `flash_attention`."""
    assert _FLASH is not None
    num_tokens, heads, dim = q_THD.shape
    count, _, kv_heads, block_tokens, _ = blocks.shape
    kv = blocks.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, 1, count * block_tokens, dim)
    k, v = kv.expand(-1, -1, heads // kv_heads, -1, -1)
    q_GRTD = q_THD.view(num_tokens, kv_heads, -1, dim).permute(1, 2, 0, 3).contiguous()
    out, lse = _FLASH(q_GRTD, k, v)
    out_THD = out.permute(2, 0, 1, 3).reshape(num_tokens, heads, dim)
    return out_THD, lse.permute(2, 0, 1).reshape(num_tokens, heads)


def _attend_plainly(q_THD: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrix products in fp32, on any device, for any dtype."""
    num_tokens, heads, dim = q_THD.shape
    kv_heads = blocks.shape[2]
    k_GSD, v_GSD = blocks.permute(1, 2, 0, 3, 4).float().flatten(2, 3)
    q_GTRD = q_THD.reshape(num_tokens, kv_heads, -1, dim).transpose(0, 1).float() * dim**-0.5
    scores = q_GTRD.reshape(kv_heads, -1, dim) @ k_GSD.transpose(1, 2)
    lse = scores.logsumexp(-1)
    out = (torch.exp(scores - lse.unsqueeze(-1)) @ v_GSD).view(kv_heads, num_tokens, -1, dim)
    out_THD = out.transpose(0, 1).reshape(num_tokens, heads, dim).to(q_THD.dtype)
    lse_TGR = lse.view(kv_heads, num_tokens, -1).transpose(0, 1)
    return out_THD, lse_TGR.reshape(num_tokens, heads)
