"""Quotas and reservations as arithmetic: what may be taken, and what never is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.config import GIB, MIB, Config, NvmeConfig, QuotaConfig
from ucm.errors import ConfigError
from ucm.shares import Share, Shares, memory_shares, nvme_shares


def test_without_shares_only_the_capacity_counts() -> None:
    shares = Shares(100)
    assert shares.available_bytes("a", {}) == 100
    assert shares.available_bytes("a", {"a": 30, "b": 60}) == 10
    assert shares.available_bytes("a", {"b": 120}) == -20
    assert shares.limit_bytes("a") == 100


def test_a_quota_binds_its_tenant_only() -> None:
    shares = Shares(100, {"a": Share(quota_bytes=40)})
    assert shares.available_bytes("a", {"a": 30}) == 10
    assert shares.available_bytes("b", {"a": 30}) == 70
    assert shares.limit_bytes("a") == 40


def test_the_unmet_part_of_a_reservation_is_nobody_elses() -> None:
    shares = Shares(100, {"a": Share(reserved_bytes=40)})
    assert shares.available_bytes("b", {}) == 60
    assert shares.available_bytes("b", {"a": 10}) == 60
    assert shares.available_bytes("b", {"a": 50}) == 50
    assert shares.available_bytes("a", {"b": 60}) == 40
    assert shares.limit_bytes("b") == 60
    assert shares.spare_bytes("a", {"a": 50}) == 10
    assert shares.spare_bytes("a", {"a": 30}) == 0


def test_the_star_is_for_those_that_are_not_named() -> None:
    shares = Shares(100, {"*": Share(quota_bytes=10), "a": Share(), "": Share(quota_bytes=20)})
    assert shares.available_bytes("anybody", {}) == 10
    assert shares.available_bytes("a", {}) == 100
    assert shares.available_bytes("", {}) == 20


@pytest.mark.parametrize(
    ("quota", "message"),
    [
        ({"*": QuotaConfig(memory_reserved_bytes=1)}, "not named"),
        ({"a": QuotaConfig(memory_bytes=5, memory_reserved_bytes=6)}, "above the quota of 5"),
        (
            {name: QuotaConfig(memory_reserved_bytes=3 * GIB) for name in "ab"},
            "lower the reservations or raise memory.capacity_bytes",
        ),
    ],
)
def test_shares_that_cannot_be_kept(quota: dict[str, QuotaConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        memory_shares(Config(quota=quota))


def test_nvme_counts_in_whole_segments() -> None:
    nvme = NvmeConfig(capacity_bytes=10 * MIB, segment_bytes=2 * MIB)
    quota = QuotaConfig(nvme_bytes=5 * MIB, nvme_reserved_bytes=3 * MIB)
    share = nvme_shares(Config(nvme=nvme, quota={"a": quota})).of("a")
    assert share == Share(quota_bytes=4 * MIB, reserved_bytes=4 * MIB)
    with pytest.raises(ConfigError, match=r"below nvme\.segment_bytes"):
        nvme_shares(Config(nvme=nvme, quota={"a": QuotaConfig(nvme_bytes=MIB)}))
    each = QuotaConfig(nvme_reserved_bytes=5 * MIB)
    with pytest.raises(ConfigError, match=r"raise nvme\.capacity_bytes"):
        nvme_shares(Config(nvme=nvme, quota={"a": each, "b": each}))


TENANTS = ["a", "b", "c", "d"]


@st.composite
def share_tables(draw: st.DrawFn) -> Shares:
    capacity = draw(st.integers(1, 100))
    left = capacity
    table = {}
    for tenant in TENANTS[:3]:
        reserved = draw(st.integers(0, left))
        left -= reserved
        quota = draw(st.sampled_from([0, reserved, reserved + 7]))
        table[tenant] = Share(quota, reserved)
    table["*"] = Share(draw(st.integers(0, capacity)))
    return Shares(capacity, table)


@given(
    share_tables(),
    st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 30), st.booleans()), max_size=40),
)
def test_whoever_stays_within_what_is_available_takes_nothing_from_others(
    shares: Shares, steps: list[tuple[str, int, bool]]
) -> None:
    used: dict[str, int] = dict.fromkeys(TENANTS, 0)
    for tenant, amount, takes in steps:
        if takes:
            used[tenant] += max(0, min(amount, shares.available_bytes(tenant, used)))
        else:
            used[tenant] -= min(amount, used[tenant])
        assert sum(used.values()) <= shares.capacity_bytes
        for each in TENANTS:
            share = shares.of(each)
            if share.quota_bytes:
                assert used[each] <= share.quota_bytes
            missing = share.reserved_bytes - used[each]
            assert shares.available_bytes(each, used) >= missing
            assert used[each] <= shares.limit_bytes(each)
