"""Store blocks and load them again, from a daemon (`store_load.py SOCKET`) or in this process."""

import sys
from pathlib import Path

import ucm
from ucm.client import connect
from ucm.copying import BlockCopier
from ucm.hashing import NamespaceSpec, chain_keys
from ucm.layout import KvDtype, KvLayout
from ucm.types import ROOT_KEY, LoadStatus

TOKENS = list(range(100))
LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=16, block_tokens=8, dtype=KvDtype.FLOAT32)
spec = NamespaceSpec(layout=LAYOUT, model_id="example", weights_digest="0" * 64)

with (
    connect(Path(sys.argv[1])) if sys.argv[1:] else ucm.open(None) as cache,
    BlockCopier(LAYOUT) as copier,
):
    handle = cache.open_namespace(spec)
    keys = chain_keys(handle.id, TOKENS, LAYOUT.block_tokens)  # of whole blocks: 12
    computed = {key: memoryview(bytes([n]) * LAYOUT.block_bytes) for n, key in enumerate(keys)}

    lease = cache.prepare_store(handle.id, ROOT_KEY, keys)
    wanted = [slot for slot in lease.slots if slot.data is not None]  # not what is there already
    sums = copier.copy_blocks([computed[s.key] for s in wanted], [s.data for s in wanted])
    cache.complete_store(lease.id, {s.key: own for s, own in zip(wanted, sums, strict=True)})

    found = cache.lookup(handle.id, keys)
    lease = cache.prepare_load(handle.id, keys, timeout_s=1.0)
    targets = [memoryview(bytearray(LAYOUT.block_bytes)) for _ in keys]
    good = copier.copy_verified(lease.blocks, targets)  # what is not good is a miss: compute it
    found_bad = [
        block.key
        for block, is_good in zip(lease.blocks, good, strict=True)
        if block.status is LoadStatus.READY and not is_good
    ]
    cache.complete_load(lease.id, found_bad)
    num_right = sum(
        bytes(target) == computed[key] for key, target in zip(keys, targets, strict=True)
    )
    print(f"{len(wanted)} stored, {found.num_blocks} found, {sum(good)} loaded, {num_right} right")
