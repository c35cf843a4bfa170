"""The reference engine's front: requests in, tokens and text out.

    add_request -> step, step, ... -> TokenEvent ... -> the last one carries the RequestResult

The engine and everything in it belong to one thread. What a request produces does not depend on
what else runs: see `sampling`; but a chunk's budget may be learnt from the requests before it, and
what is repaired of chunks depends on how far an exact prefix reaches. It knows no cache beyond its
own pool; a `KvHook` may know one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType

from ucm.clock import Clock, SystemClock
from ucm.errors import ConfigError, InvalidArgumentError
from ucm.reuse.segments import Chunk, ChunkSpace, SegmentedPrompt
from ucm.sparse.certified_attention import Promises
from ucm.sparse.decoding import SparseStats
from ucm.sparse.slab_source import SlabSource

from .blend_span import BlendSpan, chunk_space_of, span_of
from .engine_options import EngineOptions, EngineStats
from .guarded_hook import HookStats
from .hook import KvHook
from .interfaces import DecoderModel, TextCodec
from .offload_desk import OffloadDesk
from .pool import KvPool
from .request import FinishReason, RequestResult, RequestState, SampleState, TokenEvent
from .reuse_report import FallbackReason
from .runner import BatchRunner
from .sampling import SamplingParams
from .sequence import TokenSequence

__all__ = ["Engine", "EngineOptions", "EngineStats"]


class Engine:
    """Continuous batching over one model; see the module."""

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: TextCodec | None,
        options: EngineOptions | None = None,
        hook: KvHook | None = None,
        clock: Clock | None = None,
        source: SlabSource | None = None,
    ) -> None:
        """Build the pool and attach the hook.

        Args:
            model: the decoder.
            tokenizer: None to serve token ids only.
            options: sizes and limits.
            hook: fills and drains the pool; a hook that cannot attach is left out.
            clock: for the timings.
            source: keeps the KV of sequences that are longer than their share of the pool
                (`EngineOptions.offload`); the caller closes it, after the engine.

        Raises:
            ConfigError: offload without a source.
        """
        self.options = options or EngineOptions()
        if self.options.share is not None and source is None:
            raise ConfigError(
                "engine: offload (resident_blocks) needs a slab source, for example HostSlabSource"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(tokenizer.eos_ids) if tokenizer else frozenset()
        self._clock = clock or SystemClock()
        self._source = source
        self._runner = BatchRunner(model, self.options, hook, self._clock, source)
        self._requests: dict[str, RequestState] = {}
        self._mailboxes: dict[str, deque[TokenEvent]] = {}
        self._num_added = 0
        reuse = self.options.reuse
        self._chunk_space = (
            None if reuse is None else chunk_space_of(model, reuse, self.options.block_tokens)
        )

    @property
    def pool(self) -> KvPool:
        """The KV pool."""
        return self._runner.pool

    @property
    def stats(self) -> EngineStats:
        """Counters over the engine's life."""
        return self._runner.stats

    @property
    def sparse_stats(self) -> SparseStats | None:
        """What sparse attention read and left out; None without it."""
        return self._runner.sparse_stats

    @property
    def promises(self) -> Promises | None:
        """What certificates came to (`SparseOptions.certificate`); None without one."""
        return self._runner.promises

    @property
    def hook_stats(self) -> HookStats:
        """What the hook was asked for and gave."""
        return self._runner.hook.stats

    @property
    def offloads(self) -> OffloadDesk:
        """The sequences that are longer than their share of the pool."""
        return self._runner.offloads

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to do."""
        return bool(self._requests)

    @property
    def chunk_space(self) -> ChunkSpace:
        """Where this engine's chunks mean the same.

        Raises:
            ConfigError: it reuses none (`EngineOptions.reuse`).
        """
        if self._chunk_space is None:
            raise ConfigError("engine: no chunks are reused; give EngineOptions.reuse")
        return self._chunk_space

    def chunk(self, content: str | Sequence[int]) -> Chunk:
        """A chunk for the prompts of this engine: text, or token ids.

        Raises:
            ConfigError: the engine reuses none.
            InvalidArgumentError: no tokens, more than the model has positions, or one outside its
                vocabulary.
        """
        space = self.chunk_space
        if isinstance(content, str) and self._tokenizer is not None:
            content = self._tokenizer.encode_plain(content)
        tokens = self._tokenize(content)
        self._check_tokens(tokens)
        return Chunk(tuple(tokens), space)

    # Requests

    def add_request(
        self,
        prompt: str | Sequence[int] | SegmentedPrompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> str:
        """Queue a request; it starts with the next `step`.

        Args:
            prompt: text, token ids (then nothing is added to them), or segments with chunks whose
                KV is reused.
            params: greedy by default.
            request_id: unique among unfinished requests, without `#`, which begins the names of
                samples and chunks; one is made up when None.

        Returns:
            The request's id.

        Raises:
            InvalidArgumentError: an empty prompt, one that does not fit the model or the pool, a
                token outside the vocabulary, more samples than the batch holds, an id in use or
                with a `#`, or chunks of another model, sink prefix or block size.
            ConfigError: chunks, in an engine that reuses none.
        """
        params = params or SamplingParams()
        tokens, span = self._read_prompt(prompt)
        max_length = self._check_fits(tokens, params)
        request_id = request_id if request_id is not None else f"request-{self._num_added}"
        if request_id in self._requests or "#" in request_id:
            why = "has a #" if "#" in request_id else "is in use"
            raise InvalidArgumentError(f"request id {request_id!r} {why}")
        sequence = TokenSequence(
            request_id=request_id,
            index=0,
            arrival=(self._num_added, 0),
            params=params,
            tokens=tokens,
            num_prompt=len(tokens),
            max_length=max_length,
            block_tokens=self.options.block_tokens,
            num_forks=params.n - 1,
            blend=span,
        )
        share = self.options.share
        if share is not None and self._is_long(max_length):
            sequence.resident_blocks = share.resident_blocks
            sequence.max_chunk_tokens = share.max_chunk_tokens(sequence.block_tokens)
        if span is not None:
            self._check_room(sequence, span)
        if params.repetition_penalty != 1.0:
            sequence.track_seen(self._model.config.vocab_size)
        request = RequestState(
            id=request_id, params=params, prompt=tuple(tokens), added_us=self._clock.now_us()
        )
        request.samples.append(self._new_sample(sequence))
        self._num_added += 1
        self._requests[request_id] = request
        self._runner.submit(sequence)
        return request_id

    def abort(self, request_id: str) -> RequestResult | None:
        """End a request now; its blocks go back.

        Returns:
            What it had produced, or None when there is no such unfinished request.
        """
        request = self._requests.pop(request_id, None)
        self._mailboxes.pop(request_id, None)
        if request is None:
            return None
        request.ended_us = self._clock.now_us()
        for item in request.samples:
            if item.finish_reason is None:
                item.finish_reason = FinishReason.ABORTED
                self._runner.retire(item.sequence)
        return request.result()

    def generate(
        self,
        prompt: str | Sequence[int] | SegmentedPrompt,
        params: SamplingParams | None = None,
    ) -> Iterator[TokenEvent]:
        """Stream one request's events; other requests advance with it.

        Closing the iterator early aborts the request.

        Raises:
            InvalidArgumentError: see `add_request`; raised here, not at the first event.
        """
        request_id = self.add_request(prompt, params)
        self._mailboxes[request_id] = deque()
        return self._stream(request_id)

    def _stream(self, request_id: str) -> Iterator[TokenEvent]:
        mailbox = self._mailboxes[request_id]
        try:
            while mailbox or request_id in self._requests:
                if not mailbox:
                    self.step()
                while mailbox:
                    yield mailbox.popleft()
        finally:
            self._mailboxes.pop(request_id, None)
            self.abort(request_id)

    def generate_all(
        self,
        prompts: Sequence[str | Sequence[int] | SegmentedPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestResult]:
        """Run requests together and return their results, in order.

        Args:
            prompts: texts or token ids.
            params: for all, or one for each.

        Raises:
            InvalidArgumentError: see `add_request`; then none of them runs.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidArgumentError(f"{len(prompts)} prompts, {len(params)} parameters")
        request_ids: list[str] = []
        results: dict[str, RequestResult] = {}
        try:
            for prompt, one in zip(prompts, params, strict=True):
                request_ids.append(self.add_request(prompt, one))
            while any(request_id in self._requests for request_id in request_ids):
                done = (event.result for event in self.step())
                results.update({result.request_id: result for result in done if result})
        finally:
            for request_id in request_ids:
                self.abort(request_id)
        return [results[request_id] for request_id in request_ids]

    def reset_cache(self) -> int:
        """Empty the pool's prefix cache; running requests keep their blocks.

        Returns:
            Number of blocks that can no longer be found.
        """
        return self.pool.reset()

    def close(self) -> None:
        """Abort everything. Idempotent."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self.pool.drain()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def check_integrity(self) -> list[str]:
        """Every violated invariant of pool and sequences, in words; empty when sound."""
        return self._runner.check_integrity()

    def step(self) -> list[TokenEvent]:
        """Compute one batch; blocks for one forward pass (and the hook's loads).

        Returns:
            The new tokens, oldest request first; empty when no prompt was finished, nothing is
            left to do, or the hook holds the blocks that are needed.

        Raises:
            CapacityError: the hook did not give its blocks back for `stall_timeout_s`.
            CorruptionError: the model produced no finite logits.
        """
        events = [self._emit(sequence, token_id) for sequence, token_id in self._runner.step()]
        failed, self._runner.offloads.failed = self._runner.offloads.failed, []
        events += [self._emit_failure(sequence, why) for sequence, why in failed]
        for event in events:
            mailbox = self._mailboxes.get(event.request_id)
            if mailbox is not None:
                mailbox.append(event)
        return events

    def _emit(self, sequence: TokenSequence, token_id: int) -> TokenEvent:
        request = self._requests[sequence.request_id]
        if sequence.index == len(request.samples):
            request.samples.append(self._new_sample(sequence))
        state = request.samples[sequence.index]
        sequence.append(token_id)
        state.last_us = self._clock.now_us()
        if state.first_us is None:
            state.first_us = state.last_us
        state.finish_reason = self._finish_reason(sequence, token_id)
        text = _new_text(state, token_id)
        if state.finish_reason is not None:
            self._runner.retire(sequence)
        if request.is_finished:
            del self._requests[request.id]
        return TokenEvent(
            request_id=request.id,
            index=sequence.index,
            token_id=token_id,
            text=text,
            finish_reason=state.finish_reason,
            result=request.result() if request.is_finished else None,
        )

    def _emit_failure(self, sequence: TokenSequence, why: str) -> TokenEvent:
        """End a request that the engine cannot go on with; it has one sample."""
        request = self._requests.pop(sequence.request_id)
        (state,) = request.samples
        state.finish_reason = FinishReason.FAILED
        request.error, request.ended_us = why, self._clock.now_us()
        self._runner.retire(sequence)
        return TokenEvent(
            request_id=request.id,
            index=sequence.index,
            token_id=-1,
            text=state.stream.flush() if state.stream else "",
            finish_reason=state.finish_reason,
            result=request.result(),
        )

    def _finish_reason(self, sequence: TokenSequence, token_id: int) -> FinishReason | None:
        params = sequence.params
        is_eos = token_id in self._eos_ids and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.num_tokens >= sequence.max_length else None

    # Checks and small parts

    def _tokenize(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            raise InvalidArgumentError("this engine has no tokenizer: give the prompt as token ids")
        return self._tokenizer.encode(prompt)

    def _read_prompt(
        self, prompt: str | Sequence[int] | SegmentedPrompt
    ) -> tuple[list[int], BlendSpan | None]:
        """Tokens, and where chunks stand in them."""
        if not isinstance(prompt, SegmentedPrompt):
            return self._tokenize(prompt), None
        span = None
        if prompt.spans:
            prompt.check_space(self.chunk_space)
            space = self.chunk_space
            span = span_of(prompt, space.block_tokens, space.sink_tokens)
        return list(prompt.token_ids), span

    def _check_room(self, sequence: TokenSequence, span: BlendSpan) -> None:
        """Compute in full what could never be blended."""
        blends = self._runner.blends
        assert blends is not None
        num_blocks = sequence.num_blocks_for(sequence.max_length - 1) + span.num_extra_blocks
        if sequence.is_offloaded:
            blends.give_up(sequence, FallbackReason.OFFLOADED)
        elif num_blocks > self.options.num_blocks:
            blends.give_up(sequence, FallbackReason.NO_ROOM)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        vocab_size = self._model.config.vocab_size
        if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
            raise InvalidArgumentError(f"token ids must be 0 to {vocab_size - 1}")

    def _check_fits(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """Raise for a prompt that cannot be served; returns the sequence's greatest length."""
        config, options = self._model.config, self.options
        if not tokens:
            raise InvalidArgumentError("the prompt is empty")
        self._check_tokens(tokens)
        if len(tokens) >= config.max_context_tokens:
            raise InvalidArgumentError(
                f"the prompt has {len(tokens)} tokens, the model takes "
                f"{config.max_context_tokens}, the answer included; shorten it"
            )
        max_length = min(len(tokens) + params.max_tokens, config.max_context_tokens)
        num_blocks = -(-(max_length - 1) // options.block_tokens)
        is_long = self._is_long(max_length)
        if is_long and params.n > 1:
            raise InvalidArgumentError(
                f"n is {params.n}: {len(tokens)} prompt tokens and up to {params.max_tokens} new "
                "ones pass a sequence's share of the pool (resident_blocks), where samples cannot "
                "be split off; ask for them one by one"
            )
        if num_blocks > options.num_blocks and not is_long:
            raise InvalidArgumentError(
                f"{len(tokens)} prompt tokens and up to {params.max_tokens} new ones need "
                f"{num_blocks} KV blocks, the pool has {options.num_blocks}; shorten the prompt, "
                "lower max_tokens, raise num_blocks or set offload"
            )
        if is_long and num_blocks > options.num_blocks:
            self._check_source(max_length)
        if params.n > options.scheduler.max_sequences:
            raise InvalidArgumentError(
                f"n is {params.n}, the batch holds {options.scheduler.max_sequences} sequences"
            )
        return max_length

    def _check_source(self, max_length: int) -> None:
        """Refuse what the pool cannot hold and the source, were it empty, could not either."""
        capacity_bytes = self._source.capacity_bytes if self._source is not None else None
        layout = self.pool.layout
        block_bytes = layout.num_layers * layout.slab_bytes
        num_bytes = (max_length - 1) // layout.block_tokens * block_bytes
        if capacity_bytes is not None and num_bytes > capacity_bytes:
            raise InvalidArgumentError(
                f"the KV of {max_length} tokens, the answer included, is {num_bytes} bytes; the "
                f"slab source holds {capacity_bytes} (its capacity) and the pool "
                f"{self.options.num_blocks * block_bytes}; shorten the prompt, lower max_tokens, "
                "raise capacity_bytes or num_blocks"
            )

    def _is_long(self, max_length: int) -> bool:
        """Whether a sequence of this length does not fit its share of the pool."""
        share, size = self.options.share, self.options.block_tokens
        return share is not None and -(-(max_length - 1) // size) > share.resident_blocks

    def _new_sample(self, sequence: TokenSequence) -> SampleState:
        stream = self._tokenizer.stream() if self._tokenizer else None
        return SampleState(sequence=sequence, stream=stream)


def _new_text(state: SampleState, token_id: int) -> str:
    if state.stream is None:
        return ""
    text = "" if state.finish_reason is FinishReason.STOP else state.stream.push(token_id)
    if state.finish_reason is not None:
        text += state.stream.flush()
    state.text.append(text)
    return text
