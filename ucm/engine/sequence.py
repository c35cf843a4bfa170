"""One chain of tokens on its way through the engine, and the blocks that hold its KV.

    tokens       | prompt ............................ | output ....... |
    positions    0            num_computed                          num_tokens
                 | KV is in the pool | still to compute               |
    block_ids    | block 0 | block 1 | ...                            (covers num_computed at least)

A sequence that decodes has exactly one token to compute. `chain` names the full blocks; it grows
with the tokens and costs one SHA-256 a block (about 10 us).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ucm.hashing import block_key
from ucm.types import KEY_BYTES, ROOT_KEY, NamespaceId

from .allocator import BlockAllocator, ChainLink
from .blend_span import BlendSpan
from .sampling import SamplingParams

POOL_NAMESPACE = NamespaceId(bytes(KEY_BYTES))
"""The engine's own prefix cache: one model, one process, so one name is enough."""


@dataclass(slots=True, eq=False, kw_only=True)
class TokenSequence:
    """One sample of one request. Owned by the engine's thread."""

    request_id: str
    index: int
    """0 to n - 1: which of the request's samples."""
    arrival: tuple[int, int]
    """(number of the request, index): first come, first served."""
    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    max_length: int
    """Tokens, prompt included, at which the sample ends."""
    block_tokens: int
    resident_blocks: int = 0
    """Pool blocks that it owns when it is longer than its share of the pool; 0: what it needs. The
    block ids are then those of its share, in no order."""
    max_chunk_tokens: int = 0
    """Most tokens of one pass when it has a share; it must hold what the pass computes."""
    num_forks: int = 0
    """Samples that are split off when the prompt is computed; each needs a place in the batch."""
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    chain: list[ChainLink] = field(default_factory=list)
    loaded_ahead: tuple[int, int] | None = None
    """(start, stop) of chain blocks that are in the pool ahead of the computation, which jumps over
    them. While a load from the back is under way: where it ends, and nothing ahead yet."""
    num_registered: int = 0
    """Leading blocks that were offered to the prefix cache, or came from it."""
    num_offered: int = 0
    """Leading blocks that need not be offered to the hook (any more)."""
    num_local_tokens: int = 0
    """Tokens that the pool held at the first admission."""
    num_hook_tokens: int = 0
    """Tokens that the hook loaded at the first admission."""
    num_preemptions: int = 0
    approximate_from: int | None = None
    """Position from which on KV is not exactly what its tokens say: computed with blocks left out,
    or taken from chunks; None: all of it is exact."""
    blend: BlendSpan | None = None
    """Chunks whose KV is to be taken from where they were encoded; None: there are none."""
    known_logits: Tensor | None = None
    """[1, vocab_size] of the last token, whose KV is in the pool though it does not count as
    computed yet; None: a pass gives them."""
    is_private: bool = False
    """Computes a chunk for others: draws no token, and shares and stores nothing of that itself."""
    num_public_tokens: int = 0
    """Of a private one, those in front of the chunk: other private ones begin with them, too."""
    seen: npt.NDArray[np.bool_] | None = None
    """[vocab] for the repetition penalty; None when there is none."""

    def __post_init__(self) -> None:
        self._extend_chain()

    @property
    def id(self) -> str:
        """Name towards the hook: the request's own for sample 0."""
        return self.request_id if self.index == 0 else f"{self.request_id}#{self.index}"

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.tokens)

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is not in the pool; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def is_offloaded(self) -> bool:
        """Whether most of its KV lies below the pool."""
        return self.resident_blocks > 0

    @property
    def num_computable(self) -> int:
        """Tokens of these that come before what was loaded ahead, and that a pass may compute."""
        if self.is_offloaded:
            return min(len(self.tokens) - self.num_computed, self.max_chunk_tokens)
        num_tokens = self.num_computable_from(self.num_computed)
        if self.loaded_ahead is None or self.loaded_ahead[0] == self.loaded_ahead[1]:
            return num_tokens
        return min(num_tokens, self.loaded_ahead[0] * self.block_tokens - self.num_computed)

    def num_computable_from(self, position: int) -> int:
        """Tokens from `position` on that a pass may compute: none that chunks are to fill.

        Nor the last few in front of them: the blend computes these too, in a pass that it makes.
        """
        blend = self.blend
        if blend is None or blend.is_over or position >= blend.stop:
            return len(self.tokens) - position
        num_tokens = blend.start - position
        return num_tokens if num_tokens >= self.block_tokens else 0

    @property
    def num_slots(self) -> int:
        """Places in the batch that it takes, its future forks included."""
        return 0 if self.is_private else 1 + self.num_forks

    @property
    def num_full_blocks(self) -> int:
        """Blocks whose every row is computed."""
        return self.num_computed // self.block_tokens

    def num_exact_blocks(self, num_tokens: int) -> int:
        """Full blocks of the first `num_tokens` that hold exactly what their tokens say.

        Only these are shared and stored: whoever finds them asked for the tokens, not for the way
        they came about.
        """
        if self.is_private:
            num_tokens = min(num_tokens, self.num_public_tokens)
        if self.approximate_from is not None:
            num_tokens = min(num_tokens, self.approximate_from)
        return num_tokens // self.block_tokens

    @property
    def reusable_chain(self) -> list[ChainLink]:
        """What may be shared or loaded: full blocks, but never the last token's.

        The last token has to be computed in any case, because the next one comes from its logits.
        """
        return (
            [] if self.is_offloaded else self.chain[: (len(self.tokens) - 1) // self.block_tokens]
        )

    def num_blocks_for(self, num_tokens: int) -> int:
        """Pool blocks that it owns when it has `num_tokens`."""
        return self.resident_blocks or -(-num_tokens // self.block_tokens)

    @property
    def num_extra_blocks(self) -> int:
        """Pool blocks that its chunks take beside its own when it is admitted."""
        return 0 if self.blend is None or self.blend.is_over else self.blend.num_extra_blocks

    def append(self, token_id: int) -> None:
        """Add a sampled token; O(1), and one hash when it fills a block."""
        self.tokens.append(token_id)
        if self.seen is not None:
            self.seen[token_id] = True
        if len(self.tokens) % self.block_tokens == 0:
            self._extend_chain()

    def advance(self, num_tokens: int) -> None:
        """The KV of the next `num_tokens` is in the pool."""
        self.num_computed += num_tokens
        self.known_logits = None
        self.skip_loaded()

    def take_loaded(self, blocks: range) -> None:
        """Chain blocks that follow the computed ones are in the pool, from outside."""
        self.num_computed = blocks.stop * self.block_tokens
        # A cache that had nothing to add may have lost the shared blocks too (it was restarted, or
        # was full), and would refuse their children as orphans; offering them again costs names.
        if blocks:
            self.num_offered = max(self.num_offered, blocks.stop)
        self._count_loaded(blocks)

    def skip_loaded(self) -> None:
        """Go on behind what was loaded ahead, if the computation has reached it."""
        if self.loaded_ahead is None:
            return
        blocks = range(*self.loaded_ahead)
        if self.num_computed < blocks.start * self.block_tokens:
            return
        self.loaded_ahead = None
        self.num_computed = max(self.num_computed, blocks.stop * self.block_tokens)
        if self.num_offered >= blocks.start:
            self.num_offered = max(self.num_offered, blocks.stop)
        self._count_loaded(blocks)

    def register_full(self, blocks: BlockAllocator) -> None:
        """Make its full blocks findable; their content is final."""
        if self.is_offloaded:
            return
        num_exact = self.num_exact_blocks(self.num_computed)
        for index in range(self.num_registered, num_exact):
            blocks.register(self.block_ids[index], self.chain[index])
        self.num_registered = num_exact

    def _count_loaded(self, blocks: range) -> None:
        if self.num_preemptions == 0:
            self.num_hook_tokens += len(blocks) * self.block_tokens

    def track_seen(self, vocab_size: int) -> None:
        """Start to record which tokens occur, for the repetition penalty."""
        self.seen = np.zeros(vocab_size, dtype=np.bool_)
        self.seen[self.tokens] = True

    def fork(self, index: int) -> TokenSequence:
        """Another sample with the same tokens, KV and blocks; the caller adds the references."""
        return TokenSequence(
            request_id=self.request_id,
            index=index,
            arrival=(self.arrival[0], index),
            params=self.params,
            tokens=list(self.tokens),
            num_prompt=self.num_prompt,
            max_length=self.max_length,
            block_tokens=self.block_tokens,
            num_computed=self.num_computed,
            block_ids=list(self.block_ids),
            chain=list(self.chain),
            num_registered=self.num_registered,
            num_offered=self.num_offered,
            approximate_from=self.approximate_from,
            blend=None if self.blend is None else self.blend.fork(),
            seen=None if self.seen is None else self.seen.copy(),
        )

    def rewind(self) -> list[int]:
        """Forget the KV (preemption): all tokens stay and are computed again.

        Returns:
            The blocks that it held; the caller releases them.
        """
        block_ids, self.block_ids = self.block_ids, []
        self.num_computed = self.num_registered = self.num_offered = 0
        self.loaded_ahead = self.approximate_from = self.known_logits = None
        if self.blend is not None:
            self.blend.rewind()
        return block_ids

    def _extend_chain(self) -> None:
        size = self.block_tokens
        for start in range(len(self.chain) * size, len(self.tokens) - size + 1, size):
            parent = self.chain[-1].key if self.chain else ROOT_KEY
            token_ids: Sequence[int] = self.tokens[start : start + size]
            key = block_key(POOL_NAMESPACE, parent, token_ids)
            self.chain.append(ChainLink(key, parent, tuple(token_ids)))
