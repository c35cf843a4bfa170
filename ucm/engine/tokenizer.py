"""`Tokenizer`: text to token ids and back, from tokenizer.json or from GGUF metadata.

The `tokenizers` library does the work. For GGUF this module rebuilds the pipeline that the
metadata only names: a byte-level BPE whose pre-tokenizer must be exactly llama.cpp's of that name,
since another split gives other tokens. An unknown name is a `ConfigError`, never a guess.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from ucm.errors import ConfigError, InvalidArgumentError

from .config import ModelConfig

_CONTROL, _USER_DEFINED = 3, 4
"""GGUF token types (llama.cpp's LLAMA_TOKEN_TYPE_*)."""

_END_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|end|>",
        "</s>",
        "<|eom_id|>",
    }
)
"""Control tokens that end a reply whatever the metadata says; llama.cpp keeps such a list too."""

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Encodes prompts, decodes replies, renders chats. Thread-safe but for its streams."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int],
        bos_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wrap a backend.

        Args:
            backend: does the encoding and decoding.
            eos_ids: tokens that end a reply.
            bos_id: put in front of every prompt, unless the backend did; None for no such token.
            chat_template: Jinja2 source, rendered in a sandbox.
        """
        self._backend = backend
        self._bos_id = bos_id
        self._chat_template = chat_template
        self.eos_ids = tuple(dict.fromkeys(eos_ids))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        size: int = self._backend.get_vocab_size()
        return size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised.

        Raises:
            InvalidArgumentError: `text` holds lone surrogates: it was not valid UTF-8.
        """
        ids: list[int] = self._backend.encode(_checked(text)).ids
        if self._bos_id is not None and ids[:1] != [self._bos_id]:
            return [self._bos_id, *ids]
        return ids

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a later part of a rendered template: as `encode`, with nothing in front.

        Raises:
            InvalidArgumentError: `text` holds lone surrogates.
        """
        ids: list[int] = self._backend.encode(_checked(text), add_special_tokens=False).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of somebody's text inside a prompt: nothing is added, nothing in it is special.

        A document that spells out `<|im_end|>` does not end the user's turn with it.

        Raises:
            InvalidArgumentError: `text` holds lone surrogates.
        """
        ids: list[int] = self._plain_backend.encode(_checked(text), add_special_tokens=False).ids
        return ids

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A copy, for the switch is the backend's and `encode` may run in another thread."""
        backend = copy.deepcopy(self._backend)
        backend.encode_special_tokens = True
        return backend

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `token_ids`; bytes that are not UTF-8 become replacement characters."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special)
        return text

    def stream(self) -> TokenizerStream:
        """A decoder for one reply, token by token."""
        return TokenizerStream(self)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation to prompt text.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with the opening of the assistant's reply.

        Raises:
            ConfigError: the model has no chat template, or it refuses these messages.
        """
        if self._chat_template is None:
            raise ConfigError("this model has no chat template; give it a plain prompt")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse_messages
        bos = self._token_text(self._bos_id)
        eos = self._token_text(self.eos_ids[0] if self.eos_ids else None)
        try:
            return environment.from_string(self._chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=bos,
                eos_token=eos,
            )
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template failed: {error}") from error

    def _token_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self._backend.id_to_token(token_id) or ""


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"the text is not valid Unicode: {error}") from error
    return text


def _refuse_messages(message: str) -> None:
    raise jinja2.TemplateError(message)


class TokenizerStream:
    """Turns one reply's tokens into text as they come.

    What `push` returned so far, and `flush` at the end, concatenate to the decoded whole. A
    character whose bytes are spread over tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty inside a character."""
        self._ids.append(token_id)
        text = self._pending_text()
        if text.endswith(REPLACEMENT):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return self._emit(self._pending_text())

    def _pending_text(self) -> str:
        # Decoding a little already emitted context keeps joins between tokens right.
        known = self._tokenizer.decode(self._ids[self._context : self._emitted])
        return self._tokenizer.decode(self._ids[self._context :])[len(known) :]

    def _emit(self, text: str) -> str:
        # A special token has no text and would hide from the next one that it is not the first.
        if text:
            self._context = self._emitted
        self._emitted = len(self._ids)
        return text


def tokenizer_from_folder(folder: Path, config: ModelConfig) -> Tokenizer:
    """Load tokenizer.json and what belongs to it from a Hugging Face folder.

    Raises:
        ConfigError: no tokenizer.json, or one that the library refuses.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json: a model without its tokenizer cannot be used; "
            "copy it from where the weights come from"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    extra = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    eos = [*config.eos_token_ids, *_as_list(generation.get("eos_token_id"))]
    named_eos = _token_id(backend, extra.get("eos_token"))
    if named_eos is not None:
        eos.append(named_eos)
    bos = _token_id(backend, extra.get("bos_token")) if extra.get("add_bos_token") else None
    return Tokenizer(backend, eos_ids=eos, bos_id=bos, chat_template=_template_of(folder, extra))


def _read_json(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    return value if isinstance(value, dict) else {}


def _as_list(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _token_id(backend: tokenizers.Tokenizer, token: str | Mapping[str, Any] | None) -> int | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    found: int | None = backend.token_to_id(text) if text else None
    return found


def _template_of(folder: Path, extra: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = extra.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer that a GGUF file describes.

    Args:
        metadata: key to value.

    Raises:
        ConfigError: no tokenizer in the file, not a byte-level BPE, or an unknown pre-tokenizer.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise ConfigError("the GGUF file has no tokenizer; use one that was converted with it")
    if kind != "gpt2":
        raise ConfigError(f"GGUF tokenizer {kind!r} is not supported; gpt2 (byte-level BPE) is")
    try:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
        types: list[int] = metadata["tokenizer.ggml.token_type"]
    except KeyError as error:
        raise ConfigError(f"GGUF: the key {error} is missing") from error
    pre_name = str(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    vocab = {token: index for index, token in enumerate(tokens)}
    # llama.cpp takes a whole pre-token that is in Llama 3's vocabulary without merging.
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre_name == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer_named(pre_name)
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, tokens, types)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    return Tokenizer(
        backend,
        eos_ids=_gguf_eos_ids(metadata, tokens, types),
        bos_id=bos if metadata.get("tokenizer.ggml.add_bos_token") else None,
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def pre_tokenizer_named(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that llama.cpp calls `name` (tokenizer.ggml.pre).

    Raises:
        ConfigError: a name this engine does not know.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if name == "llama-bpe":
        split = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, bytes_only])
    raise ConfigError(
        f"GGUF pre-tokenizer {name!r} is not supported; smollm, gpt-2 and llama-bpe are"
    )


def _add_special_tokens(
    backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]
) -> None:
    control = [
        AddedToken(t, special=True) for t, k in zip(tokens, types, strict=True) if k == _CONTROL
    ]
    defined = [t for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED]
    backend.add_special_tokens(control)
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in defined])


def _gguf_eos_ids(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> list[int]:
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    listed = [i for i, t in enumerate(tokens) if t in _END_TOKENS and types[i] == _CONTROL]
    return [*(int(i) for i in named if i is not None), *listed]
