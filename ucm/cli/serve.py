"""`ucm serve`: run the daemon in the foreground until SIGTERM or SIGINT."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from types import FrameType
from typing import Annotated

import typer

from ucm.config import Config, MemoryConfig, NvmeConfig
from ucm.machine_memory import machine_memory

from .console import format_bytes, print_json
from .options import (
    ConfigOption,
    JsonOption,
    SetOption,
    SocketOption,
    StoreOption,
    loaded_config,
)

_log = logging.getLogger(__name__)

command = typer.Typer(add_completion=False)


@command.command()
def serve(
    config: ConfigOption = None,
    socket: SocketOption = None,
    store: StoreOption = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            help="Prometheus port on loopback; 0: none. Default: metrics.port.",
        ),
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the daemon in the foreground.

    SIGTERM and SIGINT drain it: stores are refused, leases run out, accepted blocks are flushed.
    A second one skips the wait.
    """
    loaded = loaded_config(
        config,
        settings,
        service__socket_path=socket,
        nvme__path=store,
        metrics__port=metrics_port,
    )
    logging.basicConfig(
        level=loaded.config.log.level,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    warn_of_memory(loaded.config.memory)
    _serve(loaded.config, as_json=as_json)


def warn_of_memory(memory: MemoryConfig) -> None:
    """Say so when the host-memory tier may outgrow the machine: it is sparse, so it would start."""
    machine_bytes = machine_memory().total_bytes
    if memory.capacity_bytes > machine_bytes:
        _log.warning(
            "memory.capacity_bytes is %s, the machine has %s: the kernel may kill the daemon or "
            "its clients before the store is full; lower it",
            format_bytes(memory.capacity_bytes),
            format_bytes(machine_bytes),
        )


def warn_of_disk(nvme: NvmeConfig) -> None:
    """Say so when the disk tier cannot become as large as it may: stores then fail, not evict."""
    if nvme.path is None:
        return
    try:
        disk_bytes = shutil.disk_usage(nvme.path).total
    except OSError:
        return
    if nvme.capacity_bytes > disk_bytes:
        _log.warning(
            "nvme.capacity_bytes is %s, the file system of %s has %s: stores will stop when it is "
            "full; lower it",
            format_bytes(nvme.capacity_bytes),
            nvme.path,
            format_bytes(disk_bytes),
        )


def _serve(config: Config, *, as_json: bool) -> None:
    from ucm.daemon import Daemon

    daemon = Daemon(config)

    def stop(_number: int, _frame: FrameType | None) -> None:
        daemon.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        daemon.start()
        warn_of_disk(config.nvme)
        _say("ready", config, as_json=as_json)
        daemon.run()
    finally:
        daemon.close()
    _say("stopped", config, as_json=as_json)


def _say(event: str, config: Config, *, as_json: bool) -> None:
    socket_path, store = config.service.socket_path, config.nvme.path
    if as_json:
        print_json({"event": event, "pid": os.getpid(), "socket": socket_path, "store": store})
    elif event == "ready":
        where = f"store {store}" if store else "memory only"
        print(f"ucm: serving at {socket_path}, {where}", flush=True)
    else:
        print(f"ucm: stopped at {socket_path}", flush=True)
