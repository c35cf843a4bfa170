"""Sequences: chains of block names, forks, rewinding."""

from __future__ import annotations

from ucm.engine.sampling import SamplingParams
from ucm.engine.sequence import POOL_NAMESPACE, TokenSequence
from ucm.hashing import chain_keys
from ucm.types import ROOT_KEY


def new_sequence(num_tokens: int, **settings: int) -> TokenSequence:
    return TokenSequence(
        request_id="r",
        index=0,
        arrival=(0, 0),
        params=SamplingParams(),
        tokens=list(range(num_tokens)),
        num_prompt=num_tokens,
        max_length=num_tokens + 8,
        block_tokens=4,
        num_forks=settings.get("num_forks", 0),
    )


def test_the_chain_names_all_full_blocks_as_they_fill() -> None:
    sequence = new_sequence(3)
    for token_id in range(3, 14):
        sequence.append(token_id)
        keys = chain_keys(POOL_NAMESPACE, sequence.tokens, 4)
        assert [item.key for item in sequence.chain] == keys
        assert [item.parent for item in sequence.chain] == [ROOT_KEY, *keys][: len(keys)]
    assert sequence.chain[2].token_ids == (8, 9, 10, 11)


def test_the_last_token_is_never_reusable() -> None:
    assert [len(new_sequence(n).reusable_chain) for n in (1, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


def test_counts() -> None:
    sequence = new_sequence(9, num_forks=2)
    sequence.num_computed = 8
    assert (sequence.num_tokens, sequence.num_uncomputed, sequence.num_full_blocks) == (9, 1, 2)
    assert [sequence.num_blocks_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert sequence.num_slots == 3


def test_a_fork_shares_nothing_mutable() -> None:
    sequence = new_sequence(6, num_forks=1)
    sequence.track_seen(16)
    sequence.block_ids = [5, 7]
    sequence.num_computed = 6
    fork = sequence.fork(1)
    assert (fork.id, sequence.id) == ("r#1", "r")
    assert fork.arrival == (0, 1)
    assert fork.num_slots == 1
    assert (fork.num_computed, fork.block_ids, fork.chain) == (6, [5, 7], sequence.chain)
    fork.append(15)
    fork.append(14)
    fork.block_ids[1] = 8
    assert sequence.tokens == list(range(6))
    assert sequence.block_ids == [5, 7]
    assert len(sequence.chain) == 1
    assert sequence.seen is not None
    assert not sequence.seen[15]


def test_rewind_keeps_tokens_and_names() -> None:
    sequence = new_sequence(9)
    sequence.block_ids = [1, 2, 3]
    sequence.num_computed = sequence.num_registered = sequence.num_offered = 8
    assert sequence.rewind() == [1, 2, 3]
    assert sequence.block_ids == []
    assert (sequence.num_computed, sequence.num_registered, sequence.num_offered) == (0, 0, 0)
    assert sequence.num_tokens == 9
    assert len(sequence.chain) == 2


def test_seen_tokens_follow_the_output() -> None:
    sequence = new_sequence(2)
    assert sequence.seen is None
    sequence.track_seen(8)
    sequence.append(5)
    assert sequence.seen is not None
    assert list(sequence.seen.nonzero()[0]) == [0, 1, 5]
