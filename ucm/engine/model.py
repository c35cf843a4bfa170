"""`LlamaModel`: a Llama-family decoder over the paged KV pool.

Invariants: the pool is written before it is read within a layer; nothing but the pool survives a
call; the result for one item does not depend on which others are in the batch (up to the last
bits of bf16 matrix products, whose shape changes).

Envelope: a decode step reads every weight and the sequence's KV once: for SmolLM2-135M in fp32
538 MB and 46 KB a token of context, so 36 ms at 15 GB/s, and 12 ms more at 4,096 tokens. Prefill
does 2 * parameters FLOPs a token. What Python adds is about 20 calls a layer, 2 to 3 ms a step.

Shapes: T tokens of the step, H query heads, G KV heads, D head size, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ucm.errors import ConfigError, LayoutMismatchError
from ucm.kernels.attention import AttentionFn, PagedSequence, select_attention
from ucm.kernels.linear import Linear
from ucm.kernels.norm import RmsNorm
from ucm.sparse.protocols import ItemAttention, QueriesAhead

from .config import ModelConfig
from .rope import RopeTable, rotate_


@dataclass(frozen=True, slots=True)
class ForwardItem:
    """One sequence's share of one step."""

    token_ids: Sequence[int]
    """New tokens, at least one."""
    start: int
    """Position of `token_ids[0]`; the KV of positions 0..start-1 is in the pool."""
    block_ids: Sequence[int]
    """Pool blocks that cover positions 0..start+len(token_ids)-1, in order."""
    attention: ItemAttention | None = None
    """Who attends; dense over `block_ids` when None. With one, only the entries of `block_ids` at
    the new positions are looked at."""
    look_ahead: QueriesAhead | None = None
    """Who is told the next layer's queries; costs a product with the query weights a layer."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer's weights."""

    input_norm: RmsNorm
    qkv: Linear
    """C to (H + 2 G) * D: q, then k, then v."""
    out: Linear
    mlp_norm: RmsNorm
    gate_up: Linear
    """C to 2 * intermediate: gate, then up."""
    down: Linear


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one step share."""

    cos: Tensor
    sin: Tensor
    slots: tuple[Tensor, Tensor] | tuple[int, int]
    """(block id, offset in it) of each token: tensors, or two numbers if there is one token."""
    parts: tuple[tuple[slice, ItemAttention], ...]
    """For each item its rows and who attends for them."""
    ahead: tuple[tuple[slice, QueriesAhead], ...]
    """Rows whose next queries somebody wants to know."""
    wait_layer: Callable[[int], None] | None


class LlamaModel:
    """Computes logits and fills the KV pool. Not thread-safe: one forward at a time."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        """Merge the weights into the form that is computed with.

        Args:
            config: the shape.
            weights: Hugging Face names to (out, in) matrices, all of one dtype.

        Raises:
            ConfigError: a tensor is missing, superfluous or has another shape than `config` says.
        """
        taken = _WeightTaker(weights)
        c = config
        self.config = config
        self._embedding = taken.take("model.embed_tokens", c.vocab_size, c.hidden_size)
        self._layers = [_take_layer(taken, config, i) for i in range(c.num_layers)]
        self._final_norm = RmsNorm(taken.take("model.norm", c.hidden_size), c.rms_norm_eps)
        if c.tied_head:
            taken.drop("lm_head.weight")
            self._head = Linear(self._embedding)
        else:
            self._head = Linear(taken.take("lm_head", c.vocab_size, c.hidden_size))
        taken.check_empty()
        self.dtype = self._embedding.dtype
        self._rope = RopeTable(config, self.dtype)

    def forward(
        self,
        items: Sequence[ForwardItem],
        kv_pool: Tensor,
        *,
        wait_layer: Callable[[int], None] | None = None,
        attention: str | None = None,
        every_token: bool = False,
    ) -> Tensor:
        """Compute the items' tokens, write their KV, return the logits of each item's last token.

        Args:
            items: one chunk of each sequence of the batch; no two share a block they write to.
            kv_pool: [num_layers, num_blocks, 2, num_kv_heads, block_tokens, head_dim],
                contiguous, in the model's dtype. The blocks at the items' new positions are
                written, the others of `block_ids` read.
            wait_layer: called with each layer's number, in order, before its attention reads the
                pool and when all earlier layers' KV is written; may block. What it raises ends the
                pass and is passed on; the pass can then be repeated.
            attention: name of the attention implementation, for tests.
            every_token: return the logits of all tokens of all items, in order.

        Returns:
            [len(items), vocab_size] fp32; a row for each token where `every_token` is set.

        Raises:
            LayoutMismatchError: the pool or an item does not fit the model.
        """
        self._check_pool(kv_pool)
        with torch.inference_mode():
            step = self._plan(items, kv_pool, attention, wait_layer)
            tokens = [token for item in items for token in item.token_ids]
            x_TC = self._embedding[torch.tensor(tokens, dtype=torch.int64)]
            for index, layer in enumerate(self._layers):
                x_TC = self._run_layer(layer, x_TC, kv_pool[index], step, index)
            if not every_token:
                x_TC = x_TC[[rows.stop - 1 for rows, _ in step.parts]]
            logits = self._head(self._final_norm(x_TC))
        # A copy made outside inference mode is an ordinary tensor: samplers may write to it.
        return logits.to(torch.float32, copy=True)

    # One layer at a time, for who recomputes some tokens and not others (`ucm.reuse`).

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self._layers)

    @property
    def projection_share(self) -> float:
        """Weights behind a layer's queries, keys and values, of all weights of the layer."""
        c = self.config
        qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        rest = c.num_heads * c.head_dim + 3 * c.intermediate_size
        return qkv / (qkv + rest)

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """The first hidden states, [T, C]."""
        return self._embedding[torch.tensor(token_ids, dtype=torch.int64)]

    def project(self, layer: int, x_TC: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's queries, keys and values, rotated.

        Args:
            layer: its number.
            x_TC: hidden states before the layer.
            positions: [T] int64.

        Returns:
            q_THD, and the keys and values [2, G, T, D].
        """
        c, weights = self.config, self._layers[layer]
        cos, sin = self._rope.at(positions)
        qkv_TXD = weights.qkv(weights.input_norm(x_TC)).view(len(x_TC), -1, c.head_dim)
        rotate_(qkv_TXD[:, : c.num_heads + c.num_kv_heads], cos, sin)
        kv = qkv_TXD[:, c.num_heads :].view(-1, 2, c.num_kv_heads, c.head_dim)
        return qkv_TXD[:, : c.num_heads], kv.permute(1, 2, 0, 3)

    def finish(self, layer: int, x_TC: Tensor, attended_THD: Tensor) -> Tensor:
        """The hidden states behind a layer, given what its attention gave; [T, C]."""
        weights = self._layers[layer]
        return _finish(weights, x_TC, attended_THD.reshape(len(x_TC), -1))

    def logits(self, x_TC: Tensor) -> Tensor:
        """[T, vocab_size] fp32 of hidden states behind the last layer."""
        return self._head(self._final_norm(x_TC)).to(torch.float32, copy=True)

    def _run_layer(
        self, layer: _Layer, x_TC: Tensor, kv_layer: Tensor, step: _Step, index: int
    ) -> Tensor:
        if step.ahead:
            self._look_ahead(x_TC, step, index + 1)
        attended = self._attend(layer, layer.input_norm(x_TC), kv_layer, step, index)
        return _finish(layer, x_TC, attended)

    def _attend(
        self, layer: _Layer, x_TC: Tensor, kv_layer: Tensor, step: _Step, index: int
    ) -> Tensor:
        """Project, rotate, write the new KV to the pool, attend; [T, H * D]."""
        c = self.config
        num_tokens = x_TC.shape[0]
        qkv_TXD = layer.qkv(x_TC).view(num_tokens, -1, c.head_dim)
        rotate_(qkv_TXD[:, : c.num_heads + c.num_kv_heads], step.cos, step.sin)
        # K's heads are followed by V's, so both reach the pool in one write.
        kv = qkv_TXD[:, c.num_heads :].view(num_tokens, 2, c.num_kv_heads, c.head_dim)
        blocks, offsets = step.slots
        kv_layer[blocks, :, :, offsets] = kv[0] if num_tokens == 1 else kv
        # As late as can be: projecting and rotating hide a part of the wait.
        if step.wait_layer is not None:
            step.wait_layer(index)
        outs = [
            attend(index, qkv_TXD[rows, : c.num_heads], kv_layer) for rows, attend in step.parts
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.reshape(num_tokens, c.num_heads * c.head_dim)

    def _look_ahead(self, x_TC: Tensor, step: _Step, index: int) -> None:
        """Predict the queries of layer `index` from its predecessor's input."""
        if index == len(self._layers):
            return
        c, layer = self.config, self._layers[index]
        for rows, tell in step.ahead:
            x = layer.input_norm(x_TC[rows])
            q_THD = layer.qkv.first(x, c.num_heads * c.head_dim).view(len(x), -1, c.head_dim)
            rotate_(q_THD, step.cos[rows], step.sin[rows])
            tell(index, q_THD)

    def _plan(
        self,
        items: Sequence[ForwardItem],
        kv_pool: Tensor,
        attention: str | None,
        wait_layer: Callable[[int], None] | None,
    ) -> _Step:
        """Resolve positions, slots and attention once for all layers."""
        positions: list[int] = []
        blocks: list[int] = []
        parts, ahead = [], []
        kv_layer = kv_pool[0]
        block_tokens = kv_layer.shape[3]
        for item in items:
            first_row = len(positions)
            self._check_item(item)
            span = range(item.start, item.start + len(item.token_ids))
            attend = item.attention or self._dense(item, kv_layer, attention)
            positions += span
            blocks += [item.block_ids[position // block_tokens] for position in span]
            rows = slice(first_row, len(positions))
            parts.append((rows, attend))
            if item.look_ahead is not None:
                ahead.append((rows, item.look_ahead))
        where = torch.tensor(positions, dtype=torch.int64)
        cos, sin = self._rope.at(where)
        slots: tuple[Tensor, Tensor] | tuple[int, int]
        if len(positions) == 1:
            slots = (blocks[0], positions[0] % block_tokens)
        else:
            slots = (torch.tensor(blocks, dtype=torch.int64), where % block_tokens)
        return _Step(cos, sin, slots, tuple(parts), tuple(ahead), wait_layer)

    def _dense(self, item: ForwardItem, kv_layer: Tensor, attention: str | None) -> ItemAttention:
        """Attention over all blocks of an item, in the cheapest way there is."""
        sequence = PagedSequence.build(item.start, len(item.token_ids), item.block_ids, kv_layer)
        shape = (self.config.num_heads, self.config.head_dim)
        attend: AttentionFn = select_attention(sequence, shape, kv_layer, attention)
        return lambda _layer, q_THD, kv_layer: attend(q_THD, kv_layer, sequence)[0]

    def _check_item(self, item: ForwardItem) -> None:
        end = item.start + len(item.token_ids)
        if not item.token_ids or end > self.config.max_context_tokens:
            raise LayoutMismatchError(
                f"an item of {len(item.token_ids)} tokens ending at position {end}: the model "
                f"takes 1 to {self.config.max_context_tokens}"
            )

    def _check_pool(self, kv_pool: Tensor) -> None:
        c = self.config
        expected = (c.num_layers, 2, c.num_kv_heads, c.head_dim)
        shape = tuple(kv_pool.shape)
        fits = len(shape) == 6 and (shape[0], shape[2], shape[3], shape[5]) == expected
        if not fits or kv_pool.dtype != self.dtype or not kv_pool.is_contiguous():
            raise LayoutMismatchError(
                f"the KV pool is {shape} {kv_pool.dtype}; the model needs contiguous "
                f"[{c.num_layers}, blocks, 2, {c.num_kv_heads}, tokens, {c.head_dim}] {self.dtype}"
            )


def _finish(layer: _Layer, x_TC: Tensor, attended_TX: Tensor) -> Tensor:
    """Output projection and MLP, each added to what came before."""
    x_TC = layer.out.add(attended_TX, x_TC)
    gate, up = layer.gate_up(layer.mlp_norm(x_TC)).chunk(2, dim=-1)
    return layer.down.add(F.silu(gate, inplace=True).mul_(up), x_TC)


class _WeightTaker:
    """Hands out weights by name, checks their shapes, and knows what nobody took."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._left = dict(weights)
        self._dtypes = {weight.dtype for weight in weights.values()}

    def take(self, module: str, *shape: int) -> Tensor:
        """The weight of `module`, which must have `shape`."""
        weight = self._left.pop(f"{module}.weight", None)
        if weight is None:
            raise ConfigError(f"the weights lack {module}.weight")
        if tuple(weight.shape) != shape:
            raise ConfigError(
                f"{module}.weight is {tuple(weight.shape)}, the configuration says {shape}"
            )
        return weight.contiguous()

    def drop(self, name: str) -> None:
        """Forget a tensor that may be there and is not used."""
        self._left.pop(name, None)

    def check_empty(self) -> None:
        """Refuse weights that the computation would silently ignore."""
        ignored = [n for n in self._left if not n.endswith("rotary_emb.inv_freq")]
        if ignored:
            raise ConfigError(f"weights that this architecture does not have: {ignored[:3]}")
        if len(self._dtypes) != 1:
            raise ConfigError(f"weights of several dtypes: {sorted(map(str, self._dtypes))}")


def _take_layer(taken: _WeightTaker, c: ModelConfig, index: int) -> _Layer:
    prefix = f"model.layers.{index}."
    q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def take(module: str, *shape: int) -> Tensor:
        return taken.take(prefix + module, *shape)

    def norm(module: str) -> RmsNorm:
        return RmsNorm(take(module, c.hidden_size), c.rms_norm_eps)

    q = take("self_attn.q_proj", q_rows, c.hidden_size)
    k = take("self_attn.k_proj", kv_rows, c.hidden_size)
    v = take("self_attn.v_proj", kv_rows, c.hidden_size)
    gate = take("mlp.gate_proj", c.intermediate_size, c.hidden_size)
    up = take("mlp.up_proj", c.intermediate_size, c.hidden_size)
    return _Layer(
        input_norm=norm("input_layernorm"),
        qkv=Linear(torch.cat((q, k, v))),
        out=Linear(take("self_attn.o_proj", c.hidden_size, q_rows)),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=Linear(torch.cat((gate, up))),
        down=Linear(take("mlp.down_proj", c.hidden_size, c.intermediate_size)),
    )
