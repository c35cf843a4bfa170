"""Time to the first token of a prompt whose chunks lie in host memory, against full prefill.

`TtftRig` keeps one prompt's chunks in a cache in this process, host memory only, and serves the
prompt with the real engine: the chunks are matched, loaded layer by layer, put where they stand,
repaired, the query is computed, a token is drawn. Full prefill is the same engine with the same
tokens and neither cache nor chunks, so it stores nothing either. Every run has an engine of its
own, whose pool is empty and whose memory was touched before the clock starts.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ucm.config import Config
from ucm.connectors.cached_engine import cost_model_for
from ucm.connectors.reference import ReferenceConnector, kv_dtype, namespace_spec
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.embedded import open_embedded
from ucm.engine.chunk_shelf import MAX_ENCODING
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import LoadedModel
from ucm.engine.request import RequestResult
from ucm.engine.sampling import SamplingParams
from ucm.errors import TierUnavailableError
from ucm.reuse.options import BlendOptions, RecomputePolicy, ReuseOptions
from ucm.reuse.segments import SegmentedPrompt, Text

from .rag_prompts import Prompt
from .rag_quality import HAS_NO_BUDGET, POLICIES

Result = dict[str, Any]
Tell = Callable[[str], None]

DEADLINE_S = 120.0
"""Of loads: on a busy machine too the chunks are loaded, not computed."""
CONNECT_TIMEOUT_S = 60.0
FLUSH_TIMEOUT_S = 120.0
SPARE_BLOCKS = 8
"""Beside the request, its chunks' originals and those that are computed for the first time."""
SPARE_SHARE = 1.25
"""Memory of the cache over what the chunks take."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request."""

    ttft_ms: float
    loaded_bytes: int
    """Of chunks, from the cache."""
    complaint: str
    """What was not as it was meant to be; empty: nothing."""


class TtftRig:
    """One prompt and its chunks in a cache; see the module. A context manager."""

    def __init__(self, loaded: LoadedModel, prompt: Prompt) -> None:
        """Have the chunks computed and stored. Blocks for as long as a prefill.

        Raises:
            TierUnavailableError: the cache did not take them.
        """
        self._loaded = loaded
        self._prompt = prompt
        self._tokens = prompt.context + prompt.window[:-1]
        num_blocks = _num_blocks(prompt, len(self._tokens), EngineOptions().block_tokens)
        self._options = EngineOptions(num_blocks=num_blocks, max_pinned_share=1.0)
        spec = namespace_spec(
            loaded.config,
            weights_digest=loaded.weights_digest,
            dtype=kv_dtype("fp32"),
            block_tokens=self._options.block_tokens,
        )
        num_bytes = int(SPARE_SHARE * num_blocks * spec.layout.block_bytes)
        config = Config()
        memory = dataclasses.replace(config.memory, capacity_bytes=num_bytes, prefault_bytes=0)
        config = dataclasses.replace(config, memory=memory)
        self._session = CacheSession(
            lambda: open_embedded(None, config),
            spec,
            SessionOptions(deadline_s=DEADLINE_S),
            model=cost_model_for(self._options),
        )
        try:
            self._session.connect(CONNECT_TIMEOUT_S)
            self._fill()
        except BaseException:
            self._session.close()
            raise

    def __enter__(self) -> TtftRig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.close()

    def full(self) -> Served:
        """The prompt, all of it computed."""
        with Engine(self._loaded.model, None, self._options) as engine:
            return _served(_serve(engine, self._tokens))

    def reused(self, blend: BlendOptions) -> Served:
        """The prompt, its chunks from the cache."""
        with self._engine(blend) as engine:
            result = _serve(engine, self._segmented(engine))
        return _served(result, num_chunks=len(self._prompt.chunks))

    def _fill(self) -> None:
        with self._engine(BlendOptions(policy=RecomputePolicy.NONE)) as engine:
            _serve(engine, self._segmented(engine))
            # The stores read the engine's pool.
            if not self._session.flush(FLUSH_TIMEOUT_S):
                raise TierUnavailableError("the cache did not take the benchmark's chunks in time")

    def _engine(self, blend: BlendOptions) -> Engine:
        reuse = ReuseOptions(sink_tokens=self._prompt.sink, blend=blend)
        options = dataclasses.replace(self._options, reuse=reuse)
        return Engine(self._loaded.model, None, options, ReferenceConnector(self._session))

    def _segmented(self, engine: Engine) -> SegmentedPrompt:
        chunks = [engine.chunk(chunk) for chunk in self._prompt.chunks]
        prefix, query = Text(self._prompt.prefix), Text(self._prompt.window[:-1])
        return SegmentedPrompt([prefix, *chunks, query])


def _num_blocks(prompt: Prompt, num_tokens: int, block_tokens: int) -> int:
    """Of the pool.

    The chunks' originals stand beside the request while they are blended in, and beside both the
    sequences that compute chunks when the cache is filled.
    """
    longest = len(prompt.sink) + max(map(len, prompt.chunks))
    encoding = MAX_ENCODING * -(-longest // block_tokens)
    return 2 * -(-num_tokens // block_tokens) + encoding + SPARE_BLOCKS


def _serve(engine: Engine, prompt: SegmentedPrompt | Sequence[int]) -> RequestResult:
    engine.pool.tensor.zero_()
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    return engine.generate_all([prompt], params)[0]


def _served(result: RequestResult, num_chunks: int = 0) -> Served:
    report, complaint = result.reuse, ""
    if result.error is not None:
        complaint = result.error
    elif num_chunks:
        if report is None or report.fallback is not None:
            complaint = f"no chunk was reused ({report and report.fallback})"
        elif report.num_encoded_tokens:
            complaint = f"{report.num_encoded_tokens} tokens of chunks were not in the cache"
    loaded_bytes = report.loaded_bytes if report is not None else 0
    return Served(result.timings.ttft_s * 1e3, loaded_bytes, complaint)


@dataclass(slots=True)
class TtftResult:
    """Times of one prompt, each of a single run."""

    full_ms: float
    policies_ms: dict[str, dict[str, float]]
    """Policy, budget; a policy without one the same for all."""
    loaded_bytes: int
    """Of one request that reuses chunks."""


def measure_ttft(rig: TtftRig, budgets: Sequence[float], say: Tell, warn: Tell) -> TtftResult:
    """Full prefill, and every policy at every budget: once each.

    Args:
        rig: of the prompt.
        budgets: of the policies that have one.
        say: called with a line for each policy.
        warn: called with a line for each request that was not served as it was meant to be.
    """
    say("TTFT, full prefill")
    full_ms, policies, loaded_bytes = rig.full().ttft_ms, {}, 0
    for policy in POLICIES:
        say(f"TTFT, {policy}")
        tried = budgets[:1] if policy in HAS_NO_BUDGET else budgets
        found = [rig.reused(BlendOptions(policy=policy, budget=budget)) for budget in tried]
        for served in found:
            _warn_of(served, policy, warn)
            loaded_bytes = max(loaded_bytes, served.loaded_bytes)
        times = [served.ttft_ms for served in found]
        if policy in HAS_NO_BUDGET:
            times *= len(budgets)
        policies[str(policy)] = dict(zip([f"{each:g}" for each in budgets], times, strict=True))
    return TtftResult(full_ms, policies, loaded_bytes)


def ttft_ratio(rig: TtftRig, budget: float, repeats: int, warn: Tell) -> Result:
    """`progressive` against full prefill, in turns.

    Args:
        rig: of the prompt.
        budget: of the repair.
        repeats: of both.
        warn: as in `measure_ttft`.

    Returns:
        `ratio` of the medians, and both lists of `full_ms` and `progressive_ms`.
    """
    blend = BlendOptions(policy=RecomputePolicy.PROGRESSIVE, budget=budget)
    fulls, ours = [], []
    for _ in range(repeats):
        fulls.append(rig.full().ttft_ms)
        served = rig.reused(blend)
        _warn_of(served, blend.policy, warn)
        ours.append(served.ttft_ms)
    return {
        "ratio": statistics.median(ours) / statistics.median(fulls),
        "full_ms": fulls,
        "progressive_ms": ours,
    }


def _warn_of(served: Served, policy: RecomputePolicy, warn: Tell) -> None:
    if served.complaint:
        warn(f"TTFT of {policy}: {served.complaint}")
