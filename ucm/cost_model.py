"""`CostModel`: what computing and loading KV cost on this machine, learnt while it runs.

    compute   seconds = w_pass * passes + w_token * tokens + w_pair * (tokens x keys they attend to)
                        + w_contention * bytes that are loaded meanwhile
    load      seconds = w_request * requests + w_byte * bytes         for each tier and way of
                        reading, and apart from that while something computes

The first is 6.1's `n*(2P + 4*H*D*(start + n/2))/F` with its constants measured instead of assumed,
and what a host pays whose cores compute and copy at once (on a GPU it is learnt to be nearly
nothing). All four are learnt together, from passes with and without a load beside them: where every
request hits, the short passes behind loads are the only ones that tell what a pass costs whatever
its size. Where nothing was measured the priors answer, and `CostEstimates` says so.

Invariants: pure but for its memory, no I/O and no clock; every answer is finite and positive; one
lock, held for microseconds, so any thread may ask or tell.

Envelope: 20 to 40 us a measurement, 3 us an answer.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import ConfigError
from .plurals import counted
from .robust_fit import RobustFit
from .types import LoadMode, TierKind

MIN_MEASURED = 3
"""Measurements before a rate counts as measured, for people and for corrections."""
MIN_LOADS = 1
"""Loads before a tier's rate is taken instead of a relative's or the prior: a single one says more
than any belief, and how much it counts beside the prior the fit knows."""
MIN_PASS_TOKENS = 8
"""Smaller passes are decodes: they are bound by memory and say nothing of a prefill."""
MAX_BIAS = 2.0
_BIAS_WINDOW = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPrior:
    """What a tier is taken to do before it was measured."""

    bytes_per_s: float
    request_s: float
    """What a read costs beyond its bytes, at the parallelism that readers use."""
    request_bytes: int = 256 << 10
    """How long one read is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostOptions:
    """What is believed before anything was measured."""

    token_s: float = 4e-3
    """Computing one token at the start of a prompt: a small model on two cores."""
    attention_tokens: float = 8192.0
    """Position at which attention costs as much as the weights: P / (2*L*H*D)."""
    pass_tokens: float = 64.0
    """What a pass costs whatever its size (reading the weights), in tokens. SmolLM2-135M in fp32 on
    two cores: 95; what a GPU computes while it reads a weight: 100 and more."""
    chunk_tokens: int = 512
    """Most tokens of one prompt that the engine computes in one pass, but for those below."""
    joined_tokens: int = 2048
    """The same of the pass that follows a load, where the engine has nothing else to do."""
    memory: TierPrior = field(
        default_factory=lambda: TierPrior(bytes_per_s=4e9, request_s=5e-6, request_bytes=64 << 10)
    )
    nvme: TierPrior = field(default_factory=lambda: TierPrior(bytes_per_s=1e9, request_s=2e-5))
    mapped_penalty: float = 1.25
    """Reading NVMe through the daemon's memory over reading it directly: one more copy."""
    contention_s_per_byte: float = 1e-9
    """What computing loses to each byte loaded meanwhile: a core's time to copy and verify it, and
    what the interpreter takes for a read of 100 to 250 KB."""

    def __post_init__(self) -> None:
        positive = (self.token_s, self.attention_tokens, self.pass_tokens, self.chunk_tokens)
        others = (self.joined_tokens, self.mapped_penalty, self.contention_s_per_byte)
        if min(*positive, *others) <= 0:
            raise ConfigError(f"cost model: every prior must be > 0, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEstimate:
    """What one way of loading does, for people."""

    tier: TierKind
    mode: LoadMode
    is_computing: bool
    """Whether it is the rate beside a computation."""
    bytes_per_s: float
    request_s: float
    num_observations: int

    @property
    def is_measured(self) -> bool:
        """Whether it is more than a prior."""
        return self.num_observations >= MIN_MEASURED


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEstimates:
    """Everything that the model believes now; printable."""

    pass_s: float
    token_s: float
    attention_tokens: float
    """Position at which attention doubles the cost of a token."""
    compute_noise: float
    """Typical error of one pass, as a share."""
    num_passes: int
    contention_s_per_byte: float
    num_overlaps: int
    loads: tuple[LoadEstimate, ...]
    """Those that were seen, or the prior of a tier that was not."""
    bias: dict[str, float]
    """Measured over predicted TTFT of each kind of decision, recent median; of those that were seen
    often enough."""

    @property
    def source(self) -> str:
        """`measured`, or `priors for` what was hardly seen yet."""
        unknown = [] if self.num_passes >= MIN_MEASURED else ["computing"]
        measured = {item.tier for item in self.loads if item.is_measured}
        unknown += [f"{tier.value} loads" for tier in TierKind if tier not in measured]
        return f"priors for {', '.join(unknown)}" if unknown else "measured"

    def __str__(self) -> str:
        lines = [
            (
                f"computing: {1e3 * self.token_s:.3g} ms a token, twice that from position "
                f"{self.attention_tokens:,.0f}, and {1e3 * self.pass_s:.3g} ms a pass; "
                f"{counted(self.num_passes, 'pass', 'es')} seen, +-{100 * self.compute_noise:.0f} %"
            )
        ]
        lines += [
            f"{item.tier.value}, {item.mode.value}{', beside computing' * item.is_computing}: "
            f"{item.bytes_per_s / 1e6:,.4g} MB/s and {1e6 * item.request_s:,.3g} us a read; "
            f"{counted(item.num_observations, 'load')} seen"
            for item in self.loads
        ]
        contention = 1e9 * self.contention_s_per_byte
        passes = counted(self.num_overlaps, "pass", "es")
        lines.append(f"contention: {contention:.3g} ms a MB; {passes} beside loads seen")
        lines += [f"{kind}: took {ratio:.2f} x the estimate" for kind, ratio in self.bias.items()]
        return "\n".join([f"estimates: {self.source}", *lines])


class _LoadRate:
    """How fast one tier is read in one way."""

    def __init__(self, prior: TierPrior, slowdown: float) -> None:
        self.fit = RobustFit((prior.request_s * slowdown, slowdown / prior.bytes_per_s))
        self._request_bytes = float(prior.request_bytes)

    def observe(self, num_bytes: int, seconds: float, num_requests: int) -> None:
        """Learn from one load."""
        if self.fit.observe((num_requests, num_bytes), seconds):
            mean = num_bytes / num_requests
            share = 0.2 if self.fit.num_observations > 1 else 1.0
            self._request_bytes += share * (mean - self._request_bytes)

    def seconds(self, num_bytes: float) -> float:
        """What a load in reads as long as those seen takes."""
        return self.fit.predict((num_bytes / self._request_bytes, num_bytes))


class CostModel:
    """What computing and loading cost here; see the module. Thread-safe."""

    def __init__(self, options: CostOptions | None = None) -> None:
        self.options = options or CostOptions()
        o = self.options
        self._lock = threading.Lock()
        pass_s, pair_s = o.token_s * o.pass_tokens, o.token_s / o.attention_tokens
        self._compute = RobustFit((pass_s, o.token_s, pair_s, o.contention_s_per_byte))
        self._num_overlaps = 0
        self._loads: dict[tuple[TierKind, LoadMode, bool], _LoadRate] = {}
        self._ratios: dict[str, deque[float]] = {}

    # What was seen

    def observe_compute(self, start: int, num_tokens: int, seconds: float) -> None:
        """A pass over one prompt's tokens, alone and with nothing being loaded.

        Args:
            start: position of the first token.
            num_tokens: how many were computed.
            seconds: what the pass took.
        """
        self.observe_pass(((start, num_tokens),), seconds)

    def observe_pass(
        self, parts: Sequence[tuple[int, int]], seconds: float, *, loaded_bytes: int = 0
    ) -> None:
        """A pass over the tokens of one prompt or several.

        Args:
            parts: (position of the first token, number of tokens) of each prefill.
            seconds: what the pass took, without what it waited for layers.
            loaded_bytes: what arrived while it computed, for whichever request.
        """
        if sum(count for _, count in parts) < MIN_PASS_TOKENS or seconds <= 0:
            return
        with self._lock:
            self._compute.observe(_pass_features(parts, loaded_bytes), seconds)
            self._num_overlaps += loaded_bytes > 0

    def observe_load(
        self,
        tier: TierKind,
        num_bytes: int,
        seconds: float,
        *,
        num_requests: int = 1,
        mode: LoadMode | None = None,
        is_computing: bool = False,
    ) -> None:
        """A finished load, or a part of one.

        Args:
            tier: where the bytes came from.
            num_bytes: how many.
            seconds: from the first read's begin to the last one's end.
            num_requests: reads that it took.
            mode: None takes the tier's usual one.
            is_computing: the engine computed for most of the time.
        """
        if num_bytes <= 0 or seconds <= 0 or num_requests <= 0:
            return
        with self._lock:
            self._rate(tier, mode, is_computing).observe(num_bytes, seconds, num_requests)

    def observe_ttft(self, kind: str, estimated_s: float, measured_s: float) -> None:
        """How long a request took whose decision was `kind`, and what the model had said.

        Args:
            kind: of the decision.
            estimated_s: the estimate *before* the correction that this teaches.
            measured_s: what it took, counted as the estimate counts.
        """
        if estimated_s <= 0 or measured_s <= 0:
            return
        with self._lock:
            window = self._ratios.setdefault(kind, deque(maxlen=_BIAS_WINDOW))
            window.append(min(max(measured_s / estimated_s, 1 / MAX_BIAS), MAX_BIAS))

    def forget_loads(self) -> None:
        """Another daemon, another disk: what was learnt of loading is void, of computing it is not.

        For whoever knows; a change that nobody announces is learnt all the same.
        """
        with self._lock:
            self._loads.clear()
            self._ratios.clear()

    # What is to be expected

    def compute_s(self, start: int, stop: int) -> float:
        """Seconds to compute the tokens `start` to `stop` - 1, in the engine's chunks."""
        count = stop - start
        if count <= 0:
            return 0.0
        passes = -(-count // self.options.chunk_tokens)
        return self._passes_s(start, count, passes)

    def load_s(
        self,
        tier: TierKind,
        num_bytes: float,
        *,
        mode: LoadMode | None = None,
        is_computing: bool = False,
    ) -> float:
        """Seconds to load `num_bytes` from a tier."""
        if num_bytes <= 0:
            return 0.0
        with self._lock:
            return self._load_s(num_bytes, tier, mode, is_computing)

    def layer_compute_s(self, start: int, stop: int, num_layers: int) -> float:
        """Seconds that one layer of one pass over `start` to `stop` - 1 takes."""
        return self._passes_s(start, stop - start, 1) / num_layers if stop > start else 0.0

    def layer_load_s(
        self, tier: TierKind, num_bytes: float, num_layers: int, *, mode: LoadMode | None = None
    ) -> float:
        """Seconds that one layer of `num_bytes` (over all layers) takes beside a computation."""
        return self.load_s(tier, num_bytes, mode=mode, is_computing=True) / num_layers

    def contention_s(self, num_bytes: float) -> float:
        """Seconds that computing loses to `num_bytes` loaded meanwhile."""
        with self._lock:
            return self._compute.predict((0.0, 0.0, 0.0, num_bytes))

    def bias(self, kind: str) -> float:
        """Measured over estimated TTFT of such decisions, lately; 1.0 with too few of them."""
        with self._lock:
            return self._bias(kind)

    def should_reload(self, start: int, stop: int, tier: TierKind, num_bytes: int) -> bool:
        """Whether reading KV back beats computing the tokens `start` to `stop` - 1 again."""
        return self.load_s(tier, num_bytes) < self.compute_s(start, stop)

    def snapshot(self) -> CostEstimates:
        """Everything that the model believes now."""
        with self._lock:
            pass_s, token_s, pair_s, contention_s_per_byte = self._compute.weights
            return CostEstimates(
                pass_s=pass_s,
                token_s=token_s,
                attention_tokens=token_s / pair_s,
                compute_noise=self._compute.noise,
                num_passes=self._compute.num_observations,
                contention_s_per_byte=contention_s_per_byte,
                num_overlaps=self._num_overlaps,
                loads=tuple(self._load_estimates()),
                bias={
                    kind: self._bias(kind)
                    for kind, ratios in sorted(self._ratios.items())
                    if len(ratios) >= MIN_MEASURED
                },
            )

    def _passes_s(self, start: int, count: int, num_passes: int) -> float:
        with self._lock:
            return self._compute.predict((num_passes, count, count * (start + 0.5 * count), 0.0))

    def _bias(self, kind: str) -> float:
        ratios = self._ratios.get(kind, ())
        return statistics.median(ratios) if len(ratios) >= MIN_MEASURED else 1.0

    def _load_estimates(self) -> list[LoadEstimate]:
        keys = [key for key, rate in self._loads.items() if rate.fit.num_observations]
        seen = {tier for tier, _, _ in keys}
        keys += [(tier, usual_mode(tier), False) for tier in TierKind if tier not in seen]
        estimates = []
        for tier, mode, is_computing in sorted(keys):
            fit = self._rate(tier, mode, is_computing).fit
            request_s, byte_s = fit.weights
            estimates.append(
                LoadEstimate(
                    tier=tier,
                    mode=mode,
                    is_computing=is_computing,
                    bytes_per_s=1 / byte_s,
                    request_s=request_s,
                    num_observations=fit.num_observations,
                )
            )
        return estimates

    def _rate(self, tier: TierKind, mode: LoadMode | None, is_computing: bool) -> _LoadRate:
        if mode is None or tier is TierKind.MEMORY:
            mode = usual_mode(tier)
        key = (tier, mode, is_computing)
        if key not in self._loads:
            o = self.options
            is_copied_twice = tier is TierKind.NVME and mode is LoadMode.MAPPED
            prior = o.memory if tier is TierKind.MEMORY else o.nvme
            self._loads[key] = _LoadRate(prior, o.mapped_penalty if is_copied_twice else 1.0)
        return self._loads[key]

    def _load_s(
        self, num_bytes: float, tier: TierKind, mode: LoadMode | None, is_computing: bool
    ) -> float:
        """By the rate that was asked for, or by its nearest relative that was measured."""
        own = mode if mode is not None and tier is TierKind.NVME else usual_mode(tier)
        other = LoadMode.MAPPED if own is LoadMode.DIRECT else LoadMode.DIRECT
        modes = (own, other) if tier is TierKind.NVME else (own,)
        for way in modes:
            for beside in (is_computing, not is_computing):
                rate = self._loads.get((tier, way, beside))
                if rate is not None and rate.fit.num_observations >= MIN_LOADS:
                    return rate.seconds(num_bytes) * self._penalty(own, way)
        return self._rate(tier, own, is_computing).seconds(num_bytes)

    def _penalty(self, wanted: LoadMode, measured: LoadMode) -> float:
        """What reading in one way is taken to cost over another that was measured."""
        if wanted is measured:
            return 1.0
        penalty = self.options.mapped_penalty
        return penalty if wanted is LoadMode.MAPPED else 1 / penalty


def usual_mode(tier: TierKind) -> LoadMode:
    """How a tier is read best: memory is mapped anyway."""
    return LoadMode.MAPPED if tier is TierKind.MEMORY else LoadMode.DIRECT


def _pass_features(
    parts: Sequence[tuple[int, int]], loaded_bytes: int
) -> tuple[float, float, float, float]:
    tokens = sum(count for _, count in parts)
    pairs = sum(count * (start + 0.5 * count) for start, count in parts)
    return (1.0, tokens, pairs, loaded_bytes)
