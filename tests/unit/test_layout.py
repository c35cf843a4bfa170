"""Shapes: offsets of slabs, alignment, and layouts that cannot be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.errors import LayoutMismatchError
from ucm.layout import ALIGNMENT_BYTES, MAX_LAYERS, KvDtype, KvLayout, round_up

SMOLLM2 = KvLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=32, dtype=KvDtype.FLOAT32
)


def test_smollm2() -> None:
    assert SMOLLM2.slab_shape == (2, 3, 32, 64)
    assert SMOLLM2.slab_bytes == SMOLLM2.slab_stride_bytes == 48 << 10
    assert SMOLLM2.block_bytes == 30 * (48 << 10)


@pytest.mark.parametrize(
    ("dtype", "size"), [(KvDtype.FLOAT32, 4), (KvDtype.FLOAT16, 2), (KvDtype.BFLOAT16, 2)]
)
def test_item_sizes(dtype: KvDtype, size: int) -> None:
    assert dtype.itemsize_bytes == size


layouts = st.builds(
    KvLayout,
    num_layers=st.integers(1, 12),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 96),
    block_tokens=st.integers(1, 48),
    dtype=st.sampled_from(list(KvDtype)),
)


@given(layout=layouts)
def test_slabs_are_aligned_and_do_not_overlap(layout: KvLayout) -> None:
    end = 0
    for layer in range(layout.num_layers):
        where = layout.slab_slice(layer)
        assert where.start % ALIGNMENT_BYTES == 0
        assert where.start >= end
        assert where.stop - where.start == layout.slab_bytes
        end = where.stop
    assert end <= layout.block_bytes
    assert layout.block_bytes % ALIGNMENT_BYTES == 0


@given(value=st.integers(0, 10**9), multiple=st.integers(1, 10**6))
def test_round_up(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple


@pytest.mark.parametrize("layer", [-1, 30])
def test_a_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(LayoutMismatchError, match="outside"):
        SMOLLM2.slab_slice(layer)


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "block_tokens"])
def test_nothing_may_be_zero(name: str) -> None:
    change: dict[str, Any] = {name: 0}
    with pytest.raises(LayoutMismatchError, match=name):
        dataclasses.replace(SMOLLM2, **change)


def test_too_many_layers_for_a_header() -> None:
    with pytest.raises(LayoutMismatchError, match="header"):
        dataclasses.replace(SMOLLM2, num_layers=MAX_LAYERS + 1)


def test_too_large_a_block() -> None:
    with pytest.raises(LayoutMismatchError, match="limit"):
        dataclasses.replace(SMOLLM2, block_tokens=1 << 16)
