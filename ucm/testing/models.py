"""Models for tests: a tiny seeded Llama, and where the real one is.

The tiny model is random but not degenerate: its logits have a spread of several units, so that
greedy decoding does not hang on the last bit, and its tokenizer round-trips any text.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import platformdirs
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ucm.errors import UcmError
from ucm.model_hub import pull

ConfigValue = int | float | bool | str | None | list[int] | list[str] | dict[str, object]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2 of the tiny vocabulary; 2 ends a reply."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_MERGED_WORDS = ("the", "and", "ing", "block", "cache", "token", "layer", "query", "Ġthe", "Ġand")

_TINY_CONFIG: dict[str, ConfigValue] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_tiny_model(folder: Path, seed: int = 0, **overrides: ConfigValue) -> Path:
    """Write a tiny random Llama model with its tokenizer.

    Args:
        folder: created if need be; gets model.safetensors, config.json, tokenizer.json and
            tokenizer_config.json.
        seed: of the weights; the same seed and overrides give the same bytes.
        overrides: replace keys of config.json, for example `num_hidden_layers=2`.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    config = {**_TINY_CONFIG, "vocab_size": tokenizer.get_vocab_size(), **overrides}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"}, indent=2)
    )
    save_file(tiny_weights(config, seed), str(folder / "model.safetensors"))
    return folder


def tiny_weights(config: dict[str, ConfigValue], seed: int) -> dict[str, Tensor]:
    """Random weights by their Hugging Face names, fp32, scaled so that activations keep size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: value for name, value in config.items() if isinstance(value, int)}
    hidden, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    q_rows = sizes["num_attention_heads"] * sizes["head_dim"]
    kv_rows = sizes["num_key_value_heads"] * sizes["head_dim"]

    def draw(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(gain / columns**0.5)

    weights = {"model.embed_tokens.weight": draw(sizes["vocab_size"], hidden, hidden**0.5)}
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": 1 + 0.1 * draw(1, hidden)[0],
            prefix + "self_attn.q_proj.weight": draw(q_rows, hidden, 2.0),
            prefix + "self_attn.k_proj.weight": draw(kv_rows, hidden),
            prefix + "self_attn.v_proj.weight": draw(kv_rows, hidden),
            prefix + "self_attn.o_proj.weight": draw(hidden, q_rows),
            prefix + "post_attention_layernorm.weight": 1 + 0.1 * draw(1, hidden)[0],
            prefix + "mlp.gate_proj.weight": draw(ffn, hidden),
            prefix + "mlp.up_proj.weight": draw(ffn, hidden),
            prefix + "mlp.down_proj.weight": draw(hidden, ffn),
        }
    weights["model.norm.weight"] = 1 + 0.1 * draw(1, hidden)[0]
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = draw(sizes["vocab_size"], hidden, 4.0)
    return weights


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer: 3 special tokens, 256 bytes and a few merged words."""
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in _MERGED_WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                merges.append((word[: end - 1], word[end - 1]))
                vocab[word[:end]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return tokenizer


def find_real_model() -> Path | None:
    """Folder of the SmolLM2-135M weights, or None where they were not pulled.

    Looks at the environment variable UCM_TEST_MODEL, then where `ucm model pull` puts it.
    """
    named = os.environ.get("UCM_TEST_MODEL")
    pulled = platformdirs.user_cache_path("ucm") / "models" / "smollm2-135m"
    for candidate in (Path(named) if named else pulled, pulled):
        if candidate.is_file() or any(candidate.glob("*.gguf")):
            return candidate
    return None


def require_real_model() -> Path:
    """The real model's folder for a test that needs it; pulled when it is not there yet.

    Where it cannot be had the test is skipped with the reason, but fails where CI=true: a skip
    there would hide that the main job was not tested.
    """
    found = find_real_model()
    if found is not None:
        return found
    try:
        return pull("smollm2-135m", lambda *_: None).path
    except UcmError as error:
        reason = f"SmolLM2-135M could not be pulled; set UCM_TEST_MODEL to a folder: {error}"
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(reason)
    pytest.skip(reason)
