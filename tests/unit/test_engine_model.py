from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ucm.engine.config import ModelConfig
from ucm.engine.loading import load_model, load_weights
from ucm.engine.model import ForwardItem, LlamaModel
from ucm.errors import ConfigError, LayoutMismatchError
from ucm.kernels.attention import PagedSequence, tiled_attention
from ucm.testing.models import ConfigValue, write_tiny_model

BLOCK = 32
TOKENS = torch.randint(3, 290, (150,), generator=torch.Generator().manual_seed(7)).tolist()
BLOCK_IDS = [6, 2, 3, 9, 0]


def make_pool(config: ModelConfig, dtype: torch.dtype = torch.float32, blocks: int = 12) -> Tensor:
    shape = (config.num_layers, blocks, 2, config.num_kv_heads, BLOCK, config.head_dim)
    return torch.zeros(shape, dtype=dtype)


def plain_logits(config: ModelConfig, weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Llama written out with nothing but its definition: one sequence, no cache, fp64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    half, count = config.head_dim // 2, len(tokens)
    pairs = torch.arange(half, dtype=torch.float64)
    angles = torch.outer(
        torch.arange(count, dtype=torch.float64), config.rope_base ** (-2 * pairs / config.head_dim)
    )

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * w[f"{name}.weight"]

    def heads(x: Tensor, name: str, count_: int) -> Tensor:
        return (x @ w[f"{name}.weight"].t()).view(count, count_, -1).transpose(0, 1)

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat(
            (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1
        )

    x = w["model.embed_tokens.weight"][tokens]
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        y = norm(x, f"{prefix}.input_layernorm")
        q = turn(heads(y, f"{prefix}.self_attn.q_proj", config.num_heads))
        k = turn(heads(y, f"{prefix}.self_attn.k_proj", config.num_kv_heads))
        v = heads(y, f"{prefix}.self_attn.v_proj", config.num_kv_heads)
        repeat = config.num_heads // config.num_kv_heads
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        scores = (q @ k.transpose(1, 2)) * config.head_dim**-0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1)
        x = x + out @ w[f"{prefix}.self_attn.o_proj.weight"].t()
        y = norm(x, f"{prefix}.post_attention_layernorm")
        gate = F.silu(y @ w[f"{prefix}.mlp.gate_proj.weight"].t())
        x = x + (gate * (y @ w[f"{prefix}.mlp.up_proj.weight"].t())) @ (
            w[f"{prefix}.mlp.down_proj.weight"].t()
        )
    head = w["model.embed_tokens.weight" if config.tied_head else "lm_head.weight"]
    return (norm(x, "model.norm") @ head.t()).float()


SHAPES: dict[str, dict[str, ConfigValue]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "wide_heads": {"head_dim": 32, "rope_theta": 500.0},
}


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("attention", [None, "tiled"])
def test_equals_the_definition(tmp_path: Path, shape: str, attention: str | None) -> None:
    folder = write_tiny_model(tmp_path, seed=0, **SHAPES[shape])
    config, weights = load_weights(folder)
    expected = plain_logits(config, weights, TOKENS)
    model = LlamaModel(config, weights)
    pool = make_pool(config)
    spans = [(0, 1), (1, 70), (70, 140), *((i, i + 1) for i in range(140, 150))]
    for begin, end in spans:
        item = ForwardItem(TOKENS[begin:end], begin, BLOCK_IDS)
        logits = model.forward([item], pool, attention=attention)
        assert logits.shape == (1, config.vocab_size)
        torch.testing.assert_close(logits[0], expected[end - 1], atol=1e-3, rtol=0)


@pytest.fixture
def tiny(tmp_path: Path) -> LlamaModel:
    return load_model(write_tiny_model(tmp_path)).model


def test_a_batch_equals_its_items_alone(tiny: LlamaModel) -> None:
    pool = make_pool(tiny.config, blocks=20)
    tiny.forward([ForwardItem(TOKENS[:40], 0, [0, 1])], pool)
    items = [
        ForwardItem(TOKENS[40:41], 40, [0, 1]),
        ForwardItem(TOKENS[:70], 0, [5, 4, 3]),
        ForwardItem(TOKENS[9:10], 0, [7]),
    ]
    alone_pool = pool.clone()
    alone = torch.cat([tiny.forward([item], alone_pool) for item in items])
    together = tiny.forward(items, pool)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(pool, alone_pool, atol=1e-5, rtol=0)


def test_kv_lands_where_the_blocks_say(tiny: LlamaModel) -> None:
    there, elsewhere = make_pool(tiny.config), make_pool(tiny.config)
    tiny.forward([ForwardItem(TOKENS[:50], 0, [1, 2])], there)
    tiny.forward([ForwardItem(TOKENS[:50], 0, [10, 4])], elsewhere)
    assert torch.equal(there[:, [1, 2]], elsewhere[:, [10, 4]])
    written = there.abs().sum(dim=(0, 2, 3, 5)) > 0
    assert written.nonzero().tolist() == [[1, i] for i in range(32)] + [[2, i] for i in range(18)]


def test_kv_copied_from_another_pool_gives_the_same_logits(tiny: LlamaModel) -> None:
    first, second = make_pool(tiny.config), make_pool(tiny.config)
    item = ForwardItem(TOKENS[64:100], 64, [3, 1, 0, 8])
    tiny.forward([ForwardItem(TOKENS[:64], 0, [3, 1])], first)
    second[:, [3, 1]] = first[:, [3, 1]]
    assert torch.equal(tiny.forward([item], first), tiny.forward([item], second))


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    exact, rounded = load_model(folder), load_model(folder, "bf16")
    item = ForwardItem(TOKENS[:64], 0, [0, 1])
    expected = exact.model.forward([item], make_pool(exact.config))[0]
    pool = make_pool(rounded.config, torch.bfloat16)
    logits = rounded.model.forward([item], pool)[0]
    assert logits.dtype is torch.float32
    assert float(F.cosine_similarity(logits, expected, dim=0)) > 0.995


def test_a_layers_attention_reads_what_arrives_while_it_is_waited_for(tiny: LlamaModel) -> None:
    whole, pool = make_pool(tiny.config), make_pool(tiny.config)
    item = ForwardItem(TOKENS[64:100], 64, [3, 1, 0, 8])
    tiny.forward([ForwardItem(TOKENS[:64], 0, [3, 1])], whole)
    pool[:, [3, 1]] = torch.nan
    waited: list[int] = []

    def wait(layer: int) -> None:
        pool[layer, [3, 1]] = whole[layer, [3, 1]]
        written = pool[:, [0, 8]].abs().amax(dim=(1, 2, 3, 4, 5)) > 0
        assert written[:layer].all(), "earlier layers are final: they may be copied out"
        assert not written[layer + 1 :].any()
        waited.append(layer)

    logits = tiny.forward([item], pool, wait_layer=wait)
    assert waited == [0, 1, 2]
    assert torch.equal(logits, tiny.forward([item], whole))


def test_an_item_may_bring_its_own_attention(tiny: LlamaModel) -> None:
    dense, sparse = make_pool(tiny.config), make_pool(tiny.config)
    for pool in (dense, sparse):
        tiny.forward([ForwardItem(TOKENS[:64], 0, [3, 1])], pool)
    layers: list[int] = []

    def attend(layer: int, q_THD: Tensor, kv_layer: Tensor) -> Tensor:
        layers.append(layer)
        return tiled_attention(q_THD, kv_layer, PagedSequence.build(64, 6, [3, 1, 8], kv_layer))[0]

    other = ForwardItem(TOKENS[:5], 0, [5])
    own = ForwardItem(TOKENS[64:70], 64, [-1, -1, 8], attention=attend)
    logits = tiny.forward([other, own], sparse)
    expected = tiny.forward([other, ForwardItem(TOKENS[64:70], 64, [3, 1, 8])], dense)
    assert layers == [0, 1, 2]
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(sparse, dense)


def test_a_pass_that_was_ended_between_layers_can_be_repeated(tiny: LlamaModel) -> None:
    item = ForwardItem(TOKENS[:40], 0, [3, 1])
    pool = make_pool(tiny.config)

    def wait(layer: int) -> None:
        if layer == 1:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        tiny.forward([item], pool, wait_layer=wait)
    assert torch.equal(tiny.forward([item], pool), tiny.forward([item], make_pool(tiny.config)))


def test_logits_may_be_written_to(tiny: LlamaModel) -> None:
    logits = tiny.forward([ForwardItem(TOKENS[:5], 0, [0])], make_pool(tiny.config))
    logits.div_(2.0)
    assert not logits.is_inference()


@pytest.mark.parametrize(
    "item",
    [
        ForwardItem([], 0, [0]),
        ForwardItem([1], 4096, list(range(129))),
        ForwardItem([1] * 33, 0, [0]),
        ForwardItem([1], 0, [99]),
    ],
)
def test_an_item_that_does_not_fit_is_refused(tiny: LlamaModel, item: ForwardItem) -> None:
    with pytest.raises(LayoutMismatchError):
        tiny.forward([item], make_pool(tiny.config))


def test_a_pool_that_does_not_fit_is_refused(tiny: LlamaModel) -> None:
    item = ForwardItem([1], 0, [0])
    good = make_pool(tiny.config)
    for pool in (good.to(torch.bfloat16), good[:2], good.transpose(3, 4), good[..., :8], good[0]):
        with pytest.raises(LayoutMismatchError, match="KV pool"):
            tiny.forward([item], pool)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config, weights = load_weights(write_tiny_model(tmp_path))
    short = {name: tensor for name, tensor in weights.items() if "o_proj" not in name}
    with pytest.raises(ConfigError, match=r"lack .*o_proj"):
        LlamaModel(config, short)
    with pytest.raises(ConfigError, match="does not have"):
        LlamaModel(config, {**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is \(3,\)"):
        LlamaModel(config, {**weights, "model.norm.weight": torch.ones(3)})
    with pytest.raises(ConfigError, match="several dtypes"):
        LlamaModel(config, {**weights, "model.norm.weight": torch.ones(64, dtype=torch.half)})


def test_the_tiny_model_is_seeded(tmp_path: Path) -> None:
    files = [write_tiny_model(tmp_path / str(i), seed=i // 2) for i in range(3)]
    bytes_ = [(folder / "model.safetensors").read_bytes() for folder in files]
    assert bytes_[0] == bytes_[1] != bytes_[2]


def test_the_next_layers_queries_are_foretold_and_cost_nothing_else(tmp_path: Path) -> None:
    loaded = load_model(write_tiny_model(tmp_path))
    model, config = loaded.model, loaded.config
    told: list[tuple[int, Tensor]] = []
    events: list[str] = []
    asked: dict[int, Tensor] = {}

    def look_ahead(layer: int, q_THD: Tensor, /) -> None:
        told.append((layer, q_THD))
        events.append(f"ahead {layer}")

    def attend(layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        events.append(f"attend {layer}")
        asked[layer] = q_THD.clone()
        return torch.zeros_like(q_THD)

    others = ForwardItem(TOKENS[40:50], 0, BLOCK_IDS[1:])
    item = ForwardItem(TOKENS[:33], 0, [10, 11], attend, look_ahead)
    plain = ForwardItem(TOKENS[:33], 0, [10, 11], attend)
    logits = model.forward([others, item], make_pool(config))
    assert events == ["ahead 1", "attend 0", "ahead 2", "attend 1", "attend 2"]
    assert torch.equal(logits, model.forward([others, plain], make_pool(config)))
    # With no attention at all a layer adds what its MLP adds: close, and the same tokens' rotation.
    for layer, q_THD in told:
        assert q_THD.shape == (33, config.num_heads, config.head_dim)
        similarity = F.cosine_similarity(q_THD.flatten(1), asked[layer].flatten(1))
        assert similarity.min() > 0.3


@pytest.mark.parametrize("layout", ["plain", "transposed", "blocked"])
def test_a_prediction_is_exact_where_a_layer_adds_nothing(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCM_KERNEL_LINEAR", layout)
    config, weights = load_weights(write_tiny_model(tmp_path))
    for name, weight in weights.items():
        if "down_proj" in name or "o_proj" in name:
            weight.zero_()
    told: dict[int, Tensor] = {}
    asked: dict[int, Tensor] = {}

    def attend(layer: int, q_THD: Tensor, kv_layer: Tensor, /) -> Tensor:
        asked[layer] = q_THD.clone()
        return torch.zeros_like(q_THD)

    def look_ahead(layer: int, q_THD: Tensor, /) -> None:
        told[layer] = q_THD

    item = ForwardItem(TOKENS[:5], 0, BLOCK_IDS, attend, look_ahead)
    LlamaModel(config, weights).forward([item], make_pool(config))
    for layer in (1, 2):
        assert torch.allclose(told[layer], asked[layer], atol=1e-5)
