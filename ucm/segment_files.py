"""The segment files that a session reads itself: opened at their first use, kept, bounded.

A file that a plan still reads stays open whatever happens here: its extents hold it.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from ucm.storage.extents import SegmentFd, SlotPlace

from .errors import UcmError
from .load_plan import SegmentFile
from .types import NamespaceId

_log = logging.getLogger(__name__)

MAX_FILES: Final = 256
"""Kept open at once; a segment has 1 GiB unless configured otherwise."""

OpenSegment = Callable[[NamespaceId, int], SegmentFd]


class SegmentFiles:
    """Open files of one session. Thread-safe; opening may block on the door."""

    def __init__(self, open_segment: OpenSegment) -> None:
        """Open nothing yet; `open_segment` asks the cache for a descriptor."""
        self._open_segment = open_segment
        self._lock = threading.Lock()
        self._is_closed = False
        self._files: OrderedDict[tuple[NamespaceId, int], SegmentFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, namespace: NamespaceId, place: SlotPlace) -> SegmentFile | None:
        """The file that `place` is in; None when the cache does not give it (any more)."""
        name = namespace, place.file_id
        with self._lock:
            file = self._files.get(name)
            if file is not None:
                self._files.move_to_end(name)
                return file
        try:
            opened = self._open_segment(namespace, place.segment)
        except UcmError as error:
            _log.warning("blocks of segment %04d cannot be read: %s", place.segment, error)
            return None
        file = SegmentFile(opened.fd, is_direct=opened.is_direct)
        if opened.file_id != place.file_id:
            return None
        with self._lock:
            if not self._is_closed:
                self._files[name] = file
            while len(self._files) > MAX_FILES:
                self._files.popitem(last=False)
        return file

    def close(self) -> None:
        """Keep nothing open but what plans still read. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._files.clear()
