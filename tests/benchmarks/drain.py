"""No-op jobs finished per second, from a backlog, history kept: jobsys' workers, and a bare loop of the same two statements."""

from __future__ import annotations

import multiprocessing
import time
from statistics import median

from jobsys import db
from jobsys.ids import new_job_id
from jobsys.system import JobSystem, Submission
from tests.benchmarks.harness import PROCESSES, Bench

JOBS = 100_000
RUNS = 3
BEGINNING = ("-infinity", "00000000-0000-0000-0000-000000000000")


def measure(bench: Bench) -> list[tuple[str, float, str]]:
    """Rows of the table: name, value, unit. Runs alternate; medians are shown."""
    ours, one, two = [], [], []
    for _ in range(RUNS):
        ours.append(_drain_with_workers(bench))
        one.append(_drain_with_loops(bench, 1))
        two.append(_drain_with_loops(bench, PROCESSES))
    rows = [
        (f"drained by jobsys, {PROCESSES} worker processes", median(ours), "jobs/s"),
        ("floor: one bare psycopg2 loop, the same claims and completions", median(one), "jobs/s"),
        (f"floor: {PROCESSES} such loops", median(two), "jobs/s"),
    ]
    return [*rows, ("jobsys / one loop", median(a / b for a, b in zip(ours, one, strict=True)), "times")]


def _drain_with_workers(bench: Bench) -> float:
    with bench.system() as system:
        _fill(system)
        with bench.workers(system):
            while system.counts()["COMPLETED"] < JOBS:
                time.sleep(0.2)
        return _rate(system)


def _drain_with_loops(bench: Bench, loops: int) -> float:
    with bench.system() as system:
        _fill(system)
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=_loop, args=(system.settings.database_url,)) for _ in range(loops)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert system.counts()["COMPLETED"] == JOBS
        return _rate(system)


def _loop(url: str) -> None:
    database = db.Database(url)
    worker = new_job_id()
    row = {"host": "bench", "pid": 0, "version": "0", "queues": [], "types": [], "threads": 1, "heartbeat": 60, "lost_after": 600}
    database.run("register_worker", id=worker, **row)
    place = BEGINNING
    with database.connection() as connection:
        while True:
            rows = db.run(
                connection,
                "claim",
                worker=worker,
                queue="default",
                types=["NOOP"],
                priorities=[0],
                from_run_at=[str(place[0])],
                from_id=[place[1]],
                n=200,
            )
            if not rows:
                break
            place = max((row[9], row[0]) for row in rows)
            db.run(connection, "finish", id=[row[0] for row in rows], claim=[row[7] for row in rows], result=[None] * len(rows))
    database.run("unregister_worker", id=worker)


def _fill(system: JobSystem) -> None:
    for _ in range(JOBS // 10_000):
        system.submit_many([Submission("NOOP") for _ in range(10_000)])
    with system.database.connection() as connection:
        connection.cursor().execute("vacuum analyze jobs")


def _rate(system: JobSystem) -> float:
    """By the database's clock, from the first start to the last end."""
    with system.database.connection() as connection, connection.cursor() as cursor:
        cursor.execute("select count(*) / extract(epoch from max(finished_at) - min(started_at)) from jobs where status = 'COMPLETED'")
        return float(cursor.fetchone()[0])
