"""`ucm generate` in processes of its own: without a cache, in a folder, and with a daemon."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ucm.testing.daemon import short_folder, small_settings, spawned_daemon
from ucm.testing.models import write_tiny_model

PROMPT = "the cache and the layer of the query " * 12

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def run_generate(model: Path, *arguments: str) -> dict[str, Any]:
    """The JSON object of one `ucm generate --json`."""
    command = [sys.executable, "-m", "ucm.cli", "generate", "--json", "--model", str(model)]
    command += ["--prompt", PROMPT, "--max-tokens", "12", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    reply: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reply


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "store"


@pytest.fixture(scope="module")
def cold(model: Path, store: Path) -> dict[str, Any]:
    return run_generate(model, "--cache", str(store))


@pytest.fixture(scope="module")
def warm(model: Path, store: Path, cold: dict[str, Any]) -> dict[str, Any]:
    return run_generate(model, "--cache", str(store))


def test_a_folder_is_a_cache_for_the_next_run(
    model: Path, cold: dict[str, Any], warm: dict[str, Any]
) -> None:
    plain = run_generate(model)
    assert plain["cache"] is None
    assert plain["token_ids"] == cold["token_ids"] == warm["token_ids"]
    assert cold["num_hook_tokens"] == 0
    full_blocks = (plain["num_prompt_tokens"] - 1) // 32 * 32
    assert warm["num_hook_tokens"] == full_blocks > 0
    assert warm["cache"]["hit_tokens_by_tier"] == {"nvme": full_blocks}
    assert warm["cache"]["wrong_bytes"] == 0


def test_a_daemon_serves_what_another_process_stored(model: Path) -> None:
    with short_folder() as folder:
        arguments = small_settings(folder)
        with spawned_daemon(arguments, folder / "log") as daemon:
            cold = run_generate(model, "--cache", str(daemon.socket_path))
            warm = run_generate(model, "--cache", str(daemon.socket_path))
            other = run_generate(model, "--cache", str(daemon.socket_path), "--dtype", "bf16")
    assert cold["token_ids"] == warm["token_ids"]
    assert warm["cache"]["hit_tokens_by_tier"] == {"memory": warm["num_hook_tokens"]}
    assert warm["num_hook_tokens"] > 0
    assert other["num_hook_tokens"] == 0, "another dtype is another namespace"


def test_text_streams_to_standard_output_and_figures_to_standard_error(model: Path) -> None:
    command = [sys.executable, "-m", "ucm.cli", "generate", "--model", str(model), "--raw"]
    command += ["--prompt-file", "-", "--max-tokens", "5", "--temperature", "0.8", "--seed", "3"]
    runs = [
        subprocess.run(
            command, input=PROMPT, capture_output=True, text=True, timeout=120, check=True
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout != "\n"
    assert "prompt tokens" in runs[0].stderr


def test_the_decision_is_explained(model: Path, store: Path, warm: dict[str, Any]) -> None:
    decision = warm["decision"]
    assert decision["kind"] in decision["alternatives_s"]
    assert decision["predicted_ttft_s"] > 0
    command = [sys.executable, "-m", "ucm.cli", "generate", "--model", str(model)]
    command += ["--prompt", PROMPT, "--max-tokens", "2", "--explain"]
    told = subprocess.run(
        [*command, "--cache", str(store)], capture_output=True, text=True, timeout=120, check=True
    )
    assert f"* {decision['kind']}" in told.stderr
    assert "estimates: priors for computing" in told.stderr
    for word in (*decision["alternatives_s"], "priors", "mapped", "contention"):
        assert f"\n  {word} " in told.stderr.partition("\nlegend:")[2]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "nothing to decide" in alone.stderr
