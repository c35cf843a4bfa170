"""A few lines of RESP, Redis' protocol, that move a value straight from and into memory.

SET   *3 $3 SET $32 KEY $n VALUE   ->  +OK
GET   *2 $3 GET $32 KEY            ->  $n VALUE        each part ends with CR LF
"""

from __future__ import annotations

import socket

from ucm.errors import CorruptionError, TierUnavailableError

MAX_LINE_BYTES = 512


class RedisConnection:
    """One connection; no pipelining."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def set(self, key: bytes, value: memoryview) -> None:
        """Store a value.

        Raises:
            TierUnavailableError: Redis refuses, or has gone.
        """
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, value.nbytes)
        self._socket.sendall(head)
        self._socket.sendall(value)
        self._socket.sendall(b"\r\n")
        reply = self._line()
        if reply != b"+OK":
            raise TierUnavailableError(f"redis answers {reply!r} to SET")

    def get_into(self, key: bytes, into: memoryview) -> None:
        """Load a value of exactly the length of `into`.

        Raises:
            CorruptionError: there is none, or it has another length.
            TierUnavailableError: Redis has gone.
        """
        self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key))
        head = self._line()
        if head != b"$%d" % into.nbytes:
            raise CorruptionError(
                f"redis answers {head!r} to GET, {into.nbytes} bytes are expected"
            )
        self._read_into(into)
        if self._line():
            raise CorruptionError("redis sends more than the value")

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _line(self) -> bytes:
        """One line without its end; read byte by byte, for what follows is read elsewhere."""
        line = bytearray()
        while not line.endswith(b"\r\n"):
            part = self._socket.recv(1)
            if not part or len(line) > MAX_LINE_BYTES:
                raise TierUnavailableError("redis closed the connection, or speaks no RESP")
            line += part
        return bytes(line[:-2])

    def _read_into(self, into: memoryview) -> None:
        while into:
            count = self._socket.recv_into(into)
            if not count:
                raise TierUnavailableError("redis closed the connection")
            into = into[count:]
