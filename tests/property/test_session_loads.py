"""A real engine's loop over a real store, layer by layer, while everything around it fails.

Random requests (shared beginnings, forks, aborts) over a pool so small that they preempt each
other, and a store so small that most blocks lie on NVMe. Plans are refused, come late, or lose
their lease, so that what they name is written anew under the reader; reads fail, flip bits, dawdle
or hang; connections break. `FakeModel` folds every row that attention would read into its tokens.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ucm.config import MIB, Config, MemoryConfig, NvmeConfig
from ucm.connectors.circuit_breaker import BreakerOptions
from ucm.connectors.reference import ReferenceConnector
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.cost_model import CostModel
from ucm.embedded import EmbeddedCache
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.errors import CapacityError, TierUnavailableError
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.load_decision import Decision, LoadKind, LoadShape, decide, forced
from ucm.load_plan import LoadPlan
from ucm.manager import Manager
from ucm.storage.file_io import IoRequest, PosixFileIo
from ucm.testing.extent_files import wait_for
from ucm.testing.fake_model import FakeConfig, FakeModel, reference_tokens
from ucm.types import BlockKey, LoadMode, NamespaceId

DEADLINE_S = 0.1
MAX_STEP_S = 5.0
POOL_BLOCKS = 24
MEMORY_BLOCKS = 10

PAGES = FakeConfig(num_layers=3, num_kv_heads=2, head_dim=32)
PADDED = FakeConfig(num_layers=3, num_kv_heads=2, head_dim=4)
BLOCK_TOKENS = 8
"""Slabs of one page, or of 512 bytes in a page."""
SEEN_BYTES = (2, 130, 258, 386)
"""Of a slab: in numbers that `FakeModel` reads."""


class FaultyIo(PosixFileIo):
    """Reads that fail, lie, dawdle or hang."""

    def __init__(self, seed: int) -> None:
        super().__init__(io_threads=1)
        self._random = random.Random(seed)
        self.is_faulty = False
        self.gate = threading.Event()

    def read_batch(self, requests: Sequence[IoRequest]) -> list[int]:
        """See `FileIo.read_batch`."""
        dice = self._random.random() if self.is_faulty else 1.0
        if dice < 0.04:
            self.gate.wait(self._random.choice([1.5 * DEADLINE_S, 4 * DEADLINE_S, 30.0]))
        elif dice < 0.08:
            return [errno.EIO] * len(requests)
        elif dice < 0.2:
            time.sleep(0.002)
        codes = super().read_batch(requests)
        if 0.2 <= dice < 0.25:
            data = np.frombuffer(requests[0].buffers[-1], np.uint8)
            data[self._random.choice(SEEN_BYTES)] ^= 64
        return codes


class FaultyCache(EmbeddedCache):
    """One connection to the store; its plans are refused, late, or void from the beginning."""

    def __init__(self, manager: Manager, dice: random.Random) -> None:
        super().__init__(manager, owns_manager=False)
        self._dice = dice
        self.is_faulty = False

    def begin_load(
        self,
        namespace: NamespaceId,
        keys: Sequence[BlockKey],
        *,
        mode: LoadMode,
        timeout_s: float,
    ) -> LoadPlan:
        """See `CacheApi.begin_load`."""
        number = self._dice.random() if self.is_faulty else 1.0
        if number < 0.05:
            raise CapacityError("busy", retry_after_s=0.01)
        if number < 0.1:
            raise TierUnavailableError("gone")
        if number < 0.15:
            time.sleep(1.5 * DEADLINE_S)
        plan = super().begin_load(namespace, keys, mode=mode, timeout_s=timeout_s)
        if number < 0.3:
            self.release(plan.id)
        return plan


@dataclass
class Rig:
    """A store, a session, and what decides for it."""

    config: FakeConfig
    manager: Manager
    session: CacheSession
    connections: list[FaultyCache]
    io: FaultyIo
    dice: random.Random

    def be_faulty(self, is_faulty: bool) -> None:
        self.io.is_faulty = is_faulty
        for connection in self.connections:
            connection.is_faulty = is_faulty


def open_rig(folder: Path, config: FakeConfig, seed: int, codec: str) -> Rig:
    layout = KvLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_tokens=BLOCK_TOKENS,
        dtype=KvDtype.FLOAT32,
    )
    manager = Manager(
        Config(
            memory=MemoryConfig(capacity_bytes=MEMORY_BLOCKS * layout.block_bytes),
            nvme=NvmeConfig(
                path=folder,
                capacity_bytes=8 * MIB,
                segment_bytes=1 * MIB,
                index_map_bytes=16 * MIB,
                io_threads=2,
                codec=codec,
            ),
        )
    )
    dice = random.Random(seed)
    connections: list[FaultyCache] = []

    def connect() -> FaultyCache:
        connections.append(FaultyCache(manager, dice))
        return connections[-1]

    def any_way(model: CostModel, shape: LoadShape) -> Decision:
        kind = dice.choice([LoadKind.LOAD_ALL, LoadKind.LOAD_PART, LoadKind.HYBRID, None])
        return (
            decide(model, shape)
            if kind is None
            else forced(kind, dice.choice(list(LoadMode)), is_from_back=True)(model, shape)
        )

    options = SessionOptions(
        deadline_s=DEADLINE_S,
        decide=any_way,
        breaker=BreakerOptions(failures_to_open=3, backoff_s=0.01, max_backoff_s=0.02),
    )
    spec = NamespaceSpec(layout=layout, model_id="m", weights_digest="d")
    session = CacheSession(connect, spec, options)
    session.connect(5.0)
    io = FaultyIo(seed)
    session.loads._io = io
    return Rig(config, manager, session, connections, io, dice)


def prompts_of(dice: random.Random, count: int) -> list[list[int]]:
    bases = [[base] + [8, 7, 6, 5] * 20 for base in range(1, 5)]
    prompts = []
    for _ in range(count):
        length = dice.choice([7, 8, 9, 16, 24, 40, 64])
        own = [dice.randrange(97) for _ in range(dice.choice([0, 0, 1, 9]))]
        prompts.append(dice.choice(bases)[:length] + own)
    return prompts


class Server:
    """A fresh engine, and the requests in it."""

    def __init__(self, rig: Rig, model: FakeModel, engine: Engine) -> None:
        self._rig, self._model, self._engine = rig, model, engine
        self.running: dict[str, tuple[list[int], SamplingParams]] = {}

    def add(self, prompt: list[int]) -> None:
        dice = self._rig.dice
        params = SamplingParams(
            max_tokens=dice.choice([1, 3, 12]), n=dice.choice([1, 1, 2]), ignore_eos=True
        )
        self.running[self._engine.add_request(prompt, params)] = (prompt, params)

    def abort_any(self) -> None:
        name = self._rig.dice.choice(sorted(self.running))
        del self.running[name]
        self._engine.abort(name)

    def step(self) -> None:
        started_s = time.monotonic()
        events = self._engine.step()
        assert time.monotonic() - started_s < MAX_STEP_S
        assert self._engine.check_integrity() == []
        for event in events:
            if event.result is None:
                continue
            prompt, params = self.running.pop(event.request_id)
            assert [output.token_ids for output in event.result.outputs] == [
                reference_tokens(self._model, prompt, params, index) for index in range(params.n)
            ]

    def is_free(self) -> bool:
        """Whether nobody outside holds a block of the pool."""
        self._engine.pool.drain()
        return self._engine.pool.num_pinned == 0


def serve(rig: Rig, model: FakeModel, prompts: list[list[int]], *, may_abort: bool) -> int:
    """Run requests through a fresh engine; returns how many tokens were loaded."""
    options = EngineOptions(
        num_blocks=POOL_BLOCKS,
        block_tokens=BLOCK_TOKENS,
        scheduler=SchedulerOptions(
            max_sequences=6,
            max_step_tokens=32,
            prefill_chunk_tokens=rig.dice.choice([8, 12, 32]),
            max_loading=rig.dice.choice([1, 4]),
            max_load_stall_s=rig.dice.choice([0.0, 0.01, 1e9]),
        ),
    )
    with Engine(model, None, options, ReferenceConnector(rig.session)) as engine:
        server, waiting = Server(rig, model, engine), list(prompts)
        while waiting or engine.has_work:
            if waiting and len(server.running) < 5:
                server.add(waiting.pop())
            if may_abort and server.running and rig.dice.random() < 0.03:
                server.abort_any()
            server.step()
        assert not server.running, "a request is lost"
        assert engine.hook_stats.errors == 0
        rig.io.gate.set()  # what hangs may come now
        rig.session.flush(5.0)
        assert wait_for(server.is_free), "blocks stay held"
        rig.io.gate.clear()
        assert engine.check_integrity() == []
        return engine.hook_stats.loaded_tokens


@pytest.fixture
def threads() -> Iterator[None]:
    """Every thread that the test started has ended."""
    before = set(threading.enumerate())
    yield
    assert wait_for(
        lambda: not {each for each in threading.enumerate() if each.is_alive()} - before
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("config", "codec"),
    [(PAGES, "raw"), (PADDED, "raw"), (PAGES, "bp-zstd")],
    ids=["pages", "padded", "encoded"],
)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_without_a_cache(
    tmp_path: Path, threads: None, config: FakeConfig, seed: int, codec: str
) -> None:
    rig = open_rig(tmp_path / "store", config, seed, codec)
    model = FakeModel(config)
    warm = [[base] + [8, 7, 6, 5] * 20 for base in range(1, 5)]
    serve(rig, model, warm, may_abort=False)
    num_loaded = serve(rig, model, prompts_of(rig.dice, 8), may_abort=False)
    rig.be_faulty(True)
    for _ in range(3):
        serve(rig, model, prompts_of(rig.dice, 14), may_abort=True)
    rig.be_faulty(False)
    assert rig.session.ensure_connected(5.0)
    num_loaded += serve(rig, model, warm, may_abort=False)
    assert num_loaded > 0
    assert wait_for(lambda: rig.manager.status().leased_bytes == 0), "a lease leaks"
    rig.session.close()
    assert rig.manager.flush(timeout_s=5)
    assert rig.manager.check_integrity() == []
    rig.manager.close()
