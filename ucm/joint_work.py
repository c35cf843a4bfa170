"""Work that any number of threads do together, each taking what nobody else has begun."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, cast

T = TypeVar("T")


class JointWork(Protocol):
    """Several pieces of work."""

    def work_off(self) -> None:
        """Do what nobody has begun; on any number of threads at once.

        Raises:
            Exception: what a piece raised; nobody begins another one then.
        """
        ...

    def stop(self) -> None:
        """Have nobody begin anything more."""
        ...


class JointCalls(Generic[T]):
    """`work(0)`, ..., `work(count - 1)`; see `JointWork`."""

    def __init__(self, work: Callable[[int], T], count: int) -> None:
        self._work = work
        self._todo = deque(range(count))
        self._found: list[T | None] = [None] * count

    def work_off(self) -> None:
        """See `JointWork.work_off`."""
        try:
            while self._todo:
                self._do_next()
        finally:
            self.stop()

    def _do_next(self) -> None:
        try:
            index = self._todo.popleft()
        except IndexError:  # another thread took the last one
            return
        self._found[index] = self._work(index)

    def stop(self) -> None:
        """See `JointWork.stop`."""
        self._todo.clear()

    def results(self) -> list[T]:
        """Of the calls, in order; every `work_off` must have returned."""
        return cast("list[T]", self._found)
