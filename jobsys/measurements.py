"""What a process measures, on its way to /metrics: counted in memory, and added every few seconds to what all processes counted, in the
database. So every web server tells the same, of all processes on all machines, and goes on where it was after a restart.

What a killed process had not added yet is lost, a few seconds of it at most, and what was added in the last moment before a crash of
PostgreSQL. While the database is away all is kept; what was on its way when the connection broke may then count twice. (Numbers that must
be exact are counted by the database itself: see `tallies`.)
"""

from __future__ import annotations

import atexit
import contextlib
import json
import random
import threading
import time
from bisect import bisect_left
from typing import Any, NamedTuple

import psycopg2

from jobsys import db, logs
from jobsys.errors import DatabaseUnavailable, LockTimeout
from jobsys.ids import new_job_id

LONGEST_PAUSE = 5.0
"""Seconds from one report of a process to the next, at most."""
PATIENCE = 4.0
"""Seconds a report may take, where connections are watched at all."""
LAST_REPORT = 1.0
"""Seconds for which a process that ends tries to report while others are at it."""
GOOD_FOR = 3
"""So many reports may fail to come before a process counts as gone."""
log = logs.get(__name__)

OF_JOBS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
OF_STATEMENTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metric(NamedTuple):
    """A histogram of seconds. Who changes `bounds` has to change the name as well: what was counted by the old ones is still there."""

    help: str
    labels: tuple[str, ...]
    bounds: tuple[float, ...]


METRICS = {
    "job_wait_seconds": Metric(
        "From due to start, of each attempt (of one that a crash or a shutdown gave back, from when it first was due).",
        ("type", "queue"),
        OF_JOBS,
    ),
    "job_run_seconds": Metric(
        "How long attempts ran; the outcome is completed, failed (whatever follows) or interrupted.", ("type", "queue", "outcome"), OF_JOBS
    ),
    "claim_seconds": Metric("How long claims took that brought jobs, with the wait for their turn.", (), OF_STATEMENTS),
    "settle_seconds": Metric("How long it took to write the outcomes of a group of jobs.", (), OF_STATEMENTS),
    "http_request_seconds": Metric(
        "Time to answer a request, up to the first byte of the answer.", ("route", "method", "status"), OF_STATEMENTS
    ),
    "pool_wait_seconds": Metric(
        "How long threads waited for a free database connection, where none was.", ("process", "pool"), OF_STATEMENTS
    ),
}

Labels = tuple[str, ...]


class Series:
    """One histogram: how many observations each bucket has, and the sum of all."""

    __slots__ = ("bounds", "buckets", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.sum = 0.0


class Measurements:
    """What this process has counted and not yet added to the database's. Safe for threads; an observation costs half a microsecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[tuple[str, Labels], Series] = {}

    def observe(self, metric: str, labels: Labels, *seconds: float) -> None:
        """Count observations. `labels` are values, in the order in which METRICS names them."""
        key = (metric, labels)
        with self._lock:
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = Series(METRICS[metric].bounds)
            for each in seconds:
                series.buckets[bisect_left(series.bounds, each)] += 1
                series.sum += each

    def take(self) -> dict[tuple[str, Labels], Series]:
        """What was counted since this was last called."""
        with self._lock:
            taken, self._series = self._series, {}
        return taken

    def give_back(self, taken: dict[tuple[str, Labels], Series]) -> None:
        """Count again what was taken and could not be added."""
        with self._lock:
            for key, series in taken.items():
                kept = self._series.setdefault(key, Series(series.bounds))
                kept.buckets = [had + came for had, came in zip(kept.buckets, series.buckets, strict=True)]
                kept.sum += series.sum


class Recorder:
    """Reports for one process what it measured, and how its connection pools stand.

    A worker's chores call `report`; a web process has no chores: there a thread does, from the first request on.
    """

    def __init__(self, measurements: Measurements, *, kind: str, every: float, database: db.Database, pools: list[db.Database]) -> None:
        self.measurements = measurements
        self.every = min(every, LONGEST_PAUSE)
        self._kind = kind
        self._database = database
        self._pools = pools
        self._process = new_job_id()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    @property
    def pause(self) -> float:
        """Seconds until the next report is due: not the same for processes that were started together."""
        return self.every * random.uniform(0.7, 1.0)

    def report(self, database: db.Database | None = None) -> None:
        """Add what was counted. Raises DatabaseUnavailable, also when others are long at it; then it is kept for the next report."""
        database = database or self._database
        stands = [(pool.name, pool.size, pool.in_use, pool.idle) for pool in self._pools]
        self._take_waits()
        name, size, in_use, idle = (list(column) for column in zip(*stands, strict=True))
        told = {"process": self._process, "kind": self._kind, "good_for": GOOD_FOR * self.every}
        taken = self.measurements.take()
        try:
            # Who waits here has jobs to promote and to rescue. All add to the same rows, which are not held until the disk has answered.
            with database.transaction(lock_timeout="90ms", patience=PATIENCE, durable=False) as connection:
                if taken:
                    db.run(connection, "add_measurements", **_columns(taken))
                db.run(connection, "tell_pools", **told, name=name, size=size, in_use=in_use, idle=idle)
        except BaseException:
            self.measurements.give_back(taken)
            raise

    def start(self) -> None:
        """Report from a thread of its own, from now on; nothing when it does already."""
        if self._thread is not None:
            return
        with self._starting:
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, name="jobsys recorder", daemon=True)
                self._thread.start()
                atexit.register(self.close)

    def close(self) -> None:
        """The last report; this process has no pools from here on."""
        self._stopped.set()
        if self._thread is not None:
            atexit.unregister(self.close)
            self._thread.join(5)
            self._thread = None
            self.leave()

    def leave(self, database: db.Database | None = None) -> None:
        """The last report of a process that ends, as far as the database is there."""
        with contextlib.suppress(DatabaseUnavailable, psycopg2.Error):
            give_up_at = time.monotonic() + LAST_REPORT
            while True:
                try:
                    self.report(database)
                    break
                except LockTimeout:  # others are at it
                    if time.monotonic() > give_up_at:
                        raise
            (database or self._database).run("forget_pools", process=self._process)

    def _run(self) -> None:
        pause = self.pause
        while not self._stopped.wait(pause):
            try:
                self.report()
                # Workers do it too, where there are any. Where there are none /metrics shall say so, and not read an endless log.
                self._database.run("sum_tallies")
                pause = self.pause
            except (DatabaseUnavailable, psycopg2.Error) as error:
                log.debug("measurements wait for the database", error=str(error).strip())
                pause = LONGEST_PAUSE
            except Exception:
                log.exception("measurements could not be reported")
                pause = LONGEST_PAUSE

    def _take_waits(self) -> None:
        for pool in self._pools:
            with contextlib.suppress(IndexError):
                while True:
                    self.measurements.observe("pool_wait_seconds", (self._kind, pool.name), pool.waits.popleft())


def _columns(taken: dict[tuple[str, Labels], Series]) -> dict[str, list[Any]]:
    return {
        "metric": [metric for metric, _ in taken],
        "labels": [json.dumps(dict(zip(METRICS[metric].labels, labels, strict=True))) for metric, labels in taken],
        "buckets": [f"{{{','.join(map(str, series.buckets))}}}" for series in taken.values()],
        "sum": [series.sum for series in taken.values()],
    }
