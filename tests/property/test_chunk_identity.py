"""Any order of stores and loads: what comes is what was put under just that identity, or nothing.

Tokens are drawn from two values, so that prompts and chunks behind several sinks coincide in all
but what they stand behind. Every block's content is a function of its identity.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.reference import ReferenceConnector
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.engine.hook import LoadRequest, StoreRequest
from ucm.engine.layer_clock import LayerClock
from ucm.hashing import Encodable, NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.load_decision import LoadKind, forced
from ucm.reuse.chunks import chunk_extra_keys
from ucm.testing.fake_cache import FakeCache

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_tokens=2, dtype=KvDtype.FLOAT32)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="d")
OPTIONS = SessionOptions(
    deadline_s=5.0,
    decide=forced(LoadKind.LOAD_ALL),
    breaker=BreakerOptions(backoff_s=3600.0),
)
SINKS = (None, (1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 1, 1, 1))
"""None: a prompt."""
MAX_BLOCKS = 3

Identity = tuple[int, tuple[int, ...]]
"""Index in `SINKS`, and all tokens up to the block's end."""

identities = st.tuples(
    st.integers(0, len(SINKS) - 1),
    st.lists(st.integers(1, 2), min_size=2, max_size=2 * MAX_BLOCKS).map(
        lambda tokens: tuple(tokens[: len(tokens) // 2 * 2])
    ),
)
operations = st.lists(st.tuples(st.booleans(), identities), min_size=1, max_size=14)


def content(sink: int, tokens: tuple[int, ...]) -> torch.Tensor:
    """A block's slabs, by its identity."""
    seed = zlib.crc32(repr((SINKS[sink], tokens)).encode())
    shape = (LAYOUT.num_layers, *LAYOUT.slab_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(identity: Identity) -> list[Identity]:
    sink, tokens = identity
    return [(sink, tokens[:stop]) for stop in range(2, len(tokens) + 1, 2)]


def extra_keys_of(sink: int) -> tuple[Encodable, ...]:
    tokens = SINKS[sink]
    return () if tokens is None else chunk_extra_keys(tokens)


def store(hook: ReferenceConnector, pool: torch.Tensor, identity: Identity) -> None:
    blocks = blocks_of(identity)
    for place, block in enumerate(blocks):
        pool[:, place] = content(*block)
    hook.store(
        StoreRequest(
            request_id="store",
            token_ids=identity[1],
            first_block=0,
            block_ids=list(range(len(blocks))),
            release=lambda: None,
            layers=LayerClock.finished(LAYOUT.num_layers),
            extra_keys=extra_keys_of(identity[0]),
        )
    )
    assert hook.session.flush(5.0)


def load(hook: ReferenceConnector, identity: Identity) -> int:
    """Load what matches into the pool's first blocks."""
    sink, tokens = identity
    count = hook.match(tokens, 0, extra_keys_of(sink)) // LAYOUT.block_tokens
    if not count:
        return 0
    request = LoadRequest(
        request_id="load",
        token_ids=tokens,
        first_block=0,
        block_ids=list(range(count)),
        hold=_no_hold,
        extra_keys=extra_keys_of(sink),
        whole=SINKS[sink] is not None,
    )
    assert hook.start_load(request).num_blocks == count
    for layer in range(LAYOUT.num_layers):
        hook.wait_layer(layer, ["load"])
    return hook.end_load("load")


def _no_hold(_block_ids: Sequence[int]) -> Callable[[], None]:
    raise AssertionError("no read hangs here")


@pytest.mark.timeout(60)
@settings(max_examples=25, deadline=None)
@given(operations)
def test_what_comes_is_what_was_put_there(drawn: list[tuple[bool, Identity]]) -> None:
    """Request ids are used over and over, without `finish`: no identity sticks to one."""
    cache, known = FakeCache(), set[Identity]()
    pool = torch.zeros(LAYOUT.num_layers, MAX_BLOCKS, *LAYOUT.slab_shape)
    with CacheSession(lambda: cache, SPEC, OPTIONS) as session:
        session.connect(5.0)
        hook = ReferenceConnector(session)
        hook.attach(pool)
        for is_store, identity in drawn:
            if is_store:
                store(hook, pool, identity)
                known.update(blocks_of(identity))
                continue
            pool.fill_(-1.0)
            count = load(hook, identity)
            expected = blocks_of(identity)
            assert count == sum(block in known for block in expected)
            for place, block in enumerate(expected[:count]):
                assert torch.equal(pool[:, place], content(*block))
            assert (pool[:, count:] == -1.0).all()
        assert len(cache.blocks) == len(known)
