"""The demo's two processes: the daemon and the engine, started, told and ended by their id.

Both write their log to a file in the demo's folder; when one fails, the end of its log is in the
error. Whatever happens, `close` leaves no process behind.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ucm.errors import LEAVES, ConfigError, TierUnavailableError, UcmError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
EVENT_TIMEOUT_S = 900.0
"""Longest silence of the engine: the prefill of a prompt on a very slow machine."""

LOG_TAIL_LINES = 15

Event = dict[str, Any]
"""One line of a child's output, parsed; what is in it depends on `event`."""


class ChildProcess:
    """A child that speaks JSON lines on its standard output."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log_path: Path,
        interpreter: Sequence[str] = (sys.executable, "-m"),
    ) -> None:
        self._name = name
        self._log_path = log_path
        with log_path.open("a") as log:
            self._process = subprocess.Popen(
                [*interpreter, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"demo-{name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, **command: object) -> None:
        """Write one command.

        Raises:
            TierUnavailableError: it has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def next_event(self, timeout_s: float) -> Event:
        """Wait for one line; text that is no JSON object is skipped.

        Raises:
            UcmError: the child reported it, ended, or said nothing for `timeout_s`.
        """
        while True:
            try:
                line = self._lines.get(timeout=timeout_s)
            except queue.Empty:
                raise TierUnavailableError(
                    f"the {self._name} said nothing for {timeout_s:.0f} s\n{self._log_tail()}"
                ) from None
            if line is None:
                raise self._ended()
            event = _parse(line)
            if event.get("event") == "error" or "error" in event:
                raise _reported(event)
            if event:
                return event

    def _ended(self) -> TierUnavailableError:
        self._process.wait(STOP_TIMEOUT_S)
        code = self._process.returncode
        return TierUnavailableError(f"the {self._name} ended with {code}\n{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)

    def terminate(self) -> int:
        """SIGTERM, and wait until it ended by itself; returns its exit code.

        Raises:
            TierUnavailableError: it did not.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise TierUnavailableError(
                f"the {self._name} did not stop within {STOP_TIMEOUT_S:.0f} s of SIGTERM"
            ) from error

    def close(self) -> None:
        """End it, whatever state it is in. Idempotent."""
        if self._process.poll() is None:
            self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._reader.join(STOP_TIMEOUT_S)


def _parse(line: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _reported(event: Event) -> UcmError:
    name = event.get("kind") or event.get("error")
    kind = next((leaf for leaf in LEAVES if leaf.__name__ == name), ConfigError)
    return kind(str(event.get("message")))


DAEMON_SETTINGS = (
    "memory.capacity_bytes=4GiB",
    "nvme.capacity_bytes=4GiB",
    "nvme.segment_bytes=256MiB",
)


def start_daemon(socket_path: Path, store: Path, log_path: Path) -> ChildProcess:
    """Run `ucm serve` and wait until it is ready.

    Raises:
        UcmError: it is not.
    """
    arguments = ["ucm.cli", "serve", "--json", "--socket", str(socket_path), "--store", str(store)]
    for setting in DAEMON_SETTINGS:
        arguments += ["--set", setting]
    daemon = ChildProcess("daemon", arguments, log_path)
    try:
        while daemon.next_event(START_TIMEOUT_S).get("event") != "ready":
            pass
    except UcmError:
        daemon.close()
        raise
    return daemon


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the parent decides."""

    model: str
    dtype: str
    socket_path: str
    deadline_s: float
    num_chapters: int
    max_tokens: int


class EngineProcess(ChildProcess):
    """The engine, and what it says."""

    def __init__(self, settings: EngineSettings, log_path: Path) -> None:
        arguments = ["ucm.bench.demo_engine", json.dumps(asdict(settings))]
        super().__init__("engine", arguments, log_path)

    def wait_for(self, event: str) -> Event:
        """Wait for an event of one kind, passing over others."""
        while True:
            found = self.next_event(EVENT_TIMEOUT_S)
            if found["event"] == event:
                return found

    def run(self, *, is_cached: bool) -> Iterator[Event]:
        """Have it answer all prompts; yields events up to and with `run_done`."""
        self.send(op="run", cache=is_cached)
        while True:
            event = self.next_event(EVENT_TIMEOUT_S)
            yield event
            if event["event"] == "run_done":
                return

    def flush(self) -> None:
        """Have it wait until what it stored is durable.

        Raises:
            TierUnavailableError: it could not.
        """
        self.send(op="flush")
        if not self.wait_for("flushed")["ok"]:
            raise TierUnavailableError("the daemon did not flush what it accepted")

    def reconnect(self) -> None:
        """Have it connect to the daemon anew.

        Raises:
            TierUnavailableError: it could not.
        """
        self.send(op="reconnect")
        if not self.wait_for("reconnected")["ok"]:
            raise TierUnavailableError("the engine did not find the new daemon")
