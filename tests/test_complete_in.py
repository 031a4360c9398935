"""A job's own writes and its completion in one transaction: both or neither, whatever dies."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from conftest import Running, eventually, execute
from psycopg2.extras import RealDictCursor
from test_queue import Worker
from test_worker import _importable, lines, settings, until  # noqa: F401

from jobsys import Job
from jobsys.errors import JobStopped
from jobsys.running import RunningJob
from jobsys.system import JobRecord, JobSystem, Submission

Submit = Callable[..., JobRecord]


@pytest.fixture
def submit(system: JobSystem, database_url: str, ledger: Path) -> Submit:
    """`submit(how)`: a job that writes a row into `transfers`, completes in the same transaction, and goes on as `how` says."""
    execute(database_url, "create table transfers (job uuid, attempt integer)")
    return lambda how, seconds=0.0: system.submit(
        "TRANSFER", {"ledger": str(ledger), "url": database_url, "how": how, "seconds": seconds, "label": "it"}
    )


@pytest.mark.parametrize(
    ("how", "status", "runs", "rows"),
    [
        ("commit", "COMPLETED", 1, 1),
        ("raise after", "COMPLETED", 1, 1),
        ("die after", "COMPLETED", 1, 1),
        ("roll back", "FAILED", 2, 0),
        ("raise before", "FAILED", 2, 0),
        ("twice", "FAILED", 2, 0),
        ("die before", "DEAD", 3, 0),
        ("autocommit", "FAILED", 2, 2),
    ],
)
def test_the_jobs_writes_and_its_completion_happen_together_or_not_at_all(
    system: JobSystem,
    submit: Submit,
    worker: Running,
    database_url: str,
    ledger: Path,
    how: str,
    status: str,
    runs: int,
    rows: int,
) -> None:
    job = until(system, submit(how), "COMPLETED", "FAILED", "DEAD", timeout=40)
    assert job.status == status
    assert len(lines(ledger, "start")) == runs
    assert execute(database_url, "select count(*) from transfers") == [(rows,)]
    if status == "COMPLETED":
        assert job.result == {"attempt": 1} and job.error is None
    if how == "raise after":
        eventually(lambda: "a job raised after complete_in" in worker.output)
    if how == "roll back":
        assert job.error is not None and job.error["type"] == "NotCommitted"


def test_a_worker_that_is_frozen_between_completion_and_commit_still_completes_its_job(
    system: JobSystem,
    submit: Submit,
    start_worker: Callable[..., Running],
    ledger: Path,
    database_url: str,
) -> None:
    start_worker(WORKER_PROCESSES=2)
    job = submit("commit", 1.5)
    [note] = eventually(lambda: lines(ledger, "completed"))
    pid = int(note.split()[3])
    os.kill(pid, signal.SIGSTOP)
    execute(database_url, "update workers set heartbeat_at = '-infinity' where pid = %s", pid)
    time.sleep(1)  # some rounds of rescue
    assert system.job(job.id).status == "PROCESSING"
    os.kill(pid, signal.SIGCONT)
    assert until(system, job, "COMPLETED").attempt == 1
    assert len(lines(ledger, "start")) == 1 and execute(database_url, "select count(*) from transfers") == [(1,)]


@pytest.fixture
def claimed(system: JobSystem) -> Callable[..., RunningJob]:
    """`claimed(options="{}")`: a job in the hands of a worker."""

    def claim(options: str = "{}") -> RunningJob:
        worker = Worker(system.database)
        system.submit("TEST_JOB")
        [(id, number)] = worker.claim()
        row = (id, "TEST_JOB", 0, "{}", options, 1, number, 4, "", 0, 0, "default", 0.0)
        return RunningJob(row, worker=worker.id, job_type=None, max_crashes=3)

    return claim


@pytest.fixture
def connection(database_url: str) -> Iterator[Any]:
    with contextlib.closing(psycopg2.connect(database_url, cursor_factory=RealDictCursor)) as connection:
        yield connection


def test_whoever_lost_the_job_meanwhile_cannot_complete_it(system: JobSystem, claimed: Callable[..., RunningJob], connection: Any) -> None:
    lost = claimed()
    system.database.run("rescue", worker=lost.worker, max_crashes=3, message="gone")
    with pytest.raises(JobStopped, match="lost"):
        lost.job.complete_in(connection)
    connection.rollback()
    assert system.job(lost.message_id).status == "PENDING" and not lost.job.completing


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ("set transaction isolation level repeatable read", "read committed, not repeatable read"),
        ("set local search_path to nowhere", "the database, and the schema, where the jobs are"),
        ("alter table jobs rename to others; create table jobs (like others)", "the database, and the schema, where the jobs are"),
    ],
)
def test_a_transaction_that_will_not_do_is_refused_with_what_would(
    claimed: Callable[..., RunningJob], connection: Any, prepare: str, said: str
) -> None:
    job = claimed()
    connection.cursor().execute(prepare)
    with pytest.raises(ValueError, match=said):
        job.job.complete_in(connection)
    assert not job.job.completing


def test_a_job_that_others_follow_cannot_complete_by_itself(claimed: Callable[..., RunningJob], connection: Any) -> None:
    with pytest.raises(ValueError, match="nothing would follow"):
        claimed('{"pipe_target": {}}').job.complete_in(connection)


def test_it_waits_while_somebody_looks_at_the_job(
    system: JobSystem, claimed: Callable[..., RunningJob], connection: Any, database_url: str
) -> None:
    job, holder = claimed(), psycopg2.connect(database_url)
    holder.cursor().execute("select from jobs where id = %s for update", [job.message_id])
    threading.Timer(0.5, holder.close).start()
    job.job.complete_in(connection, {"rows": 1})
    connection.commit()
    assert system.job(job.message_id).result == {"rows": 1}


def test_a_transaction_that_a_job_leaves_open_holds_up_no_other_outcome(
    system: JobSystem,
    submit: Submit,
    worker: Running,
    ledger: Path,
) -> None:
    open_job = submit("linger", 4.0)
    eventually(lambda: lines(ledger, "completed"))
    for job in system.submit_many(Submission("LEDGER", {"ledger": str(ledger)}) for _ in range(20)):
        until(system, system.job(job), "COMPLETED")
    assert system.job(open_job.id).status == "PROCESSING" and system.job(open_job.id).attempt == 1
    eventually(lambda: (system.job(open_job.id).error or {}).get("type") == "NotCommitted", 20)


def test_outside_of_a_worker_the_result_is_kept_on_the_job() -> None:
    job, connection = Job(), object()
    job.complete_in(connection, {"rows": 3})
    assert job.result == {"rows": 3}


def test_a_result_that_is_no_json_is_refused_before_anything_is_written(claimed: Callable[..., RunningJob], connection: Any) -> None:
    with pytest.raises(TypeError, match="the result"):
        claimed().job.complete_in(connection, {1, object()})
