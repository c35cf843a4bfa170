"""The calls of the CUDA driver that kernels, copies and their order take: no torch, no cupy.

One device, its primary context: the one that torch and cupy use, so pointers of theirs are valid
here. Calls may come from any thread. Never load it where no driver works without a preflight
(`ucm.storage.io_choice`): initialising a broken one can hang. Streams and events are the driver's
handles, as torch has them (`torch.cuda.Stream.cuda_stream`).
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

from ucm.errors import TierUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KernelArgument = ctypes.c_uint32 | ctypes.c_uint64
"""Numbers and device addresses, as wide as the kernel's parameter."""

_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
_NOT_READY = 600
_STREAM_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC = 1
_EVENT_DISABLE_TIMING = 2
_PINNED_PORTABLE = 1
_REGISTER_READ_ONLY = 8


class CudaDriver:
    """A device and its primary context."""

    def __init__(self, library: str = "libcuda.so.1", device: int = 0) -> None:
        """Initialise the driver.

        Raises:
            TierUnavailableError: no driver, or no such device.
        """
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise TierUnavailableError(f"no CUDA driver: {error}") from error
        self._device = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(device))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    @property
    def arch(self) -> str:
        """The device's architecture, as NVRTC names it: `sm_90`."""
        parts = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
            parts.append(value.value)
        return "sm_{}{}".format(*parts)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context the calling thread's, for the block."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def load_functions(self, cubin: bytes, names: Sequence[str]) -> dict[str, ctypes.c_void_p]:
        """Load machine code and find its kernels. It stays loaded as long as the process lives.

        Raises:
            TierUnavailableError: it is for another architecture, or a name is not in it.
        """
        module, found = ctypes.c_void_p(), {}
        with self.current():
            self._call("cuModuleLoadDataEx", ctypes.byref(module), cubin, 0, None, None)
            for name in names:
                found[name] = ctypes.c_void_p()
                self._call("cuModuleGetFunction", ctypes.byref(found[name]), module, name.encode())
        return found

    def launch(
        self,
        function: ctypes.c_void_p,
        shape: tuple[int, int],
        arguments: Sequence[KernelArgument],
        stream: int = 0,
    ) -> None:
        """Start a kernel; returns before it has ended.

        Args:
            function: from `load_functions`.
            shape: thread blocks, and threads in each.
            arguments: the kernel's, in order; addresses are valid until the stream is done.
            stream: a CUstream; 0 is the legacy default stream.

        Raises:
            TierUnavailableError: the driver refuses.
        """
        grid, block = (ctypes.c_uint(number) for number in shape)
        one, none = ctypes.c_uint(1), ctypes.c_uint(0)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        with self.current():
            self._call(
                "cuLaunchKernel",
                function,
                *(grid, one, one, block, one, one, none, ctypes.c_void_p(stream)),
                *(pointers, None),
            )

    def synchronize(self, stream: int = 0) -> None:
        """Wait for a stream.

        Raises:
            TierUnavailableError: a kernel of it failed.
        """
        with self.current():
            self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    @contextlib.contextmanager
    def memory(self, nbytes: int, stream: int = 0) -> Iterator[int]:
        """Device memory for the block, in the order of a stream; its address.

        Taken from and given back to the device's pool: unlike cuMemFree, which waits for the whole
        device, it holds up nobody else's work.

        Raises:
            TierUnavailableError: there is not as much.
        """
        address, order = ctypes.c_size_t(), ctypes.c_void_p(stream)
        with self.current():
            size = ctypes.c_size_t(nbytes)
            self._call("cuMemAllocAsync", ctypes.byref(address), size, order)
        try:
            yield address.value
        finally:
            with self.current():
                self._call("cuMemFreeAsync", address, order)

    def copy(self, to: int, source: int, nbytes: int, stream: int = 0) -> None:
        """Copy between any two addresses, device or host, in the order of the stream.

        Raises:
            TierUnavailableError: the driver refuses.
        """
        addresses = (ctypes.c_size_t(to), ctypes.c_size_t(source), ctypes.c_size_t(nbytes))
        with self.current():
            self._call("cuMemcpyAsync", *addresses, ctypes.c_void_p(stream))

    def create_stream(self) -> int:
        """A stream that waits for no other, the default one included.

        Raises:
            TierUnavailableError: the driver refuses.
        """
        return self._create("cuStreamCreate", _STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back; what was enqueued is still done."""
        with self.current():
            self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def create_event(self) -> int:
        """An event; threads that wait for it sleep.

        Raises:
            TierUnavailableError: the driver refuses.
        """
        return self._create("cuEventCreate", _EVENT_DISABLE_TIMING | _EVENT_BLOCKING_SYNC)

    def destroy_event(self, event: int) -> None:
        """Give an event back; who already waits for it is not disturbed."""
        with self.current():
            self._call("cuEventDestroy_v2", ctypes.c_void_p(event))

    def record_event(self, event: int, stream: int) -> None:
        """Let the event stand for all that was enqueued on the stream so far."""
        with self.current():
            self._call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def order_after(self, event: int, stream: int) -> None:
        """What is enqueued on the stream from now on waits for the event's last record."""
        with self.current():
            flags = ctypes.c_uint(0)
            self._call("cuStreamWaitEvent", ctypes.c_void_p(stream), ctypes.c_void_p(event), flags)

    def synchronize_event(self, event: int) -> None:
        """Wait for an event's last record; at once when it has none.

        Raises:
            TierUnavailableError: what was enqueued before it failed.
        """
        with self.current():
            self._call("cuEventSynchronize", ctypes.c_void_p(event))

    def is_reached(self, event: int) -> bool:
        """Whether an event's last record was reached; does not wait.

        Raises:
            TierUnavailableError: what was enqueued before it failed.
        """
        with self.current():
            code: int = self._cuda.cuEventQuery(ctypes.c_void_p(event))
            if code != _NOT_READY:
                self._check("cuEventQuery", code)
        return code != _NOT_READY

    def allocate(self, nbytes: int) -> int:
        """Device memory that lasts, as cuFile registers it; its address. `free` gives it back.

        Raises:
            TierUnavailableError: there is not as much.
        """
        address = ctypes.c_size_t()
        with self.current():
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def free(self, address: int) -> None:
        """Give device memory back; waits for the whole device."""
        with self.current():
            self._call("cuMemFree_v2", ctypes.c_size_t(address))

    def allocate_pinned(self, nbytes: int) -> int:
        """Page-locked host memory, page-aligned; its address. `free_pinned` gives it back.

        Raises:
            TierUnavailableError: there is not as much.
        """
        address = ctypes.c_void_p()
        with self.current():
            size, flags = ctypes.c_size_t(nbytes), ctypes.c_uint(_PINNED_PORTABLE)
            self._call("cuMemHostAlloc", ctypes.byref(address), size, flags)
        return address.value or 0

    def free_pinned(self, address: int) -> None:
        """Give page-locked memory back; no copy may use it any more."""
        with self.current():
            self._call("cuMemFreeHost", ctypes.c_void_p(address))

    def register_host(self, address: int, nbytes: int) -> None:
        """Page-lock memory that is there already and is only read: copies from it are asynchronous.

        Raises:
            TierUnavailableError: some of it is locked already, or the driver refuses.
        """
        with self.current():
            size, flags = ctypes.c_size_t(nbytes), ctypes.c_uint(_REGISTER_READ_ONLY)
            self._call("cuMemHostRegister_v2", ctypes.c_void_p(address), size, flags)

    def unregister_host(self, address: int) -> None:
        """Undo `register_host`; no copy may be under way."""
        with self.current():
            self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def _create(self, name: str, flags: int) -> int:
        handle = ctypes.c_void_p()
        with self.current():
            self._call(name, ctypes.byref(handle), ctypes.c_uint(flags))
        return handle.value or 0

    def _call(self, name: str, *arguments: object) -> None:
        self._check(name, getattr(self._cuda, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            raise TierUnavailableError(f"CUDA: {name}: {(text.value or b'?').decode()} ({code})")
