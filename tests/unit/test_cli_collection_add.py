"""`ucm collection add`: through a daemon and in a folder, again and again, with all that can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ucm import text_files
from ucm.cli import collection_add, main
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.models import write_tiny_model

TEXTS = {
    "docs/a.txt": "the cache and the block of the layer " * 40,
    "docs/sub/b.txt": "a query and a token and another token " * 30,
    "docs/short.txt": "short",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents, and what else a folder has in it."""
    for name, text in TEXTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "docs" / "empty").write_bytes(b"")
    (tmp_path / "docs" / "picture.png").write_bytes(b"\x89PNG\0")
    write_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Command:
    """Runs `ucm` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self._monkeypatch.setattr("sys.argv", ["ucm", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = self._capsys.readouterr()
        code = exit_info.value.code
        return (code if isinstance(code, int) else 0), out, err

    def add(self, *arguments: str, model: str = "model") -> tuple[int, str, str]:
        return self.run("collection", "add", "handbook", *arguments, "--model", model)

    def add_json(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self.add(*arguments, "--root", ".", "--json")
        reply: dict[str, Any] = json.loads(out)
        return reply | {"code": code, "err": err}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def outcomes(reply: dict[str, Any]) -> dict[str, str]:
    return {document["name"]: document["outcome"] for document in reply["documents"]}


def test_a_context_makes_other_chunks_of_the_same_documents(folder: Path, command: Command) -> None:
    (folder / "sample.txt").write_text("many words of another document " * 40)
    context = ["--context", "sample.txt"]
    with short_folder() as short, running_daemon(small_config(short)) as daemon:
        socket = str(daemon.config.service.socket_path)
        first = command.add_json("docs/a.txt", "--socket", socket, *context)
        again = command.add_json("docs/a.txt", "--socket", socket, *context)
        asked = ["generate", "--model", "model", "--cache", socket, "--prompt", "why?", "--json"]
        asked += ["--max-tokens", "1", "--chunk", "docs/a.txt"]
        found, absent = (
            json.loads(command.run(*asked, *flags)[1])["reuse"]["num_encoded_tokens"]
            for flags in (context, [])
        )
        other = command.add_json("docs/a.txt", "--socket", socket)
    assert (first["new"], again["known"], found) == (1, 1, 0)
    assert absent > 0, "of another name"
    assert outcomes(other) == {"docs/a.txt": "replaced"}


def test_what_is_new_known_replaced_and_skipped(folder: Path, command: Command) -> None:
    with short_folder() as short, running_daemon(small_config(short)) as daemon:
        socket = str(daemon.config.service.socket_path)
        first = command.add_json("docs", "--socket", socket, "--expires", "1h")
        (folder / "docs" / "a.txt").write_text(TEXTS["docs/a.txt"] + " and so on")
        second = command.add_json("docs", "--socket", socket)
        _, listed, _ = command.run("collection", "ls", "handbook", "--socket", socket, "--json")
        asked = ["generate", "--model", "model", "--cache", socket, "--prompt", "why?", "--json"]
        asked += ["--max-tokens", "1", "--chunk", "docs/sub/b.txt", "--chunk", "docs/a.txt"]
        _, answered, _ = command.run(*asked)
    skipped = {"docs/empty": "skipped", "docs/picture.png": "skipped"}
    assert (first["code"], first["new"], first["skipped"]) == (0, 3, 2)
    assert outcomes(first) == dict.fromkeys(TEXTS, "new") | skipped
    known = dict.fromkeys(TEXTS, "known") | {"docs/a.txt": "replaced"}
    assert outcomes(second) == known | skipped
    assert (second["code"], second["new"], second["known"], second["replaced"]) == (0, 0, 2, 1)
    assert second["version"] > first["version"]
    documents = json.loads(listed)["documents"]
    assert {document["id"] for document in documents} == set(TEXTS)
    assert not any(document["expires_s"] for document in documents), "what is said last counts"
    reuse = json.loads(answered)["reuse"]
    assert reuse["num_encoded_tokens"] == 0, "what was added is what a prompt finds"
    assert reuse["num_loaded_tokens"] == reuse["num_chunk_tokens"] > 500


def test_what_was_deleted_can_be_added_again(folder: Path, command: Command) -> None:
    with short_folder() as short, running_daemon(small_config(short)) as daemon:
        socket = ("--socket", str(daemon.config.service.socket_path))
        command.add_json("docs", *socket)
        code, out, _ = command.run("collection", "rm", "handbook", "docs/a.txt", *socket, "--json")
        assert (code, json.loads(out)["num_documents"]) == (0, 1)
        again = command.add_json("docs", *socket)
    (document,) = (each for each in again["documents"] if each["name"] == "docs/a.txt")
    assert (again["code"], document["outcome"]) == (0, "new")
    assert document["stored"]["num_computed"] == document["num_chunks"] == 2
    assert document["stored"]["num_unstored"] == 0


def test_a_folder_without_a_daemon_from_beginning_to_end(folder: Path, command: Command) -> None:
    reply = command.add_json("docs", "--cache", "store")
    names = sorted(name for name, what in outcomes(reply).items() if what == "new")
    assert names
    where = ("--cache", "store", "--json")
    code, out, _ = command.run("collection", "ls", "handbook", *where)
    assert (code, [each["id"] for each in json.loads(out)["documents"]]) == (0, names)
    code, out, _ = command.run("collection", "expire", "handbook", "never", "--all", *where)
    assert (code, json.loads(out)["num_documents"]) == (0, len(names))
    code, out, _ = command.run("collection", "rm", "handbook", "--all", *where)
    assert (code, json.loads(out)["num_documents"]) == (0, len(names))
    code, out, _ = command.run("fsck", "store", "--json")
    assert (code, json.loads(out)["findings"]) == (0, [])
    for refused in (("--cache", "nowhere"), ("--cache", "store", "--socket", "s")):
        code, _, err = command.run("collection", "ls", *refused)
        assert (code, len(err.splitlines())) == (2, 1)
    assert not (folder / "nowhere").exists()


def test_people_are_told(folder: Path, command: Command) -> None:
    code, out, _ = command.add("docs", "--cache", "store")
    lines = out.splitlines()
    assert code == 0
    assert f"skipped   {folder}/docs/empty: it is empty" in lines
    assert any(line.startswith(f"new       {folder}/docs/a.txt: ") for line in lines)
    assert "too short for a block" in next(line for line in lines if "short.txt" in line)
    assert lines[-1].startswith("handbook: 3 new, 0 known, 0 replaced, 2 skipped; ")
    code, out, _ = command.add("docs/a.txt", "--cache", "store")
    assert (code, out.splitlines()[-1].startswith("handbook: 0 new, 1 known")) == (0, True)


def test_after_ctrl_c_it_goes_on_where_it_stopped(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:

    def interrupt(path: Path, root: Path | None, encoding: str) -> object:
        if path.name == "b.txt":
            raise KeyboardInterrupt
        return text_files.read_text(path, root, encoding)

    with monkeypatch.context() as patched:
        patched.setattr(collection_add, "read_text", interrupt)
        stopped = command.add_json("docs", "--cache", "store")
    assert (stopped["code"], stopped["interrupted"], stopped["new"]) == (130, True, 2)
    done = command.add_json("docs", "--cache", "store")
    assert (done["code"], done["interrupted"]) == (0, False)
    assert (done["new"], done["known"]) == (1, 2)


@pytest.mark.parametrize("data", ["Grüße".encode("latin-1"), "Grüße".encode("utf-16")])
def test_a_document_in_another_encoding_is_a_failure(
    data: bytes, folder: Path, command: Command
) -> None:
    (folder / "docs" / "old.txt").write_bytes(data)
    code, out, _ = command.add("docs", "--cache", "store")
    assert code == 1
    assert "old.txt: it is " in out
    assert "--encoding" in out
    encoding = "utf-16" if b"\0" in data else "latin-1"
    code, _, _ = command.add("docs/old.txt", "--cache", "store", "--encoding", encoding)
    assert code == 0


def test_nothing_but_a_picture_is_a_failure(folder: Path, command: Command) -> None:
    reply = command.add_json("docs/picture.png", "--cache", "store")
    assert (reply["code"], reply["version"], reply["skipped"]) == (1, None, 1)
    assert reply["documents"][0]["reason"] == "binary"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/no/such/folder", "--cache", "store"], 2, "/no/such/folder: No such file"),
        (["docs", "--cache", "store", "--encoding", "klingon"], 2, "utf-8, latin-1"),
        (["docs", "--cache", "store", "--socket", "/x.sock"], 2, "either --socket or --cache"),
        (["docs", "--cache", "docs/a.txt"], 2, "neither a folder"),
        (["docs", "--cache", "store", "--root", "dcos"], 2, "dcos: names are to begin there"),
        (["docs", "--socket", "/no/such"], 3, "ucm serve --socket /no/such"),
        (["docs", "--cache", "store", "--dtype", "int4"], 2, "int4"),
        (["docs", "--cache", "store", "--expires", "soon"], 2, "soon"),
        ([], 2, "PATH"),
    ],
)
def test_wrong_use(
    arguments: list[str], code: int, words: str, folder: Path, command: Command
) -> None:
    found, out, err = command.add(*arguments)
    assert (found, out) == (code, "")
    assert words in err


def test_a_name_and_a_model_that_cannot_be(folder: Path, command: Command) -> None:
    code, _, err = command.run("collection", "add", "a/b", "docs", "--cache", "store")
    assert (code, "no name for a collection" in err) == (2, True)
    code, _, err = command.add("docs", "--cache", "store", model="/no/such")
    assert (code, "no model at" in err) == (2, True)
    assert not (folder / "store").exists(), "refused before anything is made"
