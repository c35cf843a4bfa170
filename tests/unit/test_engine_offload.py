"""An engine whose sequences are longer than their share of the pool, on a real tiny decoder."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ucm.clock import SimClock
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import load_model
from ucm.engine.model import ForwardItem, LlamaModel
from ucm.engine.request import FinishReason, TokenEvent
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.errors import ConfigError, InvalidArgumentError
from ucm.kernels.block_scores import Budget
from ucm.sparse.certificates import CertifiedOptions
from ucm.sparse.mode_policy import SparseMode
from ucm.sparse.offload import OffloadOptions
from ucm.sparse.options import SparseOptions
from ucm.sparse.slab_queue import SlabLostError
from ucm.sparse.slab_source import HostShelf, HostSlabSource, SlabRead
from ucm.testing.models import write_tiny_model
from ucm.types import SummaryKind

SHARE = OffloadOptions(resident_blocks=8, wave_blocks=3, num_waves=2)
PROMPT = [3 + (i * i + 7 * i) % 90 for i in range(150)]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny")), torch.float32).model


@pytest.fixture
def source() -> Iterator[HostSlabSource]:
    made = HostSlabSource(64 << 20)
    yield made
    made.close()


def new_engine(
    model: LlamaModel,
    source: HostSlabSource | None,
    *,
    num_blocks: int = 10,
    clock: SimClock | None = None,
    **settings: object,
) -> Engine:
    chosen: dict[str, object] = {"offload": SHARE, **settings}
    options = EngineOptions(
        num_blocks=num_blocks,
        block_tokens=4,
        scheduler=SchedulerOptions(max_step_tokens=40, prefill_chunk_tokens=32),
        **chosen,  # type: ignore[arg-type]
    )
    return Engine(model, None, options, source=source, clock=clock)


def roomy(model: LlamaModel, prompt: Sequence[int], params: SamplingParams = GREEDY) -> list[int]:
    """The tokens of an engine whose pool holds everything."""
    with new_engine(model, None, num_blocks=200, offload=None) as engine:
        (result,) = engine.generate_all([prompt], params)
    return list(result.outputs[0].token_ids)


def run(engine: Engine, *prompts: Sequence[int]) -> list[list[int]]:
    """Run requests together and look after the pool at each step."""
    names = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            if event.result is not None:
                found[event.request_id] = list(event.result.outputs[0].token_ids)
        assert engine.check_integrity() == []
    assert engine.pool.blocks.num_available == engine.options.num_blocks
    return [found[name] for name in names]


def steps(engine: Engine) -> Iterator[TokenEvent]:
    """Every event until there is nothing left to do."""
    while engine.has_work:
        yield from engine.step()


def test_a_context_larger_than_the_pool(model: LlamaModel, source: HostSlabSource) -> None:
    with new_engine(model, source) as engine:
        assert run(engine, PROMPT) == [roomy(model, PROMPT)]
        assert engine.offloads.stats.sequences == 1
        assert engine.stats.preemptions == 0
    assert source.read_bytes > 0


def test_long_and_ordinary_sequences_in_one_batch(
    model: LlamaModel, source: HostSlabSource
) -> None:
    prompts = [PROMPT, PROMPT[5:20], PROMPT[::-1], PROMPT[40:60]]
    with new_engine(model, source, num_blocks=30) as engine:
        assert run(engine, *prompts) == [roomy(model, prompt) for prompt in prompts]
        assert engine.offloads.stats.sequences == 2


def test_a_short_prompt_is_not_offloaded(model: LlamaModel, source: HostSlabSource) -> None:
    with new_engine(model, source) as engine:
        assert run(engine, PROMPT[:20]) == [roomy(model, PROMPT[:20])]
        assert engine.offloads.stats.sequences == 0


def test_a_short_prompt_may_grow_beyond_its_share(
    model: LlamaModel, source: HostSlabSource
) -> None:
    params = replace(GREEDY, max_tokens=60)
    with new_engine(model, source) as engine:
        (result,) = engine.generate_all([PROMPT[:10]], params)
    assert list(result.outputs[0].token_ids) == roomy(model, PROMPT[:10], params)
    assert engine.offloads.stats.sequences == 1


def test_two_long_ones_take_turns_in_a_small_pool(
    model: LlamaModel, source: HostSlabSource
) -> None:
    prompts = [PROMPT, PROMPT[::-1]]
    with new_engine(model, source) as engine:
        assert run(engine, *prompts) == [roomy(model, prompt) for prompt in prompts]


def test_a_preempted_one_goes_on_from_what_is_kept(
    model: LlamaModel, source: HostSlabSource
) -> None:
    # The first decodes until it needs the blocks of the second, which is long and younger.
    with new_engine(model, source, num_blocks=15) as engine:
        first = engine.add_request(PROMPT[:20], replace(GREEDY, max_tokens=10))
        second = engine.add_request(PROMPT, GREEDY)
        tokens: dict[str, list[int]] = {first: [], second: []}
        while engine.has_work:
            for event in engine.step():
                tokens[event.request_id].append(event.token_id)
            assert engine.check_integrity() == []
        assert tokens[second] == roomy(model, PROMPT)
        assert engine.stats.computed_tokens < 2 * len(PROMPT)


def test_abort_gives_everything_back(model: LlamaModel, source: HostSlabSource) -> None:
    with new_engine(model, source) as engine:
        for num_steps in (0, 1, 3, 9):
            name = engine.add_request(PROMPT, GREEDY)
            for _ in range(num_steps):
                engine.step()
            engine.abort(name)
            assert engine.check_integrity() == []
            assert engine.pool.blocks.num_available == 10
            assert source.kept_bytes == 0


def sparse(**settings: object) -> SparseOptions:
    chosen: dict[str, object] = {"min_context_tokens": 1, **settings}
    return SparseOptions(**chosen)  # type: ignore[arg-type]


def test_sparse_decode_beyond_the_pool_reads_less(
    model: LlamaModel, source: HostSlabSource
) -> None:
    options = sparse(budget=Budget(ratio=0.3), resident_blocks=8)
    with new_engine(model, source, offload=None, sparse=options) as engine:
        (tokens,) = run(engine, PROMPT)
        stats = engine.sparse_stats
        assert stats is not None
        assert len(tokens) == 12
        assert 0 < stats.blocks_read < 0.45 * stats.blocks_dense
        assert (stats.sparse_steps, stats.dense_steps) == (11, 0)
        assert stats.summarised_blocks == (len(PROMPT) + 11) // 4
        assert stats.seal_s > 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"mode": SparseMode.EXACT}, "dense_by_mode"),
        ({"budget": Budget(ratio=1.0)}, "dense_by_budget"),
        ({"min_context_tokens": 1000}, "dense_by_context"),
    ],
)
def test_dense_steps_beyond_the_pool_are_counted_with_their_reason(
    model: LlamaModel, source: HostSlabSource, settings: dict[str, object], why: str
) -> None:
    with new_engine(model, source, sparse=sparse(**settings)) as engine:
        assert run(engine, PROMPT) == [roomy(model, PROMPT)]
        stats = engine.sparse_stats
        assert stats is not None
        assert (stats.sparse_steps, stats.dense_steps, getattr(stats, why)) == (0, 11, 11)


def test_sparse_decode_is_the_same_as_in_a_roomy_pool(
    model: LlamaModel, source: HostSlabSource
) -> None:
    options = sparse(budget=Budget(ratio=0.3), catch_up_blocks=1000)
    with new_engine(model, None, num_blocks=200, offload=None, sparse=options) as engine:
        expected = run(engine, PROMPT)
    with new_engine(model, source, sparse=options) as engine:
        assert run(engine, PROMPT) == expected


def test_exact_mode_beyond_the_pool_is_dense(model: LlamaModel, source: HostSlabSource) -> None:
    options = sparse(mode=SparseMode.EXACT)
    with new_engine(model, source, sparse=options) as engine:
        assert run(engine, PROMPT) == [roomy(model, PROMPT)]


class LossySource(HostSlabSource):
    """Loses block 5 of every shelf at its nth read, as often as it is told to."""

    def __init__(self, num_losses: int, at_read: int = 40) -> None:
        super().__init__(64 << 20)
        self.num_losses = num_losses
        self.at_read = at_read
        self.num_reads = 0

    def open(self, name: str) -> HostShelf:
        return LossyShelf(self, name)


class LossyShelf(HostShelf):
    """See `LossySource`."""

    def read(
        self, layer: int, blocks: Sequence[int], into: Sequence[Tensor], *, is_ahead: bool = False
    ) -> SlabRead:
        lossy = self.source
        assert isinstance(lossy, LossySource)
        lossy.num_reads += 1
        if lossy.num_losses and lossy.num_reads % lossy.at_read == 0:
            lossy.num_losses -= 1
            raise SlabLostError(5, "gone")
        return super().read(layer, blocks, into, is_ahead=is_ahead)


@pytest.mark.parametrize("options", [None, sparse(budget=Budget(ratio=0.3))])
def test_what_is_lost_is_computed_anew(model: LlamaModel, options: SparseOptions | None) -> None:
    lossy = LossySource(2)
    with new_engine(model, lossy, sparse=options) as engine:
        (tokens,) = run(engine, PROMPT)
        assert engine.offloads.stats.recomputed == 2
        if options is None:
            assert tokens == roomy(model, PROMPT)
    lossy.close()


def test_a_source_that_keeps_losing_ends_the_request(model: LlamaModel) -> None:
    lossy = LossySource(10**6, at_read=9)
    with new_engine(model, lossy) as engine:
        name = engine.add_request(PROMPT, GREEDY)
        other = engine.add_request(PROMPT[:4], GREEDY)
        results = {}
        while engine.has_work:
            results.update({e.request_id: e.result for e in engine.step() if e.result})
            assert engine.check_integrity() == []
    failed = results[name]
    assert failed is not None
    assert failed.outputs[0].finish_reason is FinishReason.FAILED
    assert "10 pool blocks cannot hold it" in (failed.error or "")
    assert list(results[other].outputs[0].token_ids) == roomy(model, PROMPT[:4])
    assert engine.pool.blocks.num_available == 10
    lossy.close()


def test_without_a_source_the_pool_serves_what_it_can_hold(model: LlamaModel) -> None:
    lossy = LossySource(10**6, at_read=9)
    with new_engine(model, lossy, num_blocks=60) as engine:
        assert run(engine, PROMPT) == [roomy(model, PROMPT)]
        assert engine.offloads.stats.failed == 0
    lossy.close()


def test_a_full_source_ends_the_request(model: LlamaModel) -> None:
    small = HostSlabSource(64 << 20)
    small.reserve(small.capacity_bytes - 20_000)  # what others keep there
    clock = SimClock()
    clock.advance_us(42_000_000)
    with new_engine(model, small, clock=clock) as engine:
        name = engine.add_request(PROMPT, GREEDY)
        clock.advance_us(1_500_000)
        (result,) = [event.result for event in steps(engine) if event.result]
    assert result.request_id == name
    assert result.outputs[0].finish_reason is FinishReason.FAILED
    assert "capacity" in (result.error or "")
    assert result.timings.total_s == pytest.approx(1.5)
    small.close()


def test_what_the_source_can_never_hold_is_refused_at_once(model: LlamaModel) -> None:
    """Unless the pool can hold it."""
    num_blocks = (len(PROMPT) + GREEDY.max_tokens - 1) // 4
    with new_engine(model, None, num_blocks=60, offload=None) as engine:
        block_bytes = engine.pool.layout.num_layers * engine.pool.layout.slab_bytes
    small = HostSlabSource(num_blocks * block_bytes - 1)
    with new_engine(model, small) as engine:
        with pytest.raises(InvalidArgumentError, match="slab source holds"):
            engine.add_request(PROMPT, GREEDY)
        assert not engine.has_work
    small.close()
    exact = HostSlabSource(num_blocks * block_bytes)
    with new_engine(model, exact) as engine:
        assert run(engine, PROMPT) == [roomy(model, PROMPT)]
        assert engine.offloads.stats.recomputed == 0
    exact.close()
    tiny = HostSlabSource(1)
    with new_engine(model, tiny, num_blocks=60) as engine:
        assert run(engine, PROMPT) == [roomy(model, PROMPT)]
    tiny.close()


def test_what_does_not_fit_is_refused_in_words(model: LlamaModel, source: HostSlabSource) -> None:
    with pytest.raises(ConfigError, match="slab source"):
        new_engine(model, None)
    with pytest.raises(ConfigError, match="resident_blocks"):
        new_engine(model, source, num_blocks=7)
    promise = sparse(kind=SummaryKind.SHADOW4, certificate=CertifiedOptions())
    with pytest.raises(ConfigError, match="certificate"):
        new_engine(model, source, sparse=promise)
    with new_engine(model, source) as engine, pytest.raises(InvalidArgumentError, match="share"):
        engine.add_request(PROMPT, replace(GREEDY, n=2))
    with (
        new_engine(model, None, offload=None) as engine,
        pytest.raises(InvalidArgumentError, match="set offload"),
    ):
        engine.add_request(PROMPT, GREEDY)


def test_a_preempted_sparse_one_finds_slots_in_all_layers(
    tmp_path_factory: pytest.TempPathFactory, source: HostSlabSource
) -> None:
    # Each layer reads sink and recent blocks back into slots of its own choice: a block that begins
    # needs the same one in all of them.
    folder = write_tiny_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=16)
    deep = load_model(folder, torch.float32).model
    options = sparse(budget=Budget(ratio=0.3), resident_blocks=6, stride=1)
    with new_engine(deep, source, offload=None, sparse=options) as engine:
        name = engine.add_request(PROMPT, replace(GREEDY, max_tokens=40))
        tokens: list[int] = []
        while engine.has_work:
            tokens += [event.token_id for event in engine.step()]
            assert engine.check_integrity() == []
            if len(tokens) % 7 == 3 and engine._runner.running:
                engine._runner._preempt(engine._runner.running[0])
        assert len(tokens) == 40
        assert engine.abort(name) is None


def break_pass_after_loss(engine: Engine, lossy: LossySource, patch: pytest.MonkeyPatch) -> None:
    """The first pass that is repeated because a slab was lost fails."""
    runner, forward = engine._runner, engine._model.forward
    num_losses = lossy.num_losses

    def failing(items: Sequence[ForwardItem], kv_pool: Tensor, **details: object) -> Tensor:
        if lossy.num_losses < num_losses:
            patch.undo()
            raise RuntimeError("out of memory")
        return forward(items, kv_pool, **details)  # type: ignore[arg-type]

    patch.setattr(runner._pass._model, "forward", failing)


@pytest.mark.parametrize("is_aborted", [False, True])
@pytest.mark.parametrize("max_attempts", [0, 3])
def test_a_model_that_fails_after_a_slab_was_lost(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, *, max_attempts: int, is_aborted: bool
) -> None:
    lossy = LossySource(1)
    share = replace(SHARE, max_attempts=max(1, max_attempts))
    with new_engine(model, lossy, num_blocks=20, offload=share) as engine:
        object.__setattr__(engine.offloads.options, "max_attempts", max_attempts)
        params = replace(GREEDY, max_tokens=20)
        names = [engine.add_request(prompt, params) for prompt in (PROMPT, [5, 6, 7])]
        break_pass_after_loss(engine, lossy, monkeypatch)
        with pytest.raises(RuntimeError, match="out of memory"):
            collections.deque(iter(engine.step, None), maxlen=0)
        assert engine.check_integrity() == []
        if is_aborted:
            engine.abort(names[0])
        results = {}
        while engine.has_work:
            results.update({e.request_id: e.result for e in engine.step() if e.result})
            assert engine.check_integrity() == []
        assert engine.pool.blocks.num_available == 20
    assert list(results[names[1]].outputs[0].token_ids) == roomy(model, [5, 6, 7], params)
    found = results.get(names[0])
    assert (found is None) is is_aborted
    if found is not None and max_attempts:
        assert list(found.outputs[0].token_ids) == roomy(model, PROMPT, params)
    elif found is not None:
        assert found.outputs[0].finish_reason is FinishReason.FAILED
    lossy.close()
