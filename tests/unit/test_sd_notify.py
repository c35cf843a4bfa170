"""Messages to the service manager."""

from __future__ import annotations

import os
import socket

import pytest

from ucm.sd_notify import Notifier
from ucm.testing.daemon import short_folder


def bound(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.bind(address)
    return sock


def test_messages_arrive_as_systemd_reads_them() -> None:
    with short_folder() as folder, bound(str(folder / "n")) as sock:
        notifier = Notifier({"NOTIFY_SOCKET": str(folder / "n")})
        notifier.ready("serving\nat x")
        assert sock.recv(4096) == b"READY=1\nSTATUS=serving at x\n"
        notifier.status("busy")
        assert sock.recv(4096) == b"STATUS=busy\n"
        notifier.stopping("draining")
        assert sock.recv(4096) == b"STOPPING=1\nSTATUS=draining\n"


def test_abstract_addresses_work() -> None:
    name = f"ucm-test-{os.getpid()}"
    with bound("\0" + name) as sock:
        Notifier({"NOTIFY_SOCKET": "@" + name}).ready("x")
        assert sock.recv(4096).startswith(b"READY=1\n")


def test_without_a_service_manager_nothing_happens() -> None:
    Notifier({}).ready("x")


def test_a_dead_service_manager_is_logged_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    with short_folder() as folder:
        Notifier({"NOTIFY_SOCKET": str(folder / "gone")}).ready("x")
    assert "cannot notify" in caplog.text
