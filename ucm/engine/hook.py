"""`KvHook`: where something outside the engine may fill the KV pool and read from it.

The engine calls the hook from its one thread and never imports a cache. The contract:

    admission   match(tokens)             how many leading tokens could be loaded (side-effect free)
                start_load(request)       begin to fill pool blocks; answers what will be loaded
    meanwhile   load_state(id)            how far it is
                claim(id, first, last)    from the back: the engine computes these blocks itself
                wait_some(timeout)        nothing else to do: wait for any progress
    each pass   store(request)            blocks that the pass will fill; copied out behind it
                wait_layer(layer, ids)    before a layer's attention reads blocks being loaded
                observe_step(report)      what the pass took
    load's end  end_load(id)              the engine takes what there is; no write comes after
    preemption  should_swap_out(tokens)   whether to offer what was not offered yet
    end         finish(request_id)        the request left the engine, for whatever reason

Each `start_load` that answered more than 0 blocks gets exactly one `end_load`. A load's blocks
belong to its request alone until then, nobody else finds or reads them:

    LAYERS            chain  | pool | good ...... | lost | to compute       layer by layer
                                     first_block         first_block + num_blocks
    BLOCKS_FROM_BACK  chain  | pool | computed -> | claimed | ... <- ready | to compute
                                                              first_ready_block

A *chunk* is a chain of its own: its tokens begin at block 0, and its `extra_keys`, which are part
of every block's identity, say what it was encoded behind (`ucm.reuse.chunks`). A hook that looks
for blocks by their tokens alone would give a prompt's bytes for a chunk's.

No method may raise into the engine: a failure is 0 tokens, or nothing stored. All but `wait_layer`
and `wait_some` return at once. `wait_layer` never outlasts the hook's own deadline for one request,
which runs from the first wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ucm.hashing import Encodable
from ucm.types import LoadOrder

from .layer_clock import LayerClock

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """Pool blocks of one request to fill from outside."""

    request_id: str
    token_ids: Sequence[int]
    """All prompt tokens, from position 0."""
    first_block: int
    """Index in the request's chain of `block_ids[0]`; the blocks before it are in the pool."""
    block_ids: Sequence[int]
    """Pool blocks to fill, for the chain's blocks `first_block, first_block + 1, ...`."""
    hold: Callable[[Sequence[int]], Callable[[], None]]
    """For `end_load`, when a write into these of `block_ids` cannot be stopped in time: the engine
    keeps them out of use until the function that it returns is called, from any thread, once."""
    extra_keys: tuple[Encodable, ...] = ()
    """What else changed the blocks' bytes, as it was given to `match`."""
    whole: bool = False
    """In the order LAYERS, and all of the blocks or none: nobody computes towards this load."""
    is_alone: bool = False
    """Nobody runs or waits beside the request: the pass behind its load computes a whole step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStart:
    """What is being loaded: chain blocks `first_block` to `first_block + num_blocks - 1`."""

    first_block: int
    """LAYERS: that of the request."""
    num_blocks: int
    """0: nothing, and `end_load` is not called."""
    order: LoadOrder = LoadOrder.LAYERS


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadState:
    """How far a load is."""

    is_done: bool
    """Nothing more will come."""
    num_good_blocks: int = 0
    """LAYERS: leading blocks of the load that have not failed so far."""
    num_layers_ready: int = 0
    """LAYERS: leading layers whose good blocks are all in the pool and verified."""
    bytes_left: int = 0
    stall_s: float = 0.0
    """LAYERS: how long a pass that started now would wait for it in all, as an estimate."""
    first_ready_block: int = 0
    """BLOCKS_FROM_BACK: chain blocks from here to the load's end are in the pool and verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRequest:
    """Pool blocks of one request that are full, or will be when the pass ends."""

    request_id: str
    token_ids: Sequence[int]
    """All tokens from position 0 up to the end of the last block in `block_ids`."""
    first_block: int
    block_ids: Sequence[int]
    release: Callable[[], None]
    """Call exactly once, from any thread, when the blocks were copied or dropped; until then the
    engine does not reuse them."""
    layers: LayerClock
    """Which layers of the blocks are final. A store is published only when all are; of a pass that
    failed it is dropped, and the engine may have taken the blocks back already."""
    extra_keys: tuple[Encodable, ...] = ()
    """What else changed the blocks' bytes; a chunk's: `ucm.reuse.chunks.chunk_extra_keys`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One forward pass."""

    seconds: float
    """From its start to its logits, waits included."""
    stall_s: float
    """Of these, in `wait_layer`."""
    parts: tuple[tuple[int, int], ...]
    """(first position, number of tokens) of each prompt's share."""
    num_decodes: int
    """Sequences that computed one token behind all their others."""


class KvHook(Protocol):
    """Fills and drains the engine's KV pool; see the module for the order of calls."""

    def attach(self, kv_pool: torch.Tensor) -> None:
        """Called once before anything else.

        Args:
            kv_pool: [num_layers, num_blocks, 2, num_kv_heads, block_tokens, head_dim], contiguous,
                the engine's whole pool; on a CPU its memory starts at a page. Keys are post-RoPE.
        """

    def match(
        self, token_ids: Sequence[int], num_local_tokens: int, extra_keys: Sequence[Encodable] = ()
    ) -> int:
        """Leading tokens of `token_ids` that a load could make present.

        Args:
            token_ids: all prompt tokens, or a chunk's.
            num_local_tokens: what the pool already holds, a multiple of the block size.
            extra_keys: what else changed the bytes of every block.

        Returns:
            A multiple of the block size, at least `num_local_tokens`; below or equal to it means
            nothing to load.
        """

    def start_load(self, request: LoadRequest) -> LoadStart:
        """Begin to fill the blocks, behind the engine.

        Should it raise all the same, it must not write to the blocks.
        """

    def load_state(self, request_id: str) -> LoadState:
        """How far the load is; cheap, asked before every pass."""

    def wait_layer(self, layer: int, request_ids: Sequence[str], /) -> Sequence[int]:
        """Block until the loads' slabs of `layer` are in the pool and verified, or given up.

        Args:
            layer: asked in ascending order, from 0 again when a pass is repeated.
            request_ids: loads in the order LAYERS that take part in the pass.

        Returns:
            For each load how many leading blocks are good in all layers up to this one.
        """

    def claim(self, request_id: str, first_block: int, last_block: int, /) -> int:
        """BLOCKS_FROM_BACK: give up the chain blocks from `first_block` on, before `last_block`.

        Returns:
            The end, `first_block` to `last_block`, of what the engine may compute: nothing is
            written below it any more. `first_block` itself: that block is nearly loaded, wait.
        """

    def wait_some(self, timeout_s: float) -> None:
        """Block until any load made progress, at most `timeout_s`."""

    def end_load(self, request_id: str) -> int:
        """End a load, complete or not; nothing is written to its blocks when this returns.

        A write that cannot be stopped is the exception: its blocks are held (`LoadRequest.hold`),
        before this returns.

        Returns:
            LAYERS: how many leading blocks are good in all layers; not fewer than `wait_layer`
            said for the last layer. BLOCKS_FROM_BACK: how many blocks are good at the load's end.
        """

    def store(self, request: StoreRequest) -> None:
        """Take blocks before the pass that fills them; returns at once, or drops them.

        Blocks that the hook has seen before may be offered again. Should it raise all the same, it
        must not have kept `release`: the engine then calls it.
        """

    def should_swap_out(self, num_tokens: int, /) -> bool:
        """Whether to load `num_tokens` back later will be faster than to compute them again."""

    def observe_step(self, report: StepReport) -> None:
        """A pass is over."""

    def finish(self, request_id: str) -> None:
        """The request is done, cancelled or preempted."""
