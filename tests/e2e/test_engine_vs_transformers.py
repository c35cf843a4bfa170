"""The reference engine against Transformers on the real model, each reading the GGUF itself."""

from __future__ import annotations

import contextlib
import functools
import pydoc_data.topics
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from ucm.engine.loading import LoadedModel, find_gguf, load_model
from ucm.engine.model import ForwardItem
from ucm.testing.models import require_real_model

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXT = pydoc_data.topics.topics["assignment"]


@contextlib.contextmanager
def spared_waits() -> Iterator[None]:
    """What Transformers' reading of a GGUF repeats for nothing; what it reads is the same.

    It builds the table of tensor names anew for each of 400 modules (20 ms each), and slices a
    memory map for each of 250,000 fields, five times as slow as an array.
    """
    with pytest.MonkeyPatch.context() as patch:
        names = functools.cache(gguf.get_tensor_name_map)
        patch.setattr(gguf, "get_tensor_name_map", names)
        patch.setattr(np, "memmap", lambda file, mode, dtype=np.uint8: np.fromfile(file, dtype))
        yield


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    place = require_real_model()
    return place if place.is_file() else find_gguf(place)


@pytest.fixture(scope="module")
def ours(gguf_file: Path) -> LoadedModel:
    return load_model(gguf_file)


@pytest.fixture(scope="module")
def theirs(gguf_file: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    with spared_waits():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32
        )
    return model.eval()


@pytest.fixture(scope="module")
def prompt(ours: LoadedModel) -> list[int]:
    return ours.tokenizer.encode(TEXT)[:600]


@pytest.fixture(scope="module")
def expected(theirs: Any, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = theirs(torch.tensor([prompt])).logits[0]
    return logits.clone()


def make_pool(loaded: LoadedModel, num_blocks: int) -> Tensor:
    c = loaded.config
    return torch.zeros(c.num_layers, num_blocks, 2, c.num_kv_heads, 32, c.head_dim)


SPANS = {
    "full": [(0, 600)],
    "chunked": [(0, 200), (200, 201), (201, 473), (473, 600)],
    "decode": [(0, 590), *((i, i + 1) for i in range(590, 600))],
}


@pytest.mark.parametrize("attention", [None, "tiled"])
@pytest.mark.parametrize("how", list(SPANS))
def test_logits_equal_transformers(
    ours: LoadedModel, prompt: list[int], expected: Tensor, how: str, attention: str | None
) -> None:
    pool = make_pool(ours, 24)
    block_ids = [5, 6, 7, 8, 9, 10, 3, 2, 1, 0, *range(11, 20)]
    for begin, end in SPANS[how]:
        item = ForwardItem(prompt[begin:end], begin, block_ids)
        logits = ours.model.forward([item], pool, attention=attention)[0]
        torch.testing.assert_close(logits, expected[end - 1], atol=1e-3, rtol=0)


def test_kv_equals_transformers(ours: LoadedModel, theirs: Any, prompt: list[int]) -> None:
    pool = make_pool(ours, 2)
    ours.model.forward([ForwardItem(prompt[:64], 0, [0, 1])], pool)
    with torch.inference_mode():
        cache = theirs(torch.tensor([prompt[:64]]), use_cache=True).past_key_values
    for index in (0, 14, 29):
        keys = pool[index, :, 0].transpose(0, 1).flatten(1, 2)
        values = pool[index, :, 1].transpose(0, 1).flatten(1, 2)
        torch.testing.assert_close(keys, cache.layers[index].keys[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(values, cache.layers[index].values[0], atol=1e-3, rtol=0)


def test_tokens_equal_transformers_where_there_are_no_digits(
    ours: LoadedModel, gguf_file: Path
) -> None:
    """Its GGUF route leaves the digit splitting out, so digits are compared below."""
    transformers = pytest.importorskip("transformers")
    with spared_waits():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(gguf_file.parent), gguf_file=gguf_file.name
        )
    for name in sorted(pydoc_data.topics.topics)[::4]:
        text = re.sub(r"\d", "", pydoc_data.topics.topics[name])
        assert ours.tokenizer.encode(text) == tokenizer(text)["input_ids"]


def test_digits_are_tokens_of_their_own(ours: LoadedModel) -> None:
    tokenizer = ours.tokenizer
    ids = tokenizer.encode("In 2024, 1234567 of them")
    texts = [tokenizer.decode([i]) for i in ids]
    assert [t for t in texts if any(c.isdigit() for c in t)] == list("20241234567")
    assert tokenizer.encode("Hello 1234 world's") == [19556, 216, 33, 34, 35, 36, 905, 506]


def test_all_text_comes_back_streamed_too(ours: LoadedModel) -> None:
    tokenizer = ours.tokenizer
    text = TEXT[:3000] + " ünïcode 漢字 🙂👩‍👩‍👧 \t\r\n  end"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == text


def test_it_talks_sense(ours: LoadedModel) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = ours.tokenizer.encode(ours.tokenizer.apply_chat_template(messages))
    pool = make_pool(ours, 4)
    block_ids = list(range(4))
    start, new, reply = 0, ids, list[int]()
    while len(reply) < 20:
        logits = ours.model.forward([ForwardItem(new, start, block_ids)], pool)
        start, new = start + len(new), [int(logits[0].argmax())]
        if new[0] in ours.tokenizer.eos_ids:
            break
        reply += new
    assert "Paris" in ours.tokenizer.decode(reply)
