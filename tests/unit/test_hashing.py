"""Identity: golden vectors, an injective encoding, and keys that every field changes."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ucm.errors import InvalidArgumentError, LayoutMismatchError
from ucm.hashing import (
    MAX_TOKEN_ID,
    Encodable,
    NamespaceSpec,
    block_key,
    chain_keys,
    check_key,
    encode,
    layout_to_dict,
)
from ucm.layout import KvDtype, KvLayout
from ucm.types import ROOT_KEY, BlockKey, NamespaceId

LAYOUT = KvLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.FLOAT32
)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="smollm2-135m", weights_digest="ab" * 32)
NAMESPACE = SPEC.fingerprint()

GOLDEN_NAMESPACE = "677ed57f78425b4039784117b294f06b247c668b97f4d7fe7c96b8f8812b6fda"
GOLDEN_KEYS = (
    "003f679a653044a057b0bffeba924041c57ef8d8afdf7d5c5a1cf06fbf6402d5",
    "45dcbf4ba53d6f8a760bfe09ea6c86071e548a4c63e19ecbef092b4142065db3",
)


class TestEncoding:
    @pytest.mark.parametrize(
        ("value", "payload"),
        [
            (None, b"n" + bytes(8)),
            (True, b"b\x01" + bytes(7) + b"\x01"),
            (False, b"b\x01" + bytes(7) + b"\x00"),
            (-12, b"i\x03" + bytes(7) + b"-12"),
            (1.5, b"f\x08" + bytes(7) + struct.pack("<d", 1.5)),
            ("é", b"s\x02" + bytes(7) + b"\xc3\xa9"),
            (b"ab", b"y\x02" + bytes(7) + b"ab"),
            ([1], b"l\x0a" + bytes(7) + b"i\x01" + bytes(7) + b"1"),
            ({}, b"d" + bytes(8)),
        ],
    )
    def test_golden(self, value: Encodable, payload: bytes) -> None:
        assert encode(value) == payload

    def test_the_order_of_a_mapping_does_not_matter(self) -> None:
        assert encode({"a": 1, "b": 2}) == encode({"b": 2, "a": 1})

    def test_a_list_and_a_tuple_are_the_same_sequence(self) -> None:
        assert encode([1, "x"]) == encode((1, "x"))

    def test_any_text_can_be_encoded(self) -> None:
        assert encode("\ud800") != encode("?")

    def test_other_types_are_refused(self) -> None:
        with pytest.raises(InvalidArgumentError, match="object"):
            encode(object())  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="set"):
            encode([{1}])  # type: ignore[list-item]


def canonical(value: Any) -> Any:
    """A form whose equality is the identity of encodable values: 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return ("d", frozenset((canonical(key), canonical(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("l", tuple(canonical(item) for item in value))
    if isinstance(value, float):
        return ("f", struct.pack("<d", value))
    return (type(value).__name__, value)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
)
encodables = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.timeout(60)
@settings(max_examples=60)
@given(left=encodables, right=encodables)
def test_the_encoding_is_injective(left: Any, right: Any) -> None:
    assert (encode(left) == encode(right)) == (canonical(left) == canonical(right))


@given(values=st.lists(st.text(max_size=3), min_size=2, max_size=4))
def test_no_two_ways_to_cut_a_text_collide(values: list[str]) -> None:
    assert encode(values) != encode(["".join(values)])


class TestGoldenVectors:
    """Stores outlive programs: these bytes may change only with FORMAT_VERSION."""

    def test_namespace(self) -> None:
        assert NAMESPACE.hex() == GOLDEN_NAMESPACE

    def test_block_keys(self) -> None:
        keys = chain_keys(NAMESPACE, list(range(80)), 32)
        assert tuple(key.hex() for key in keys) == GOLDEN_KEYS

    def test_a_key_is_the_documented_digest(self) -> None:
        tokens = struct.pack("<2i", 5, 6)
        encoded = encode(["ucm.block", 2, NAMESPACE, ROOT_KEY, tokens, ["img"]])
        assert block_key(NAMESPACE, ROOT_KEY, [5, 6], ["img"]) == hashlib.sha256(encoded).digest()


SPEC_FIELDS = [item.name for item in dataclasses.fields(NamespaceSpec) if item.name != "layout"]
LAYOUT_FIELDS = [item.name for item in dataclasses.fields(KvLayout) if item.name != "dtype"]
VALUES: dict[type, st.SearchStrategy[Any]] = {
    str: st.text(max_size=12),
    int: st.integers(0, 2**31),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
}


@pytest.mark.parametrize("name", SPEC_FIELDS)
@given(data=st.data())
def test_each_field_of_a_spec_alone_changes_the_namespace(name: str, data: st.DataObject) -> None:
    old = getattr(SPEC, name)
    new = data.draw(VALUES[type(old)])
    assume(new != old)
    changed = dataclasses.replace(SPEC, **{name: new}).fingerprint()
    assert changed != NAMESPACE
    assert block_key(changed, ROOT_KEY, [1]) != block_key(NAMESPACE, ROOT_KEY, [1])


@pytest.mark.parametrize("name", LAYOUT_FIELDS)
@given(data=st.data())
def test_each_number_of_a_layout_alone_changes_the_namespace(
    name: str, data: st.DataObject
) -> None:
    old = getattr(LAYOUT, name)
    new = data.draw(st.integers(1, 200).filter(lambda value: value != old))
    change: dict[str, Any] = {name: new}
    layout = dataclasses.replace(LAYOUT, **change)
    assert dataclasses.replace(SPEC, layout=layout).fingerprint() != NAMESPACE


@pytest.mark.parametrize("dtype", [KvDtype.FLOAT16, KvDtype.BFLOAT16])
def test_the_dtype_alone_changes_the_namespace(dtype: KvDtype) -> None:
    layout = dataclasses.replace(LAYOUT, dtype=dtype)
    assert dataclasses.replace(SPEC, layout=layout).fingerprint() != NAMESPACE


def test_every_field_is_in_the_fingerprint() -> None:
    """A field that somebody adds and forgets to encode would share blocks wrongly."""
    assert set(layout_to_dict(LAYOUT)) == {item.name for item in dataclasses.fields(KvLayout)}
    assert set(VALUES) >= {type(getattr(SPEC, name)) for name in SPEC_FIELDS}


token_lists = st.lists(st.integers(0, MAX_TOKEN_ID), min_size=1, max_size=8)
parents = st.binary(min_size=32, max_size=32).map(BlockKey)


@given(left=token_lists, right=token_lists)
def test_the_tokens_alone_change_the_key(left: list[int], right: list[int]) -> None:
    keys = block_key(NAMESPACE, ROOT_KEY, left), block_key(NAMESPACE, ROOT_KEY, right)
    assert (keys[0] == keys[1]) == (left == right)


@given(left=parents, right=parents)
def test_the_parent_alone_changes_the_key(left: BlockKey, right: BlockKey) -> None:
    keys = block_key(NAMESPACE, left, [1, 2]), block_key(NAMESPACE, right, [1, 2])
    assert (keys[0] == keys[1]) == (left == right)


@given(left=st.lists(encodables, max_size=3), right=st.lists(encodables, max_size=3))
def test_the_extra_keys_alone_change_the_key(left: list[Any], right: list[Any]) -> None:
    keys = block_key(NAMESPACE, ROOT_KEY, [1], left), block_key(NAMESPACE, ROOT_KEY, [1], right)
    assert (keys[0] == keys[1]) == (canonical(left) == canonical(right))


def test_an_image_and_its_transpose_differ() -> None:
    """CVE-2025-46722: the same bytes in another shape are another image."""
    wide = block_key(NAMESPACE, ROOT_KEY, [1], [["image", [30, 100], b"same"]])
    tall = block_key(NAMESPACE, ROOT_KEY, [1], [["image", [100, 30], b"same"]])
    assert wide != tall


class TestChains:
    def test_only_full_blocks_have_keys(self) -> None:
        assert chain_keys(NAMESPACE, [1, 2, 3], 4) == []
        assert len(chain_keys(NAMESPACE, list(range(11)), 4)) == 2

    def test_each_key_names_the_one_before(self) -> None:
        first, second = chain_keys(NAMESPACE, [1, 2, 3, 4], 2)
        assert first == block_key(NAMESPACE, ROOT_KEY, [1, 2])
        assert second == block_key(NAMESPACE, first, [3, 4])

    def test_a_chain_can_be_continued(self) -> None:
        whole = chain_keys(NAMESPACE, list(range(8)), 2)
        assert chain_keys(NAMESPACE, list(range(4, 8)), 2, parent=whole[1]) == whole[2:]

    @pytest.mark.parametrize("token", [-(2**31) - 1, MAX_TOKEN_ID + 1, 2**40])
    def test_a_token_out_of_range(self, token: int) -> None:
        with pytest.raises(InvalidArgumentError):
            block_key(NAMESPACE, ROOT_KEY, [token])

    @pytest.mark.parametrize("length", [0, 31, 33])
    def test_a_key_of_the_wrong_length(self, length: int) -> None:
        with pytest.raises(InvalidArgumentError, match=str(length)):
            check_key(bytes(length))
        with pytest.raises(InvalidArgumentError):
            block_key(NAMESPACE, BlockKey(bytes(length)), [1])

    def test_namespaces_do_not_share_keys(self) -> None:
        assert block_key(NamespaceId(bytes(32)), ROOT_KEY, [1]) != block_key(
            NAMESPACE, ROOT_KEY, [1]
        )

    def test_a_layout_that_cannot_be_is_no_namespace(self) -> None:
        with pytest.raises(LayoutMismatchError):
            dataclasses.replace(SPEC, layout=dataclasses.replace(LAYOUT, head_dim=0))


def test_a_whole_number_as_rope_base_is_the_same_namespace() -> None:
    layout = KvLayout(
        num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32
    )
    specs = [
        NamespaceSpec(layout=layout, model_id="m", weights_digest="w", rope_base=base)
        for base in (10000, 10000.0)
    ]
    assert specs[0].fingerprint() == specs[1].fingerprint()
