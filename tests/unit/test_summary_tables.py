"""Tables of the sequences asked about last: shared, grown, corrected, and bounded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ucm.errors import CapacityError, InvalidArgumentError
from ucm.hashing import CheckedKeys, chain_keys, check_keys
from ucm.kernels.block_scores import SummaryTable
from ucm.kernels.summarize import summarize_blocks
from ucm.summary_tables import NO_CONTENT, SummaryTables, TableOwner
from ucm.testing.selections import (
    KIND,
    SELECT_LAYOUT,
    block_bytes_of,
    queries_of,
    select_spec,
    slabs_of,
)
from ucm.types import BlockKey

if TYPE_CHECKING:
    from ucm.kernels.summary_record import Records

SPEC = select_spec()
OWNER = TableOwner(SPEC.fingerprint(), KIND, SELECT_LAYOUT)
QUERY = queries_of(1)[0]
ROOMY = 64 << 20


class Source:
    """Rows of a chain, as a book of summaries has them."""

    def __init__(self, keys: Sequence[bytes], missing: Sequence[int] = (), salt: int = 0) -> None:
        self.keys = list(keys)
        self.missing = set(missing)
        self.salt = salt
        self.asked: list[int] = []

    def content(self, index: int) -> int:
        if index in self.missing:
            return NO_CONTENT
        return int.from_bytes(self.keys[index][:7], "little") + self.salt

    def records(self, index: int) -> Records | None:
        self.asked.append(index)
        slabs = slabs_of(BlockKey(self.keys[index])) + np.float32(self.salt)
        rows: Records = summarize_blocks(SELECT_LAYOUT, KIND, [block_bytes_of(slabs)])[0]
        return rows


def chain(num_blocks: int, seed: int = 0) -> CheckedKeys:
    tokens = list(range(seed * 10_000, seed * 10_000 + 4 * num_blocks))
    return check_keys(chain_keys(SPEC.fingerprint(), tokens, SELECT_LAYOUT.block_tokens))


def use(tables: SummaryTables, keys: CheckedKeys, source: Source) -> np.ndarray:
    with tables.using(OWNER, keys, source, time.monotonic() + 5) as table:
        scores: np.ndarray = table.scores.log_mass(1, QUERY)[..., : len(keys)].copy()
    assert tables.check_integrity() == []
    return scores


def test_a_chain_that_grows_keeps_its_table() -> None:
    tables, keys = SummaryTables(ROOMY), chain(12)
    first, second = Source(keys), Source(keys)
    use(tables, keys[:8], first)
    grown = use(tables, keys, second)
    assert first.asked == list(range(8))
    assert second.asked == list(range(8, 12))
    assert len(tables) == 1
    np.testing.assert_array_equal(grown, use(SummaryTables(ROOMY), keys, Source(keys)))


def test_a_shorter_chain_is_served_by_the_longer_ones_table() -> None:
    tables, keys = SummaryTables(ROOMY), chain(12)
    whole, source = use(tables, keys, Source(keys)), Source(keys)
    np.testing.assert_array_equal(use(tables, keys[:5], source), whole[..., :5])
    assert source.asked == []
    assert len(tables) == 1


def test_chains_that_fork_have_tables_of_their_own() -> None:
    tables, keys = SummaryTables(ROOMY), chain(8)
    other = check_keys([*keys[:4], *chain(8, seed=3)[4:]])
    one, two = use(tables, keys, Source(keys)), use(tables, other, Source(other))
    np.testing.assert_array_equal(one[..., :4], two[..., :4])
    assert (one[..., 4:] != two[..., 4:]).any()
    assert len(tables) == 2
    again = Source(keys)
    np.testing.assert_array_equal(use(tables, keys, again), one)
    assert again.asked == []


def test_a_block_of_another_content_gets_another_row() -> None:
    tables, keys = SummaryTables(ROOMY), chain(6)
    before = use(tables, keys, Source(keys))
    changed = Source(keys, salt=2)
    after = use(tables, keys, changed)
    assert changed.asked == list(range(6))
    assert (before != after).all()


def test_a_block_without_a_summary_must_be_read_until_it_has_one() -> None:
    tables, keys = SummaryTables(ROOMY), chain(6)
    with tables.using(OWNER, keys, Source(keys, missing=[2, 5]), time.monotonic() + 5) as table:
        assert table.known(6).tolist() == [True, True, False, True, True, False]
        assert table.scores.must(0).tolist() == [False, False, True, False, False, True]
    late = Source(keys, missing=[5])
    with tables.using(OWNER, keys, late, time.monotonic() + 5) as table:
        assert table.known(6).tolist() == [True] * 5 + [False]
    assert late.asked == [2]
    gone = Source(keys, missing=[0])
    with tables.using(OWNER, keys, gone, time.monotonic() + 5) as table:
        assert table.known(6).tolist() == [False] + [True] * 5


def test_the_least_recently_used_make_room() -> None:
    alone = SummaryTables(ROOMY)
    use(alone, chain(8), Source(chain(8)))
    tables = SummaryTables(int(alone.num_bytes * 2.5))
    chains = [chain(8, seed) for seed in range(3)]
    for keys in (*chains[:2], chains[0], chains[2]):
        use(tables, keys, Source(keys))
    assert len(tables) == 2
    sources = [Source(keys) for keys in chains]
    for keys, source in zip(chains, sources, strict=True):
        if keys is not chains[1]:
            use(tables, keys, source)
    assert [source.asked for source in sources] == [[], [], []]


def test_a_table_that_would_be_too_large_is_refused_and_leaves_nothing() -> None:
    tables, keys = SummaryTables(1000), chain(8)
    source = Source(keys)
    with (
        pytest.raises(InvalidArgumentError, match=r"summaries\.table_bytes"),
        tables.using(OWNER, keys, source, time.monotonic() + 5),
    ):
        pass
    assert source.asked == [], "a refusal made rows, of layouts that take gigabytes too"
    assert (len(tables), tables.num_bytes) == (0, 0)
    assert tables.check_integrity() == []


def test_a_table_that_memory_ran_out_for_is_right_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables, keys = SummaryTables(ROOMY), chain(8)
    write = SummaryTable.replace

    def fails_behind(table: SummaryTable, start: int, records: Records) -> None:
        write(table, start, records)
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(SummaryTable, "replace", fails_behind)
    with pytest.raises(MemoryError):
        use(tables, keys, Source(keys))
    found = use(tables, keys, Source(keys))
    longer = use(tables, chain(12), Source(chain(12)))
    whole = use(SummaryTables(ROOMY), chain(12), Source(chain(12)))
    np.testing.assert_array_equal(found, whole[..., :8])
    np.testing.assert_array_equal(longer, whole)


def test_who_waits_for_a_table_in_use_is_refused_in_time() -> None:
    tables, keys = SummaryTables(ROOMY), chain(4)
    with tables.using(OWNER, keys, Source(keys), time.monotonic() + 5):
        begun_s = time.monotonic()
        with (
            pytest.raises(CapacityError, match="come again"),
            tables.using(OWNER, keys, Source(keys), begun_s + 0.05),
        ):
            pass
        assert time.monotonic() - begun_s < 2
    use(tables, keys, Source(keys))
