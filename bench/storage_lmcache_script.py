"""LMCache's local backends on our blocks. Runs in LMCache's own environment, without ucm.

`python storage_lmcache_script.py SETTINGS` with a JSON object `{"source": FILE, "folder": FOLDER,
"block_bytes": n}`. It says `{"event": "ready", "version"}`, then answers each line of its input by
one round: every block put and got, by `LocalDiskBackend` (O_DIRECT, 8 threads; it never syncs) and
by `LocalCPUBackend`, and compared with `source` outside the timed part:
`{"event": "done", "rates": {...}, "wrong_bytes", "checked_bytes"}`. Written for LMCache 0.5.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LAYERS, TOKENS, HEADS = 16, 32, 4
THREADS = 8
PUT_TIMEOUT_S = 120.0


class LocalBackends:
    """Both backends over one pool of memory, as LMCache itself sets them up."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int) -> None:
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        hidden = block_bytes // (2 * 2 * LAYERS * TOKENS)
        gib = num_blocks * block_bytes / 2**30
        config: Any = LMCacheEngineConfig.from_dict(
            {
                "chunk_size": TOKENS,
                "local_cpu": True,
                "max_local_cpu_size": 3 * gib + 0.25,
                "local_disk": str(folder),
                "max_local_disk_size": 2 * gib + 1,
                "extra_config": {"use_odirect": True, "disk_io_threads": THREADS},
            }
        )
        metadata = LMCacheMetadata(
            model_name="bench",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(LAYERS, 2, TOKENS, HEADS, hidden // HEADS),
        )
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self._dtype = torch.bfloat16
        self._shape = torch.Size([2, LAYERS, TOKENS, hidden])
        self._format = MemoryFormat.KV_2LTD
        self.cpu: Any = LocalCPUBackend(config, metadata, "cpu")
        self.disk: Any = LocalDiskBackend(config, loop, self.cpu, "cpu")
        self.keys = [
            CacheEngineKey("bench", 1, 0, number, torch.bfloat16) for number in range(num_blocks)
        ]

    def filled(self, blocks: torch.Tensor) -> list[Any]:
        """Memory objects with the bytes of `blocks` [num_blocks, block_bytes]."""
        found = []
        for block in blocks:
            item = self.cpu.allocate(self._shape, self._dtype, self._format)
            as_bytes(item).copy_(block)
            found.append(item)
        return found


def as_bytes(item: Any) -> torch.Tensor:
    """The bytes of a memory object."""
    import torch

    tensor: torch.Tensor = item.tensor
    return tensor.flatten().view(torch.uint8)


def run_disk(
    backends: LocalBackends, source: torch.Tensor, target: torch.Tensor
) -> dict[str, float]:
    """Put everything until its writes ended, and get it; GB/s of both."""
    for key in backends.keys:
        backends.disk.remove(key)
    items = backends.filled(source)
    written = threading.Semaphore(0)
    begin = time.perf_counter()
    backends.disk.batched_submit_put_task(
        backends.keys, items, on_complete_callback=lambda _key: written.release()
    )
    for _ in backends.keys:
        if not written.acquire(timeout=PUT_TIMEOUT_S):
            raise RuntimeError("LocalDiskBackend did not write a block")
    store_s = time.perf_counter() - begin
    drop(items)
    target.fill_(0xA5)
    begin = time.perf_counter()
    got = backends.disk.batched_get_blocking(backends.keys)
    load_s = time.perf_counter() - begin
    for row, item in zip(target, got, strict=True):
        row.copy_(as_bytes(item))
    drop(got)
    size = source.numel() / 1e9
    return {"lmcache_disk store": size / store_s, "lmcache_disk load": size / load_s}


def run_cpu(
    backends: LocalBackends, source: torch.Tensor, target: torch.Tensor
) -> dict[str, float]:
    """Copy everything in and out again; GB/s of both."""
    begin = time.perf_counter()
    items = backends.filled(source)
    backends.cpu.batched_submit_put_task(backends.keys, items)
    store_s = time.perf_counter() - begin
    drop(items)
    target.fill_(0xA5)
    begin = time.perf_counter()
    for key, row in zip(backends.keys, target, strict=True):
        item = backends.cpu.get_blocking(key)
        row.copy_(as_bytes(item))
        item.ref_count_down()
    load_s = time.perf_counter() - begin
    for key in backends.keys:
        backends.cpu.remove(key)
    size = source.numel() / 1e9
    return {"lmcache_cpu store": size / store_s, "lmcache_cpu load": size / load_s}


def drop(items: list[Any]) -> None:
    """Give references back."""
    for item in items:
        item.ref_count_down()


def say(**event: object) -> None:
    """One line for the parent."""
    print(json.dumps(event), flush=True)


def main() -> int:
    """Serve rounds until the input ends."""
    settings = json.loads(sys.argv[1])
    try:
        import lmcache  # before torch, which takes seconds: it may not be there
        import torch

        raw = bytearray(Path(settings["source"]).read_bytes())
        source = torch.frombuffer(raw, dtype=torch.uint8).view(-1, settings["block_bytes"])
        backends = LocalBackends(Path(settings["folder"]), len(source), settings["block_bytes"])
    except (ImportError, AttributeError, TypeError) as error:
        say(event="unable", message=f"{type(error).__name__}: {error}")
        return 1
    target = torch.zeros_like(source)
    say(event="ready", version=str(lmcache.__version__))
    for _ in sys.stdin:
        rates: dict[str, float] = {}
        wrong = 0
        for run in (run_disk, run_cpu):
            rates |= run(backends, source, target)
            wrong += int((target != source).sum())
        say(event="done", rates=rates, wrong_bytes=wrong, checked_bytes=2 * source.numel())
    return 0


if __name__ == "__main__":
    sys.exit(main())
