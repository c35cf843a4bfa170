"""What the serving side needs of a model and of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from .model import ForwardItem


class ModelShape(Protocol):
    """The numbers of a model's configuration that the engine reads."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads a layer."""

    @property
    def head_dim(self) -> int:
        """Elements of one head."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    @property
    def max_context_tokens(self) -> int:
        """Longest sequence."""


class DecoderModel(Protocol):
    """A decoder over the paged pool; `ucm.engine.model.LlamaModel` is one."""

    @property
    def config(self) -> ModelShape:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the KV that it writes."""

    def forward(
        self,
        items: Sequence[ForwardItem],
        kv_pool: torch.Tensor,
        *,
        wait_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Compute the items' tokens, write their KV, return the logits of each item's last token.

        Args:
            items: one chunk of each sequence of the batch.
            kv_pool: [num_layers, num_blocks, 2, num_kv_heads, block_tokens, head_dim].
            wait_layer: called with each layer's number, in order, before its attention reads the
                pool and when all earlier layers' KV is written; may block. What it raises ends the
                pass and is passed on; the pass can then be repeated.

        Returns:
            [len(items), vocab_size] fp32.
        """


class TokenStream(Protocol):
    """Turns one sample's tokens into text as they come."""

    def push(self, token_id: int) -> str:
        """The text that became certain; empty inside a character or a merge."""

    def flush(self) -> str:
        """What was held back, at the end."""


class TextCodec(Protocol):
    """A tokenizer; `ucm.engine.tokenizer.Tokenizer` is one."""

    @property
    def eos_ids(self) -> Collection[int]:
        """Tokens that end a sample."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a document inside a prompt: nothing is added, nothing in it is special."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`."""

    def stream(self) -> TokenStream:
        """A decoder for one sample."""
