"""What a hybrid's claim answers while the cache's plan is still on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from ucm.connectors.load_job import LoadJob, LoadTask
from ucm.layout import KvDtype, KvLayout
from ucm.load_decision import LoadKind, LoadShape, forced
from ucm.testing.load_simulator import SimulatedMachine
from ucm.testing.slab_pool import SlabPool
from ucm.types import BlockKey, TierKind

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32)
NUM_BLOCKS = 6


def no_hold(_places: Sequence[int]) -> Callable[[], None]:
    raise AssertionError("no read hangs here")


def job_at(bytes_per_s: float) -> LoadJob:
    """A hybrid whose plan has not come, on a disk of this speed."""
    model = SimulatedMachine(bytes_per_s=bytes_per_s, pass_s=1e-4, request_s=1e-12).known()
    shape = LoadShape(
        num_tokens=NUM_BLOCKS * LAYOUT.block_tokens + 2,
        num_local_tokens=0,
        tiers=(TierKind.NVME,) * NUM_BLOCKS,
        block_tokens=LAYOUT.block_tokens,
        block_bytes=LAYOUT.block_bytes,
        num_layers=LAYOUT.num_layers,
        can_direct=True,
    )
    task = LoadTask(
        request_id="r",
        keys=tuple(BlockKey(bytes([i] * 32)) for i in range(NUM_BLOCKS)),
        tiers=shape.tiers,
        target=SlabPool(LAYOUT, NUM_BLOCKS),
        hold=no_hold,
        decision=forced(LoadKind.HYBRID, is_from_back=True)(model, shape),
        patience_s=60.0,
    )
    return LoadJob(task, LAYOUT, model)


@pytest.mark.parametrize(("bytes_per_s", "expected"), [(1e12, 0), (1.0, NUM_BLOCKS)])
def test_before_the_plan_is_there_a_claim_is_weighed_too(bytes_per_s: float, expected: int) -> None:
    assert job_at(bytes_per_s).claim(0, NUM_BLOCKS) == expected


def test_without_a_plan_all_is_computed() -> None:
    job = job_at(1e12)
    assert job.open(None, lambda *_: pytest.fail("there is no plan to read"))
    assert job.claim(0, NUM_BLOCKS) == NUM_BLOCKS
