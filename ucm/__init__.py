"""ucm: a tiered KV-cache storage service for LLM inference engines.

Importing this package is cheap: it pulls in no torch, gRPC or LMDB. `ucm.open` loads what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .config import Config
    from .embedded import EmbeddedCache

__version__ = "0.1.0"

__all__ = ["__version__", "open"]


def open(path: str | Path | None, config: Config | None = None) -> EmbeddedCache:
    """Open a store in this process (*embedded mode*, no daemon).

    Args:
        path: data folder, created if it does not exist; None for host memory only.
        config: limits and sizes; the defaults when None. Its `nvme.path` is replaced by `path`.

    Returns:
        A `CacheApi` over an in-process manager. Close it, or use it as a context manager.

    Raises:
        ConfigError: the folder belongs to another user, to another format version, or to a
            daemon that is running.
    """
    from .embedded import open_embedded

    return open_embedded(path, config)
