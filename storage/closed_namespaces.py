"""Erasing blocks of a namespace that nobody has open: what is on the disk, and what is put aside.

    PATH/ns/<hex>/          opened with what its superblock says, cleaned, closed
    PATH/quarantine/<hex>/  a namespace that `ucm fsck --repair` moved aside: removed as a whole

The caller sees to it that nobody opens the namespace meanwhile.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

from ucm.errors import TierUnavailableError

from .folder import read_superblock, read_tenant
from .stray_files import remove

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from ucm.layout import KvLayout
    from ucm.types import BlockKey, NamespaceId

    from .tier import SlotId, Tier, TierEntry


class Opener(Protocol):
    """What opens tiers: `NvmeStore`, or what stands for it in a test."""

    def open_namespace(self, namespace: NamespaceId, layout: KvLayout, tenant: str = "") -> Tier:
        """See `NvmeStore.open_namespace`."""


def erase_closed(
    store: Opener, path: Path, namespace: NamespaceId, keys: Collection[BlockKey]
) -> None:
    """Delete blocks of a closed namespace, with all behind them, and erase their bytes; durably.

    Opening recovers it first, if need be. A namespace without a folder has nothing to erase.

    Args:
        store: of the data folder.
        path: the data folder.
        namespace: which nobody has open.
        keys: of the blocks; those that are not there are no error.

    Raises:
        CorruptionError: the namespace cannot be opened; `ucm fsck --repair` moves it aside.
        CapacityError, TierUnavailableError, ConfigError: the disk refuses; all of it again later.
    """
    remove_aside(path, namespace)
    folder = path / "ns" / namespace.hex()
    if not folder.exists():
        return
    with _opened(store, folder, namespace) as tier:
        tier.delete(with_descendants(tier.entries(), keys))
        if tier.eraser is not None:
            tier.eraser.erase(keys)


def remove_aside(path: Path, namespace: NamespaceId) -> None:
    """Remove what `ucm fsck --repair` kept of a namespace that it moved aside.

    Raises:
        TierUnavailableError: the disk does not allow it.
    """
    try:
        remove(path / "quarantine" / namespace.hex())
    except OSError as error:
        raise TierUnavailableError(
            f"{path / 'quarantine' / namespace.hex()} may hold deleted blocks and cannot be "
            f"removed: {error}"
        ) from error


def with_descendants(
    entries: Iterable[TierEntry], keys: Collection[BlockKey]
) -> list[tuple[SlotId, BlockKey]]:
    """Slot and key of those of `keys` that are in a tier, and of all behind them.

    Args:
        entries: of the tier, a parent before its children.
        keys: of blocks.
    """
    wanted = set(keys)
    found: list[tuple[SlotId, BlockKey]] = []
    for entry in entries:
        if entry.key in wanted or entry.parent in wanted:
            wanted.add(entry.key)
            found.append((entry.slot, entry.key))
    return found


@contextlib.contextmanager
def _opened(store: Opener, folder: Path, namespace: NamespaceId) -> Iterator[Tier]:
    superblock, tenant = read_superblock(folder), read_tenant(folder)
    tier = store.open_namespace(namespace, superblock.layout, tenant)
    try:
        yield tier
    finally:
        tier.close()
