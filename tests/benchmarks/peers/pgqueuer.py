"""pgqueuer on asyncpg and uvloop, as its command line runs it, in large batches."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from typing import Any

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from tests.benchmarks.harness import execute
from tests.benchmarks.job_types import mark
from tests.benchmarks.peers import Client, Peer

BATCH = 500
"""Of 10 (its default), 100, 200, 500 and 1000 this drained fastest here, on one connection a process; two or five were slower."""


class PgqueuerClient(Client):
    """One asyncpg connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queries: Queries) -> None:
        self._loop = loop
        self._queries = queries

    def submit(self, number: int | None = None, *, urgent: bool = False) -> None:
        name, payload = ("noop", b"") if number is None else ("mark", str(number).encode())
        self._run(self._queries.enqueue(name, payload, 10 if urgent else 0))

    def submit_each(self, jobs: int) -> None:
        self._run(self._submit_each(jobs))

    def submit_many(self, jobs: int) -> None:
        self._run(self._queries.enqueue(["noop"] * jobs, [b""] * jobs, [0] * jobs))

    def submit_due(self, jobs: int, delay: timedelta) -> float:
        payloads: list[bytes | None] = [str(number).encode() for number in range(jobs)]
        self._run(self._queries.enqueue(["mark"] * jobs, payloads, [0] * jobs, [delay] * jobs))
        return float(
            self._run(self._queries.driver.fetch("select extract(epoch from max(execute_after))::float8 as due from pgqueuer"))[0]["due"]
        )

    async def _submit_each(self, jobs: int) -> None:
        for _ in range(jobs):
            await self._queries.enqueue("noop", b"")

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(coroutine)


class Pgqueuer(Peer):
    distribution = "pgqueuer"
    backlog = 100_000
    tuning = f"asyncpg, uvloop, batch_size={BATCH}, optimize_autovacuum"
    waiting = "select count(*) from pgqueuer where status = 'queued'"
    unfinished = "select exists (select from pgqueuer)"
    span = """
        select extract(epoch from max(created) filter (where status = 'successful') - min(created) filter (where status = 'picked'))
        from pgqueuer_log
    """

    def install(self, url: str) -> None:
        with connected(url) as (loop, queries):
            loop.run_until_complete(queries.install())
            loop.run_until_complete(queries.optimize_autovacuum())
        execute(url, "vacuum pgqueuer")

    @contextlib.contextmanager
    def client(self, url: str) -> Iterator[Client]:
        with connected(url) as (loop, queries):
            yield PgqueuerClient(loop, queries)


@contextlib.contextmanager
def connected(url: str) -> Iterator[tuple[asyncio.AbstractEventLoop, Queries]]:
    """A loop, and its connection."""
    loop = uvloop.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(url))
    try:
        yield loop, Queries(AsyncpgDriver(connection))
    finally:
        loop.run_until_complete(connection.close())
        loop.close()


async def work(url: str) -> None:
    manager = PgQueuer(AsyncpgDriver(await asyncpg.connect(url)))
    declare(manager)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, manager.shutdown.set)
    await manager.run(batch_size=BATCH)


def declare(manager: PgQueuer) -> None:
    """What it can run."""

    @manager.entrypoint("noop")
    async def noop(job: Job) -> None:
        pass

    @manager.entrypoint("mark")
    async def marked(job: Job) -> None:
        mark(int(job.payload or b"0"))


def main(url: str) -> None:
    """One worker process, until SIGTERM."""
    uvloop.run(work(url))


PEER = Pgqueuer()
