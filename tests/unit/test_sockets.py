"""Socket files: one daemon a path, stale ones removed, folders checked."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.admin import AdminClient
from ucm.client import connect
from ucm.errors import ConfigError, PermissionDeniedError
from ucm.sockets import (
    MAX_PATH_BYTES,
    SocketFolder,
    admin_path,
    check_socket_path,
    door_path,
    grpc_target,
)
from ucm.testing.daemon import short_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def listen(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    sock.listen(1)
    return sock


def test_the_folder_is_made_for_user_and_group_only(folder: Path) -> None:
    path = folder / "run" / "ucm.sock"
    claimed = SocketFolder(path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
    claimed.close()
    claimed.close()


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose a shorter one"):
        check_socket_path(Path("/tmp") / ("x" * 300))


def test_the_longest_path_works_and_one_more_is_refused(folder: Path) -> None:
    room = MAX_PATH_BYTES - len(os.fsencode(folder)) - 1 - len(".admin")
    claimed = SocketFolder(folder / ("s" * room))
    listen(admin_path(folder / ("s" * room))).close()
    claimed.close()
    with pytest.raises(ConfigError, match=r"the system allows 101 .*--socket"):
        SocketFolder(folder / ("s" * (room + 1)))


def test_a_second_claim_is_refused_until_the_first_is_given_up(folder: Path) -> None:
    first = SocketFolder(folder / "ucm.sock")
    with pytest.raises(ConfigError, match="in use"):
        SocketFolder(folder / "ucm.sock")
    first.close()
    SocketFolder(folder / "ucm.sock").close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_socket_that_answers_is_not_taken_over(folder: Path, kind: int) -> None:
    path = folder / "ucm.sock"
    with listen(path, kind), pytest.raises(ConfigError, match="in use"):
        SocketFolder(path)
    assert path.exists()


def test_what_a_dead_daemon_left_is_removed(folder: Path) -> None:
    path = folder / "ucm.sock"
    for each in (path, door_path(path), admin_path(path)):
        listen(each).close()
    claimed = SocketFolder(path)
    assert not any(each.exists() for each in (path, door_path(path), admin_path(path)))
    claimed.close()


def test_a_file_that_is_no_socket_is_left_alone(folder: Path) -> None:
    path = folder / "ucm.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        SocketFolder(path)
    assert path.read_text() == "precious"
    path.unlink()
    SocketFolder(path).close()


def test_a_folder_that_everybody_can_write_is_refused(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    run.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 0750"):
        SocketFolder(run / "ucm.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    os.chown(run, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        SocketFolder(run / "ucm.sock")


def test_a_folder_that_is_a_link_or_a_file_is_refused(folder: Path) -> None:
    (folder / "link").symlink_to(folder)
    (folder / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match="folder"):
            SocketFolder(folder / name / "ucm.sock")


def test_special_characters_are_escaped_for_grpc() -> None:
    assert grpc_target(Path("/tmp/a b%20c")) == "unix:/tmp/a%20b%2520c"


@pytest.mark.parametrize("claim", [SocketFolder, AdminClient, connect])
def test_what_is_no_socket_is_told_as_what_it_is(folder: Path, claim: type) -> None:
    with pytest.raises(ConfigError, match=r"is a folder, not a socket: name .*/ucm\.sock$"):
        claim(folder)
    for suffix in ("door", "admin", "lock"):
        with pytest.raises(ConfigError, match=r"name the socket itself: \S+/ucm\.sock$"):
            claim(folder / f"ucm.sock.{suffix}")
    assert list(folder.iterdir()) == []


def test_a_socket_in_a_folder_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(PermissionDeniedError, match="ask as the daemon's user"):
        check_socket_path(Path("/run/other/ucm.sock"))
