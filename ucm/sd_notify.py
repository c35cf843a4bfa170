"""Tell the service manager how the daemon is doing: systemd's notification protocol.

One datagram a message to the socket that `$NOTIFY_SOCKET` names, `VARIABLE=value` lines, as in
sd_notify(3). Without a service manager every call does nothing. A failure to notify is logged and
never stops the daemon.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping

_log = logging.getLogger(__name__)


class Notifier:
    """Messages to the service manager that started this process, if one did."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")

    def ready(self, status: str) -> None:
        """The daemon answers calls now; `status` is one line for people."""
        self._send(f"READY=1\nSTATUS={_one_line(status)}\n")

    def stopping(self, status: str) -> None:
        """The daemon has begun to stop."""
        self._send(f"STOPPING=1\nSTATUS={_one_line(status)}\n")

    def status(self, status: str) -> None:
        """One line for people; changes nothing else."""
        self._send(f"STATUS={_one_line(status)}\n")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # "@name" is the abstract namespace of Linux, whose addresses start with a zero byte.
        abstract = self._address.startswith("@")
        address = "\0" + self._address[1:] if abstract else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(1.0)
                sock.sendto(message.encode(), address)
        except OSError as error:
            _log.warning("cannot notify the service manager: %s", error)


def _one_line(text: str) -> str:
    return " ".join(text.split())
