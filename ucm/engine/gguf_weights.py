"""Weights and metadata of a GGUF file, turned into Hugging Face's names and shapes.

The `gguf` package parses the file and dequantises (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K
and what else it knows) to fp32; this module renames and undoes what llama.cpp's converter did:
it stores the rows of q and k with the two RoPE halves of a head interleaved.

    llama.cpp   row (h, i, j)   ->   Hugging Face   row (h, j, i)      i < D/2, j < 2
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from ucm.errors import ConfigError, CorruptionError

from .config import ModelConfig

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class _QuickReader(gguf.GGUFReader):
    """The package's reader with its innermost access made 5 times cheaper.

    Slicing `np.memmap` for each of 250,000 fields of a tokenizer takes seconds.
    """

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None
    ) -> np.ndarray[Any, Any]:
        """`count` numbers at `offset`, a view of the file."""
        order: Any = override_order or self.byte_order
        return np.frombuffer(self.data, np.dtype(dtype).newbyteorder(order), int(count), offset)


class GgufFile:
    """One GGUF file, memory-mapped; tensors are dequantised when asked for."""

    def __init__(self, path: Path) -> None:
        """Parse the header.

        Raises:
            ConfigError: the file cannot be opened.
            CorruptionError: it is not a GGUF file, or truncated.
        """
        try:
            self._reader = _QuickReader(str(path))
        except OSError as error:
            raise ConfigError(f"cannot open {path}: {error}") from error
        except (ValueError, IndexError, KeyError) as error:
            raise CorruptionError(f"{path} is not a readable GGUF file: {error}") from error
        self.path = path
        self._metadata: dict[str, Any] | None = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All keys and their values as plain Python objects, decoded once."""
        if self._metadata is None:
            fields = self._reader.fields.items()
            self._metadata = {name: field.contents() for name, field in fields}
        return self._metadata

    @property
    def tensor_names(self) -> set[str]:
        """Names as the file has them."""
        return {tensor.name for tensor in self._reader.tensors}

    def load(self, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors under Hugging Face's names, q and k in Hugging Face's row order.

        Raises:
            ConfigError: a tensor whose meaning or quantisation is unknown.
        """
        weights: dict[str, Tensor] = {}
        for tensor in self._reader.tensors:
            name = _hf_name(tensor.name)
            array = _dequantize(tensor)
            if name.endswith("q_proj.weight"):
                array = unpermute_rows(array, config.num_heads)
            elif name.endswith("k_proj.weight"):
                array = unpermute_rows(array, config.num_kv_heads)
            # The reader's arrays view a read-only map; a copy also lets the map go.
            weights[name] = torch.from_numpy(np.array(array, copy=True)).to(dtype)
        return weights


def _hf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ConfigError(f"GGUF tensor {name!r} does not belong to a plain Llama model")


def _dequantize(tensor: gguf.ReaderTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        array: np.ndarray[Any, np.dtype[np.float32]] = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ConfigError(
            f"GGUF tensor {tensor.name} has quantisation {tensor.tensor_type.name}, "
            "which the gguf package does not dequantise"
        ) from error
    return array


def unpermute_rows(
    weight: np.ndarray[Any, np.dtype[np.float32]], num_heads: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Undo llama.cpp's interleaving of RoPE halves.

    Args:
        weight: [num_heads * head_dim, in].
        num_heads: heads that the rows divide into.

    Returns:
        The same shape, rows in Hugging Face's half-split order.
    """
    rows, columns = weight.shape
    split = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)
