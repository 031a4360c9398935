"""Ten thousand jobs that fall due in the same instant: how late the last one starts."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

from jobsys.system import Submission
from tests.benchmarks import peers
from tests.benchmarks.harness import Bench, alternate
from tests.benchmarks.peers import Peer
from tests.benchmarks.result import Result, percentiles

UNIT = "ms"
AHEAD = timedelta(seconds=5)


def measure(bench: Bench) -> Result:
    """The lateness of the last start, in ms; details have the others, and the earliest, which is negative where one came too early."""
    jobs = bench.sized(10_000)
    late: dict[str, Any] = {}
    contenders = {"jobsys": partial(ours, bench, jobs, late)}
    contenders |= {peer.name: partial(theirs, bench, peer, jobs, late) for peer in peers.available("pgqueuer", "chancy")}
    return Result.of_runs(UNIT, alternate(contenders, bench.few_runs), jobs=jobs, last_run=late)


def ours(bench: Bench, jobs: int, late: dict[str, Any]) -> float:
    """One run."""
    with bench.system() as system, bench.marks() as marks, bench.workers(system, marks=marks):
        due = datetime.now(timezone.utc) + AHEAD
        system.submit_many([Submission("MARK", {"number": number}, run_at=due) for number in range(jobs)])
        return _lateness("jobsys", due.timestamp(), marks.wait_for(jobs), late)


def theirs(bench: Bench, peer: Peer, jobs: int, late: dict[str, Any]) -> float:
    """The same of a peer."""
    with bench.database() as url, bench.marks() as marks:
        peer.install(url)
        with peer.client(url) as client, peer.workers(url, marks):
            client.submit(-1)
            marks.wait(-1)
            due = client.submit_due(jobs, AHEAD)
            times = marks.wait_for(jobs + 1)
            return _lateness(peer.name, due, {number: at for number, at in times.items() if number >= 0}, late)


def _lateness(name: str, due: float, times: dict[int, float], late: dict[str, Any]) -> float:
    values = [(at - due) * 1000 for at in times.values()]
    late[name] = {"earliest": min(values)} | percentiles(values, 50, 99)
    return max(values)
