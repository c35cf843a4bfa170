"""Blocks of one memory by their offsets, without an object for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray


class BlockRows(Sequence[memoryview]):
    """Views of equally long blocks; one is made when it is asked for."""

    __slots__ = ("_bytes", "_memory", "block_bytes", "offsets")

    def __init__(self, memory: memoryview, offsets: Sequence[int], block_bytes: int) -> None:
        """Blocks of `block_bytes` at `offsets`, in bytes, of `memory`.

        Raises:
            ValueError: a block does not lie in the memory.
        """
        self._memory = memory.cast("B")
        self._bytes = np.asarray(self._memory)
        """Whoever has these rows, has the memory: an exported view cannot be released."""
        self.block_bytes = block_bytes
        try:
            self.offsets = np.fromiter(offsets, np.uint64, len(offsets))
        except OverflowError as error:
            raise ValueError("a block lies before the beginning of its memory") from error
        if len(offsets) and int(self.offsets.max()) + block_bytes > memory.nbytes:
            raise ValueError("a block lies behind the end of its memory")

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> memoryview: ...

    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...

    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        start = int(self.offsets[index])
        return self._memory[start : start + self.block_bytes]

    def addresses(self) -> NDArray[np.uint64]:
        """Where the blocks lie in this process, while it keeps the memory."""
        return self.offsets + np.uint64(self._bytes.ctypes.data)
