"""What PostgreSQL and psycopg2 give without a job server: bare statements on a plain copy of the jobs table, without its triggers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jobsys import db
from jobsys.ids import new_job_id
from tests.benchmarks.harness import Bench, execute

INSERT = "insert into plain (id, type, queue, priority, payload, max_attempts) values (%s, 'NOOP', 'default', 0, '{}', 4)"
CLAIM = """
    update plain
    set status = 'PROCESSING', attempt = attempt + 1, claim = claim + 1, started_at = clock_timestamp(), worker = %s::uuid
    where id = any(array(
        select id from plain
        where status = 'PENDING' and queue = 'default' and priority = 0
        order by run_at, id
        limit %s
        for update skip locked
    ))
    returning id::text, claim
"""
FINISH = """
    update plain
    set status = 'COMPLETED', finished_at = clock_timestamp()
    from unnest(%s::uuid[], %s::integer[]) as done(id, claim)
    where plain.id = done.id and plain.claim = done.claim and plain.status = 'PROCESSING'
"""


@contextlib.contextmanager
def plain_table(bench: Bench) -> Iterator[str]:
    """The URL of a database in which `plain` has the columns, constraints and indexes of `jobs`, and nothing else."""
    with bench.system() as system:
        url = str(system.settings.database_url)
        execute(url, "create table plain (like jobs including all)")
        execute(url, "alter table plain set (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 1)")
        yield url


def connect(url: str) -> Any:
    """A psycopg2 connection in autocommit."""
    return db.Database(url).connect()


def claim_and_finish(url: str, at_once: int) -> int:
    """Claim and finish until nothing is left; how many there were."""
    worker, jobs = new_job_id(), 0
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        while True:
            cursor.execute(CLAIM, (worker, at_once))
            rows = cursor.fetchall()
            if not rows:
                return jobs
            cursor.execute(FINISH, ([row[0] for row in rows], [row[1] for row in rows]))
            jobs += len(rows)
