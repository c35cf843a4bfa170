"""An engine's session with the cache, whatever the engine: the part all connectors share.

    step path     match -> load        bounded by the deadline, both together; a failure is a miss
    behind it     store                queued or dropped, never waited for
    background    connect, reconnect, copy out, complete leases

Invariants: no method but `connect` raises because of the cache. A block is reported as loaded only
when the checksum of every slab, computed over the *destination* after the copy, equals the one
that was made when the block was stored: what is wrong is counted, reported to the cache and
recomputed. After one call that ran into its deadline, or `failures_to_open` failures in a row, the
cache is not asked again until the background thread has reconnected.

Envelope: 3,000 tokens of SmolLM2-135M in fp32 are 93 blocks, 138 MB: 14 ms of copy at 10 GB/s and
as much of checksum, on one core, shared out by the session's copier; a call costs about 0.5 ms. Two
calls a request, none a block.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ucm.api import LoadedBlock, LoadLease, LookupResult, SlabChecksums
from ucm.clock import Clock, SystemClock
from ucm.copying import BlockCopier
from ucm.errors import TierUnavailableError, UcmError
from ucm.types import ROOT_KEY, BlockKey, LoadStatus

from .background import COPY_ERRORS, Background, BackgroundLimits, BlockFill, StoreJob
from .circuit_breaker import BreakerOptions, BreakerState
from .deadline import DeadlineCaller
from .key_chain import ChainCache
from .link import CacheFactory, Connection, Link, LinkOptions
from .session_stats import SessionStats, StatsCounter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ucm.hashing import NamespaceSpec

log = logging.getLogger(__name__)

BlockSink = Callable[[int, Sequence[memoryview]], list[SlabChecksums]]
"""`sink(first, blocks)` copies blocks to the places `first, first + 1, ...` of the load and returns
the checksums of what those places hold afterwards."""

CACHE_SHARE_OF_DEADLINE = 0.75
"""The cache is asked to answer a load within this share, so that what arrived by then is used."""

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
    load_batch_blocks: int = 32
    """Blocks copied between two looks at the clock: 10 to 50 ms of copying. At its end the copier's
    threads wait for each other."""
    breaker: BreakerOptions = field(default_factory=BreakerOptions)


class CacheSession:
    """One engine's use of one namespace. Step-path methods belong to one thread.

    `copier` has the threads that a connector's sink shares its copying out to.
    """

    def __init__(
        self,
        factory: CacheFactory,
        spec: NamespaceSpec,
        options: SessionOptions | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Start to connect, in the background; see `connect` to wait for it.

        Args:
            factory: makes a connection, for example `lambda: connect(path, timeout_s=2.0)`.
            spec: identity of the KV.
            options: limits; the defaults when None.
            clock: for the circuit breaker; the system's when None.
        """
        self.spec = spec
        self.options = options or SessionOptions()
        self.copier = BlockCopier(spec.layout)
        self._chains = ChainCache(spec.fingerprint(), spec.layout.block_tokens)
        self._counter = StatsCounter()
        self._match_spent_s: OrderedDict[BlockKey, float] = OrderedDict()
        self._caller = DeadlineCaller("ucm-session-calls")
        self._link = Link(
            LinkOptions(
                factory=factory,
                spec=spec,
                connect_timeout_s=self.options.connect_timeout_s,
                call_timeout_s=self.options.deadline_s,
                breaker=self.options.breaker,
            ),
            clock or SystemClock(),
            self._counter,
        )
        self._background = Background(
            self._link,
            self._counter,
            BackgroundLimits(
                deadline_s=self.options.deadline_s,
                max_queued_blocks=self.options.max_queued_blocks,
                batch_blocks=_batch_blocks(self.options, spec.layout.block_bytes),
                block_bytes=spec.layout.num_layers * spec.layout.slab_bytes,
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

    def match(self, token_ids: Sequence[int], num_local_blocks: int) -> int:
        """How many leading blocks of `token_ids` are at hand, local ones included.

        Blocks for one call to the cache, at most the deadline.

        Args:
            token_ids: all prompt tokens.
            num_local_blocks: what the engine holds already.
        """
        if not self._link.takes_calls():
            return num_local_blocks
        started_s = time.monotonic()
        keys = self._chains.prompt_keys(token_ids)[num_local_blocks:]
        if not keys:
            return num_local_blocks
        found = self._link.attempt(
            self._caller, lambda link: _lookup(link, keys), self.options.deadline_s
        )
        num_found = found.value.num_blocks if found.value is not None else 0
        self._counter.add(lookups=1)
        self._remember_match(keys[0], time.monotonic() - started_s)
        return num_local_blocks + min(num_found, len(keys))

    def load(
        self,
        request_id: str,
        token_ids: Sequence[int],
        blocks: range,
        sink: BlockSink,
    ) -> int:
        """Copy cached blocks to where the engine wants them, and verify them there.

        Blocks for at most what the deadline has left after the request's `match`.

        Args:
            request_id: the engine's name for the request.
            token_ids: all prompt tokens.
            blocks: indexes in the request's chain.
            sink: copies; called on the calling thread, has finished when it returns.

        Returns:
            Number of leading blocks that are complete and verified. The places behind may have
            been written to and hold nothing of value.
        """
        keys = self._chains.request_keys(request_id, token_ids)[blocks.start : blocks.stop]
        if not keys or not self._link.takes_calls():
            return 0
        spent_s = self._match_spent_s.pop(keys[0], 0.0)
        with self._timed(spent_s):
            stop_s = time.monotonic() + self.options.deadline_s - spent_s
            lease = self._prepare_load(keys, stop_s)
            if lease is None:
                return 0
            return self._copy_verified(lease, sink, stop_s)

    def store(
        self,
        request_id: str,
        token_ids: Sequence[int],
        blocks: range,
        fill: BlockFill,
        release: Callable[[], None],
    ) -> None:
        """Offer full, immutable blocks to the cache; returns at once.

        Args:
            request_id: the engine's name for the request.
            token_ids: all tokens up to the end of the last block.
            blocks: indexes in the request's chain.
            fill: copies; runs on the background thread.
            release: called exactly once, when the blocks were copied or dropped.
        """
        keys = self._chains.request_keys(request_id, token_ids)
        offered = tuple(keys[blocks.start : blocks.stop])
        parent = keys[blocks.start - 1] if blocks.start else ROOT_KEY
        job = StoreJob(parent=parent, keys=offered, fill=fill, release=release)
        if not offered or not self._background.submit(job):
            self._counter.add(dropped_blocks=len(offered))
            release()

    def finish(self, request_id: str) -> None:
        """Forget a request's chain."""
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
        self._background.close(timeout_s=2 * self.options.deadline_s)
        self._caller.close()
        self.copier.close()

    def _remember_match(self, first_key: BlockKey, spent_s: float) -> None:
        self._match_spent_s[first_key] = spent_s
        self._counter.add_stall(spent_s, spent_s)
        while len(self._match_spent_s) > MAX_REMEMBERED_MATCHES:
            self._match_spent_s.popitem(last=False)

    @contextmanager
    def _timed(self, spent_before_s: float) -> Iterator[None]:
        started_s = time.monotonic()
        try:
            yield
        finally:
            stall_s = time.monotonic() - started_s
            self._counter.add_stall(stall_s, spent_before_s + stall_s)

    def _prepare_load(self, keys: Sequence[BlockKey], stop_s: float) -> LoadLease | None:
        left_s = stop_s - time.monotonic()
        if left_s <= 0:
            return None
        timeout_s = left_s * CACHE_SHARE_OF_DEADLINE
        prepared = self._link.attempt(
            self._caller,
            lambda link: link.cache.prepare_load(link.namespace.id, keys, timeout_s=timeout_s),
            left_s,
            on_late=lambda link, lease: link.cache.release(lease.id),
        )
        return prepared.value

    def _copy_verified(self, lease: LoadLease, sink: BlockSink, stop_s: float) -> int:
        """Copy the leading ready blocks batch by batch, until one is wrong or time is up."""
        ready = lease.blocks[: lease.num_ready]
        num_good, size = 0, self.options.load_batch_blocks
        corrupt: list[BlockKey] = []
        try:
            for first in range(0, len(ready), size):
                batch = ready[first : first + size]
                if time.monotonic() >= stop_s:
                    break
                good = self._copy_batch(first, batch, sink)
                num_good += good
                if good < len(batch):
                    corrupt.append(batch[good].key)
                    break
        except COPY_ERRORS as error:
            log.warning("copying blocks out of the cache failed: %s", error)
            self._counter.add(failures=1)
        self._background.send(lambda link: link.cache.complete_load(lease.id, corrupt))
        self._count_load(lease, num_good)
        return num_good

    def _copy_batch(self, first: int, batch: Sequence[LoadedBlock], sink: BlockSink) -> int:
        """Returns how many leading blocks of the batch arrived intact."""
        views = [block.data for block in batch if block.data is not None]
        found = sink(first, views)
        for index, (block, checksums) in enumerate(zip(batch, found, strict=True)):
            if checksums != block.checksums:
                self._count_wrong(block.checksums, checksums)
                return index
        return len(batch)

    def _count_wrong(self, expected: SlabChecksums, found: SlabChecksums) -> None:
        num_wrong = sum(a != b for a, b in zip(expected, found, strict=False))
        num_wrong += abs(len(expected) - len(found))
        self._counter.add(
            corrupt_blocks=1,
            wrong_slabs=num_wrong,
            wrong_bytes=num_wrong * self.spec.layout.slab_bytes,
        )
        log.error("a block failed its checksum after the copy; it is recomputed")

    def _count_load(self, lease: LoadLease, num_good: int) -> None:
        layout = self.spec.layout
        for block in lease.blocks[:num_good]:
            if block.tier is not None:
                self._counter.add_hit(block.tier, layout.block_tokens)
        self._counter.add(
            loaded_blocks=num_good,
            loaded_bytes=num_good * layout.num_layers * layout.slab_bytes,
            missed_blocks=len(lease.blocks) - num_good,
            corrupt_blocks=sum(b.status is LoadStatus.CORRUPT for b in lease.blocks),
        )


def _lookup(link: Connection, keys: Sequence[BlockKey]) -> LookupResult:
    return link.cache.lookup(link.namespace.id, keys)


def _batch_blocks(options: SessionOptions, block_bytes: int) -> int:
    return max(1, min(options.store_batch_blocks, options.store_batch_bytes // block_bytes))
