"""A load that was granted and then cannot be handed out gives its lease back at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.client import connect
from ucm.config import MIB, Config, MemoryConfig
from ucm.embedded import EmbeddedCache
from ucm.errors import CapacityError, TierUnavailableError, UcmError
from ucm.load_plan import LoadPlan
from ucm.manager import Manager
from ucm.progress import ProgressArea
from ucm.remote_plans import RemotePlans
from ucm.testing.blocks import chain, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.types import LoadMode, SourceKind

IN_MEMORY = Config(memory=MemoryConfig(capacity_bytes=4 * MIB))


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as found:
        yield found


def refuse(*_args: object, **_kwargs: object) -> LoadPlan:
    raise TierUnavailableError("the daemon's door does not answer")


def test_a_client_that_cannot_open_what_a_plan_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        running_daemon(small_config(folder)) as daemon,
        connect(daemon.config.service.socket_path, timeout_s=5.0) as cache,
    ):
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        monkeypatch.setattr(RemotePlans, "plan", refuse)
        with pytest.raises(TierUnavailableError, match="door"):
            cache.begin_load(handle.id, keys, mode=LoadMode.MAPPED, timeout_s=5)
        assert daemon.manager.status().leased_bytes == 0


def test_an_embedded_store_without_memory_for_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in memory need none: they are loaded all the same."""

    def no_memory(_area: ProgressArea, _capacity_bytes: int) -> None:
        raise CapacityError("no memory")

    monkeypatch.setattr(ProgressArea, "__init__", no_memory)
    manager = Manager(IN_MEMORY)
    with EmbeddedCache(manager) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        plan = cache.begin_load(handle.id, keys, mode=LoadMode.MAPPED, timeout_s=5)
        assert [block.source for block in plan.blocks] == [SourceKind.MEMORY] * 3
        cache.complete_load(plan.id)
        assert manager.status().leased_bytes == 0


def test_an_embedded_store_whose_plan_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(IN_MEMORY)
    with EmbeddedCache(manager) as cache:
        handle = cache.open_namespace(tiny_spec())
        keys = chain(handle.id, 3)
        put(cache, handle, keys)
        monkeypatch.setattr("ucm.embedded.planned_blocks", refuse)
        with pytest.raises(UcmError):
            cache.begin_load(handle.id, keys, mode=LoadMode.MAPPED, timeout_s=5)
        assert manager.status().leased_bytes == 0
