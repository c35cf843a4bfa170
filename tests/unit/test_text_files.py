"""Files that a user names: text is read, everything else is refused with a reason."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucm import text_files
from ucm.errors import ConfigError
from ucm.text_files import (
    SkippedFile,
    SkipReason,
    TextFile,
    check_encoding,
    find_files,
    name_of,
    read_text,
)


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (b"", SkipReason.EMPTY, "empty"),
        (b" \n\t\n", SkipReason.EMPTY, "white space"),
        (b"\xef\xbb\xbf\n", SkipReason.EMPTY, "white space"),
        (b"abc\0def", SkipReason.BINARY, "zero bytes"),
        (b"\x01\x02\x03 text", SkipReason.BINARY, "control characters"),
        (b"%PDF-1.7 and so on", SkipReason.BINARY, "PDF"),
        (b"PK\x03\x04abc", SkipReason.BINARY, "office"),
        ("Grüße".encode("latin-1"), SkipReason.ENCODING, "byte 0xfc at 2"),
        ("Grüße".encode("utf-16"), SkipReason.ENCODING, "utf-16"),
        ("Grüße".encode("utf-32"), SkipReason.ENCODING, "utf-32"),
    ],
)
def test_what_is_no_text(data: bytes, reason: SkipReason, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    found = read_text(tmp_path / "file")
    assert isinstance(found, SkippedFile)
    assert found.reason is reason
    assert words in found.detail


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-32"])
def test_text_in_a_named_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("Grüße\n".encode(encoding))
    found = read_text(tmp_path / "file", encoding=check_encoding(encoding))
    assert isinstance(found, TextFile)
    assert found.text == "Grüße\n"


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=64), encoding=st.sampled_from(["utf-8", "latin-1", "utf-16"]))
def test_any_bytes_are_text_or_refused(
    data: bytes, encoding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-bytes"
    path.write_bytes(data)
    found = read_text(path, encoding=encoding)
    if isinstance(found, TextFile):
        assert found.text.strip()
        assert found.text == data.decode(encoding).removeprefix("\ufeff")
    else:
        assert found.detail


def test_a_mark_in_front_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfabc")
    found = read_text(tmp_path / "file")
    assert isinstance(found, TextFile)
    assert found.text == "abc"


@pytest.mark.parametrize("encoding", ["klingon", "base64", "", "utf-8\0"])
def test_an_encoding_that_is_none(encoding: str) -> None:
    with pytest.raises(ConfigError, match="not known"):
        check_encoding(encoding)


def test_what_is_no_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    for name in ("pipe", "socket"):
        found = read_text(tmp_path / name)
        assert isinstance(found, SkippedFile)
        assert found.reason is SkipReason.SPECIAL
    gone = read_text(tmp_path / "gone")
    assert isinstance(gone, SkippedFile)
    assert gone.reason is SkipReason.UNREADABLE


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 3)
    (tmp_path / "file").write_text("four")
    found = read_text(tmp_path / "file")
    assert isinstance(found, SkippedFile)
    assert found.reason is SkipReason.TOO_LARGE


def test_folders_are_walked_in_order_and_files_come_once(tmp_path: Path) -> None:
    for name in ("b/two", "b/one", "a", ".hidden", ".git/config", "b/.swp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "z").symlink_to(tmp_path / "z")
    files, skipped = find_files([tmp_path / "b" / "two", tmp_path, tmp_path / "a"])
    assert [name_of(each, tmp_path) for each in files] == ["a", "b/one", "b/two", "z"]
    refused = read_text(tmp_path / "z", tmp_path)
    assert isinstance(refused, SkippedFile)
    assert "Too many levels" in refused.detail, "a link to itself"
    assert not skipped
    hidden, _ = find_files([tmp_path / ".hidden"])
    assert hidden == [tmp_path / ".hidden"], "what is named itself is taken"


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "file").write_text("x")
    (tmp_path / "shut").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files, skipped = find_files([tmp_path], tmp_path)
    assert [each.name for each in files] == ["file"]
    assert [(each.name, each.reason) for each in skipped] == [("shut", SkipReason.UNREADABLE)]
    assert "Permission denied" in skipped[0].detail


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        find_files([tmp_path / "gone"])


def test_names_can_be_printed_whatever_the_file_system_says(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n1"))
    path.write_text("x")
    (found,), _ = find_files([tmp_path])
    assert name_of(found, tmp_path) == "caf\\xe9\\n1"
    assert name_of(found) == f"{tmp_path}/caf\\xe9\\n1"
    assert isinstance(read_text(found), TextFile)
