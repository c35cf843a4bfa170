"""A door that is slow: an answer that comes late is never taken for another request's."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm.door_client import DoorClient
from ucm.door_wire import MAX_PACKET_BYTES
from ucm.errors import CapacityError, TierUnavailableError
from ucm.protos import cache_pb2 as pb
from ucm.testing.daemon import short_folder
from ucm.testing.stores import wait_until
from ucm.types import NamespaceId

NAMESPACE = NamespaceId(bytes([1] * 32))
LOOKUP = pb.DoorRequest(lookup=pb.LookupRequest(namespace=NAMESPACE, keys=bytes(32)))


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def slow_door(folder: Path, answers: threading.Event, order: list[str]) -> socket.socket:
    """A door that keeps every answer back until it is told; each says which request it is to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "door"))
    listener.listen(1)

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            while packet := sock.recv(MAX_PACKET_BYTES):
                request = pb.DoorRequest.FromString(packet)
                answers.wait(10)
                order.append(request.WhichOneof("request") or "")
                if order[-1] == "lookup":
                    found = pb.LookupReply(tiers=request.lookup.keys[:1])
                    sock.send(pb.DoorReply(found=found).SerializeToString())
                else:
                    error = pb.DoorError(error="CapacityError", message="full")
                    sock.send(pb.DoorReply(error=error).SerializeToString())

    threading.Thread(target=serve, daemon=True).start()
    return listener


def test_a_late_answer_is_never_taken_for_the_next_lookups(folder: Path) -> None:
    answers, order = threading.Event(), list[str]()
    first, second = (pb.DoorRequest(lookup=pb.LookupRequest(keys=bytes([n]) * 32)) for n in (1, 2))
    with slow_door(folder, answers, order):
        client = DoorClient(folder / "door", timeout_s=5)
        with pytest.raises(TierUnavailableError, match="does not answer"):
            client.call(first, timeout_s=0.05)
        assert client.is_open()
        assert not client.takes(second)
        answers.set()
        wait_until(lambda: client.takes(second))
        assert client.call(second, timeout_s=5).tiers == b"\x02"
        client.close()


def test_a_late_answer_is_never_taken_for_what_is_opened_next(folder: Path) -> None:
    answers, order = threading.Event(), list[str]()
    with slow_door(folder, answers, order):
        client = DoorClient(folder / "door", timeout_s=5)
        with pytest.raises(TierUnavailableError, match="does not answer"):
            client.call(LOOKUP, timeout_s=0.05)
        answers.set()
        with pytest.raises(CapacityError, match="full"):
            client.open_summaries(NAMESPACE, timeout_s=5)
        assert order == ["lookup", "open_summaries"]
        client.close()
