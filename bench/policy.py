"""Eviction policies on traces: recompute-seconds saved for each GB of cache, beside the ideal.

Each policy serves the same trace from an empty tier of several sizes, given as fractions of the
trace's *working set*, of which there are two definitions:

    reused      the different blocks that are used more than once: with room for them, and told
                which they are, a cache hits all that can be hit (the default)
    footprint   all different blocks, most of which no cache can ever profit from

The footprint grows with the length of the trace, whatever is reused in it; it is what cache studies
call working set size. The *ideal* is a tier with room for everything: what is saved there, divided
by a size, is what no policy of that size can exceed. At a third of the footprint LRU comes within
a few per cent of it on chat traces: no policy has much to win there.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.table import Table

from ucm.admission import Admission, AlwaysAdmit, SecondTouch
from ucm.config import POLICY_NAMES
from ucm.errors import ConfigError
from ucm.eviction_gdsf import DEFAULT_ATTENTION_TOKENS, CostModel
from ucm.eviction_policies import make_policy

from .policy_replay import MODELS, Replay, Step, count_reused, replay, replay_ideal, steps_of
from .synthetic import KINDS, SyntheticOptions, synthesize
from .traces import MOONCAKE_BUCKET_NS, TraceRequest, read_mooncake, smear

ADMISSIONS = ("always", "second-touch")
WORKING_SETS = {
    "reused": "different blocks that the trace uses more than once",
    "footprint": "different blocks of the trace",
}
_BYTES_PER_GB = 1e9

Progress = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBenchOptions:
    """What to simulate."""

    trace_path: Path | None = None
    """A Mooncake trace; None makes one, of `synthetic`'s kind."""
    synthetic: SyntheticOptions = field(default_factory=SyntheticOptions)
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3)
    """Sizes of the tier, as shares of the working set; two, for a run of less than a minute."""
    working_set: str = "reused"
    """What fractions are of: a name in `WORKING_SETS`."""
    policies: tuple[str, ...] = POLICY_NAMES
    admission: str = "always"
    """What is stored at all: one of `ADMISSIONS`."""
    model: str = "smollm2-135m"
    """What a hit saves and a block weighs: a name in `MODELS`."""
    attention_tokens: float = DEFAULT_ATTENTION_TOKENS
    """tree-GDSF's setting: the daemon's default, which is *not* taken from `model`."""
    seed: int = 0
    """Of the smearing of arrivals."""
    smear: bool = True
    """Whether to spread the arrivals that a trace file has rounded down to three seconds."""
    num_requests: int | None = None
    """Only the first requests of the trace."""
    processes: int | None = None
    """Replays at once; one for each core when None."""

    def __post_init__(self) -> None:
        for what, value, known in (
            ("admission", self.admission, ADMISSIONS),
            ("working set", self.working_set, tuple(WORKING_SETS)),
            ("model", self.model, tuple(MODELS)),
            ("kind of trace", self.synthetic.kind, KINDS),
            *(("policy", policy, POLICY_NAMES) for policy in self.policies),
        ):
            if value not in known:
                raise ConfigError(f"no {what} {value!r}: one of {', '.join(known)} is expected")
        if not self.fractions:
            raise ConfigError("--size: name at least one share of the working set")
        for share in self.fractions:
            if not 0 < share <= 1:
                raise ConfigError(
                    f"--size {share:g}: a share of the working set, above 0 and up to 1"
                )

    def quick(self) -> PolicyBenchOptions:
        """The first third of the trace: a third of the time."""
        return replace(self, num_requests=min(4000, self.num_requests or 4000))


@dataclass(frozen=True, slots=True)
class _Job:
    policy: str
    admission: str
    fraction: float


def load_requests(options: PolicyBenchOptions) -> list[TraceRequest]:
    """The trace that `options` name, in order of arrival.

    Raises:
        ConfigError: the trace cannot be read, or is empty.
    """
    if options.trace_path is None:
        requests = synthesize(options.synthetic)
    else:
        requests = read_mooncake(options.trace_path)
        if options.smear:
            requests = smear(requests, options.seed, MOONCAKE_BUCKET_NS)
    if not any(request.block_ids for request in requests):
        raise ConfigError(f"the trace {options.trace_path} has no blocks")
    return requests[: options.num_requests]


def run_policy_bench(options: PolicyBenchOptions, progress: Progress) -> Result:
    """Replay the trace under every policy and size.

    Args:
        options: what to simulate.
        progress: gets a line of text after each replay.
    """
    started = time.perf_counter()
    requests = load_requests(options)
    steps = steps_of(requests)
    ideal, num_reused = replay_ideal(steps), count_reused(steps)
    block_tokens = requests[0].block_tokens
    num_base = ideal.num_written if options.working_set == "footprint" else num_reused
    jobs = [
        _Job(name, options.admission, f) for f in options.fractions for name in options.policies
    ]
    middle = min(options.fractions, key=lambda fraction: abs(fraction - 0.1))
    others = [_Job(options.policies[0], each, middle) for each in ADMISSIONS]
    replays = _replay_all(options, num_base, list(dict.fromkeys(jobs + others)), progress)

    def figures(outcome: Replay, fraction: float) -> Result:
        model = MODELS[options.model]
        block_gb = block_tokens * model.kv_bytes_per_token / _BYTES_PER_GB
        capacity_gb = _capacity(fraction, num_base) * block_gb
        saved_s = outcome.saved_s(model, block_tokens)
        return {
            "saved_s_per_gb": saved_s / capacity_gb,
            "hit_ratio": outcome.hit_ratio,
            "saved_share_of_ideal": saved_s / max(ideal.saved_s(model, block_tokens), 1e-12),
            "written_gb": outcome.num_written * block_gb,
        }

    tables: Result = {name: {} for name in options.policies}
    for job in jobs:
        tables[job.policy][str(job.fraction)] = figures(replays[job], job.fraction)
    ideals = {str(f): figures(ideal, f) for f in options.fractions}
    return {
        "name": "policy",
        "trace": _describe(options, requests, ideal) | {"reused_blocks": num_reused},
        "working_set": {
            "definition": options.working_set,
            "fractions_of": WORKING_SETS[options.working_set],
            "blocks": num_base,
        },
        "parameters": _parameters(options),
        "policies": tables,
        "ideal": ideals,
        "gain_over_lru": _gains(tables | {"ideal": ideals}),
        "admission": {
            job.admission: {str(middle): figures(replays[job], middle)} for job in others
        },
        "seconds": time.perf_counter() - started,
    }


def policy_bench_table(result: Mapping[str, Any]) -> Table:
    """The result for people: seconds saved for each GB, against LRU and of the ideal."""
    trace = result["trace"]
    counts = (
        f"{trace['blocks']} block references, {trace['unique_blocks']} blocks, "
        f"{trace['reused_blocks']} of them used again"
    )
    table = Table(title=f"{trace['name']}: {counts}")
    table.add_column(f"of {result['working_set']['definition']}", justify="right")
    for name in result["policies"]:
        table.add_column(f"{name}\ns/GB  hits  vs LRU", justify="right")
    table.add_column("ideal\ns/GB  hits  vs LRU", justify="right")
    for fraction, ideal in result["ideal"].items():
        cells = [f"{float(fraction):.0%}"]
        columns = [(name, sizes[fraction]) for name, sizes in result["policies"].items()]
        for name, cell in [*columns, ("ideal", ideal)]:
            gain = result["gain_over_lru"].get(name, {}).get(fraction)
            versus = "" if gain is None else f"  {gain:+.1%}"
            cells.append(f"{cell['saved_s_per_gb']:.1f}  {cell['hit_ratio']:.3f}{versus}")
        table.add_row(*cells)
    for name, sizes in result["admission"].items():
        for fraction, cell in sizes.items():
            table.caption = (
                (f"{table.caption}\n" if table.caption else "")
                + f"admission {name}, {float(fraction):.0%}: {cell['written_gb']:.1f} GB written, "
                f"{cell['saved_s_per_gb']:.1f} s/GB saved"
            )
    return table


def _capacity(fraction: float, num_base: int) -> int:
    return max(1, round(fraction * num_base))


def _admission(name: str, capacity: int) -> Admission:
    return AlwaysAdmit() if name == "always" else SecondTouch(capacity)


_worker_steps: list[Step] = []
"""The trace of this process of the pool."""


def _start_worker(options: PolicyBenchOptions) -> None:
    _worker_steps[:] = steps_of(load_requests(options))


def _run_job(job: _Job, capacity: int, cost: CostModel) -> Replay:
    policy = make_policy(job.policy, cost=cost, capacity=capacity)
    return replay(_worker_steps, policy, _admission(job.admission, capacity), capacity)


def _replay_all(
    options: PolicyBenchOptions, num_base: int, jobs: Sequence[_Job], progress: Progress
) -> dict[_Job, Replay]:
    cost = CostModel(
        attention_tokens=options.attention_tokens,
        block_tokens=load_requests(options)[0].block_tokens,
    )
    replays: dict[_Job, Replay] = {}
    with ProcessPoolExecutor(
        min(len(jobs), options.processes or len(os.sched_getaffinity(0))),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(options,),
    ) as pool:
        futures = {
            job: pool.submit(_run_job, job, _capacity(job.fraction, num_base), cost) for job in jobs
        }
        for job, future in futures.items():
            replays[job] = future.result()
            hit_ratio = replays[job].hit_ratio
            progress(f"{job.policy}, {job.admission}, {job.fraction:.0%}: {hit_ratio:.4f} hits")
    return replays


def _gains(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Result:
    """Seconds saved against LRU, by policy and size."""
    lru = tables.get("lru", {})
    return {
        name: {
            fraction: cell["saved_s_per_gb"] / max(lru[fraction]["saved_s_per_gb"], 1e-12) - 1
            for fraction, cell in sizes.items()
        }
        for name, sizes in tables.items()
        if lru and name != "lru"
    }


def _describe(
    options: PolicyBenchOptions, requests: Sequence[TraceRequest], ideal: Replay
) -> Result:
    described: Result = {
        "name": options.trace_path.name if options.trace_path else options.synthetic.kind,
        "requests": len(requests),
        "blocks": ideal.num_blocks,
        "unique_blocks": ideal.num_written,
        "block_tokens": requests[0].block_tokens,
        "duration_s": (requests[-1].t_ns - requests[0].t_ns) / 1e9,
    }
    if options.trace_path is None:
        return described | {"seed": options.synthetic.seed}
    digest = hashlib.sha256(options.trace_path.read_bytes()).hexdigest()
    return described | {"sha256": digest, "smear": options.smear, "seed": options.seed}


def _parameters(options: PolicyBenchOptions) -> Result:
    model = MODELS[options.model]
    return {
        "model": model.name,
        "model_attention_tokens": model.attention_tokens,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "flops_per_s": model.flops_per_s,
        "policy_attention_tokens": options.attention_tokens,
        "admission": options.admission,
    }
