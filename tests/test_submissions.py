"""Jobs on their way into the table: alone, in a crowd, and a great many at once."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import pytest
from conftest import eventually, execute
from psycopg2.extras import DictConnection, LoggingConnection, NamedTupleConnection, RealDictConnection

from jobsys import submissions
from jobsys.errors import DatabaseUnavailable, InvalidSubmission
from jobsys.submissions import MANY
from jobsys.system import JobSystem, Submission

PEOPLE = 24


@pytest.fixture
def held(system: JobSystem, database_url: str) -> Any:
    """Holds up every insert of a job until it is let go."""
    with contextlib.closing(psycopg2.connect(database_url)) as connection:
        connection.cursor().execute("lock table jobs in share mode")
        yield connection


def crowd(system: JobSystem, held: Any, *submissions: Submission) -> list[Any]:
    """What becomes of submissions that arrive while the first one is still being inserted: records and exceptions."""

    def submit(submission: Submission) -> Any:
        try:
            return system.submit(submission.type, submission.payload)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(submissions)) as threads:
        futures = [threads.submit(submit, submission) for submission in submissions]
        while len(system._submissions._waiting) < len(submissions) - 1:
            threading.Event().wait(0.01)
        held.commit()
        return [future.result() for future in futures]


def test_a_crowd_shares_a_commit_and_each_gets_its_own_job(system: JobSystem, held: Any, database_url: str) -> None:
    records = crowd(system, held, *(Submission("TEST_JOB", {"n": n}) for n in range(PEOPLE)))
    assert [record.payload["n"] for record in records] == list(range(PEOPLE))
    assert {record.id for record in records} == {job.id for job in system.jobs().jobs}
    assert execute(database_url, "select count(distinct xmin::text) from jobs") == [(2,)], "the first alone, all others together"


def test_a_crowd_with_large_payloads_is_inserted_a_part_at_a_time(
    system: JobSystem, held: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "LARGEST_GROUP", 4000)
    records = crowd(system, held, *(Submission("TEST_JOB", {"text": "x" * 1000}) for _ in range(13)))
    assert {record.id for record in records} == {job.id for job in system.jobs().jobs}
    assert execute(database_url, "select count(distinct xmin::text) from jobs") == [(4,)], "the first alone, the others four at a time"


def test_when_a_part_of_a_crowd_fails_for_a_reason_of_our_own_the_others_are_inserted_all_the_same(
    system: JobSystem, held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "LARGEST_INSERT", 4)
    insert, calls = system._submissions._insert, []

    def stumble(group: list[Any]) -> None:
        calls.append(len(group))
        if len(calls) == 1:
            raise MemoryError
        insert(group)

    monkeypatch.setattr(system._submissions, "_insert", stumble)
    records = crowd(system, held, *(Submission("TEST_JOB") for _ in range(13)))
    failed = [record for record in records if isinstance(record, Exception)]
    assert [type(error) for error in failed] == [DatabaseUnavailable] * 4
    assert {record.id for record in records if record not in failed} == {job.id for job in system.jobs().jobs}
    assert calls == [4, 4, 4]
    assert system.submit("TEST_JOB").status == "PENDING"


def test_a_key_that_many_threads_use_makes_one_job(system: JobSystem) -> None:
    with ThreadPoolExecutor(PEOPLE) as threads:
        records = list(threads.map(lambda _: system.submit("TEST_JOB", idempotency_key="k"), range(PEOPLE)))
    assert len({record.id for record in records}) == 1
    assert sum(record.replayed for record in records) == PEOPLE - 1


def test_a_key_in_somebodys_open_transaction_holds_up_nobody_without_one(system: JobSystem, database_url: str) -> None:
    with contextlib.closing(psycopg2.connect(database_url)) as connection, ThreadPoolExecutor(1) as threads:
        first = system.submit("TEST_JOB", idempotency_key="k", connection=connection)
        waits = threads.submit(system.submit, "TEST_JOB", idempotency_key="k")
        assert system.submit("TEST_JOB").status == "PENDING" and not waits.done()
        connection.commit()
        assert waits.result().id == first.id


def test_a_thread_that_gives_up_waiting_leaves_the_others_their_turn(system: JobSystem, held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as threads:
        leader = threads.submit(system.submit, "TEST_JOB")
        while not system._submissions._inserting:
            threading.Event().wait(0.01)
        with monkeypatch.context() as interrupted:
            interrupted.setattr(submissions._Awaited, "wait", lambda turn: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                system.submit("TEST_JOB")
        held.commit()
        assert leader.result().status == "PENDING"
        assert threads.submit(system.submit, "TEST_JOB").result(5).status == "PENDING"


def test_when_the_database_goes_away_every_one_of_a_crowd_is_told(system: JobSystem, held: Any, database_url: str, server: str) -> None:
    def cut() -> None:
        execute(
            database_url,
            "select pg_terminate_backend(pid) from pg_stat_activity where wait_event_type = 'Lock' and pid <> pg_backend_pid()",
        )

    threading.Timer(1, cut).start()
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(system.submit, "TEST_JOB") for _ in range(4)]
        threading.Event().wait(1.5)
        held.commit()
        ends = [future.exception() for future in futures]
    assert any(isinstance(end, DatabaseUnavailable) for end in ends)
    assert execute(database_url, "select count(*) from jobs") == [(sum(end is None for end in ends),)]


REFUSES = """
    create function refuse() returns trigger language plpgsql as $$ begin raise exception 'not this one' using errcode = %s; end $$;
    create trigger refuse before insert on jobs for each row when (new.payload ? 'refused') execute function refuse()
"""


@pytest.mark.parametrize(
    ("errcode", "error"),
    [
        ("22023", InvalidSubmission),
        ("23514", psycopg2.IntegrityError),
        ("P0001", psycopg2.Error),
        ("42501", psycopg2.ProgrammingError),
        ("54000", psycopg2.OperationalError),
        ("OWN01", psycopg2.Error),
    ],
)
def test_one_that_is_refused_costs_the_others_of_its_crowd_nothing(
    system: JobSystem, database_url: str, errcode: str, error: type[Exception]
) -> None:
    execute(database_url, REFUSES, (errcode,))
    with contextlib.closing(psycopg2.connect(database_url)) as held:
        held.cursor().execute("lock table jobs in share mode")
        ends = crowd(system, held, *(Submission("TEST_JOB", {"refused": n} if n == 7 else {"n": n}) for n in range(PEOPLE)))
    assert isinstance(ends.pop(7), error)
    assert {record.id for record in ends} == {job.id for job in system.jobs().jobs}


def test_one_of_which_a_trigger_keeps_nothing_was_not_submitted(system: JobSystem, database_url: str) -> None:
    execute(
        database_url,
        """
        create function skip() returns trigger language plpgsql as $$ begin return null; end $$;
        create trigger skip before insert on jobs for each row when (new.payload ? 'skipped') execute function skip()
        """,
    )
    skipped, kept = (system.describe(Submission("TEST_JOB", payload)) for payload in ({"skipped": 1}, {}))
    ends: dict[str, Any] = {}
    with contextlib.closing(psycopg2.connect(database_url)) as held, ThreadPoolExecutor(1) as threads:
        held.cursor().execute("lock table jobs in share mode")
        first = threads.submit(system.submit, "TEST_JOB", {"skipped": 1})
        while not system._submissions._inserting:
            threading.Event().wait(0.01)
        assert system.submit_with_others(skipped, lambda error: ends.update(skipped=error))
        assert system.submit_with_others(kept, lambda error: ends.update(kept=error))
        held.commit()
        assert isinstance(first.exception(), DatabaseUnavailable)
    eventually(lambda: len(ends) == 2)
    assert isinstance(ends["skipped"], DatabaseUnavailable) and ends["kept"] is None
    assert [job.id for job in system.jobs().jobs] == [kept.id]


def test_who_does_not_wait_is_told_once_the_job_is_committed(system: JobSystem, held: Any, database_url: str) -> None:
    ends: dict[str, Any] = {}
    job, other = (system.describe(Submission("TEST_JOB", {"n": n})) for n in range(2))
    assert not system.submit_with_others(job, lambda error: ends.update(alone=error)), "there are no others"
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(system.submit, "TEST_JOB")
        while not system._submissions._inserting:
            threading.Event().wait(0.01)
        later = system.describe(Submission("TEST_JOB", delay=60))
        assert not system.submit_with_others(later, lambda error: ends.update(later=error)), "it is no plain one"

        def tell(error: Exception | None) -> None:
            ends["job"] = (error, execute(database_url, "select count(*) from jobs where id = %s", (job.id,)))
            raise RuntimeError("this concerns nobody else")

        assert system.submit_with_others(job, tell)
        assert system.submit_with_others(other, lambda error: ends.update(other=error))
        threading.Event().wait(0.2)
        assert ends == {}
        held.commit()
        assert first.result().status == "PENDING"
    eventually(lambda: ends == {"job": (None, [(1,)]), "other": None})


def test_the_thread_that_inserts_for_others_ends_and_comes_again(
    system: JobSystem, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "IDLE", 0.05)
    for _ in range(3):
        with contextlib.closing(psycopg2.connect(database_url)) as held:
            held.cursor().execute("lock table jobs in share mode")
            assert len(crowd(system, held, *(Submission("TEST_JOB") for _ in range(5)))) == 5
        eventually(lambda: system._submissions._thread is None)
    assert system.counts()["PENDING"] == 15


def test_where_no_thread_can_begin_the_crowd_is_inserted_all_the_same(
    system: JobSystem, held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "jobsys submissions":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    records = crowd(system, held, *(Submission("TEST_JOB", {"n": n}) for n in range(PEOPLE)))
    assert {record.id for record in records} == {job.id for job in system.jobs().jobs}


def many() -> list[Submission]:
    """More than are inserted one by one, of every kind, with text that COPY would take for something else."""
    submissions = [Submission("TEST_JOB", {"text": f"{n}\t\\N\\\\ \"quoted\" 'it' \n é \u2028 \\.", "n": n}) for n in range(3 * MANY)]
    submissions[5] = Submission("TEST_JOB", {"n": 5}, delay=3600)
    submissions[MANY + 7] = Submission("TEST_JOB", {"n": MANY + 7}, idempotency_key="key", priority="high")
    return submissions


def test_many_arrive_as_they_were_given_and_in_that_order(system: JobSystem) -> None:
    first = system.submit("TEST_JOB", {"n": MANY + 7}, idempotency_key="key", priority="high")
    submissions = many()
    ids = system.submit_many(iter(submissions))
    assert ids[MANY + 7] == first.id
    for id, submission in zip(ids, submissions, strict=True):
        assert system.job(id).payload == submission.payload
    assert system.job(ids[5]).status == "SCHEDULED"
    rest = [id for id in ids if id != first.id]
    assert rest == sorted(rest) and system.totals()["jobs_created"] == len(submissions)


@pytest.mark.parametrize("place", [3, 2 * MANY])
@pytest.mark.parametrize("autocommit", [True, False])
def test_one_that_is_invalid_leaves_nothing_of_many_and_the_transaction_usable(
    system: JobSystem, database_url: str, place: int, autocommit: bool
) -> None:
    submissions = many()
    submissions[place] = Submission("TEST_JOB", {"sleepMs": "no"})
    with contextlib.closing(psycopg2.connect(database_url)) as connection:
        connection.autocommit = autocommit
        cursor = connection.cursor()
        cursor.execute("create temp table mine (n integer)")
        for own in (None, connection):
            with pytest.raises(InvalidSubmission) as refused:
                system.submit_many(submissions, connection=own)
            assert refused.value.errors[0]["loc"][0] == place
        cursor.execute("select count(*) from mine")
        if not autocommit:
            connection.commit()
    assert system.counts()["PENDING"] == 0


def test_many_are_part_of_the_callers_transaction(system: JobSystem, database_url: str) -> None:
    with contextlib.closing(psycopg2.connect(database_url)) as connection:
        system.submit_many(many(), connection=connection)
        assert system.counts()["PENDING"] == 0
        connection.rollback()
        assert system.counts()["PENDING"] == 0
        system.submit_many(many(), connection=connection)
        connection.commit()
    assert system.counts()["PENDING"] == 3 * MANY - 1


@pytest.mark.parametrize("rows", [RealDictConnection, DictConnection, LoggingConnection, NamedTupleConnection])
def test_the_callers_connection_may_give_rows_of_any_kind(system: JobSystem, database_url: str, rows: Any) -> None:
    rounding = "-c extra_float_digits=-15"
    with contextlib.closing(psycopg2.connect(database_url, connection_factory=rows, options=rounding)) as connection:
        if rows is LoggingConnection:
            connection.initialize(io.StringIO())
        wanted = connection.cursor_factory
        plain = system.submit("TEST_JOB", connection=connection)
        keyed = system.submit("TEST_JOB", idempotency_key="k", connection=connection)
        again = system.submit("TEST_JOB", idempotency_key="k", connection=connection)
        few = system.submit_many(many()[: MANY // 2], connection=connection)
        assert connection.cursor_factory is wanted
        connection.commit()
    assert again == keyed._replace(replayed=True) and system.job(plain.id) == plain
    assert {plain.id, keyed.id, *few} == {job.id for job in system.jobs(limit=100).jobs}


def test_many_in_a_transaction_the_caller_opened_in_autocommit(system: JobSystem, database_url: str) -> None:
    with contextlib.closing(psycopg2.connect(database_url)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("begin")
        system.submit_many(many(), connection=connection)
        cursor.execute("rollback")
        assert system.counts()["PENDING"] == 0, "the caller's transaction is the caller's"
        with contextlib.suppress(ZeroDivisionError), connection:
            system.submit_many(many(), connection=connection)
            raise ZeroDivisionError
        assert system.counts()["PENDING"] == 0
        with connection:
            system.submit_many(many(), connection=connection)
    assert system.counts()["PENDING"] == 3 * MANY - 1


def test_ctrl_c_while_many_are_described_is_no_database_error(system: JobSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = system._described

    def interrupted(submission: Submission, loc: Any) -> Any:
        if loc == (2 * MANY,):
            raise KeyboardInterrupt
        return describe(submission, loc)

    monkeypatch.setattr(system, "_described", interrupted)
    with pytest.raises(KeyboardInterrupt):
        system.submit_many(many())
    assert system.counts()["PENDING"] == 0


FORKS = """
import os, sys
from jobsys.ids import new_job_id, new_request_id

for _ in range(4):
    new_job_id(), new_request_id()
    if os.fork() == 0:
        break
# One write, which the pipe keeps whole.
os.write(1, "".join(f"{new_job_id()[19:]} {new_request_id()}\\n" for _ in range(100)).encode())
"""


def test_forked_processes_make_different_ids() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True, timeout=30)
    randoms = done.stdout.split()
    assert len(randoms) == len(set(randoms)) == 5 * 100 * 2
