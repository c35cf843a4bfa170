"""Summaries of blocks on the engine's side: written behind what is stored, fetched for a prefix.

    store   on the session's background thread, from the staged bytes, after the engine's copy
    fetch   one call: leased where the cache keeps them, copied, checked, given back

A summary that cannot be made or had never costs a block: it is left out and counted.

Envelope: gsa-k4 of a block of SmolLM2-135M takes some 10 ms of one core and no time of the
engine's step; a fetch of 128 copies 4.6 MB.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from ucm.api import SlabChecksums, StoreSlot
from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import encode_summary, summary_of
from ucm.layout import KvLayout
from ucm.types import BlockKey, SummaryKind

from .link import Connection

log = logging.getLogger(__name__)

WRITE_ERRORS = (
    *(ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RuntimeError),
    *(BufferError, AttributeError),
)
"""What arithmetic on an engine's numbers may fail with, defects included."""


def write_summaries(
    layout: KvLayout,
    kind: SummaryKind,
    blocks: Iterable[tuple[StoreSlot, SlabChecksums]],
) -> int:
    """Put the summary of each staged block where its slot has room for one.

    Args:
        layout: of the blocks.
        kind: what the namespace was opened with.
        blocks: filled slots, with the checksums of what they hold.

    Returns:
        How many were written.
    """
    num_written = 0
    for slot, checksums in blocks:
        if slot.data is None or slot.summary is None:
            continue
        try:
            records = summarize_blocks(layout, kind, [slot.data])[0]
            data = encode_summary(layout, kind, records, checksums)
            slot.summary[: len(data)] = data
        except WRITE_ERRORS as error:
            log.warning("a block is stored without its summary: %s", error)
            continue
        num_written += 1
    return num_written


def fetch_summaries(
    connection: Connection, keys: Sequence[BlockKey], timeout_s: float
) -> list[bytes | None]:
    """Copies of the encoded summaries of `keys`; None where there is none.

    Blocks at most `timeout_s`. Each is whole, of the namespace's layout, and of the content that
    the cache has under that key.

    Raises:
        UcmError: what the call failed with.
    """
    cache, namespace = connection.cache, connection.namespace
    lease = cache.map_summaries(namespace.id, keys, timeout_s=timeout_s)
    try:
        copies = [None if entry is None else bytes(entry) for entry in lease.entries]
    finally:
        cache.release(lease.id)
    return [
        data if data is None or _is_sound(namespace.layout, data, content) else None
        for data, content in zip(copies, lease.contents, strict=True)
    ]


def _is_sound(layout: KvLayout, data: bytes, content: int) -> bool:
    return summary_of(layout, data, content) is not None
