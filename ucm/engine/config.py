"""`ModelConfig`: the shape of a Llama-family decoder, from either of the two formats in use.

Invariant: a configuration that was built describes a model this engine computes exactly. What it
does not know (another architecture, bias terms, another activation, another RoPE scaling) is a
`ConfigError`, never a guess.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucm.errors import ConfigError
from ucm.kernels.rope import Rope, RopeScaling, yarn_magnitude
from ucm.layout import KvDtype, KvLayout

ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a Llama-family decoder."""

    name: str
    """For people; two models never share anything by name alone."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    rms_norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None = None
    tied_head: bool = False
    """The output head is the transposed embedding."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Any of them ends a generation."""

    def __post_init__(self) -> None:
        for name in _POSITIVE_FIELDS:
            if getattr(self, name) < 1:
                raise ConfigError(f"model {self.name}: {name} is {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model {self.name}: {self.num_heads} query heads do not divide into "
                f"{self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model {self.name}: RoPE needs an even head size")
        if not (0 < self.rope_base < math.inf and 0 <= self.rms_norm_eps < math.inf):
            raise ConfigError(
                f"model {self.name}: rope_base is {self.rope_base} and rms_norm_eps "
                f"{self.rms_norm_eps}: no such model can be computed"
            )

    @property
    def rope(self) -> Rope:
        """How its keys and queries are rotated."""
        return Rope(head_dim=self.head_dim, base=self.rope_base, scaling=self.rope_scaling)

    @property
    def rope_scaling_text(self) -> str:
        """RoPE scaling for a fingerprint; `none` without one."""
        return self.rope_scaling.describe() if self.rope_scaling else "none"

    @property
    def num_parameters(self) -> int:
        """Weights that one token passes through, the embedding table left out, the head in."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    def kv_layout(self, block_tokens: int, dtype: KvDtype) -> KvLayout:
        """The layout of one KV block of this model."""
        return KvLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_tokens=block_tokens,
            dtype=dtype,
        )


_POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_context_tokens",
)


def config_from_hf(path: Path) -> ModelConfig:
    """Read a Hugging Face config.json.

    Args:
        path: the file. The model is named after its folder.

    Raises:
        ConfigError: not readable, not of the Llama family, or with a feature that this engine
            does not compute.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the model configuration {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    _check_supported(raw, path)
    try:
        return _build_from_hf(raw, path.resolve().parent.name)
    except KeyError as error:
        raise ConfigError(f"{path}: the key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a value has the wrong type: {error}") from error


def _check_supported(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse what would be computed wrongly."""
    names = raw.get("architectures") or [raw.get("model_type")]
    if ARCHITECTURE not in names and "llama" not in names:
        raise ConfigError(f"{path}: architecture {names}; only {ARCHITECTURE} is supported")
    for key, supported in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if raw.get(key, supported) != supported:
            raise ConfigError(f"{path}: {key} = {raw[key]!r} is not supported")
    positions = raw.get("position_embedding_type") or "rope"
    if str(positions).lower() not in ("rope", "rotary"):
        raise ConfigError(
            f"{path}: positions are {positions!r}, not rotary (RoPE): not supported, and chunks of "
            "such a model could not be reused at other positions"
        )
    if raw.get("no_rope_layers"):
        raise ConfigError(f"{path}: layers without RoPE (no_rope_layers) are not supported")
    if raw.get("rope_interleaved"):
        raise ConfigError(f"{path}: interleaved RoPE is not supported")
    for table in (raw, raw.get("rope_parameters"), raw.get("rope_scaling")):
        if isinstance(table, Mapping) and table.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{path}: RoPE over a part of the head is not supported")


def _build_from_hf(raw: Mapping[str, Any], name: str) -> ModelConfig:
    num_heads = int(raw["num_attention_heads"])
    hidden_size = int(raw["hidden_size"])
    # Transformers 5 keeps the base and the scaling together in rope_parameters.
    rope = raw.get("rope_parameters") or {}
    scaling = rope or raw.get("rope_scaling")
    context_tokens = int(raw.get("max_position_embeddings", 2048))
    return ModelConfig(
        name=name,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
        max_context_tokens=context_tokens,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_base=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        rope_scaling=_scaling_from_hf(scaling, context_tokens),
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_as_ids(raw.get("eos_token_id")),
    )


def _scaling_from_hf(raw: Mapping[str, Any] | None, context_tokens: int) -> RopeScaling | None:
    if not raw:
        return None
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind == "default":
        return None
    original = int(raw.get("original_max_position_embeddings") or context_tokens)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(raw["factor"]),
            low_freq_factor=float(raw["low_freq_factor"]),
            high_freq_factor=float(raw["high_freq_factor"]),
            original_context_tokens=original,
        )
    if kind == "yarn":
        return _yarn_from_hf(raw, context_tokens, original)
    return RopeScaling(kind=kind, factor=float(raw["factor"]))


def _yarn_from_hf(raw: Mapping[str, Any], context_tokens: int, original: int) -> RopeScaling:
    factor = float(raw.get("factor") or context_tokens / original)
    magnitude = raw.get("attention_factor")
    if magnitude is None and raw.get("mscale") and raw.get("mscale_all_dim"):
        magnitude = yarn_magnitude(factor, float(raw["mscale"]))
        magnitude /= yarn_magnitude(factor, float(raw["mscale_all_dim"]))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_tokens=original,
        attention_factor=None if magnitude is None else float(magnitude),
        beta_fast=float(raw.get("beta_fast") or 32.0),
        beta_slow=float(raw.get("beta_slow") or 1.0),
        truncate=bool(raw.get("truncate", True)),
    )


def _as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(v) for v in value)


def config_from_gguf(metadata: Mapping[str, Any], *, tied_head: bool) -> ModelConfig:
    """Read the configuration out of a GGUF file's metadata.

    Args:
        metadata: key to value, as `gguf_weights.GgufFile.metadata` has it.
        tied_head: the file has no output tensor of its own.

    Raises:
        ConfigError: another architecture, a missing key, or an unknown RoPE scaling.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"GGUF architecture {architecture!r}; only llama is supported")
    try:
        return _build_from_gguf(metadata, tied_head=tied_head)
    except KeyError as error:
        raise ConfigError(f"GGUF: the key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"GGUF: a value has the wrong type: {error}") from error


def _build_from_gguf(metadata: Mapping[str, Any], *, tied_head: bool) -> ModelConfig:
    num_heads = int(metadata["llama.attention.head_count"])
    hidden_size = int(metadata["llama.embedding_length"])
    head_dim = int(metadata.get("llama.attention.key_length", hidden_size // num_heads))
    if int(metadata.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise ConfigError("GGUF: RoPE over a part of the head is not supported")
    vocab_size = metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"])
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    eot = metadata.get("tokenizer.ggml.eot_token_id")
    return ModelConfig(
        name=str(metadata.get("general.basename") or metadata.get("general.name") or "gguf"),
        vocab_size=int(vocab_size),
        hidden_size=hidden_size,
        intermediate_size=int(metadata["llama.feed_forward_length"]),
        num_layers=int(metadata["llama.block_count"]),
        num_heads=num_heads,
        num_kv_heads=int(metadata.get("llama.attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        max_context_tokens=int(metadata["llama.context_length"]),
        rms_norm_eps=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
        rope_base=float(metadata.get("llama.rope.freq_base", 10_000.0)),
        rope_scaling=_scaling_from_gguf(metadata),
        tied_head=tied_head,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(int(i) for i in (eos, eot) if i is not None)),
    )


def _scaling_from_gguf(metadata: Mapping[str, Any]) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = float(metadata["llama.rope.scaling.factor"])
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        context = metadata["llama.rope.scaling.original_context_length"]
        return RopeScaling(kind="yarn", factor=factor, original_context_tokens=int(context))
    raise ConfigError(f"GGUF RoPE scaling {kind!r} is not supported; linear and yarn are")
