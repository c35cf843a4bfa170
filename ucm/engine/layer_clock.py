"""`LayerClock`: how far a forward pass is, for those who copy its KV out behind it.

    num_done     0      1      2    ...    num_layers
    layer        |  0   |  1   |  2  ...  |           layer l is final in the pool once num_done > l

Invariants: `num_done` never goes back; it reaches `num_layers` only after everything that could
have failed the pass, so a store that waits for the last layer before it completes never publishes
a pass that failed. Written by the engine's thread, read by any.

Envelope: one lock a layer, below 1 us, in passes that fill a block only; a waiting thread is woken
when its layer is final, not before: it would take the interpreter from the pass.
"""

from __future__ import annotations

import threading


class LayerClock:
    """One pass's progress; see the module."""

    def __init__(self, num_layers: int, num_done: int = 0) -> None:
        """Start at `num_done` final layers."""
        self.num_layers = num_layers
        self._num_done = num_done
        self._is_failed = False
        self._changed = threading.Condition(threading.Lock())
        self._awaited: list[int] = []
        """Of each waiting thread, how many layers must be done."""

    @classmethod
    def finished(cls, num_layers: int) -> LayerClock:
        """The clock of blocks that were final before they were offered."""
        return cls(num_layers, num_layers)

    @property
    def num_done(self) -> int:
        """Leading layers whose KV is final in the pool."""
        return self._num_done

    @property
    def is_failed(self) -> bool:
        """Whether the pass was given up: whoever copies drops what it has."""
        return self._is_failed

    @property
    def is_complete(self) -> bool:
        """Whether every layer is final."""
        return self._num_done >= self.num_layers

    @property
    def is_settled(self) -> bool:
        """Whether nothing more will change: complete, or failed."""
        return self._is_failed or self.is_complete

    def advance(self, num_done: int) -> None:
        """The first `num_done` layers are final."""
        with self._changed:
            self._num_done = max(self._num_done, num_done)
            if any(count <= self._num_done for count in self._awaited):
                self._changed.notify_all()

    def fail(self) -> None:
        """Give the pass up; what is final already stays so."""
        with self._changed:
            self._is_failed = not self.is_complete
            self._changed.notify_all()

    def wait(self, layer: int, timeout_s: float) -> bool:
        """Block until `layer` is final, at most `timeout_s`.

        Returns:
            False when the pass failed or time is up: copy nothing of this layer.
        """
        with self._changed:
            self._awaited.append(layer + 1)
            try:
                self._changed.wait_for(
                    lambda: self._is_failed or self._num_done > layer, timeout=timeout_s
                )
            finally:
                self._awaited.remove(layer + 1)
            return self._num_done > layer and not self._is_failed
