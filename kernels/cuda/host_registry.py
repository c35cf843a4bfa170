"""Host memory that the driver knows: copies from it to the device are asynchronous.

    arena (a mapping of the cache's)  | slot | slot | slot | ...    registered whole, once
    copy                                      ^^^^ to the device, at the bus's speed

Copies from memory that is not registered go through a buffer of the driver and hold up whoever asks
for them: right, and slower. So what cannot be registered is said once and copied all the same.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm.errors import TierUnavailableError

if TYPE_CHECKING:
    from .driver import CudaDriver

log = logging.getLogger(__name__)

MAX_REGISTRATIONS: Final = 64
"""A connection has a handful of mappings."""


class HostRegistry:
    """Mappings registered with the driver, each at its first use. Thread-safe."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._known: dict[int, bool] = {}
        """Address of a mapping to whether the driver took it."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(self._known.values())

    def ensure(self, view: memoryview) -> None:
        """Register the whole mapping that `view` is a part of, if the driver takes it.

        Blocks: page-locking takes some 0.2 s a GB. The mapping must not be unmapped before `forget`
        or `close`.
        """
        address, nbytes = _extent_of(view)
        with self._lock:
            if address in self._known or len(self._known) >= MAX_REGISTRATIONS:
                return
            try:
                self._driver.register_host(address, nbytes)
            except TierUnavailableError as error:
                log.warning("%d bytes of host memory are not registered: %s", nbytes, error)
                self._known[address] = False
                return
            self._known[address] = True

    def forget(self, view: memoryview) -> None:
        """Undo `ensure`, before the owner unmaps it. No copy may be under way."""
        with self._lock:
            self._release(_extent_of(view)[0])

    def close(self) -> None:
        """Forget everything. Idempotent."""
        with self._lock:
            for address in tuple(self._known):
                self._release(address)

    def _release(self, address: int) -> None:
        if self._known.pop(address, False):
            try:
                self._driver.unregister_host(address)
            except TierUnavailableError as error:
                log.warning("host memory stays registered: %s", error)


def address_of(view: memoryview) -> int:
    """Where its first byte is, also of read-only memory."""
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def _extent_of(view: memoryview) -> tuple[int, int]:
    """Address and length of what the view was made of: the mapping."""
    whole = memoryview(view.obj)
    return address_of(whole), whole.nbytes
