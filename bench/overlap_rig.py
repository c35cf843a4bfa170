"""`OverlapRig`: a daemon, an engine and a cached text, for runs of one request at a time.

    text     | base, its blocks are cached ......................................... |
    prompt   | base up to the hit ratio | other text, computed in every run          |

The daemon is a process of its own, on a store that keeps its blocks while the daemon is started
anew, which is how its memory is emptied and its disk's bandwidth changed (`nvme.
max_read_bytes_per_s`: a token bucket that direct reads obey too). The engine and the model stay.
Measured runs store nothing, so every run finds the cache as the one before it did.
"""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ucm import tracing
from ucm.client import connect
from ucm.connectors.cached_engine import cost_model_for
from ucm.connectors.reference import ReferenceConnector, kv_dtype, namespace_spec
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.cost_model import CostModel
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import LoadedModel
from ucm.engine.sampling import SamplingParams
from ucm.engine.scheduler import SchedulerOptions
from ucm.errors import ConfigError, TierUnavailableError
from ucm.load_decision import Decide, Decision, LoadKind, LoadShape, decide, forced
from ucm.types import LoadMode, TierKind

from . import demo_documents as library
from .overlap_hook import MeasuredHook, Watch
from .overlap_trace import Timeline
from .storage_daemon import bench_daemon

DEADLINE_S = 3600.0
"""Of loads: a whole context at 1 MB/s takes minutes, and no run is cut short."""
CONNECT_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 600.0
SPARE_BLOCKS = 8
CHAPTERS = (
    *(library.FLEET, library.FARES, library.LUGGAGE, library.ANIMALS),
    *(library.SAFETY, library.WEATHER, library.CREW, library.GALLEY),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to serve a hit; see `VARIANTS` for what each is."""

    name: str
    text: str
    """For people."""
    decide: Decide | None
    """What is decided; None: the cache is not asked."""
    awaits_all: bool = False


COMPUTE_ONLY = Variant("compute_only", "No cache: every token is computed.", None)
LOAD_ONLY = Variant(
    "load_only",
    "Every hit through the daemon's memory, all of it before the first layer; then the rest.",
    forced(LoadKind.LOAD_ALL, LoadMode.MAPPED),
    awaits_all=True,
)
LOAD_THEN_COMPUTE = Variant(
    "load_then_compute",
    "The same direct reads as overlapped, all awaited before the first layer.",
    forced(LoadKind.LOAD_ALL, LoadMode.DIRECT),
    awaits_all=True,
)
OVERLAPPED = Variant(
    "overlapped",
    "Direct reads, layer by layer: a layer is computed as soon as it is there.",
    forced(LoadKind.LOAD_ALL, LoadMode.DIRECT),
)
HYBRID = Variant(
    "hybrid",
    "Computed from the front, read directly from the back, until the two meet; as overlapped where "
    "that gains nothing.",
    forced(LoadKind.HYBRID, LoadMode.DIRECT),
)
CHOSEN = Variant("chosen", "What the cost model chose by itself.", decide)
VARIANTS = (COMPUTE_ONLY, LOAD_THEN_COMPUTE, OVERLAPPED, HYBRID, CHOSEN, LOAD_ONLY)
"""In the order of a cell's runs. `chosen` comes after the ways that teach the model the bandwidth,
`load_only` last: it is the one that leaves blocks in the daemon's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured request."""

    variant: Variant
    ttft_s: float
    token_ids: tuple[int, ...]
    wrong_bytes: int
    watch: Watch
    timeline: Timeline
    decision: Decision | None


class RigModel(CostModel):
    """A cost model that corrects no prediction by a run that the benchmark holds up itself."""

    is_held_up = False
    """Whether the pass under way awaits all layers first, which no decision plans."""

    def observe_ttft(self, kind: str, estimated_s: float, measured_s: float) -> None:
        """See `CostModel.observe_ttft`."""
        if not self.is_held_up:
            super().observe_ttft(kind, estimated_s, measured_s)


class OverlapRig:
    """See the module. Use `daemon` around runs; `close` at the end."""

    def __init__(
        self,
        loaded: LoadedModel,
        dtype: str,
        store: Path,
        max_tokens: int,
        *,
        stores_wait: bool = True,
    ) -> None:
        """Build the engine; no daemon runs yet.

        Args:
            loaded: the model.
            dtype: of its KV: fp32 or bf16.
            store: the daemon's data folder.
            max_tokens: longest prompt and answer.
            stores_wait: whether the blocks of a decode wait for each other to be stored.

        Raises:
            ConfigError: the memory does not suffice for that many tokens.
        """
        num_blocks = -(-max_tokens // EngineOptions().block_tokens) + SPARE_BLOCKS
        options = EngineOptions(
            num_blocks=num_blocks,
            scheduler=SchedulerOptions(max_load_s=DEADLINE_S),
            max_pinned_share=1.0,
        )
        self.block_tokens = options.block_tokens
        self.spec = namespace_spec(
            loaded.config,
            weights_digest=loaded.weights_digest,
            dtype=kv_dtype(dtype),
            block_tokens=options.block_tokens,
        )
        self.model = RigModel(cost_model_for(options).options)
        self.hook = MeasuredHook(self.spec.layout)
        try:
            self.engine = Engine(loaded.model, None, options, self.hook)
        except (MemoryError, OSError) as error:
            if getattr(error, "errno", errno.ENOMEM) != errno.ENOMEM:
                raise
            size = num_blocks * self.spec.layout.block_bytes
            raise ConfigError(
                f"no memory for the KV of {max_tokens} tokens ({size / 2**30:.3g} GiB): "
                "name a shorter --context"
            ) from error
        self._options = SessionOptions(deadline_s=DEADLINE_S, decide=self._decide_now)
        if not stores_wait:
            self._options = replace(self._options, store_delay_s=0.0)
        self._store = store
        self._loaded = loaded
        self._num_blocks = num_blocks
        self._decide: Decide = decide
        self._session: CacheSession | None = None
        self._num_decodes = 0
        self.base = self._text(CHAPTERS, max_tokens)
        """The cached text's tokens."""
        self._other = self._text(CHAPTERS[::-1], max_tokens)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block that a load moves."""
        return self.spec.layout.num_layers * self.spec.layout.slab_bytes

    def prompt(self, context_tokens: int, hit_ratio: float) -> tuple[list[int], int]:
        """A prompt, and how many blocks of it the cache has."""
        size = self.block_tokens
        # The engine computes at least one token itself.
        num_hits = min(int(context_tokens * hit_ratio) // size, (context_tokens - 1) // size)
        shared = self.base[: num_hits * size]
        return shared + self._other[: context_tokens - len(shared)], num_hits

    @contextmanager
    def daemon(self, bytes_per_s: int | None) -> Iterator[None]:
        """Serve the store for the time of a `with` block, with nothing in memory.

        Args:
            bytes_per_s: what its disk may be read at; None: unlimited.

        Raises:
            UcmError: the daemon does not start, stop or answer.
        """
        settings = {
            "memory.capacity_bytes": str(2 * self._num_blocks * self.spec.layout.block_bytes),
            "memory.prefault_bytes": "0",
            "nvme.capacity_bytes": "8GiB",
            "nvme.segment_bytes": "512MiB",
            "transfer.lease_timeout_s": str(DEADLINE_S),
        }
        if bytes_per_s is not None:
            settings["nvme.max_read_bytes_per_s"] = str(bytes_per_s)
        with ExitStack() as stack:
            daemon = stack.enter_context(bench_daemon(self._store, settings))
            session = CacheSession(
                lambda: connect(daemon.socket_path, timeout_s=DEADLINE_S),
                self.spec,
                self._options,
                model=self.model,
            )
            stack.callback(session.close)
            session.connect(CONNECT_TIMEOUT_S)
            self.model.forget_loads()
            self._session = session
            self.hook.use(ReferenceConnector(session))
            stack.callback(self.hook.use, None)
            yield

    def fill(self, num_tokens: int) -> None:
        """Compute and store the base text, and note its bytes as what loads must bring back.

        Raises:
            TierUnavailableError: the daemon did not take it.
        """
        assert self._session is not None
        self.hook.begin(is_enabled=True, stores=True)
        self._answer(self.base[:num_tokens], 1)
        self.hook.note_reference()
        is_flushed = self._session.flush(FLUSH_TIMEOUT_S)
        num_found = self._session.match(self.base[:num_tokens], 0)
        if not is_flushed or num_found < num_tokens // self.block_tokens:
            raise TierUnavailableError(
                f"the daemon has {num_found} blocks of the benchmark's text, which has "
                f"{num_tokens // self.block_tokens}"
            )

    def run(self, variant: Variant, tokens: Sequence[int], answer_tokens: int) -> Run:
        """Serve one prompt in one way, on an empty pool.

        Raises:
            UcmError: the engine cannot serve it.
        """
        self._decide = variant.decide or decide
        self.hook.begin(is_enabled=variant.decide is not None, awaits_all=variant.awaits_all)
        self.model.is_held_up = variant.awaits_all
        tracing.start_recording()
        begin_us = tracing.now_us()
        ttft_s, token_ids, end_us = self._answer(tokens, answer_tokens)
        events = [event for event in tracing.stop_recording() if event.begin_us < end_us]
        decision = self._decision if variant.decide is not None else None
        timeline = Timeline(
            name=variant.name,
            events=tuple(events),
            begin_us=begin_us,
            end_us=end_us,
            is_copied=decision is not None and _copies(decision),
        )
        return Run(
            variant=variant,
            ttft_s=ttft_s,
            token_ids=token_ids,
            wrong_bytes=self.hook.audit() * self.block_bytes,
            watch=self.hook.watch,
            timeline=timeline,
            decision=decision,
        )

    def decode_s(self, num_tokens: int, *, stores: bool) -> list[float]:
        """Seconds of each decode step of a fresh sequence, with its blocks stored or not."""
        self.hook.begin(is_enabled=stores, stores=stores)
        self.engine.reset_cache()
        # Another first token each time, so that every full block is new to the cache.
        self._num_decodes += 1
        prompt = [self._num_decodes, *self._other[: self.block_tokens - 1]]
        params = SamplingParams(max_tokens=num_tokens + 1, ignore_eos=True)
        marks = [time.perf_counter() for _ in self.engine.generate(prompt, params)]
        return [after - before for before, after in itertools.pairwise(marks)]

    @property
    def num_stored_blocks(self) -> int:
        """Blocks that the current daemon has taken."""
        return self._session.stats().stored_blocks if self._session is not None else 0

    def settle(self) -> None:
        """Wait until what was offered is stored, so that the next run does not share the cores."""
        if self._session is not None:
            self._session.flush(FLUSH_TIMEOUT_S)

    def close(self) -> None:
        """End the engine."""
        self.engine.close()

    @property
    def _decision(self) -> Decision | None:
        assert self._session is not None
        decisions = self._session.loads.decisions
        return decisions[-1] if decisions else None

    def _decide_now(self, model: CostModel, shape: LoadShape) -> Decision:
        return self._decide(model, shape)

    def _answer(self, tokens: Sequence[int], count: int) -> tuple[float, tuple[int, ...], int]:
        """(seconds to the first token, the answer, when the first token was there)."""
        self.engine.reset_cache()
        end_us, result = 0, None
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        for event in self.engine.generate(list(tokens), params):
            end_us = end_us or tracing.now_us()
            result = event.result or result
        assert result is not None
        return result.timings.ttft_s, result.outputs[0].token_ids, end_us

    def _text(self, chapters: Sequence[str], num_tokens: int) -> list[int]:
        tokens = self._loaded.tokenizer.encode("\n\n".join(chapters))
        return (tokens * (num_tokens // len(tokens) + 1))[:num_tokens]


def _copies(decision: Decision) -> bool:
    """Whether its loads come out of the daemon's memory."""
    return decision.mode is LoadMode.MAPPED or TierKind.NVME not in decision.shape.tiers
