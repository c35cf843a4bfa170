"""Copying slabs and checksumming them in one pass: machine code for this processor, by LLVM.

    for each slab      for each KiB          16 x (load 64 bytes | store them | mix them), scramble
                       what is left of it    the same, stripe by stripe
                       the last 64 bytes     with a key of their own; then xxh3_64 of the slab
                       padding               copied only

Threads share the slabs out among themselves: each call takes the next few, by an atomic addition,
until none is left. So a batch costs each thread one call, however many slabs it has.

What is mixed are the registers that were stored: each byte of the source is read once, so the
checksum is that of what was written, whoever writes to the source meanwhile. Copying first and
checksumming behind it reads everything twice, the second time at best from a cache, and so cannot
use stores that go round the cache. Here both are possible: `around` leaves the cache to others, and
saves fetching lines that are overwritten whole.

The code is built once in a process, in some 0.2 s, and tried before it is used. Nothing is written
to disk. Where LLVM cannot make code that runs (no wheel, no executable memory) the caller takes
another way.

What the parts of the checksum are called stands in `xxh3`.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ucm.checksum import checksum

from .xxh3 import (
    AVALANCHE_PRIME,
    BLOCK_BYTES,
    INITIAL,
    LAST_KEY,
    MERGE_KEY,
    MIN_BYTES,
    PRIME32_1,
    PRIME64_1,
    SCRAMBLE_KEY,
    SECRET,
    STRIPE_BYTES,
    SWAPPED,
)

Addresses = NDArray[np.uint64]
"""Of slabs in this process's memory."""

ALIGNMENT_BYTES: Final = STRIPE_BYTES
"""Of targets that are written round the cache, and what lengths are multiples of."""

ROOM_BYTES: Final = 32 << 20
"""Of address space without which nothing is built: LLVM ends the process when it gets no memory."""

_WORDS: Final = STRIPE_BYTES // 8
_STRIPES: Final = BLOCK_BYTES // STRIPE_BYTES
_NAMES: Final = ("copy_slabs", "copy_slabs_around")

_building: Final = threading.RLock()
"""LLVM has locks of its own: who forked meanwhile would leave them to the child, locked."""
os.register_at_fork(
    before=_building.acquire,
    after_in_parent=_building.release,
    after_in_child=_building.release,
)


class FusedCopyUnavailableError(Exception):
    """LLVM is not there, or its code cannot run here; the text says which."""


def why_not(slab_bytes: int, padding_bytes: int) -> str | None:
    """Why slabs of a length cannot be copied this way; None when they can."""
    if slab_bytes < MIN_BYTES or slab_bytes % ALIGNMENT_BYTES or padding_bytes % ALIGNMENT_BYTES:
        return f"it takes {MIN_BYTES} bytes and more, in multiples of {ALIGNMENT_BYTES}"
    return None


class SharedCopy:
    """Slabs that are being copied, by every thread that takes part. Thread-safe.

    Machine code holds addresses only, so this keeps what they lead to: the code, and the slabs'
    `owners`. Whoever still copies keeps this.
    """

    def __init__(self, made: FusedCopy, code: Any, slabs: SlabPairs, group: int) -> None:
        self._made = made
        self._code = code
        self._slabs = slabs
        self._group = group
        self._next = np.zeros(1, np.uint64)
        """The first slab that nobody has begun; machine code adds to it, atomically."""
        self.sums = np.empty(len(slabs.targets), np.uint64)
        """xxh3_64 with seed 0 of each slab that was written, padding excluded; when all is done."""

    def work_off(self) -> None:
        """Copy what nobody has begun; without the interpreter lock."""
        slabs = self._slabs
        arrays = (slabs.targets, slabs.sources, self.sums, self._next)
        counts = (len(slabs.targets), self._group, slabs.slab_bytes, slabs.padding_bytes)
        self._code(*(array.ctypes.data for array in arrays), *counts)

    def stop(self) -> None:
        """Have nobody begin another group; those that run are finished."""
        self._next[0] = len(self._slabs.targets)


@dataclass(frozen=True, slots=True)
class SlabPairs:
    """Slabs to copy from address to address. Nothing of it is checked."""

    targets: Addresses
    """[n] of memory that may be written, `slab_bytes + padding_bytes` each."""
    sources: Addresses
    """[n] of memory as long; none overlaps a target."""
    slab_bytes: int
    """See `why_not`."""
    padding_bytes: int
    """Copied behind each slab, and no part of its checksum."""
    owners: object = None
    """What keeps the memory alive, unless the caller does."""


@dataclass(frozen=True, slots=True)
class FusedCopy:
    """The machine code. Thread-safe."""

    _through: Any
    _around: Any
    _engine: Any
    """Owns the code."""

    def share(self, slabs: SlabPairs, *, group: int, around: bool) -> SharedCopy:
        """What threads can copy together; it has copied nothing yet.

        The caller answers for the addresses.

        Args:
            slabs: which.
            group: slabs that a thread takes at a time, at least 1.
            around: store round the cache where the targets are aligned for it.
        """
        assert group > 0, group  # no thread would ever come to the end
        is_aligned = not np.bitwise_or.reduce(slabs.targets) % ALIGNMENT_BYTES
        code = self._around if around and is_aligned else self._through
        return SharedCopy(self, code, slabs, group)


@functools.cache
def fused_copy() -> FusedCopy:
    """The code for this processor, made by the first call in the process; some 0.2 s.

    Raises:
        FusedCopyUnavailableError: it cannot be made here.
    """
    try:
        with _building:
            return _made()
    except Exception as error:  # whatever another version of the library raises
        raise FusedCopyUnavailableError(f"LLVM made no code: {error}") from error


def _made() -> FusedCopy:
    import llvmlite.binding as llvm  # 60 ms, and not on every platform

    mmap.mmap(-1, ROOM_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ).close()
    engine = _compiled(llvm, str(_build_module()))
    addresses = [engine.get_function_address(name) for name in _NAMES]
    _check_executable(addresses)
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4)
    through, around = map(kind, addresses)
    made = FusedCopy(through, around, engine)
    _prove(made)
    return made


def _check_executable(addresses: Sequence[int]) -> None:
    """Where code may not run LLVM says nothing, and the first call would end the process.

    Raises:
        RuntimeError: the code lies where it cannot run.
    """
    with open("/proc/self/maps") as maps:
        ranges = [line.split(maxsplit=2)[:2] for line in maps]
    for address in addresses:
        for where, rights in ranges:
            first, last = (int(bound, 16) for bound in where.split("-"))
            if first <= address < last and "x" in rights:
                break
        else:
            raise RuntimeError("this process may have no executable memory")


def _prove(made: FusedCopy) -> None:
    """Copy a little, every way: a group, and one that is not full.

    Raises:
        RuntimeError: the copy or its checksum is wrong.
    """
    size, padding, count = BLOCK_BYTES + 2 * STRIPE_BYTES, STRIPE_BYTES, 3
    step = size + padding
    source = (np.arange(count * step) % 251).astype(np.uint8)
    wanted = [checksum(source[first : first + size].data) for first in range(0, len(source), step)]
    memory = np.empty(len(source) + 2 * ALIGNMENT_BYTES, np.uint8)
    aligned = -memory.ctypes.data % ALIGNMENT_BYTES
    for start, around in ((aligned, True), (aligned, False), (aligned + 1, True)):
        memory[:] = 0
        target = memory[start : start + len(source)]
        into, origin = (
            np.arange(count, dtype=np.uint64) * step + each.ctypes.data for each in (target, source)
        )
        copy = made.share(SlabPairs(into, origin, size, padding), group=2, around=around)
        copy.work_off()
        if not np.array_equal(target, source) or copy.sums.tolist() != wanted:
            raise RuntimeError("what it made copies wrongly")


def _compiled(llvm: Any, source: str) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(source)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def _build_module() -> Any:
    from llvmlite import ir

    module = ir.Module("fused_copy")
    for name in _NAMES:
        _Builder(ir, module).build(name, around=name.endswith("around"))
    return module


class _Builder:
    """Writes one function.

    (targets, sources, sums, next, count, group, slab_bytes, padding_bytes)
    """

    def __init__(self, ir: Any, module: Any) -> None:
        self._ir = ir
        self._module = module
        self._i64 = ir.IntType(64)
        self._vector = ir.VectorType(self._i64, _WORDS)
        self._pointer = ir.PointerType()

    def build(self, name: str, *, around: bool) -> None:
        ir, i64, pointer = self._ir, self._i64, self._pointer
        kind = ir.FunctionType(ir.VoidType(), [pointer] * 4 + [i64] * 4)
        function = ir.Function(self._module, kind, name)
        targets, sources, sums, following, count, group, slab_bytes, padding = function.args
        self._around = around
        self._b = ir.IRBuilder(function.append_basic_block())
        self._secret = self._global_secret(name)

        def slab(index: Any) -> None:
            self._source = self._load_pointer(sources, index)
            self._target = self._load_pointer(targets, index)
            self._b.store(self._slab(slab_bytes), self._at(sums, index, i64))
            self._copy_padding(slab_bytes, padding)

        self._share(following, count, group, slab)
        if around:
            self._b.fence("seq_cst")  # these stores are ordered by nothing else
        self._b.ret_void()

    def _share(self, following: Any, count: Any, group: Any, body: Callable[[Any], None]) -> None:
        """`body(i)` for those i below count that no other thread took, a group at a time."""
        b, i64 = self._b, self._i64
        claim, work, done = (b.append_basic_block() for _ in range(3))
        b.branch(claim)
        b.position_at_end(claim)
        first = b.atomic_rmw("add", following, group, "monotonic")
        b.cbranch(b.icmp_unsigned("<", first, count), work, done)
        b.position_at_end(work)
        left = b.sub(count, first)
        size = b.select(b.icmp_unsigned("<", left, group), left, group)

        def each(number: Any, nothing: Any) -> Any:
            body(b.add(first, number))
            return nothing

        self._loop(size, i64(0), each)
        b.branch(claim)
        b.position_at_end(done)

    def _slab(self, size: Any) -> Any:
        """Copy one; its checksum."""
        b, i64 = self._b, self._i64
        before_last = b.sub(size, i64(STRIPE_BYTES))
        num_blocks = b.udiv(b.sub(size, i64(1)), i64(BLOCK_BYTES))
        sums = self._loop(num_blocks, self._splat(INITIAL), self._block)
        done = b.mul(num_blocks, i64(BLOCK_BYTES))
        rest = b.udiv(b.sub(before_last, done), i64(STRIPE_BYTES))

        def stripe(number: Any, sums: Any) -> Any:
            offset = self._b.add(done, self._b.mul(number, i64(STRIPE_BYTES)))
            key = self._at(self._secret, self._b.mul(number, i64(8)))
            return self._mix(sums, self._move(offset), self._b.load(key, typ=self._vector, align=1))

        sums = self._loop(rest, sums, stripe)
        sums = self._mix(sums, self._move(before_last), self._key(LAST_KEY))
        return self._merge(sums, size)

    def _block(self, number: Any, sums: Any) -> Any:
        """16 stripes and a scramble."""
        b, i64 = self._b, self._i64
        start = b.mul(number, i64(BLOCK_BYTES))
        for stripe in range(_STRIPES):
            words = self._move(b.add(start, i64(stripe * STRIPE_BYTES)))
            sums = self._mix(sums, words, self._key(8 * stripe))
        sums = b.xor(sums, b.lshr(sums, self._splat([47] * _WORDS)))
        sums = b.xor(sums, self._key(SCRAMBLE_KEY))
        return b.mul(sums, self._splat([PRIME32_1] * _WORDS))

    def _move(self, offset: Any) -> Any:
        """Copy a stripe; what was written."""
        b = self._b
        words = b.load(self._at(self._source, offset), typ=self._vector, align=1)
        align = ALIGNMENT_BYTES if self._around else 1
        store = b.store(words, self._at(self._target, offset), align=align)
        if self._around:
            store.set_metadata("nontemporal", self._module.add_metadata([self._ir.IntType(32)(1)]))
        return words

    def _mix(self, sums: Any, words: Any, key: Any) -> Any:
        b = self._b
        keyed = b.xor(words, key)
        low = b.and_(keyed, self._splat([0xFFFFFFFF] * _WORDS))
        product = b.mul(low, b.lshr(keyed, self._splat([32] * _WORDS)))
        order = self._ir.Constant(self._ir.VectorType(self._ir.IntType(32), _WORDS), list(SWAPPED))
        swapped = b.shuffle_vector(words, words, order)
        return b.add(b.add(sums, swapped), product)

    def _merge(self, sums: Any, size: Any) -> Any:
        b, i64, wide = self._b, self._i64, self._ir.IntType(128)
        found = b.mul(size, i64(PRIME64_1))
        keyed = b.xor(sums, self._key(MERGE_KEY))
        for pair in range(0, _WORDS, 2):
            low, high = (b.zext(b.extract_element(keyed, i64(pair + k)), wide) for k in (0, 1))
            product = b.mul(low, high)
            folded = b.xor(b.trunc(product, i64), b.trunc(b.lshr(product, wide(64)), i64))
            found = b.add(found, folded)
        found = b.xor(found, b.lshr(found, i64(37)))
        found = b.mul(found, i64(AVALANCHE_PRIME))
        return b.xor(found, b.lshr(found, i64(32)))

    def _copy_padding(self, slab_bytes: Any, padding: Any) -> None:
        i64 = self._i64

        def stripe(number: Any, nothing: Any) -> Any:
            self._move(self._b.add(slab_bytes, self._b.mul(number, i64(STRIPE_BYTES))))
            return nothing

        self._loop(self._b.udiv(padding, i64(STRIPE_BYTES)), i64(0), stripe)

    def _loop(self, count: Any, value: Any, body: Any) -> Any:
        """`value = body(i, value)` for i below count; the last value."""
        b = self._b
        before = b.block
        head, inside, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        index, carried = b.phi(self._i64), b.phi(value.type)
        b.cbranch(b.icmp_unsigned("<", index, count), inside, after)
        b.position_at_end(inside)
        result = body(index, carried)
        following = b.add(index, self._i64(1))
        for phi, first, then in ((index, self._i64(0), following), (carried, value, result)):
            phi.add_incoming(first, before)
            phi.add_incoming(then, b.block)
        b.branch(head)
        b.position_at_end(after)
        return carried

    def _at(self, base: Any, index: Any, kind: Any = None) -> Any:
        return self._b.gep(base, [index], source_etype=kind or self._ir.IntType(8))

    def _load_pointer(self, array: Any, index: Any) -> Any:
        return self._b.load(self._at(array, index, self._i64), typ=self._pointer)

    def _key(self, start: int) -> Any:
        return self._splat(np.frombuffer(SECRET, "<u8", _WORDS, start).tolist())

    def _splat(self, words: Any) -> Any:
        return self._ir.Constant(self._vector, [int(word) for word in words])

    def _global_secret(self, name: str) -> Any:
        kind = self._ir.ArrayType(self._ir.IntType(8), len(SECRET))
        found = self._ir.GlobalVariable(self._module, kind, f"{name}_secret")
        found.global_constant, found.linkage = True, "internal"
        found.initializer = self._ir.Constant(kind, bytearray(SECRET))
        return found
