"""Jobs submitted one by one from one client, each durable; the floor is a bare insert of the same row, a commit each."""

from __future__ import annotations

import contextlib
import time
from functools import partial

from jobsys.ids import new_job_id
from tests.benchmarks import floor, peers
from tests.benchmarks.harness import Bench, alternate
from tests.benchmarks.peers import Client
from tests.benchmarks.result import Result

UNIT = "jobs/s"


def measure(bench: Bench) -> Result:
    """No worker runs meanwhile."""
    jobs = bench.sized(3_000)
    contenders = {"jobsys": partial(ours, bench, jobs), "floor": partial(bare, bench, jobs)}
    contenders |= {
        peer.name: partial(peers.submitted, bench, peer, jobs, submit_each)
        for peer in peers.available("pgqueuer", "procrastinate", "chancy")
    }
    return Result.of_runs(UNIT, alternate(contenders, bench.runs), jobs=jobs)


def ours(bench: Bench, jobs: int) -> float:
    """By JobSystem.submit."""
    with bench.system() as system:
        system.submit("NOOP")
        start = time.perf_counter()
        for _ in range(jobs):
            system.submit("NOOP")
        return jobs / (time.perf_counter() - start)


def bare(bench: Bench, jobs: int) -> float:
    """By an insert."""
    with floor.plain_table(bench) as url, contextlib.closing(floor.connect(url)) as connection, connection.cursor() as cursor:
        start = time.perf_counter()
        for _ in range(jobs):
            cursor.execute(floor.INSERT, (new_job_id(),))
        return jobs / (time.perf_counter() - start)


def submit_each(client: Client, jobs: int) -> None:
    """By the peer's own call."""
    client.submit_each(jobs)
