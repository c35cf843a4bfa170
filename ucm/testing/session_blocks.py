"""What sessions are tested with: a chain of six blocks, a pool that has them, stores and loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ucm.api import CacheApi, SlabChecksums
from ucm.checksum import block_checksums
from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.session import CacheSession, LoadOffer, SessionOptions, StoreOffer
from ucm.connectors.store_queue import BlockFill
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.layout import KvDtype, KvLayout
from ucm.load_decision import LoadKind, forced

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="d")
TOKENS = list(range(100, 126))  # 6 full blocks and 2 tokens
NUM_BLOCKS = 6
KEYS = chain_keys(SPEC.fingerprint(), TOKENS, LAYOUT.block_tokens)
ALL = forced(LoadKind.LOAD_ALL)
OPTIONS = SessionOptions(
    deadline_s=0.3,
    max_queued_blocks=8,
    store_batch_blocks=2,
    decide=ALL,
    breaker=BreakerOptions(failures_to_open=3, backoff_s=0.01, max_backoff_s=0.02),
)
NEVER = BreakerOptions(failures_to_open=3, backoff_s=3600.0)


class Pool:
    """What an engine would hold: block index -> bytes."""

    def __init__(self, seed: int = 0) -> None:
        """Random bytes; another `seed`, others."""
        rng = np.random.default_rng(seed)
        size = (NUM_BLOCKS, LAYOUT.block_bytes)
        random = rng.integers(0, 256, size=size, dtype=np.uint8)
        self.blocks = np.zeros_like(random)  # what is between slabs is nobody's
        for layer in range(LAYOUT.num_layers):
            self.blocks[:, LAYOUT.slab_slice(layer)] = random[:, LAYOUT.slab_slice(layer)]
        self.released = 0

    def fill(self, indexes: Sequence[int], slots: Sequence[memoryview]) -> list[SlabChecksums]:
        """See `BlockFill`."""
        for index, slot in zip(indexes, slots, strict=True):
            np.frombuffer(slot, np.uint8)[:] = self.blocks[index]
        return [block_checksums(LAYOUT, self.blocks[index].data) for index in indexes]

    def view(self, layer: int, index: int) -> memoryview:
        """See `SlabTarget.view`; blocks behind each other, as they are stored."""
        block: memoryview = self.blocks[index].data
        return block[LAYOUT.slab_slice(layer)]

    def release(self) -> None:
        """See `StoreOffer.release`; counted."""
        self.released += 1


def open_session(
    factory: Callable[[], CacheApi], options: SessionOptions = OPTIONS
) -> CacheSession:
    """A session that is connected."""
    session = CacheSession(factory, SPEC, options)
    session.connect(5.0)
    return session


def offer(
    name: str, tokens: list[int], blocks: range, fill: BlockFill, end: Callable[[], None]
) -> StoreOffer:
    """Blocks of a request, filled by `fill`."""
    return StoreOffer(request_id=name, token_ids=tokens, blocks=blocks, fill=fill, release=end)


def store_all(session: CacheSession, pool: Pool) -> None:
    """Store the chain, and wait until it is."""
    session.store(offer("store", TOKENS, range(NUM_BLOCKS), pool.fill, pool.release))
    assert session.flush(5.0)


def load_all(session: CacheSession, pool: Pool, first: int = 0) -> int:
    """Load as an engine does: what matches, if anything does, layer by layer."""
    num_matched = session.match(TOKENS, first)
    return load(session, pool, range(first, num_matched))


def begin_load(session: CacheSession, pool: Pool, blocks: range) -> bool:
    """Start to load what `match` found; whether anything is loaded."""
    offer = LoadOffer(request_id="load", token_ids=TOKENS, blocks=blocks, target=pool, hold=no_hold)
    return session.start_load(offer) is not None


def load(session: CacheSession, pool: Pool, blocks: range) -> int:
    """Load what `match` found, layer by layer; how many blocks are good."""
    if not begin_load(session, pool, blocks):
        return 0
    for layer in range(LAYOUT.num_layers):
        num_good = session.loads.wait_layer(layer, "load")
    assert session.loads.end("load") == num_good
    return num_good


def no_hold(_places: Sequence[int]) -> Callable[[], None]:
    """See `LoadOffer.hold`."""
    raise AssertionError("no read hangs here")
