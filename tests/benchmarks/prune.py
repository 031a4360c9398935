"""The drain while old jobs are being pruned, as a share of the drain without."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from statistics import median
from typing import Any

from jobsys import db
from jobsys.system import JobSystem
from tests.benchmarks.flat import INSERT, WAITING
from tests.benchmarks.harness import Bench, alternate, drain_rate, execute, fill, wait_until
from tests.benchmarks.result import Result

UNIT = "share"
OLD = WAITING | {"type": "OLD", "status": "COMPLETED", "ended": "at", "worker": "gen_random_uuid()", "age": "60 days"}
FIRST_PRUNING = 90
"""Seconds after its start in which a worker process will have begun to prune."""
OLDEST = "select min(id::text) from (select id from jobs order by id limit 1) as first"
COUNT_OLD = "select count(*) from jobs where created_at < clock_timestamp() - interval '30 days'"


def measure(bench: Bench) -> Result:
    """The share. It takes a minute until workers begin to prune, so there is one run but with the full size."""
    old, jobs = bench.sized(500_000), bench.sized(100_000)
    seen: dict[str, Any] = {}
    contenders = {"without": partial(drain, bench, jobs, 0, seen), "with": partial(drain, bench, jobs, old, seen)}
    rates = alternate(contenders, bench.sized(1, quick=1, full=3))
    shares = [pruning / free for pruning, free in zip(rates["with"], rates["without"], strict=True)]
    return Result.of_runs(UNIT, {"jobsys": shares}, jobs=jobs, rates={name: median(values) for name, values in rates.items()}, **seen)


def drain(bench: Bench, jobs: int, old: int, seen: dict[str, Any]) -> float:
    """The rate of one drain, begun when the pruning has."""
    with bench.system() as system:
        if old:
            _insert_old(system, old)
        url = str(system.settings.database_url)
        oldest = execute(url, OLDEST)[0][0]
        with bench.workers(system):
            if old:
                wait_until(lambda: execute(url, OLDEST)[0][0] != oldest, "pruning begins", timeout=FIRST_PRUNING)
            before, start = execute(url, COUNT_OLD)[0][0], time.monotonic()
            fill(system, jobs)
            wait_until(lambda: not _unfinished(system), "the backlog is drained", timeout=300)
            after = execute(url, COUNT_OLD)[0][0]
            if old:
                seen["pruned_meanwhile"] = before - after
                seen["pruned_per_second"] = (before - after) / (time.monotonic() - start)
                seen["left_at_the_end"] = after
        return drain_rate(system)


def _unfinished(system: JobSystem) -> int:
    """Pruned jobs leave COMPLETED, and these were never counted into it: so what counts here is what is left to do."""
    counts = system.counts()
    return counts["PENDING"] + counts["PROCESSING"]


def _insert_old(system: JobSystem, jobs: int) -> None:
    with contextlib.closing(db.Database(str(system.settings.database_url)).connect()) as connection, connection.cursor() as cursor:
        cursor.execute("set session_replication_role = replica")
        cursor.execute(INSERT.format(**OLD), (jobs,))
        cursor.execute("vacuum analyze jobs")
