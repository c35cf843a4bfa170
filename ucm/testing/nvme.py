"""Small NVMe stores for tests, on memory-backed disk where there is one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ucm.config import NvmeConfig
from ucm.kernels.summary_record import area_bytes
from ucm.storage.codecs import codec_named
from ucm.storage.format import HEADER_BYTES, compact_payload_bytes
from ucm.storage.nvme import NvmeStore, NvmeTier
from ucm.types import NamespaceId, SummaryKind

from .tier_conformance import LAYOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMESPACE = NamespaceId(b"conformance tests' namespace, id")
SLOT_BYTES = HEADER_BYTES + LAYOUT.block_bytes


def head_bytes(summary: SummaryKind | None) -> int:
    """What lies in front of a block of the test layout."""
    return HEADER_BYTES + (area_bytes(LAYOUT, summary) if summary else 0)


def nvme_config(
    path: Path,
    num_slots: int,
    *,
    slots_per_segment: int = 4,
    codec: str = "raw",
    summary: SummaryKind | None = None,
) -> NvmeConfig:
    """A store of `num_slots` slots of the test layout, a multiple of `slots_per_segment`.

    With a codec they are compact ones, and a segment has room for a full slot at least; with
    `summary` there is room for such summaries.
    """
    assert num_slots % slots_per_segment == 0, (num_slots, slots_per_segment)
    compact_bytes = compact_payload_bytes(LAYOUT, codec_named(codec))
    slot_bytes = head_bytes(summary) + (compact_bytes or LAYOUT.block_bytes)
    return NvmeConfig(
        path=path,
        codec=codec,
        capacity_bytes=num_slots * slot_bytes,
        segment_bytes=slots_per_segment * slot_bytes,
        io_threads=2,
        index_map_bytes=16 << 20,
    )


def open_tier(path: Path, num_slots: int = 8) -> tuple[NvmeStore, NvmeTier]:
    """The store in a data folder, and its namespace of the test layout; the caller closes it."""
    store = NvmeStore(nvme_config(path, num_slots))
    return store, store.open_namespace(NAMESPACE, LAYOUT)


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """A temporary folder whose fsync costs nothing, where the machine has one."""
    memory = Path("/dev/shm")  # noqa: S108  named by the kernel
    folder = Path(tempfile.mkdtemp(prefix="ucm", dir=memory if memory.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
