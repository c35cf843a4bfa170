"""Ask an embedded cache which blocks a query will attend to, without reading a block."""

import numpy as np

import ucm
from ucm.checksum import block_checksums
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.kernels.block_scores import Budget
from ucm.kernels.summarize import summarize_blocks
from ucm.kernels.summary_record import encode_summary
from ucm.layout import KvDtype, KvLayout
from ucm.select_api import SelectRequest
from ucm.types import ROOT_KEY, SummaryKind

KIND, RANDOM = SummaryKind.GSA_K4, np.random.default_rng(0)
LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=16, block_tokens=8, dtype=KvDtype.FLOAT32)
spec = NamespaceSpec(layout=LAYOUT, model_id="example", weights_digest="0" * 64)
with ucm.open(None) as cache:  # a folder instead of None keeps the blocks
    handle = cache.open_namespace(spec, summary=KIND)
    keys = chain_keys(handle.id, list(range(40 * 8)), 8)
    lease, checksums = cache.prepare_store(handle.id, ROOT_KEY, keys), {}
    for slot in lease.slots:
        block = RANDOM.normal(size=LAYOUT.block_bytes // 4).astype(np.float32).tobytes()
        slot.data[:] = block
        checksums[slot.key] = sums = block_checksums(LAYOUT, slot.data)
        summary = encode_summary(LAYOUT, KIND, summarize_blocks(LAYOUT, KIND, [block])[0], sums)
        slot.summary[: len(summary)] = summary
    cache.complete_store(lease.id, checksums)
    queries = RANDOM.normal(size=(2, 1, 4, 16)).astype(np.float32)  # layers, queries, heads, size
    request = SelectRequest(
        layers=[0, 1], queries=queries, budget=Budget(ratio=0.3), must_blocks=[0, 39]
    )
    found = cache.select(handle.id, keys, request, timeout_s=1)
    for layer in found.layers:
        print(
            f"layer {layer.layer}: {len(layer.blocks)} of {len(keys)} blocks, mass {layer.mass:.2f}"
        )
