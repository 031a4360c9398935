"""Is it well, and how much did it do. The numbers are the database's: exact, the same from every process, there after a restart."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import falcon
from falcon import mediatypes
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from jobsys.api.problem import RETRY_AFTER
from jobsys.system import JobSystem

_COUNTERS = {
    "jobs_created": "Jobs submitted.",
    "jobs_success": "Jobs completed.",
    "jobs_failed": "Jobs that failed for good.",
    "jobs_retried": "Attempts that failed and were retried.",
    "jobs_dlq": "Jobs dead-lettered.",
    "jobs_cancelled": "Jobs cancelled.",
}


class Health:
    """`/health` for whoever routes requests here, `/health/live` for whoever restarts the process."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system
        self._started = time.monotonic()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 while jobs can be taken in, else 503."""
        health = self._system.health()
        if not health["database"]:
            resp.status = falcon.HTTP_503
            resp.set_header("Retry-After", str(RETRY_AFTER))
        resp.media = {"status": "ok" if health["database"] else "unavailable", **health, **self._process()}

    def on_get_live(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 while the process answers at all, whatever the database does."""
        resp.media = {"status": "ok", **self._process()}

    def _process(self) -> dict[str, Any]:
        return {"uptime": round(time.monotonic() - self._started, 1), "memory": {"rss": _resident_bytes()}}


class Metrics:
    """`/metrics`: JSON, or the Prometheus exposition for whoever prefers that."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(system))

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer the totals."""
        resp.append_header("Vary", "Accept")
        if not _prefers_text(req):
            resp.media = self._system.totals()
            return
        encode, content_type = choose_encoder(req.accept)
        resp.data = encode(self._registry)
        resp.content_type = content_type


class _Collector(Collector):
    """Asks the system at each scrape; nothing is counted in this process."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    def collect(self) -> Iterator[Metric]:
        totals, counts, queues = self._system.totals(), self._system.counts(), self._system.queues()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"jobsys_{name}", text, value=totals[name])

        jobs = GaugeMetricFamily("jobsys_jobs", "Jobs there are now, by status.", labels=["status"])
        for status, count in counts.items():
            jobs.add_metric([status], count)
        unfinished = GaugeMetricFamily("jobsys_queue_jobs", "Unfinished jobs, by queue and status.", labels=["queue", "status"])
        waited = GaugeMetricFamily("jobsys_queue_wait_seconds", "How long the oldest due job has been waiting.", labels=["queue"])
        paused = GaugeMetricFamily("jobsys_queue_paused", "1 while the queue is paused.", labels=["queue"])
        workers = GaugeMetricFamily("jobsys_queue_workers", "Live worker processes that serve the queue.", labels=["queue"])
        now = datetime.now(timezone.utc)
        for queue in queues:
            for status, count in queue.counts.items():
                unfinished.add_metric([queue.name, status], count)
            waited.add_metric([queue.name], max(0.0, (now - queue.oldest_due).total_seconds()) if queue.oldest_due else 0.0)
            paused.add_metric([queue.name], queue.paused)
            workers.add_metric([queue.name], queue.workers)
        yield from (jobs, unfinished, waited, paused, workers)


def _prefers_text(req: falcon.Request) -> bool:
    try:
        best = mediatypes.best_match(("application/json", "application/openmetrics-text", "text/plain"), req.accept)
    except falcon.InvalidMediaRange:
        return False
    return best not in ("", "application/json")


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
