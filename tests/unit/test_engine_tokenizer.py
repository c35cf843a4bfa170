from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from ucm.engine.config import config_from_hf
from ucm.engine.tokenizer import (
    Tokenizer,
    pre_tokenizer_named,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from ucm.errors import ConfigError, InvalidArgumentError
from ucm.testing.models import SPECIAL_TOKENS, tiny_tokenizer, write_tiny_model

TINY = Tokenizer(tiny_tokenizer(), eos_ids=[2])


def load(folder: Path) -> Tokenizer:
    return tokenizer_from_folder(folder, config_from_hf(folder / "config.json"))


def gguf_metadata(**changes: object) -> dict[str, object]:
    raw = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].get)
    plain = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": [" ".join(pair) for pair in raw["merges"]],
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    merged = {**plain, **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in merged.items() if value is not None}


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = TINY.encode(text)
    assert TINY.decode(ids, skip_special=False) == text


@given(st.lists(st.integers(3, TINY.vocab_size - 1), max_size=40))
def test_a_stream_adds_up_to_the_whole(ids: list[int]) -> None:
    stream = TINY.stream()
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == TINY.decode(ids)


def test_a_stream_holds_a_character_until_it_is_complete() -> None:
    stream = TINY.stream()
    pieces = [stream.push(i) for i in TINY.encode("a🙂b")]
    assert pieces == ["a", "", "", "", "🙂", "b"]
    assert stream.flush() == ""


def test_a_stream_gives_up_what_never_completed() -> None:
    stream = TINY.stream()
    half = TINY.encode("🙂")[:2]
    assert [stream.push(i) for i in half] == ["", ""]
    assert stream.flush() == TINY.decode(half)


def test_special_tokens_are_recognised_and_skipped() -> None:
    ids = TINY.encode("<|im_start|>the<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert TINY.decode(ids) == "the"
    assert TINY.decode(ids, skip_special=False) == "<|im_start|>the<|im_end|>"


def test_a_folder_gives_tokens_ends_and_template(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer = load(folder)
    assert tokenizer.eos_ids == (2, 0)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode("the") == TINY.encode("the")


def test_a_template_file_wins_and_names_are_resolved(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load(folder).apply_chat_template([]) == "yes"
    (folder / "chat_template.jinja").write_text("{{ eos_token }}!")
    assert load(folder).apply_chat_template([]) == "<|im_end|>!"


def test_a_start_token_is_put_in_front_once(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    extra = {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(extra))
    tokenizer = load(folder)
    assert tokenizer.encode("the") == [1, *TINY.encode("the")]
    assert tokenizer.encode("<|im_start|>the") == [1, *TINY.encode("the")]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / name).write_text("{")
    with pytest.raises(ConfigError, match=name):
        load(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(template: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), eos_ids=[], chat_template=template)
    with pytest.raises(ConfigError, match="chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_model_without_template_says_so() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        TINY.apply_chat_template([])


def test_gguf_smollm_takes_digits_one_by_one() -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    plain = tokenizer_from_gguf(gguf_metadata(pre="gpt-2"))
    assert tokenizer.encode("the cache <|im_end|>") == plain.encode("the cache <|im_end|>")
    assert tokenizer.eos_ids == (2, 0)
    pieces = pre_tokenizer_named("smollm").pre_tokenize_str("ab 12½ x")
    assert [piece for piece, _ in pieces] == ["ab", "Ġ", "1", "2", "Â½", "Ġx"]


def test_gguf_start_token_and_user_defined_tokens() -> None:
    kinds = [3] * 3 + [1] * (TINY.vocab_size - 4) + [4]
    tokenizer = tokenizer_from_gguf(gguf_metadata(add_bos_token=True, token_type=kinds))
    assert tokenizer.encode("the")[0] == 1
    last = TINY.decode([TINY.vocab_size - 1])
    assert tokenizer.decode(tokenizer.encode(last)) == last


def test_gguf_llama3_splits_digits_by_three() -> None:
    pieces = pre_tokenizer_named("llama-bpe").pre_tokenize_str("It's 12345")
    assert [piece for piece, _ in pieces] == ["It", "'s", "Ġ", "123", "45"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": None}, "no tokenizer"),
        ({"model": "llama"}, "llama"),
        ({"pre": "deepseek-llm"}, "deepseek-llm"),
        ({"merges": None}, "merges"),
    ],
)
def test_a_gguf_tokenizer_that_is_not_known_is_refused(
    changes: dict[str, object], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        tokenizer_from_gguf(gguf_metadata(**changes))


def test_the_tiny_vocabulary_begins_with_the_special_tokens() -> None:
    assert [TINY.encode(token) for token in SPECIAL_TOKENS] == [[0], [1], [2]]


def test_a_special_token_inside_a_stream_takes_no_space_away() -> None:
    vocab = {"<s>": 0, "\u2581hello": 1, "\u2581world": 2, "<unk>": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = Tokenizer(backend, eos_ids=[])
    for ids in ([1, 0, 2], [0, 1, 0, 0, 2, 2]):
        stream = tokenizer.stream()
        assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == tokenizer.decode(ids)


def test_text_that_was_not_utf8_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="not valid Unicode"):
        TINY.encode("a\udcff")


def test_a_document_cannot_speak_for_the_template() -> None:
    tiny = Tokenizer(tiny_tokenizer(), eos_ids=[2], bos_id=1)
    text = "a<|im_end|>b"
    assert tiny.encode(text) == [1, *tiny.encode_template(text)]
    assert tiny.encode_template(text)[1] == 2
    plain = tiny.encode_plain(text)
    assert min(plain) > 2
    assert tiny.decode(plain) == text
    assert tiny.encode_template(text)[1] == 2, "the copy's switch is the copy's"
    with pytest.raises(InvalidArgumentError, match="Unicode"):
        tiny.encode_plain("\ud800")


@given(st.text())
def test_plain_text_comes_back(text: str) -> None:
    assert TINY.decode(TINY.encode_plain(text), skip_special=False) == text
