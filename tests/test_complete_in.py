"""A job's own writes and its completion in one transaction: both or neither, whatever dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from conftest import Running, eventually, execute
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
        eventually(lambda: "a job raised after it had completed" in worker.output)
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


def test_whoever_lost_the_job_meanwhile_cannot_complete_it(system: JobSystem, database_url: str) -> None:
    worker = Worker(system.database)
    system.submit("TEST_JOB")
    [(id, claim)] = worker.claim()
    row = (id, "TEST_JOB", 0, "{}", "{}", 1, claim, 4, "", 0, 0, "default")
    lost = RunningJob(row, worker=worker.id, job_type=None, max_crashes=3)
    worker.rescue(worker)
    with psycopg2.connect(database_url) as connection, pytest.raises(JobStopped, match="lost"):
        lost.job.complete_in(connection)
    connection.close()
    assert system.job(id).status == "PENDING" and not lost.job.completing


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


def test_a_result_that_is_no_json_is_refused_before_anything_is_written(system: JobSystem, database_url: str) -> None:
    worker = Worker(system.database)
    system.submit("TEST_JOB")
    [(id, claim)] = worker.claim()
    job: Any = RunningJob((id, "TEST_JOB", 0, "{}", "{}", 1, claim, 4, "", 0, 0, "default"), worker=worker.id, job_type=None, max_crashes=3)
    with psycopg2.connect(database_url) as connection, pytest.raises(TypeError, match="the result"):
        job.job.complete_in(connection, {1, object()})
    connection.close()
