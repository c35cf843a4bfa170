"""What limits a session's loads: the cache's bandwidth, and what computing takes meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from ucm.api import NamespaceHandle, SlabChecksums
from ucm.checksum import block_checksums
from ucm.connectors import load_desk
from ucm.connectors.load_job import LoadJob, LoadTask
from ucm.connectors.session import CacheSession, LoadOffer, SessionOptions
from ucm.cost_model import CostModel
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.load_decision import LoadKind, LoadShape, forced
from ucm.reader_io import ReaderIo, open_reader_io
from ucm.testing.fake_cache import FakeCache
from ucm.testing.load_simulator import SimulatedMachine
from ucm.testing.slab_pool import SlabPool
from ucm.types import BlockKey, TierKind

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32)
SPEC = NamespaceSpec(layout=LAYOUT, model_id="m", weights_digest="d")
TOKENS = list(range(100, 126))
NUM_BLOCKS = 6


class LimitedCache(FakeCache):
    """Says that its disk may be read at a certain rate only."""

    def open_namespace(self, spec: NamespaceSpec) -> NamespaceHandle:
        return replace(super().open_namespace(spec), max_read_bytes_per_s=12345)


def test_the_cache_says_how_fast_it_may_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def noted(limit: int = 0) -> ReaderIo:
        limits.append(limit)
        return open_reader_io(limit)

    monkeypatch.setattr(load_desk, "open_reader_io", noted)
    cache, pool = LimitedCache(), SlabPool(LAYOUT, NUM_BLOCKS)
    options = SessionOptions(deadline_s=5.0, decide=forced(LoadKind.LOAD_ALL))
    with CacheSession(lambda: cache, SPEC, options) as session:
        session.connect(5.0)
        session.match(TOKENS, 0)
        session.store("s", TOKENS, range(NUM_BLOCKS), _fill, _no)
        session.flush(5.0)
        session.match(TOKENS, 0)
        offer = LoadOffer(
            request_id="r",
            token_ids=TOKENS,
            blocks=range(NUM_BLOCKS),
            target=pool,
            hold=lambda _places: _no,
        )
        assert session.start_load(offer) is not None
        session.loads.wait_layer(0, "r")
        session.loads.end("r")
    assert limits == [12345]


def _fill(_indexes: Sequence[int], slots: Sequence[memoryview]) -> list[SlabChecksums]:
    return [block_checksums(LAYOUT, slot) for slot in slots]


def _no() -> None:
    """Nothing is held."""


@pytest.mark.parametrize(("bytes_per_s", "expected"), [(1e12, 0), (1.0, NUM_BLOCKS)])
def test_before_the_plan_is_there_a_claim_is_weighed_too(bytes_per_s: float, expected: int) -> None:
    machine = SimulatedMachine(bytes_per_s=bytes_per_s, pass_s=1e-4, request_s=1e-12)
    shape = LoadShape(
        num_tokens=len(TOKENS),
        num_local_tokens=0,
        tiers=(TierKind.NVME,) * NUM_BLOCKS,
        block_tokens=LAYOUT.block_tokens,
        block_bytes=LAYOUT.block_bytes,
        num_layers=LAYOUT.num_layers,
        can_direct=True,
    )
    model: CostModel = machine.known()
    task = LoadTask(
        request_id="r",
        keys=tuple(BlockKey(bytes([i] * 32)) for i in range(NUM_BLOCKS)),
        tiers=shape.tiers,
        target=SlabPool(LAYOUT, NUM_BLOCKS),
        hold=lambda _places: _no,
        decision=forced(LoadKind.HYBRID)(model, shape),
        patience_s=60.0,
    )
    job = LoadJob(task, LAYOUT, model)
    assert job.claim(0, NUM_BLOCKS) == expected
    assert job.open(None, lambda *_: pytest.fail("there is no plan to read"))
    assert job.claim(0, NUM_BLOCKS) == NUM_BLOCKS
