"""One pass in which each token chooses for itself equals as many decode steps; what it counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ucm.bench.gsa_rankings import SELECTORS, OracleRanking, ranking_of, summary_share
from ucm.bench.gsa_steps import decode_one, sparse_attention, time_steps
from ucm.bench.gsa_window import Context, ContextBuilder, Window, run_window
from ucm.engine.loading import LoadedModel, load_model
from ucm.engine.model import ForwardItem
from ucm.kernels.block_scores import Budget
from ucm.sparse.options import SparseOptions
from ucm.testing.models import write_tiny_model
from ucm.types import SummaryKind

CONTEXT, WINDOW = 420, 70
"""The window begins and ends within a block, and two blocks become full in it."""
NARROW = Budget(ratio=0.3)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("window") / "model"))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    drawn: list[int] = np.random.default_rng(7).integers(3, 250, CONTEXT + WINDOW).tolist()
    return drawn


@pytest.fixture
def context(loaded: LoadedModel, tokens: list[int]) -> Context:
    return ContextBuilder.of(loaded.model, CONTEXT + WINDOW).fill(tokens[:CONTEXT])


def test_a_pass_that_reads_everything_is_the_dense_pass(
    context: Context, tokens: list[int]
) -> None:
    ours = run_window(context, tokens[CONTEXT:]).logits
    item = ForwardItem(tokens[CONTEXT:], CONTEXT, range(context.pool.shape[1]))
    dense = context.model.forward([item], context.pool, every_token=True)
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
    everything = run_window(context, tokens[CONTEXT:], OracleRanking(), Budget(ratio=1.0))
    torch.testing.assert_close(everything.logits, ours)
    assert everything.stats.mass == pytest.approx(everything.stats.count)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("kind", [SummaryKind.GSA_K4, SummaryKind.MEAN, SummaryKind.SHADOW4])
def test_a_pass_equals_the_engines_decode_steps(
    context: Context, tokens: list[int], kind: SummaryKind, stride: int
) -> None:
    ranking = ranking_of(kind.value, context)
    together = run_window(context, tokens[CONTEXT:], ranking, NARROW, stride).logits
    options = SparseOptions(
        kind=kind,
        budget=NARROW,
        stride=stride,
        min_context_tokens=1,
        catch_up_blocks=context.pool.shape[1],
    )
    attend = sparse_attention(context, options)
    stepwise = torch.stack(
        [
            decode_one(context, token, position, attend(position))
            for position, token in enumerate(tokens[CONTEXT:], start=CONTEXT)
        ]
    )
    torch.testing.assert_close(together, stepwise, rtol=1e-3, atol=1e-3)
    dense = run_window(context, tokens[CONTEXT:]).logits
    assert (dense - together).abs().max() > 0.1, "nothing was left out"


def test_the_oracle_recalls_itself_and_keeps_most_mass(context: Context, tokens: list[int]) -> None:
    found = {
        name: run_window(context, tokens[CONTEXT:], ranking_of(name, context), NARROW).stats
        for name in ("oracle", "shadow4", "maxnorm")
    }
    assert all(stats.count == 3 * WINDOW for stats in found.values())
    oracle = found["oracle"]
    assert oracle.recall == oracle.num_recalls > 0
    assert oracle.mass >= found["shadow4"].mass > found["maxnorm"].mass
    assert found["shadow4"].recall > found["maxnorm"].recall
    assert oracle.read == pytest.approx(found["maxnorm"].read)


def test_what_is_always_read() -> None:
    window = Window(start=100, num_tokens=40, block_tokens=32)
    assert window.num_blocks == 5
    assert [window.num_full(token) for token in (0, 27, 28, 39)] == [3, 3, 4, 4]
    assert window.must(28).tolist() == [True, False, True, True]
    assert Window(start=0, num_tokens=3, block_tokens=32).must(0).tolist() == []


def test_a_token_sees_no_later_one(context: Context, tokens: list[int]) -> None:
    window = tokens[CONTEXT:]
    changed = [*window[:-1], (window[-1] + 1) % 250]
    ranking = ranking_of("gsa-k4", context)
    before = run_window(context, window, ranking, NARROW).logits
    after = run_window(context, changed, ranking, NARROW).logits
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_a_shared_begin_is_not_computed_again(loaded: LoadedModel, tokens: list[int]) -> None:
    builder = ContextBuilder.of(loaded.model, CONTEXT + WINDOW)
    builder.fill(tokens[:CONTEXT])
    other = [*tokens[:200], *tokens[300:400]]
    moved = builder.fill(other)
    fresh = ContextBuilder.of(loaded.model, CONTEXT + WINDOW).fill(other)
    ours, theirs = (run_window(each, tokens[-9:]).logits for each in (moved, fresh))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_summaries_are_small_and_the_oracle_has_none(context: Context) -> None:
    shares = {name: summary_share(name, context) for name in SELECTORS}
    assert shares["oracle"] == 0.0
    assert 0 < shares["mean"] < shares["gsa-k4"] < shares["shadow4"] < 1


@pytest.mark.parametrize("selector", ["oracle", "gsa-k4"])
def test_a_step_takes_longer_than_its_choice(
    context: Context, tokens: list[int], selector: str
) -> None:
    times = time_steps(context, tokens[CONTEXT : CONTEXT + 5], selector, NARROW)
    assert 0 < times.select_ms < times.step_ms
