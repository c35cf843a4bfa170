"""`ChunkShelf`: the original bytes of chunks, in pool blocks of their own, for who blends them in.

    open    | in the pool, under the chunk's own links         -> ready
            | all the rest is in the hook's store              -> loading, layer by layer -> ready
            | no, or the load came short                       -> missing -> encoding     -> ready
    close   the last user goes: an idle block stays findable, what is not ready is given up

A missing chunk is computed by a private sequence `sink | chunk`, which the ordinary scheduler runs
beside everything else; its rows are copied to whole blocks, registered, and offered to the hook.

Invariants
* A chunk that several requests want is loaded or computed once.
* Only complete, verified rows are registered, and only under the links of a chunk.
* Rows of a ready original are never written.
* Blocks that a load left unfinished are zeroed or, while they may be written to, exchanged.

Envelope: one look-up, or one load, a chunk and request; a copy of 1.4 MB a block that is encoded.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ucm.clock import Clock
from ucm.hashing import chain_keys
from ucm.reuse.chunks import chunk_extra_keys
from ucm.types import ROOT_KEY, LoadOrder

from .allocator import ChainLink
from .chunk_rows import copy_rows
from .guarded_hook import GuardedHook
from .hook import LoadRequest, LoadStart, LoadState, StoreRequest
from .layer_clock import LayerClock
from .pool import KvPool
from .reuse_report import ChunkOutcome, ReuseStats
from .sampling import SamplingParams
from .sequence import POOL_NAMESPACE, TokenSequence

logger = logging.getLogger(__name__)

MAX_ENCODING = 2
"""Chunks that are computed at once: more would only hold blocks longer."""


class OriginalState(enum.Enum):
    """Where a chunk's bytes are."""

    READY = enum.auto()
    LOADING = enum.auto()
    MISSING = enum.auto()
    """To be computed."""
    ENCODING = enum.auto()
    FAILED = enum.auto()
    """There is no room for it, or the model computed no numbers."""


@dataclass(slots=True, eq=False, kw_only=True)
class Original:
    """One chunk's bytes, for all who use them."""

    name: str
    """Towards the hook."""
    links: tuple[ChainLink, ...]
    block_ids: list[int]
    arrival: tuple[int, int]
    """Of the sequence that computes it, if need be."""
    state: OriginalState
    num_found: int
    """Leading blocks that the pool held."""
    num_users: int = 1
    num_losses: int = 0
    """Times that what was counted on did not come: who has read rows of it must begin anew."""
    num_layers_ready: int = 0
    num_layers_good: int = 0
    """Layers whose rows were found to be there and verified, for as long as the load lasts."""
    load: LoadStart | None = None
    started_us: int = 0
    encoder: TokenSequence | None = None
    num_loaded: int = 0
    """Blocks that the hook loaded."""
    num_encoded: int = 0
    """Blocks that were computed."""
    is_offered: bool = False
    """Whether the hook has it, or was offered it."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the chunk."""
        return len(self.links)

    @property
    def is_ready(self) -> bool:
        """Whether all of it is there."""
        return self.state is OriginalState.READY

    @property
    def is_readable(self) -> bool:
        """Whether its rows are there, or will be, layer by layer."""
        return self.state in (OriginalState.READY, OriginalState.LOADING)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelfParts:
    """What a shelf works with."""

    pool: KvPool
    hook: GuardedHook
    clock: Clock
    sink_tokens: tuple[int, ...]
    max_pinned: int
    """Blocks that stores may pin."""
    max_load_s: float
    """A load is ended after this time."""
    stats: ReuseStats
    submit: Callable[[TokenSequence], None]
    """Queues a private sequence."""
    retire: Callable[[TokenSequence], None]
    """Takes it out again."""


@dataclass(slots=True)
class ChunkShelf:
    """See the module. Owned by the engine's thread."""

    parts: ShelfParts
    _originals: dict[object, Original] = field(default_factory=dict)
    """By the key of their last block."""
    _num_named: int = 0

    @property
    def owned(self) -> list[list[int]]:
        """Blocks that originals own; for checks."""
        return [original.block_ids for original in self._originals.values()]

    def open(
        self, token_ids: tuple[int, ...], owner: str, arrival: tuple[int, int]
    ) -> Original | None:
        """Become a user of a chunk's original; close it in the end.

        Args:
            token_ids: whole blocks.
            owner: name of the sequence that wants it.
            arrival: of that sequence.

        Returns:
            None when the pool has no room for it.
        """
        links = self._links(token_ids)
        known = self._originals.get(links[-1].key)
        if known is not None and known.links == links:
            known.num_users += 1
            return known
        blocks = self.parts.pool.blocks
        found = blocks.find(links)
        blocks.acquire(found)
        num_missing = len(links) - len(found)
        if num_missing > blocks.num_available:
            blocks.release(found)
            return None
        own = blocks.allocate(num_missing, after=found[-1] if found else None)
        self._num_named += 1
        original = Original(
            name=f"{owner}#chunk{self._num_named}",
            links=links,
            block_ids=found + own,
            arrival=arrival,
            state=OriginalState.MISSING if own else OriginalState.READY,
            num_found=len(found),
        )
        self._originals[links[-1].key] = original
        self.parts.stats.found_tokens += len(found) * self._block_tokens
        if own:
            self._begin_load(original)
        return original

    def close(self, original: Original) -> None:
        """A user needs it no longer."""
        original.num_users -= 1
        if original.num_users:
            return
        del self._originals[original.links[-1].key]
        if original.state is OriginalState.LOADING:
            self._stop(original)
        if original.encoder is not None:
            self.parts.retire(original.encoder)
        if original.state is not OriginalState.READY:
            self.parts.pool.clear(original.block_ids[original.num_found :])
        self.parts.pool.blocks.release(original.block_ids)
        self.parts.hook.finish(original.name)

    def outcome(self, original: Original) -> ChunkOutcome:
        """Where its rows came from, so far."""
        size = self._block_tokens
        return ChunkOutcome(
            token_ids=tuple(self._tokens(original)),
            num_found_tokens=original.num_found * size,
            num_loaded_tokens=original.num_loaded * size,
            num_encoded_tokens=original.num_encoded * size,
            num_losses=original.num_losses,
            is_ready=original.is_ready,
        )

    def poll(self) -> None:
        """Look after the loads, begin to compute what is missing, offer what is new."""
        originals = list(self._originals.values())
        for original in originals:
            if original.state is OriginalState.LOADING:
                self._follow(original)
            if original.state is OriginalState.READY and not original.is_offered:
                self._offer(original)
        num_encoding = sum(item.state is OriginalState.ENCODING for item in originals)
        missing = [item for item in originals if item.state is OriginalState.MISSING]
        for original in missing[: max(0, MAX_ENCODING - num_encoding)]:
            self._begin_encoding(original)

    # Loading

    def has_layer(self, original: Original, layer: int) -> bool:
        """Whether a layer's rows may be read; never blocks."""
        if original.load is not None and original.num_layers_good > layer:
            return True
        if original.load is not None and original.num_layers_ready <= layer:
            self._follow(original)
        if original.load is not None and original.num_layers_ready > layer:
            return self.wait_layer(original, layer)
        return original.is_ready

    def wait_layer(self, original: Original, layer: int) -> bool:
        """Block until a layer's rows may be read; False when they will not come."""
        load = original.load
        if load is None:
            return original.is_ready
        if load.order is not LoadOrder.LAYERS:  # not what it was asked for: all of it, or nothing
            self.parts.hook.wait_some(0.01)
            self._follow(original)
            return original.is_ready
        (num_good,) = self.parts.hook.wait_layer(layer, [original.name])
        if num_good >= load.num_blocks:
            original.num_layers_good = max(original.num_layers_good, layer + 1)
            return True
        self._end_load(original)
        return original.is_ready

    def settle(self, original: Original) -> None:
        """All layers of a load were read: end it, so that others find the chunk in the pool."""
        if original.state is OriginalState.LOADING:
            self._end_load(original)

    def _begin_load(self, original: Original) -> None:
        """Have the hook load what the pool lacks, if it has all of it."""
        tokens = self._tokens(original)
        extra_keys = chunk_extra_keys(self.parts.sink_tokens)
        hook, first = self.parts.hook, original.num_found
        num_matched = hook.match_blocks(tokens, first, original.num_blocks, extra_keys)
        if num_matched < original.num_blocks:
            return
        block_ids = tuple(original.block_ids[first:])
        start = hook.start_load(
            LoadRequest(
                request_id=original.name,
                token_ids=tokens,
                first_block=first,
                block_ids=block_ids,
                hold=self.parts.pool.holder(block_ids),
                extra_keys=extra_keys,
                whole=True,
            )
        )
        if start.num_blocks < 1:
            return
        original.load = start
        original.state = OriginalState.LOADING
        original.started_us = self.parts.clock.now_us()
        if start.num_blocks != len(block_ids) or start.first_block != first:
            self._end_load(original, is_void=True)

    def _follow(self, original: Original) -> None:
        """See how far a load is; end it when it is done, hopeless or overdue."""
        state: LoadState = self.parts.hook.load_state(original.name)
        load = original.load
        assert load is not None
        age_us = self.parts.clock.now_us() - original.started_us
        is_by_layer = load.order is LoadOrder.LAYERS
        is_short = is_by_layer and state.num_good_blocks < load.num_blocks
        if state.is_done or is_short or age_us > self.parts.max_load_s * 1e6:
            self._end_load(original)
        elif is_by_layer:
            num_ready = max(original.num_layers_ready, state.num_layers_ready)
            original.num_layers_ready = num_ready

    def _end_load(self, original: Original, *, is_void: bool = False) -> None:
        """End a load: the original is ready then, or, as if it is void, must be computed."""
        load, blocks = original.load, self.parts.pool.blocks
        assert load is not None
        asked_for = original.block_ids[original.num_found :]
        num_good = self._stop(original)
        is_held = any(self.parts.pool.is_held(block_id) for block_id in asked_for)
        if num_good == len(asked_for) and not is_held and not is_void:
            original.num_loaded, original.is_offered = num_good, True
            self._count_loaded(num_good)
            self._make_ready(original)
            return
        original.num_losses += 1
        logger.info("a chunk's load came short; it is computed")
        original.state = OriginalState.MISSING
        held = [i for i, block in enumerate(original.block_ids) if self.parts.pool.is_held(block)]
        self.parts.pool.clear(asked_for)
        if len(held) > blocks.num_available:
            original.state = OriginalState.FAILED
            return
        for index, fresh in zip(held, blocks.allocate(len(held)), strict=True):
            blocks.release([original.block_ids[index]])
            original.block_ids[index] = fresh

    def _count_loaded(self, num_blocks: int) -> None:
        layout, stats = self.parts.pool.layout, self.parts.stats
        stats.loaded_tokens += num_blocks * layout.block_tokens
        stats.loaded_bytes += num_blocks * layout.num_layers * layout.slab_bytes
        self.parts.hook.stats.loaded_tokens += num_blocks * layout.block_tokens

    def _stop(self, original: Original) -> int:
        """End a load at the hook; returns how many blocks are good."""
        load, original.load = original.load, None
        asked_for = original.block_ids[original.num_found :]
        original.num_layers_ready = original.num_layers_good = 0
        num_good = self.parts.hook.end_load(original.name)
        if num_good is None or load is None:
            self.parts.pool.hold(asked_for)
            return 0
        return num_good

    # Computing

    def _begin_encoding(self, original: Original) -> None:
        """Queue the private sequence that computes the chunk behind the sink.

        The sink's full blocks are what any prompt's are that begins so: the first one leaves them
        in the pool for those that follow. The hook is not offered them: who wants them can
        compute them once, and a store of 25 MB is not worth that.
        """
        num_sink = len(self.parts.sink_tokens)
        tokens = [*self.parts.sink_tokens, *self._tokens(original)]
        original.state = OriginalState.ENCODING
        original.encoder = TokenSequence(
            request_id=f"{original.name}#encoding",
            index=0,
            arrival=original.arrival,
            params=SamplingParams(),
            tokens=tokens,
            num_prompt=len(tokens),
            max_length=len(tokens) + 1,
            block_tokens=self._block_tokens,
            is_private=True,
            num_public_tokens=num_sink,
            num_offered=num_sink // self._block_tokens,
        )
        self.parts.submit(original.encoder)

    def take(self, encoder: TokenSequence) -> None:
        """A private sequence is computed: keep the chunk's rows. The caller retires it."""
        for original in self._originals.values():
            if original.encoder is encoder:
                break
        else:
            return
        original.encoder = None
        num_sink = len(self.parts.sink_tokens)
        first = num_sink + original.num_found * self._block_tokens
        target = original.block_ids[original.num_found :]
        copy_rows(self.parts.pool.tensor, encoder.block_ids, first, target)
        if not torch.isfinite(self.parts.pool.tensor[:, target]).all():
            # A prompt's logits would have told; nobody looks at those of a chunk.
            logger.warning("the KV of a chunk is not finite: it is not kept")
            self.parts.pool.clear(target)
            original.state = OriginalState.FAILED
            return
        original.num_encoded = len(target)
        self.parts.stats.encoded_tokens += len(target) * self._block_tokens
        self._make_ready(original)

    def _make_ready(self, original: Original) -> None:
        original.state = OriginalState.READY
        for block_id, link in zip(original.block_ids, original.links, strict=True):
            self.parts.pool.blocks.register(block_id, link)

    def _offer(self, original: Original) -> None:
        """Offer the hook a chunk that it did not load, as soon as as much may be pinned."""
        parts = self.parts
        if not parts.hook.is_attached:
            original.is_offered = True
            return
        if parts.pool.num_pinned + original.num_blocks > parts.max_pinned:
            return
        original.is_offered = True
        parts.hook.store(
            StoreRequest(
                request_id=original.name,
                token_ids=self._tokens(original),
                first_block=0,
                block_ids=tuple(original.block_ids),
                release=parts.pool.pin(original.block_ids),
                layers=LayerClock.finished(parts.pool.layout.num_layers),
                extra_keys=chunk_extra_keys(parts.sink_tokens),
            )
        )

    # Parts

    @property
    def _block_tokens(self) -> int:
        return self.parts.pool.layout.block_tokens

    def _tokens(self, original: Original) -> list[int]:
        return [token for link in original.links for token in link.token_ids]

    def _links(self, token_ids: tuple[int, ...]) -> tuple[ChainLink, ...]:
        """What the chunk's blocks are found under."""
        size, parent = self._block_tokens, ROOT_KEY
        extra_keys = chunk_extra_keys(self.parts.sink_tokens)
        keys = chain_keys(POOL_NAMESPACE, token_ids, size, extra_keys=extra_keys)
        links = []
        for number, key in enumerate(keys):
            links.append(ChainLink(key, parent, token_ids[number * size : (number + 1) * size]))
            parent = key
        return tuple(links)
