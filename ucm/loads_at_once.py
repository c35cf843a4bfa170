"""Loads that are answered without a wait, or not at all: for who has no thread to spare.

Everything is decided under the manager's lock, in one go: whether nothing has to be read or moved
first, whether the caller admits the load, and then the lease. Who is told None has leased nothing,
and nothing was counted; the call that may wait is the manager's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .grants import LoadGrants
from .layer_loads import LayerLoads
from .loads import Admit, LoadPath
from .plan_grants import PlanGrants
from .types import BlockKey, LoadMode, NamespaceId, SessionId


class LoadsAtOnce:
    """See the module. Thread-safe."""

    def __init__(
        self,
        loads: LoadPath,
        layer_loads: LayerLoads,
        note_use: Callable[[NamespaceId, Sequence[BlockKey]], None],
    ) -> None:
        """Load by these; `note_use` is told which leading keys of a load were there."""
        self._loads = loads
        self._layer_loads = layer_loads
        self._note_use = note_use

    def prepare(
        self, session: SessionId, namespace: NamespaceId, keys: Sequence[BlockKey], admit: Admit
    ) -> LoadGrants | None:
        """`Manager.prepare_load`; None unless all of the usable prefix is in memory.

        Raises:
            CapacityError: `admit` refused it, or the session holds too many leases.
        """
        grants = self._loads.prepare_at_once(session, namespace, keys, admit)
        if grants is not None:
            self._note_use(namespace, keys[: len(grants.offsets)])
        return grants

    def begin(
        self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
        admit: Admit,
    ) -> PlanGrants | None:
        """`Manager.begin_load`; None where room may have to be made in memory first.

        Raises:
            CapacityError: see `prepare`.
        """
        grants = self._layer_loads.begin_at_once(
            session, namespace, keys, mode=mode, timeout_s=timeout_s, admit=admit
        )
        if grants is not None:
            self._note_use(namespace, keys[: len(grants.sources)])
        return grants
