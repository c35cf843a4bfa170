"""From token ids to block keys, each block hashed once.

A request's chain only grows while it decodes, so its keys are kept and extended: a step that
fills no block hashes nothing, one that fills a block hashes that block. Hashing 3,000 tokens from
nothing takes about 1 ms; comparing them with what was hashed before takes 15 us, and is always
done, so that a key never names other tokens than the ones it is asked for.

Chains with other extra keys (a chunk's) are other chains, although their tokens may be the same.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

from ucm.hashing import Encodable, block_key, encode
from ucm.types import ROOT_KEY, BlockKey, NamespaceId

_Name: TypeAlias = tuple[bytes, bytes]
"""Extra keys, encoded, and tokens."""


class KeyChain:
    """Keys of the full blocks of one growing sequence of tokens."""

    __slots__ = ("_block_tokens", "_keys", "_namespace", "_tokens", "extra_keys")

    def __init__(
        self, namespace: NamespaceId, block_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> None:
        self.extra_keys = tuple(extra_keys)
        self._namespace = namespace
        self._block_tokens = block_tokens
        self._tokens: list[int] = []
        self._keys: list[BlockKey] = []

    def keys_for(self, token_ids: Sequence[int]) -> list[BlockKey]:
        """Keys of all full blocks of `token_ids`; hashes only what it has not hashed before.

        Raises:
            InvalidArgumentError: a token id is out of range.
        """
        num_blocks = len(token_ids) // self._block_tokens
        tokens = list(token_ids[: num_blocks * self._block_tokens])
        self._forget_what_differs(tokens)
        for index in range(len(self._keys), num_blocks):
            start = index * self._block_tokens
            block = tokens[start : start + self._block_tokens]
            key = block_key(self._namespace, self._last_key(), block, self.extra_keys)
            self._keys.append(key)
            self._tokens.extend(block)
        return self._keys[:num_blocks]

    def copy(self) -> KeyChain:
        """A chain that grows on its own from here."""
        twin = KeyChain(self._namespace, self._block_tokens, self.extra_keys)
        twin._tokens, twin._keys = list(self._tokens), list(self._keys)
        return twin

    def _last_key(self) -> BlockKey:
        return self._keys[-1] if self._keys else ROOT_KEY

    def _forget_what_differs(self, tokens: list[int]) -> None:
        shared = min(len(tokens), len(self._tokens))
        if tokens[:shared] == self._tokens[:shared]:
            return
        same = next(i for i in range(shared) if tokens[i] != self._tokens[i])
        num_blocks = same // self._block_tokens
        del self._keys[num_blocks:]
        del self._tokens[num_blocks * self._block_tokens :]


class ChainCache:
    """Chains of the prompts seen last and of the requests that run. One owner thread."""

    def __init__(self, namespace: NamespaceId, block_tokens: int, max_prompts: int = 64) -> None:
        self._namespace = namespace
        self._block_tokens = block_tokens
        self._max_prompts = max_prompts
        self._prompts: OrderedDict[_Name, KeyChain] = OrderedDict()
        self._requests: dict[str, KeyChain] = {}

    def prompt_keys(
        self, token_ids: Sequence[int], extra_keys: Sequence[Encodable] = ()
    ) -> list[BlockKey]:
        """Keys of a prompt's full blocks; asked again for the same prompt it only looks up."""
        name = _name_of(token_ids, extra_keys)
        chain = self._prompts.get(name)
        if chain is None:
            chain = KeyChain(self._namespace, self._block_tokens, extra_keys)
            self._prompts[name] = chain
        self._prompts.move_to_end(name)
        while len(self._prompts) > self._max_prompts:
            self._prompts.popitem(last=False)
        return chain.keys_for(token_ids)

    def request_keys(
        self, request_id: str, token_ids: Sequence[int], extra_keys: Sequence[Encodable] = ()
    ) -> list[BlockKey]:
        """Keys of a running request's full blocks; adopts what was hashed for its prompt."""
        chain = self._requests.get(request_id)
        if chain is None or chain.extra_keys != tuple(extra_keys):
            prompt = self._prompts.get(_name_of(token_ids, extra_keys))
            fresh = KeyChain(self._namespace, self._block_tokens, extra_keys)
            chain = self._requests[request_id] = prompt.copy() if prompt else fresh
        return chain.keys_for(token_ids)

    def drop(self, request_id: str) -> None:
        """The request is over."""
        self._requests.pop(request_id, None)


def _name_of(token_ids: Sequence[int], extra_keys: Sequence[Encodable]) -> _Name:
    return encode(list(extra_keys)), array("q", token_ids).tobytes()
