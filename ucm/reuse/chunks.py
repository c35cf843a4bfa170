"""Identity of chunks: how the blocks of a text that may stand anywhere are called.

A chunk is encoded behind a *sink prefix* whose rows are dropped: row i holds the KV of the chunk's
token i at position `len(sink) + i`, which has seen the sink and the chunk up to itself and nothing
else. The text of the identity comes first, because stores outlive programs (ADR 0012):

    chunk key  = the block key of `ucm.hashing`, of a chain that begins at `ROOT_KEY` with the
                 chunk's first token, with extra keys ["ucm.chunk", sink id] in every block
    sink id    = SHA-256( enc(["ucm.sink", FORMAT_VERSION, sink's tokens (int32 LE, as bytes)]) )

Invariants: a chunk's key is never a prompt's, whose extra keys are empty, nor that of a chunk
behind another sink, in another namespace or of another block size. The position that the rows were
rotated to follows from the key: the sink's length is in its id. To the store a chunk is a chain
like any other.

Envelope: 7 us a block; a document of 512 tokens 0.1 ms.
"""

from __future__ import annotations

import hashlib
import operator
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ucm.errors import ConfigError, InvalidArgumentError
from ucm.hashing import FORMAT_VERSION, MAX_TOKEN_ID, Encodable, NamespaceSpec, chain_keys, encode

if TYPE_CHECKING:
    from ucm.types import BlockKey, NamespaceId

CHUNK_MARK = "ucm.chunk"
"""First of the extra keys of every chunk's blocks."""
MIN_SINK_TOKENS = 4
"""Fewer do not take the attention that heads send to a text's first tokens."""
ROTARY_KINDS = ("half_split", "interleaved")


def sink_prefix_id(sink_tokens: Sequence[int]) -> bytes:
    """Name of what chunks are encoded behind; 32 bytes.

    Raises:
        InvalidArgumentError: a token id out of range.
    """
    tokens = as_tokens(sink_tokens, "the sink prefix")
    packed = struct.pack(f"<{len(tokens)}i", *tokens)
    return hashlib.sha256(encode(["ucm.sink", FORMAT_VERSION, packed])).digest()


def chunk_extra_keys(sink_tokens: Sequence[int]) -> tuple[Encodable, ...]:
    """The extra keys of every block of a chunk behind this sink prefix.

    Raises:
        InvalidArgumentError: a token id out of range.
    """
    return CHUNK_MARK, sink_prefix_id(sink_tokens)


def is_chunk_keys(extra_keys: Sequence[Encodable]) -> bool:
    """Whether extra keys are those of a chunk."""
    return len(extra_keys) == 2 and extra_keys[0] == CHUNK_MARK


def chunk_keys(
    namespace: NamespaceId,
    token_ids: Sequence[int],
    block_tokens: int,
    sink_tokens: Sequence[int],
) -> list[BlockKey]:
    """Keys of a chunk's full blocks, in order; what fills no block has none.

    Args:
        namespace: fingerprint of the KV's namespace.
        token_ids: the chunk's.
        block_tokens: tokens a block.
        sink_tokens: what it was encoded behind.

    Raises:
        InvalidArgumentError: a token id out of range.
    """
    extra_keys = chunk_extra_keys(sink_tokens)
    return chain_keys(namespace, token_ids, block_tokens, extra_keys=extra_keys)


def as_tokens(token_ids: Iterable[int], what: str) -> tuple[int, ...]:
    """Token ids that can be hashed.

    Args:
        token_ids: whole numbers of any kind.
        what: whose they are, for the message.

    Raises:
        InvalidArgumentError: something else, or one is below 0 or above `MAX_TOKEN_ID`.
    """
    try:
        tokens = tuple(map(operator.index, token_ids))
    except TypeError as error:
        raise InvalidArgumentError(f"{what} is made of token ids, not of text: {error}") from error
    if tokens and not 0 <= min(tokens) <= max(tokens) <= MAX_TOKEN_ID:
        raise InvalidArgumentError(
            f"{what} has token ids from {min(tokens)} to {max(tokens)}; they must be 0 to "
            f"{MAX_TOKEN_ID}"
        )
    return tokens


def check_reusable(model: object) -> None:
    """Refuse models whose keys cannot be moved to other positions.

    Args:
        model: a configuration, whose `rope` says how keys are rotated (`ModelConfig` of our engine
            has one), or the `NamespaceSpec` that another engine's KV is stored under.

    Raises:
        ConfigError: it has no RoPE, so that chunks are good only where they were computed.
    """
    if isinstance(model, NamespaceSpec):
        name, is_rotary = model.model_id, model.rope_kind in ROTARY_KINDS
    else:
        name = getattr(model, "name", type(model).__name__)
        is_rotary = getattr(model, "rope", None) is not None
    if not is_rotary:
        raise ConfigError(
            f"model {name} has no rotary position embedding (RoPE): positions are in its hidden "
            "states and cannot be moved, so chunks cannot be reused; send the prompt as one text, "
            "without segments"
        )
