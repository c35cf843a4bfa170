"""Identity of chunks: golden vectors, and keys that nothing else has."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.errors import ConfigError, InvalidArgumentError
from ucm.hashing import MAX_TOKEN_ID, Encodable, NamespaceSpec, chain_keys, encode
from ucm.kernels.rope import Rope
from ucm.layout import KvDtype, KvLayout
from ucm.reuse import Chunk, ChunkSpace, check_reusable
from ucm.reuse.chunks import (
    chunk_extra_keys,
    chunk_keys,
    is_chunk_keys,
    sink_prefix_id,
)
from ucm.types import ROOT_KEY, NamespaceId

LAYOUT = KvLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.FLOAT32
)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="smollm2-135m", weights_digest="ab" * 32)
NAMESPACE = SPEC.fingerprint()
SINK = tuple(range(1, 9))

GOLDEN_SINK = "122b7e3edd5649b3d184ce24ff4a460430252fe9c0090adc31ccf28b440d920f"
GOLDEN_KEYS = (
    "eedc7742bc37eccc29b25fdd92ce9cc55a1348a5e55ca31d66965b446b8ae71a",
    "060486cac1014a7d0a33f2e803dad541a3ff89441bd40d8d84e4ef4e88d77146",
)


class TestGoldenVectors:
    """Stores outlive programs: these bytes may change only with FORMAT_VERSION."""

    def test_sink_prefix_id(self) -> None:
        assert sink_prefix_id(SINK).hex() == GOLDEN_SINK

    def test_chunk_keys(self) -> None:
        keys = chunk_keys(NAMESPACE, list(range(80)), 32, SINK)
        assert tuple(key.hex() for key in keys) == GOLDEN_KEYS

    def test_they_are_the_documented_digests(self) -> None:
        packed = struct.pack("<8i", *SINK)
        sink_id = hashlib.sha256(encode(["ucm.sink", 2, packed])).digest()
        assert sink_prefix_id(SINK) == sink_id
        tokens = struct.pack("<2i", 5, 6)
        extra: list[Encodable] = ["ucm.chunk", sink_id]
        encoded = encode(["ucm.block", 2, NAMESPACE, ROOT_KEY, tokens, extra])
        assert chunk_keys(NAMESPACE, [5, 6], 2, SINK) == [hashlib.sha256(encoded).digest()]


def test_a_chunk_knows_its_keys() -> None:
    space = ChunkSpace(model=bytes(32), sink_tokens=SINK, block_tokens=32)
    chunk = Chunk(tuple(range(80)), space)
    assert (chunk.num_blocks, chunk.num_cached_tokens, space.base_position) == (2, 64, 8)
    keys = chunk.keys(NAMESPACE)
    assert keys == chunk_keys(NAMESPACE, range(80), 32, SINK)
    assert keys == chain_keys(NAMESPACE, range(80), 32, extra_keys=space.extra_keys)


def test_what_a_chunk_is_followed_by_does_not_matter() -> None:
    assert chunk_keys(NAMESPACE, range(70), 32, SINK) == chunk_keys(NAMESPACE, range(95), 32, SINK)


def test_extra_keys_say_that_they_are_a_chunks() -> None:
    assert is_chunk_keys(chunk_extra_keys(SINK))
    assert not is_chunk_keys(())
    assert not is_chunk_keys(("image", bytes(32)))


tokens = st.lists(st.integers(0, MAX_TOKEN_ID), min_size=2, max_size=6)
sinks = st.lists(st.integers(0, MAX_TOKEN_ID), min_size=4, max_size=6).map(tuple)
namespaces = st.binary(min_size=32, max_size=32).map(NamespaceId)
named = st.tuples(namespaces, tokens, st.integers(1, 2), st.none() | sinks)


@given(left=named, right=named)
def test_no_two_contents_share_a_key(left: Any, right: Any) -> None:
    """Prompts (no sink) and chunks, sinks, namespaces, block sizes: a key names one of them."""

    def names(namespace: NamespaceId, ids: list[int], size: int, sink: Any) -> dict[bytes, Any]:
        keys = (
            chain_keys(namespace, ids, size)
            if sink is None
            else chunk_keys(namespace, ids, size, sink)
        )
        return {key: (namespace, ids[: (i + 1) * size], size, sink) for i, key in enumerate(keys)}

    of_left, of_right = names(*left), names(*right)
    for key in of_left.keys() & of_right.keys():
        assert of_left[key] == of_right[key]
    if left[:1] + left[2:] == right[:1] + right[2:] and left[1][:2] == right[1][:2]:
        assert of_left.keys() & of_right.keys()


@given(namespace=namespaces, ids=tokens, sink=sinks)
def test_the_same_tokens_as_a_prompt_are_another_block(
    namespace: NamespaceId, ids: list[int], sink: tuple[int, ...]
) -> None:
    prompt = chain_keys(namespace, [*sink, *ids], 1)
    chunk = chunk_keys(namespace, ids, 1, sink)
    bare = chain_keys(namespace, ids, 1)
    assert not set(chunk) & {*prompt, *bare}


@given(left=sinks, right=sinks)
def test_the_sink_alone_changes_the_key(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    keys = chunk_keys(NAMESPACE, [1], 1, left), chunk_keys(NAMESPACE, [1], 1, right)
    assert (keys[0] == keys[1]) == (left == right)


@pytest.mark.parametrize("bad", [[-1, 2, 3, 4], [2**31, 1, 1, 1], ["a", "b", "c", "d"]])
def test_a_sink_that_cannot_be(bad: list[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="the sink prefix"):
        sink_prefix_id(bad)


def test_a_model_without_rope_is_refused() -> None:
    check_reusable(SimpleNamespace(name="llama", rope=Rope(head_dim=8, base=1e4)))
    for config in (SimpleNamespace(name="gpt2", rope=None), SimpleNamespace(name="gpt2")):
        with pytest.raises(ConfigError, match=r"model gpt2 has no rotary.*without segments"):
            check_reusable(config)


def test_a_namespace_without_rope_is_refused() -> None:
    for kind in ("half_split", "interleaved"):
        check_reusable(dataclasses.replace(SPEC, rope_kind=kind))
    with pytest.raises(ConfigError, match="model smollm2-135m has no rotary"):
        check_reusable(dataclasses.replace(SPEC, rope_kind="none"))


def test_importing_the_names_is_cheap() -> None:
    code = "import sys, ucm.reuse; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
