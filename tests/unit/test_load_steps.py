"""In which order slabs are read, and how many layers at once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.layout import KvDtype, KvLayout
from ucm.load_steps import layer_groups, own_steps
from ucm.types import LoadOrder, SourceKind

LAYOUT = KvLayout(num_layers=7, num_kv_heads=1, head_dim=32, block_tokens=32, dtype=KvDtype.FLOAT16)


def sizes(compute_per_load: float) -> list[int]:
    return [len(layers) for layers in layer_groups(30, 5, compute_per_load)]


def test_layer_0_comes_alone_and_what_is_hidden_in_long_reads() -> None:
    assert sizes(math.inf) == [1, 5, 5, 5, 5, 5, 4]
    assert sizes(2.0) == [1, 2, 4, 5, 5, 5, 5, 3]
    assert sizes(1.25)[:9] == [1, 1, 1, 1, 2, 2, 3, 3, 4]
    assert sizes(1.01)[:6] == [1, 1, 1, 1, 2, 2]


def test_what_cannot_be_hidden_comes_in_short_reads() -> None:
    assert sizes(1.0) == sizes(0.1) == sizes(0.0) == [1, *[2] * 14, 1]


@given(
    num_layers=st.integers(1, 80),
    most=st.integers(1, 20),
    ratio=st.floats(0, 100) | st.just(math.inf),
)
def test_groups_follow_each_other_and_delay_by_a_layer_at_most(
    num_layers: int, most: int, ratio: float
) -> None:
    groups = layer_groups(num_layers, most, ratio)
    assert [layer for layers in groups for layer in layers] == list(range(num_layers))
    for layers in groups:
        assert 1 <= len(layers) <= most
        if ratio >= 1 and layers.start:
            reached = 1 + layers.start * min(ratio, 1e6)
            assert layers.stop <= reached + 1 + 1e-9
    assert len(groups[0]) == 1


@pytest.mark.parametrize("source", [SourceKind.EXTENT, SourceKind.MEMORY])
def test_every_slab_is_in_one_step(source: SourceKind) -> None:
    steps = list(own_steps([source] * 3, LAYOUT, LoadOrder.LAYERS, 3 * LAYOUT.slab_stride_bytes))
    slabs = [
        (layer, block)
        for step in steps
        for layer in range(step.first_layer, step.stop_layer)
        for block in range(step.first_block, step.stop_block)
    ]
    assert sorted(slabs) == [(layer, block) for layer in range(7) for block in range(3)]
    spans = [(step.first_layer, step.stop_layer) for step in steps]
    assert spans == sorted(spans)
    assert sorted(set(spans)) == [(0, 1), (1, 4), (4, 7)]
