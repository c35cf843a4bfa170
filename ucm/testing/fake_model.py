"""Doubles for engine tests: a model whose logits depend on every row it reads, and a tokenizer.

`FakeModel` writes a digest of the whole chain up to a position into that position's row, taken from
the row *before it in the pool*, and folds all rows of all layers into the logits. A wrong block
table, a row of another sequence, a stale or half-copied block or a skipped position therefore
changes the output. `FakeModel.logits_for` is the oracle: the same function without a pool.
All values are integers below 2**24, exact in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ucm.engine.model import ForwardItem
from ucm.engine.sampling import Draw, SamplingParams, sample

_MODULUS = 16_777_213
_EMPTY_DIGEST = 17


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
        """Write the items' rows, read all rows back; see `DecoderModel.forward`."""
        self.batch_sizes.append(sum(len(item.token_ids) for item in items))
        for layer in range(self.config.num_layers if wait_layer else 0):
            assert wait_layer is not None
            wait_layer(layer)
        for item in items:
            self._write(item, kv_pool)
        return torch.stack([self._read(item, kv_pool) for item in items])

    def logits_for(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[vocab] what a correct engine gets after `token_ids`."""
        digests = _chain_digests(_EMPTY_DIGEST, token_ids, 0)
        rows = np.array([digests, list(token_ids), range(len(token_ids))], dtype=np.int64).T
        layers = np.arange(self.config.num_layers)[:, None]
        return self._logits([_fold(rows + layer) for layer in layers])

    def _write(self, item: ForwardItem, kv_pool: torch.Tensor) -> None:
        size = kv_pool.shape[4]
        previous = _EMPTY_DIGEST
        if item.start > 0:
            block_id = item.block_ids[(item.start - 1) // size]
            previous = int(kv_pool[0, block_id, 0, 0, (item.start - 1) % size, 0])
        digests = _chain_digests(previous, item.token_ids, item.start)
        for offset, (token_id, digest) in enumerate(zip(item.token_ids, digests, strict=True)):
            position = item.start + offset
            block_id, row = item.block_ids[position // size], position % size
            values = torch.tensor([digest, token_id, position], dtype=torch.float32)
            layers = torch.arange(kv_pool.shape[0], dtype=torch.float32)
            written = values[None, :] + layers[:, None]
            kv_pool[:, block_id, :, :, row, :3] = written[:, None, None, :]

    def _read(self, item: ForwardItem, kv_pool: torch.Tensor) -> torch.Tensor:
        size = kv_pool.shape[4]
        length = item.start + len(item.token_ids)
        block_ids = list(item.block_ids[: -(-length // size)])
        slabs = kv_pool[:, block_ids, :, :, :, :3].to(torch.int64).numpy()
        # [layers, 2, heads, positions, 3]
        rows = slabs.transpose(0, 2, 3, 1, 4, 5).reshape(*slabs.shape[:1], 2, -1, size, 3)
        rows = rows.reshape(slabs.shape[0], 2, slabs.shape[3], -1, 3)[:, :, :, :length]
        folds = [
            [_fold(rows[layer, kind, head]) for kind in range(2) for head in range(rows.shape[2])]
            for layer in range(rows.shape[0])
        ]
        # Heads, and keys and values, hold the same here: any difference is a damaged row.
        return self._logits([values[0] if len(set(values)) == 1 else -1 for values in folds])

    def _logits(self, folds: Sequence[int]) -> torch.Tensor:
        seed = np.array([sum((9 * i + 1) * fold for i, fold in enumerate(folds)), 0])
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

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `TextCodec.decode`."""
        return "".join(chr(32 + token_id) for token_id in token_ids)

    def stream(self) -> FakeStream:
        """See `TextCodec.stream`."""
        return FakeStream()
