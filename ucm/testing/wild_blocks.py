"""Blocks that no lossy codec can represent: any bit patterns, NaNs and infinities among them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from ucm.checksum import block_checksums
from ucm.storage.tier import SlotId, SlotWrite
from ucm.types import ROOT_KEY

from .tier_conformance import LAYOUT, make_key

if TYPE_CHECKING:
    from ucm.layout import KvLayout


def make_wild_block(name: int | str, layout: KvLayout = LAYOUT) -> memoryview:
    """Random bytes that differ for each name; read-only."""
    return memoryview(hashlib.shake_128(f"wild {name}".encode()).digest(layout.block_bytes))


def make_wild_write(slot: SlotId, name: int | str) -> SlotWrite:
    """A write of `make_wild_block(name)` under `make_key(name)`."""
    data = make_wild_block(name)
    return SlotWrite(slot, make_key(name), ROOT_KEY, data, block_checksums(LAYOUT, data))
