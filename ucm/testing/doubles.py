"""Doubles of the CUDA driver and of cuFile, built by gcc and loaded into *this* process.

They prove our code, not NVIDIA's: "device" memory is host memory, kernels run on the CPU from
their own sources. Load them only in a process that runs nothing else: after it, everything there
believes that it has a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ucm.storage.device import DeviceBuffer

if TYPE_CHECKING:
    from collections.abc import Iterator

LABEL: Final = "runs on a double of the CUDA driver: proves our code, not NVIDIA's"

_ROOT: Final = Path(__file__).resolve().parents[2]
SOURCES: Final = _ROOT / "tests" / "doubles"
KERNEL_SOURCES: Final = _ROOT / "kernels" / "cuda"

_C_FLAGS: Final = ("-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")


@dataclass(frozen=True, slots=True)
class DoubleLibraries:
    """Paths of the built libraries."""

    driver: Path
    cufile: Path
    kernels: Path


class DriverCounts(ctypes.Structure):
    """What the driver's double was asked to do; see tests/doubles/cuda_double.h."""

    _fields_ = [
        (name, ctypes.c_ulong)
        for name in (
            "copies",
            "copied_bytes",
            "synchronizations",
            "allocations",
            "frees",
            "launches",
            "pageable_copies",
            "streams",
            "events",
            "pinned_ranges",
            "waiting_operations",
        )
    ]


class CufileCounts(ctypes.Structure):
    """What cuFile's double was asked to do; see tests/doubles/cufile.c."""

    _fields_ = [
        (name, ctypes.c_ulong)
        for name in (
            "transfers",
            "bytes",
            "registrations",
            "deregistrations",
            "handles",
            "most_at_once",
        )
    ]


def build_doubles(folder: Path) -> DoubleLibraries:
    """Compile the doubles and the kernels for the CPU into `folder`; some five seconds.

    Raises:
        RuntimeError: a compiler's complaint, or no compiler.
    """
    found = DoubleLibraries(
        folder / "libcuda.so.1", folder / "libcufile.so.0", folder / "libkernels_on_host.so"
    )
    driver = (SOURCES / "cuda_driver.c", SOURCES / "cuda_streams.c")
    _compile("gcc", driver, found.driver, "-std=gnu11")
    _compile("gcc", (SOURCES / "cufile.c",), found.cufile, "-std=gnu11")
    _compile(
        "g++",
        (SOURCES / "kernels_on_host.cpp",),
        found.kernels,
        *("-std=c++17", "-Wno-unused-function", f"-I{KERNEL_SOURCES}"),
    )
    return found


def _compile(compiler: str, sources: tuple[Path, ...], target: Path, *flags: str) -> None:
    command = [compiler, *_C_FLAGS, *flags, f"-Wl,-soname,{target.name}"]
    command += ["-o", str(target), *map(str, sources)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"the doubles need {compiler}: install Debian's g++") from error
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


class Doubles:
    """The loaded doubles of this process."""

    def __init__(self, folder: Path) -> None:
        """Load what `build_doubles` made; must come before kvikio is imported."""
        self.driver = ctypes.CDLL(str(folder / "libcuda.so.1"), ctypes.RTLD_GLOBAL)
        self.cufile = ctypes.CDLL(str(folder / "libcufile.so.0"), ctypes.RTLD_GLOBAL)
        self.kernels_path = folder / "libkernels_on_host.so"
        if not self.driver.ucm_double_kernels(bytes(self.kernels_path)):
            raise RuntimeError(f"{self.kernels_path} cannot be loaded")

    def driver_counts(self) -> DriverCounts:
        """Counters since the process began."""
        counts = DriverCounts()
        self.driver.ucm_double_counts(ctypes.byref(counts))
        return counts

    def cufile_counts(self) -> CufileCounts:
        """Counters since the process began."""
        counts = CufileCounts()
        self.cufile.ucm_double_cufile_counts(ctypes.byref(counts))
        return counts

    @contextlib.contextmanager
    def slow_transfers(self, microseconds: int) -> Iterator[None]:
        """Make every cuFile transfer take this much longer."""
        self.cufile.ucm_double_cufile_delay(ctypes.c_long(microseconds))
        try:
            yield
        finally:
            self.cufile.ucm_double_cufile_delay(ctypes.c_long(0))

    @contextlib.contextmanager
    def lazy_streams(self) -> Iterator[None]:
        """Do what is enqueued as late as a GPU may: only when somebody waits for it."""
        self.driver.ucm_double_lazy(ctypes.c_int(1))
        try:
            yield
        finally:
            self.driver.ucm_double_lazy(ctypes.c_int(0))

    def fail_copies(self, count: int) -> None:
        """Let the driver refuse the next `count` copies."""
        self.driver.ucm_double_fail_copies(ctypes.c_long(count))

    def fail_transfers(self, count: int) -> None:
        """Let the next `count` cuFile transfers fail with EIO."""
        self.cufile.ucm_double_cufile_fail(ctypes.c_long(count))

    def refuse_buffers(self, count: int) -> None:
        """Let the next `count` registrations of buffers fail."""
        self.cufile.ucm_double_cufile_refuse_buffers(ctypes.c_long(count))

    @contextlib.contextmanager
    def device_memory(self, nbytes: int) -> Iterator[DeviceBuffer]:
        """Fresh "device" memory, not zeroed."""
        address = ctypes.c_size_t()
        if self.driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes)):
            raise MemoryError(nbytes)
        found = (address.value, nbytes)
        try:
            yield DeviceBuffer(address.value, nbytes, found, self)
        finally:
            self.driver.cuMemFree_v2(address)


def device_bytes(buffer: DeviceBuffer) -> memoryview:
    """A writable view of a buffer of the double: its memory is the host's."""
    array = (ctypes.c_ubyte * buffer.nbytes).from_address(buffer.address)
    return memoryview(array).cast("B")
