"""Device memory at the `FileIo` seam: what a transfer between a file and a GPU is asked with.

    IoRequest      buffers are memoryviews                    every FileIo
    DeviceRequest  buffers are DeviceBuffers or memoryviews   a DeviceFileIo only

The seam stays as it is for those who move host memory; a `DeviceFileIo` takes both kinds in one
batch. Nothing here imports a GPU library: a buffer is an address, a length and the object that
owns it, and any object with `__cuda_array_interface__` (cupy, torch, numba) can be one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from ucm.errors import InvalidArgumentError
from ucm.layout import ALIGNMENT_BYTES

from .file_io import FileIo, IoRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .file_io import FileHandle

CudaArrayInterface = dict[str, object]
"""Version 3 of the CUDA array interface, as numba documents it."""


@dataclass(frozen=True, slots=True)
class DeviceBuffer:
    """Contiguous bytes of device memory."""

    address: int
    nbytes: int
    base: tuple[int, int]
    """Address and length of what it was first made of: the unit of registration."""
    owner: object
    """Kept alive as long as the buffer is."""

    @classmethod
    def of(cls, array: object) -> Self:
        """The bytes of an array in device memory; no copy.

        Args:
            array: C-contiguous, with `__cuda_array_interface__`. torch has none for bfloat16:
                pass `tensor.view(torch.int16)`.

        Raises:
            InvalidArgumentError: it has no such interface, or is not contiguous.
        """
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            raise InvalidArgumentError(f"a {type(array).__name__} is not in device memory")
        itemsize = int(interface["typestr"][2:])
        shape, strides = tuple(interface["shape"]), interface.get("strides")
        if strides is not None and tuple(strides) != _contiguous_strides(shape, itemsize):
            raise InvalidArgumentError(f"strides {strides} of shape {shape} are not contiguous")
        address, nbytes = int(interface["data"][0]), math.prod(shape) * itemsize
        return cls(address, nbytes, (address, nbytes), array)

    @property
    def __cuda_array_interface__(self) -> CudaArrayInterface:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    @property
    def is_aligned(self) -> bool:
        """Whether it can be transferred directly: 4 KiB in address and length."""
        return self.address % ALIGNMENT_BYTES == 0 and self.nbytes % ALIGNMENT_BYTES == 0

    def __getitem__(self, where: slice) -> DeviceBuffer:
        start, stop, step = where.indices(self.nbytes)
        if step != 1:
            raise InvalidArgumentError(f"a slice with step {step} is not contiguous")
        length = max(0, stop - start)
        return DeviceBuffer(self.address + start, length, self.base, self.owner)


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """As `IoRequest`, with device memory among its buffers."""

    file: FileHandle
    offset: int
    buffers: tuple[memoryview | DeviceBuffer, ...]
    """Each 4 KiB aligned in address and length; a read writes to them."""
    check: Callable[[], bool] | None = None
    """As in `IoRequest`. Its CUDA work must be ordered after the transfer, which has ended."""


class DeviceFileIo(FileIo, Protocol):
    """A `FileIo` that also moves device memory."""

    def adopt(self, fd: int) -> FileHandle:
        """Read a file that somebody else opened; `fd` stays theirs.

        Raises:
            OSError: it is closed, or this process may not open its file once more.
        """

    def forget(self, buffer: DeviceBuffer) -> None:
        """Keep nothing of a buffer's allocation, before its owner frees it; nothing in flight."""

    def read_batch(self, requests: Sequence[IoRequest | DeviceRequest]) -> list[int]:
        """See `FileIo.read_batch`. EINVAL for device memory that is not aligned."""

    def write_batch(self, requests: Sequence[IoRequest | DeviceRequest]) -> list[int]:
        """See `FileIo.write_batch`. EINVAL for device memory that is not aligned."""


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))
