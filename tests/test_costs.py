"""What a job costs, in counts: machines differ in their clocks, and not in these."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest
from conftest import Running, eventually, execute
from psycopg2 import extensions

from jobsys import db
from jobsys.chores import SHORTEST_LOOK, Chores
from jobsys.system import JobSystem, Submission

COMMITS = "select xact_commit from pg_stat_database where datname = current_database()"
SESSIONS_OF_WORKERS = "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'jobsys %'"


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that this process sends, each a round trip, from here on."""
    sent: list[str] = []

    class Recording(extensions.cursor):
        def execute(self, query: Any, vars: Any = None) -> None:
            sent.append(str(query))
            super().execute(query, vars)

    connect = db.Database.connect

    def recorded(database: db.Database) -> Any:
        connection = connect(database)
        connection.cursor_factory = Recording
        return connection

    monkeypatch.setattr(db.Database, "connect", recorded)
    return sent


def commits(database_url: str) -> int:
    """How many there were in this database. Sessions tell of theirs when they end, else after a second."""
    return int(execute(database_url, COMMITS)[0][0])


@pytest.mark.parametrize("given", [{}, {"priority": "high"}, {"delay": 60}, {"idempotency_key": "once"}])
def test_a_submission_is_one_statement(statements: list[str], system: JobSystem, given: dict[str, Any]) -> None:
    system.submit("TEST_JOB")
    statements.clear()
    system.submit("TEST_JOB", **given)
    assert len(statements) == 1


def test_many_are_submitted_by_as_many_statements_as_a_few(statements: list[str], system: JobSystem) -> None:
    counts = []
    for number in (2, 99):
        statements.clear()
        system.submit_many(Submission("TEST_JOB") for _ in range(number))
        counts.append(len(statements))
    assert counts == [2, 2]


def test_nothing_is_promoted_while_nothing_falls_due(statements: list[str], system: JobSystem, database_url: str) -> None:
    chores = Chores(system.broker.attend(threads=1))
    looks = [db.STATEMENTS["next_due"]]
    statements.clear()
    assert chores.promote() is None and statements == looks
    system.submit("TEST_JOB", delay=60)
    statements.clear()
    wait = chores.promote()
    assert wait is not None and 30 < wait <= 60 and statements == looks
    execute(database_url, "update jobs set run_at = now()")
    with psycopg2.connect(database_url) as holder, holder.cursor() as cursor:
        cursor.execute("select from jobs for update")
        statements.clear()
        assert chores.promote() is None and len(statements) == 2, "what somebody has locked is not waited for by trying and trying"
    holder.close()
    assert chores.promote() == SHORTEST_LOOK
    assert system.counts()["PENDING"] == 1


def test_a_crowd_that_falls_due_keeps_no_other_chore_waiting(statements: list[str], system: JobSystem, database_url: str) -> None:
    presence = system.broker.attend(threads=1)
    presence._chores.stop()  # or it promotes some of them
    chores = Chores(presence)
    system.submit_many(Submission("TEST_JOB", delay=60) for _ in range(2_500))
    execute(database_url, "update jobs set run_at = now()")
    promoted = []
    for _ in range(4):
        statements.clear()
        promoted.append((chores.promote(), len(statements), system.counts()["PENDING"]))
    assert promoted == [(0.0, 2, 1000), (0.0, 2, 2000), (SHORTEST_LOOK, 2, 2500), (None, 1, 2500)]


def test_a_backlog_is_drained_by_few_commits(system: JobSystem, start_worker: Callable[..., Running], database_url: str) -> None:
    jobs = 5_000
    system.submit_many(Submission("TEST_JOB") for _ in range(jobs))
    before = commits(database_url)
    worker = start_worker(LOG_LEVEL="WARNING")
    eventually(lambda: system.counts()["COMPLETED"] == jobs, timeout=60, interval=0.5)
    assert worker.stop() == 0
    eventually(lambda: execute(database_url, SESSIONS_OF_WORKERS) == [(0,)])
    # Claims of some hundreds, outcomes in groups; and what the process says and looks for five times a second.
    assert commits(database_url) - before < jobs / 10


def test_a_post_is_one_commit(system: JobSystem, start_web: Callable[..., Running], database_url: str) -> None:
    web = start_web(LOG_LEVEL="WARNING", WEB_PROCESSES=1)
    before = commits(database_url)
    for number in range(300):
        request = urllib.request.Request(
            f"{web.url}/jobs", json.dumps({"payload": {"number": number}}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            assert response.status == 202
    assert web.stop() == 0
    eventually(lambda: commits(database_url) - before >= 300)
    assert commits(database_url) - before < 1.2 * 300
    assert system.counts()["PENDING"] == 300
