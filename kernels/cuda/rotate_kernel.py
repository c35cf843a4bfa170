"""Launching the kernel that turns keys to other positions; see `rotate_keys.cu`.

Works on device addresses, whoever allocated them. What it computes is what `ucm.kernels.rotate`
computes on a CPU; one test holds it to that.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ucm.errors import InvalidArgumentError

from .nvrtc import compile_cubin

if TYPE_CHECKING:
    from .driver import CudaDriver

_SOURCE: Final = "rotate_keys.cu"
_NAMES: Final = ("ucm_rotate_keys_float32", "ucm_rotate_keys_bfloat16")
_THREADS: Final = 256


@dataclass(frozen=True, slots=True)
class Rows:
    """Where keys lie in device memory."""

    source: int
    """[num_rows, head_dim], contiguous."""
    target: int
    """The same; may be `source`."""
    table: int
    """[2, head_dim / 2] fp32: cosines, sines."""
    num_rows: int
    head_dim: int


class RotateKernel:
    """The compiled kernel on one device. Thread-safe."""

    def __init__(self, driver: CudaDriver) -> None:
        """Compile for the driver's device and load.

        Raises:
            ConfigError: NVRTC is missing or does not know the device.
            TierUnavailableError: the driver refuses.
        """
        self._driver = driver
        self._functions = driver.load_functions(compile_cubin(_SOURCE, driver.arch), _NAMES)

    def run(self, rows: Rows, *, is_bfloat16: bool, is_interleaved: bool, stream: int) -> None:
        """Turn the keys; blocks until the stream is done.

        Args:
            rows: where they are.
            is_bfloat16: float32 otherwise.
            is_interleaved: half-split otherwise.
            stream: in whose order it happens.

        Raises:
            InvalidArgumentError: an odd head size.
            TierUnavailableError: the driver refuses.
        """
        if rows.head_dim < 2 or rows.head_dim % 2:
            raise InvalidArgumentError(f"keys have an even number of dimensions: {rows.head_dim}")
        if not rows.num_rows:
            return
        arguments = (
            ctypes.c_uint64(rows.target),
            ctypes.c_uint64(rows.source),
            ctypes.c_uint64(rows.table),
            ctypes.c_uint64(rows.num_rows),
            ctypes.c_uint64(rows.head_dim | is_interleaved << 32),
        )
        grid = -(-rows.num_rows * (rows.head_dim // 2) // _THREADS)
        name = _NAMES[is_bfloat16]
        self._driver.launch(self._functions[name], (grid, _THREADS), arguments, stream)
        self._driver.synchronize(stream)
