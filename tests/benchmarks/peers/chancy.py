"""chancy with its executor for asynchronous jobs and eager polling, which makes it look for more as soon as a job is done."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

from chancy import Chancy, Job, Queue, Worker

from tests.benchmarks.job_types import mark
from tests.benchmarks.peers import Client, Peer

CONCURRENCY = 1_000
"""Of 100, 1000 and 4000 this drained fastest here."""
NOOP = f"{__name__}.noop"
MARK = f"{__name__}.marked"


async def noop() -> None:
    pass


async def marked(number: int) -> None:
    mark(number)


class ChancyClient(Client):
    """Its synchronous calls."""

    def __init__(self, chancy: Chancy) -> None:
        self._chancy = chancy

    def submit(self, number: int | None = None, *, urgent: bool = False) -> None:
        func, kwargs = (NOOP, {}) if number is None else (MARK, {"number": number})
        self._chancy.sync_push(Job(func=func, kwargs=kwargs, priority=10 if urgent else 0))

    def submit_many(self, jobs: int) -> None:
        for _ in self._chancy.sync_push_many([Job(func=NOOP) for _ in range(jobs)], batch_size=10_000):
            pass

    def submit_due(self, jobs: int, delay: timedelta) -> float:
        due = datetime.now(timezone.utc) + delay
        for _ in self._chancy.sync_push_many([Job(func=MARK, kwargs={"number": n}, scheduled_at=due) for n in range(jobs)]):
            pass
        return due.timestamp()


class ChancyPeer(Peer):
    distribution = "chancy"
    backlog = 20_000
    bulk = 10_000
    tuning = f"psycopg with its C extension, AsyncExecutor, concurrency={CONCURRENCY}, polling every second, eager_polling"
    waiting = "select count(*) from chancy_jobs where state = 'pending'"
    unfinished = "select exists (select from chancy_jobs where state in ('pending', 'running', 'retrying'))"
    span = "select extract(epoch from max(completed_at) - min(started_at)) from chancy_jobs"

    def install(self, url: str) -> None:
        asyncio.run(prepare(url))

    @contextlib.contextmanager
    def client(self, url: str) -> Iterator[Client]:
        with Chancy(url, log=quiet()) as chancy:
            yield ChancyClient(chancy)


async def prepare(url: str) -> None:
    """The tables, and the queue as it is meant to run."""
    queue = Queue(name="default", concurrency=CONCURRENCY, executor=Chancy.Executor.Async, polling_interval=1, eager_polling=True)
    async with Chancy(url, log=quiet()) as chancy:
        await chancy.migrate()
        await chancy.declare(queue, upsert=True)


async def work(url: str) -> None:
    async with Chancy(url, log=quiet()) as chancy, Worker(chancy) as worker:
        await worker.wait_for_shutdown()


def quiet() -> logging.Logger:
    """Warnings only: it has a line for each job."""
    log = logging.getLogger("chancy")
    log.setLevel(logging.WARNING)
    return log


def main(url: str) -> None:
    """One worker process, until SIGTERM."""
    asyncio.run(work(url))


PEER = ChancyPeer()
