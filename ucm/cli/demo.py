"""`ucm demo`: the main job on a real model, five times, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ucm import model_hub
from ucm.errors import ConfigError

from .console import ExitCode, format_bytes, print_json
from .options import DEFAULT_MODEL, JsonOption, ModelOption
from .progress import ByteProgress
from .termination import unwinding_on_sigterm

command = typer.Typer(add_completion=False)


@command.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="About 500 tokens of context; under 45 s.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="fp32, or bf16: faster, and the last bits may differ.")
    ] = "fp32",
    model: ModelOption = DEFAULT_MODEL,
    deadline_s: Annotated[
        float, typer.Option(min=0.05, help="What a request may lose to a daemon that is away.")
    ] = 2.0,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            "--store",
            metavar="FOLDER",
            help="Where the daemon keeps its store. Default: temporary.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer the same prompts without a cache, cold, warm, after a restart, and with a dead daemon.

    Exits with 1 if any wrong byte was seen or, in fp32, any answer's tokens differ: in bf16 the
    last bits depend on the shape of a batch, with any prefix cache. The times decide nothing.
    """
    from ucm.bench.demo import DemoOptions, run_demo, summarise

    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"--dtype {dtype}: use fp32 or bf16")
    path = _find_model(model, quiet=as_json)
    options = DemoOptions(
        model=path, dtype=dtype, is_quick=quick, deadline_s=deadline_s, folder=folder
    )
    with unwinding_on_sigterm(), _Listener() as listener:
        summary = summarise(run_demo(options, listener))
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)
    is_sound = (summary["identical_tokens"] or dtype != "fp32") and summary["wrong_bytes"] == 0
    raise typer.Exit(ExitCode.DONE if is_sound else ExitCode.CHECK_FAILED)


def _find_model(model: str, *, quiet: bool) -> Path:
    """The model's path; a known model that is not here is pulled."""
    is_known = model in model_hub.KNOWN_MODELS and not Path(model).exists()
    if is_known and not (model_hub.folder_of(model) / model_hub.SOURCE_NAME).is_file():
        with ByteProgress(quiet=quiet) as progress:
            return model_hub.pull(model, progress.update).path
    return model_hub.resolve(model)


class _Listener:
    """Bars on a terminal, plain lines elsewhere; on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bars.add_task("", total=1, visible=False)

    def __enter__(self) -> _Listener:
        self._bars.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        self._console.print(text)

    def begin_run(self, name: str, num_steps: int) -> None:
        from ucm.bench.demo import RUN_TITLES

        title = RUN_TITLES[name]
        self._task = self._bars.add_task(title, total=num_steps)
        if not self._console.is_terminal:
            self._console.print(f"run: {title}")

    def advance(self) -> None:
        self._bars.advance(self._task)

    def end_run(self) -> None:
        task = self._bars.tasks[self._bars.task_ids.index(self._task)]
        self._bars.update(self._task, total=task.completed)


def _print_summary(summary: dict[str, Any]) -> None:
    console = Console(highlight=False)
    for entry in summary["answers"]:
        console.print(f"\n{entry['question']}", style="bold", markup=False)
        console.print(entry["answer"], markup=False)
    console.print()
    console.print(_table(summary))
    killed, same = summary["runs"]["killed"], "yes" if summary["identical_tokens"] else "no"
    if same == "no" and summary["dtype"] == "bf16":
        same += " (bf16 rounds by the shape of a batch; identity is judged in fp32)"
    console.print(
        f"TTFT: time to first token, median of {len(summary['answers'])} prompts. memory, NVMe: "
        "share of all prompt tokens that came from there.\n"
        f"tokens identical in all runs: {same}\n"
        f"wrong bytes: {summary['wrong_bytes']} ({summary['audited_blocks']} loaded blocks "
        "compared with what was computed)\n"
        f"longest wait for a killed daemon: {killed['max_stall_ms']:,.0f} ms "
        f"(deadline {summary['deadline_ms']:,.0f} ms)"
    )


def _table(summary: dict[str, Any]) -> Table:
    from ucm.bench.demo import RUN_TITLES

    table = Table(title=_title(summary))
    table.add_column("run", no_wrap=True)
    for heading in ("TTFT ms", "speed-up", "tokens/s", "memory", "NVMe", "loaded"):
        table.add_column(heading, justify="right", no_wrap=True)
    prompt_tokens = sum(summary["prompt_tokens"])
    for name, run in summary["runs"].items():
        hits = run["hit_tokens_by_tier"]
        table.add_row(
            RUN_TITLES[name],
            f"{run['ttft_ms_p50']:,.0f}",
            f"{1 / summary['ttft_ratio'][name]:.1f}x",
            f"{1e3 / run['tpot_ms_p50']:.1f}" if run["tpot_ms_p50"] else "-",
            *(f"{hits[tier] / prompt_tokens:.0%}" for tier in ("memory", "nvme")),
            format_bytes(run["loaded_bytes"]),
        )
    return table


def _title(summary: dict[str, Any]) -> str:
    return (
        f"{summary['model']}, {summary['dtype']}, {summary['context_tokens']:,} tokens of context, "
        f"store on {summary['filesystem']}"
    )
