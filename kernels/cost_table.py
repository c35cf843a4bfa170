"""Measured costs of kernels on one machine: a small file in the user's cache folder.

    <user cache>/ucm/kernels/<digest of the machine>.json
    { "version": 1,
      "machine": {"cpu": ..., "cores": ..., "torch": ..., "threads": ...},
      "costs": [{"operation": ..., "device": ..., "dtype": ..., "bucket": ...,
                 "costs_us": {"<implementation>": <microseconds>, ...}}, ...] }

A file that is missing, damaged, of another version or of another machine is no table: then costs
are estimated, and `ucm doctor kernels --tune` measures anew. It is written whole or not at all, and
a process reads it once. `UCM_KERNEL_TABLE` names another file, or `none`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

log = logging.getLogger(__name__)

TABLE_VERSION: Final = 1
"""Changes when buckets or implementations mean something else."""

MAX_TABLE_BYTES: Final = 1 << 20
VARIABLE: Final = "UCM_KERNEL_TABLE"
NO_TABLE: Final = "none"


class CostKey(NamedTuple):
    """A bucket of one operation."""

    operation: str
    device: str
    dtype: str
    bucket: str


CostTable: TypeAlias = Mapping[CostKey, Mapping[str, float]]
"""For each bucket microseconds by implementation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineIdentity:
    """What costs depend on. Another one has another table."""

    cpu: str
    """Model, as the kernel names it."""
    cores: int
    torch: str
    """Its version."""
    threads: int
    """That torch computes with."""

    @classmethod
    def here(cls) -> MachineIdentity:
        """This machine and this process; imports torch."""
        import torch

        return cls(
            cpu=_cpu_model(Path("/proc/cpuinfo")),
            cores=os.cpu_count() or 1,
            torch=importlib.metadata.version("torch"),
            threads=torch.get_num_threads(),
        )

    def digest(self) -> str:
        """16 hexadecimal digits; a file name."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def table_path(machine: MachineIdentity) -> Path | None:
    """Where a machine's table is; None when `UCM_KERNEL_TABLE` says `none`."""
    named = os.environ.get(VARIABLE)
    if named == NO_TABLE:
        return None
    return Path(named) if named else _folder() / f"{machine.digest()}.json"


def load(path: Path, machine: MachineIdentity) -> CostTable:
    """Read a table; an empty one when it is missing, damaged, or not this machine's."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_TABLE_BYTES))  # a longer one is cut, and no JSON
        if found["version"] != TABLE_VERSION or found["machine"] != asdict(machine):
            log.info("%s is another machine's: kernel costs are estimated", path)
            return {}
        return {_key_of(row): _costs_of(row) for row in found["costs"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be used, kernel costs are estimated: %r", path, error)
        return {}


def save(path: Path, machine: MachineIdentity, table: CostTable) -> None:
    """Write a table, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    rows = [{**key._asdict(), "costs_us": dict(costs)} for key, costs in sorted(table.items())]
    text = json.dumps({"version": TABLE_VERSION, "machine": asdict(machine), "costs": rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@functools.cache
def current() -> CostTable:
    """This machine's table, as it was when the process first asked; imports torch if there is any.

    An engine's process has torch anyway; a client that only copies should not wait for it.
    """
    if not _is_any_saved():
        return {}
    try:
        machine = MachineIdentity.here()
    except (ImportError, OSError, MemoryError) as error:
        log.warning("kernel costs are estimated: torch cannot be imported: %r", error)
        return {}
    path = table_path(machine)
    return load(path, machine) if path is not None else {}


def _is_any_saved() -> bool:
    """Whether there may be a table, of whatever machine."""
    named = os.environ.get(VARIABLE)
    if named:
        return named != NO_TABLE
    return any(_folder().glob("*.json"))


def _folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("ucm") / "kernels"


def _key_of(row: Mapping[str, str]) -> CostKey:
    key = CostKey(*(row[name] for name in CostKey._fields))
    if not all(isinstance(part, str) for part in key):
        raise ValueError(f"not a bucket: {row}")
    return key


def _costs_of(row: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    costs = {str(name): float(cost_us) for name, cost_us in row["costs_us"].items()}
    if not all(math.isfinite(cost_us) and cost_us > 0 for cost_us in costs.values()):
        raise ValueError(f"not costs: {costs}")
    return costs


def _cpu_model(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
