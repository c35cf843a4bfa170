"""The CUDA kernels and their CPU references, held to the same tests.

    reference    numpy and torch
    serial       the kernels' own pieces, compiled by g++, a loop over the lanes
    kernel       the kernel's own source, compiled by g++, run a fiber a lane, launched through the
                 driver's double with the cubin that NVRTC made for sm_90
    gpu          the cubin on a real device; only where there is one

Run by tests/conformance/test_on_doubles.py in a process of its own. All but `gpu` run on a double
of the CUDA driver: they prove our code, not NVIDIA's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray

from ucm.errors import ConfigError, InvalidArgumentError, LayoutMismatchError, TierUnavailableError
from ucm.kernels.cuda.driver import CudaDriver
from ucm.kernels.cuda.nvrtc import KERNEL_SOURCES, compile_cubin
from ucm.kernels.cuda.rotate_kernel import RotateKernel, Rows
from ucm.kernels.cuda.slab_kernels import PagedSlabs, SlabKernels
from ucm.kernels.paged_copy import PAGED_COPY, copy_by_kernel, gather_slabs, scatter_slabs
from ucm.kernels.rope import Rope, RopeStyle, cos_sin
from ucm.kernels.rotate import rotate_keys
from ucm.kernels.slab_checksum import xxh3_64_in_blocks
from ucm.kernels.xxh3 import MIN_BYTES
from ucm.layout import KvDtype, KvLayout
from ucm.storage.device import DeviceBuffer, DeviceRequest
from ucm.storage.file_io import aligned_buffer
from ucm.storage.gds import GdsFileIo, GdsOptions
from ucm.testing.doubles import Doubles, device_bytes

ON_GPU = "UCM_DOUBLES" not in os.environ
"""The same suite with the machine's own driver: `pytest tests/doubles/kernel_suite.py`."""

Bytes = NDArray[np.uint8]
Checksum = Callable[[Bytes, Sequence[int], int], list[int]]

SHORT = [*range(241)]
EDGES = [
    *range(241, 261),
    *(blocks * 1024 + rest for blocks in (1, 2, 3, 16) for rest in (-1, 0, 1, 63, 64, 65, 512)),
    *(960, 961, 1000, 4096, 48 << 10, 65535, 100_003, 1 << 20),
]
GOLDEN = {  # xxh3_64, seed 0, of bytes (i * 7 + 3) % 256
    0: 0x2D06800538D394C2,
    1: 0x13E608BC156DEFED,
    3: 0xA9088DDA485B481C,
    8: 0x60539DB630471163,
    16: 0xB8C859B0F030B585,
    100: 0xB5937857F0D78C9F,
    240: 0x64556DC6B462A6CF,
    241: 0x8BEADD3A8874FE17,
    512: 0xF58202B8D9019D1D,
    1024: 0x9B81661C641C72B1,
    1025: 0x806C2072ED713576,
    4096: 0xD7428746842BE37E,
    49152: 0x80575BDDEE533C74,
    1048576: 0x74823CF2CD45B0FE,
}


def data_of(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def expected(data: Bytes, offsets: Sequence[int], size: int) -> list[int]:
    return [xxhash.xxh3_64_intdigest(data[start : start + size].tobytes()) for start in offsets]


@pytest.fixture(scope="session")
def doubles() -> Doubles | None:
    return None if ON_GPU else Doubles(Path(os.environ["UCM_DOUBLES"]))


@pytest.fixture(scope="session")
def driver(doubles: Doubles | None) -> CudaDriver:
    return CudaDriver()


@pytest.fixture(scope="session")
def kernels(driver: CudaDriver) -> SlabKernels:
    return SlabKernels(driver)


def by_reference(data: Bytes, offsets: Sequence[int], size: int) -> list[int]:
    return [xxh3_64_in_blocks(data[start : start + size]) for start in offsets]


@pytest.fixture
def serial(doubles: Doubles | None) -> Checksum:
    assert doubles is not None
    library = ctypes.CDLL(str(doubles.kernels_path))
    library.ucm_serial_xxh3.restype = ctypes.c_uint64

    def compute(data: Bytes, offsets: Sequence[int], size: int) -> list[int]:
        return [
            library.ucm_serial_xxh3(
                ctypes.c_void_p(data.ctypes.data + start), ctypes.c_uint64(size)
            )
            for start in offsets
        ]

    return compute


@pytest.fixture
def kernel(driver: CudaDriver, kernels: SlabKernels) -> Checksum:
    def compute(data: Bytes, offsets: Sequence[int], size: int) -> list[int]:
        with driver.memory(max(16, data.nbytes)) as base:
            driver.copy(base, data.ctypes.data, data.nbytes)
            return kernels.checksums(base, offsets, size)

    return compute


# ---------------------------------------------------------------- checksums


@pytest.mark.parametrize("size", EDGES)
def test_the_reference_is_xxh3(size: int) -> None:
    data = data_of(size)
    assert by_reference(data, [0], size) == expected(data, [0], size)


def test_the_reference_says_what_it_cannot_do() -> None:
    with pytest.raises(InvalidArgumentError):
        xxh3_64_in_blocks(data_of(MIN_BYTES - 1))


@pytest.mark.skipif(ON_GPU, reason="the pieces on the CPU need no GPU")
@pytest.mark.parametrize("kind", ["zeros", "ones", "random"])
def test_the_serial_pieces_are_xxh3(kind: str, serial: Checksum) -> None:
    """Every length from 0 to 3 KiB, and the edges; zeros and ones find lost carries."""
    fill = {"zeros": 0, "ones": 255}
    data = np.full(1 << 20, fill[kind], np.uint8) if kind in fill else data_of(1 << 20)
    wrong = [
        size
        for size in [*range(3 << 10), *EDGES]
        if serial(data, [0, 5], min(size, (1 << 20) - 5))
        != expected(data, [0, 5], min(size, (1 << 20) - 5))
    ]
    assert wrong == []


def test_the_kernel_is_xxh3(kernel: Checksum) -> None:
    """Short lengths and the edges, two slabs at a time, side by side."""
    wrong = []
    for size in [*SHORT[::3], *EDGES]:
        stride = -(-size // 16) * 16
        data = data_of(2 * stride, seed=size)
        if kernel(data, [0, stride], size) != expected(data, [0, stride], size):
            wrong.append(size)
    assert wrong == []


@pytest.mark.parametrize("num_slabs", [0, 1, 7, 8, 9, 65])
def test_every_slab_of_a_launch_has_its_own_sum(num_slabs: int, kernel: Checksum) -> None:
    """One warp a slab, eight a thread block: also where the last block is not full."""
    size, data = 1536, data_of(65 * 2048)
    offsets = [n * 2048 for n in range(num_slabs)][::-1]
    assert kernel(data, offsets, size) == expected(data, offsets, size)


def test_a_flipped_bit_changes_the_sum(kernel: Checksum) -> None:
    data = data_of(4096)
    before = kernel(data, [0], 4096)
    for position in range(0, 4096, 113):
        data[position] ^= 1 << (position % 8)
        assert kernel(data, [0], 4096) != before
        data[position] ^= 1 << (position % 8)


def test_golden_vectors(kernel: Checksum) -> None:
    """Part of the disk format: these numbers never change."""
    for size, golden in GOLDEN.items():
        data = ((np.arange(max(16, size)) * 7 + 3) % 256).astype(np.uint8)
        assert kernel(data, [0], size) == [golden] == expected(data, [0], size)
        assert size < MIN_BYTES or xxh3_64_in_blocks(data[:size]) == golden


@pytest.mark.skipif(ON_GPU, reason="only the double counts")
def test_a_launch_gives_its_memory_back(doubles: Doubles, kernel: Checksum) -> None:
    before = doubles.driver_counts()
    for _ in range(3):
        kernel(data_of(4096), [0], 4096)
    after = doubles.driver_counts()
    assert after.launches - before.launches == 3
    assert after.allocations - before.allocations == after.frees - before.frees > 0
    assert after.synchronizations > before.synchronizations


def test_slabs_anywhere_are_refused(kernels: SlabKernels) -> None:
    """The kernel loads 16 bytes at once."""
    for base, offsets in ((8, [0]), (16, [0, 8])):
        with pytest.raises(InvalidArgumentError, match="multiples of 16"):
            kernels.checksums(base, offsets, 64)


# ---------------------------------------------------------------- paged copies

LAYOUTS = [
    KvLayout(num_layers=1, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.FLOAT16),
    KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_tokens=1, dtype=KvDtype.FLOAT16),
    KvLayout(num_layers=1, num_kv_heads=5, head_dim=80, block_tokens=23, dtype=KvDtype.FLOAT32),
]
POOL_BLOCKS = 11
BLOCK_IDS = [7, 0, 10, 3]


def pool_of(layout: KvLayout) -> torch.Tensor:
    size = POOL_BLOCKS * layout.slab_bytes
    return torch.from_numpy(data_of(size, 1)).view(torch.int16).view(POOL_BLOCKS, 2, -1)


def staging_of(layout: KvLayout) -> torch.Tensor:
    data = data_of(len(BLOCK_IDS) * layout.slab_stride_bytes, 2)
    return torch.from_numpy(data).view(len(BLOCK_IDS), -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gather", [False, True])
def test_paged_copies_are_what_the_reference_does(
    gather: bool, layout: KvLayout, driver: CudaDriver, kernels: SlabKernels
) -> None:
    pool, staging = pool_of(layout), staging_of(layout)
    want_pool, want_staging = pool.clone(), staging.clone()
    if gather:
        gather_slabs(want_pool, BLOCK_IDS, want_staging)
    else:
        scatter_slabs(want_staging, want_pool, BLOCK_IDS)
    pool_bytes, staging_bytes = pool.nbytes, staging.nbytes
    with driver.memory(pool_bytes) as pool_on, driver.memory(staging_bytes) as staging_on:
        driver.copy(pool_on, pool.data_ptr(), pool_bytes)
        driver.copy(staging_on, staging.data_ptr(), staging_bytes)
        slabs = PagedSlabs(
            staging_on, pool_on, layout.slab_bytes, layout.slab_stride_bytes, POOL_BLOCKS
        )
        (kernels.gather if gather else kernels.scatter)(slabs, BLOCK_IDS)
        driver.copy(pool.data_ptr(), pool_on, pool_bytes)
        driver.copy(staging.data_ptr(), staging_on, staging_bytes)
        driver.synchronize()
    assert torch.equal(pool, want_pool)
    assert torch.equal(staging, want_staging)


@pytest.mark.skipif(ON_GPU, reason="tensors of torch are in host memory here")
def test_the_kernels_take_tensors(kernels: SlabKernels) -> None:
    """As they are given to it on a GPU; the double's kernels reach host memory, too."""
    pool, staging = pool_of(LAYOUTS[0]), staging_of(LAYOUTS[0])
    want_pool, blocks = pool.clone(), pool.view(POOL_BLOCKS, -1).view(torch.uint8)
    scatter_slabs(staging, want_pool, BLOCK_IDS)
    run = copy_by_kernel(kernels, stream=0)
    run(staging, blocks, BLOCK_IDS, False)
    assert torch.equal(pool, want_pool)
    back = torch.zeros_like(staging)
    run(back, blocks, BLOCK_IDS, True)
    assert torch.equal(back[:, : blocks.shape[1]], staging[:, : blocks.shape[1]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in PAGED_COPY.names if name != "kernel"])
def test_the_host_moves_blocks_and_nothing_else(
    name: str, layout: KvLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCM_KERNEL_PAGED_COPY", name)
    pool, staging = pool_of(layout), staging_of(layout)
    before = pool.clone()
    scatter_slabs(staging, pool, BLOCK_IDS)
    for block in range(POOL_BLOCKS):
        flat = pool[block].view(-1).view(torch.uint8)
        if block in BLOCK_IDS:
            assert torch.equal(flat, staging[BLOCK_IDS.index(block), : layout.slab_bytes])
        else:
            assert torch.equal(pool[block], before[block])
    back = torch.zeros_like(staging)
    gather_slabs(pool, BLOCK_IDS, back)
    assert torch.equal(back[:, : layout.slab_bytes], staging[:, : layout.slab_bytes])
    assert not back[:, layout.slab_bytes :].any()


def test_wrong_ids_and_shapes_are_refused(kernels: SlabKernels) -> None:
    pool, staging = pool_of(LAYOUTS[0]), staging_of(LAYOUTS[0])
    for ids in ([0, 1, 2, POOL_BLOCKS], [-1, 0, 1, 2], [1, 2, 3, 1]):
        with pytest.raises(InvalidArgumentError):
            scatter_slabs(staging, pool, ids)
        with pytest.raises(InvalidArgumentError):
            kernels.scatter(PagedSlabs(0, 0, 4096, 4096, POOL_BLOCKS), ids)
    for wrong in (staging[:3], staging[:, :100], staging.view(torch.int16)):
        with pytest.raises(LayoutMismatchError):
            gather_slabs(pool, BLOCK_IDS, wrong)
    with pytest.raises(LayoutMismatchError):
        scatter_slabs(staging, pool.transpose(0, 1), BLOCK_IDS)
    with pytest.raises(InvalidArgumentError, match="multiples of 16"):
        kernels.gather(PagedSlabs(0, 16, 24, 32, POOL_BLOCKS), BLOCK_IDS)


# ---------------------------------------------------------------- keys at other positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", list(RopeStyle))
@pytest.mark.parametrize(("num_rows", "head_dim"), [(96, 64), (1, 2), (77, 80)])
def test_rotated_keys_are_those_of_the_reference(
    driver: CudaDriver, num_rows: int, head_dim: int, style: RopeStyle, dtype: torch.dtype
) -> None:
    rope = Rope(head_dim=head_dim, base=10_000.0, style=style)
    keys = torch.randn(num_rows, head_dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    want = rotate_keys(keys, rope, -1234, override="torch")
    table = torch.stack(cos_sin(rope, torch.tensor(-1234))).float()
    kernel, got = RotateKernel(driver), torch.empty_like(keys)
    with driver.memory(keys.nbytes) as keys_on, driver.memory(table.nbytes) as table_on:
        driver.copy(keys_on, keys.data_ptr(), keys.nbytes)
        driver.copy(table_on, table.data_ptr(), table.nbytes)
        kernel.run(
            Rows(keys_on, keys_on, table_on, num_rows, head_dim),
            is_bfloat16=dtype is torch.bfloat16,
            is_interleaved=style is RopeStyle.INTERLEAVED,
            stream=0,
        )
        driver.copy(got.data_ptr(), keys_on, keys.nbytes)
        driver.synchronize()
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    if dtype is torch.float32:
        exact = turned(keys.double(), rope, -1234)
        assert float((got - exact).norm() / exact.norm()) < 2e-6


def turned(keys: torch.Tensor, rope: Rope, shift: int) -> torch.Tensor:
    """The rotation in fp64, as multiplication of complex numbers."""
    is_split = rope.style is RopeStyle.HALF_SPLIT
    shape, axes = ((2, -1), (0, 2, 1)) if is_split else ((-1, 2), (0, 1, 2))
    planes = keys.reshape(len(keys), *shape).permute(axes).contiguous()
    cos, sin = cos_sin(rope, torch.tensor(shift))
    product = torch.view_as_real(torch.view_as_complex(planes) * torch.complex(cos, sin))
    return product.permute(axes).reshape(keys.shape)


def test_an_odd_head_is_refused_and_no_keys_are_no_launch(driver: CudaDriver) -> None:
    kernel = RotateKernel(driver)
    with pytest.raises(InvalidArgumentError, match="even"):
        kernel.run(Rows(0, 0, 0, 1, 3), is_bfloat16=False, is_interleaved=False, stream=0)
    kernel.run(Rows(0, 0, 0, 0, 4), is_bfloat16=False, is_interleaved=False, stream=0)


# ---------------------------------------------------------------- compiling, and the whole path


@pytest.mark.parametrize("source", KERNEL_SOURCES)
def test_sources_compile_for_sm_90(source: str) -> None:
    cubin = compile_cubin(source, "sm_90")
    assert cubin[:4] == b"\x7fELF"
    assert compile_cubin(source, "sm_90") is cubin, "compiled once"


def test_what_cannot_be_compiled_or_loaded_says_why(driver: CudaDriver) -> None:
    with pytest.raises(ConfigError, match="sm_1"):
        compile_cubin("paged_copy.cu", "sm_1")
    with pytest.raises(TierUnavailableError, match="cuModuleLoadDataEx"):
        driver.load_functions(b"no cubin, and long enough to look at" * 4, ["ucm_gather_slabs"])
    cubin = compile_cubin("paged_copy.cu", driver.arch)
    with pytest.raises(TierUnavailableError, match="cuModuleGetFunction"):
        driver.load_functions(cubin, ["ucm_slab_checksums"])
    with pytest.raises(TierUnavailableError, match="no CUDA driver"):
        CudaDriver("libcuda.so.none")


@pytest.mark.skipif(ON_GPU, reason="needs to flip bits in device memory from the CPU")
def test_a_block_is_verified_where_the_cpu_never_sees_it(
    doubles: Doubles, kernels: SlabKernels, tmp_path: Path
) -> None:
    """From the file to device memory, checked there, and a flipped bit found there."""
    size, stride, num_slabs = 6000, 8192, 5
    data = data_of(num_slabs * stride)
    offsets = [n * stride for n in range(num_slabs)]
    sums = expected(data, offsets, size)
    path = tmp_path / "segment"
    path.write_bytes(bytes(4096) + data.tobytes())
    io = GdsFileIo(GdsOptions(direct=True, io_threads=2))
    file = io.open(path, create=False, writable=False)
    header, results = aligned_buffer(4096), []
    with doubles.device_memory(data.nbytes) as block:
        request = DeviceRequest(
            file, 0, (header, block), lambda: checked(kernels, block, offsets, size) == sums
        )
        results += io.read_batch([request])
        assert device_bytes(block) == data.tobytes()
        for position in (0, 4 * stride + size - 1, stride - 1):  # the last one is padding
            flipped = data.copy()
            flipped[position] ^= 0x10
            path.write_bytes(bytes(4096) + flipped.tobytes())
            results += io.read_batch([request])
        io.close_file(file)
        io.close()
    assert [code == 0 for code in results] == [True, False, False, True]


def checked(
    kernels: SlabKernels, block: DeviceBuffer, offsets: Sequence[int], size: int
) -> list[int]:
    return kernels.checksums(block.address, offsets, size)
