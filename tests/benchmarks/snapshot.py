"""The drain while another session holds an old snapshot, which keeps dead rows from being removed; as a share of the drain without."""

from __future__ import annotations

import contextlib
from functools import partial
from statistics import median

from jobsys import db
from tests.benchmarks.harness import Bench, alternate, drain_rate, fill, vacuum, wait_for_completed
from tests.benchmarks.result import Result

UNIT = "share"


def measure(bench: Bench) -> Result:
    """The median of the shares."""
    jobs = bench.sized(100_000, full=300_000)
    rates = alternate({"without": partial(drain, bench, jobs), "with": partial(drain, bench, jobs, snapshot=True)}, bench.few_runs)
    shares = [held / free for held, free in zip(rates["with"], rates["without"], strict=True)]
    return Result.of_runs(UNIT, {"jobsys": shares}, jobs=jobs, rates={name: median(values) for name, values in rates.items()})


def drain(bench: Bench, jobs: int, *, snapshot: bool = False) -> float:
    """The rate of one drain."""
    with contextlib.ExitStack() as stack:
        system = stack.enter_context(bench.system())
        if snapshot:
            other = stack.enter_context(contextlib.closing(db.Database(str(system.settings.database_url)).connect()))
            other.cursor().execute("begin isolation level repeatable read; select 1")
        fill(system, jobs)
        vacuum(system)
        with bench.workers(system):
            wait_for_completed(system, jobs)
        return drain_rate(system)
