from __future__ import annotations

import json
from pathlib import Path

import pytest

from ucm.engine.config import ModelConfig, config_from_gguf, config_from_hf
from ucm.errors import ConfigError
from ucm.kernels.rope import RopeScaling
from ucm.layout import KvDtype

HF: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000.0,
    "vocab_size": 291,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 0],
}

GGUF: dict[str, object] = {
    "general.architecture": "llama",
    "general.basename": "tiny",
    "llama.block_count": 3,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50_000.0,
    "llama.rope.dimension_count": 16,
    "llama.vocab_size": 291,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 0,
}


def read_hf(folder: Path, **changes: object) -> ModelConfig:
    merged = {**HF, **changes}
    kept = {key: value for key, value in merged.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))
    return config_from_hf(folder / "config.json")


def test_both_formats_give_the_same_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    expected = ModelConfig(
        name="tiny",
        vocab_size=291,
        hidden_size=64,
        intermediate_size=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_context_tokens=4096,
        rms_norm_eps=1e-5,
        rope_base=50_000.0,
        tied_head=True,
        bos_token_id=1,
        eos_token_ids=(2, 0),
    )
    assert read_hf(folder) == expected
    assert config_from_gguf(GGUF, tied_head=True) == expected


def test_defaults_of_what_a_config_may_leave_out(tmp_path: Path) -> None:
    config = read_hf(
        tmp_path, num_key_value_heads="absent", rope_theta="absent", eos_token_id="absent"
    )
    assert (config.num_kv_heads, config.rope_base, config.eos_token_ids) == (4, 10_000.0, ())
    assert config.rope_scaling_text == "none"


def test_transformers_5_rope_parameters(tmp_path: Path) -> None:
    config = read_hf(
        tmp_path, rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 7.0}
    )
    assert (config.rope_base, config.rope_scaling) == (7.0, None)


def test_rope_scalings(tmp_path: Path) -> None:
    linear = read_hf(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})
    assert linear.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = read_hf(tmp_path, rope_scaling=llama3)
    text = "llama3(factor=32.0,low=1.0,high=4.0,original=8192)"
    assert config.rope_scaling_text == text
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = read_hf(tmp_path, rope_scaling=yarn)
    text = (
        "yarn(factor=4.0,original=32,magnitude=1.138629436111989,fast=32.0,slow=1.0,truncate=True)"
    )
    assert config.rope_scaling_text == text
    both = {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert read_hf(tmp_path, rope_scaling=both).rope.magnitude == 1.0
    for kind in ("ntk", "dynamic"):
        config = read_hf(tmp_path, rope_scaling={"rope_type": kind, "factor": 2.0})
        assert config.rope_scaling_text == f"{kind}(factor=2.0)"
    gguf = {**GGUF, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert config_from_gguf(gguf, tied_head=True).rope_scaling == linear.rope_scaling


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("architectures", ["MistralForCausalLM"], "MistralForCausalLM"),
        ("attention_bias", True, "attention_bias"),
        ("mlp_bias", True, "mlp_bias"),
        ("hidden_act", "gelu", "hidden_act"),
        ("rope_interleaved", True, "interleaved"),
        ("position_embedding_type", "learned", "not rotary"),
        ("no_rope_layers", [1, 0, 1], "no_rope_layers"),
        ("rope_scaling", {"type": "longrope", "factor": 2.0}, "longrope"),
        ("rope_scaling", {"type": "yarn", "factor": -2.0}, "factor"),
        ("partial_rotary_factor", 0.5, "part of the head"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "part of the head"),
        ("rope_theta", -1.0, "rope_base"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("vocab_size", "absent", "vocab_size"),
        ("num_key_value_heads", 3, "3 KV heads"),
        ("head_dim", 15, "even"),
        ("num_hidden_layers", 0, "num_layers"),
        ("hidden_size", [1], "wrong type"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    tmp_path: Path, key: str, value: object, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        read_hf(tmp_path, **{key: value})


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError):
        config_from_hf(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"general.architecture": "gemma"}, "gemma"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"llama.rope.dimension_count": 8}, "part of the head"),
        ({"llama.block_count": None}, "wrong type"),
    ],
)
def test_gguf_that_cannot_be_computed_is_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        config_from_gguf({**GGUF, **changes}, tied_head=True)


def test_gguf_without_a_needed_key_is_refused() -> None:
    short = {key: value for key, value in GGUF.items() if key != "llama.context_length"}
    with pytest.raises(ConfigError, match="context_length"):
        config_from_gguf(short, tied_head=True)


def test_sizes_that_follow_from_the_shape() -> None:
    config = config_from_gguf(GGUF, tied_head=True)
    per_layer = 64 * 16 * 2 * (4 + 2) + 3 * 64 * 128
    assert config.num_parameters == 3 * per_layer + 291 * 64
    layout = config.kv_layout(32, KvDtype.BFLOAT16)
    assert layout.slab_shape == (2, 2, 32, 16)
    assert layout.num_layers == 3
