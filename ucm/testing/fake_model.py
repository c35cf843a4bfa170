"""Doubles for engine tests: a model whose logits depend on every row it reads, and a tokenizer.

`FakeModel` writes a digest of the whole chain up to a position into that position's row, taken from
the row *before it in the pool*, and folds all rows of all layers into the logits, each layer when a
decoder would read it. A wrong block table, a row of another sequence, a stale or half-copied block,
a slab that is read before it arrives or a skipped position therefore changes the output.
`FakeModel.logits_for` is the oracle: the same function without a pool.
All values are integers below 2**24, exact in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ucm.engine.model import ForwardItem
from ucm.engine.sampling import Draw, SamplingParams, sample

_MODULUS = 16_777_213
_EMPTY_DIGEST = 17
_DAMAGED = -1
"""Stands for the rows of one layer when any of them cannot be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeConfig:
    """Shape of a `FakeModel`."""

    num_layers: int = 2
    num_kv_heads: int = 2
    head_dim: int = 4
    vocab_size: int = 97
    max_context_tokens: int = 4096


@dataclass(slots=True)
class FakeModel:
    """A deterministic function of the KV it reads; see the module."""

    config: FakeConfig = field(default_factory=FakeConfig)
    dtype: torch.dtype = torch.float32
    batch_sizes: list[int] = field(default_factory=list)
    """Tokens of each pass, for tests of the scheduler."""

    def forward(
        self,
        items: Sequence[ForwardItem],
        kv_pool: torch.Tensor,
        *,
        wait_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Layer by layer, write the items' rows and read all rows; see `DecoderModel.forward`."""
        self.batch_sizes.append(sum(len(item.token_ids) for item in items))
        folds: list[list[int]] = [[] for _ in items]
        digests: list[list[int]] = []
        for layer in range(self.config.num_layers):
            if wait_layer is not None:
                wait_layer(layer)
            if layer == 0:
                digests = [self._digests(item, kv_pool) for item in items]
            for item, values, of_item in zip(items, digests, folds, strict=True):
                self._write(item, values, kv_pool, layer)
                of_item.append(self._read(item, kv_pool[layer]))
                if of_item[-1] == _DAMAGED:
                    values[:] = [_DAMAGED] * len(values)  # as attention would: from here on
        return torch.stack([self._logits(of_item) for of_item in folds])

    def logits_for(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[vocab] what a correct engine gets after `token_ids`."""
        rows = self.rows_for(token_ids).to(torch.int64).numpy()
        return self._logits([_fold(of_layer) for of_layer in rows])

    def rows_for(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[layers, positions, 3] the first values of each row that a correct pool holds."""
        digests = _chain_digests(_EMPTY_DIGEST, token_ids, 0)
        rows = np.array([digests, list(token_ids), range(len(token_ids))], dtype=np.float32).T
        layers = np.arange(self.config.num_layers, dtype=np.float32)[:, None, None]
        return torch.from_numpy(rows + layers)

    def _digests(self, item: ForwardItem, kv_pool: torch.Tensor) -> list[int]:
        """The digest of each of the item's positions, from the row before the first."""
        size = kv_pool.shape[4]
        previous = _EMPTY_DIGEST
        if item.start > 0:
            block_id = item.block_ids[(item.start - 1) // size]
            value = float(kv_pool[0, block_id, 0, 0, (item.start - 1) % size, 0])
            previous = int(value) if math.isfinite(value) else _DAMAGED
        return _chain_digests(previous, item.token_ids, item.start)

    def _write(
        self, item: ForwardItem, digests: Sequence[int], kv_pool: torch.Tensor, layer: int
    ) -> None:
        size = kv_pool.shape[4]
        for offset, (token_id, digest) in enumerate(zip(item.token_ids, digests, strict=True)):
            position = item.start + offset
            block_id, row = item.block_ids[position // size], position % size
            values = torch.tensor([digest, token_id, position], dtype=torch.float32) + layer
            kv_pool[layer, block_id, :, :, row, :3] = values

    def _read(self, item: ForwardItem, kv_layer: torch.Tensor) -> int:
        """One number of all the rows that attention would read, or `_DAMAGED`."""
        size = kv_layer.shape[3]
        length = item.start + len(item.token_ids)
        block_ids = list(item.block_ids[: -(-length // size)])
        # [blocks, 2, heads, rows, 3] -> [2 * heads, positions, 3]
        slabs = kv_layer[block_ids, :, :, :, :3].permute(1, 2, 0, 3, 4)
        rows = slabs.reshape(-1, len(block_ids) * size, 3)[:, :length]
        # Heads, and keys and values, hold the same here: any difference is a damaged row. Rows
        # behind the last token are masked by real attention, but 0 times NaN is NaN.
        if not bool((rows == rows[0]).all()) or not bool(slabs.isfinite().all()):
            return _DAMAGED
        return _fold(rows[0].to(torch.int64).numpy())

    def _logits(self, folds: Sequence[int]) -> torch.Tensor:
        seed = np.array([sum((9 * i + 1) * fold for i, fold in enumerate(folds)) % _MODULUS, 0])
        generator = np.random.Generator(np.random.Philox(key=seed.astype(np.uint64)))
        values = 3.0 * generator.standard_normal(self.config.vocab_size)
        return torch.from_numpy(values.astype(np.float32))


def _chain_digests(previous: int, token_ids: Sequence[int], start: int) -> list[int]:
    digests: list[int] = []
    for position, token_id in enumerate(token_ids, start):
        previous = (previous * 31 + token_id * 7919 + position) % (_MODULUS - 64)
        digests.append(previous)
    return digests


def _fold(rows: npt.NDArray[np.int64]) -> int:
    """One number that changes with any value and with the order of the rows."""
    weights = np.arange(1, len(rows) + 1)[:, None] * np.array([[3, 5, 7]])
    return int((rows * weights % _MODULUS).sum() % _MODULUS)


def reference_tokens(
    model: FakeModel, prompt: Sequence[int], params: SamplingParams, index: int = 0
) -> tuple[int, ...]:
    """What sample `index` of a request must produce, computed without an engine."""
    tokens = list(prompt)
    seen = np.zeros(model.config.vocab_size, dtype=np.bool_)
    seen[tokens] = True
    while len(tokens) < len(prompt) + params.max_tokens:
        draw = Draw(
            row=0, params=params, sample_index=index, position=len(tokens), seen=seen.copy()
        )
        (token_id,) = sample(model.logits_for(tokens)[None, :], [draw])
        tokens.append(token_id)
        seen[token_id] = True
        if token_id in params.stop_token_ids:
            break
    return tuple(tokens[len(prompt) :])


class FakeStream:
    """One character a token."""

    def push(self, token_id: int) -> str:
        """See `TokenStream.push`."""
        return chr(32 + token_id)

    def flush(self) -> str:
        """See `TokenStream.flush`."""
        return ""


@dataclass(frozen=True, slots=True)
class FakeTokenizer:
    """One token a printable ASCII character, its code less 32; token 95 (DEL) ends a sample."""

    eos_ids: frozenset[int] = frozenset({95})

    def encode(self, text: str) -> list[int]:
        """See `TextCodec.encode`."""
        return [ord(character) - 32 for character in text]

    def encode_plain(self, text: str) -> list[int]:
        """See `TextCodec.encode_plain`."""
        return self.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `TextCodec.decode`."""
        return "".join(chr(32 + token_id) for token_id in token_ids)

    def stream(self) -> FakeStream:
        """See `TextCodec.stream`."""
        return FakeStream()
