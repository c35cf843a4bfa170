"""The demo's parts: what its prompts share, what its audit catches, how its figures are made."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.bench import demo
from ucm.bench.demo import RUN_NAMES, DemoOptions, DemoRecord, RunRecord, filesystem_of, summarise
from ucm.bench.demo_audit import AuditHook
from ucm.bench.demo_documents import SYSTEM_PROMPT
from ucm.bench.demo_processes import ChildProcess, start_daemon
from ucm.bench.demo_workload import PROMPTS
from ucm.connectors.reference import ReferenceConnector
from ucm.connectors.session import CacheSession, SessionOptions
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.sampling import SamplingParams
from ucm.errors import ConfigError, TierUnavailableError
from ucm.hashing import NamespaceSpec
from ucm.layout import KvDtype, KvLayout
from ucm.load_decision import LoadKind, forced
from ucm.testing.fake_cache import FakeCache
from ucm.testing.fake_model import FakeModel
from ucm.testing.models import tiny_tokenizer

QUICK, FULL = DemoOptions(model=Path(), is_quick=True), DemoOptions(model=Path())


def text_of(index: int, num_chapters: int) -> str:
    return "".join(message["content"] for message in PROMPTS[index].messages(num_chapters))


@pytest.mark.parametrize("options", [QUICK, FULL], ids=["quick", "full"])
def test_contexts_share_only_the_system_prompt(options: DemoOptions) -> None:
    texts = [text_of(index, options.num_chapters) for index in range(len(PROMPTS))]
    assert len(texts) >= 3
    for one, other in itertools.combinations(texts, 2):
        shared = next(
            i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1
        )
        # Every chapter begins with this word, then its own title.
        assert len(SYSTEM_PROMPT) <= shared <= len(SYSTEM_PROMPT) + len("Chapter: The ")


def test_every_prompt_uses_distinct_chapters_and_the_answer_is_last() -> None:
    for prompt in PROMPTS:
        assert len(set(prompt.chapters)) == len(prompt.chapters) == FULL.num_chapters
    assert len({prompt.chapters[-1] for prompt in PROMPTS}) == len(PROMPTS)


def test_full_contexts_are_three_times_the_quick_ones() -> None:
    lengths = [
        len(tiny_tokenizer().encode(text_of(0, options.num_chapters)).ids)
        for options in (QUICK, FULL)
    ]
    assert lengths[1] > 2.5 * lengths[0]


def test_filesystem_of_the_longest_mount() -> None:
    assert filesystem_of(Path("/proc/self")) == "proc"
    assert filesystem_of(Path("/no/such/place")) == filesystem_of(Path("/"))


# The audit


@pytest.fixture
def cache() -> Iterator[FakeCache]:
    fake = FakeCache()
    yield fake
    fake.hang.set()


def run_audited(cache: FakeCache, hooks: list[AuditHook]) -> AuditHook:
    """One prompt through a fresh pool; the audit hook is kept between calls."""
    model = FakeModel()
    layout = KvLayout(
        num_layers=model.config.num_layers,
        num_kv_heads=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
        block_tokens=4,
        dtype=KvDtype.FLOAT32,
    )
    if not hooks:
        spec = NamespaceSpec(layout=layout, model_id="fake", weights_digest="0")
        session = CacheSession(
            lambda: cache, spec, SessionOptions(decide=forced(LoadKind.LOAD_ALL))
        )
        session.connect(5.0)
        hooks.append(AuditHook(ReferenceConnector(session), lambda _id: None))
    hook = hooks[0]
    hook.begin(is_enabled=True)
    with Engine(model, None, EngineOptions(num_blocks=64, block_tokens=4), hook) as engine:
        engine.generate_all([list(range(41))], SamplingParams(max_tokens=2))
        hook.connector.session.flush(5.0)
    return hook


def test_the_audit_compares_loaded_blocks_with_computed_ones(cache: FakeCache) -> None:
    hooks: list[AuditHook] = []
    audit = run_audited(cache, hooks).audit
    assert (audit.offered_blocks, audit.checked_blocks) == (10, 0)
    audit = run_audited(cache, hooks).audit
    assert (audit.checked_blocks, audit.wrong_blocks) == (10, 0)
    assert max(audit.stall_s_by_request.values()) > 0.0
    hooks[0].connector.session.close()


def test_the_audit_finds_a_block_under_anothers_name(cache: FakeCache) -> None:
    """Its own checksums are right, so nothing else could notice."""
    hooks: list[AuditHook] = []
    run_audited(cache, hooks)
    first, second = list(cache.blocks)[3:5]
    cache.blocks[first], cache.blocks[second] = cache.blocks[second], cache.blocks[first]
    hook = run_audited(cache, hooks)
    assert hook.connector.session.stats().wrong_bytes == 0
    assert (hook.audit.checked_blocks, hook.audit.wrong_blocks) == (10, 2)
    hook.connector.session.close()


def test_a_switched_off_audit_hook_is_no_cache(cache: FakeCache) -> None:
    hooks: list[AuditHook] = []
    hook = run_audited(cache, hooks)
    hook.begin(is_enabled=False)
    released: list[bool] = []
    assert hook.match(list(range(41)), 0) == 0
    from ucm.engine.hook import StoreRequest
    from ucm.engine.layer_clock import LayerClock

    hook.store(
        StoreRequest(
            request_id="r",
            token_ids=[1] * 4,
            first_block=0,
            block_ids=[0],
            release=lambda: released.append(True),
            layers=LayerClock.finished(2),
        )
    )
    assert released == [True]
    hook.connector.session.close()


# Figures


def run_record(token_ids: list[int], wrong_slab_bytes: int = 0, wrong_blocks: int = 0) -> RunRecord:
    answers = [
        {"text": " yes ", "token_ids": token_ids, "ttft_s": 0.1 * n, "tpot_s": 0.01}
        for n in (3, 1, 2)
    ]
    stats = {
        "hit_tokens_by_tier": {"nvme": 64},
        "loaded_bytes": 10,
        "stored_bytes": 0,
        "dropped_blocks": 0,
        "wrong_bytes": wrong_slab_bytes,
        "failures": 0,
    }
    totals = {
        "stats": stats,
        "checked_blocks": 2,
        "wrong_block_bytes": wrong_blocks * 100,
        "stall_s_max": 0.25,
    }
    return RunRecord(answers, totals)


def record_of(**changed: RunRecord) -> DemoRecord:
    ready = {"model": "m", "block_tokens": 32, "context_tokens": [10, 30, 20], "threads": 2}
    runs = {name: changed.get(name, run_record([1, 2])) for name in RUN_NAMES}
    return DemoRecord(FULL, "ext4", ready, runs)


def test_summary_of_a_sound_demo() -> None:
    summary = summarise(record_of())
    assert summary["identical_tokens"]
    assert summary["wrong_bytes"] == 0
    assert (summary["context_tokens"], summary["block_tokens"]) == (20, 32)
    assert list(summary["runs"]) == list(RUN_NAMES)
    warm = summary["runs"]["warm"]
    assert (warm["ttft_ms_p50"], warm["tpot_ms_p50"], warm["max_stall_ms"]) == (200.0, 10.0, 250.0)
    assert warm["hit_tokens_by_tier"] == {"memory": 0, "nvme": 64}
    assert summary["answers"][0] == {"question": PROMPTS[0].question, "answer": "yes"}


@pytest.mark.parametrize("name", RUN_NAMES[1:])
def test_one_different_token_in_any_run_shows(name: str) -> None:
    assert not summarise(record_of(**{name: run_record([1, 3])}))["identical_tokens"]


def test_wrong_bytes_are_those_of_checksums_and_of_the_audit() -> None:
    summary = summarise(record_of(warm=run_record([1, 2], 7), restart=run_record([1, 2], 0, 2)))
    assert summary["wrong_bytes"] == 207


# Processes


@pytest.mark.timeout(90)
def test_a_child_that_ends_early_shows_the_end_of_its_log(tmp_path: Path) -> None:
    child = ChildProcess("engine", ["ucm.bench.demo_engine", "{}"], tmp_path / "log")
    with pytest.raises(TierUnavailableError, match="the engine ended with 1"):
        child.next_event(60.0)
    child.close()


def test_a_file_is_no_folder_for_a_demo(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = "file: File exists; name another with --folder"
    with pytest.raises(ConfigError, match=said), demo._demo_folder(tmp_path / "file"):
        pass


def test_a_daemon_that_cannot_start_says_why(tmp_path: Path) -> None:
    too_long = tmp_path / ("s" * 120)
    with pytest.raises(ConfigError, match="socket path"):
        start_daemon(too_long, tmp_path / "store", tmp_path / "log")
