"""`ucm collection ls | rm | expire` against a daemon."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ucm import cli
from ucm.admin import AdminClient
from ucm.cli.collection import parse_when
from ucm.cli.console import ExitCode
from ucm.client import RemoteCache, connect
from ucm.errors import InvalidArgumentError
from ucm.testing.blocks import chain, loaded, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.documents import document

NAMESPACE = tiny_spec().fingerprint()


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


Runner = Callable[..., Outcome]


@pytest.fixture(scope="module")
def socket() -> Iterator[Path]:
    with short_folder() as folder, running_daemon(small_config(folder)) as daemon:
        yield daemon.config.service.socket_path


@pytest.fixture
def cache(socket: Path) -> Iterator[RemoteCache]:
    """Three documents, stored."""
    with connect(socket, timeout_s=5.0) as found, AdminClient(socket) as admin:
        handle = found.open_namespace(tiny_spec())
        for seed, name in enumerate(("a.txt", "b[1].txt", "c.txt")):
            keys = chain(handle.id, 2, seed)
            admin.collections.put_document("docs", document(handle.id, name, keys))
            put(found, handle, keys)
        assert found.flush(timeout_s=10)
        yield found
        if admin.collections.list_collections():
            admin.collections.remove("docs")


@pytest.fixture
def ucm(
    socket: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    def run(*arguments: str) -> Outcome:
        line = ["ucm", "collection", *arguments, "--socket", str(socket)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


def test_ls_of_all_and_of_one(ucm: Runner, cache: RemoteCache) -> None:
    text = ucm("ls").out
    assert "docs" in text
    assert "0 deleted blocks wait" in text
    found = json.loads(ucm("ls", "--json").out)
    assert found["collections"][0]["num_documents"] == 3
    assert found["deletions"]["num_waiting"] == 0
    text = ucm("ls", "docs").out
    assert "b[1].txt" in text
    assert "3 documents" in text
    found = json.loads(ucm("ls", "docs", "--json").out)
    assert [each["id"] for each in found["documents"]] == ["a.txt", "b[1].txt", "c.txt"]
    assert found["documents"][0]["namespace"] == NAMESPACE.hex()


def test_what_is_listed_is_not_folded_in_a_pipe(
    ucm: Runner, cache: RemoteCache, socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = "/".join(["a-long-folder"] * 12)
    with AdminClient(socket) as admin:
        admin.collections.put_document("docs", document(NAMESPACE, name, chain(NAMESPACE, 2, 7)))
    lines = ucm("ls", "docs").out.splitlines()
    assert [line for line in lines if line.rstrip().endswith(f" {name}")]
    assert len(lines) == 1 + 4 + 1


def test_ls_of_none(ucm: Runner) -> None:
    outcome = ucm("ls", "none")
    assert outcome.code == ExitCode.CHECK_FAILED
    assert "ucm collection ls" in outcome.err


def test_rm_of_documents(ucm: Runner, cache: RemoteCache) -> None:
    outcome = ucm("rm", "docs", "a.txt")
    assert outcome.code == ExitCode.DONE
    assert "1 document deleted: 2 blocks erased, 0 waiting" in outcome.out
    assert cache.lookup(NAMESPACE, chain(NAMESPACE, 2, 0)).num_blocks == 0
    outcome = ucm("rm", "docs", "a.txt", "c.txt", "--json")
    assert outcome.code == ExitCode.CHECK_FAILED
    found = json.loads(outcome.out)
    assert (found["num_documents"], found["missing"]) == (1, ["a.txt"])
    assert found["deletion"]["num_blocks"] == 2
    assert "no such document: a.txt" in ucm("rm", "docs", "a.txt").out


def test_rm_by_a_relative_path_says_the_name(ucm: Runner, socket: Path, cache: RemoteCache) -> None:
    """`add` names documents by their absolute paths."""
    name = str(Path("docs/x.md").absolute())
    with AdminClient(socket) as admin:
        keys = chain(NAMESPACE, 2, 7)
        admin.collections.put_document("docs", document(NAMESPACE, name, keys))
    outcome = ucm("rm", "docs", "docs/x.md")
    assert outcome.code == ExitCode.CHECK_FAILED
    assert f"docs/x.md; did you mean {name}? See `ucm collection ls docs`" in outcome.out
    assert "no such document: y; see `ucm collection ls docs`" in ucm("rm", "docs", "y").out


def test_rm_that_a_reader_holds_up(ucm: Runner, cache: RemoteCache) -> None:
    handle = cache.open_namespace(tiny_spec())
    with loaded(cache, handle, chain(NAMESPACE, 2, 0)):
        outcome = ucm("rm", "docs", "a.txt", "--timeout", "0")
    assert outcome.code == ExitCode.CHECK_FAILED
    assert "0 blocks erased, 2 waiting" in outcome.out


def test_rm_and_expire_need_to_be_told_what(ucm: Runner, cache: RemoteCache) -> None:
    for arguments in (
        ("rm", "docs"),
        ("rm", "docs", "a.txt", "--all"),
        ("expire", "docs", "1d"),
        ("expire", "docs", "soon", "--all"),
    ):
        outcome = ucm(*arguments)
        assert outcome.code == ExitCode.WRONG_USE, arguments
    assert "3 documents" in ucm("ls", "docs").out
    assert ucm("rm", "docs", "--all").code == ExitCode.DONE
    assert json.loads(ucm("ls", "--json").out)["collections"] == []


def test_expire(ucm: Runner, cache: RemoteCache) -> None:
    found = json.loads(ucm("expire", "docs", "2h", "--all", "--json").out)
    assert found["num_documents"] == 3
    assert found["expires_s"] == pytest.approx(time.time() + 7200, abs=60)
    assert "1 document set never to expire" in ucm("expire", "docs", "never", "a.txt").out
    assert "UTC" in ucm("expire", "docs", "10d", "c.txt").out
    outcome = ucm("expire", "docs", "10d", "c.txt", "none.txt")
    assert (outcome.code, outcome.out[:11]) == (ExitCode.CHECK_FAILED, "1 document ")
    assert "never" in ucm("ls", "docs").out


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1.5m", 90), ("2h", 7200), ("7d", 604800), ("now", 0)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_when(text, 1000.0) == 1000.0 + seconds
    assert parse_when("never", 1000.0) == 0


@pytest.mark.parametrize(
    "text", ["", "5", "-5s", "1e9d", "5 d", "inf", "\u0661s", "9999999999s", "9999999d"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_when(text, 0.0)
