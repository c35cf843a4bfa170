"""Messages: round trips, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm import wire
from ucm.errors import LEAVES, CapacityError, InvalidArgumentError, LayoutMismatchError, UcmError
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.protos import cache_pb2 as pb
from ucm.types import BlockKey, LoadStatus

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT16)

numbers = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
layouts = st.builds(
    KvLayout,
    num_layers=st.integers(1, 64),
    num_kv_heads=st.integers(1, 16),
    head_dim=st.integers(1, 256),
    block_tokens=st.integers(1, 64),
    dtype=st.sampled_from(KvDtype),
)
specs = st.builds(
    NamespaceSpec,
    layout=layouts,
    model_id=texts,
    weights_digest=texts,
    tenant=texts,
    salt=texts,
    rope_base=st.floats(allow_nan=False),
    rope_scaling=texts,
    position_offset=numbers,
    tp_rank=numbers,
    lora_path=texts,
)


@given(spec=specs)
def test_a_namespace_survives_the_wire_with_its_id(spec: NamespaceSpec) -> None:
    packed = wire.spec_to_wire(spec).SerializeToString()
    back = wire.spec_from_wire(pb.NamespaceSpec.FromString(packed))
    assert back == spec
    assert back.fingerprint() == spec.fingerprint()


def test_a_namespace_that_cannot_be_sent_is_refused() -> None:
    spec = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="w")
    for bad in (
        replace(spec, tp_rank=2**63),
        replace(spec, model_id="\ud800"),
        replace(spec, tenant=7),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidArgumentError, match="cannot be sent"):
            wire.spec_to_wire(bad)


def test_a_layout_with_an_unknown_dtype_or_no_layers_is_refused() -> None:
    message = wire.layout_to_wire(LAYOUT)
    message.dtype = pb.DTYPE_UNSPECIFIED
    with pytest.raises(InvalidArgumentError, match="dtype"):
        wire.layout_from_wire(message)
    message = wire.layout_to_wire(LAYOUT)
    message.num_layers = 0
    with pytest.raises(LayoutMismatchError):
        wire.layout_from_wire(message)


@given(
    blocks=st.integers(1, 5).flatmap(
        lambda n: st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * n), min_size=1, max_size=8)
    )
)
def test_checksums_survive_the_wire(blocks: list[tuple[int, ...]]) -> None:
    packed = wire.checksums_to_wire(blocks)
    assert len(packed) == 8 * sum(map(len, blocks))
    assert wire.checksums_from_wire(packed, num_blocks=len(blocks)) == blocks


@pytest.mark.parametrize(("size", "num_blocks"), [(8, 0), (0, 1), (12, 1), (24, 2), (16, 3)])
def test_checksums_that_do_not_divide_are_refused(size: int, num_blocks: int) -> None:
    with pytest.raises(InvalidArgumentError):
        wire.checksums_from_wire(bytes(size), num_blocks=num_blocks)


def test_a_checksum_above_64_bits_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="64 bits"):
        wire.checksums_to_wire([(2**64,)])


def test_keys_are_counted_and_measured() -> None:
    keys = [BlockKey(bytes([number]) * 32) for number in range(3)]
    assert list(wire.keys_from_wire(wire.keys_to_wire(keys), limit=3)) == keys
    assert list(wire.keys_from_wire(wire.keys_to_wire([]), limit=0)) == []
    with pytest.raises(InvalidArgumentError, match="at most 2"):
        wire.keys_from_wire(bytes(96), limit=2)
    with pytest.raises(InvalidArgumentError, match="31"):
        wire.keys_from_wire(bytes(31), limit=2)
    with pytest.raises(InvalidArgumentError, match="31"):
        wire.keys_to_wire([BlockKey(bytes(31)), BlockKey(bytes(33))])
    with pytest.raises(InvalidArgumentError, match="15"):
        wire.lease_from_wire(bytes(15))


@given(words=st.lists(st.sampled_from(LoadStatus)))
def test_words_survive_the_wire(words: list[LoadStatus]) -> None:
    packed = wire.words_to_wire(words, wire.LOAD_STATUS_TO_WIRE)
    assert len(packed) == len(words)
    assert wire.words_from_wire(packed, wire.LOAD_STATUS_FROM_WIRE) == tuple(words)


@pytest.mark.parametrize("packed", [b"\0", b"\1\xff"])
def test_a_number_that_is_no_word_is_refused(packed: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="number"):
        wire.words_from_wire(packed, wire.LOAD_STATUS_FROM_WIRE)


@pytest.mark.parametrize("leaf", LEAVES)
def test_errors_come_back_as_their_class(leaf: type[UcmError]) -> None:
    error = wire.error_from_wire(leaf.__name__, "why")
    assert type(error) is leaf
    assert str(error) == "why"


@pytest.mark.parametrize(
    ("hint", "expected_s"),
    [("250", 0.25), (b"1", 0.001), ("999999999", wire.MAX_RETRY_AFTER_S)]
    + [(bad, 0.1) for bad in ("", "-1", "1.5", "soon", "9" * 400, "\u0663")],
)
def test_a_retry_hint_is_a_bounded_number_or_nothing(hint: str | bytes, expected_s: float) -> None:
    metadata = [(wire.ERROR_METADATA, "CapacityError"), (wire.RETRY_AFTER_METADATA, hint)]
    error = wire.error_from_metadata(metadata, "full")
    assert isinstance(error, CapacityError)
    assert error.retry_after_s == expected_s
    assert wire.error_from_metadata(metadata[1:], "full") is None


def test_only_a_refusal_carries_a_hint() -> None:
    assert wire.error_to_metadata(UcmError("x")) == ((wire.ERROR_METADATA, "UcmError"),)
    sent = wire.error_to_metadata(CapacityError("x", retry_after_s=0.0001))
    assert sent[1] == (wire.RETRY_AFTER_METADATA, "1")


def test_an_unknown_error_is_still_ours() -> None:
    assert type(wire.error_from_wire("OfTomorrowError", "why")) is UcmError
