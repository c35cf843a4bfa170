"""What every `CacheApi` promises of selections and summaries.

Mix it into a subclass of `CacheApiTests`; its harness's store has an NVMe tier without a codec.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from ucm.api import CacheApi, NamespaceHandle
from ucm.checksum import block_checksums
from ucm.errors import BlockNotFoundError, CapacityError, InvalidArgumentError, UcmError
from ucm.kernels.block_scores import Budget, SummaryTable
from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import content_of, encode_summary, summary_of
from ucm.layer_choice import Candidates, choose_layers
from ucm.layer_reader import LayerReader, ReaderOptions
from ucm.reader_io import open_reader_io
from ucm.select_api import LayerSelection, SelectMode, SelectRequest
from ucm.types import ROOT_KEY, BlockKey, LoadMode, LoadStatus, SummaryKind, SummaryStatus, TierKind

from .cache_conformance import CacheHarness
from .selections import (
    KIND,
    SELECT_LAYOUT,
    block_bytes_of,
    put_blocks,
    queries_of,
    request_of,
    select_chain,
    select_spec,
    slabs_of,
    true_logits,
)
from .slab_pool import SlabPool

WAIT_S = 10.0
READY, NO_SUMMARY, MISS = SummaryStatus.READY, SummaryStatus.NO_SUMMARY, SummaryStatus.MISS
EVERY_REQUEST = [
    request_of((0, 1, 2), Budget(ratio=0.3), (0,)),
    request_of((1,), Budget(tokens=8), mode=SelectMode.PER_HEAD),
    request_of((0, 2), Budget(eps=0.2, min_ratio=0.1, max_ratio=1.0), bounds=False),
]


def open_with(cache: CacheApi, kind: SummaryKind | None = KIND) -> NamespaceHandle:
    """The namespace of the suite, with summaries."""
    return cache.open_namespace(select_spec(), summary=kind)


def pushed_out(cache: CacheApi, handle: NamespaceHandle, num_blocks: int = 5) -> list[BlockKey]:
    """Keys of a chain that only NVMe has: others took its place in memory."""
    keys = select_chain(handle, num_blocks, seed=90)
    put_blocks(cache, handle, keys)
    assert cache.flush(timeout_s=WAIT_S)
    for seed in range(91, 96):
        put_blocks(cache, handle, select_chain(handle, 5, seed=seed))
        assert cache.flush(timeout_s=WAIT_S)
    assert set(cache.lookup(handle.id, keys).tiers) == {TierKind.NVME}
    return keys


def expected(
    keys: Sequence[BlockKey], request: SelectRequest, kind: SummaryKind = KIND
) -> tuple[LayerSelection, ...]:
    """What a caller that has all keys selects from summaries of its own."""
    table = SummaryTable(kind, SELECT_LAYOUT)
    blocks = [block_bytes_of(slabs_of(key)) for key in keys]
    table.extend(summarize_blocks(SELECT_LAYOUT, kind, blocks))
    candidates = Candidates(
        table=table,
        count=len(keys),
        known=np.ones(len(keys), np.bool_),
        num_kv_heads=SELECT_LAYOUT.num_kv_heads,
        block_tokens=SELECT_LAYOUT.block_tokens,
    )
    return choose_layers(candidates, request, lambda _done: None)


def assert_same(found: Sequence[LayerSelection], wanted: Sequence[LayerSelection]) -> None:
    """Field by field; a product of other shapes may round otherwise."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.layer, one.kv_head) == (other.layer, other.kv_head)
        assert one.mass == pytest.approx(other.mass, abs=1e-6)
        np.testing.assert_array_equal(one.blocks, other.blocks)
        for name in ("shares", "log_mass", "lower", "upper", "skipped_upper"):
            numbers = getattr(other, name)
            if numbers is None:
                assert getattr(one, name) is None
            else:
                np.testing.assert_allclose(getattr(one, name), numbers, 1e-4, 1e-5, err_msg=name)


class SelectTests:
    """Selections are of what is cached, by summaries that speak for it, and read no block."""

    # ------------------------------------------------------------ namespaces

    def test_a_session_has_the_summaries_that_it_asked_for(self, harness: CacheHarness) -> None:
        """None by default; another session may have others of the same blocks."""
        one, other = harness.open_session(), harness.open_session()
        plain = one.open_namespace(select_spec())
        assert plain.summary is None
        again = open_with(one)
        assert (again.id, again.summary) == (plain.id, KIND)
        assert open_with(one, None).summary is KIND
        assert open_with(other, SummaryKind.BOX).summary is SummaryKind.BOX

    def test_a_kind_may_be_a_plain_word(self, cache: CacheApi) -> None:
        """And a word that is none is refused, with those that are."""
        for unknown in ("gsa", "GSA_K4", 1):
            with pytest.raises(InvalidArgumentError, match="gsa-k4, gsa-2"):
                open_with(cache, cast(SummaryKind, unknown))
        handle = open_with(cache, cast(SummaryKind, KIND.value))
        assert handle.summary is KIND
        keys = select_chain(handle, 2)
        put_blocks(cache, handle, keys)
        assert cache.select(handle.id, keys, request_of(), timeout_s=WAIT_S).layers

    def test_without_summaries_there_is_nothing_to_select_from(self, cache: CacheApi) -> None:
        """And the error says what to do."""
        handle = cache.open_namespace(select_spec())
        keys = select_chain(handle, 2)
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        assert [slot.summary for slot in lease.slots] == [None, None]
        cache.release(lease.id)
        with pytest.raises(InvalidArgumentError, match="open it with"):
            cache.select(handle.id, keys, request_of(), timeout_s=1)
        with pytest.raises(InvalidArgumentError, match="open it with"):
            cache.select_and_load(handle.id, keys, request_of(), mode=LoadMode.DIRECT, timeout_s=1)
        with pytest.raises(InvalidArgumentError, match="open it with"):
            cache.map_summaries(handle.id, keys, timeout_s=1)

    def test_a_namespace_must_be_open_to_select_in_it(
        self, harness: CacheHarness, cache: CacheApi
    ) -> None:
        """Knowing its id gives no access."""
        handle = open_with(cache)
        stranger = harness.open_session()
        with pytest.raises(BlockNotFoundError):
            stranger.select(handle.id, [], request_of(), timeout_s=1)
        with pytest.raises(BlockNotFoundError):
            stranger.map_summaries(handle.id, [], timeout_s=1)

    # -------------------------------------------------------------- selecting

    @pytest.mark.parametrize("request_", EVERY_REQUEST)
    def test_a_selection_is_what_the_summaries_say(
        self, cache: CacheApi, request_: SelectRequest
    ) -> None:
        """Exactly that of a caller with summaries of its own."""
        handle = open_with(cache)
        keys = select_chain(handle, 8)
        put_blocks(cache, handle, keys)
        result = cache.select(handle.id, keys, request_, timeout_s=WAIT_S)
        assert result.statuses == (READY,) * 8
        assert_same(result.layers, expected(keys, request_))
        blocks = [set(each.blocks.tolist()) for each in result.layers]
        assert set(result.union().tolist()) == set.union(*blocks)

    def test_a_block_stored_without_a_summary_gets_one(self, cache: CacheApi) -> None:
        """It is waited for, and then no different from any other."""
        handle = open_with(cache)
        keys = select_chain(handle, 4)
        put_blocks(cache, handle, keys, summaries=False)
        request = EVERY_REQUEST[0]
        result = cache.select(handle.id, keys, request, timeout_s=WAIT_S)
        assert result.statuses == (READY,) * 4
        assert_same(result.layers, expected(keys, request))

    def test_what_is_not_cached_is_never_chosen(self, cache: CacheApi) -> None:
        """Nor counted in the budget; one status for every key."""
        handle = open_with(cache)
        keys = select_chain(handle, 8)
        put_blocks(cache, handle, keys[:4])
        request = request_of((0, 2), Budget(ratio=0.5), (1, 6))
        result = cache.select(handle.id, keys, request, timeout_s=WAIT_S)
        assert result.statuses == (READY,) * 4 + (MISS,) * 4
        assert_same(result.layers, expected(keys[:4], request))
        skipping = [keys[0], keys[2]]
        result = cache.select(handle.id, skipping, request_of(), timeout_s=WAIT_S)
        assert result.statuses == (READY, MISS)
        nothing = cache.select(handle.id, select_chain(handle, 2, 7), request_of(), timeout_s=1)
        assert nothing.statuses == (MISS, MISS)
        assert [len(each.blocks) for each in nothing.layers] == [0, 0]
        assert nothing.union().tolist() == []
        mode = SelectMode.PER_HEAD
        assert len(cache.select(handle.id, [], request_of(mode=mode), timeout_s=1).layers) == 4

    def test_a_sequence_that_grows_and_forks(self, cache: CacheApi) -> None:
        """Every answer is of the keys of its own call."""
        handle = open_with(cache)
        keys, request = select_chain(handle, 6), request_of((1,), Budget(ratio=0.5))
        put_blocks(cache, handle, keys[:4])
        for count in (2, 4):
            found = cache.select(handle.id, keys[:count], request, timeout_s=WAIT_S)
            assert_same(found.layers, expected(keys[:count], request))
        put_blocks(cache, handle, keys[4:], parent=keys[3])
        for part in (keys, keys[2:], keys[:3]):
            found = cache.select(handle.id, part, request, timeout_s=WAIT_S)
            assert_same(found.layers, expected(part, request))

    def test_blocks_on_nvme_are_chosen_where_they_lie(self, cache: CacheApi) -> None:
        """Their summaries are read, they are not: nothing comes to memory for it."""
        handle = open_with(cache)
        keys, request = pushed_out(cache, handle), EVERY_REQUEST[0]
        result = cache.select(handle.id, keys, request, timeout_s=WAIT_S)
        assert result.statuses == (READY,) * len(keys)
        assert_same(result.layers, expected(keys, request))
        assert set(cache.lookup(handle.id, keys).tiers) == {TierKind.NVME}

    def test_bounds_hold_for_every_key(self, cache: CacheApi) -> None:
        """Those of the chosen, and that of all the others together."""
        handle = open_with(cache)
        keys, request = select_chain(handle, 8), request_of((0, 1, 2), Budget(tokens=12))
        put_blocks(cache, handle, keys)
        result = cache.select(handle.id, keys, request, timeout_s=WAIT_S)
        for position, found in enumerate(result.layers):
            logits = true_logits(keys, found.layer, request.queries[position])
            assert found.lower is not None
            assert found.upper is not None
            assert found.skipped_upper is not None
            chosen = logits[..., found.blocks, :]
            assert (chosen.min(axis=-1) >= found.lower - 1e-4).all()
            assert (chosen.max(axis=-1) <= found.upper + 1e-4).all()
            rest = np.delete(logits, found.blocks, axis=2)
            assert (np.log(np.exp(rest).sum(axis=(-2, -1))) <= found.skipped_upper).all()

    def test_a_block_that_no_summary_can_speak_for_is_always_chosen(self, cache: CacheApi) -> None:
        """A key of it is not finite."""
        handle = open_with(cache)
        keys = select_chain(handle, 4)
        put_blocks(cache, handle, keys[:3])
        lease = cache.prepare_store(handle.id, keys[2], keys[3:])
        (slot,) = lease.slots
        assert slot.data is not None
        slabs = slabs_of(keys[3])
        slabs[:, 0, 0, 1, 3] = np.nan
        slot.data[:] = block_bytes_of(slabs)
        checksums = {keys[3]: block_checksums(handle.layout, slot.data)}
        cache.complete_store(lease.id, checksums)
        request = request_of((0, 1, 2), Budget(tokens=4))
        result = cache.select(handle.id, keys, request, timeout_s=WAIT_S)
        assert result.statuses == (READY,) * 4
        for found in result.layers:
            assert found.blocks.tolist() == [3]

    def test_a_summary_of_another_block_is_not_believed(self, cache: CacheApi) -> None:
        """What a client wrote counts only if it speaks for the bytes beside it."""
        handle = open_with(cache)
        keys = select_chain(handle, 3)
        lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
        foreign = summarize_blocks(SELECT_LAYOUT, KIND, [block_bytes_of(slabs_of(keys[0]))])[0]
        checksums = {}
        for slot in lease.slots:
            assert slot.data is not None
            assert slot.summary is not None
            slot.data[:] = block_bytes_of(slabs_of(slot.key))
            checksums[slot.key] = block_checksums(handle.layout, slot.data)
            data = encode_summary(SELECT_LAYOUT, KIND, foreign, checksums[keys[0]])
            slot.summary[: len(data)] = data
        cache.complete_store(lease.id, checksums)
        request = EVERY_REQUEST[0]
        result = cache.select(handle.id, keys, request, timeout_s=WAIT_S)
        assert result.statuses == (READY,) * 3
        assert_same(result.layers, expected(keys, request))

    def test_two_sessions_have_summaries_of_two_kinds(self, harness: CacheHarness) -> None:
        """Of the same blocks, whoever stored them."""
        one, other = harness.open_session(), harness.open_session()
        handle = open_with(one)
        open_with(other, SummaryKind.CUBOID)
        keys, request = select_chain(handle, 4), EVERY_REQUEST[0]
        put_blocks(one, handle, keys)
        found = other.select(handle.id, keys, request, timeout_s=WAIT_S)
        assert found.statuses == (READY,) * 4
        assert_same(found.layers, expected(keys, request, SummaryKind.CUBOID))
        found = one.select(handle.id, keys, request, timeout_s=WAIT_S)
        assert_same(found.layers, expected(keys, request))

    # -------------------------------------------------------- select and load

    @pytest.mark.parametrize("mode", LoadMode)
    def test_what_is_chosen_is_leased_in_the_same_call(
        self, harness: CacheHarness, cache: CacheApi, mode: LoadMode
    ) -> None:
        """And nothing else; the plan is like any other."""
        handle = open_with(cache)
        keys, request = select_chain(handle, 8), request_of((0, 2), Budget(tokens=8), (0,))
        put_blocks(cache, handle, keys)
        result, plan = cache.select_and_load(handle.id, keys, request, mode=mode, timeout_s=WAIT_S)
        assert_same(result.layers, expected(keys, request))
        chosen = [keys[index] for index in result.union()]
        assert len(chosen) < len(keys)
        assert [block.key for block in plan.blocks] == chosen
        assert (plan.num_ready, plan.mode) == (len(chosen), mode)
        for block in plan.blocks:
            assert block.data is not None
            assert bytes(block.data) == block_bytes_of(slabs_of(block.key))
        assert harness.leased_bytes() == len(chosen) * handle.layout.block_bytes
        cache.complete_load(plan.id)
        assert harness.leased_bytes() == 0

    @pytest.mark.parametrize("mode", LoadMode)
    def test_what_is_chosen_is_read_from_nvme_and_the_rest_is_not(
        self, cache: CacheApi, mode: LoadMode
    ) -> None:
        """By extents or by promotion, as for any load."""
        handle = open_with(cache)
        keys, request = pushed_out(cache, handle), request_of((1,), Budget(tokens=8), (3,))
        result, plan = cache.select_and_load(handle.id, keys, request, mode=mode, timeout_s=WAIT_S)
        chosen = result.union().tolist()
        assert 3 in chosen
        assert len(chosen) == 2
        pool = SlabPool(handle.layout, len(chosen))
        reader = LayerReader(plan, handle.layout, pool, open_reader_io(), ReaderOptions())
        reader.start()
        for layer in range(handle.layout.num_layers):
            assert reader.wait_layer(layer, WAIT_S) == len(chosen)
            for place, index in enumerate(chosen):
                wanted = slabs_of(keys[index])[layer].tobytes()
                assert bytes(pool.view(layer, place)) == wanted
        assert reader.cancel(WAIT_S)
        cache.complete_load(plan.id)
        tiers = cache.lookup(handle.id, keys).tiers
        for index in set(range(len(keys))) - set(chosen):
            assert tiers[index] is TierKind.NVME

    def test_a_plan_of_nothing(self, harness: CacheHarness, cache: CacheApi) -> None:
        """Nothing is cached: an empty plan, which ends like any other."""
        handle = open_with(cache)
        keys = select_chain(handle, 2)
        result, plan = cache.select_and_load(
            handle.id, keys, request_of(), mode=LoadMode.DIRECT, timeout_s=1
        )
        assert (result.statuses, plan.blocks) == ((MISS, MISS), ())
        cache.release(plan.id)
        assert harness.leased_bytes() == 0

    # ---------------------------------------------------------------- mapping

    def test_summaries_are_leased_where_they_are(
        self, harness: CacheHarness, cache: CacheApi
    ) -> None:
        """Read-only, of the content of the blocks; until the lease is released."""
        handle = open_with(cache)
        keys = select_chain(handle, 5)
        put_blocks(cache, handle, keys[:4])
        lease = cache.map_summaries(handle.id, keys, timeout_s=WAIT_S)
        assert lease.kind is KIND
        assert lease.statuses == (READY,) * 4 + (MISS,)
        assert (lease.entries[4], lease.contents[4]) == (None, 0)
        assert harness.leased_bytes() > 0
        for key, entry, content in zip(keys[:4], lease.entries, lease.contents, strict=False):
            assert entry is not None
            assert entry.readonly
            data = block_bytes_of(slabs_of(key))
            assert content == content_of(block_checksums(handle.layout, memoryview(data)))
            summary = summary_of(handle.layout, entry, content)
            assert summary is not None
            wanted = summarize_blocks(SELECT_LAYOUT, KIND, [data])[0]
            assert summary.records.tobytes() == wanted.tobytes()
        cache.release(lease.id)
        cache.release(lease.id)
        assert harness.leased_bytes() == 0
        assert lease.entries[0] is not None
        assert len(bytes(lease.entries[0])) == len(lease.entries[0])  # mapped as long as held

    def test_mapped_summaries_of_blocks_on_nvme(self, cache: CacheApi) -> None:
        """They are read for it, the blocks are not."""
        handle = open_with(cache)
        keys = pushed_out(cache, handle)
        lease = cache.map_summaries(handle.id, keys, timeout_s=WAIT_S)
        assert lease.statuses == (READY,) * len(keys)
        assert set(cache.lookup(handle.id, keys).tiers) == {TierKind.NVME}
        cache.release(lease.id)

    def test_a_lease_of_summaries_expires(self, harness: CacheHarness, cache: CacheApi) -> None:
        """By its deadline, and with its session."""
        handle = open_with(cache)
        keys = select_chain(handle, 2)
        put_blocks(cache, handle, keys)
        lease = cache.map_summaries(handle.id, keys, timeout_s=WAIT_S)
        assert lease.timeout_s == pytest.approx(harness.lease_timeout_s)
        harness.pass_time(harness.lease_timeout_s + 0.01)
        assert harness.leased_bytes() == 0
        other = harness.open_session()
        open_with(other)
        other.map_summaries(handle.id, keys, timeout_s=WAIT_S)
        assert harness.leased_bytes() > 0
        other.close()
        assert harness.leased_bytes() == 0

    def test_leases_of_summaries_count_as_leases(
        self, harness: CacheHarness, cache: CacheApi
    ) -> None:
        """One more than a session may hold is refused."""
        handle = open_with(cache)
        leases = [
            cache.map_summaries(handle.id, [], timeout_s=0)
            for _ in range(harness.max_leases_per_session)
        ]
        with pytest.raises(CapacityError):
            cache.map_summaries(handle.id, [], timeout_s=0)
        with pytest.raises(CapacityError):
            cache.select_and_load(handle.id, [], request_of(), mode=LoadMode.MAPPED, timeout_s=0)
        cache.release(leases[0].id)
        cache.release(cache.map_summaries(handle.id, [], timeout_s=0).id)

    # ------------------------------------------------------------- bad input

    @pytest.mark.parametrize(
        "change",
        [
            {"layers": ()},
            {"layers": (0, 3)},
            {"layers": (2, 0)},
            {"layers": (0, 0)},
            {"layers": (0, 1, 2)},
            {"queries": queries_of(2)[..., :4]},
            {"queries": queries_of(2)[:, :, :5]},
            {"queries": queries_of(2)[:, :0]},
            {"queries": queries_of(2)[0]},
            {"queries": queries_of(2).astype(np.float64)},
            {"queries": np.full_like(queries_of(2), np.nan)},
            {"queries": np.full_like(queries_of(2), np.inf)},
            {"must_blocks": (4,)},
            {"must_blocks": (-1,)},
            {"mode": "x"},
            {"budget": 0.3},
        ],
    )
    def test_a_request_that_does_not_fit_is_refused(
        self, harness: CacheHarness, cache: CacheApi, change: dict[str, object]
    ) -> None:
        """Before anything is done, with what to do about it."""
        handle = open_with(cache)
        keys = select_chain(handle, 4)
        put_blocks(cache, handle, keys)
        request = dataclasses.replace(request_of(), **change)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError):
            cache.select(handle.id, keys, request, timeout_s=1)
        with pytest.raises(InvalidArgumentError):
            cache.select_and_load(handle.id, keys, request, mode=LoadMode.MAPPED, timeout_s=1)
        assert harness.leased_bytes() == 0
        assert cache.select(handle.id, keys, request_of(), timeout_s=WAIT_S).layers

    def test_keys_of_the_wrong_length(self, cache: CacheApi) -> None:
        """As for any call that takes keys."""
        handle, bad = open_with(cache), BlockKey(bytes(31))
        with pytest.raises(InvalidArgumentError):
            cache.select(handle.id, [bad], request_of(), timeout_s=0)
        with pytest.raises(InvalidArgumentError):
            cache.map_summaries(handle.id, [bad], timeout_s=0)

    def test_no_time_at_all_still_gets_an_answer(self, cache: CacheApi) -> None:
        """What has no summary in no time is chosen; or the call is refused, to come again."""
        handle = open_with(cache)
        keys = pushed_out(cache, handle)
        result = cache.select(handle.id, keys, request_of((0,)), timeout_s=0)
        lacking = [index for index, each in enumerate(result.statuses) if each is NO_SUMMARY]
        assert set(lacking) <= set(result.layers[0].blocks.tolist())
        assert MISS not in result.statuses
        stop_s = time.monotonic() + WAIT_S
        while time.monotonic() < stop_s:
            if cache.select(handle.id, keys, request_of((0,)), timeout_s=1).statuses == (
                (READY,) * len(keys)
            ):
                break
        else:
            pytest.fail("the summaries never came")

    def test_after_close_no_selection_is_answered(self, cache: CacheApi) -> None:
        """With one of our errors."""
        handle = open_with(cache)
        cache.close()
        with pytest.raises(UcmError):
            cache.select(handle.id, [], request_of(), timeout_s=0)
        with pytest.raises(UcmError):
            cache.map_summaries(handle.id, [], timeout_s=0)

    def test_a_load_of_the_whole_chain_still_works(self, cache: CacheApi) -> None:
        """A namespace with summaries gives back exactly what was put, from both tiers."""
        handle = open_with(cache)
        keys = pushed_out(cache, handle)
        lease = cache.prepare_load(handle.id, keys, timeout_s=WAIT_S)
        assert [block.status for block in lease.blocks] == [LoadStatus.READY] * len(keys)
        for block in lease.blocks:
            assert bytes(block.data or b"") == block_bytes_of(slabs_of(block.key))
        cache.complete_load(lease.id)
