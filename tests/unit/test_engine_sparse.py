"""The engine over a real (tiny) decoder that leaves blocks out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.engine.request import RequestResult
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.kernels.block_scores import Budget
from ucm.kernels.summarize import summarize
from ucm.sparse.mode_policy import ModeThresholds, SparseMode
from ucm.sparse.options import SparseOptions
from ucm.testing.fake_hook import DictHook
from ucm.types import SummaryKind

B = 8
PROMPT = torch.randint(3, 290, (203,), generator=torch.Generator().manual_seed(5)).tolist()
OTHERS = [
    torch.randint(3, 290, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    for size in (17, 150, 260)
]
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
LATENCY = SparseOptions(min_context_tokens=64, budget=Budget(ratio=0.2), recent_blocks=1)
CONCURRENCY = SparseOptions(
    mode=SparseMode.CONCURRENCY, min_context_tokens=64, concurrency_stride=4, catch_up_blocks=5
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    from ucm.testing.models import write_tiny_model

    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny"))).model


def new_engine(
    model: LlamaModel,
    sparse: SparseOptions | None,
    *,
    num_blocks: int = 256,
    chunk: int = 64,
    hook: DictHook | None = None,
) -> Engine:
    scheduler = SchedulerOptions(prefill_chunk_tokens=chunk, max_step_tokens=max(chunk, 16))
    options = EngineOptions(
        num_blocks=num_blocks, block_tokens=B, scheduler=scheduler, sparse=sparse
    )
    return Engine(model, None, options, hook)


def run(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams = GREEDY
) -> list[RequestResult]:
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    results = {}
    while engine.has_work:
        for event in engine.step():
            if event.result is not None:
                results[event.request_id] = event.result
        assert engine.check_integrity() == []
    check_summaries(engine)
    return [results[request_id] for request_id in ids]


def tokens_of(result: RequestResult) -> list[tuple[int, ...]]:
    return [output.token_ids for output in result.outputs]


def check_summaries(engine: Engine) -> None:
    """Records of this life are those of what the pool holds now."""
    sparse = engine._runner._sparse
    if sparse is None:
        return
    summaries, pool = sparse._decoding._summaries, engine.pool
    for block_id in range(pool.blocks.num_blocks):
        if summaries._lives[block_id] == pool.blocks.life(block_id):
            slabs = pool.tensor[:, block_id].numpy()
            made = summarize(summaries.kind, slabs, pool.layout.dtype)
            assert summaries._records[block_id].tobytes() == made.tobytes()


@pytest.mark.parametrize(
    "sparse",
    [
        SparseOptions(mode=SparseMode.EXACT, min_context_tokens=0),
        SparseOptions(mode=SparseMode.REUSE, min_context_tokens=0),
        SparseOptions(budget=Budget(ratio=1.0), min_context_tokens=0),
        SparseOptions(budget=Budget(tokens=10_000), min_context_tokens=0),
        SparseOptions(dense_layers=3, min_context_tokens=0),
        SparseOptions(min_context_tokens=1000),
    ],
)
def test_reading_everything_gives_the_dense_tokens(
    model: LlamaModel, sparse: SparseOptions
) -> None:
    dense = run(new_engine(model, None), [PROMPT, *OTHERS])
    found = run(new_engine(model, sparse), [PROMPT, *OTHERS])
    assert [tokens_of(result) for result in found] == [tokens_of(result) for result in dense]


def test_leaving_blocks_out_is_counted_and_changes_tokens(model: LlamaModel) -> None:
    engine = new_engine(model, LATENCY)
    (sparse,) = run(engine, [PROMPT])
    (dense,) = run(new_engine(model, None), [PROMPT])
    stats = engine.sparse_stats
    assert stats is not None
    assert tokens_of(sparse) != tokens_of(dense)
    assert stats.sparse_steps == 19  # the first token comes from the prompt's own pass
    assert stats.fresh_selections == 19 * 3
    assert stats.blocks_read < 0.4 * stats.blocks_dense
    assert stats.summarised_blocks == (203 + 19) // B
    assert stats.select_s > 0
    assert stats.seal_s > 0
    assert new_engine(model, None).sparse_stats is None


@pytest.mark.parametrize("sparse", [LATENCY, CONCURRENCY], ids=["latency", "concurrency"])
def test_tokens_do_not_depend_on_the_batch(model: LlamaModel, sparse: SparseOptions) -> None:
    prompts = [OTHERS[1], PROMPT, *OTHERS[::2]]
    alone = [tokens_of(run(new_engine(model, sparse), [prompt])[0]) for prompt in prompts]
    for chunk in (24, 256):
        together = run(new_engine(model, sparse, chunk=chunk), prompts)
        assert [tokens_of(result) for result in together] == alone


@pytest.mark.parametrize("sparse", [LATENCY, CONCURRENCY], ids=["latency", "concurrency"])
def test_a_shared_prefix_is_summarised_once(model: LlamaModel, sparse: SparseOptions) -> None:
    engine = new_engine(model, sparse)
    (first,) = run(engine, [PROMPT])
    assert engine.sparse_stats is not None
    num_before = engine.sparse_stats.summarised_blocks
    (second,) = run(engine, [PROMPT])
    assert tokens_of(second) == tokens_of(first)
    assert second.timings.num_local_tokens == 200
    assert engine.sparse_stats.summarised_blocks - num_before == 222 // B - 200 // B


def test_samples_share_summaries(model: LlamaModel) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, n=3, temperature=0.8, seed=3)
    engine = new_engine(model, LATENCY)
    (alone,) = run(engine, [PROMPT], params)
    assert len(set(tokens_of(alone))) == 3
    assert engine.sparse_stats is not None
    assert engine.sparse_stats.summarised_blocks == 200 // B + 3 * (222 // B - 200 // B)
    together = run(new_engine(model, LATENCY, chunk=32), [OTHERS[2], PROMPT], params)
    assert tokens_of(together[1]) == tokens_of(alone)


def test_a_full_pool_preempts_and_summaries_follow(model: LlamaModel) -> None:
    engine = new_engine(model, LATENCY, num_blocks=64)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    results = run(engine, [PROMPT, OTHERS[2]], params)
    assert engine.stats.preemptions > 0
    (alone,) = run(new_engine(model, LATENCY), [PROMPT], params)
    assert tokens_of(results[0]) == tokens_of(alone)  # the oldest is never preempted


def test_blocks_that_are_reused_get_new_summaries(model: LlamaModel) -> None:
    engine = new_engine(model, LATENCY, num_blocks=36)
    for prompt in (PROMPT, OTHERS[2], PROMPT):
        (found,) = run(engine, [prompt])
        (fresh,) = run(new_engine(model, LATENCY), [prompt])
        assert tokens_of(found) == tokens_of(fresh)


def test_loaded_blocks_are_summarised(model: LlamaModel) -> None:
    hook = DictHook()
    (first,) = run(new_engine(model, CONCURRENCY, hook=hook), [PROMPT])
    engine = new_engine(model, CONCURRENCY, hook=DictHook(blocks=hook.blocks))
    (second,) = run(engine, [PROMPT])
    assert second.timings.num_hook_tokens == 200
    assert tokens_of(second) == tokens_of(first)
    assert engine.sparse_stats is not None
    assert engine.sparse_stats.summarised_blocks == 222 // B


def test_approximate_blocks_are_neither_stored_nor_shared(model: LlamaModel) -> None:
    hook = DictHook()
    engine = new_engine(model, LATENCY, hook=hook)
    (first,) = run(engine, [PROMPT])
    assert len(hook.blocks) == 203 // B
    longer = [*PROMPT, *tokens_of(first)[0], 7, 8, 9]
    (second,) = run(engine, [longer])
    assert second.timings.num_local_tokens == 200
    (fresh,) = run(new_engine(model, LATENCY), [longer])
    assert tokens_of(second) == tokens_of(fresh)


def test_a_dense_engine_shares_what_it_generated(model: LlamaModel) -> None:
    hook = DictHook()
    engine = new_engine(model, SparseOptions(mode=SparseMode.EXACT), hook=hook)
    (first,) = run(engine, [PROMPT])
    assert len(hook.blocks) == 222 // B
    (second,) = run(engine, [[*PROMPT, *tokens_of(first)[0], 7]])
    assert second.timings.num_local_tokens == 222 // B * B


def test_an_abort_leaves_no_summaries(model: LlamaModel) -> None:
    engine = new_engine(model, LATENCY)
    engine.add_request(PROMPT, GREEDY, request_id="gone")
    for _ in range(8):
        engine.step()
    sparse = engine._runner._sparse
    assert sparse is not None
    assert sparse._decoding.fed == {"gone"}
    engine.abort("gone")
    assert sparse._decoding.fed == set()
    assert engine.check_integrity() == []


def test_a_short_request_costs_no_summaries(model: LlamaModel) -> None:
    engine = new_engine(model, SparseOptions(min_context_tokens=500))
    run(engine, [PROMPT])
    assert engine.sparse_stats is not None
    assert engine.sparse_stats.summarised_blocks == 0
    assert engine.sparse_stats.sparse_steps == 0


def test_auto_changes_its_mode_with_the_batch(model: LlamaModel) -> None:
    limits = ModeThresholds(
        enter_context_tokens=100,
        leave_context_tokens=50,
        enter_batch=3,
        leave_batch=1,
        patience_steps=1,
        dwell_steps=2,
    )
    sparse = SparseOptions(mode=SparseMode.AUTO, min_context_tokens=64, thresholds=limits)
    engine = new_engine(model, sparse)
    stats = engine.sparse_stats
    assert stats is not None
    seen = set()
    engine.add_request(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
    for step in range(60):
        engine.step()
        seen.add(stats.mode)
        if step == 15:
            for prompt in (OTHERS[1], OTHERS[2]):
                engine.add_request(prompt, GREEDY)
    assert seen == {SparseMode.REUSE, SparseMode.LATENCY, SparseMode.CONCURRENCY}
    assert stats.mode_switches >= 2


@pytest.mark.parametrize("kind", list(SummaryKind))
def test_every_kind_of_summary_works(model: LlamaModel, kind: SummaryKind) -> None:
    engine = new_engine(model, SparseOptions(kind=kind, min_context_tokens=64))
    (result,) = run(engine, [PROMPT])
    assert len(tokens_of(result)[0]) == 20
    assert engine.sparse_stats is not None
    assert engine.sparse_stats.blocks_read < 0.6 * engine.sparse_stats.blocks_dense


def test_a_failing_step_can_be_repeated(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(model, LATENCY)
    (wanted,) = run(new_engine(model, LATENCY), [PROMPT])
    engine.add_request(PROMPT, GREEDY)
    tokens: list[int] = []
    failures = 0
    real = LlamaModel._run_layer

    def run_layer(self: LlamaModel, *arguments: object) -> torch.Tensor:
        if arguments[-1] == 2 and len(tokens) == 5 and failures < 3:
            raise RuntimeError("a layer fails")
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaModel, "_run_layer", run_layer)
    while engine.has_work:
        try:
            tokens += [event.token_id for event in engine.step()]
        except RuntimeError:
            failures += 1
    assert failures == 3
    assert tuple(tokens) == tokens_of(wanted)[0]
