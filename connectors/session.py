"""An engine's session with the cache, whatever the engine: the part all connectors share.

    step path     match                waits for one call, bounded by the deadline
                  start_load ... end   see `LoadDesk`: waits only for layers, bounded likewise
    behind it     store                queued or dropped, never waited for
    background    connect, reconnect, copy out; loads: plans, reads, leases to complete

Invariants: no method but `connect` raises because of the cache. A block is reported as loaded only
when the checksum of every slab, computed over the *destination* after the copy, equals the one
that was made when the block was stored: what is wrong is counted, reported to the cache and
recomputed. After one call that ran into its deadline, or `failures_to_open` failures in a row, the
cache is not asked again until the background thread has reconnected.

Envelope: a call costs about 0.5 ms. Two calls a request, of which the engine waits for one, and two
more a chunk, which is a chain of its own; none a block, none a layer.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ucm.api import LookupResult
from ucm.clock import Clock, SystemClock
from ucm.cost_model import CostModel
from ucm.errors import TierUnavailableError, UcmError
from ucm.hashing import Encodable
from ucm.load_decision import Decide, Decision, LoadShape, decide
from ucm.reuse.chunks import is_chunk_keys
from ucm.types import ROOT_KEY, BlockKey, SummaryKind, TierKind

from .background import Background, BackgroundLimits, Summarise
from .block_summaries import fetch_summaries, write_summaries
from .circuit_breaker import BreakerOptions, BreakerState
from .deadline import DeadlineCaller
from .key_chain import ChainCache
from .link import CacheFactory, CallKind, Connection, Link, LinkOptions
from .load_desk import DeskOptions, LoadDesk
from .load_job import LoadTask
from .session_stats import SessionStats, StatsCounter
from .store_queue import BlockFill, QueueLimits, StoreJob

if TYPE_CHECKING:
    from ucm.hashing import NamespaceSpec
    from ucm.layout import KvLayout
    from ucm.slab_mover import SlabTarget

log = logging.getLogger(__name__)

MAX_REMEMBERED_MATCHES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """Limits of a session."""

    deadline_s: float = 2.0
    """Longest time that one request may lose to the cache before its prefill."""
    connect_timeout_s: float = 30.0
    """Longest time that connecting may take, in the background: a store in this process is opened
    by it, recovery included."""
    max_queued_blocks: int = 1024
    """Blocks that wait to be stored; the engine cannot reuse them meanwhile."""
    store_batch_blocks: int = 32
    """Blocks of one store call, at most: their staging memory is held until it completes."""
    store_batch_bytes: int = 64 << 20
    """Bytes of one store call, at most, but at least one block: a quarter of the staging memory."""
    store_run_blocks: int = 8
    """Blocks that are worth a store call of their own; fewer wait for those that follow them."""
    store_delay_s: float = 5.0
    """Longest time that they wait, unless their request ends before; 0: not at all."""
    max_read_ahead_layers: int = 8
    """Layers that a load may be ahead of the computation."""
    decide: Decide = decide
    """Whether to load, compute, or do both; see `ucm.load_decision`."""
    breaker: BreakerOptions = field(default_factory=BreakerOptions)
    summary: SummaryKind | None = None
    """Summaries that are stored with blocks, computed behind the step path; None: none are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOffer:
    """Places of one request that could be loaded."""

    request_id: str
    """The engine's name for the request."""
    token_ids: Sequence[int]
    """All prompt tokens."""
    blocks: range
    """Indexes in the request's chain."""
    target: SlabTarget
    """Their places, by their index in `blocks`."""
    hold: Callable[[Sequence[int]], Callable[[], None]]
    """Keeps places, by their index in `blocks`, out of use until what it returns is called."""
    extra_keys: tuple[Encodable, ...] = ()
    """What else changed the blocks' bytes; as `match` was asked."""
    whole: bool = False
    """All of `blocks`, layer by layer, or none: a chunk."""
    is_alone: bool = False
    """The engine has nothing else to do than this request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOffer:
    """Full, immutable blocks of one request."""

    request_id: str
    """The engine's name for the request."""
    token_ids: Sequence[int]
    """All tokens up to the end of the last block; a chunk's begin with the chunk."""
    blocks: range
    """Indexes in the request's chain."""
    fill: BlockFill
    """Copies; runs on the background thread."""
    release: Callable[[], None]
    """Called exactly once, when the blocks were copied or dropped."""
    extra_keys: tuple[Encodable, ...] = ()
    """What else changed the blocks' bytes."""


@dataclass(frozen=True, slots=True)
class _Match:
    """What `match` found, for the load that follows."""

    spent_s: float
    tiers: tuple[TierKind, ...]


class CacheSession:
    """One engine's use of one namespace. Step-path methods belong to one thread.

    `loads` has the loads under way, what they taught (`loads.model`) and the last decisions.
    """

    def __init__(
        self,
        factory: CacheFactory,
        spec: NamespaceSpec,
        options: SessionOptions | None = None,
        clock: Clock | None = None,
        model: CostModel | None = None,
    ) -> None:
        """Start to connect, in the background; see `connect` to wait for it.

        Args:
            factory: makes a connection, for example `lambda: connect(path, timeout_s=2.0)`.
            spec: identity of the KV.
            options: limits; the defaults when None.
            clock: for the circuit breaker; the system's when None.
            model: what computing and loading cost; a new one, to be taught, when None.
        """
        self.spec = spec
        self.options = options or SessionOptions()
        self._chains = ChainCache(spec.fingerprint(), spec.layout.block_tokens)
        self._counter = StatsCounter()
        self._matches: OrderedDict[BlockKey, _Match] = OrderedDict()
        self._caller = DeadlineCaller("ucm-session-calls")
        self._link = Link(
            LinkOptions(
                factory=factory,
                spec=spec,
                connect_timeout_s=self.options.connect_timeout_s,
                call_timeout_s=self.options.deadline_s,
                breaker=self.options.breaker,
                summary=self.options.summary,
            ),
            clock or SystemClock(),
            self._counter,
        )
        self.loads = LoadDesk(
            self._link,
            self._counter,
            spec.layout,
            DeskOptions(
                deadline_s=self.options.deadline_s,
                max_read_ahead_layers=self.options.max_read_ahead_layers,
                decide=self.options.decide,
            ),
            model or CostModel(),
        )
        self._background = Background(
            self._link,
            self._counter,
            BackgroundLimits(
                deadline_s=self.options.deadline_s,
                queue=_queue_limits(self.options, spec.layout.block_bytes),
                batch_blocks=_batch_blocks(self.options, spec.layout.block_bytes),
                block_bytes=spec.layout.num_layers * spec.layout.slab_bytes,
                summarise=_summarise(spec.layout, self.options.summary),
                await_reports=self.loads.wait_reported,
            ),
        )
        self._background.start()

    def __enter__(self) -> CacheSession:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def breaker_state(self) -> BreakerState:
        """Whether the cache is asked at all."""
        return self._link.breaker.state

    def connect(self, timeout_s: float) -> None:
        """Wait for the connection; for a command line, where a wrong path is an error.

        An engine need not call it: until the cache is there, everything is a miss.

        Raises:
            UcmError: why the cache could not be reached within `timeout_s`.
        """
        if self._link.wait_open(timeout_s):
            return
        error = self._link.last_error
        if isinstance(error, UcmError):
            raise error
        raise TierUnavailableError(f"no cache within {timeout_s} s: {error or 'no answer'}")

    def ensure_connected(self, timeout_s: float) -> bool:
        """Check the connection, make it anew if it is broken; True when it works."""
        self._link.suspect()
        return self._link.wait_open(timeout_s)

    def match(
        self,
        token_ids: Sequence[int],
        num_local_blocks: int,
        extra_keys: Sequence[Encodable] = (),
    ) -> int:
        """How many leading blocks of `token_ids` are at hand, local ones included.

        Blocks for one call to the cache, at most the deadline.

        Args:
            token_ids: all prompt tokens.
            num_local_blocks: what the engine holds already.
            extra_keys: what else changed the blocks' bytes: a chunk's chain is not a prompt's.
        """
        if not self._link.takes_loads():
            return num_local_blocks
        started_s = time.monotonic()
        keys = self._chains.prompt_keys(token_ids, extra_keys)[num_local_blocks:]
        if not keys:
            return num_local_blocks
        found = self._link.attempt(
            self._caller,
            lambda link: _lookup(link, keys),
            self.options.deadline_s,
            kind=CallKind.LOOKUP,
        )
        tiers = found.value.tiers[: len(keys)] if found.value is not None else ()
        self._counter.add(lookups=1)
        self._remember_match(keys[0], _Match(time.monotonic() - started_s, tiers))
        return num_local_blocks + len(tiers)

    def start_load(self, offer: LoadOffer) -> Decision | None:
        """Decide what to load of what `match` found, and begin; returns at once.

        Then `loads.state`, `loads.wait_layer` and `loads.claim`, by the request's id, with blocks
        counted from the decision's first; and `loads.end`, once.

        Returns:
            What is being loaded; None when nothing is.
        """
        keys = self._keys_of(offer)
        keys = keys[offer.blocks.start : offer.blocks.stop]
        match = self._matches.pop(keys[0], None) if keys else None
        if match is None or not self._link.takes_loads():
            return None
        if offer.whole and len(match.tiers) < len(keys):
            return None
        layout = self.spec.layout
        decision = self.loads.choose(
            LoadShape(
                num_tokens=len(offer.token_ids),
                num_local_tokens=offer.blocks.start * layout.block_tokens,
                tiers=match.tiers[: len(keys)],
                block_tokens=layout.block_tokens,
                block_bytes=layout.num_layers * layout.slab_bytes,
                num_layers=layout.num_layers,
                can_direct=True,
                is_whole=offer.whole,
                is_alone=offer.is_alone,
            )
        )
        if not decision.num_blocks:
            return None
        self.loads.start(
            LoadTask(
                request_id=offer.request_id,
                keys=tuple(keys[: decision.num_blocks]),
                tiers=match.tiers,
                target=offer.target,
                hold=offer.hold,
                decision=decision,
                patience_s=max(0.0, self.options.deadline_s - match.spent_s),
                spent_s=match.spent_s,
            )
        )
        return decision

    def store(self, offer: StoreOffer) -> None:
        """Offer blocks to the cache; returns at once."""
        keys = self._keys_of(offer)
        first = offer.blocks.start
        offered = tuple(keys[first : offer.blocks.stop])
        job = StoreJob(
            request_id=offer.request_id,
            parent=keys[first - 1] if first else ROOT_KEY,
            keys=offered,
            fill=offer.fill,
            release=offer.release,
            is_chunk=is_chunk_keys(offer.extra_keys),
        )
        if not offered or not self._background.submit(job):
            self._counter.add(dropped_blocks=len(offered))
            offer.release()

    def summaries(
        self, token_ids: Sequence[int], extra_keys: Sequence[Encodable] = ()
    ) -> list[bytes | None]:
        """Encoded summaries of the full blocks of `token_ids` that the cache has, in order.

        Blocks for one call to the cache, at most the deadline. Of the step path, as `match` is.

        Returns:
            One entry a full block; None where there is none, or the cache does not answer.
        """
        keys = self._chains.prompt_keys(token_ids, extra_keys)
        nothing: list[bytes | None] = [None] * len(keys)
        if not keys or self.options.summary is None or not self._link.takes_calls():
            return nothing
        deadline_s = self.options.deadline_s
        found = self._link.attempt(
            self._caller,
            lambda link: fetch_summaries(link, keys, 0.8 * deadline_s),
            deadline_s,
        )
        return nothing if found.value is None else found.value

    def finish(self, request_id: str) -> None:
        """Forget a request's chain; what was offered of it waits for nothing more."""
        self._background.hurry(request_id)
        self._chains.drop(request_id)

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was offered is stored and durable; False when it is not by then."""
        stop_s = time.monotonic() + timeout_s
        if not self._background.wait_idle(timeout_s):
            return False
        left_s = max(0.0, stop_s - time.monotonic())
        flushed = self._link.attempt(
            self._caller, lambda link: link.cache.flush(timeout_s=left_s), left_s + 0.5
        )
        return flushed.value is True

    def stats(self) -> SessionStats:
        """The counters now."""
        return self._counter.snapshot()

    def close(self) -> None:
        """End the session; what waits to be stored is dropped. Idempotent."""
        self.loads.close()
        self._background.close(timeout_s=2 * self.options.deadline_s)
        self._caller.close()

    def _keys_of(self, offer: LoadOffer | StoreOffer) -> list[BlockKey]:
        """Of the whole chain; that of a chunk does not grow, and may be many requests'."""
        if is_chunk_keys(offer.extra_keys):
            return self._chains.prompt_keys(offer.token_ids, offer.extra_keys)
        return self._chains.request_keys(offer.request_id, offer.token_ids, offer.extra_keys)

    def _remember_match(self, first_key: BlockKey, match: _Match) -> None:
        self._matches[first_key] = match
        self._counter.add_stall(match.spent_s, match.spent_s)
        while len(self._matches) > MAX_REMEMBERED_MATCHES:
            self._matches.popitem(last=False)

    def should_swap_out(self, num_tokens: int) -> bool:
        """Whether storing `num_tokens` and loading them later beats computing them again."""
        layout = self.spec.layout
        num_bytes = num_tokens // layout.block_tokens * layout.num_layers * layout.slab_bytes
        model, tier = self.loads.model, TierKind.MEMORY
        return self._link.takes_calls() and model.should_reload(0, num_tokens, tier, num_bytes)


def _lookup(link: Connection, keys: Sequence[BlockKey]) -> LookupResult:
    return link.cache.lookup(link.namespace.id, keys)


def _summarise(layout: KvLayout, kind: SummaryKind | None) -> Summarise | None:
    if kind is None:
        return None
    return lambda blocks: write_summaries(layout, kind, blocks)


def _queue_limits(options: SessionOptions, block_bytes: int) -> QueueLimits:
    return QueueLimits(
        max_blocks=options.max_queued_blocks,
        run_blocks=min(options.store_run_blocks, _batch_blocks(options, block_bytes)),
        delay_s=options.store_delay_s,
    )


def _batch_blocks(options: SessionOptions, block_bytes: int) -> int:
    return max(1, min(options.store_batch_blocks, options.store_batch_bytes // block_bytes))
