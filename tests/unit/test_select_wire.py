"""Selections as messages: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from ucm.errors import InvalidArgumentError
from ucm.hashing import check_keys
from ucm.kernels.block_scores import Budget
from ucm.protos import cache_pb2 as pb
from ucm.select_api import LayerSelection, SelectMode, SelectResult
from ucm.select_wire import (
    budget_from_wire,
    budget_to_wire,
    check_reply_size,
    kind_from_wire,
    kind_to_wire,
    request_from_wire,
    request_to_wire,
    result_from_wire,
    result_to_wire,
)
from ucm.testing.selections import NUM_HEADS, SELECT_LAYOUT, request_of
from ucm.types import NamespaceId, SummaryKind, SummaryStatus

NAMESPACE = NamespaceId(bytes(32))
KEYS = check_keys([bytes([number]) * 32 for number in range(7)])


@pytest.mark.parametrize("mode", SelectMode)
@pytest.mark.parametrize(
    "budget", [Budget(ratio=0.3), Budget(tokens=64), Budget(eps=0.05, min_ratio=0.1, max_ratio=0.4)]
)
def test_a_request_comes_back_as_it_went(mode: SelectMode, budget: Budget) -> None:
    request = request_of((0, 2), budget, (0, 6), mode, bounds=False)
    message = request_to_wire(NAMESPACE, KEYS, request, 1.5)
    again = request_from_wire(pb.SelectRequest.FromString(message.SerializeToString()))
    assert (message.keys, message.timeout_s) == (KEYS.packed, 1.5)
    assert _fields(again) == _fields(request)
    np.testing.assert_array_equal(again.queries, request.queries)
    again.check(SELECT_LAYOUT, len(KEYS))


def _fields(request: object) -> list[object]:
    names = ("layers", "budget", "must_blocks", "mode", "bounds")
    return [getattr(request, name) for name in names]


@pytest.mark.parametrize("kind", [None, *SummaryKind])
def test_a_kind_comes_back_as_it_went(kind: SummaryKind | None) -> None:
    assert kind_from_wire(pb.OpenNamespace(summary=kind_to_wire(kind)).summary) is kind


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="same release"):
        kind_from_wire(99)


def selection(layer: int, blocks: list[int], kv_head: int | None = None) -> LayerSelection:
    rng = np.random.default_rng(layer)
    heads = NUM_HEADS if kv_head is None else NUM_HEADS // SELECT_LAYOUT.num_kv_heads
    scores = rng.normal(size=(3, 2, heads, len(blocks))).astype(np.float32)
    return LayerSelection(
        layer,
        np.array(blocks, np.int64),
        rng.random(len(blocks), np.float32),
        float(np.float32(0.7)),
        kv_head,
        scores[0],
        scores[1],
        scores[2],
        rng.normal(size=(2, heads)).astype(np.float32),
    )


def result_of(mode: SelectMode) -> SelectResult:
    statuses = (SummaryStatus.READY,) * 5 + (SummaryStatus.NO_SUMMARY, SummaryStatus.MISS)
    if mode is SelectMode.SHARED:
        return SelectResult(statuses, (selection(0, [0, 3, 5]), selection(2, [])))
    owners = [(0, 0, [1]), (0, 1, [0, 2]), (2, 0, []), (2, 1, [5])]
    layers = tuple(selection(layer, blocks, group) for layer, group, blocks in owners)
    return SelectResult(statuses, layers)


@pytest.mark.parametrize("bounds", [True, False])
@pytest.mark.parametrize("mode", SelectMode)
def test_an_answer_comes_back_as_it_went(mode: SelectMode, bounds: bool) -> None:
    result = result_of(mode)
    if not bounds:
        layers = tuple(
            LayerSelection(each.layer, each.blocks, each.shares, each.mass, each.kv_head)
            for each in result.layers
        )
        result = SelectResult(result.statuses, layers)
    reply = pb.SelectReply.FromString(result_to_wire(result).SerializeToString())
    again = result_from_wire(reply, request_of(mode=mode, bounds=bounds), SELECT_LAYOUT, 7)
    assert again.statuses == result.statuses
    for one, other in zip(again.layers, result.layers, strict=True):
        for field in dataclasses.fields(LayerSelection):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    np.testing.assert_array_equal(again.union(), result.union())


def _set(**fields: object) -> Callable[[pb.SelectReply], None]:
    return lambda reply: reply.MergeFrom(pb.SelectReply(**fields))  # type: ignore[arg-type]


def _clear(name: str) -> Callable[[pb.SelectReply], None]:
    return lambda reply: reply.ClearField(name)


def _cut(name: str, count: int) -> Callable[[pb.SelectReply], None]:
    return lambda reply: setattr(reply, name, getattr(reply, name)[:-count])


@pytest.mark.parametrize(
    "damage",
    [
        *[_clear(name) for name in ("statuses", "counts", "blocks", "shares", "masses", "lowers")],
        *[_cut(name, 4) for name in ("blocks", "shares", "log_masses", "uppers", "skipped_uppers")],
        *[_cut(name, 1) for name in ("statuses", "blocks", "masses")],
        _set(counts=[1]),
        _set(statuses=b"\x09\x09\x09\x09\x09\x09\x09"),
        _set(blocks=np.array([3, 0, 5], "<u4").tobytes()),
        _set(blocks=np.array([0, 3, 7], "<u4").tobytes()),
        _set(shares=bytes(16)),
    ],
)
def test_a_garbled_answer_is_refused(damage: Callable[[pb.SelectReply], None]) -> None:
    reply = result_to_wire(result_of(SelectMode.SHARED))
    damage(reply)
    with pytest.raises(InvalidArgumentError):
        result_from_wire(reply, request_of(), SELECT_LAYOUT, 7)


@pytest.mark.parametrize(
    "change",
    [
        {"mode": 0},
        {"mode": 9},
        {"queries": b""},
        {"queries": bytes(7)},
        {"queries": b"", "num_queries": 2**32 - 1, "num_heads": 2**32 - 1},
        {"num_heads": 0},
        {"num_queries": 1 << 31},
        {"num_heads": 5},
        {"layers": []},
    ],
)
def test_a_garbled_request_is_refused(change: dict[str, object]) -> None:
    message = request_to_wire(NAMESPACE, KEYS, request_of(), 1.0)
    for name, value in change.items():
        message.ClearField(name)
        message.MergeFrom(pb.SelectRequest(**{name: value}))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError):
        request_from_wire(message).check(SELECT_LAYOUT, len(KEYS))


@pytest.mark.parametrize(
    "message",
    [
        pb.Budget(),
        pb.Budget(ratio=0.0, max_ratio=1),
        pb.Budget(ratio=float("nan"), max_ratio=1),
        pb.Budget(tokens=0, max_ratio=1),
        pb.Budget(eps=1.5, max_ratio=1),
        pb.Budget(eps=0.1, min_ratio=0.5, max_ratio=0.2),
    ],
)
def test_a_budget_out_of_range_is_refused(message: pb.Budget) -> None:
    with pytest.raises(InvalidArgumentError):
        budget_from_wire(message)
    assert budget_from_wire(budget_to_wire(Budget(tokens=5))).tokens == 5


def test_an_answer_too_long_for_a_message_is_refused() -> None:
    request = request_of()
    check_reply_size(request, 7, 8 << 20)
    with pytest.raises(InvalidArgumentError, match="without bounds"):
        check_reply_size(request, 7000, 1 << 20)
    check_reply_size(dataclasses.replace(request, bounds=False), 7000, 1 << 20)
