"""How much it did, and how it stands: `/metrics`, as JSON or for Prometheus.

All numbers are the database's: the same from every web server, and there after a restart. So whoever scrapes several of them must not add
up what they say. Totals are exact; what processes measured themselves is a few seconds old (see measurements.py). The table of jobs
is not counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import falcon
from falcon import mediatypes
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from jobsys import db
from jobsys.api.problem import VARY
from jobsys.measurements import METRICS
from jobsys.openapi import Answer, describe
from jobsys.system import STATUSES, JobSystem

PATIENCE = 3.0
"""Seconds the database has to answer all that a scrape asks."""
UNFINISHED = ("SCHEDULED", "PENDING", "PROCESSING")
TOTALS = {
    "jobs_created": ("CREATED", "Jobs submitted."),
    "jobs_success": ("COMPLETED", "Jobs completed."),
    "jobs_failed": ("FAILED", "Jobs that failed for good."),
    "jobs_retried": ("RETRIED", "Attempts that failed and were retried."),
    "jobs_dlq": ("DEAD", "Jobs dead-lettered."),
    "jobs_cancelled": ("CANCELLED", "Jobs cancelled."),
    "workers_lost": ("WORKERS_LOST", "Worker processes that died or fell silent, and whose jobs others put back."),
}


class _Histogram(NamedTuple):
    buckets: list[int]
    sum: float


Samples = dict[tuple[str, ...], float]
Histograms = dict[tuple[str, ...], _Histogram]
"""By the values of their labels."""


class Metrics:
    """`/metrics`: JSON, or the Prometheus exposition for whoever prefers that."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    @describe(
        "getMetrics",
        {
            200: Answer(
                "The totals since the database was made. As text, how it stands, too.",
                dict[str, int],
                also={"text/plain": {"type": "string"}, "application/openmetrics-text": {"type": "string"}},
                headers=(VARY,),
            )
        },
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer the totals, and to Prometheus whatever else there is."""
        resp.append_header("Vary", "Accept")
        if not _prefers_text(req):
            resp.media = self._system.totals()
            return
        encode, resp.content_type = choose_encoder(req.accept)
        collector = _Collector(self._system.database)
        head, end, _ = encode(collector).partition(b"# EOF\n")
        resp.data = head + "".join(_histograms(collector.measured)).encode() + end


class _Collector(Collector):
    """What the database says now."""

    def __init__(self, database: db.Database) -> None:
        with database.connection(patience=PATIENCE) as connection:
            self.counts = db.run(connection, "counts")
            self.workers = db.run(connection, "worker_strength")
            self.limits = {
                name: (paused, bool(count or running)) for name, paused, count, _, running in db.run(connection, "queue_settings")
            }
            self.unfinished = _unfinished(self.counts)
            served = {queue for alive, queues, *_ in self.workers if alive for queue in queues}
            self.queues = sorted({*self.unfinished, *self.limits, *served})
            self.waits: dict[str, float] = dict(db.run(connection, "waits", queues=self.queues))
            [(self.longest_transaction,)] = db.run(connection, "longest_transaction")
            self.pools = db.run(connection, "pools")
            self.measured = _by_metric(db.run(connection, "measurements"))

    def collect(self) -> Iterator[Metric]:
        """All but the histograms, see there."""
        yield from _of_jobs(self.counts)
        yield from _of_queues(self.queues, self.unfinished, self.waits, self.limits, self.workers)
        yield from _of_workers(self.workers)
        yield from _of_pools(self.pools)
        help = "For how long the oldest transaction has kept dead rows from being removed."
        yield _gauge("oldest_transaction_seconds", help, (), {(): self.longest_transaction})
        requests = CounterMetricFamily("jobsys_http_requests", "Requests answered.", labels=METRICS["http_request_seconds"].labels)
        for values, histogram in self.measured["http_request_seconds"].items():
            requests.add_metric(values, sum(histogram.buckets))
        yield requests


def _unfinished(counts: list[db.Row]) -> dict[str, dict[str, int]]:
    """By queue and status, for queues that ever had any."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for queue, _, status, entered, departed in counts:
        if status in UNFINISHED:
            found[queue][status] += entered - departed
    return {queue: {status: of_queue[status] for status in UNFINISHED} for queue, of_queue in found.items()}


def _of_jobs(counts: list[db.Row]) -> Iterator[Metric]:
    came: Counter[str] = Counter()
    went: Counter[str] = Counter()
    for _, _, status, entered, departed in counts:
        came[status] += entered
        went[status] += departed
    for name, (status, text) in TOTALS.items():
        yield CounterMetricFamily(f"jobsys_{name}", text, value=came[status])
    there: Samples = {(status,): float(came[status] - went[status]) for status in STATUSES}
    yield _gauge("jobs", "Jobs there are now, by status.", ("status",), there)


def _of_queues(
    queues: list[str],
    unfinished: dict[str, dict[str, int]],
    waits: dict[str, float],
    limits: dict[str, tuple[bool, bool]],
    workers: list[db.Row],
) -> Iterator[Metric]:
    jobs: Samples = {(queue, status): n for queue, of_queue in unfinished.items() for status, n in of_queue.items()}
    serving = Counter(queue for alive, served, *_ in workers if alive for queue in served)
    none = (False, False)
    yield _gauge("queue_jobs", "Unfinished jobs, by queue and status.", ("queue", "status"), jobs)
    for name, text, values in (
        ("queue_wait_seconds", "How long the oldest due job has been waiting.", [max(0.0, waits.get(queue, 0.0)) for queue in queues]),
        ("queue_paused", "1 while the queue is paused.", [limits.get(queue, none)[0] for queue in queues]),
        ("queue_limited", "1 while the queue has a rate or a maximum running.", [limits.get(queue, none)[1] for queue in queues]),
        ("queue_workers", "Live worker processes that serve the queue.", [serving[queue] for queue in queues]),
    ):
        yield _gauge(name, text, ("queue",), {(queue,): float(value) for queue, value in zip(queues, values, strict=True)})


def _of_workers(workers: list[db.Row]) -> Iterator[Metric]:
    beating = sum(alive for alive, *_ in workers)
    held_back = Counter(name for alive, _, _, types in workers if alive for name in types)
    states: Samples = {("alive",): beating, ("silent",): len(workers) - beating}
    yield _gauge("workers", "Worker processes; silent are those whose heart has stopped.", ("state",), states)
    threads = sum(threads for alive, _, threads, _ in workers if alive)
    yield _gauge("worker_threads", "How many jobs the live worker processes can run at a time.", (), {(): threads})
    text = "Worker processes that hold the type back, because its jobs all fail alike."
    yield _gauge("type_held_back", text, ("type",), {(name,): n for name, n in held_back.items()})


def _of_pools(pools: list[db.Row]) -> Iterator[Metric]:
    sizes: Samples = {(kind, name): size for kind, name, size, _, _ in pools}
    stands: Samples = {(kind, name, state): n for kind, name, _, in_use, idle in pools for state, n in (("in_use", in_use), ("idle", idle))}
    yield _gauge("pool_size", "Database connections the processes may open.", ("process", "pool"), sizes)
    yield _gauge("pool_connections", "Database connections the processes have open.", ("process", "pool", "state"), stands)


def _by_metric(rows: list[db.Row]) -> dict[str, Histograms]:
    found: dict[str, Histograms] = {metric: {} for metric in METRICS}
    for metric, labels, buckets, seconds in rows:
        if metric in METRICS and len(buckets) == len(METRICS[metric].bounds) + 1:  # else another version's
            found[metric][tuple(labels.get(name, "") for name in METRICS[metric].labels)] = _Histogram(buckets, seconds)
    return found


def _histograms(measured: dict[str, Histograms]) -> Iterator[str]:
    """Lines that both formats have in common. With two hundred types there are ten thousand of them, and prometheus_client takes many times
    as long as this, while requests wait for the interpreter."""
    for metric, found in measured.items():
        name, names, bounds = f"jobsys_{metric}", METRICS[metric].labels, [*map(str, METRICS[metric].bounds), "+Inf"]
        if metric == "http_request_seconds":
            names, found = names[:2], _without_status(found)
        yield f"# HELP {name} {METRICS[metric].help}\n# TYPE {name} histogram\n"
        for values, histogram in found.items() if names else [((), found.get((), _Histogram([0] * len(bounds), 0.0)))]:
            labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in sorted(zip(names, values, strict=True)))
            before = f"{labels}," if labels else ""
            all_labels = f"{{{labels}}}" if labels else ""
            counts = list(accumulate(histogram.buckets))
            for bound, count in zip(bounds, counts, strict=True):
                yield f'{name}_bucket{{{before}le="{bound}"}} {count}\n'
            yield f"{name}_count{all_labels} {counts[-1]}\n{name}_sum{all_labels} {histogram.sum}\n"


def _without_status(found: Histograms) -> Histograms:
    """Requests are counted by status, their times are not."""
    together: Histograms = {}
    for (route, method, _), histogram in found.items():
        had = together.get((route, method), _Histogram([0] * len(histogram.buckets), 0.0))
        buckets = [a + b for a, b in zip(had.buckets, histogram.buckets, strict=True)]
        together[route, method] = _Histogram(buckets, had.sum + histogram.sum)
    return together


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _gauge(name: str, text: str, labels: Iterable[str], samples: Samples) -> Metric:
    family = GaugeMetricFamily(f"jobsys_{name}", text, labels=list(labels))
    for values, value in samples.items():
        family.add_metric(values, value)
    return family


def _prefers_text(req: falcon.Request) -> bool:
    try:
        best = mediatypes.best_match(("application/json", "application/openmetrics-text", "text/plain"), req.accept)
    except falcon.InvalidMediaRange:
        return False
    return best not in ("", "application/json")
