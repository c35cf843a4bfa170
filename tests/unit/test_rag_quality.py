"""Quality of reuse on a prompt, on a tiny model; and what becomes of the numbers."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import pytest
import torch

from ucm.bench.rag import geomean_kl, gold_details
from ucm.bench.rag_facts import Question
from ucm.bench.rag_prompts import COPY_LEAD, Prompt
from ucm.bench.rag_quality import POLICIES, PromptQuality, QualityOptions, Suffix, measure_quality
from ucm.bench.rag_targets import gold_error, gold_loss, kl_ratio, targets_of, worst_prompt
from ucm.engine.loading import load_model
from ucm.engine.model import LlamaModel
from ucm.testing.models import write_tiny_model

OPTIONS = QualityOptions(budgets=(0.1, 0.5), copy_budgets=(0.5,))
Cells = dict[str, dict[str, dict[str, Any]]]
DICE = torch.Generator().manual_seed(1)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 200, (count,), generator=DICE).tolist())


SINK = tokens(6)
CHUNKS = tuple(tokens(70) for _ in range(3))
PROMPT = Prompt(
    name="p",
    kind="cont",
    sink=SINK,
    prefix=tokens(9),
    chunks=CHUNKS,
    window=tokens(17),
    questions=(Question(tokens(12), tokens(3)), Question(tokens(9), tokens(1))),
    passage=CHUNKS[1][:40],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny")), torch.float32).model


@pytest.fixture(scope="module")
def found(model: LlamaModel) -> PromptQuality:
    return measure_quality(model, PROMPT, OPTIONS, lambda _line: None)


def test_every_policy_at_every_budget(found: PromptQuality) -> None:
    assert list(found.cells) == list(found.details) == list(POLICIES)
    for policy, cells in found.cells.items():
        assert list(cells) == list(found.details[policy]) == ["0.1", "0.5"]
        for cell in cells.values():
            assert set(cell) == {"kl", "top1", "dnll", "cost", "gold_logp"}
            assert all(math.isfinite(value) for value in cell.values())
    assert found.exact_rows == 0
    assert found.details["progressive"]["0.1"]["fresh_rows"] == 3 * (70 - 64)


def test_what_everything_recomputed_says_is_full_prefill(found: PromptQuality) -> None:
    for cell, detail in zip(
        found.cells["full"].values(), found.details["full"].values(), strict=True
    ):
        assert cell["kl"] < 1e-6
        assert cell["top1"] == 1.0
        assert abs(cell["dnll"]) < 1e-4
        assert cell["gold_logp"] == pytest.approx(found.full["gold_logp"], abs=1e-3)
        assert detail["answer_kl"] < 1e-6
        assert detail["copy_perplexity"] == pytest.approx(
            found.full_details["copy_perplexity"], rel=1e-3
        )


def test_losses_are_told_question_by_question(found: PromptQuality) -> None:
    for policy, cells in found.cells.items():
        for budget, cell in cells.items():
            losses = found.details[policy][budget]["gold_losses"]
            assert len(losses) == len(PROMPT.questions)
            lost = found.full["gold_logp"] - cell["gold_logp"]
            assert sum(losses) / len(losses) == pytest.approx(lost, abs=1e-5)


def test_costs_are_within_their_budgets(found: PromptQuality) -> None:
    for policy, cells in found.cells.items():
        for budget, cell in cells.items():
            detail = found.details[policy][budget]
            layers, rows = len(detail["rows_per_layer"]), 3 * 64
            assert detail["recomputed_token_layers"] == pytest.approx(
                cell["cost"] * layers * rows, abs=0.1
            )
            if policy not in ("none", "full"):
                assert cell["cost"] <= float(budget) + 0.02
    assert found.cells["none"]["0.1"]["cost"] == 0.0
    assert found.cells["none"]["0.1"]["kl"] > 1e-3


def test_a_passage_recurs_only_at_the_budgets_that_were_asked_for(found: PromptQuality) -> None:
    for policy in POLICIES:
        details = found.details[policy]
        assert details["0.5"]["copy_perplexity"] > 1
        assert ("copy_perplexity" in details["0.1"]) == (policy in ("none", "full"))


def test_a_prefix_that_is_the_sink_makes_its_first_chunk_exact(model: LlamaModel) -> None:
    prompt = dataclasses.replace(PROMPT, prefix=SINK)
    found = measure_quality(model, prompt, OPTIONS, lambda _line: None)
    assert found.exact_rows == 64
    everything = found.details["full"]["0.1"]["recomputed_token_layers"]
    assert everything == pytest.approx(found.cells["full"]["0.1"]["cost"] * 2 * 64 * 3, abs=0.1)


def test_a_policy_sees_the_query_and_never_the_answer() -> None:
    question = Question((5, 6, 7), (8, 9))
    suffix = Suffix.of_question(question)
    assert suffix.query == (5, 6, 7)
    assert suffix.token_ids == (5, 6, 7, 8)
    assert suffix.targets == (8, 9)
    window = Suffix.of_window((1, 2, 3))
    assert (window.query, window.token_ids, window.targets) == ((1, 2), (1, 2), (2, 3))
    passage = Suffix.of_passage(tuple(range(20)))
    assert passage.query == tuple(range(COPY_LEAD))
    assert passage.token_ids == tuple(range(19))
    assert passage.targets == (16, 17, 18, 19)


def test_an_answer_that_is_found_is_counted(model: LlamaModel) -> None:
    """The gold answer is made what the model says, so that full prefill is right."""
    query = tokens(8)
    prompt = dataclasses.replace(PROMPT, questions=(Question(query, (0,)),))
    options = QualityOptions(budgets=(0.5,), copy_budgets=())
    found = measure_quality(model, prompt, options, lambda _line: None)
    assert found.full_details["exact_match"] == 0.0
    said = _likeliest(model, prompt.context + query)
    prompt = dataclasses.replace(PROMPT, questions=(Question(query, (said,)),))
    found = measure_quality(model, prompt, options, lambda _line: None)
    assert found.full_details["exact_match"] == 1.0
    assert found.details["full"]["0.5"]["exact_match"] == 1.0
    assert found.full["gold_logp"] > -3


def _likeliest(model: LlamaModel, token_ids: tuple[int, ...]) -> int:
    from ucm.bench.gsa_window import ContextBuilder, run_window

    context = ContextBuilder.of(model, len(token_ids)).fill(token_ids[:-1])
    return int(run_window(context, token_ids[-1:]).logits[0].argmax())


def test_means_are_geometric_over_prompts() -> None:
    cells: list[Cells] = [{"lego": {"0.1": {"kl": kl}}} for kl in (0.1, 0.4)]
    assert geomean_kl(cells)["lego"]["0.1"] == pytest.approx(0.2)
    nothing: list[Cells] = [{"full": {"0.1": {"kl": 0.0}}}]
    assert geomean_kl(nothing)["full"]["0.1"] == pytest.approx(1e-9)


def result_of(kls: list[tuple[float, float]]) -> dict[str, Any]:
    """A result with these KL of `progressive` and `cacheblend`."""

    def cell(kl: float) -> dict[str, float]:
        return {"kl": kl, "top1": 0.95, "dnll": -0.02, "gold_logp": -1.1}

    prompts: list[dict[str, Any]] = [
        {
            "name": f"p{index}",
            "policies": {
                "progressive": {"0.18": cell(ours)},
                "cacheblend": {"0.18": cell(theirs)},
            },
            "full": {"gold_logp": -1.0},
        }
        for index, (ours, theirs) in enumerate(kls)
    ]
    return {
        "budgets": ["0.18"],
        "prompts": prompts,
        "geomean_kl": geomean_kl([prompt["policies"] for prompt in prompts]),
        "ttft_ratio": {"1k": 0.5, "3k": None},
    }


def test_targets_compare_what_they_name() -> None:
    result = result_of([(0.1, 0.4), (0.2, 0.1)])
    name, ratio = worst_prompt(result, "0.18")
    assert name == "p1"
    assert ratio == pytest.approx(2.0)
    assert gold_loss(result, "progressive", "0.18") == pytest.approx(0.1)
    found = {target["name"]: target for target in targets_of(result)}
    mean = found["KL progressive / cacheblend at 0.18, mean"]
    assert mean["value"] == pytest.approx(math.sqrt(0.5))
    assert (mean["at_most"], mean["held"]) == (0.6, False)
    worst = found["KL progressive / cacheblend at 0.18, worst: p1"]
    assert (worst["at_most"], worst["held"]) == (1.3, False)
    assert found["top-1 of progressive at 0.18, mean over prompts"]["held"]
    assert found["|dNLL| of progressive at 0.18, mean over prompts"]["value"] == 0.02
    assert not found["TTFT at 1k, progressive 0.18 / full prefill"]["held"]
    assert not any("3k" in name for name in found)


def test_the_error_of_a_mean_over_prompts() -> None:
    even = gold_error([[0.1, 0.3], [0.2, 0.6]])
    assert even == pytest.approx(statistics.stdev([0.1, 0.3, 0.2, 0.6]) / 2)
    assert gold_error([[0.1, 0.1], [0.1]]) == pytest.approx(0.0)
    assert gold_error([[0.1]]) is None
    single = gold_error([[0.0, 0.0, 0.0, 0.0], [1.0]])
    few, many = 0.25 * 5 / 4, 4 * 0.25 / 16 * 5 / 4
    assert single == pytest.approx(math.sqrt(few + many) / 2)


def test_gold_details_say_how_many_were_asked() -> None:
    prompts = result_of([(0.1, 0.4), (0.2, 0.1)])["prompts"]
    details = [{"progressive": {"0.18": {"gold_losses": each}}} for each in ([0.1], [0.0, 0.2])]
    cell = gold_details(prompts, details)["progressive"]["0.18"]
    assert cell["loss"] == pytest.approx(0.1)
    assert cell["num_questions"] == 3
    assert cell["standard_error"] == gold_error([[0.1], [0.0, 0.2]])


def test_a_ratio_of_nothing() -> None:
    same = {"progressive": {"0.1": 0.0}, "cacheblend": {"0.1": 0.0}}
    assert kl_ratio(same, "0.1") == 1.0
    assert kl_ratio({**same, "progressive": {"0.1": 0.1}}, "0.1") == float("inf")
