"""The clock that stores follow behind a pass."""

from __future__ import annotations

import threading

from ucm.engine.layer_clock import LayerClock


def test_layers_become_final_in_order() -> None:
    clock = LayerClock(3)
    assert not clock.wait(0, 0.0)
    clock.advance(2)
    assert (clock.num_done, clock.is_complete, clock.is_failed) == (2, False, False)
    assert clock.wait(0, 0.0)
    assert clock.wait(1, 0.0)
    assert not clock.wait(2, 0.0)
    clock.advance(1)
    assert clock.num_done == 2, "never back"
    clock.advance(3)
    assert clock.is_complete


def test_a_failed_pass_ends_every_wait() -> None:
    clock = LayerClock(3)
    clock.advance(1)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(clock.wait(2, 30.0)))
    thread.start()
    clock.fail()
    thread.join()
    assert answers == [False]
    assert not clock.wait(0, 0.0), "a layer that is final is of no use without the others"
    assert clock.is_failed


def test_a_waiter_is_woken_by_its_layer() -> None:
    clock = LayerClock(2)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(clock.wait(1, 30.0)))
    thread.start()
    clock.advance(1)
    clock.advance(2)
    thread.join()
    assert answers == [True]


def test_a_waiter_sleeps_through_the_layers_before_its_own() -> None:
    clock = LayerClock(3)
    looks: list[int] = []

    class Watched(threading.Condition):
        def notify_all(self) -> None:
            looks.append(clock.num_done)
            super().notify_all()

    clock._changed = Watched(threading.Lock())
    thread = threading.Thread(target=lambda: clock.wait(2, 30.0))
    thread.start()
    while not clock._awaited:
        threading.Event().wait(0.001)
    for layer in range(3):
        clock.advance(layer + 1)
    thread.join()
    assert looks == [3]


def test_what_is_complete_cannot_fail() -> None:
    clock = LayerClock.finished(4)
    clock.fail()
    assert not clock.is_failed
    assert clock.wait(3, 0.0)
