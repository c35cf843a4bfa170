"""Compile our CUDA sources to cubins through NVRTC: no CUDA toolkit, no GPU, tens of milliseconds.

NVRTC comes with the `gds` extra (the wheel nvidia-cuda-nvrtc) or with a CUDA toolkit. It is loaded
at the first compilation, and a result is kept for the life of the process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ucm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

KERNEL_SOURCES: Final = ("slab_checksum.cu", "paged_copy.cu", "rotate_keys.cu")
"""Every source that can be compiled."""

_HEADERS: Final = ("xxh3.cuh",)
_SUCCESS: Final = 0


@functools.cache
def compile_cubin(source: str, arch: str) -> bytes:
    """Machine code of one of `KERNEL_SOURCES`; cached.

    Args:
        source: file name in this folder.
        arch: such as `sm_90`.

    Raises:
        ConfigError: there is no NVRTC, or it knows no such architecture; the message has its log.
    """
    nvrtc = _library()
    texts = [_text(name) for name in _HEADERS]
    program = ctypes.c_void_p()
    code = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        _text(source),
        source.encode(),
        ctypes.c_int(len(_HEADERS)),
        (ctypes.c_char_p * len(texts))(*texts),
        (ctypes.c_char_p * len(texts))(*(name.encode() for name in _HEADERS)),
    )
    _check(nvrtc, "nvrtcCreateProgram", code)
    try:
        flags = (f"--gpu-architecture={arch}".encode(), b"--std=c++17")
        code = nvrtc.nvrtcCompileProgram(
            program, ctypes.c_int(len(flags)), (ctypes.c_char_p * len(flags))(*flags)
        )
        log = _read(nvrtc, program, "nvrtcGetProgramLog") if code else b""
        _check(nvrtc, f"{source} for {arch}", code, log)
        return _read(nvrtc, program, "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the NVRTC in use.

    Raises:
        ConfigError: there is none.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc = _library()
    code = nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    _check(nvrtc, "nvrtcVersion", code)
    return major.value, minor.value


def _text(name: str) -> bytes:
    return resources.files(__package__ or "ucm.kernels.cuda").joinpath(name).read_bytes()


@functools.cache
def _library() -> ctypes.CDLL:
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise ConfigError("NVRTC is not installed: run `pip install 'ucm-cache[gds]'`")


def _candidates() -> Iterator[str]:
    """Where NVRTC may be: the wheel of NVIDIA, then what the system's loader finds."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found = Path(folder).glob("*/lib/libnvrtc.so.*")
        yield from sorted((str(path) for path in found if path.suffix[1:].isdigit()), reverse=True)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "/usr/local/cuda/lib64/libnvrtc.so")


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, name: str) -> bytes:
    """What `nvrtcGetX` gives, whose length `nvrtcGetXSize` says."""
    size = ctypes.c_size_t()
    _check(nvrtc, name, getattr(nvrtc, f"{name}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, name, getattr(nvrtc, name)(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, what: str, code: int, log: bytes = b"") -> None:
    if code != _SUCCESS:
        name = nvrtc.nvrtcGetErrorString(ctypes.c_int(code)).decode()
        text = log.rstrip(b"\0\n").decode(errors="replace")
        raise ConfigError(f"NVRTC: {what}: {name} {text}".rstrip())
