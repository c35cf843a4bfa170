"""Identity: what a block is called.

A key is SHA-256 over a canonical encoding of everything that changes the block's bytes. The
encoding is written down here first, because stores outlive programs:

    value   = tag (1 byte) length (8 bytes, little-endian) payload
    tag     | n none | b bool (1 byte) | i int (decimal ASCII) | f float (8 bytes, IEEE-754 LE)
            | s str (UTF-8) | y bytes | l list (the concatenated values) | d dict (the concatenated
            | key and value pairs, sorted by the key's encoding)
    key     = SHA-256( enc(["ucm.block", FORMAT_VERSION, namespace id, parent key,
                            token ids (int32 LE, as bytes), extra keys]) )
    id      = SHA-256( enc(["ucm.namespace", FORMAT_VERSION, {field: value, ...}]) )

A length in front of every payload makes the encoding injective: no two values share one.
Never Python's `hash()` (it differs by process), never pickle (it differs by version).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias, Union, overload

from .errors import InvalidArgumentError
from .layout import KvLayout
from .types import KEY_BYTES, ROOT_KEY, BlockKey, NamespaceId

FORMAT_VERSION = 2
"""Changes whenever the encoding or the meaning of a field does; old keys then never match."""

Encodable: TypeAlias = Union[
    None, bool, int, float, str, bytes, Sequence["Encodable"], Mapping[str, "Encodable"]
]

MAX_TOKEN_ID = 2**31 - 1


def encode(value: Encodable) -> bytes:
    """Encode `value` canonically; equal values and only those give equal bytes.

    Raises:
        InvalidArgumentError: a type outside `Encodable`.
    """
    tag, payload = _tag_and_payload(value)
    return tag + struct.pack("<Q", len(payload)) + payload


def _tag_and_payload(value: Encodable) -> tuple[bytes, bytes]:
    if value is None:
        return b"n", b""
    if isinstance(value, bool):
        return b"b", b"\x01" if value else b"\x00"
    if isinstance(value, int):
        return b"i", str(value).encode()
    if isinstance(value, float):
        return b"f", struct.pack("<d", value)
    if isinstance(value, str):
        return b"s", value.encode("utf-8", "surrogatepass")
    if isinstance(value, (bytes, bytearray)):
        return b"y", bytes(value)
    if isinstance(value, Mapping):
        pairs = sorted((encode(key), encode(item)) for key, item in value.items())
        return b"d", b"".join(key + item for key, item in pairs)
    if isinstance(value, Sequence):
        return b"l", b"".join(encode(item) for item in value)
    raise InvalidArgumentError(f"cannot encode a {type(value).__name__} into an identity")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceSpec:
    """Everything but the tokens that changes a block's bytes. Nothing crosses namespaces.

    Every field is part of the fingerprint, so adding one needs a new `FORMAT_VERSION`.
    """

    layout: KvLayout
    """Layers, KV heads, head size, block tokens and dtype of the slabs."""
    model_id: str
    """Name of the model, for people; two models never share blocks by name alone."""
    weights_digest: str
    """SHA-256 of the weights (or the hub revision): what makes two models the same. Constants that
    are in no tensor, such as the norms' epsilon, are written behind it."""
    tenant: str = ""
    """Who may see the blocks."""
    salt: str = ""
    """Any text; separates users of one tenant. It is hashed, never stored or logged."""
    kv_quantization: str = "none"
    """How the engine quantised its KV, with the scale mode."""
    slab_layout: str = "k_post_rope,v:heads,tokens,dim"
    """Order of the axes inside a slab."""
    rope_kind: str = "half_split"
    """`half_split`, `interleaved`, or `none`."""
    rope_base: float = 10_000.0
    """RoPE theta."""
    rope_scaling: str = "none"
    """Kind and parameters of RoPE scaling, written out."""
    position_offset: int = 0
    """Position of a chain's first token."""
    attention_kind: str = "gqa"
    """`mha`, `gqa`, `mqa` or `mla`."""
    tp_rank: int = 0
    """Tensor-parallel rank."""
    tp_size: int = 1
    """Tensor-parallel size."""
    pp_stage: int = 0
    """Pipeline stage."""
    pp_size: int = 1
    """Number of pipeline stages."""
    first_layer: int = 0
    """Number of the model's layer that slab 0 holds."""
    kv_group: int = 0
    """KV-cache group of a hybrid model."""
    lora_id: str = ""
    """Adapter name and revision; empty for none."""
    lora_path: str = ""
    """Where the adapter was loaded from; two adapters of one name differ by it."""
    cross_layer: str = "none"
    """Layout of KV shared across layers."""
    accepts_lossy: bool = False
    """Whether blocks may come back a little different, from a codec that loses precision; who
    does not accept that never shares a block with who does."""

    def __post_init__(self) -> None:
        # 10000 and 10000.0 are one base, but two encodings
        object.__setattr__(self, "rope_base", float(self.rope_base))

    def fingerprint(self) -> NamespaceId:
        """The namespace's 32-byte id."""
        values: dict[str, Encodable] = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name != "layout"
        }
        values["layout"] = layout_to_dict(self.layout)
        encoded = encode(["ucm.namespace", FORMAT_VERSION, values])
        return NamespaceId(hashlib.sha256(encoded).digest())


def layout_to_dict(layout: KvLayout) -> dict[str, Encodable]:
    """The layout's fields under their names, the dtype as text."""
    return {
        "num_layers": layout.num_layers,
        "num_kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "block_tokens": layout.block_tokens,
        "dtype": layout.dtype.value,
    }


def block_key(
    namespace: NamespaceId,
    parent: BlockKey,
    token_ids: Sequence[int],
    extra_keys: Sequence[Encodable] = (),
) -> BlockKey:
    """Name the block of `token_ids` that follows `parent`.

    Args:
        namespace: the fingerprint of the model, layout and tenant.
        parent: the preceding block's key, or `ROOT_KEY`.
        token_ids: one full block, each 0 to 2**31 - 1.
        extra_keys: what else changed the bytes: multimodal or prompt-embedding hashes *with their
            shapes*, in order.

    Raises:
        InvalidArgumentError: a token id out of range, or a key of the wrong length.
    """
    return chain_keys(namespace, token_ids, len(token_ids), parent=parent, extra_keys=extra_keys)[0]


def chain_keys(
    namespace: NamespaceId,
    token_ids: Sequence[int],
    block_tokens: int,
    *,
    parent: BlockKey = ROOT_KEY,
    extra_keys: Sequence[Encodable] = (),
) -> list[BlockKey]:
    """Keys of all *full* blocks of `token_ids`, each chained to the one before.

    A partial last block has no key: its bytes are not final. Arguments and errors as `block_key`.
    """
    if block_tokens < 1:
        raise InvalidArgumentError(f"a block has at least one token, not {block_tokens}")
    check_key(parent)
    num_tokens = len(token_ids) // block_tokens * block_tokens
    used = token_ids[:num_tokens]
    if used and not 0 <= min(used) <= max(used) <= MAX_TOKEN_ID:
        raise InvalidArgumentError(
            f"token ids must be 0 to {MAX_TOKEN_ID}, these go from {min(used)} to {max(used)}"
        )
    tokens = struct.pack(f"<{num_tokens}i", *used)
    # `encode` of the five parts, with what is the same for every block done once.
    head = encode("ucm.block") + encode(FORMAT_VERSION) + encode(namespace)
    tail = encode(list(extra_keys))
    step = block_tokens * 4
    keys: list[BlockKey] = []
    for start in range(0, len(tokens), step):
        payload = head + encode(parent) + encode(tokens[start : start + step]) + tail
        list_head = b"l" + struct.pack("<Q", len(payload))
        parent = BlockKey(hashlib.sha256(list_head + payload).digest())
        keys.append(parent)
    return keys


def check_key(key: bytes) -> BlockKey:
    """Return `key` as a `BlockKey`.

    Raises:
        InvalidArgumentError: it is not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise InvalidArgumentError(f"a block key has {KEY_BYTES} bytes, this one has {len(key)}")
    return BlockKey(bytes(key))


class CheckedKeys(Sequence[BlockKey]):
    """Keys of the right length, back to back: a call of thousands makes objects only if asked."""

    __slots__ = ("packed",)

    def __init__(self, packed: bytes) -> None:
        """Take keys that are `packed` one behind the other.

        Raises:
            InvalidArgumentError: they do not divide into keys.
        """
        if len(packed) % KEY_BYTES:
            raise InvalidArgumentError(
                f"{len(packed)} bytes of keys are not a whole number of {KEY_BYTES}-byte keys"
            )
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed) // KEY_BYTES

    def __iter__(self) -> Iterator[BlockKey]:
        return (BlockKey(key) for (key,) in struct.iter_unpack(f"{KEY_BYTES}s", self.packed))

    @overload
    def __getitem__(self, item: int) -> BlockKey: ...

    @overload
    def __getitem__(self, item: slice) -> CheckedKeys: ...

    def __getitem__(self, item: int | slice) -> BlockKey | CheckedKeys:
        if isinstance(item, slice):
            start, stop, step = item.indices(len(self))
            assert step == 1, item
            return CheckedKeys(self.packed[start * KEY_BYTES : max(start, stop) * KEY_BYTES])
        start = range(len(self))[item] * KEY_BYTES
        return BlockKey(self.packed[start : start + KEY_BYTES])


def check_keys(keys: Sequence[bytes]) -> CheckedKeys:
    """`check_key` of each of them, at a twentieth of its price where nothing is wrong.

    Raises:
        InvalidArgumentError: one is not 32 bytes.
    """
    if isinstance(keys, CheckedKeys):
        return keys
    try:
        if set(map(len, keys)) <= {KEY_BYTES}:
            return CheckedKeys(b"".join(keys))
    except TypeError:  # one is not bytes at all; the line below says which
        pass
    return CheckedKeys(b"".join(check_key(key) for key in keys))
