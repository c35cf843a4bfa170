"""Ten times more clients than the daemon serves: what admitted loads cost, in turns with one alone.

    alone      one client
    few        as many as it serves at once: the capacity
    crowd      ten times as many clients as it takes in at once

Clients are processes (a few a process), load chains of 4 MiB that are mostly on disk, copy the
bytes, and come again when they were told to. Sides alternate; every number is of one run, the
ratio is the median of the rounds' ratios and that of all loads together.

    python -m ucm.testing.overload_rounds --rounds 5
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from ucm.admin import AdminClient
from ucm.config import MIB

from .daemon import short_folder, spawned_daemon
from .load_processes import LoadProcesses, Turn, quantile
from .overload import Crowd, fill

SETTLE_S: Final = 1.5
"""Before each turn counts: the daemon finds out that there is a crowd, or none any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """What is measured."""

    rounds: int = 5
    seconds: float = 1.0
    """Of a side's turn."""
    waiting: int = 4
    """`service.max_waiting_loads`; twice as many may be in service."""
    few: int = 4
    clients: int = 80
    processes: int = 16
    chains: int = 40
    settings: tuple[str, ...] = ()
    """More of the daemon's, as `name=value`."""


def measure(options: Rounds) -> dict[str, list[Turn]]:
    """Every side's turns, in order; a first round warms up."""
    crowd = Crowd(
        loaders=options.clients,
        slow_readers=0,
        storers=0,
        memory_bytes=64 * MIB,
        max_waiting_loads=options.waiting,
    )
    with short_folder() as folder:
        settings = crowd.settings(folder)
        for each in options.settings:
            settings += ["--set", each]
        with spawned_daemon(settings, folder / "log") as daemon:
            fill(daemon.socket_path, options.chains)
            turns = _take_turns(daemon.socket_path, options)
            with AdminClient(daemon.socket_path) as admin:
                assert admin.status().store.num_leases == 0
            assert daemon.stop() == 0
    return turns


def _take_turns(socket_path: Path, options: Rounds) -> dict[str, list[Turn]]:
    counts = {"alone": 1, "few": options.few, "crowd": options.clients}
    turns: dict[str, list[Turn]] = {side: [] for side in counts}
    processes = LoadProcesses(
        socket_path,
        num_chains=options.chains,
        processes=options.processes,
        clients=-(-options.clients // options.processes),
    )
    with processes as clients:
        for number, side in itertools.product(range(options.rounds + 1), counts):
            turn = clients.run(counts[side], settle_s=SETTLE_S, measure_s=options.seconds)
            if number:
                turns[side].append(turn)
    return turns


def report(turns: dict[str, list[Turn]]) -> dict[str, object]:
    """Each side in a line, and how they compare."""
    lines: dict[str, object] = {}
    for side, found in turns.items():
        loads = [value for turn in found for value in turn.load_s]
        refused = [value for turn in found for value in turn.refused_s]
        by_client = Counter[int]()
        for turn in found:
            by_client.update(dict(enumerate(turn.loads)))
        each = sorted(by_client.values())
        seconds = sum(turn.duration_s for turn in found)
        lines[side] = {
            "loads_a_s": round(sum(turn.loads_a_s for turn in found) / len(found), 1),
            "p50_ms": round(quantile(loads, 0.5) * 1e3, 1),
            "p99_ms": round(quantile(loads, 0.99) * 1e3, 1),
            "refused_a_s": round(len(refused) / seconds, 1),
            "refused_p50_ms": round(quantile(refused or [0.0], 0.5) * 1e3, 3),
            "refused_p99_ms": round(quantile(refused or [0.0], 0.99) * 1e3, 3),
            "partial": sum(turn.num_partial for turn in found),
            "loads_of_a_client_min_median_max": [each[0], int(statistics.median(each)), each[-1]],
            "clients_served": sum(count > 0 for count in each),
        }
    alone, crowd = turns["alone"], turns["crowd"]
    ratios = [busy.p(0.99) / free.p(0.99) for free, busy in zip(alone, crowd, strict=True)]
    everything = [
        quantile([value for turn in side for value in turn.load_s], 0.99) for side in (crowd, alone)
    ]
    goodput = [
        busy.loads_a_s / free.loads_a_s for free, busy in zip(turns["few"], crowd, strict=True)
    ]
    lines["p99_ratio"] = round(everything[0] / everything[1], 2)
    lines["p99_ratio_of_rounds"] = [round(value, 2) for value in sorted(ratios)]
    lines["goodput_of_few"] = round(statistics.median(goodput), 2)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for each in fields(Rounds):
        if each.name != "settings":
            parser.add_argument(f"--{each.name}", type=type(each.default), default=each.default)
    parser.add_argument("--set", action="append", default=[], help="more of the daemon's settings")
    given = vars(parser.parse_args(arguments))
    settings = tuple(given.pop("set"))
    for name, value in report(measure(Rounds(**given, settings=settings))).items():
        sys.stdout.write(f"{name}: {json.dumps(value)}\n")


if __name__ == "__main__":
    main()
