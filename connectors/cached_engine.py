"""The reference engine and a cache, put together: what a program needs before its first request.

    with open_engine(load_model(path), lambda: connect(socket, timeout_s=2.0)) as cached:
        cached.engine.generate(...)
        cached.flush(30.0)

Whoever names a cache wants it: one that cannot be reached is an error here, when the engine is
opened. Afterwards it fails open, as always.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field

from ucm.cost_model import CostModel, CostOptions
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import LoadedModel
from ucm.engine.runner import layout_of
from ucm.sparse.slab_source import SlabSource

from .link import CacheFactory
from .reference import ReferenceConnector, namespace_spec
from .session import CacheSession, SessionOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedEngineOptions:
    """Of the engine, and of its use of the cache."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    session: SessionOptions = field(default_factory=SessionOptions)
    accepts_lossy: bool = False
    """Whether blocks will do that a codec of the cache made smaller: a namespace of its own."""
    connect_timeout_s: float = 10.0
    """How long the cache may take to answer at first."""


class CachedEngine:
    """An engine, with a session where there is a cache. One thread's, as the engine is."""

    def __init__(self, loaded: LoadedModel, engine: Engine, session: CacheSession | None) -> None:
        self.loaded = loaded
        self.engine = engine
        self.session = session

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was computed is stored and durable; False when it is not by then."""
        return self.session is None or self.session.flush(timeout_s)

    def close(self) -> None:
        """End requests and session; what waits to be stored is dropped. Idempotent."""
        self.engine.close()
        if self.session is not None:
            self.session.close()

    def __enter__(self) -> CachedEngine:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def open_engine(
    loaded: LoadedModel,
    factory: CacheFactory | None = None,
    options: CachedEngineOptions | None = None,
    source: SlabSource | None = None,
) -> CachedEngine:
    """An engine over `loaded`, connected; blocks until it is.

    Args:
        loaded: the model.
        factory: makes a connection, for example `lambda: ucm.open(folder)`; None: no cache.
        options: the defaults when None.
        source: see `Engine`; the caller closes it, after this.

    Raises:
        UcmError: why the cache could not be reached in time.
        ConfigError: options that cannot be.
    """
    options = options or CachedEngineOptions()
    with ExitStack() as stack:
        session = None
        if factory is not None:
            session = stack.enter_context(_session(loaded, factory, options))
            session.connect(options.connect_timeout_s)
        hook = ReferenceConnector(session) if session is not None else None
        sizes = _named(options.engine, loaded)
        engine = Engine(loaded.model, loaded.tokenizer, sizes, hook, source=source)
        stack.pop_all()
    return CachedEngine(loaded, engine, session)


def _named(options: EngineOptions, loaded: LoadedModel) -> EngineOptions:
    """Chunks that the engine makes are of these weights, and of no others of the same shape."""
    reuse = options.reuse
    if reuse is None or reuse.model_digest:
        return options
    reuse = dataclasses.replace(reuse, model_digest=loaded.weights_digest)
    return dataclasses.replace(options, reuse=reuse)


def _session(
    loaded: LoadedModel, factory: CacheFactory, options: CachedEngineOptions
) -> CacheSession:
    block_tokens = options.engine.block_tokens
    spec = namespace_spec(
        loaded.config,
        weights_digest=loaded.weights_digest,
        dtype=layout_of(loaded.model, block_tokens).dtype,
        block_tokens=block_tokens,
    )
    spec = dataclasses.replace(spec, accepts_lossy=options.accepts_lossy)
    return CacheSession(factory, spec, options.session, model=cost_model_for(options.engine))


def cost_model_for(options: EngineOptions) -> CostModel:
    """One that knows how much an engine with these options computes in a pass."""
    steps = options.scheduler
    chunk_tokens = min(steps.prefill_chunk_tokens, steps.max_step_tokens)
    return CostModel(CostOptions(chunk_tokens=chunk_tokens, joined_tokens=steps.max_step_tokens))
