"""The demo's engine: a process of its own, told what to do over a pipe.

    standard input    one JSON object a line: {"op": "run" | "reconnect" | "flush", ...}
    standard output   one JSON object a line: {"event": "ready" | "prompt" | "load" | "token" | ...}

Started as `python -m ucm.bench.demo_engine SETTINGS`, SETTINGS being a JSON object with the fields
of `EngineSettings`. It ends when its standard input does.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping

import torch

from ucm.client import connect
from ucm.connectors.cached_engine import cost_model_for
from ucm.connectors.reference import ReferenceConnector, kv_dtype, namespace_spec
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.connectors.session_stats import SessionStats
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import load_model
from ucm.engine.request import RequestResult
from ucm.engine.sampling import SamplingParams
from ucm.errors import UcmError
from ucm.load_decision import LoadKind, forced

from .demo_audit import AuditHook
from .demo_processes import EngineSettings
from .demo_workload import PROMPTS

NUM_POOL_BLOCKS = 384
WARM_UP_TOKENS = 600
CONNECT_TIMEOUT_S = 20.0
FLUSH_TIMEOUT_S = 120.0


class DemoEngine:
    """The engine with its connector, and the prompts that it answers."""

    def __init__(self, settings: EngineSettings) -> None:
        loaded = load_model(settings.model, settings.dtype)
        options = EngineOptions(num_blocks=NUM_POOL_BLOCKS)
        spec = namespace_spec(
            loaded.config,
            weights_digest=loaded.weights_digest,
            dtype=kv_dtype(settings.dtype),
            block_tokens=options.block_tokens,
        )
        self._settings = settings
        self._model_name = loaded.config.name
        self._block_tokens = options.block_tokens
        self._session = CacheSession(
            lambda: connect(settings.socket_path, timeout_s=settings.deadline_s),
            spec,
            # All that is there is loaded, also where computing is as fast, so that runs compare.
            SessionOptions(deadline_s=settings.deadline_s, decide=forced(LoadKind.LOAD_ALL)),
            model=cost_model_for(options),
        )
        try:
            self._session.connect(CONNECT_TIMEOUT_S)
        except UcmError:
            self._session.close()
            raise
        self._hook = AuditHook(ReferenceConnector(self._session), self._say_load)
        self._engine = Engine(loaded.model, loaded.tokenizer, options, self._hook)
        self._prompts = [
            loaded.tokenizer.encode(
                loaded.tokenizer.apply_chat_template(prompt.messages(settings.num_chapters))
            )
            for prompt in PROMPTS
        ]

    def warm_up(self) -> None:
        """Have torch allocate and tune what it does at the first calls."""
        self._hook.begin(is_enabled=False)
        for prompt in (self._prompts[0][:WARM_UP_TOKENS], self._prompts[0][-40:]):
            self._engine.generate_all([prompt], SamplingParams(max_tokens=3))

    def say_ready(self) -> None:
        """Describe what is going to be run."""
        say(
            "ready",
            model=self._model_name,
            block_tokens=self._block_tokens,
            context_tokens=[len(prompt) for prompt in self._prompts],
            threads=torch.get_num_threads(),
        )

    def handle(self, command: Mapping[str, object]) -> None:
        """Carry out one command of the parent."""
        if command["op"] == "run":
            self._run(is_cached=bool(command["cache"]))
        elif command["op"] == "reconnect":
            say("reconnected", ok=self._session.ensure_connected(CONNECT_TIMEOUT_S))
        elif command["op"] == "flush":
            say("flushed", ok=self._session.flush(FLUSH_TIMEOUT_S))
        else:
            raise ValueError(f"unknown command {command}")

    def close(self) -> None:
        """End the engine and the session."""
        self._engine.close()
        self._session.close()

    def _run(self, *, is_cached: bool) -> None:
        """Answer every prompt, one after the other, each on an empty pool."""
        before = self._session.stats()
        self._hook.begin(is_enabled=is_cached)
        for index in range(len(self._prompts)):
            self._engine.reset_cache()
            self._answer(index)
        audit = self._hook.audit
        say(
            "run_done",
            stats=_difference(before, self._session.stats()),
            offered_blocks=audit.offered_blocks,
            checked_blocks=audit.checked_blocks,
            wrong_blocks=audit.wrong_blocks,
            wrong_block_bytes=audit.wrong_blocks * self._block_bytes(),
            stall_s_max=max(audit.stall_s_by_request.values(), default=0.0),
        )

    def _block_bytes(self) -> int:
        layout = self._session.spec.layout
        return layout.num_layers * layout.slab_bytes

    def _answer(self, index: int) -> None:
        say("prompt", index=index)
        params = SamplingParams(max_tokens=self._settings.max_tokens)
        for event in self._engine.generate(self._prompts[index], params):
            if event.result is None:
                say("token")
            else:
                say("answer", index=index, **_figures(event.result))

    def _say_load(self, _request_id: str) -> None:
        say("load")


def _figures(result: RequestResult) -> dict[str, object]:
    return {
        "text": result.outputs[0].text,
        "token_ids": result.outputs[0].token_ids,
        "ttft_s": result.timings.ttft_s,
        "tpot_s": result.timings.tpot_s,
        "hook_tokens": result.timings.num_hook_tokens,
    }


def _difference(before: SessionStats, after: SessionStats) -> dict[str, object]:
    """What was counted in between; a maximum has no difference and is left out."""
    earlier, later = dataclasses.asdict(before), dataclasses.asdict(after)
    hits = {
        str(tier): count - earlier["hit_tokens_by_tier"].get(tier, 0)
        for tier, count in later.pop("hit_tokens_by_tier").items()
    }
    del later["stall_s_max"]
    return {name: value - earlier[name] for name, value in later.items()} | {
        "hit_tokens_by_tier": hits
    }


def say(event: str, **fields: object) -> None:
    """Send one event to the parent."""
    print(json.dumps({"event": event, **fields}), flush=True)


def main() -> int:
    """Entry point of the process."""
    logging.basicConfig(level=os.environ.get("UCM_DEMO_LOG", "WARNING"), stream=sys.stderr)
    try:
        engine = DemoEngine(EngineSettings(**json.loads(sys.argv[1])))
    except UcmError as error:
        say("error", kind=type(error).__name__, message=str(error))
        return 1
    try:
        engine.warm_up()
        engine.say_ready()
        for line in sys.stdin:
            engine.handle(json.loads(line))
    except UcmError as error:
        say("error", kind=type(error).__name__, message=str(error))
        return 1
    finally:
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
