"""What both ends of the door agree on beside its messages: how long one is, which are calls.

calls    requests of service Cache; see `protos/cache.proto`. The daemon answers each at once, by
         itself or with `elsewhere`, so a client may give one up and stay
leases   calls whose answer may hold a lease: who gives one up says so (`GiveUp`)
"""

from __future__ import annotations

from typing import Final

MAX_PACKET_BYTES: Final = 64 << 10
"""Largest door message, both ways; a longer one is refused, not cut."""


def new_packet_buffer() -> bytearray:
    """Memory for one message at a time: asked for once, a receiver need not ask with each."""
    return bytearray(MAX_PACKET_BYTES)


ANSWERS: Final = {
    "hello": ("welcome", 3),
    "open_namespace": ("opened", 1),
    "open_segment": ("segment", 1),
    "open_progress": ("progress", 2),
    "open_summaries": ("summaries", 1),
    "lookup": ("found", 0),
    "prepare_load": ("prepared", 0),
    "begin_load": ("begun", 0),
    "complete_load": ("completed", 0),
    "release": ("released", 0),
}
"""The reply to each request, and how many descriptors come with it."""

CALLS: Final = frozenset({"lookup", "prepare_load", "begin_load", "complete_load", "release"})
LEASING: Final = frozenset({"prepare_load", "begin_load"})

_REPLY_BYTES: Final = 1024
"""Of the answer to a load, what does not grow with its keys, and more."""

_PLACE_BYTES: Final = 48
"""Of an answer, what says where one block is: three words and at most four numbers of 64 bits, of
up to 10 bytes each, and one of 32 bits, of up to 5."""


def load_reply_bytes(num_keys: int, num_layers: int) -> int:
    """Longest packet that answers a load of so many blocks of so many slabs."""
    return _REPLY_BYTES + num_keys * (_PLACE_BYTES + 8 * num_layers)
