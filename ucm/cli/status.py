"""`ucm status`: how a running daemon is doing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ucm.plurals import counted

from .console import format_bytes, print_json, table_console
from .options import ConfigOption, JsonOption, SocketOption, loaded_config

if TYPE_CHECKING:
    from ucm.admin import DaemonStatus
    from ucm.grants import NamespaceStatus, ShareStatus

command = typer.Typer(add_completion=False)

_LEGEND = (
    "used: slots that hold blocks. held: what a namespace takes of the machine, memory that was "
    "ever touched and whole segments on the disk, with its tenant's quota and reservation"
)


@command.command()
def status(
    socket: SocketOption = None,
    config: ConfigOption = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.05, max=3600.0, help="Seconds to wait for it.")
    ] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Show how a running daemon is doing; exit code 3 when none answers."""
    from ucm.admin import AdminClient

    path = loaded_config(config, service__socket_path=socket).config.service.socket_path
    with AdminClient(path, timeout_s=timeout_s) as client:
        found = client.status()
    if as_json:
        print_json(_as_dict(found))
    else:
        _show(found)


def _as_dict(found: DaemonStatus) -> dict[str, object]:
    daemon: dict[str, object] = asdict(found)
    del daemon["store"]
    return daemon | asdict(found.store)


def _show(found: DaemonStatus) -> None:
    store = found.store
    console = table_console()
    console.print(f"ucm {found.version}, {store.state}, pid {found.pid}, up {found.uptime_s:.0f} s")
    console.print(f"socket {found.socket_path}", f"store {found.store_path or 'none'}", sep="\n")
    console.print(
        f"{counted(store.num_sessions, 'session')}, {counted(store.num_leases, 'lease')} of "
        f"{format_bytes(store.leased_bytes)}, {format_bytes(store.write_queue_bytes)} to be flushed"
    )
    if store.rejected_admissions:
        times = counted(store.rejected_admissions, "time")
        console.print(f"{times} a block was not admitted to NVMe")
    table = Table("tier", "used", "capacity", "blocks", "quarantined", "writable", box=None)
    for tier in store.tiers:
        table.add_row(
            tier.kind.value,
            format_bytes(tier.used_bytes),
            format_bytes(tier.capacity_bytes),
            str(tier.num_blocks),
            str(tier.quarantined_slots),
            "yes" if tier.writable else f"no: {tier.reason}",
        )
    console.print(table)
    if store.namespaces:
        console.print(_namespaces_table(store.namespaces))
        console.print(_LEGEND, markup=False)
    for tier in store.tiers:
        if tier.io:
            console.print(f"{tier.kind.value} through {tier.io}: {tier.io_reason}", markup=False)
    for problem in store.problems:
        console.print(f"problem: {problem}", style="bold red")


def _namespaces_table(namespaces: tuple[NamespaceStatus, ...]) -> Table:
    shares = max((each.shares for each in namespaces), key=len)
    tiers = [f"{share.kind.value} held" for share in shares]
    table = Table(
        "namespace",
        "model",
        "dtype",
        "tenant",
        "codec",
        "blocks",
        *tiers,
        "pinned",
        "sessions",
        box=None,
    )
    for each in namespaces:
        held = [_share_text(share) for share in each.shares]
        held += ["none"] * (len(tiers) - len(held))
        table.add_row(
            each.id.hex()[:8],
            each.model_id or "-",
            each.dtype or "-",
            each.tenant or "-",
            each.codec or "-",
            str(each.num_blocks),
            *held,
            format_bytes(each.pinned_bytes),
            str(each.num_sessions),
        )
    return table


def _share_text(share: ShareStatus) -> str:
    """`2.0 GiB of 4.0 GiB (1.0 GiB reserved)`."""
    text = format_bytes(share.held_bytes)
    if share.quota_bytes:
        text += f" of {format_bytes(share.quota_bytes)}"
    if share.reserved_bytes:
        text += f" ({format_bytes(share.reserved_bytes)} reserved)"
    return text
