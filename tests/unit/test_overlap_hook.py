"""What the overlap benchmark's hook does to a run and sees of it, with scripted connectors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ucm.bench.overlap_hook import MeasuredHook
from ucm.engine.hook import LoadRequest, LoadStart, StepReport, StoreRequest
from ucm.engine.layer_clock import LayerClock
from ucm.errors import ConfigError
from ucm.hashing import Encodable
from ucm.layout import KvDtype, KvLayout
from ucm.testing.blocking_loads import BlockingLoads
from ucm.types import LoadOrder

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=KvDtype.FLOAT32)
NUM_BLOCKS = 8


class Connector(BlockingLoads):
    """Copies what block `i` of a chain was stored with, or something else."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = torch.empty(0)
        self.stored: dict[int, torch.Tensor] = {}
        self.waits: list[int] = []
        self.start = LoadStart(first_block=0, num_blocks=0)

    def attach(self, kv_pool: torch.Tensor) -> None:
        self.pool = kv_pool

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        return len(token_ids)

    def load(self, request: LoadRequest) -> int:
        for index, block_id in enumerate(request.block_ids, request.first_block):
            self.pool[:, block_id] = self.stored[index]
        return len(request.block_ids)

    def start_load(self, request: LoadRequest) -> LoadStart:
        super().start_load(request)
        return self.start

    def wait_layer(self, layer: int, request_ids: Sequence[str], /) -> Sequence[int]:
        self.waits.append(layer)
        return super().wait_layer(layer, request_ids)

    def store(self, request: StoreRequest) -> None:
        for index, block_id in enumerate(request.block_ids, request.first_block):
            self.stored[index] = self.pool[:, block_id].clone()
        request.release()

    def finish(self, request_id: str) -> None:
        """Nothing is kept for a request."""


@pytest.fixture
def pool() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((3, NUM_BLOCKS, *LAYOUT.slab_shape), generator=generator)


@pytest.fixture
def connector() -> Connector:
    return Connector()


@pytest.fixture
def hook(pool: torch.Tensor, connector: Connector) -> MeasuredHook:
    found = MeasuredHook(LAYOUT)
    found.attach(pool)
    found.use(connector)
    return found


def offer(hook: MeasuredHook, block_ids: Sequence[int]) -> list[str]:
    """Offer chain blocks 0, 1, ...; returns whether they were released."""
    released: list[str] = []
    request = StoreRequest(
        request_id="r",
        token_ids=[1] * 4 * len(block_ids),
        first_block=0,
        block_ids=tuple(block_ids),
        release=lambda: released.append("yes"),
        layers=LayerClock.finished(3),
    )
    hook.store(request)
    return released


def load(hook: MeasuredHook, start: LoadStart, block_ids: Sequence[int]) -> None:
    request = LoadRequest(
        request_id="r",
        token_ids=[1] * 17,
        first_block=0,
        block_ids=tuple(block_ids),
        hold=lambda _blocks: lambda: None,
    )
    assert hook.start_load(request) == start


def test_what_a_load_brings_is_held_against_what_was_computed(
    hook: MeasuredHook, connector: Connector, pool: torch.Tensor
) -> None:
    hook.begin(is_enabled=True, stores=True)
    assert offer(hook, [0, 1, 2]) == ["yes"]
    hook.note_reference()
    connector.start = LoadStart(first_block=0, num_blocks=3)
    hook.begin(is_enabled=True)
    load(hook, connector.start, [5, 6, 7])
    assert hook.end_load("r") == 3
    assert (hook.watch.num_loaded_blocks, hook.audit()) == (3, 0)
    pool[2, 6, 0, 0, 0, 0] += 1
    assert hook.audit() == 1


def test_a_block_under_another_blocks_name_is_found(
    hook: MeasuredHook, connector: Connector
) -> None:
    hook.begin(is_enabled=True, stores=True)
    offer(hook, [0, 1])
    hook.note_reference()
    connector.stored[0], connector.stored[1] = connector.stored[1], connector.stored[0]
    connector.start = LoadStart(first_block=0, num_blocks=2)
    hook.begin(is_enabled=True)
    load(hook, connector.start, [5, 6])
    hook.end_load("r")
    assert hook.audit() == 2


def test_of_a_hybrid_only_what_was_not_computed_counts_as_loaded(
    hook: MeasuredHook, connector: Connector
) -> None:
    hook.begin(is_enabled=True, stores=True)
    offer(hook, [0, 1, 2, 3])
    hook.note_reference()
    connector.start = LoadStart(first_block=0, num_blocks=4, order=LoadOrder.BLOCKS_FROM_BACK)
    hook.begin(is_enabled=True)
    load(hook, connector.start, [4, 5, 6, 7])
    assert hook.claim("r", 0, 2) == 2
    hook.end_load("r")
    assert hook.watch.loaded == [(2, 6), (3, 7)]


@pytest.mark.parametrize("awaits_all", [False, True])
def test_all_layers_can_be_awaited_before_the_first(
    hook: MeasuredHook, connector: Connector, awaits_all: bool
) -> None:
    hook.begin(is_enabled=True, stores=True)
    offer(hook, [0, 1])
    connector.start = LoadStart(first_block=0, num_blocks=2)
    hook.begin(is_enabled=True, awaits_all=awaits_all)
    load(hook, connector.start, [4, 5])
    assert list(hook.wait_layer(0, ["r"])) == [2]
    assert connector.waits == ([0, 1, 2] if awaits_all else [0])
    assert [list(hook.wait_layer(layer, ["r"])) for layer in (1, 2)] == [[2], [2]]
    assert connector.waits == [0, 1, 2]


def test_without_a_cache_nobody_is_asked_and_nothing_is_stored(
    hook: MeasuredHook, connector: Connector
) -> None:
    hook.begin(is_enabled=False)
    assert hook.match([1] * 16, 4) == 4
    assert offer(hook, [0, 1]) == ["yes"]
    assert not connector.stored
    assert hook.watch.offered == [(0, 0), (1, 1)]


def test_stalls_of_passes_and_of_an_idle_engine_are_summed(hook: MeasuredHook) -> None:
    hook.begin(is_enabled=True)
    hook.wait_some(0.0)
    waited_s = hook.watch.stall_s
    hook.observe_step(StepReport(seconds=2.0, stall_s=0.5, parts=((0, 64),), num_decodes=0))
    assert hook.watch.stall_s == pytest.approx(waited_s + 0.5)
    assert len(hook.watch.steps) == 1


def test_a_hook_without_a_connector_says_so(hook: MeasuredHook) -> None:
    hook.use(None)
    hook.begin(is_enabled=True)
    with pytest.raises(ConfigError):
        hook.match([1] * 16, 0)
