"""The plot of the sparse attention benchmark: quality against bytes read, a line a selector.

matplotlib is imported by drawing only: a name can be refused where it is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ucm.errors import ConfigError
from ucm.plurals import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
MARKERS = "osD^v<>PX*"
DEFAULT = "gsa-k4"


def check_plot(path: Path) -> None:
    """See that a plot can be written in the format that its name asks for.

    Raises:
        ConfigError: another format.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise ConfigError(f"--plot {path}: name it .{', .'.join(FORMATS)}")


def save_plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw KL to dense against bytes read over dense bytes, means over documents.

    Args:
        result: of the benchmark.
        path: whose suffix says the format; overwritten.

    Raises:
        OSError: it cannot be written.
    """
    budgets = " and ".join(f"{float(budget):.1%}" for budget in result["budgets"])
    documents = counted(len(result["documents"]), "document")
    figure, axes = open_figure(
        f"{result['model']}: {budgets} of the blocks, {documents}; lower left is better",
        "bytes read, % of dense (blocks and summaries, bf16 KV)",
        "KL to dense attention, nats a token",
    )
    for index, (selector, by_budget) in enumerate(result["geomean"].items()):
        cells = sorted(by_budget.values(), key=lambda cell: cell["bytes_ratio"])
        axes.plot(
            [100 * cell["bytes_ratio"] for cell in cells],
            [cell["kl"] for cell in cells],
            marker=MARKERS[index % len(MARKERS)],
            linewidth=2.5 if selector == DEFAULT else 1.0,
            linestyle="--" if selector == "oracle" else "-",
            label=selector,
        )
    axes.legend(ncols=2, fontsize="small")
    save_figure(figure, path)


def open_figure(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    """An empty figure whose ordinate is logarithmic, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize="medium")
    axes.grid(visible=True, which="both", alpha=0.3)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure so that equal ones give equal files.

    Args:
        figure: drawn.
        path: whose suffix says the format; overwritten.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "ucm", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, metadata=metadata)
