"""The benchmark of sparse attention for people: tables, probes, and which targets are held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .gsa_probes import DENSE

Result = Mapping[str, Any]
KEY = """\
KL, nats    of the next token's distribution, dense from sparse
top-1       share of tokens whose likeliest next token is the same
dNLL        of the text, sparse minus dense, nats a token (mean: of absolute values)
mass        share of the attention mass in the blocks that were read
recall      share of the best blocks that were chosen
bytes       blocks and summaries read, over all blocks
select      milliseconds of choosing in a decode step; step: of the whole"""


def gsa_bench_report(result: Result) -> Group:
    """Per budget the mean over documents, then every document, the probes, the targets."""
    head = f"{result['model']} fp32, {result['threads']} threads; documents and their tokens: "
    head += ", ".join(f"{name} {num}" for name, num in result["document_tokens"].items())
    parts: list[Text | Table] = [Text(head)]
    for budget in result["budgets"]:
        parts += [Text(f"\nGeometric mean over documents, {float(budget):.1%} of the blocks")]
        parts.append(_table(result["geomean"], budget))
    for name, cells in result["per_document"].items():
        if len(result["documents"]) > 1:
            for budget in result["budgets"]:
                parts += [Text(f"\n{name}, {float(budget):.1%} of the blocks")]
                parts.append(_table(cells, budget))
    parts += [Text(f"\n{KEY}\n"), _probes(result), Text(""), targets_table(result)]
    return Group(*parts)


def _table(cells: Result, budget: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    table.add_column("selector", no_wrap=True)
    for heading in ("KL", "top-1", "dNLL", "mass", "recall", "bytes", "select", "step"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=7)
    for selector, budgets in cells.items():
        cell = budgets[budget]
        table.add_row(
            selector,
            f"{cell['kl']:.4f}",
            f"{cell['top1']:.3f}",
            f"{cell['dnll']:+.4f}",
            f"{cell['mass']:.3f}",
            f"{cell['recall']:.3f}",
            f"{cell['bytes_ratio']:.1%}",
            f"{cell['select_ms_per_step']:.2f}",
            f"{cell['step_ms']:.1f}",
        )
    return table


def _probes(result: Result) -> Text:
    hits = result["passkey"]
    lines = [f"pass-keys found of {result['passkey_prompts']}: dense {hits[DENSE]}"]
    lines[0] += "".join(f", {name} {num}" for name, num in hits.items() if name != DENSE)
    for document, found in result["copy_probe"].items():
        known = {name: value for name, value in found.items() if value is not None}
        if known:
            values = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
            lines.append(f"perplexity of a passage that recurs, {document}: {values}")
    if "certified" in result:
        c = result["certified"]
        lines.append(
            f"certified, eps {c['eps']:g}: error at most {c['max_error_over_bound']:.3f} of the "
            f"bound, {c['blocks_read_ratio']:.1%} of the blocks read"
        )
    if "conformal" in result:
        c = result["conformal"]
        lines.append(
            f"conformal, delta {c['delta']:.2%}: violated in {c['violation_rate']:.2%}, "
            f"{c['blocks_read_ratio']:.1%} of the blocks read"
        )
    if "offload" in result:
        o = result["offload"]
        lines.append(
            f"KV behind {o['bandwidth_mb_s']:g} MB/s, {o['context_tokens']} tokens of context: "
            f"dense {o['dense_tokens_s']:.3f}, sparse {o['gsa_tokens_s']:.3f} tokens/s, "
            f"dNLL {o['dnll']:+.4f}"
        )
    return Text("\n".join(lines))


def targets_table(result: Result) -> Table:
    """The targets of a result: value, limit, and `held` or `MISSED`."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    for heading in ("target", "measured", "limit", ""):
        table.add_column(heading, justify="left" if heading == "target" else "right")
    for target in result["targets"]:
        limit = f"<= {target['at_most']:g}" if "at_most" in target else f">= {target['at_least']:g}"
        verdict = "held" if target["held"] else "MISSED"
        table.add_row(escape(target["name"]), f"{target['value']:.4g}", limit, verdict)
    return table
