from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ucm.engine.config import config_from_hf
from ucm.engine.gguf_weights import GgufFile, unpermute_rows
from ucm.engine.loading import find_gguf, load_model, load_weights
from ucm.engine.weights import digest_files, load_safetensors, safetensors_files
from ucm.errors import ConfigError, CorruptionError
from ucm.testing.models import write_tiny_model

QUANTISED = ("Q8_0", "Q4_0", "Q4_1")
"""Formats that the gguf package can also write; of the K-quants it only reads."""


def permute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in GGUF_NAMES:
        return f"{GGUF_NAMES[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def write_gguf(folder: Path, file: Path, quantisation: str = "F32") -> Path:
    """The tiny model of `folder` as GGUF; matrices in `quantisation`, norms in fp32."""
    config = config_from_hf(folder / "config.json")
    kind = gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab_size)
    raw = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_eos_token_id(2)
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.numpy()
        if ".q_proj." in name:
            array = permute_rows(array, config.num_heads)
        if ".k_proj." in name:
            array = permute_rows(array, config.num_kv_heads)
        used = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), used)
        writer.add_tensor(gguf_name(name), data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def test_safetensors_are_read_and_converted(tiny: Path) -> None:
    files = safetensors_files(tiny)
    weights = load_safetensors(files, torch.bfloat16)
    original = load_file(files[0])
    assert weights.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(weights[name], tensor.to(torch.bfloat16))


def test_shards_give_the_same_weights_as_one_file(tiny: Path) -> None:
    whole = load_safetensors(safetensors_files(tiny), torch.float32)
    names = sorted(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: whole[name] for name in members}, str(tiny / shard))
    (tiny / "model.safetensors").unlink()
    index = {"weight_map": {n: shard for shard, members in shards.items() for n in members}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    files = safetensors_files(tiny)
    assert [file.name for file in files] == sorted(shards)
    again = load_safetensors(files, torch.float32)
    assert all(torch.equal(whole[name], again[name]) for name in names)
    assert len(load_model(tiny).weights_digest) == 64


@pytest.mark.parametrize("shard", ["gone.safetensors", "../outside.safetensors"])
def test_an_index_that_names_another_place_is_refused(tiny: Path, shard: str) -> None:
    (tiny.parent / "outside.safetensors").write_bytes(b"")
    index = tiny / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ConfigError, match="shard"):
        safetensors_files(tiny)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}'])
def test_a_bad_index_is_refused(tiny: Path, text: str) -> None:
    (tiny / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match="index"):
        safetensors_files(tiny)


def test_truncated_safetensors_are_corrupt(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptionError, match="safetensors"):
        load_model(tiny)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, dtype=torch.int8)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(ConfigError, match="int8"):
        load_safetensors(safetensors_files(tmp_path), torch.float32)


def test_digest_of_one_file_is_its_sha256(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    assert digest_files([a]) == hashlib.sha256(b"one").hexdigest()
    assert len({digest_files([a, b]), digest_files([b, a]), digest_files([b])}) == 3
    with pytest.raises(ConfigError):
        digest_files([tmp_path / "c"])


def test_gguf_equals_the_safetensors_it_was_made_from(tiny: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf")
    config, weights = load_weights(file)
    original = load_file(tiny / "model.safetensors")
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)
    assert not config.tied_head
    loaded = load_model(file)
    assert loaded.weights_digest == hashlib.sha256(file.read_bytes()).hexdigest()
    text = "the cache <|im_end|> x"
    assert loaded.tokenizer.encode(text) == load_model(tiny).tokenizer.encode(text)


@pytest.mark.parametrize("quantisation", ["F16", "BF16", *QUANTISED])
def test_gguf_quantisations_are_close_to_the_original(
    tiny: Path, tmp_path: Path, quantisation: str
) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf", quantisation)
    weights = load_weights(file)[1]
    worst = 2**-8 if quantisation.endswith("F16") else 2**-7 if quantisation == "Q8_0" else 2**-3
    for name, tensor in load_file(tiny / "model.safetensors").items():
        assert float((weights[name] - tensor).abs().max()) <= worst * float(tensor.abs().max())


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants_are_what_the_gguf_package_dequantises(tmp_path: Path, kind: str) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    block_bytes = gguf.GGML_QUANT_SIZES[quantisation][1]
    raw = np.random.default_rng(0).integers(0, 64, (4, block_bytes), dtype=np.uint8)
    file = tmp_path / "k.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = config_from_hf(write_tiny_model(tmp_path / "m") / "config.json")
    loaded = GgufFile(file).load(config, torch.float32)["model.embed_tokens.weight"]
    assert loaded.shape == (4, 256)
    assert np.array_equal(loaded.numpy(), gguf.quants.dequantize(raw, quantisation))


def test_the_quick_reader_equals_the_packages_own(tiny: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf", "Q4_1")
    theirs = {name: f.contents() for name, f in gguf.GGUFReader(str(file)).fields.items()}
    assert GgufFile(file).metadata == theirs


def test_unpermute_undoes_llama_cpp() -> None:
    weight = np.arange(3 * 8 * 2, dtype=np.float32).reshape(24, 2)
    assert np.array_equal(unpermute_rows(permute_rows(weight, 3), 3), weight)
    assert not np.array_equal(permute_rows(weight, 3), weight)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing at all, but long enough" * 9])
def test_what_is_not_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises((ConfigError, CorruptionError)):
        load_model(file)


def test_a_truncated_gguf_is_corrupt(tiny: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CorruptionError):
        load_model(file)


def test_a_folder_is_searched_for_one_gguf(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ucm model pull"):
        find_gguf(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert find_gguf(tmp_path).name == "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match="2 GGUF files"):
        load_model(tmp_path)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize("dtype", ["fp8", torch.float16])
def test_an_unsupported_dtype_is_refused(tiny: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="supported"):
        load_model(tiny, dtype)
