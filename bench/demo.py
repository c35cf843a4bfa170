"""The main job, shown: the same prompts without a cache, cold, warm, restarted and killed.

    process 1   this one: starts, stops and kills the others, and compares
    process 2   `ucm serve` on a Unix socket, its store on a disk
    process 3   the reference engine, a client of process 2

The engine's own pool is emptied before every prompt, so that every hit comes from the daemon.
Figures are medians over the prompts. Identity is judged on token ids; bytes are judged twice, by
the checksums of every slab after it was copied into the pool, and by the audit in `demo_audit`.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ucm.path_errors import path_error

from .demo_processes import ChildProcess, EngineProcess, EngineSettings, Event, start_daemon
from .demo_workload import PROMPTS

RUN_NAMES = ("no_cache", "cold", "warm", "restart", "killed")
RUN_TITLES = {
    "no_cache": "no cache",
    "cold": "cold",
    "warm": "warm (memory)",
    "restart": "restarted (NVMe)",
    "killed": "killed midway",
}
MAX_SOCKET_PATH = 90
"""A Unix socket's path has at most 107 bytes, and the daemon puts names beside it."""

KILL_AT_PROMPT = 1
"""0-based: the first prompt is served warm, the daemon dies while the second one is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What to run."""

    model: Path
    dtype: str = "fp32"
    is_quick: bool = False
    """About 1,000 tokens of context instead of 3,000, and shorter answers."""
    deadline_s: float = 2.0
    folder: Path | None = None
    """Where the daemon keeps its store; a temporary folder when None."""

    @property
    def num_chapters(self) -> int:
        """Chapters in each prompt's context."""
        return 1 if self.is_quick else 8

    @property
    def max_tokens(self) -> int:
        """Length of an answer, at most."""
        return 12 if self.is_quick else 40


class DemoListener(Protocol):
    """Who is told how far it is."""

    def note(self, text: str) -> None:
        """Something worth knowing happened."""

    def begin_run(self, name: str, num_steps: int) -> None:
        """A run starts; it takes at most `num_steps` steps."""

    def advance(self) -> None:
        """One step of the run is done."""

    def end_run(self) -> None:
        """The run is over."""


@dataclass(slots=True)
class RunRecord:
    """One run: its answers and what was counted."""

    answers: list[Event] = field(default_factory=list)
    totals: Event = field(default_factory=dict)

    def median_ms(self, name: str) -> float:
        """Median over the prompts of a time that is in seconds."""
        return round(1e3 * statistics.median(float(a[name]) for a in self.answers), 3)

    @property
    def tokens(self) -> list[list[int]]:
        """Every answer's token ids."""
        return [answer["token_ids"] for answer in self.answers]


@dataclass(slots=True)
class DemoRecord:
    """Everything that was observed."""

    options: DemoOptions
    filesystem: str
    ready: Event
    runs: dict[str, RunRecord] = field(default_factory=dict)


def run_demo(options: DemoOptions, listener: DemoListener) -> DemoRecord:
    """Run all five; blocks for half a minute (quick) to some minutes.

    Raises:
        UcmError: the model cannot be loaded, or a process did not do its part.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(_demo_folder(options.folder))
        filesystem = filesystem_of(folder)
        listener.note(f"store on {filesystem} in {folder}")
        stage = _Stage(folder)
        stack.callback(stage.close)
        settings = EngineSettings(
            model=str(options.model),
            dtype=options.dtype,
            socket_path=str(stage.socket_path),
            deadline_s=options.deadline_s,
            num_chapters=options.num_chapters,
            max_tokens=options.max_tokens,
        )
        # Both start at once; the engine loads its model while the daemon gets ready.
        engine = EngineProcess(settings, folder / "engine.log")
        stack.callback(engine.close)
        stage.start_daemon()
        ready = engine.wait_for("ready")
        listener.note(
            f"model {ready['model']} in {options.dtype}, {ready['threads']} threads, contexts of "
            f"{', '.join(map(str, ready['context_tokens']))} tokens"
        )
        record = DemoRecord(options, filesystem, ready)
        _run_all(record, engine, stage, listener)
        return record


def _run_all(
    record: DemoRecord, engine: EngineProcess, stage: _Stage, listener: DemoListener
) -> None:
    def run(name: str, on_event: Callable[[int, Event], None] | None = None) -> None:
        record.runs[name] = _run_one(name, engine, record.options, listener, on_event)

    run("no_cache")
    run("cold")
    engine.flush()
    run("warm")
    engine.flush()
    stage.stop_daemon()
    stage.start_daemon()
    engine.reconnect()
    run("restart")

    def strike(prompt: int, event: Event) -> None:
        if prompt == KILL_AT_PROMPT and event["event"] in ("load", "token"):
            stage.kill_daemon()

    run("killed", strike)


def _run_one(
    name: str,
    engine: EngineProcess,
    options: DemoOptions,
    listener: DemoListener,
    on_event: Callable[[int, Event], None] | None,
) -> RunRecord:
    record = RunRecord()
    prompt = 0
    listener.begin_run(name, len(PROMPTS) * options.max_tokens)
    for event in engine.run(is_cached=name != "no_cache"):
        kind = event["event"]
        if kind == "prompt":
            prompt = int(event["index"])
        elif kind == "token":
            listener.advance()
        elif kind == "answer":
            record.answers.append(event)
            listener.advance()
        elif kind == "run_done":
            record.totals = event
        if on_event is not None:
            on_event(prompt, event)
    listener.end_run()
    return record


class _Stage:
    """The daemon of the moment and its folder."""

    def __init__(self, folder: Path) -> None:
        self._sockets: Path | None = None
        self.socket_path = folder / "ucm.sock"
        if len(str(self.socket_path)) > MAX_SOCKET_PATH:
            self._sockets = Path(tempfile.mkdtemp(prefix="ucm-demo-", dir="/tmp"))
            self.socket_path = self._sockets / "ucm.sock"
        self._folder = folder
        self._daemon: ChildProcess | None = None

    def start_daemon(self) -> None:
        log_path = self._folder / "daemon.log"
        self._daemon = start_daemon(self.socket_path, self._folder / "store", log_path)

    def stop_daemon(self) -> None:
        assert self._daemon is not None
        self._daemon.terminate()
        self._end_daemon()

    def kill_daemon(self) -> None:
        if self._daemon is not None:
            self._daemon.kill()
            self._end_daemon()

    def close(self) -> None:
        self._end_daemon()
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)

    def _end_daemon(self) -> None:
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            daemon.close()


@contextmanager
def _demo_folder(folder: Path | None) -> Iterator[Path]:
    """A folder on a disk whose path is short enough for a socket.

    Raises:
        ConfigError: nothing can be made in `folder`.
        CapacityError, TierUnavailableError: the disk has no room, or does not answer.
    """
    if folder is None:
        temporary = Path(tempfile.gettempdir())
        places = [temporary, Path("/var/tmp"), Path.home()]  # noqa: S108  mkdtemp makes it ours
        on_disk = [p for p in places if p.is_dir() and filesystem_of(p) not in ("tmpfs", "ramfs")]
        folder = next(iter(on_disk), temporary)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix="ucm-demo-", dir=folder))
    except OSError as error:
        raise path_error(error, f"cannot use {folder}", "name another with --folder") from error
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def filesystem_of(path: Path) -> str:
    """Type of the file system that holds `path`, as the kernel names it."""
    best, kind = Path("/"), "unknown"
    resolved = path.resolve()
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, mount_kind, *_ = line.split(" ")
        place = Path(mount.replace("\\040", " "))
        if resolved.is_relative_to(place) and len(place.parts) >= len(best.parts):
            best, kind = place, mount_kind
    return kind


def summarise(record: DemoRecord) -> dict[str, Any]:
    """The demo's figures as one JSON object; see the README for the keys."""
    runs = {name: _summarise_run(run) for name, run in record.runs.items()}
    no_cache_ms = runs["no_cache"]["ttft_ms_p50"]
    reference = record.runs["no_cache"].tokens
    return {
        "model": record.ready["model"],
        "dtype": record.options.dtype,
        "context_tokens": int(statistics.median(record.ready["context_tokens"])),
        "prompt_tokens": record.ready["context_tokens"],
        "block_tokens": record.ready["block_tokens"],
        "identical_tokens": all(run.tokens == reference for run in record.runs.values()),
        "runs": runs,
        "ttft_ratio": {
            name: round(run["ttft_ms_p50"] / no_cache_ms, 4) for name, run in runs.items()
        },
        "wrong_bytes": sum(run["wrong_bytes"] for run in runs.values()),
        "audited_blocks": sum(run.totals["checked_blocks"] for run in record.runs.values()),
        "deadline_ms": 1e3 * record.options.deadline_s,
        "filesystem": record.filesystem,
        "threads": record.ready["threads"],
        "answers": [
            {"question": prompt.question, "answer": answer["text"].strip()}
            for prompt, answer in zip(PROMPTS, record.runs["no_cache"].answers, strict=True)
        ],
    }


def _summarise_run(run: RunRecord) -> dict[str, Any]:
    stats = run.totals["stats"]
    return {
        "ttft_ms_p50": run.median_ms("ttft_s"),
        "tpot_ms_p50": run.median_ms("tpot_s"),
        "hit_tokens_by_tier": {
            tier: stats["hit_tokens_by_tier"].get(tier, 0) for tier in ("memory", "nvme")
        },
        "loaded_bytes": stats["loaded_bytes"],
        "stored_bytes": stats["stored_bytes"],
        "dropped_blocks": stats["dropped_blocks"],
        "max_stall_ms": round(1e3 * run.totals["stall_s_max"], 3),
        "wrong_bytes": stats["wrong_bytes"] + run.totals["wrong_block_bytes"],
        "failures": stats["failures"],
        "ttft_ms": [round(1e3 * answer["ttft_s"], 3) for answer in run.answers],
    }
