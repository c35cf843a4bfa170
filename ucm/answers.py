"""What a daemon answers to the calls that arrive in two ways: by gRPC, and at the door.

    service.py  by gRPC, on a thread of its pool; may wait
    door.py     on the session's own thread, which waits for no disk: `at_once`, else `Elsewhere`

Whoever brings a load, it goes through the same gate (`loading`): one count of what is in service,
one board. A call at the door takes none of the session's credit for calls in service: one thread
serves them, so it is one more at a time.

Envelope: 0.06 ms for a lookup of 1,000 keys, 0.15 for a load of 64 blocks of 16 slabs that are all
in memory.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from .config import ServiceConfig
from .credits import Pacer
from .door_wire import MAX_PACKET_BYTES, load_reply_bytes
from .errors import CapacityError, InvalidArgumentError
from .grants import LoadGrants
from .hashing import CheckedKeys
from .layout import KvLayout
from .load_board import MADE_METADATA, LoadBoard, Made, made_of, spread
from .load_gate import GateLimits, LoadGate
from .loads import Admit
from .manager import Manager
from .plan_wire import mode_from_wire, plan_to_wire
from .protos import cache_pb2 as pb
from .types import NamespaceId, SessionId
from .wire import (
    LOAD_STATUS_TO_WIRE,
    TIER_TO_WIRE,
    checked_timeout,
    keys_from_wire,
    lease_from_wire,
    words_to_wire,
)

MAX_RELEASES_PER_CALL: Final = 1024

STORE_SHARE: Final = 0.03
"""Of the time, for the copies of stores while loads go on: loads may lose a quarter of their speed.

Behind a copy come as long a write to disk, its commit, and the client that computed the next
blocks. Two processors, one client that stores without a pause, added to the p50 of 1, 4 and 16
clients that load: a tenth of the time 16, 64 to 130 and 17 % (stores 0.11 to 0.39 GB/s), this 1, 9
to 16 and 5 % (0.03 to 0.09 GB/s)."""

LONGEST_STORE_REST_S: Final = 0.5
"""Less than a call waits: a large copy, or one of a few that wait, is late and not lost. From
copies of 15 ms on it is shorter than the share asks for. Those that come at once share it, and many
take turns by chance: of 16 clients that store without a pause beside loads, one waits 1.5 s at the
median and 9 at the 99th percentile (simulated), and gives up when its call's time is over."""

LOADS_QUIET_S: Final = 0.1
"""No load for so long: stores may take all the time there is."""

_ELSEWHERE: Final = pb.DoorReply(elsewhere=pb.Elsewhere())


class Answers:
    """See the module. Thread-safe; owns the board that the gate writes on."""

    def __init__(self, manager: Manager, config: ServiceConfig) -> None:
        """Nothing is in service.

        Raises:
            CapacityError: the kernel has no memory for the board.
        """
        self.manager = manager
        self.board = LoadBoard()
        """Every client can read it; see there."""
        self.pacer = Pacer(STORE_SHARE, LOADS_QUIET_S, LONGEST_STORE_REST_S)
        """What stores must pass while loads go on."""
        self.gate = LoadGate(GateLimits.of(config, len(os.sched_getaffinity(0))), self.board)
        self._max_keys = config.max_keys_per_call
        self._at_once: Mapping[str, Callable[[SessionId, pb.DoorRequest], pb.DoorReply | None]] = {
            "lookup": self._lookup_at_once,
            "prepare_load": self._prepare_load_at_once,
            "begin_load": self._begin_load_at_once,
            "complete_load": self._complete_load_at_once,
            "release": self._release_at_once,
        }

    def close(self) -> None:
        """Give the board back. Idempotent."""
        self.board.close()

    @contextlib.contextmanager
    def loading(self, session: SessionId, made: Made, began_s: float) -> Iterator[None]:
        """A place in the gate for a load that came at `began_s`, for the length of a `with` block.

        Raises:
            CapacityError: there is none, or the load was refused for another reason; it says when
                to come again.
        """
        self.pacer.note_urgent(began_s)
        metrics = self.manager.metrics
        metrics.add("ucm_refused_loads_total", made.num_refused, by="client")
        was_refused = False
        try:
            self.gate.enter(session, began_s, made)
            try:
                yield
            except CapacityError as error:
                was_refused = True
                error.retry_after_s = spread(error.retry_after_s, random.random())
                raise
            finally:
                self.gate.leave(began_s, time.monotonic(), was_refused=was_refused)
        except CapacityError:
            metrics.add("ucm_refused_loads_total", 1, by="daemon")
            raise
        finally:
            self.pacer.note_urgent(time.monotonic())

    def forget(self, session: SessionId) -> None:
        """A session has ended: it waits for no load."""
        self.gate.forget(session, time.monotonic())

    def keys(self, packed: bytes) -> CheckedKeys:
        """A call's keys.

        Raises:
            InvalidArgumentError: too many, or not whole keys.
        """
        return keys_from_wire(packed, limit=self._max_keys)

    def lookup(self, session: SessionId, request: pb.LookupRequest) -> pb.LookupReply:
        """Longest cached prefix."""
        keys = self.keys(request.keys)
        result = self.manager.lookup(session, NamespaceId(request.namespace), keys)
        return pb.LookupReply(tiers=words_to_wire(result.tiers, TIER_TO_WIRE))

    def complete_load(
        self, session: SessionId, request: pb.CompleteLoadRequest
    ) -> pb.CompleteLoadReply:
        """Give a load lease back."""
        corrupt = self.keys(request.corrupt)
        self.manager.complete_load(session, lease_from_wire(request.lease_id), corrupt)
        return pb.CompleteLoadReply()

    def release(self, session: SessionId, request: pb.ReleaseRequest) -> pb.ReleaseReply:
        """Drop leases."""
        if len(request.lease_ids) > MAX_RELEASES_PER_CALL:
            raise InvalidArgumentError(
                f"{len(request.lease_ids)} leases, at most {MAX_RELEASES_PER_CALL} a call"
            )
        for lease_id in request.lease_ids:
            self.manager.release(session, lease_from_wire(lease_id))
        return pb.ReleaseReply()

    def at_once(self, session: SessionId, kind: str, request: pb.DoorRequest) -> pb.DoorReply:
        """The answer to a call at the door, or `Elsewhere`; waits for no disk.

        Args:
            session: who calls.
            kind: which field of the request is set, one of `door_wire.CALLS`.
            request: what came.

        Raises:
            UcmError: whatever refuses it.
        """
        reply = self._at_once[kind](session, request)
        return _ELSEWHERE if reply is None else reply

    def _lookup_at_once(self, session: SessionId, request: pb.DoorRequest) -> pb.DoorReply:
        return pb.DoorReply(found=self.lookup(session, request.lookup))

    def _prepare_load_at_once(
        self, session: SessionId, request: pb.DoorRequest
    ) -> pb.DoorReply | None:
        asked = request.prepare_load
        keys, namespace = self.keys(asked.keys), NamespaceId(asked.namespace)
        checked_timeout(asked.timeout_s)
        with contextlib.ExitStack() as places:
            admit = self._admission(places, session, request.made, len(keys))
            grants = self.manager.at_once.prepare(session, namespace, keys, admit)
        return None if grants is None else pb.DoorReply(prepared=load_to_wire(grants))

    def _begin_load_at_once(
        self, session: SessionId, request: pb.DoorRequest
    ) -> pb.DoorReply | None:
        asked = request.begin_load
        keys, namespace = self.keys(asked.keys), NamespaceId(asked.namespace)
        mode, timeout_s = mode_from_wire(asked.mode), checked_timeout(asked.timeout_s)
        with contextlib.ExitStack() as places:
            admit = self._admission(places, session, request.made, len(keys))
            grants = self.manager.at_once.begin(
                session, namespace, keys, mode=mode, timeout_s=timeout_s, admit=admit
            )
        return None if grants is None else pb.DoorReply(begun=plan_to_wire(grants))

    def _admission(
        self, places: contextlib.ExitStack, session: SessionId, made: str, num_keys: int
    ) -> Admit:
        """Admits a load whose answer fits a packet, to a place that lasts as long as `places`."""
        began_s = time.monotonic()
        said = made_of(((MADE_METADATA, made),), began_s)

        def admit(layout: KvLayout) -> bool:
            if load_reply_bytes(num_keys, layout.num_layers) > MAX_PACKET_BYTES:
                return False
            places.enter_context(self.loading(session, said, began_s))
            return True

        return admit

    def _complete_load_at_once(
        self, session: SessionId, request: pb.DoorRequest
    ) -> pb.DoorReply | None:
        if request.complete_load.corrupt:  # they are read again
            return None
        return pb.DoorReply(completed=self.complete_load(session, request.complete_load))

    def _release_at_once(self, session: SessionId, request: pb.DoorRequest) -> pb.DoorReply:
        return pb.DoorReply(released=self.release(session, request.release))


def load_to_wire(grants: LoadGrants) -> pb.PrepareLoadReply:
    """A load lease as the daemon's answer."""
    return pb.PrepareLoadReply(
        lease_id=grants.lease_id,
        timeout_s=grants.timeout_s,
        statuses=words_to_wire(grants.statuses, LOAD_STATUS_TO_WIRE),
        tiers=words_to_wire(grants.tiers, TIER_TO_WIRE),
        offsets=grants.offsets,
        checksums=grants.checksums,
    )
