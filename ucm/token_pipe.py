"""`TokenPipe`: bytes in a pair of stream sockets, for counting and waking across processes.

    daemon    put(n)  ->  n bytes  ->  take(n) of whoever has the other end
    client                             take_tokens(socket of `fd`, n)

An eventfd would do, but for one thing: its O_NONBLOCK is of the open file, which all share, so any
client can clear it and make daemon and clients wait. Here each call says itself that it does not
wait (MSG_DONTWAIT). What a client sends arrives at an end that nobody reads.

Envelope: 2 us a call.
"""

from __future__ import annotations

import contextlib
import socket
import weakref

from .errors import CapacityError


class TokenPipe:
    """The daemon's side, which has both ends. Never waits. Closed when it is forgotten."""

    def __init__(self) -> None:
        """Make the sockets; nothing is in them.

        Raises:
            CapacityError: there are no descriptors left.
        """
        try:
            self._source, self._sink = socket.socketpair()
        except OSError as error:
            raise CapacityError(f"no sockets: {error}", retry_after_s=0.0) from error
        self._close = weakref.finalize(self, _close, self._source, self._sink)

    @property
    def fd(self) -> int:
        """The clients' end; -1 when closed."""
        return self._sink.fileno()

    def put(self, number: int) -> None:
        """Add tokens, as far as there is room; none when closed, or shut down by a client."""
        with contextlib.suppress(OSError):
            self._source.send(bytes(number), socket.MSG_DONTWAIT)

    def take(self, most: int) -> int:
        """Take tokens back, at most so many; how many there were."""
        return take_tokens(self._sink, most)

    def close(self) -> None:
        """Give the sockets back. Idempotent."""
        self._close()


def take_tokens(sink: socket.socket, most: int) -> int:
    """Take tokens as far as there are any; none from sockets that were closed or shut down."""
    try:
        return len(sink.recv(most, socket.MSG_DONTWAIT))
    except OSError:
        return 0


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        each.close()
