"""Outcomes on their way into the database: grouped, fenced, kept while the database is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import psycopg2
import pytest
from conftest import eventually, execute
from test_queue import Worker

from jobsys import db
from jobsys.errors import DatabaseUnavailable
from jobsys.ids import new_job_id
from jobsys.outcomes import Outcome, finish, plain_text, release
from jobsys.running import RunningJob
from jobsys.settlements import Settlements
from jobsys.submissions import Submitted
from jobsys.system import JobSystem, Submission


@pytest.fixture
def worker(system: JobSystem) -> Worker:
    return Worker(system.database)


@pytest.fixture
def lost() -> list[Outcome]:
    return []


@pytest.fixture
def settlements(system: JobSystem, lost: list[Outcome]) -> Settlements:
    return Settlements(system.database, written=lambda outcomes: None, lost=lost.extend)


@pytest.fixture
def running(system: JobSystem, worker: Worker) -> Callable[[], RunningJob]:
    """A job, submitted and claimed by `worker`."""

    def claim() -> RunningJob:
        job = system.submit("TEST_JOB")
        [(id, number)] = worker.claim()
        row = (id, "TEST_JOB", 0, "{}", "{}", 1, number, 4, str(job.run_at), 0, 0, "default", 0.0)
        return RunningJob(row, worker=worker.id, job_type=None, max_crashes=3)

    return claim


def next_job() -> Submitted:
    return Submitted(new_job_id(), "TEST_JOB", "default", 0, "{}", "{}", 4, None, None, None, None)


def test_what_follows_a_job_is_inserted_with_its_end(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob]
) -> None:
    job = running()
    job.followups = [next_job()]
    settlements.add(finish(job))
    settlements.write()
    assert system.job(job.message_id).status == "COMPLETED"
    assert system.job(job.followups[0].id).status == "PENDING"


def test_what_follows_and_cannot_be_stored_is_the_failure_of_its_job_and_holds_up_no_other(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob]
) -> None:
    jobs = [running(), running()]
    jobs[0].followups = [next_job()._replace(max_attempts=3_000_000_000)]
    for job in jobs:
        settlements.add(finish(job))
    settlements.write()
    assert [system.job(job.message_id).status for job in jobs] == ["FAILED", "COMPLETED"]
    assert system.counts()["PENDING"] == 0


def test_what_follows_is_not_inserted_when_the_job_was_lost(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob], worker: Worker, lost: list[Outcome]
) -> None:
    job = running()
    job.followups = [next_job()]
    worker.rescue(worker)
    settlements.add(finish(job))
    settlements.write()
    assert [outcome.job for outcome in lost] == [job]
    assert len(system.jobs().jobs) == 1 and system.job(job.message_id).status == "PENDING"


def test_outcomes_wait_while_the_database_is_away_and_are_written_once(
    system: JobSystem, running: Callable[[], RunningJob], lost: list[Outcome], database_url: str
) -> None:
    jobs = [running() for _ in range(3)]
    away = db.Database("postgresql://postgres@127.0.0.1:1/none", wait=1)
    settlements = Settlements(away, written=lambda outcomes: None, lost=lost.extend)
    for job in jobs:
        with pytest.raises(DatabaseUnavailable):
            settlements.add(finish(job))
            settlements.write()
    assert len(settlements) == 3
    with pytest.raises(DatabaseUnavailable):
        settlements.add(finish(jobs[0]))
        settlements.write()
    assert len(settlements) == 3, "Dramatiq repeats the ack; the outcome is there already"
    away.url = database_url
    settlements.add(finish(jobs[0]))
    settlements.write()
    assert len(settlements) == 0 and lost == []
    assert system.totals()["jobs_success"] == 3


def test_one_outcome_that_cannot_be_stored_does_not_take_the_others_along(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob]
) -> None:
    good, bad = running(), running()
    settlements._waiting.append(finish(good))
    settlements.add(Outcome("finish", bad, {"result": '"\\u0000"'}))
    settlements.write()
    assert system.job(good.message_id).status == "COMPLETED"
    now = system.job(bad.message_id)
    assert now.status == "FAILED" and "can't be stored" in (now.error or {})["message"]


def test_a_group_is_one_statement_and_one_commit(system: JobSystem, settlements: Settlements, worker: Worker, database_url: str) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(50))
    moment = str(system.job(system.jobs().jobs[0].id).run_at)
    jobs = [
        RunningJob(
            (id, "TEST_JOB", 0, "{}", "{}", 1, number, 4, moment, 0, 0, "default", 0.0),
            worker=worker.id,
            job_type=None,
            max_crashes=3,
        )
        for id, number in worker.claim(50)
    ]
    settlements._waiting.extend(finish(job) for job in jobs[:-1])
    settlements.add(finish(jobs[-1]))
    settlements.write()
    assert execute(database_url, "select count(distinct xmin::text) from jobs where status = 'COMPLETED'") == [(1,)]


def test_text_that_postgresql_cannot_hold_is_made_such_that_it_can() -> None:
    assert plain_text("a\x00b") == "a\ufffdb"
    assert "\ud800" not in plain_text("a\ud800b")
    assert len(plain_text("x" * 1_000_000, 1000)) < 1100


def test_outcomes_wait_while_the_database_takes_no_writes(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob], server: str, database_url: str
) -> None:
    job = running()
    name = urlsplit(database_url).path.lstrip("/")
    execute(server, f'alter database "{name}" set default_transaction_read_only = on')
    system.database.close()
    with pytest.raises(DatabaseUnavailable):
        settlements.add(finish(job))
        settlements.write()
    assert len(settlements) == 1
    execute(server, f'alter database "{name}" reset default_transaction_read_only')
    system.database.close()
    settlements.write()
    assert system.job(job.message_id).status == "COMPLETED"


def test_whatever_goes_wrong_while_writing_no_outcome_is_dropped(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob], database_url: str
) -> None:
    job = running()
    execute(database_url, "alter table jobs rename column result to outcome")
    with pytest.raises(DatabaseUnavailable):
        settlements.add(finish(job))
        settlements.write()
    execute(database_url, "alter table jobs rename column outcome to result")
    settlements.write()
    assert system.job(job.message_id).status == "COMPLETED"


def test_what_follows_a_job_is_kept_while_neither_its_end_nor_a_failure_can_be_stored(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob], database_url: str
) -> None:
    job = running()
    job.followups = [next_job()]
    for status, condition in (("COMPLETED", "data_exception"), ("FAILED", "lock_not_available")):
        execute(database_url, f"create function {status}() returns trigger language plpgsql as $$ begin raise {condition}; end $$")
        execute(
            database_url,
            f"create trigger {status} before update on jobs for each row when (new.status = '{status}') execute function {status}()",
        )
    with pytest.raises(DatabaseUnavailable):
        settlements.add(finish(job))
        settlements.write()
    for status in ("COMPLETED", "FAILED"):
        execute(database_url, f"drop trigger {status} on jobs")
    settlements.write()
    assert system.job(job.message_id).status == "COMPLETED"
    assert system.job(job.followups[0].id).status == "PENDING"


def test_a_job_that_somebody_has_locked_delays_no_other_and_is_written_when_it_is_free(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [running() for _ in range(20)]
    statements: list[str] = []
    run = db.run
    monkeypatch.setattr(db, "run", lambda connection, name, /, **values: (statements.append(name), run(connection, name, **values))[1])
    holder = psycopg2.connect(database_url)
    holder.cursor().execute("select from jobs where id = %s for update", [jobs[7].message_id])
    for job in jobs:
        settlements.add(finish(job))
    settlements.write()
    assert statements == ["finish", "free", "finish"] and len(settlements) == 1
    settlements._try_locked_at = 0.0
    assert settlements.pause == 0, "once it is time to try again, the writer waits for nothing"
    settlements._try_locked_at = time.monotonic() + 1
    assert [system.job(job.message_id).status for job in jobs].count("COMPLETED") == 19
    threading.Timer(0.5, holder.close).start()
    settlements.write_all(10)
    assert len(settlements) == 0 and system.job(jobs[7].message_id).status == "COMPLETED"


def test_what_ends_while_a_write_is_on_its_way_shares_the_next(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [running() for _ in range(6)]
    groups: list[int] = []
    run = db.run

    def while_others_end(connection: object, name: str, /, **values: list[object]) -> list[db.Row]:
        groups.append(len(settlements))
        if len(groups) == 1:
            for job in jobs[1:]:
                settlements.add(finish(job))
        return run(connection, name, **values)

    monkeypatch.setattr(db, "run", while_others_end)
    settlements.add(finish(jobs[0]))
    settlements.write()
    assert len(settlements) == 5 and settlements.some.is_set(), "they wait for others that end meanwhile"
    settlements.write()
    assert groups == [1, 5] and len(settlements) == 0
    assert system.totals()["jobs_success"] == 6


def test_the_last_write_waits_for_one_that_is_on_its_way(
    system: JobSystem, settlements: Settlements, running: Callable[[], RunningJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [running() for _ in range(2)]
    begun, go_on = threading.Event(), threading.Event()
    run = db.run

    def slowly(connection: object, name: str, /, **values: list[object]) -> list[db.Row]:
        begun.set()
        go_on.wait(20)
        return run(connection, name, **values)

    monkeypatch.setattr(db, "run", slowly)
    settlements.add(finish(jobs[0]))
    writing = threading.Thread(target=settlements.write)
    writing.start()
    begun.wait(20)
    settlements.add(finish(jobs[1]))
    threading.Timer(0.3, go_on.set).start()
    settlements.write_all(20)
    writing.join()
    assert len(settlements) == 0 and system.totals()["jobs_success"] == 2


@pytest.mark.parametrize("waited_for", ["nothing else to start", "a follow-up", "a limited queue", "to be given back", "a full group"])
def test_outcomes_gather_while_more_jobs_wait_in_memory_and_nobody_waits_for_one(
    system: JobSystem, waited_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobsys.settlements.BUSY_GATHER", 600.0)
    monkeypatch.setattr("jobsys.settlements.FULL_GROUP", 10)
    monkeypatch.setattr("jobsys.presence.LATEST_START", 600.0)
    presence = system.broker.attend(threads=20)
    system.submit_many(Submission("TEST_JOB") for _ in range(20))
    jobs = presence.claims.take("default", 5)
    assert len(jobs) == 20
    presence.work.put_all(jobs)

    def end(decide: Callable[[RunningJob], Outcome] = finish) -> RunningJob:
        job: RunningJob = presence.work.get()[1]
        presence.settle(job, decide(job))
        return job

    end()
    eventually(lambda: len(presence.settlements) == 0)  # the first is written at once
    gathering = [end() for _ in range(3)]
    time.sleep(0.2)
    assert len(presence.settlements) == 3
    if waited_for == "nothing else to start":
        presence.work.take_back(lambda job: True)
        presence.settle(jobs[-1], finish(jobs[-1]))
    elif waited_for == "a follow-up":
        jobs[4].followups.append(next_job())
        end()
    elif waited_for == "a limited queue":
        monkeypatch.setattr(presence.claims, "_limited", {"default"})
        end()
    elif waited_for == "to be given back":
        end(release)
    else:
        for _ in range(7):
            end()
    eventually(lambda: len(presence.settlements) == 0)
    assert all(system.job(job.message_id).status == "COMPLETED" for job in gathering)


@pytest.mark.parametrize(("threads", "gather"), [(1, True), (1_000, False)])
def test_outcomes_gather_for_longer_the_fewer_threads_there_are(
    system: JobSystem, threads: int, gather: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobsys.settlements.WORK_AT_STAKE", 60.0)
    monkeypatch.setattr("jobsys.presence.LATEST_START", 600.0)
    presence = system.broker.attend(threads=threads)
    monkeypatch.setattr(presence.claims, "_room", lambda: 20)
    system.submit_many(Submission("TEST_JOB") for _ in range(20))
    presence.work.put_all(presence.claims.take("default", 5))

    def end() -> None:
        job: RunningJob = presence.work.get()[1]
        presence.settle(job, finish(job))

    end()
    eventually(lambda: len(presence.settlements) == 0)  # the first is written at once
    end()
    if gather:
        time.sleep(5)
        assert len(presence.settlements) == 1
        presence.work.take_back(lambda job: True)
    else:
        eventually(lambda: len(presence.settlements) == 0)
