"""A request's public face: what comes out of the engine, and how long it took."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .reuse_report import ReuseReport

if TYPE_CHECKING:
    from .interfaces import TokenStream
    from .sampling import SamplingParams
    from .sequence import TokenSequence


class FinishReason(enum.StrEnum):
    """Why a sample ended."""

    STOP = "stop"
    """An end-of-sequence or stop token; it is the last token, without text."""
    LENGTH = "length"
    """`max_tokens`, or the model's last position."""
    ABORTED = "aborted"
    """`Engine.abort`."""
    FAILED = "failed"
    """The engine could not go on with it; `RequestResult.error` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutput:
    """One finished sample."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimings:
    """Where one request's time and tokens went."""

    ttft_s: float
    """From `add_request` to the first token of the first sample."""
    tpot_s: float
    """Mean time between two tokens of the first sample; 0 when there is one."""
    total_s: float
    """From `add_request` to the last token of the last sample, or to its failure or abort."""
    num_prompt_tokens: int
    num_local_tokens: int
    """Prompt tokens that the pool held at the first admission."""
    num_hook_tokens: int
    """Prompt tokens that the hook loaded at the first admission."""
    num_computed_tokens: int
    """The rest of the prompt, which the model computed."""
    num_reused_tokens: int = 0
    """Of those that the caches did not have: prompt tokens whose KV came from chunks, repaired or
    not."""
    num_preemptions: int
    """How often one of its samples had to give its blocks up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """A finished request."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[SampleOutput, ...]
    """One a sample, in the order of their indexes."""
    timings: RequestTimings
    error: str | None = None
    """Why it failed; None unless a sample did."""
    reuse: ReuseReport | None = None
    """What chunks did for its first sample; None when its prompt had none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One new token."""

    request_id: str
    index: int
    """Which sample."""
    token_id: int
    """-1 when the sample failed: there is no token then."""
    text: str
    """Text that became certain with it; may be empty, or cover earlier tokens."""
    finish_reason: FinishReason | None = None
    """Set on a sample's last token."""
    result: RequestResult | None = None
    """Set on a request's last token."""


@dataclass(slots=True, eq=False, kw_only=True)
class SampleState:
    """A sample inside the engine."""

    sequence: TokenSequence
    stream: TokenStream | None
    text: list[str] = field(default_factory=list)
    first_us: int | None = None
    last_us: int = 0
    finish_reason: FinishReason | None = None

    def output(self) -> SampleOutput:
        """What the caller gets of it."""
        sequence = self.sequence
        return SampleOutput(
            token_ids=tuple(sequence.tokens[sequence.num_prompt :]),
            text="".join(self.text),
            finish_reason=self.finish_reason or FinishReason.ABORTED,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class RequestState:
    """A request inside the engine."""

    id: str
    params: SamplingParams
    prompt: tuple[int, ...]
    added_us: int
    samples: list[SampleState] = field(default_factory=list)
    error: str | None = None
    ended_us: int | None = None
    """When it failed or was aborted; None unless it was."""

    @property
    def is_finished(self) -> bool:
        """Whether every sample ended."""
        return len(self.samples) == self.params.n and all(
            sample.finish_reason is not None for sample in self.samples
        )

    def result(self) -> RequestResult:
        """What the caller gets of it."""
        return RequestResult(
            request_id=self.id,
            prompt_token_ids=self.prompt,
            outputs=tuple(sample.output() for sample in self.samples),
            timings=self._timings(),
            error=self.error,
            reuse=self._reuse,
        )

    @property
    def _reuse(self) -> ReuseReport | None:
        blend = self.samples[0].sequence.blend
        return None if blend is None else blend.report

    def _timings(self) -> RequestTimings:
        first = self.samples[0]
        root = first.sequence
        first_us = self.added_us if first.first_us is None else first.first_us
        num_intervals = root.num_tokens - root.num_prompt - 1
        last_us = self.ended_us
        if last_us is None:
            last_us = max(sample.last_us for sample in self.samples)
        num_cached = root.num_local_tokens + root.num_hook_tokens
        num_reused = self._reuse.num_chunk_tokens if self._reuse is not None else 0
        # After a preemption chunks may stand in for what the caches had at the first admission.
        num_reused = min(num_reused, root.num_prompt - num_cached)
        return RequestTimings(
            ttft_s=(first_us - self.added_us) / 1e6,
            tpot_s=(first.last_us - first_us) / 1e6 / num_intervals if num_intervals > 0 else 0.0,
            total_s=(last_us - self.added_us) / 1e6,
            num_prompt_tokens=len(self.prompt),
            num_local_tokens=root.num_local_tokens,
            num_hook_tokens=root.num_hook_tokens,
            num_computed_tokens=root.num_prompt - num_cached - num_reused,
            num_reused_tokens=num_reused,
            num_preemptions=sum(sample.sequence.num_preemptions for sample in self.samples),
        )
