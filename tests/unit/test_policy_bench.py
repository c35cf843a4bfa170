"""`ucm bench policy`: the shape of its result, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ucm.bench.policy import PolicyBenchOptions, policy_bench_table, run_policy_bench
from ucm.bench.synthetic import SyntheticOptions
from ucm.bench.traces import TraceRequest, write_mooncake
from ucm.cli import app, main
from ucm.config import POLICY_NAMES
from ucm.errors import ConfigError

SMALL = SyntheticOptions(kind="chat", num_requests=300)


def test_every_policy_and_size_is_reported_beside_the_ideal() -> None:
    options = PolicyBenchOptions(synthetic=SMALL, fractions=(0.1, 0.5), processes=1)
    lines: list[str] = []
    result = run_policy_bench(options, lines.append)
    assert set(result["policies"]) == set(POLICY_NAMES)
    for sizes in result["policies"].values():
        for fraction in ("0.1", "0.5"):
            cell, ideal = sizes[fraction], result["ideal"][fraction]
            assert 0 <= cell["saved_s_per_gb"] <= ideal["saved_s_per_gb"]
            assert 0 <= cell["hit_ratio"] <= ideal["hit_ratio"]
            assert cell["saved_share_of_ideal"] <= 1
    assert set(result["gain_over_lru"]) == {"tree-gdsf", "s3-fifo", "ideal"}
    reused = result["trace"]["reused_blocks"]
    assert result["working_set"]["definition"] == "reused"
    assert result["working_set"]["blocks"] == reused < result["trace"]["unique_blocks"]
    written = {name: sizes["0.1"]["written_gb"] for name, sizes in result["admission"].items()}
    assert written["second-touch"] < written["always"]
    assert result["trace"]["requests"] == 300
    assert json.loads(json.dumps(result))["parameters"]["model"] == "smollm2-135m"
    assert len(lines) == 7
    console = Console(width=200, record=True, quiet=True)
    console.print(policy_bench_table(result))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "gpt"}, "no model 'gpt'"),
        ({"policies": ("fifo",)}, "no policy 'fifo'"),
        ({"admission": "never"}, "no admission 'never'"),
        ({"working_set": "x"}, "no working set 'x': one of reused, footprint"),
        ({"synthetic": SyntheticOptions(kind="x")}, "no kind of trace 'x'"),
        ({"fractions": (0.1, 2.0)}, "--size 2: a share of the working set, above 0 and up to 1"),
        ({"fractions": ()}, "--size: name at least one"),
    ],
)
def test_what_it_does_not_know_is_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyBenchOptions(**wrong)  # type: ignore[arg-type]


def test_the_footprint_is_the_larger_working_set() -> None:
    options = PolicyBenchOptions(
        synthetic=SMALL, fractions=(0.2,), working_set="footprint", policies=("lru",), processes=1
    )
    result = run_policy_bench(options, lambda _line: None)
    assert result["working_set"]["blocks"] == result["trace"]["unique_blocks"]
    smaller = run_policy_bench(replace(options, working_set="reused"), lambda _line: None)
    hits = [each["policies"]["lru"]["0.2"]["hit_ratio"] for each in (result, smaller)]
    assert hits[0] > hits[1]


def test_a_trace_without_blocks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ConfigError, match="has no blocks"):
        run_policy_bench(PolicyBenchOptions(trace_path=path), print)


@pytest.mark.timeout(60)
def test_the_command_ends_with_one_json_object(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    chains = [(0, *range(number % 7 * 10 + 1, number % 7 * 10 + 5)) for number in range(60)]
    write_mooncake(
        path,
        [TraceRequest(n * 10**9, 2560, 1, 512, chain) for n, chain in enumerate(chains)],
    )
    arguments = ["bench", "policy", "--trace", str(path), "--quick", "--json"]
    arguments += ["--admission", "second-touch", "--size", "0.3", "--policy", "lru"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout.strip().splitlines()[-1])
    assert result["trace"]["unique_blocks"] == 29
    assert {name: list(sizes) for name, sizes in result["policies"].items()} == {"lru": ["0.3"]}
    assert result["policies"]["lru"]["0.3"]["hit_ratio"] > 0
    assert result["parameters"]["admission"] == "second-touch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", "caht"), "--trace caht: no such file, and none of chat, "),
        (("--size", "10"), "--size 10: a share of the working set, above 0 and up to 1"),
    ],
)
def test_what_is_mistyped_is_named(
    arguments: tuple[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["ucm", "bench", "policy", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
