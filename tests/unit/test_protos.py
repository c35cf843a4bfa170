"""The generated code is what the proto file generates, and says what the code's words say."""

from __future__ import annotations

import enum
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from grpc_tools import protoc

from ucm import wire
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.protos import cache_pb2 as pb
from ucm.types import LoadStatus, StoreStatus, TierKind

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("cache_pb2.py", "cache_pb2_grpc.py", "cache_pb2.pyi")


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    arguments = [
        "protoc",
        f"-Iucm/protos={ROOT / 'protos'}",
        f"--python_out={tmp_path}",
        f"--grpc_python_out={tmp_path}",
        f"--pyi_out={tmp_path}",
        "ucm/protos/cache.proto",
    ]
    assert protoc.main(arguments) == 0
    for name in GENERATED:
        made = (tmp_path / "ucm" / "protos" / name).read_text()
        assert made == (ROOT / "protos" / name).read_text(), f"{name} is stale: see protos/README"


@pytest.mark.parametrize(
    ("words", "table", "wire_enum"),
    [
        (TierKind, wire.TIER_TO_WIRE, pb.Tier),
        (LoadStatus, wire.LOAD_STATUS_TO_WIRE, pb.LoadStatus),
        (StoreStatus, wire.STORE_STATUS_TO_WIRE, pb.StoreStatus),
        (KvDtype, wire.DTYPE_TO_WIRE, pb.Dtype),
    ],
)
def test_every_word_has_one_number_and_none_is_zero(
    words: type[enum.Enum], table: dict[Any, int], wire_enum: Any
) -> None:
    assert set(table) == set(words)
    assert sorted(table.values()) == sorted(number for number in wire_enum.values() if number)
    assert wire_enum.Name(0).endswith("_UNSPECIFIED")
    for word, number in table.items():
        assert wire_enum.Name(number).endswith(f"_{word.name}")


def test_the_namespace_message_has_every_field_of_the_spec() -> None:
    ours = {item.name for item in fields(NamespaceSpec)}
    assert ours == set(pb.NamespaceSpec.DESCRIPTOR.fields_by_name)
    ours = {item.name for item in fields(KvLayout)}
    assert ours == set(pb.Layout.DESCRIPTOR.fields_by_name)


def test_no_cache_message_has_room_for_kv_bytes() -> None:
    """Every bytes field of service Cache is a name, a lease, a checksum or a word a key."""
    allowed = {"namespace", "keys", "lease_id", "lease_ids", "corrupt", "parent", "checksums"}
    allowed |= {"statuses", "sources", "tiers"}  # a byte a key
    allowed |= {"queries"}  # of the engine's, not of the cache
    allowed |= {"blocks", "shares", "masses"}  # of chosen blocks: an index, a number
    allowed |= {"log_masses", "lowers", "uppers", "skipped_uppers"}  # a number a head
    for method in pb.DESCRIPTOR.services_by_name["Cache"].methods:
        for message in (method.input_type, method.output_type):
            found = {item.name for item in message.fields if item.type == item.TYPE_BYTES}
            assert found <= allowed, message.name
