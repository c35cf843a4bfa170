"""Plans: what to promote, want, flush, admit and evict."""

from __future__ import annotations

import pytest

from ucm.block_columns import NO_ROW, PROMOTING, WRITING
from ucm.block_index import BlockIndex
from ucm.errors import InvalidArgumentError
from ucm.placement import evict, plan_commit, plan_flush, plan_load, plan_store
from ucm.storage.tier import SlotId
from ucm.types import ROOT_KEY, BlockKey, StoreStatus, TierKind

MEMORY, NVME = TierKind.MEMORY, TierKind.NVME
A, B, C, D = (BlockKey(bytes([number]) * 32) for number in range(1, 5))
PRESENT, ORPHAN, WANTED = StoreStatus.PRESENT, StoreStatus.ORPHAN, StoreStatus.WANTED


def build(**tiers: str) -> tuple[BlockIndex, dict[str, int]]:
    """A chain a, b, c... with copies in memory (m) and on NVMe (n): build(a="mn", b="m")."""
    keys = {"a": A, "b": B, "c": C, "d": D}
    index, rows, parent = BlockIndex(), {}, NO_ROW
    for name, where in tiers.items():
        parent = index.add_row(keys[name], parent)
        rows[name] = parent
        for letter in where:
            tier = MEMORY if letter == "m" else NVME
            index.place(parent, tier, SlotId(index.num_copies(tier)))
    return index, rows


class TestLoad:
    def test_what_only_nvme_has_is_promoted(self) -> None:
        index, rows = build(a="mn", b="n", c="n")
        index.begin_flight(rows["b"], PROMOTING)
        plan = plan_load(index, [A, B, C, D])
        assert plan.rows == (rows["a"], rows["b"], rows["c"])
        assert plan.promote == (rows["c"],)  # b is being read already

    def test_nothing_cached(self) -> None:
        plan = plan_load(BlockIndex(), [A])
        assert (plan.rows, plan.promote) == ((), ())


class TestStore:
    def test_present_and_wanted(self) -> None:
        index, rows = build(a="m", b="n")
        plan = plan_store(index, ROOT_KEY, [A, B, C])
        assert plan.statuses == (PRESENT, PRESENT, WANTED)
        assert plan.hold == (rows["a"], rows["b"])

    def test_the_parent_is_held(self) -> None:
        index, rows = build(a="m")
        plan = plan_store(index, A, [B])
        assert (plan.statuses, plan.hold) == ((WANTED,), (rows["a"],))

    def test_an_unknown_or_unusable_parent_makes_orphans(self) -> None:
        index, rows = build(a="m", b="m")
        assert plan_store(index, D, [C]).statuses == (ORPHAN,)
        index.lose(rows["a"], MEMORY)
        assert plan_store(index, B, [C]).statuses == (ORPHAN,)
        assert plan_store(index, A, [C]).statuses == (ORPHAN,)

    def test_a_ghost_is_wanted_again(self) -> None:
        index, rows = build(a="m", b="m")
        index.lose(rows["a"], MEMORY)
        assert plan_store(index, ROOT_KEY, [A, B, C]).statuses == (WANTED, PRESENT, WANTED)

    @pytest.mark.parametrize(
        ("parent", "keys"),
        [(ROOT_KEY, [C, C]), (ROOT_KEY, [ROOT_KEY]), (ROOT_KEY, [B]), (C, [B]), (C, [C])],
    )
    def test_no_chain(self, parent: BlockKey, keys: list[BlockKey]) -> None:
        index, _ = build(a="m", b="m")
        with pytest.raises(InvalidArgumentError):
            plan_store(index, parent, keys)


class TestFlush:
    def test_ancestors_go_first(self) -> None:
        index, rows = build(a="mn", b="m", c="m")
        assert plan_flush(index, rows["c"]) == (rows["b"], rows["c"])

    def test_what_is_queued_is_not_queued_again(self) -> None:
        index, rows = build(a="m", b="m", c="m")
        index.begin_flight(rows["b"], WRITING)
        assert plan_flush(index, rows["c"]) == (rows["c"],)
        assert plan_flush(index, rows["b"]) == ()

    def test_nothing_goes_below_a_ghost(self) -> None:
        index, rows = build(a="m", b="m")
        index.lose(rows["a"], MEMORY)
        assert plan_flush(index, rows["b"]) is None


class TestCommit:
    def test_a_parent_on_nvme_or_earlier_in_the_batch(self) -> None:
        index, rows = build(a="mn", b="m", c="m", d="m")
        admitted, refused = plan_commit(index, [rows["b"], rows["d"], rows["c"]])
        assert (admitted, refused) == ([rows["b"], rows["c"]], [rows["d"]])

    def test_a_first_block_has_no_parent(self) -> None:
        index, rows = build(a="m")
        assert plan_commit(index, [rows["a"]]) == ([rows["a"]], [])


class TestEvict:
    def test_leaves_first_and_no_more_than_asked(self) -> None:
        index, _ = build(a="mn", b="mn", c="mn")
        assert [victim.key for victim in evict(index, MEMORY, 2)] == [C, B]
        assert index.num_copies(MEMORY) == 1
        assert [victim.key for victim in evict(index, NVME, 9)] == [C, B, A]
        assert [victim.key for victim in evict(index, MEMORY, 9)] == [A]
        assert len(index) == 0

    def test_fewer_when_the_rest_is_held(self) -> None:
        index, rows = build(a="m", b="m")
        index.pin(rows["a"])
        assert [victim.key for victim in evict(index, MEMORY, 5)] == [B]
        assert evict(index, MEMORY, 5) == []
        index.unpin(rows["a"])
        assert [victim.key for victim in evict(index, MEMORY, 5)] == [A]
