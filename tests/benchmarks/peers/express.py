"""The older servers' stack, for POST /jobs alone: two processes of Express insert into PostgreSQL and add to BullMQ's queue."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator

from tests.benchmarks.harness import Bench, execute, free_port, program, wait_until
from tests.benchmarks.peers import Peer
from tests.benchmarks.peers.node import DIRECTORY, require, version
from tests.benchmarks.posts import answers, post

TABLES = """
    create table jobs (
        id uuid primary key,
        type text not null,
        priority integer not null,
        payload jsonb not null,
        status text not null default 'PENDING',
        attempts integer not null default 0,
        max_attempts integer not null,
        created_at timestamptz not null default now(),
        finished_at timestamptz,
        result jsonb,
        error text
    );
    create index on jobs (status, created_at)
"""


class Express(Peer):
    distribution = "express"

    def __init__(self) -> None:
        require("redis-server")

    @property
    def name(self) -> str:
        return f"express {version('express')} with bullmq {version('bullmq')}"

    def install(self, url: str) -> None:
        execute(url, TABLES)

    def posted(self, bench: Bench, seconds: int) -> dict[str, float]:
        with bench.database() as url, redis() as redis_port:
            self.install(url)
            port = free_port()
            command = ["node", str(DIRECTORY / "express.js"), str(port), url, str(redis_port)]
            with program(command, os.environ | {"NODE_ENV": "production"}) as process:
                wait_until(lambda: answers(port), "Express answers", process=process)
                post(port, 1)
                return post(port, seconds)


@contextlib.contextmanager
def redis() -> Iterator[int]:
    """The port of a Redis that writes its log to disk once a second, as its documentation advises."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="jobsys-redis-") as directory:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--appendonly", "yes", "--save", ""]
        with program([*command, "--logfile", "log"], dict(os.environ)) as process:
            wait_until(lambda: _listens(port), "Redis listens", process=process)
            yield port


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


PEER = Express()
