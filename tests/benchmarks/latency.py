"""From the call that submits to the first line of the job's function, on an idle system: one job at a time, with pauses."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

from jobsys.system import JobSystem
from tests.benchmarks import drain, peers
from tests.benchmarks.harness import Bench, alternate, fill, tell
from tests.benchmarks.marks import Marks
from tests.benchmarks.peers import Peer
from tests.benchmarks.result import Result, percentiles

UNIT = "ms"
TICK = 0.02
"""Seconds between two insertions of the load."""


def measure(bench: Bench) -> Result:
    """The median wait; details have the percentiles of all runs together, and of ours at half the rate it can drain."""
    jobs = bench.sized(200, full=1_000)
    waits: dict[str, list[float]] = {}
    contenders = {"jobsys": partial(ours, bench, jobs, waits.setdefault("jobsys", []))}
    for peer in peers.available("pgqueuer", "procrastinate", "chancy"):
        contenders[peer.name] = partial(theirs, bench, peer, jobs, waits.setdefault(peer.name, []))
    runs = alternate(contenders, bench.few_runs)
    rate = drain.ours(bench, bench.sized(100_000)) / 2
    tell(f"  and at {rate:,.0f} jobs/s")
    loaded: list[float] = []
    ours(bench, jobs, loaded, rate)
    idle = {name: percentiles(waits[name], 50, 95, 99) for name in runs}
    return Result.of_runs(UNIT, runs, idle=idle, at_half_the_drain_rate={"rate": rate} | percentiles(loaded, 50, 95, 99))


def ours(bench: Bench, jobs: int, waits: list[float], rate: float = 0) -> float:
    """The median of one run, in ms, with no-ops coming in meanwhile at this rate; every wait is added to `waits`."""
    with contextlib.ExitStack() as stack:
        system, marks = stack.enter_context(bench.system()), stack.enter_context(bench.marks())
        stack.enter_context(bench.workers(system, marks=marks))
        if rate:
            stack.enter_context(load(system, rate))
        return _waits(lambda number: system.submit("MARK", {"number": number}), marks, jobs, waits)


def theirs(bench: Bench, peer: Peer, jobs: int, waits: list[float]) -> float:
    """The same of a peer."""
    with bench.database() as url, bench.marks() as marks:
        peer.install(url)
        with peer.workers(url, marks), peer.client(url) as client:
            return _waits(client.submit, marks, jobs, waits)


def _waits(submit: Callable[[int], object], marks: Marks, jobs: int, waits: list[float]) -> float:
    for number in range(10):  # until everything has been used once
        submit(number)
    marks.wait_for(10)
    time.sleep(1)
    own = marks.waits(submit, range(10, 10 + jobs), (0.005, 0.05))
    waits += own
    return median(own)


@contextlib.contextmanager
def load(system: JobSystem, rate: float) -> Iterator[None]:
    """So many no-ops a second, submitted by a thread in one statement a tick."""
    ended = threading.Event()

    def submit() -> None:
        start, submitted = time.monotonic(), 0
        while not ended.wait(TICK):
            due = int((time.monotonic() - start) * rate) - submitted
            fill(system, min(due, int(rate * 5 * TICK)))
            submitted += due

    thread = threading.Thread(target=submit, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
