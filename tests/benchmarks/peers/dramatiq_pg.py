"""dramatiq-pg as it comes, in Dramatiq's own launcher. As it reads its whole backlog when it starts, the backlog is small."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import dramatiq
from dramatiq_pg import PostgresBroker
from dramatiq_pg.schema import generate_init_sql

from tests.benchmarks.harness import CHECKOUT, PROCESSES, THREADS, execute, program
from tests.benchmarks.job_types import mark
from tests.benchmarks.marks import Marks
from tests.benchmarks.peers import Client, Peer


def declare(url: str) -> dict[str, dramatiq.Actor[..., None]]:
    """A broker on this database, and its actors."""
    broker = PostgresBroker(url=url)

    @dramatiq.actor(broker=broker, actor_name="noop")
    def noop() -> None:
        pass

    @dramatiq.actor(broker=broker, actor_name="mark")
    def marked(number: int) -> None:
        mark(number)

    dramatiq.set_broker(broker)
    return {"noop": noop, "mark": marked}


class DramatiqPgClient(Client):
    """Its actors."""

    def __init__(self, url: str) -> None:
        self._actors = declare(url)

    def submit(self, number: int | None = None, *, urgent: bool = False) -> None:
        if number is None:
            self._actors["noop"].send()
        else:
            self._actors["mark"].send(number)


class DramatiqPg(Peer):
    distribution = "dramatiq-pg"
    backlog = 1_000
    tuning = f"as it comes, {THREADS} threads a process"
    waiting = "select count(*) from dramatiq.queue where state = 'queued'"
    unfinished = "select exists (select from dramatiq.queue where state in ('queued', 'consumed'))"
    span = "select extract(epoch from max(mtime) - min(mtime)) from dramatiq.queue where state = 'done'"

    def install(self, url: str) -> None:
        execute(url, generate_init_sql())

    @contextlib.contextmanager
    def client(self, url: str) -> Iterator[Client]:
        yield DramatiqPgClient(url)

    @contextlib.contextmanager
    def workers(self, url: str, marks: Marks | None = None) -> Iterator[None]:
        env = os.environ | {"PYTHONPATH": str(CHECKOUT), "BENCH_URL": url} | (marks.environment if marks else {})
        command = [sys.executable, "-m", "dramatiq", __name__, "--processes", str(PROCESSES), "--threads", str(THREADS)]
        with program(command, env):
            yield


PEER = DramatiqPg()

if url := os.environ.get("BENCH_URL"):
    logging.getLogger("dramatiq_pg").setLevel(logging.WARNING)  # it has a line for each job
    declare(url)
