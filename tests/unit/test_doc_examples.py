"""The examples of the documentation run, and say what the text says."""

from __future__ import annotations

import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ucm.engine.sampling import SamplingParams
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.models import write_tiny_model
from ucm.testing.reference import DOCS

EXAMPLES = DOCS / "examples"


def test_select_on_an_embedded_cache(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "select_blocks.py"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(r"layer [01]: 12 of 40 blocks, mass 0\.[3-9]\d", line)


def test_blocks_are_stored_and_loaded_in_this_process_and_by_a_daemon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(EXAMPLES / "store_load.py")
    monkeypatch.setattr("sys.argv", ["store_load.py"])
    runpy.run_path(path)
    with short_folder() as folder, running_daemon(small_config(folder)) as daemon:
        monkeypatch.setattr("sys.argv", ["store_load.py", str(daemon.config.service.socket_path)])
        runpy.run_path(path)
        runpy.run_path(path)
    first = "12 stored, 12 found, 12 loaded, 12 right"
    again = "0 stored, 12 found, 12 loaded, 12 right"
    assert capsys.readouterr().out.splitlines() == [first, first, again]


def test_a_context_larger_than_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["beyond_the_pool.py", str(write_tiny_model(tmp_path / "m"))])
    runpy.run_path(str(EXAMPLES / "beyond_the_pool.py"))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "8 tokens, 7 sparse steps"
    counts = re.fullmatch(r"read (\d+) of (\d+) blocks", second)
    assert counts is not None
    assert 0 < int(counts[1]) < 0.4 * int(counts[2])


def test_a_certificate_and_where_its_numbers_are(tmp_path: Path) -> None:
    """The example of docs/sparse-certificates.md as it stands there."""
    text = (DOCS / "sparse-certificates.md").read_text()
    lines = text.partition("    from ucm import")[2].partition("\n\nAll options")[0]
    lines = lines.replace('"smollm2-135m"', repr(str(write_tiny_model(tmp_path / "m"))))
    names: dict[str, Any] = {}
    exec(textwrap.dedent("    from ucm import" + lines), names)
    with names["engine"] as engine:
        prompt = [3 + (i * i + 7 * i) % 90 for i in range(1100)]
        engine.generate_all([prompt], SamplingParams(max_tokens=3, ignore_eos=True))
        assert engine.promises.certified.layers > 0
        assert engine.sparse_stats.blocks_read > 0


CORPUS = {
    "ferry.txt": "the ferry leaves the harbour at nine and the captain looks at the sea. " * 12,
    "bread.txt": "the baker takes flour and water and salt, and waits for the dough. " * 12,
    "store/keys.txt": "the cache finds a block by its key, and the key by the tokens. " * 12,
}


def write_corpus(folder: Path) -> Path:
    for name, text in CORPUS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\0")
    return folder


def test_retrieval_with_cached_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = write_tiny_model(tmp_path / "m"), write_corpus(tmp_path / "docs")
    arguments = ["rag.py", str(folder), "When does the ferry leave the harbour?", "What is a key?"]
    arguments += ["--model", str(model), "--store", str(tmp_path / "kv"), "--max-tokens", "4"]
    monkeypatch.setattr("sys.argv", [*arguments, "--top", "2"])
    for is_first in (True, False):
        runpy.run_path(str(EXAMPLES / "rag.py"), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        assert "left out picture.png: it is not text: it holds zero bytes" in lines
        counts = [re.fullmatch(r"(.*): (\d) chunks computed, (\d) known", line) for line in lines]
        cut = {found[1]: (int(found[2]), int(found[3])) for found in counts if found}
        assert sorted(cut) == sorted(CORPUS)
        assert all((known if is_first else computed) == 0 for computed, known in cut.values())
        told = [line.split(None, 1) for line in lines if line[:1].isalpha()]
        sources = [words[1] for words in told if words[0] == "from"]
        assert [names.split(", ")[-1] for names in sources] == ["ferry.txt", "store/keys.txt"]
        reused = re.findall(r"tokens, ([\d,]+) of them reused", "\n".join(lines))
        assert all(int(number.replace(",", "")) > 500 for number in reused)
        shares = re.findall(r"^recomputed .*\((\d+)%\)$", "\n".join(lines), re.MULTILINE)
        assert [0 < int(share) <= 18 for share in shares] == [True, True]
        assert len(re.findall(r"^first token .* of it$", "\n".join(lines), re.MULTILINE)) == 2
    assert (tmp_path / "kv.context.txt").read_text()


def test_retrieval_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rag.py", "folder", "What?", "--top", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "rag.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("folder", "words"), [("empty", "there is no text in"), ("absent", "No such file")]
)
def test_retrieval_in_nothing(
    folder: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    model = write_tiny_model(tmp_path / "m")
    arguments = ["rag.py", str(tmp_path / folder), "What?", "--model", str(model)]
    monkeypatch.setattr("sys.argv", [*arguments, "--store", str(tmp_path / "kv")])
    with pytest.raises(SystemExit, match=words):
        runpy.run_path(str(EXAMPLES / "rag.py"), run_name="__main__")
    assert not (tmp_path / "kv").exists()


def test_reuse_in_twenty_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of docs/reuse.md as it stands there."""
    text = (DOCS / "reuse.md").read_text()
    lines = "    import ucm\n" + text.partition("    import ucm\n")[2]
    lines = lines.partition("\n\n`connect(")[0]
    names: dict[str, Any] = {
        "MODEL": write_tiny_model(tmp_path / "m"),
        "STORE": tmp_path / "store",
        "TEXTS": list(CORPUS.values()),
    }
    stands_in = {
        '"rag-store", [Path("README.md").read_text()]': "STORE, TEXTS",
        'model_hub.resolve("smollm2-135m")': "MODEL",
    }
    for written, name in stands_in.items():
        assert lines.count(written) == 1
        lines = lines.replace(written, name)
    exec(textwrap.dedent(lines), names)
    report = names["result"].reuse
    assert report.num_chunk_tokens > 1000
    assert report.num_encoded_tokens == report.num_chunk_tokens
    assert "cost" in capsys.readouterr().out
