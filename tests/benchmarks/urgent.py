"""How long an urgent job waits behind a backlog that keeps every worker busy: submitted one after another, with random pauses."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.harness import PROCESSES, THREADS, Bench, alternate, execute, fill, tell, vacuum, wait_until
from tests.benchmarks.marks import Marks
from tests.benchmarks.peers import Peer
from tests.benchmarks.result import Result, percentiles

UNIT = "ms"
URGENT = 30
SLOW = 0.2
"""Seconds a slow job takes."""


def measure(bench: Bench) -> Result:
    """The median wait in ms; details have it behind slow jobs, too, as a multiple of what one of them takes."""
    backlog = bench.sized(200_000)
    waits: dict[str, list[float]] = {}
    left: dict[str, int] = {}
    contenders = {"jobsys": partial(ours, bench, backlog, waits.setdefault("jobsys", []), left)}
    backlogs = {"jobsys": backlog}
    for peer in peers.available("pgqueuer", "procrastinate"):
        backlogs[peer.name] = backlog if peer.backlog >= 100_000 else bench.sized(20_000)
        contenders[peer.name] = partial(theirs, bench, peer, backlogs[peer.name], waits.setdefault(peer.name, []), left)
    runs = alternate(contenders, bench.few_runs)
    for name in runs:
        if left[name] == 0:
            tell(f"  the backlog of {name} was gone before the last urgent job: its wait is too good")
    spread = {name: percentiles(waits[name], 50, 95, 99) for name in runs}
    slow = behind_slow_jobs(bench)
    return Result.of_runs(UNIT, runs, waits=spread, backlog=backlogs, left_at_the_end=left, behind_slow_jobs=slow)


def ours(bench: Bench, backlog: int, waits: list[float], left: dict[str, int]) -> float:
    """The median of one run, in ms."""
    with bench.system() as system, bench.marks() as marks:
        url = str(system.settings.database_url)
        fill(system, backlog)
        vacuum(system)
        with bench.workers(system, marks=marks):
            wait_until(lambda: system.counts()["COMPLETED"] > 0, "the backlog drains")
            middle = _waits(lambda number: system.submit("MARK", {"number": number}, priority="high"), marks, waits)
            left["jobsys"] = execute(url, "select count(*) from jobs where status = 'PENDING'")[0][0]
    return middle


def theirs(bench: Bench, peer: Peer, backlog: int, waits: list[float], left: dict[str, int]) -> float:
    """The same of a peer."""
    with bench.database() as url, bench.marks() as marks:
        peer.install(url)
        with peer.client(url) as client:
            client.submit_many(backlog)
            execute(url, "vacuum analyze")
            with peer.workers(url, marks):
                client.submit(0, urgent=True)
                marks.wait(0)
                middle = _waits(lambda number: client.submit(number, urgent=True), marks, waits)
                left[peer.name] = execute(url, peer.waiting)[0][0]
    return middle


def behind_slow_jobs(bench: Bench) -> dict[str, Any]:
    """With every thread asleep for a while: the wait as a multiple of what one job takes. A thread comes free every so often."""
    waits: list[float] = []
    with bench.system() as system, bench.marks() as marks:
        fill(system, 5_000, type="SLEEP", payload=f'{{"seconds": {SLOW}}}')
        with bench.workers(system, marks=marks):
            wait_until(lambda: system.counts()["COMPLETED"] > PROCESSES * THREADS, "the backlog drains")
            _waits(lambda number: system.submit("MARK", {"number": number}, priority="high"), marks, waits)
    return {"a job takes": f"{SLOW * 1000:g} ms", "multiples": percentiles([wait / 1000 / SLOW for wait in waits], 50, 95, 100)}


def _waits(submit: Callable[[int], object], marks: Marks, waits: list[float]) -> float:
    time.sleep(0.5)
    own = marks.waits(submit, range(1, 1 + URGENT), (0.02, 0.08))
    waits += own
    return median(own)
