"""Jobs submitted in one call, one transaction; the floor is the faster of COPY and an insert from unnest, into a table without triggers."""

from __future__ import annotations

import contextlib
import io
import time
from functools import partial
from statistics import median

from jobsys.ids import new_job_id
from jobsys.system import Submission
from tests.benchmarks import floor, peers
from tests.benchmarks.harness import Bench, alternate
from tests.benchmarks.peers import Client
from tests.benchmarks.result import Result

UNIT = "jobs/s"
UNNEST = """
    insert into plain (id, type, queue, priority, payload, max_attempts)
    select id, 'NOOP', 'default', 0, payload, 4 from unnest(%s::uuid[], %s::jsonb[]) as job(id, payload)
"""
COPY = "copy plain (id, type, queue, priority, payload, max_attempts) from stdin"


def measure(bench: Bench) -> Result:
    """What the client does to make the rows counts, too. No worker runs meanwhile."""
    jobs = bench.sized(100_000)
    others = peers.available("pgqueuer", "procrastinate", "chancy")
    batches = {peer.name: min(jobs, bench.sized(peer.bulk)) for peer in others}
    contenders = {"jobsys": partial(ours, bench, jobs), "unnest": partial(unnest, bench, jobs), "copy": partial(copy, bench, jobs)}
    contenders |= {peer.name: partial(peers.submitted, bench, peer, batches[peer.name], submit_many) for peer in others}
    runs = alternate(contenders, bench.runs)
    floors = {name: runs.pop(name) for name in ("unnest", "copy")}
    runs["floor"] = max(floors.values(), key=median)
    return Result.of_runs(UNIT, runs, jobs={"jobsys": jobs, **batches}, floors={name: median(values) for name, values in floors.items()})


def ours(bench: Bench, jobs: int) -> float:
    """By JobSystem.submit_many."""
    with bench.system() as system:
        start = time.perf_counter()
        system.submit_many([Submission("NOOP") for _ in range(jobs)])
        return jobs / (time.perf_counter() - start)


def unnest(bench: Bench, jobs: int) -> float:
    """By one insert of arrays."""
    with floor.plain_table(bench) as url, contextlib.closing(floor.connect(url)) as connection, connection.cursor() as cursor:
        start = time.perf_counter()
        cursor.execute(UNNEST, ([new_job_id() for _ in range(jobs)], ["{}"] * jobs))
        return jobs / (time.perf_counter() - start)


def copy(bench: Bench, jobs: int) -> float:
    """By COPY."""
    with floor.plain_table(bench) as url, contextlib.closing(floor.connect(url)) as connection, connection.cursor() as cursor:
        start = time.perf_counter()
        cursor.copy_expert(COPY, io.StringIO("".join(f"{new_job_id()}\tNOOP\tdefault\t0\t{{}}\t4\n" for _ in range(jobs))))
        return jobs / (time.perf_counter() - start)


def submit_many(client: Client, jobs: int) -> None:
    """By the peer's own call."""
    client.submit_many(jobs)
