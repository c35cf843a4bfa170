"""The board: who looks at it is refused without a call, and it is never believed for long."""

from __future__ import annotations

import dataclasses
import mmap
import os
import socket
from collections.abc import Iterator

import pytest

from ucm.errors import CapacityError, TierUnavailableError
from ucm.load_board import (
    MADE_METADATA,
    MAX_AHEAD_S,
    MAX_REFUSED,
    MAX_TICKETS,
    MAX_WAITED_S,
    BoardReader,
    LoadBoard,
    Made,
    made_of,
)

NOW_S = 1_000.0
NS = 1_000_000_000


class Clock:
    """CLOCK_MONOTONIC, set by hand."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> int:
        return int(self.now_s * NS)


@pytest.fixture
def board() -> Iterator[LoadBoard]:
    made = LoadBoard()
    yield made
    made.close()


def reader_of(board: LoadBoard, clock: Clock, share: float = 0.5) -> BoardReader:
    return BoardReader(board.memory, os.dup(board.fds[1]), clock, lambda: share)


def made_by(reader: BoardReader, after_s: float = 0.0) -> Made:
    made = made_of(reader.pass_load(), NOW_S + after_s)
    return dataclasses.replace(made, waited_s=round(made.waited_s, 6))


def test_an_open_board_refuses_nobody_and_takes_no_ticket(board: LoadBoard) -> None:
    reader = reader_of(board, Clock())
    board.put_tickets(1)
    assert made_by(reader, 0.25) == Made(0.25)
    assert board.take_tickets() == 1


def test_a_closed_reader_keeps_nothing_open(board: LoadBoard) -> None:
    tickets = os.dup(board.fds[1])
    reader = BoardReader(board.memory, tickets, Clock())
    reader.close()
    reader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tickets)
    with pytest.raises(TierUnavailableError, match="connect again"):
        reader.pass_load()


def test_a_crowd_is_refused_here_but_who_finds_a_ticket(board: LoadBoard) -> None:
    reader, other = reader_of(board, Clock()), reader_of(board, Clock())
    board.post(NOW_S + 0.1, 0.2)
    for _ in range(3):
        with pytest.raises(CapacityError, match="come again or compute") as caught:
            reader.pass_load()
        assert caught.value.retry_after_s == pytest.approx(0.2)
    board.put_tickets(1)
    assert made_by(reader) == Made(0.0, 3, has_ticket=True)
    assert board.take_tickets() == 0
    with pytest.raises(CapacityError):
        other.pass_load()
    board.post(0.0, 0.2)
    assert made_by(other) == Made(0.0, 1)
    assert made_by(reader) == Made(0.0, 0)


def test_who_had_a_ticket_leaves_the_next_to_others(board: LoadBoard) -> None:
    clock = Clock()
    reader, other = reader_of(board, clock), reader_of(board, clock)
    board.put_tickets(3)
    board.post(NOW_S + 1.0, 0.2)
    assert made_by(reader).has_ticket
    with pytest.raises(CapacityError) as caught:
        reader.pass_load()
    assert caught.value.retry_after_s == pytest.approx(0.2)
    assert made_by(other).has_ticket
    clock.now_s += 0.2
    assert made_by(reader).has_ticket


@pytest.mark.timeout(5)
def test_a_client_can_neither_add_tickets_nor_make_others_wait(board: LoadBoard) -> None:
    with socket.socket(fileno=os.dup(board.fds[1])) as hostile:
        hostile.setblocking(True)  # of all: the open file is shared
        hostile.send(bytes(100))
        assert board.take_tickets() == 0
        reader = reader_of(board, Clock())
        board.post(NOW_S + 0.1, 0.2)
        with pytest.raises(CapacityError):
            reader.pass_load()
        for _ in range(1_000):  # more than the sockets hold
            board.put_tickets(10 * MAX_TICKETS)
        assert board.take_tickets() == MAX_TICKETS
        hostile.shutdown(socket.SHUT_RDWR)
        while board.take_tickets():
            pass
        board.put_tickets(1)
        assert board.take_tickets() == 0
        with pytest.raises(CapacityError):
            reader.pass_load()


def test_no_client_counts_for_more_than_it_can_be(board: LoadBoard) -> None:
    claim = ((MADE_METADATA, f"{int((NOW_S - MAX_WAITED_S - 1) * NS)} 999999999 0"),)
    assert made_of(claim, NOW_S) == Made(0.0, MAX_REFUSED)


def test_what_is_no_board_is_refused(board: LoadBoard) -> None:
    with pytest.raises(ValueError, match="bytes"):
        BoardReader(board.memory[:8], os.dup(board.fds[1]), Clock())


def test_a_board_that_is_stale_or_absurd_refuses_nobody(board: LoadBoard) -> None:
    clock = Clock()
    reader = reader_of(board, clock)
    board.post(NOW_S + 0.1, 0.2)
    clock.now_s += 0.1
    reader.pass_load()
    board.post(clock.now_s + MAX_AHEAD_S + 0.1, 0.2)
    reader.pass_load()


def test_a_closed_board_refuses_nobody(board: LoadBoard) -> None:
    reader = reader_of(board, Clock())
    board.post(NOW_S + 0.1, 0.2)
    board.close()
    board.close()
    reader.pass_load()


def test_hints_are_spread(board: LoadBoard) -> None:
    board.post(NOW_S + 0.1, 0.2)
    found = []
    for share in (0.0, 0.25, 1.0):
        with pytest.raises(CapacityError) as caught:
            reader_of(board, Clock(), share).pass_load()
        found.append(caught.value.retry_after_s)
    assert found == pytest.approx([0.1, 0.15, 0.3])


def test_a_client_cannot_write_on_the_page(board: LoadBoard) -> None:
    page, _ = board.fds
    with pytest.raises(PermissionError):
        mmap.mmap(page, board.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(page, b"x", 0)


@pytest.mark.parametrize(
    "value",
    ["", "1", "1 2", "-1 0 0", "x 0 0", "1 0 2", "1 9999999999 0", "٣ 0 0", "1 0 0 0", b"1 0 0"],
)
def test_what_a_call_says_is_not_believed_if_it_is_no_sense(value: str | bytes) -> None:
    assert made_of([(MADE_METADATA, value)], NOW_S) == Made()


def test_a_call_from_another_clock_has_not_waited() -> None:
    for made_s in (NOW_S + 1, NOW_S - 61, 0):
        found = made_of([("other", "x"), (MADE_METADATA, f"{int(made_s * NS)} 7 0")], NOW_S)
        assert found == Made(0.0, 7)
    assert made_of(None, NOW_S) == Made()
