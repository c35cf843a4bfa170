"""Work that any number of threads do together, each taking what nobody else has begun.

    caller    | work_off ........ | stop | take back or wait | returns
    helper    |   work_off ...... |
    another   busy elsewhere: its turn is taken back

Only locks and queues of the interpreter itself are used, which an interrupt from the keyboard, or
whatever a signal's handler raises, cannot leave half done. Those of `concurrent.futures` are
Python: cut off in the middle they stay locked, and every later call would wait for ever.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeAlias, TypeVar, cast

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


class _Turn:
    """A helper's part in some work, which can be taken back until it begins."""

    def __init__(self, work: JointWork) -> None:
        self._work = work
        self._claim, self._end = threading.Lock(), threading.Lock()
        self._end.acquire()
        self.error: BaseException | None = None
        """What the work raised; after `wait`."""

    def run(self) -> None:
        """Do it, unless it was taken back."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._work.work_off()
        except BaseException as error:  # noqa: BLE001  for who waits for it
            self.error = error
        finally:
            self._end.release()

    def take_back(self) -> bool:
        """Whether it will not be done; False when it has begun."""
        return self._claim.acquire(blocking=False)

    def wait(self) -> None:
        """Wait for the end of one that has begun; called once."""
        self._end.acquire()


_Turns: TypeAlias = "queue.SimpleQueue[_Turn | None]"


class Helpers:
    """Threads that help with `JointWork`; none before they are needed. Thread-safe.

    They serve any number of callers, and do not keep a process from ending.
    """

    def __init__(self, size: int, name: str) -> None:
        """Start nothing yet.

        Args:
            size: threads, at most; 0 for none.
            name: of the threads.
        """
        self._size = size
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self._turns: _Turns = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._num_started = 0
        self._pid = os.getpid()
        self._end = weakref.finalize(self, _end_threads, self._turns, self._size)

    def run(self, work: JointWork, num_helpers: int) -> None:
        """Do it here and, as far as they are free, on helpers; all have returned then.

        An exception that a signal's handler raises may cut the waiting short.

        Args:
            work: what.
            num_helpers: of them, at most.

        Raises:
            Exception: what the work raised; the caller's own thread's, if several did.
        """
        turns = [_Turn(work) for _ in range(min(num_helpers, self._size))]
        try:
            if turns:
                self._start()
            for turn in turns:
                self._turns.put(turn)
            work.work_off()
        finally:
            work.stop()
            # One that has not begun, because its thread is busy or gone, is not waited for.
            begun = [turn for turn in turns if not turn.take_back()]
            for turn in begun:
                turn.wait()
        for turn in begun:
            if turn.error is not None:
                raise turn.error

    def _start(self) -> None:
        """Have as many threads as there may be, or as the system allows."""
        if self._pid != os.getpid():  # the threads stayed behind in the parent process
            self._begin()
        with self._starting:
            while self._num_started < self._size:
                name = f"{self._name}-{self._num_started}"
                thread = threading.Thread(target=_serve, args=(self._turns,), name=name)
                thread.daemon = True
                self._num_started += 1
                try:
                    thread.start()
                except RuntimeError:  # no more threads: fewer do it
                    self._num_started -= 1
                    return

    def close(self) -> None:
        """End the threads, without waiting for them. Idempotent; `run` still works, alone.

        Who forgets it ends them with the last reference to this.
        """
        self._size = 0
        self._end()


def _serve(turns: _Turns) -> None:
    while (turn := turns.get()) is not None:
        turn.run()
        del turn  # while it waits for the next one, it keeps nobody's memory


def _end_threads(turns: _Turns, count: int) -> None:
    for _ in range(count):
        turns.put(None)
