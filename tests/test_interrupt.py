"""An exception thrown into another thread lands inside the function it is meant for, or nowhere."""

from __future__ import annotations

import threading
import time

import pytest

from jobsys.errors import JobStopped
from jobsys.interrupt import Interruptible, undisturbed


def thrown_into(call: Interruptible, after: float) -> threading.Thread:
    def throw() -> None:
        time.sleep(after)
        call.throw()

    thread = threading.Thread(target=throw)
    thread.start()
    return thread


def test_it_lands_inside_the_function() -> None:
    call = Interruptible(JobStopped)

    def busy() -> None:
        while True:
            sum(range(100))

    thread = thrown_into(call, 0.05)
    with pytest.raises(JobStopped):
        call.call(busy)
    thread.join()


def test_after_the_function_nothing_is_thrown() -> None:
    call = Interruptible(JobStopped)
    assert call.call(lambda: 1) == 1 and call.over
    call.throw()
    for _ in range(10_000):
        pass


def test_in_an_undisturbed_block_it_waits_for_the_end_of_the_block() -> None:
    call = Interruptible(JobStopped)
    reached = []

    def careful() -> None:
        with undisturbed():
            until = time.monotonic() + 0.2
            while time.monotonic() < until:
                sum(range(100))
            reached.append("end of the block")
        while True:
            call.throw() if reached else None
            sum(range(100))

    thread = thrown_into(call, 0.05)
    with pytest.raises(JobStopped):
        call.call(careful)
    thread.join()
    assert reached == ["end of the block"]


def test_however_it_is_timed_it_never_lands_outside() -> None:
    """Calls that end at about the moment of the throw, many times over: the exception comes out of `call` or not at all."""
    landed = 0
    for n in range(3000):
        call = Interruptible(JobStopped)
        go = threading.Event()
        thread = threading.Thread(target=lambda call=call, go=go: (go.wait(), call.throw()))
        thread.start()

        def work(n: int = n, go: threading.Event = go) -> str:
            go.set()
            for _ in range(n % 300):
                pass
            return "done"

        try:
            assert call.call(work) == "done"
        except JobStopped:
            landed += 1
        thread.join()
        for _ in range(50):
            pass
    assert landed < 3000
