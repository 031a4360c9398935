"""procrastinate on psycopg's pool, with asynchronous tasks and as many at a time as made it fastest here; it fetches jobs one by one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import procrastinate

from tests.benchmarks.job_types import mark
from tests.benchmarks.peers import Client, Peer

CONCURRENCY = POOL = 4
"""Of 1, 4, 10 and 30 at a time this drained fastest here."""

app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=""))


@app.task(name="noop")
async def noop() -> None:
    pass


@app.task(name="mark")
async def marked(number: int) -> None:
    mark(number)


class ProcrastinateClient(Client):
    """Its synchronous connector."""

    def submit(self, number: int | None = None, *, urgent: bool = False) -> None:
        priority = 10 if urgent else 0
        if number is None:
            noop.configure(priority=priority).defer()
        else:
            marked.configure(priority=priority).defer(number=number)

    def submit_many(self, jobs: int) -> None:
        noop.batch_defer(*[{} for _ in range(jobs)])

    def submit_due(self, jobs: int, delay: timedelta) -> float:
        due = datetime.now(timezone.utc) + delay
        payloads: list[dict[str, Any]] = [{"number": number} for number in range(jobs)]
        marked.configure(schedule_at=due).batch_defer(*payloads)
        return due.timestamp()


class Procrastinate(Peer):
    distribution = "procrastinate"
    backlog = 2_000
    bulk = 50_000
    tuning = f"psycopg with its C extension, a pool of {POOL} connections a process, concurrency={CONCURRENCY}"
    waiting = "select count(*) from procrastinate_jobs where status = 'todo'"
    unfinished = "select exists (select from procrastinate_jobs where status in ('todo', 'doing'))"
    span = """
        select extract(epoch from max(at) filter (where type = 'succeeded') - min(at) filter (where type = 'started'))
        from procrastinate_events
    """

    def install(self, url: str) -> None:
        with opened(url):
            app.schema_manager.apply_schema()

    @contextlib.contextmanager
    def client(self, url: str) -> Iterator[Client]:
        with opened(url):
            yield ProcrastinateClient()


@contextlib.contextmanager
def opened(url: str) -> Iterator[None]:
    """The one application, on this database."""
    connector = procrastinate.SyncPsycopgConnector(conninfo=url, min_size=1, max_size=1)
    with app.replace_connector(connector), app.open():
        yield


async def work(url: str) -> None:
    with app.replace_connector(procrastinate.PsycopgConnector(conninfo=url, min_size=POOL, max_size=POOL)):
        async with app.open_async():
            await app.run_worker_async(concurrency=CONCURRENCY, fetch_job_polling_interval=1.0)


def main(url: str) -> None:
    """One worker process, until SIGTERM."""
    asyncio.run(work(url))


PEER = Procrastinate()
