"""Leases: deadlines, sessions, limits, ids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.errors import CapacityError
from ucm.leases import LEASE_ID_BYTES, MIN_COMPACTION, Lease, LeaseKind, LeaseTable
from ucm.types import LeaseId, NamespaceId, SessionId

ONE, TWO = SessionId(1), SessionId(2)
SPACE = NamespaceId(bytes(32))


def grant(table: LeaseTable, session: SessionId = ONE, deadline_us: int = 100) -> Lease:
    return table.grant(session, LeaseKind.LOAD, SPACE, deadline_us=deadline_us)


def test_ids_are_sixteen_bytes_and_differ() -> None:
    table = LeaseTable(100)
    ids = {grant(table).id for _ in range(50)}
    assert len(ids) == 50
    assert {len(each) for each in ids} == {LEASE_ID_BYTES}


def test_a_lease_is_taken_once() -> None:
    table = LeaseTable(10)
    lease = grant(table)
    assert table.take(ONE, lease.id) is lease
    assert lease.ended
    assert table.take(ONE, lease.id) is None
    assert len(table) == 0
    assert table.expire(1000) == []


def test_a_lease_belongs_to_its_session() -> None:
    table = LeaseTable(10)
    lease = grant(table)
    assert table.find(TWO, lease.id, now_us=0) is None
    assert table.take(TWO, lease.id) is None
    assert table.find(ONE, lease.id, now_us=0) is lease


def test_a_lease_ends_at_its_deadline() -> None:
    table = LeaseTable(10)
    early, late = grant(table, deadline_us=10), grant(table, deadline_us=20)
    assert table.find(ONE, early.id, now_us=9) is early
    assert table.find(ONE, early.id, now_us=10) is None
    assert table.expire(9) == []
    assert table.expire(10) == [early]
    assert table.expire(10) == []
    assert table.expire(100) == [late]


def test_a_deadline_can_be_moved() -> None:
    table = LeaseTable(10)
    lease = grant(table, deadline_us=100)
    table.set_deadline(lease, 50)
    assert table.expire(49) == []
    assert table.expire(50) == [lease]
    table.set_deadline(lease, 500)
    assert len(table) == 0
    later = grant(table, deadline_us=60)
    table.set_deadline(later, 90)
    assert table.expire(60) == []
    assert table.expire(90) == [later]


def test_the_end_of_a_session_ends_its_leases_only() -> None:
    table = LeaseTable(10)
    mine, other = grant(table), grant(table, TWO)
    assert table.end_session(ONE) == [mine]
    assert mine.ended
    assert not other.ended
    assert table.end_session(ONE) == []
    assert table.of_namespace(SPACE) == 1


def test_a_session_has_a_limit() -> None:
    table = LeaseTable(2)
    first = grant(table)
    grant(table)
    with pytest.raises(CapacityError):
        grant(table)
    grant(table, TWO)
    table.take(ONE, first.id)
    grant(table)


def test_bytes_are_summed() -> None:
    table = LeaseTable(10)
    for number in (1, 2, 3):
        grant(table).num_bytes = number
    assert table.num_bytes() == 6


def test_completed_leases_do_not_pile_up() -> None:
    """Their deadlines would lie in the heap for half a minute."""
    table = LeaseTable(10)
    for _ in range(5 * MIN_COMPACTION):
        table.take(ONE, grant(table, deadline_us=10**9).id)
    assert len(table._deadlines) <= MIN_COMPACTION + 1
    lease = grant(table, deadline_us=5)
    assert table.expire(5) == [lease]


def test_an_id_can_be_given_for_a_replay() -> None:
    numbers = iter(range(10))
    table = LeaseTable(10, new_id=lambda: next(numbers).to_bytes(16, "big"))
    assert grant(table).id == LeaseId(bytes(16))


@given(
    deadlines=st.lists(st.integers(0, 50), max_size=30),
    taken=st.sets(st.integers(0, 29)),
    moments=st.lists(st.integers(0, 60), max_size=6),
)
def test_every_lease_ends_exactly_once(
    deadlines: list[int], taken: set[int], moments: list[int]
) -> None:
    table = LeaseTable(100)
    leases = [grant(table, deadline_us=deadline_us) for deadline_us in deadlines]
    ended = [
        lease.id
        for number in taken
        if number < len(leases) and (lease := table.take(ONE, leases[number].id))
    ]
    for moment in sorted(moments):
        expired = table.expire(moment)
        assert all(lease.deadline_us <= moment for lease in expired)
        ended += [lease.id for lease in expired]
        assert table.check_integrity() == []
    ended += [lease.id for lease in table.end_session(ONE)]
    assert sorted(ended) == sorted(lease.id for lease in leases)
