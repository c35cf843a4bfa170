"""Daemons for tests: one in this process, or a real one that can be killed.

Sockets lie in short folders under /tmp, because a Unix socket's path has at most 107 bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ucm.clock import Clock
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.daemon import Daemon

START_TIMEOUT_S: Final = 30.0
"""How long a spawned daemon may take to say that it is ready, on a busy machine."""

STOP_TIMEOUT_S: Final = 30.0


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="ucm", dir="/tmp") as name:
        yield Path(name)


def small_config(folder: Path, *, nvme: bool = True) -> Config:
    """A daemon's configuration with everything in `folder` and little memory."""
    return Config(
        service=ServiceConfig(
            socket_path=folder / "ucm.sock",
            staging_bytes=8 * MIB,
            rpc_threads=4,
            drain_timeout_s=2.0,
        ),
        memory=MemoryConfig(capacity_bytes=32 * MIB),
        nvme=NvmeConfig(
            path=folder / "store" if nvme else None,
            capacity_bytes=64 * MIB,
            segment_bytes=16 * MIB,
            index_map_bytes=16 * MIB,
            io_threads=2,
        ),
    )


def small_settings(folder: Path) -> list[str]:
    """`small_config` as arguments of `ucm serve`."""
    settings = {
        "service.staging_bytes": "8MiB",
        "service.rpc_threads": "4",
        "service.drain_timeout_s": "5",
        "memory.capacity_bytes": "32MiB",
        "nvme.capacity_bytes": "64MiB",
        "nvme.segment_bytes": "16MiB",
        "nvme.index_map_bytes": "16MiB",
        "transfer.lease_timeout_s": "600",
        "nvme.io_threads": "2",
    }
    arguments = ["--socket", str(folder / "ucm.sock"), "--store", str(folder / "store")]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value}"]
    return arguments


@contextlib.contextmanager
def running_daemon(config: Config, clock: Clock | None = None) -> Iterator[Daemon]:
    """A daemon on threads of this process; drained and closed at the end."""
    daemon = Daemon(config, environ={}, clock=clock)
    thread = threading.Thread(target=daemon.run, name="test-daemon")
    try:
        daemon.start()
        thread.start()
        yield daemon
    finally:
        daemon.request_stop()
        if thread.ident is not None:
            thread.join(STOP_TIMEOUT_S)
        daemon.close()


@dataclass(slots=True)
class SpawnedDaemon:
    """A daemon in a process of its own."""

    process: subprocess.Popen[str]
    socket_path: Path
    log_path: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def kill(self) -> None:
        """End it as `kill -9` does, and wait until it is gone."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def stop(self) -> int:
        """Send SIGTERM and wait; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop it with SIGSTOP for the length of the block; from the first line on it is still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        """What it wrote to standard error."""
        return self.log_path.read_text()


class DaemonStartError(RuntimeError):
    """A spawned daemon ended before it was ready."""

    def __init__(self, exit_code: int | None, log: str) -> None:
        super().__init__(f"the daemon ended with {exit_code} before it was ready:\n{log}")
        self.exit_code = exit_code


_NURSERY: Final = """
import os, sys
import ucm.cli.serve, ucm.daemon, ucm.storage.nvme
while sys.stdin.readline():
    pid = os.fork()
    if pid == 0:
        os.close(0)
        ucm.cli.main()
        os._exit(0)
    os.write(1, b"%d\\n" % pid)
    _, status = os.waitpid(pid, 0)
    os.write(1, b"exit %d\\n" % os.waitstatus_to_exitcode(status))
"""


def spawn_daemon(
    arguments: Sequence[str], log_path: Path, env: Mapping[str, str] | None = None
) -> SpawnedDaemon:
    """Start `ucm serve ARGUMENTS` and wait until it is ready.

    Raises:
        DaemonStartError: it ended, or was not ready in time.
    """
    return _await_ready(_start(["-m", "ucm.cli"], arguments, log_path, env), log_path)


def _start(
    python: Sequence[str],
    arguments: Sequence[str],
    log_path: Path,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    with log_path.open("a") as log:
        return subprocess.Popen(
            [sys.executable, *python, "serve", "--json", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(env or {})},
        )


def _await_ready(process: subprocess.Popen[str], log_path: Path) -> SpawnedDaemon:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    overdue = threading.Timer(START_TIMEOUT_S, process.kill)
    overdue.start()
    try:
        line = process.stdout.readline()
    finally:
        overdue.cancel()
        overdue.join()
    event = json.loads(line) if line.startswith("{") else {}
    if event.get("event") == "ready":
        return SpawnedDaemon(process, Path(event["socket"]), log_path)
    process.stdout.close()
    try:
        exit_code = process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        exit_code = process.wait()
    raise DaemonStartError(exit_code, log_path.read_text())


class DaemonNursery:
    """A process that has imported the daemon's code and forks one daemon at a time.

    For tests that start many: what a daemon runs is what `ucm serve` runs, without the second of
    CPU that importing it takes.
    """

    def __init__(self, arguments: Sequence[str], log_path: Path) -> None:
        self.log_path = log_path
        with log_path.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _NURSERY, "serve", "--json", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )

    def start(self) -> ForkedDaemon:
        """Fork the next daemon, and wait until it is ready; the one before must have ended.

        Raises:
            DaemonStartError: it ended, or was not ready in time.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("fork\n")
        pid = int(self.read_line())
        overdue = threading.Timer(START_TIMEOUT_S, os.kill, (pid, signal.SIGKILL))
        overdue.start()
        try:
            line = self.read_line()
        finally:
            overdue.cancel()
            overdue.join()
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") != "ready":
            raise DaemonStartError(None, self.log_path.read_text())
        return ForkedDaemon(self, pid, Path(event["socket"]))

    def read_line(self) -> str:
        """The next line that the nursery or its daemon prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        """End it; its daemon has ended."""
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@dataclass(slots=True)
class ForkedDaemon:
    """A daemon from a nursery."""

    nursery: DaemonNursery
    pid: int
    socket_path: Path

    def kill(self) -> None:
        """End it as `kill -9` does, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._exit_code() == -signal.SIGKILL

    def stop(self) -> int:
        """Send SIGTERM and wait; returns its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self._exit_code()

    def log(self) -> str:
        """What it and those before it wrote to standard error."""
        return self.nursery.log_path.read_text()

    def _exit_code(self) -> int:
        while not (line := self.nursery.read_line()).startswith("exit "):
            assert line, "the nursery is gone"
        return int(line.split()[1])


@contextlib.contextmanager
def spawned_daemon(
    arguments: Sequence[str], log_path: Path, env: Mapping[str, str] | None = None
) -> Iterator[SpawnedDaemon]:
    """`spawn_daemon`; killed at the end unless it ended before."""
    daemon = spawn_daemon(arguments, log_path, env)
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.kill()
        assert daemon.process.stdout is not None
        daemon.process.stdout.close()
