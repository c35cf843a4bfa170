"""Keys are the chain of the tokens, however they are asked for."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.connectors.key_chain import ChainCache, KeyChain
from ucm.errors import InvalidArgumentError
from ucm.hashing import block_key, chain_keys
from ucm.types import NamespaceId

NAMESPACE = NamespaceId(bytes(range(32)))
BLOCK_TOKENS = 4

TOKENS = st.lists(st.integers(0, 3), max_size=24)


@given(st.lists(TOKENS, max_size=8))
def test_any_sequence_of_questions_gives_the_chains_keys(questions: list[list[int]]) -> None:
    chain = KeyChain(NAMESPACE, BLOCK_TOKENS)
    for tokens in questions:
        assert chain.keys_for(tokens) == chain_keys(NAMESPACE, tokens, BLOCK_TOKENS)


def test_a_growing_request_hashes_each_block_once() -> None:
    tokens = list(range(40))
    chains = ChainCache(NAMESPACE, BLOCK_TOKENS)
    with mock.patch("ucm.connectors.key_chain.block_key", wraps=block_key) as hashing:
        chains.prompt_keys(tokens[:17])
        chains.prompt_keys(tokens[:17])
        assert hashing.call_count == 4
        chains.request_keys("r", tokens[:17])
        for end in range(17, 41):
            chains.request_keys("r", tokens[:end])
        assert hashing.call_count == 10


def test_a_request_does_not_disturb_its_prompts_chain() -> None:
    chains = ChainCache(NAMESPACE, BLOCK_TOKENS)
    prompt = list(range(8))
    before = chains.prompt_keys(prompt)
    chains.request_keys("r", prompt)
    chains.request_keys("r", [*prompt, 9, 9, 9, 9])
    chains.request_keys("r", [5] * 12)
    assert chains.prompt_keys(prompt) == before


def test_a_request_id_used_again_for_other_tokens_gets_other_keys() -> None:
    chains = ChainCache(NAMESPACE, BLOCK_TOKENS)
    first = chains.request_keys("r", [1] * 8)
    chains.drop("r")
    assert chains.request_keys("r", [2] * 8) == chain_keys(NAMESPACE, [2] * 8, BLOCK_TOKENS)
    assert chains.request_keys("r", [1] * 8) == first


def test_prompts_remembered_are_bounded() -> None:
    chains = ChainCache(NAMESPACE, BLOCK_TOKENS, max_prompts=2)
    for number in range(10):
        chains.prompt_keys([number] * 8)
    assert len(chains._prompts) == 2


def test_a_token_out_of_range_is_refused_and_nothing_half_made_stays() -> None:
    chain = KeyChain(NAMESPACE, BLOCK_TOKENS)
    with pytest.raises(InvalidArgumentError):
        chain.keys_for([1, 1, 1, 1, 2, 2, 2, -(2**40)])
    assert chain.keys_for([1] * 8) == chain_keys(NAMESPACE, [1] * 8, BLOCK_TOKENS)
