"""SIGTERM unwinds a command as Ctrl-C does."""

from __future__ import annotations

import os
import signal

import pytest

from ucm.cli.termination import unwinding_on_sigterm


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run_until_terminated(done: list[str]) -> None:
    try:
        terminate()
    finally:
        terminate()
        done.append("cleaned up")


def test_a_terminated_command_cleans_up_undisturbed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    done: list[str] = []
    with pytest.raises(SystemExit) as caught, unwinding_on_sigterm():
        run_until_terminated(done)
    assert caught.value.code == 128 + signal.SIGTERM
    assert done == ["cleaned up"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_without_a_signal_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with unwinding_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
