"""Opening a store in process: folders, restarts, configuration, the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import ucm
from ucm.config import MIB, Config, MemoryConfig, NvmeConfig, ServiceConfig
from ucm.embedded import EmbeddedCache, open_embedded
from ucm.errors import ConfigError, UcmError
from ucm.grants import LoadGrants
from ucm.testing.blocks import chain, content, get, put, tiny_spec
from ucm.testing.stores import small_store_config
from ucm.types import ROOT_KEY, StoreStatus, TierKind

CONFIG = Config(
    service=ServiceConfig(staging_bytes=1 * MIB),
    memory=MemoryConfig(capacity_bytes=1 * MIB),
    nvme=NvmeConfig(capacity_bytes=8 * MIB, segment_bytes=2 * MIB, io_threads=2),
)


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    with ucm.open(tmp_path / "store", CONFIG) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 5)
        assert put(cache, handle, keys) == (StoreStatus.ACCEPTED,) * 5
    with open_embedded(str(tmp_path / "store"), CONFIG) as cache:
        again = cache.open_namespace(tiny_spec())
        assert again == handle
        assert cache.lookup(handle.id, keys).tiers == (TierKind.NVME,) * 5
        assert get(cache, handle, keys) == [content(key) for key in keys]
        assert cache.manager.check_integrity() == []


def test_one_folder_one_store(tmp_path: Path) -> None:
    with open_embedded(tmp_path / "store", CONFIG), pytest.raises(ConfigError):
        open_embedded(tmp_path / "store", CONFIG)
    open_embedded(tmp_path / "store", CONFIG).close()


def test_without_a_folder_there_is_memory_only(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, nvme=NvmeConfig(path=tmp_path / "unused"))
    with open_embedded(None, config) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 2)
        put(cache, handle, keys)
        assert cache.flush(timeout_s=0)
        assert get(cache, handle, keys) == [content(key) for key in keys]
        assert [tier.kind for tier in cache.manager.status().tiers] == [TierKind.MEMORY]
    assert not (tmp_path / "unused").exists()


def test_the_default_configuration_opens(tmp_path: Path) -> None:
    with ucm.open(tmp_path / "store") as cache:
        cache.open_namespace(tiny_spec())


def test_a_load_whose_columns_do_not_fit_leaves_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ucm.open(tmp_path / "store", CONFIG) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 2)
        put(cache, handle, keys)
        prepare = cache.manager.prepare_load

        def lose_a_tier(*args: Any, **options: Any) -> LoadGrants:
            grants = prepare(*args, **options)
            return dataclasses.replace(grants, tiers=grants.tiers[1:])

        monkeypatch.setattr(cache.manager, "prepare_load", lose_a_tier)
        with pytest.raises(ValueError, match="match the keys"):
            cache.prepare_load(handle.id, keys, timeout_s=1)
        assert cache.manager.status().num_leases == 0


def test_views_outlive_the_store(tmp_path: Path) -> None:
    """A reader that comes too late reads stale bytes, never unmapped memory."""
    cache = open_embedded(tmp_path / "store", CONFIG)
    handle = cache.open_namespace(tiny_spec())
    keys = chain(handle.id, 1)
    put(cache, handle, keys)
    block = cache.prepare_load(handle.id, keys, timeout_s=1).blocks[0]
    slot = cache.prepare_store(handle.id, keys[0], chain(handle.id, 2)[1:]).slots[0]
    cache.close()
    assert block.data is not None
    assert slot.data is not None
    assert bytes(block.data) == content(keys[0])
    slot.data[0] = 1


def test_closing_one_of_two_sessions_leaves_the_store() -> None:
    first = open_embedded(None, small_store_config())
    second = EmbeddedCache(first.manager, owns_manager=False)
    second.open_namespace(tiny_spec())
    second.close()
    with pytest.raises(UcmError):
        second.prepare_store(tiny_spec().fingerprint(), ROOT_KEY, [])
    assert first.manager.status().state == "serving"
    first.close()
