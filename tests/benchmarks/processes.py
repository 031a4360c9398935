"""The drain by 32 worker processes, as a share of the drain by two; all of them are up before the jobs appear."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from tests.benchmarks.harness import Bench, alternate, drain_rate, execute, fill, wait_for_completed
from tests.benchmarks.result import Result

UNIT = "share"
FEW, MANY = 2, 32
CONNECTIONS = "select count(*) from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
LOG_LOCK_WAITS = """
    do $$ begin
        execute format('alter database %I set log_lock_waits = on', current_database());
        execute format('alter database %I set deadlock_timeout = ''100ms''', current_database());
    end $$
"""
LOGGED = b" still waiting for "


def measure(bench: Bench) -> Result:
    """The median of the shares; details have deadlocks, waits for a lock of over 100 ms, and connections (of the last run of each)."""
    jobs = bench.sized(100_000, full=300_000)
    seen: dict[str, Any] = {}
    rates = alternate({f"{number} processes": partial(drain, bench, jobs, number, seen) for number in (FEW, MANY)}, bench.few_runs)
    shares = [many / few for few, many in zip(*rates.values(), strict=True)]
    return Result.of_runs(UNIT, {"jobsys": shares}, jobs=jobs, rates={name: median(values) for name, values in rates.items()}, **seen)


def drain(bench: Bench, jobs: int, processes: int, seen: dict[str, Any]) -> float:
    """The rate of one drain."""
    with bench.system() as system:
        url = str(system.settings.database_url)
        wait_for_completed(system, 0)
        execute(url, LOG_LOCK_WAITS)
        logged = bench.log.stat().st_size if bench.log else 0
        own = execute(url, CONNECTIONS)[0][0]
        with bench.workers(system, processes=processes):
            fill(system, jobs)
            wait_for_completed(system, jobs // 2)
            connections = execute(url, CONNECTIONS)[0][0] - own
            wait_for_completed(system, jobs)
            deadlocks = execute(url, "select deadlocks from pg_stat_database where datname = current_database()")[0][0]
        waits = bench.log.read_bytes()[logged:].count(LOGGED) if bench.log else None
        seen[f"{processes} processes"] = {"deadlocks": deadlocks, "lock_waits": waits, "connections_per_process": connections / processes}
        return drain_rate(system)
