"""The storage benchmark's result for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from .storage_measure import Result


def storage_bench_report(result: Result) -> Group:
    """Tables of everything, each figure beside what it is compared with."""
    return Group(
        _dram(result["dram"]),
        _nvme(result["nvme"]),
        _names(result["lookup"], result["index"]),
        _concurrent(result["concurrent"], "host memory"),
        *([_concurrent(result["concurrent_nvme"], "NVMe")] if "concurrent_nvme" in result else []),
        _peers(result["peers"]),
        f"{result['wrong_bytes']} wrong bytes of {result['checked_bytes'] / 1e9:.1f} GB compared, "
        f"{result['took_s']:.0f} s",
    )


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _dram(row: Mapping[str, Any]) -> Table:
    table = _table(
        f"host memory: {row['blocks']} blocks of {row['block_bytes'] >> 20} MiB",
        ("", "GB/s", "of the copy"),
    )
    ceiling = row["memcpy_gb_s"]
    for name, key in (
        ("load, verified", "load_gb_s"),
        ("load, not verified", "unverified_load_gb_s"),
        ("in place, verified", "zero_copy_gb_s"),
        ("plain copy, one call", "memcpy_gb_s"),
        ("plain copy, block by block", "memcpy_blocks_gb_s"),
    ):
        table.add_row(name, f"{row[key]:.2f}", f"{row[key] / ceiling:.2f}")
    return table


def _nvme(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table(
        "NVMe: GB/s, and the share of the disk's ceiling",
        (
            "slab",
            "load",
            "ceiling",
            "ratio",
            "store",
            "ceiling",
            "ratio",
            "CPU s/GB",
            "whole store",
        ),
    )
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['load_gb_s']:.2f}",
            f"{row['ceiling_read_gb_s']:.2f}",
            f"{row['load_ratio']:.2f}",
            f"{row['store_gb_s']:.2f}",
            f"{row['ceiling_write_gb_s']:.2f}",
            f"{row['store_ratio']:.2f}",
            f"{row['cpu_s_per_gb']:.2f}",
            f"{row['end_to_end_load_gb_s']:.2f} / {row['end_to_end_store_gb_s']:.2f}",
        )
    table.caption = "whole store: load / durable store, leases and copies included"
    return table


def _names(lookups: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> Table:
    table = _table("names", ("", "p50 ms", "p99 ms"))
    for keys, row in lookups.items():
        table.add_row(f"lookup of {keys} keys", f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}")
    for key, value in index.items():
        if key.startswith("lookup_") and key.endswith("_p50_ms"):
            keys = key.split("_")[1]
            p99 = index[f"lookup_{keys}_p99_ms"]
            name = f"lookup of {keys} keys among {index['blocks']} blocks"
            table.add_row(name, f"{value:.2f}", f"{p99:.2f}")
    table.caption = (
        f"{index['blocks']} blocks open in {index['open_s']:.2f} s; "
        f"the daemon's private memory is {index['private_mib']:.0f} MiB"
    )
    return table


def _concurrent(rows: Mapping[str, Mapping[str, Any]], where: str) -> Table:
    table = _table(
        f"clients of one daemon: loads of 8 MiB from {where}",
        (
            "clients",
            "p50 ms",
            "p99 ms",
            "GB/s",
            "Jain",
            "p50 with stores",
            "slower by",
            "stores GB/s",
        ),
    )
    for clients, row in rows.items():
        table.add_row(
            clients,
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['load_gb_s']:.2f}",
            f"{row['jain']:.2f}",
            f"{row['with_stores']['p50_ms']:.2f}",
            f"{100 * row['slowdown_by_stores']:.0f} %",
            f"{row['store_gb_s']:.2f}",
        )
    return table


def _peers(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("the same blocks of 1 MiB elsewhere", ("", "load GB/s", "store GB/s", "how"))
    table.columns[-1].justify = "left"
    for name, row in rows.items():
        table.add_row(name, f"{row['load_gb_s']:.2f}", f"{row['store_gb_s']:.2f}", row["note"])
    return table
