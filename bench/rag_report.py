"""The benchmark of reuse at any position for people: tables, and which targets are held."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .gsa_report import targets_table

Result = Mapping[str, Any]
KEY = """\
KL, nats   of the next token's distribution, full prefill from reuse
top-1      share of tokens whose likeliest next token is the same
dNLL       of what follows, reuse minus full prefill, nats a token; mean of |dNLL|
cost       recomputed token-layers, probes too, over those of rows not exact
TTFT       milliseconds to the first token; mean: of the ratio to full prefill
gold       log-probability of answers less that of full prefill, nats a token
+-         its standard error over questions
exact      share of questions that are answered rightly
copy       perplexity of a passage that recurs"""


def rag_bench_report(result: Result) -> Group:
    """Means over prompts by budget, each prompt at one budget, the targets, the warnings."""
    names = ", ".join(f"{prompt['name']}" for prompt in result["prompts"])
    head = f"{result['model']} fp32, {result['threads']} threads; prompts: {names}"
    parts: list[Text | Table] = [Text(head)]
    for budget in result["budgets"]:
        parts += [Text(f"\nMean over prompts, budget {budget}"), _means(result, budget)]
    for prompt in result["prompts"]:
        shape = result["details"]["prompts"][prompt["name"]]
        chunks = f"{shape['num_chunks']} chunks of {shape['chunk_tokens']} tokens"
        exact = f", {shape['exact_rows']} rows exact" if shape["exact_rows"] else ""
        title = (
            f"\n{prompt['name']}: {chunks}{exact}; full prefill {prompt['full']['ttft_ms']:.0f} ms"
        )
        parts += [Text(title), _prompt(prompt)]
    parts += [Text(f"\n{KEY}\n"), Text(_full(result)), Text(""), targets_table(result)]
    parts += [Text(f"warning: {line}") for line in result["warnings"]]
    return Group(*parts)


def _means(result: Result, budget: str) -> Table:
    headings = ("KL", "top-1", "dNLL", "cost", "TTFT", "gold", "+-", "exact", "copy")
    table = _table("policy", headings)
    details = result["details"]["prompts"].values()
    for policy, geomean in result["geomean_kl"].items():
        cells = [prompt["policies"][policy][budget] for prompt in result["prompts"]]
        ratios = [
            cell["ttft_ms"] / prompt["full"]["ttft_ms"]
            for cell, prompt in zip(cells, result["prompts"], strict=True)
        ]
        extra = [detail["policies"][policy][budget] for detail in details]
        gold = result["details"]["gold"][policy][budget]
        copies = [each["copy_perplexity"] for each in extra if "copy_perplexity" in each]
        table.add_row(
            policy,
            f"{geomean[budget]:.4f}",
            f"{_mean(cells, 'top1'):.3f}",
            f"{statistics.fmean(abs(cell['dnll']) for cell in cells):.4f}",
            f"{_mean(cells, 'cost'):.3f}",
            f"{statistics.geometric_mean(ratios):.2f} x",
            f"{-gold['loss']:+.3f}",
            "" if gold["standard_error"] is None else f"{gold['standard_error']:.3f}",
            f"{_mean(extra, 'exact_match'):.2f}",
            f"{statistics.fmean(copies):.2f}" if copies else "",
        )
    return table


def _prompt(prompt: Result) -> Table:
    table = _table("policy, budget", ("KL", "top-1", "dNLL", "cost", "TTFT", "gold"))
    full = prompt["full"]["gold_logp"]
    for policy, cells in prompt["policies"].items():
        for budget, cell in cells.items():
            table.add_row(
                f"{policy} {budget}",
                f"{cell['kl']:.4f}",
                f"{cell['top1']:.3f}",
                f"{cell['dnll']:+.4f}",
                f"{cell['cost']:.3f}",
                f"{cell['ttft_ms']:.0f}",
                f"{cell['gold_logp'] - full:+.3f}",
            )
            if policy in ("none", "full"):
                break  # They have no budget.
    return table


def _table(first: str, headings: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, min_width=7)
    return table


def _full(result: Result) -> str:
    full = [detail["full"] for detail in result["details"]["prompts"].values()]
    gold = statistics.fmean(prompt["full"]["gold_logp"] for prompt in result["prompts"])
    return (
        f"full prefill: gold {gold:.3f} (questions: {_num_questions(result)}), "
        f"exact {_mean(full, 'exact_match'):.2f}, copy {_mean(full, 'copy_perplexity'):.2f}"
    )


def _num_questions(result: Result) -> int:
    """The same for every policy and budget."""
    cell = next(iter(result["details"]["gold"]["full"].values()))
    num_questions: int = cell["num_questions"]
    return num_questions


def _mean(cells: list[Result], name: str) -> float:
    return statistics.fmean(cell[name] for cell in cells)
