"""The codecs on a real model's KV: how small, how fast, and what the model makes of the difference.

    handbook text | context (its KV goes through the codec) | 96 tokens, teacher-forced |
                  0                                    1536                        1632

The KV of the context is computed once and rounded to bfloat16: that is the exact one. It is encoded
and decoded block by block, and the next 96 tokens are predicted from both in the same run: `kl` is
the mean KL(exact || decoded) of the next-token distributions in nats, `top1` the share of equal
winners, `rel_err` the Frobenius norm of the difference over that of the exact KV. The model
computes in float32: in bfloat16 the rounding inside the matrix products alone makes a KL of 1e-3
between any two KVs that differ in a bit, which would hide the codecs. `ratio` counts the whole
encoded payload with its slab directory and checksums; `ratio_on_disk` also the slot header and the
rounding to 4 KiB. GB/s are uncompressed bytes a second of processor time of one thread, so that a
busy machine does not make them smaller than they are, beside a plain copy of the same bytes;
encoding includes measuring the error that the directory stores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from ucm.bench import demo_documents
from ucm.engine.loading import default_model_folder, load_model
from ucm.engine.model import ForwardItem
from ucm.errors import ConfigError
from ucm.layout import ALIGNMENT_BYTES, KvDtype, KvLayout, round_up
from ucm.storage.codecs import CODECS
from ucm.storage.encoding import decode_block, encode_block, max_payload_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ucm.engine.loading import LoadedModel
    from ucm.storage.codec import Codec

BLOCK_TOKENS = 32

Progress = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecBenchOptions:
    """What to measure."""

    model_path: Path | None = None
    """Model folder or GGUF file; None takes the one that `ucm model pull` fetched."""
    context_tokens: int = 1536
    """Encoded tokens, a multiple of the block; the text has some 3,400 of SmolLM2's."""
    next_tokens: int = 96
    """Predicted tokens over which KL and agreement are taken."""
    repeats: int = 5
    """Passes over all blocks; the median speed is reported."""

    def quick(self) -> CodecBenchOptions:
        """The same quality measurement with fewer passes for the speed: well below a minute."""
        return replace(self, repeats=1)


def run_codec_bench(options: CodecBenchOptions, progress: Progress | None = None) -> Result:
    """Measure every codec; see the module. Blocks; the model uses PyTorch's threads.

    Args:
        options: what to measure.
        progress: called with a line of text before each longer piece of work.

    Returns:
        `{codecs: {NAME: {ratio, encode_gb_s, decode_gb_s, rel_err_k, rel_err_v, kl, top1, exact,
        ratio_on_disk}}, memcpy_gb_s, context_tokens, next_tokens, model}`.

    Raises:
        ConfigError: no model, or a context that is no multiple of the block or too long.
    """
    say = progress or (lambda _line: None)
    say("loading the model")
    loaded = load_model(options.model_path or default_model_folder(), torch.float32)
    tokens = _text_tokens(loaded, options)
    say(f"computing the KV of {options.context_tokens} tokens")
    kv = _Kv(loaded, options, tokens)
    exact_logits = kv.next_logits(kv.blocks)
    results: dict[str, Result] = {}
    for codec in CODECS:
        say(codec.name)
        results[codec.name] = _measure(codec, kv, exact_logits, options.repeats)
    return {
        "codecs": results,
        "memcpy_gb_s": _memcpy_gb_s(kv),
        "model": loaded.config.name,
        "context_tokens": options.context_tokens,
        "next_tokens": options.next_tokens,
    }


class _Kv:
    """The context's KV as blocks of the store, and the model that goes on from them."""

    def __init__(self, loaded: LoadedModel, options: CodecBenchOptions, tokens: list[int]) -> None:
        c = loaded.config
        self.layout = KvLayout(
            num_layers=c.num_layers,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            block_tokens=BLOCK_TOKENS,
            dtype=KvDtype.BFLOAT16,
        )
        self._model = loaded.model
        self._tokens = tokens
        self._context = options.context_tokens
        num_blocks = -(-len(tokens) // BLOCK_TOKENS)
        pool = torch.zeros(
            (c.num_layers, num_blocks, 2, c.num_kv_heads, BLOCK_TOKENS, c.head_dim),
        )
        item = ForwardItem(tokens[: self._context], 0, range(num_blocks))
        self._model.forward([item], pool)
        self._pool = pool
        num_full = self._context // BLOCK_TOKENS
        self.blocks = pool[:, :num_full].transpose(0, 1).to(torch.bfloat16).contiguous()
        """[blocks, layers, 2, heads, tokens, dim] bfloat16."""

    def next_logits(self, blocks: Tensor) -> Tensor:
        """Log-probabilities after each of the next tokens but the last, [n, vocab], from `blocks`.

        One pass: every token is an item of its own, which gives its logits; within a layer the
        KV of all is written before any is read.
        """
        pool = self._pool.clone()
        pool[:, : len(blocks)] = blocks.transpose(0, 1).float()
        rows = range(pool.shape[1])
        items = [
            ForwardItem([token], position, rows)
            for position, token in enumerate(self._tokens)
            if position >= self._context
        ]
        return self._model.forward(items, pool).log_softmax(-1)

    def block_bytes(self, index: int) -> bytearray:
        """One block as the store holds it."""
        layers = self.blocks[index].view(torch.uint8).reshape(self.layout.num_layers, -1).numpy()
        data = bytearray(self.layout.block_bytes)
        for layer, slab in enumerate(layers):
            data[self.layout.slab_slice(layer)] = slab.tobytes()
        return data

    def from_bytes(self, data: bytearray) -> Tensor:
        """The inverse of `block_bytes`."""
        slabs = [data[self.layout.slab_slice(i)] for i in range(self.layout.num_layers)]
        flat = torch.frombuffer(bytearray().join(slabs), dtype=torch.bfloat16)
        return flat.reshape(self.blocks.shape[1:])


def _text_tokens(loaded: LoadedModel, options: CodecBenchOptions) -> list[int]:
    d = demo_documents
    chapters = (d.FLEET, d.FARES, d.LUGGAGE, d.ANIMALS, d.SAFETY, d.WEATHER, d.CREW, d.GALLEY)
    tokens = loaded.tokenizer.encode("\n\n".join(chapters))
    wanted = options.context_tokens + options.next_tokens
    if options.context_tokens % BLOCK_TOKENS or wanted > len(tokens):
        raise ConfigError(
            f"the context must be a multiple of {BLOCK_TOKENS}, and with the next tokens at most "
            f"{len(tokens)}; got {options.context_tokens} + {options.next_tokens}"
        )
    return list(tokens[:wanted])


def _measure(codec: Codec, kv: _Kv, exact_logits: Tensor, repeats: int) -> Result:
    blocks = [kv.block_bytes(index) for index in range(len(kv.blocks))]
    payload = memoryview(bytearray(max_payload_bytes(kv.layout)))
    decoded = [bytearray(kv.layout.block_bytes) for _ in blocks]
    encode_s, decode_s, sizes = [], [], []
    for index in range(len(blocks) * repeats):
        number = index % len(blocks)
        began = time.thread_time()
        size = _encode(codec, kv.layout, blocks[number], payload, is_first=number == 0)
        encoded = time.thread_time()
        _decode(codec, kv.layout, payload, decoded[number])
        encode_s.append(encoded - began)
        decode_s.append(time.thread_time() - encoded)
        sizes.append(size)
    raw_bytes = kv.layout.num_layers * kv.layout.slab_bytes
    on_disk = [ALIGNMENT_BYTES + round_up(size, ALIGNMENT_BYTES) for size in sizes]
    restored = torch.stack([kv.from_bytes(data) for data in decoded])
    is_exact = bool(torch.equal(kv.blocks.view(torch.int16), restored.view(torch.int16)))
    # the same bits give the same logits: only what differs is worth another pass of the model
    logits = exact_logits if is_exact else kv.next_logits(restored)
    return {
        "ratio": round(raw_bytes * len(sizes) / sum(sizes), 4),
        "ratio_on_disk": round(raw_bytes * len(sizes) / sum(on_disk), 4),
        "encode_gb_s": _gb_s(raw_bytes, encode_s),
        "decode_gb_s": _gb_s(raw_bytes, decode_s),
        "rel_err_k": _relative_error(kv.blocks[:, :, 0], restored[:, :, 0]),
        "rel_err_v": _relative_error(kv.blocks[:, :, 1], restored[:, :, 1]),
        **_agreement(exact_logits, logits),
        "exact": is_exact,
    }


def _encode(
    codec: Codec, layout: KvLayout, data: bytearray, payload: memoryview, *, is_first: bool
) -> int:
    """Encode into `payload`; the bytes that a slot stores behind its header."""
    if codec.name == "raw":  # a slot stores the block itself, without a directory
        payload[: layout.block_bytes] = data
        return layout.block_bytes
    encoded = encode_block(codec, layout, memoryview(data), payload, is_first=is_first)
    assert encoded is not None, "the buffer has room for any block"
    return encoded.payload_bytes


def _decode(codec: Codec, layout: KvLayout, payload: memoryview, into: bytearray) -> None:
    if codec.name == "raw":
        into[:] = payload[: layout.block_bytes]
    else:
        decode_block(codec, layout, payload, memoryview(into))


def _gb_s(num_bytes: int, seconds: list[float]) -> float:
    return round(num_bytes / max(statistics.median(seconds), 1e-9) / 1e9, 3)


def _memcpy_gb_s(kv: _Kv) -> float:
    """A plain copy of one block, as the codecs are timed."""
    source, seconds = kv.block_bytes(0), []
    target = memoryview(bytearray(len(source)))
    for _ in range(101):
        began = time.thread_time()
        target[:] = source
        seconds.append(time.thread_time() - began)
    return _gb_s(len(source), seconds)


def _relative_error(exact: Tensor, other: Tensor) -> float:
    difference = torch.linalg.vector_norm(exact.float() - other.float())
    return round(float(difference / torch.linalg.vector_norm(exact.float())), 6)


def _agreement(exact: Tensor, other: Tensor) -> Result:
    kl = (exact.exp() * (exact - other)).sum(-1).mean()
    top1 = (exact.argmax(-1) == other.argmax(-1)).double().mean()
    return {"kl": round(max(0.0, float(kl)), 7), "top1": round(float(top1), 4)}


def codec_bench_table(result: Result) -> Table:
    """The result for people."""
    table = Table(
        title=f"{result['model']}, {result['context_tokens']} tokens of bfloat16 KV",
        caption=f"GB/s of uncompressed bytes a core; a copy: {result['memcpy_gb_s']:.1f}",
    )
    headings = ("codec", "ratio", "encode GB/s", "decode GB/s", "error K", "error V", "KL", "top-1")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    for name, row in result["codecs"].items():
        table.add_row(
            name,
            f"{row['ratio']:.2f}",
            f"{row['encode_gb_s']:.2f}",
            f"{row['decode_gb_s']:.2f}",
            f"{row['rel_err_k']:.4f}",
            f"{row['rel_err_v']:.4f}",
            "exact" if row["exact"] else f"{row['kl']:.6f}",
            f"{row['top1']:.2f}",
        )
    return table
