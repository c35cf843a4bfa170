"""The `--sparse...` options of `ucm generate`: what they ask for, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucm.enum_words import word_of
from ucm.errors import ConfigError, InvalidArgumentError
from ucm.plurals import counted
from ucm.sparse.mode_policy import SparseMode
from ucm.types import SummaryKind

if TYPE_CHECKING:
    from ucm.kernels.block_scores import Budget
    from ucm.sparse.decoding import SparseStats
    from ucm.sparse.options import SparseOptions

    from .generate import GenerateOptions


def sparse_options(flags: GenerateOptions) -> SparseOptions | None:
    """What the engine is told; None without `--sparse`.

    Raises:
        ConfigError: an unknown mode or kind, a number out of range, several budgets, or a detail
            without `--sparse`.
    """
    details = {
        "--sparse-budget": flags.sparse_budget,
        "--sparse-tokens": flags.sparse_tokens,
        "--sparse-eps": flags.sparse_eps,
        "--sparse-summary": flags.sparse_summary,
        "--sparse-stride": flags.sparse_stride,
        "--sparse-dense-layers": flags.sparse_dense_layers,
        "--sparse-min-context": flags.sparse_min_context,
        "--sparse-resident-blocks": flags.sparse_resident_blocks,
    }
    given = [name for name, value in details.items() if value is not None]
    if flags.sparse is None:
        if given:
            raise ConfigError(f"{given[0]} does nothing without --sparse MODE; try --sparse auto")
        return None
    from ucm.sparse.options import SparseOptions

    mode = word_of(SparseMode, flags.sparse, "--sparse", ConfigError)
    settings: dict[str, object] = {"mode": mode}
    if flags.sparse_summary is not None:
        settings["kind"] = word_of(
            SummaryKind, flags.sparse_summary, "--sparse-summary", ConfigError
        )
    budget = _budget(flags)
    if budget is not None:
        settings["budget"] = settings["concurrency_budget"] = budget
    if flags.sparse_stride is not None:
        settings["stride"] = settings["concurrency_stride"] = flags.sparse_stride
    if flags.sparse_dense_layers is not None:
        settings["dense_layers"] = flags.sparse_dense_layers
    if flags.sparse_min_context is not None:
        settings["min_context_tokens"] = flags.sparse_min_context
    if flags.sparse_resident_blocks is not None:
        settings["resident_blocks"] = flags.sparse_resident_blocks
    return SparseOptions(**settings)  # type: ignore[arg-type]


def _budget(flags: GenerateOptions) -> Budget | None:
    from ucm.kernels.block_scores import Budget

    given = {
        "ratio": flags.sparse_budget,
        "tokens": flags.sparse_tokens,
        "eps": flags.sparse_eps,
    }
    values = {name: value for name, value in given.items() if value is not None}
    if not values:
        return None
    if len(values) > 1:
        raise ConfigError("give one of --sparse-budget, --sparse-tokens and --sparse-eps")
    try:
        return Budget(**values)  # type: ignore[arg-type]
    except InvalidArgumentError as error:
        raise ConfigError(f"--sparse: {error}") from error


def sparse_line(stats: SparseStats) -> str:
    """What the request's decode steps read and left out, for people."""
    if not stats.sparse_steps:
        return _dense_line(stats)
    share = stats.bytes_read / stats.bytes_dense if stats.bytes_dense else 1.0
    line = (
        f"sparse ({stats.mode.value}): {counted(stats.sparse_steps, 'step')} read {share:.0%} of "
        f"their KV ({stats.bytes_read / 2**20:,.0f} of {stats.bytes_dense / 2**20:,.0f} MiB); "
        f"choosing took {1e3 * stats.select_s / stats.sparse_steps:.1f} ms a step, the summaries "
        f"of {counted(stats.summarised_blocks, 'block')} {1e3 * stats.seal_s:,.0f} ms in all"
    )
    if stats.mode_switches:
        line += f"; {counted(stats.mode_switches, 'mode switch', 'es')}"
    return line


def _dense_line(stats: SparseStats) -> str:
    """Why nothing was left out."""
    if not stats.dense_steps:
        return "sparse: nothing to leave out, the prompt gave the only token (prompts are dense)"
    reasons = {
        f"mode {stats.mode.value}": stats.dense_by_mode,
        "the budget is everything": stats.dense_by_budget,
        "the context is below --sparse-min-context": stats.dense_by_context,
    }
    why = "; ".join(reason for reason, count in reasons.items() if count)
    steps = counted(stats.dense_steps, "step")
    return f"sparse: all {steps} read everything ({why})"
