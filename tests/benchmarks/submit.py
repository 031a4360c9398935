"""Jobs submitted per second from one client: one by one, each durable, and in bulk; beside bare inserts of the same columns."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from jobsys.system import JobSystem, Submission
from tests.benchmarks.harness import Bench

ONE_BY_ONE = 2_000
IN_BULK = 50_000
RUNS = 3


def measure(bench: Bench) -> list[tuple[str, float, str]]:
    """Rows of the table: name, value, unit. No worker runs meanwhile."""
    with bench.system() as system:
        ways: dict[str, Callable[[], float]] = {
            "submitted one by one": lambda: _one_by_one(system),
            "floor: bare inserts, one by one": lambda: _bare(system),
            "submitted in bulk (submit_many)": lambda: _in_bulk(system),
        }
        results: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(RUNS):
            for name, way in ways.items():
                results[name].append(way())
    return [(name, median(values), "jobs/s") for name, values in results.items()]


def _one_by_one(system: JobSystem) -> float:
    start = time.perf_counter()
    for _ in range(ONE_BY_ONE):
        system.submit("NOOP")
    return ONE_BY_ONE / (time.perf_counter() - start)


def _in_bulk(system: JobSystem) -> float:
    start = time.perf_counter()
    system.submit_many([Submission("NOOP") for _ in range(IN_BULK)])
    return IN_BULK / (time.perf_counter() - start)


def _bare(system: JobSystem) -> float:
    """The same rows by a plain insert of one column into the same table, triggers and indexes included."""
    with system.database.connection() as connection, connection.cursor() as cursor:
        start = time.perf_counter()
        for _ in range(ONE_BY_ONE):
            cursor.execute("insert into jobs (type) values ('NOOP')")
        return ONE_BY_ONE / (time.perf_counter() - start)
