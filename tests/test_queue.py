"""The broker's statements, as claims and outcomes see them: order, fence, limits, counts. No worker process."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from operator import itemgetter
from typing import Any

import psycopg2
import pytest
from conftest import eventually, execute

from jobsys import db
from jobsys.errors import DatabaseUnavailable
from jobsys.ids import new_job_id
from jobsys.job_types import PRIORITIES
from jobsys.system import JobSystem, Submission

BEGINNING = ("-infinity", "00000000-0000-0000-0000-000000000000")
PLACES = {"queues": ["default"] * 3, "priorities": [-10, 0, 10], "from_run_at": [BEGINNING[0]] * 3, "from_id": [BEGINNING[1]] * 3}
LOOK = {**PLACES, "turn": None, "ahead_of": None}


class Worker:
    """A row in `workers`, and its statements by hand."""

    def __init__(self, database: db.Database, **overrides: Any) -> None:
        self.database = database
        self.id = new_job_id()
        row = {
            "host": "h",
            "pid": 1,
            "version": "0",
            "queues": ["default"],
            "types": ["TEST_JOB"],
            "threads": 1,
            "heartbeat": 5,
            "lost_after": 30,
        }
        self.database.run("register_worker", id=self.id, **row | overrides)

    def claim(self, n: int = 1, *, queue: str = "default", types: list[str] | None = None) -> list[tuple[str, int]]:
        rows = self.database.run(
            "claim",
            worker=self.id,
            types=types or ["TEST_JOB", "INGEST_BATCH"],
            **LOOK | {"queues": [queue] * 3},
            n=n,
        )
        return [(row[0], row[6]) for row in sorted(rows, key=itemgetter(2, 8, 0))]

    def finish(self, *claimed: tuple[str, int]) -> list[str]:
        ids, claims = zip(*claimed, strict=True)
        return [row[0] for row in self.database.run("finish", id=list(ids), claim=list(claims), result=[None] * len(ids))]

    def release(self, *claimed: tuple[str, int]) -> list[str]:
        ids, claims = zip(*claimed, strict=True)
        return [row[0] for row in self.database.run("release", id=list(ids), claim=list(claims))]

    def fail(self, claimed: tuple[str, int], *, delay: float = 0.0) -> list[str]:
        failure = {"options": ['{"retries": 1}'], "type": ["E"], "message": ["m"], "traceback": ["t"], "fingerprint": ["f"]}
        rows = self.database.run("retry", id=[claimed[0]], claim=[claimed[1]], worker=[self.id], delay=[delay], **failure)
        return [row[0] for row in rows]

    def die(self) -> None:
        self.database.run("report_death", host="h", pid=1)

    def rescue(self, lost: Worker, *, max_crashes: int = 3) -> list[Any]:
        return self.database.run("rescue", worker=lost.id, max_crashes=max_crashes, message="gone")


@pytest.fixture
def worker(system: JobSystem) -> Worker:
    return Worker(system.database)


def test_a_more_urgent_job_is_claimed_first_and_equals_in_the_order_they_came(system: JobSystem, worker: Worker) -> None:
    low, first, second, high = (system.submit("TEST_JOB", priority=word).id for word in ("low", "default", "MEDIUM", "High"))
    assert [id for id, _ in worker.claim(2)] == [high, first]
    assert [id for id, _ in worker.claim(2)] == [second, low]


def test_two_workers_never_claim_the_same_job(system: JobSystem, worker: Worker) -> None:
    ids = system.submit_many(Submission("TEST_JOB") for _ in range(20))
    with system.database.transaction() as connection, connection.cursor() as cursor:
        cursor.execute("select id from jobs order by id limit 5 for update")
        others = [id for id, _ in worker.claim(50)]
    assert others == ids[5:]


def test_only_known_types_are_claimed_so_that_a_new_type_waits_for_a_new_worker(system: JobSystem, worker: Worker) -> None:
    system.submit("TEST_JOB")
    assert worker.claim(types=["SOMETHING_ELSE"]) == []
    assert len(worker.claim()) == 1


def test_a_scheduled_job_is_not_claimed_before_it_is_promoted_when_due(system: JobSystem, worker: Worker, database_url: str) -> None:
    job = system.submit("TEST_JOB", delay=3600)
    assert job.status == "SCHEDULED"
    assert worker.claim() == [] and system.database.run("promote") == []
    execute(database_url, "update jobs set run_at = clock_timestamp() - interval '1 second'")
    assert system.database.run("promote") == [("default",)]
    assert worker.claim()[0][0] == job.id


def test_a_run_at_in_the_past_is_due_at_once(system: JobSystem) -> None:
    assert system.submit("TEST_JOB", run_at=datetime.now(timezone.utc) - timedelta(days=1)).status == "PENDING"


def test_a_worker_that_lost_its_job_cannot_finish_it(system: JobSystem, worker: Worker) -> None:
    job = system.submit("TEST_JOB")
    [mine] = worker.claim()
    other = Worker(system.database, pid=2)
    other.rescue(worker)
    [theirs] = other.claim()
    assert theirs[0] == mine[0]
    assert worker.finish(mine) == [] and worker.fail(mine) == [] and worker.release(mine) == []
    assert system.job(job.id).status == "PROCESSING"
    assert other.finish(theirs) == [job.id]


def test_a_released_job_keeps_its_attempt_number_and_yet_the_old_claim_is_void(system: JobSystem, worker: Worker) -> None:
    job = system.submit("TEST_JOB")
    [first] = worker.claim()
    worker.release(first)
    assert system.job(job.id).attempt == 0
    [second] = worker.claim()
    assert system.job(job.id).attempt == 1
    assert worker.finish(first) == []
    assert worker.finish(second) == [job.id]


def test_a_claim_that_postgresql_forgot_in_a_crash_is_void(system: JobSystem, worker: Worker, database_url: str) -> None:
    job = system.submit("TEST_JOB")
    with psycopg2.connect(database_url) as connection:
        [(id, *_, forgotten, _, _, _, _, _, _)] = db.run(connection, "claim", worker=worker.id, types=["TEST_JOB"], **LOOK, n=1)
        with connection.cursor() as cursor:
            cursor.execute("show synchronous_commit")
            assert cursor.fetchone() == ("off",), "nobody waits for the disk before a job starts"
        connection.rollback()
    connection.close()
    other = Worker(system.database, pid=2)
    [claimed] = other.claim()
    assert worker.finish((id, forgotten)) == [] and worker.fail((id, forgotten)) == []
    assert other.finish(claimed) == [job.id]


def test_an_operators_retry_does_not_make_an_old_claim_valid_again(system: JobSystem, worker: Worker) -> None:
    job = system.submit("TEST_JOB")
    [old] = worker.claim()
    Worker(system.database, pid=2).rescue(worker, max_crashes=1)
    assert system.job(job.id).status == "DEAD"
    system.retry(job.id, by="me")
    [new] = worker.claim()
    assert system.job(job.id).attempt == 1
    assert worker.finish(old) == []
    assert worker.finish(new) == [job.id]


def test_finishing_twice_records_once(system: JobSystem, worker: Worker) -> None:
    system.submit("TEST_JOB")
    [mine] = worker.claim()
    assert worker.finish(mine) and not worker.finish(mine)
    assert system.totals()["jobs_success"] == 1


def test_a_crash_is_counted_at_the_rescue_and_the_last_one_is_a_dead_letter(system: JobSystem, worker: Worker, database_url: str) -> None:
    job = system.submit("TEST_JOB", max_retries=0)
    for crash in (1, 2, 3):
        [(id, _)] = worker.claim()
        if crash == 3:
            worker.rescue(worker)
            assert system.job(job.id).status == "PENDING", "it may have waited in memory: a suspect's crash counts when it ran alone"
            worker.claim()
            system.database.run("run_alone", id=worker.id, job=id)
        worker.rescue(worker)
        assert system.job(job.id).status == ("PENDING", "PENDING", "DEAD")[crash - 1]
    assert [failure.type for failure in system.failures(job.id)] == ["WorkerLost"] * 4
    assert (system.job(job.id).error or {})["type"] == "WorkerLost"


def test_who_registers_learns_how_many_there_are(system: JobSystem, database_url: str) -> None:
    first, row = Worker(system.database), {"queues": [], "types": [], "threads": 1, "heartbeat": 5, "lost_after": 30}
    [(workers,)] = system.database.run("register_worker", id=new_job_id(), host="h", pid=2, version="0", **row)
    [(beaten,)] = system.database.run("beat", id=first.id, suspect=None, held_back=[])
    assert workers == beaten == 2


def test_a_worker_is_lost_when_its_session_is_gone_or_its_heart_is_silent(system: JobSystem, database_url: str) -> None:
    with contextlib.closing(psycopg2.connect(database_url)) as session:
        session.autocommit = True
        row = {"host": "h", "pid": 9, "version": "0", "queues": ["default"], "types": [], "threads": 1, "heartbeat": 1, "lost_after": 30}
        id = new_job_id()
        db.run(session, "register_worker", id=id, **row)

        def lost() -> bool:
            return (id,) in system.database.run("lost_workers", silence_counts=True)

        execute(database_url, "update workers set heartbeat_at = clock_timestamp() - interval '10 seconds'")
        assert not lost(), "its session is there and its silence is short of 30 s"
        execute(database_url, "update workers set heartbeat_at = clock_timestamp() - interval '31 seconds'")
        assert lost(), "silent too long, though its session is there"
        execute(database_url, "update workers set heartbeat_at = clock_timestamp() - interval '10 seconds'")
    execute(database_url, "select pg_sleep(0.2)")
    assert lost(), "its session is gone and did not come back"


def test_who_is_stuck_in_a_transaction_does_not_keep_its_locks(
    system: JobSystem, worker: Worker, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "LONGEST_IDLE", 0.3)
    with pytest.raises(DatabaseUnavailable), system.database.transaction() as connection:
        connection.cursor().execute("select from workers for update")
        assert execute(database_url, "select from workers for update skip locked") == []
        eventually(lambda: execute(database_url, "select id from workers for update skip locked"))
        db.run(connection, "orphans")
    assert system.database.run("orphans") == []


def test_a_worker_that_was_declared_lost_claims_nothing(system: JobSystem, worker: Worker) -> None:
    system.submit("TEST_JOB")
    system.database.run("forget_worker", id=worker.id)
    assert worker.claim() == []


def test_a_paused_queue_gives_nothing_and_a_resumed_one_does(system: JobSystem, worker: Worker) -> None:
    system.submit("TEST_JOB")
    system.pause("default")
    assert worker.claim() == []
    system.resume("default")
    assert len(worker.claim()) == 1


@pytest.mark.parametrize("statement", ["claim", "claim_limited"])
def test_a_claim_that_a_restored_database_has_forgotten_is_no_claim(system: JobSystem, worker: Worker, statement: str) -> None:
    id = system.submit("TEST_JOB").id
    where = {"worker": worker.id, "types": ["TEST_JOB"], "queue": "default", "n": 1}
    with contextlib.closing(system.database.connect()) as connection:
        connection.autocommit = False
        [forgotten] = db.run(connection, statement, **where | LOOK)
        connection.rollback()
        [claimed] = db.run(connection, statement, **where | LOOK)
        connection.commit()
    assert forgotten[0] == claimed[0] == id
    assert worker.finish((id, forgotten[6])) == []
    assert worker.finish((id, claimed[6])) == [id]


def test_a_limited_queue_is_never_claimed_around_its_limit(system: JobSystem, worker: Worker) -> None:
    system.submit("TEST_JOB")
    system.limit("default", max_running=1)
    assert worker.claim() == []
    system.limit("default")
    assert len(worker.claim()) == 1


def test_a_cancelled_job_never_starts(system: JobSystem, worker: Worker) -> None:
    job = system.submit("TEST_JOB")
    assert system.cancel(job.id, by="me").status == "CANCELLED"
    assert worker.claim() == []


@pytest.mark.parametrize("end", ["fail", "release", "rescue"])
def test_a_job_asked_to_stop_is_cancelled_whatever_way_it_ends(system: JobSystem, worker: Worker, end: str) -> None:
    job = system.submit("TEST_JOB")
    [mine] = worker.claim()
    assert system.cancel(job.id).stop_requested
    {"fail": lambda: worker.fail(mine), "release": lambda: worker.release(mine), "rescue": lambda: worker.rescue(worker)}[end]()
    assert system.job(job.id).status == "CANCELLED"


@pytest.mark.parametrize("verbs", [["remove"], ["cancel", "remove"], ["remove", "cancel"]])
def test_a_running_job_that_is_removed_goes_when_it_has_stopped(
    system: JobSystem, worker: Worker, database_url: str, verbs: list[str]
) -> None:
    job = system.submit("TEST_JOB")
    [mine] = worker.claim()
    for verb in verbs:
        assert not getattr(system, verb)(job.id) or verb == "cancel"
    system.database.run("remove_stopped")
    assert system.job(job.id).status == "PROCESSING"
    worker.release(mine)
    system.database.run("remove_stopped")
    assert execute(database_url, "select count(*) from jobs") == [(0,)]


def test_counts_and_totals_agree_with_the_table_through_every_change(system: JobSystem, worker: Worker, database_url: str) -> None:
    ids = system.submit_many(Submission("TEST_JOB", delay=3600 if n % 5 == 0 else None) for n in range(25))
    claimed = worker.claim(10)
    worker.finish(*claimed[:4])
    worker.fail(claimed[4])
    worker.fail(claimed[5], delay=60)
    worker.release(claimed[6])
    system.bury(ids[0])
    system.cancel(ids[5])
    system.retry(ids[0])
    system.remove(ids[5])
    execute(database_url, "insert into jobs (type) values ('TEST_JOB')")

    def truth() -> dict[str, int]:
        return {status: n for status, n in execute(database_url, "select status, count(*) from jobs group by status")}

    for _ in range(2):
        assert {status: n for status, n in system.counts().items() if n} == truth()
        totals = system.totals()
        assert (totals["jobs_created"], totals["jobs_success"], totals["jobs_retried"], totals["jobs_dlq"]) == (26, 4, 3, 1)
        system.database.run("sum_tallies")
    assert execute(database_url, "select count(*) from tally_log") == [(0,)]


def test_totals_survive_pruning(system: JobSystem, worker: Worker, database_url: str) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(5))
    worker.finish(*worker.claim(3))
    execute(
        database_url,
        """update jobs set created_at = now() - interval '40 days', finished_at = finished_at - interval '31 days',
           id = overlay(replace(id::text, '-', '')
               placing lpad(to_hex((extract(epoch from now() - interval '40 days') * 1000)::bigint), 12, '0') from 1 for 12)::uuid""",
    )
    assert system.database.run("prune", after=BEGINNING[1], days=30)[0][1:] == (5, 3)
    assert system.totals()["jobs_success"] == 3 and system.counts()["COMPLETED"] == 0
    assert execute(database_url, "select count(*) from jobs") == [(2,)], "what has not finished stays, however old"


def test_only_who_waits_for_a_job_is_told_of_it(system: JobSystem, worker: Worker, database_url: str) -> None:
    with contextlib.closing(psycopg2.connect(database_url)) as listener:
        listener.autocommit = True
        listener.cursor().execute(f'listen "jobsys {worker.id}"')

        def told(**job: Any) -> list[str]:
            system.submit("TEST_JOB", **job)
            return [notification.payload for notification in heard(listener)]

        assert told() == [], "nobody sleeps, nobody is busy"
        system.database.run("sleep", id=worker.id, queue="default")
        assert told(priority="low") == ["default"]
        system.database.run("wake", id=worker.id, queue="default")
        system.database.run("be_busy", id=worker.id, above=0)
        assert told() == [] and told(priority="low") == [] and told(priority="high", delay=60) == []
        assert told(priority="high") == ["default"]
        execute(database_url, "update workers set queues = array['another']")
        assert told(priority="high") == []


def heard(listener: Any) -> list[Any]:
    """The notifications that have come since last asked."""
    listener.cursor().execute("select")
    listener.poll()
    notifications = list(listener.notifies)
    listener.notifies.clear()
    return notifications


def test_of_many_workers_that_wait_a_few_are_told(system: JobSystem, database_url: str) -> None:
    crowd = [Worker(system.database, types=types, queues=["default", "another"]) for types in [["OTHER"]] * 10 + [["TEST_JOB"]] * 10]
    knowing, ids = ({each.id for each in some} for some in (crowd[10:], crowd))
    for each in crowd:
        system.database.run("sleep", id=each.id, queue="default")
    with contextlib.closing(psycopg2.connect(database_url)) as listener, contextlib.closing(psycopg2.connect(database_url)) as own:
        listener.autocommit = True
        listener.cursor().execute(";".join(f'listen "jobsys {id}"' for id in ids))

        def told(priority: str = "default", connection: Any = None) -> set[str]:
            system.submit("TEST_JOB", priority=priority, connection=connection)
            if connection is not None:
                connection.commit()
            return {notification.channel.removeprefix("jobsys ") for notification in heard(listener)}

        rounds = [told() for _ in range(60)]
        assert {len(each) for each in rounds} == {4} and set.union(*rounds) == knowing, "each has its chance"
        assert told(connection=own) == ids, "who knows when it is committed?"
        system.limit("default", max_running=1000)
        assert told() == ids, "each has to know of the limits"
        system.limit("default", max_running=None)

        def some_are(what: str, some: list[Worker]) -> None:
            execute(database_url, f"update workers set {what} where id = any(%s::uuid[])", [each.id for each in some])

        one, two, three = ({each.id} for each in crowd[10:13])
        some_are("held_back = array['TEST_JOB']", crowd[13:])
        assert len(seen := told()) == 4 and seen > one | two | three, "who holds the type back is asked last"
        some_are("held_back = default", crowd[13:])
        for excuse in ("occupied = true", "heartbeat_at = now() - interval '10s'", "asleep = '{}', busy_above = 0"):
            some_are(excuse, crowd[13:])
            assert len(seen := told("high")) == 4 and seen >= one | two | three, f"others are asked sooner: {excuse}"
            some_are("occupied = false, heartbeat_at = now(), asleep = array['default'], busy_above = null", crowd[13:])
        some_are("heartbeat_at = '-infinity'", crowd[12:])
        assert told() >= one | two and not told() & {each.id for each in crowd[12:]}
        some_are("asleep = '{}'", crowd)
        assert told() == set()


def test_a_claim_that_may_have_left_some_tells_others_that_sleep(system: JobSystem, worker: Worker, database_url: str) -> None:
    sleepers = {Worker(system.database).id for _ in range(9)}
    awake, occupied = Worker(system.database).id, Worker(system.database).id
    with contextlib.closing(psycopg2.connect(database_url)) as listener:
        listener.autocommit = True
        listener.cursor().execute(";".join(f'listen "jobsys {id}"' for id in [worker.id, awake, occupied, *sleepers]))
        system.submit_many(Submission("TEST_JOB") for _ in range(7))
        for id in [worker.id, occupied, *sleepers]:
            system.database.run("sleep", id=id, queue="default")
        system.database.run("be_occupied", id=occupied, occupied=True)
        for n, found, told in ((1, 1, 4), (2, 2, 8), (3, 3, 9), (2, 1, 0)):
            assert len(worker.claim(n)) == found
            notifications = heard(listener)
            assert len(notifications) == told and {each.payload for each in notifications} <= {"default"}
            assert {each.channel for each in notifications} <= {f"jobsys {id}" for id in sleepers}


def test_a_plain_insert_in_sql_is_a_job_like_any_other(system: JobSystem, worker: Worker, database_url: str) -> None:
    [(id,)] = execute(database_url, "insert into jobs (type, payload) values ('TEST_JOB', '{\"sleepMs\": 1}') returning id::text")
    assert system.counts()["PENDING"] == 1
    assert worker.claim()[0][0] == id


def test_an_insert_in_sql_gets_what_its_type_declares(system: JobSystem, database_url: str) -> None:
    system.database.run("declare_types", name=["RARE"], queue=["slow"], priority=[10], max_attempts=[1])
    insert = "insert into jobs (type, run_at) values (%s, now() + %s * interval '1 hour') returning queue, priority, max_attempts, status"
    assert execute(database_url, insert, "RARE", 0) == [("slow", 10, 1, "PENDING")]
    assert execute(database_url, insert, "RARE", 1) == [("slow", 10, 1, "SCHEDULED")]
    assert execute(database_url, insert, "NOBODY_KNOWS", 0) == [("default", 0, 4, "PENDING")]
    explicit = (
        "insert into jobs (type, queue, priority, max_attempts) values ('RARE', 'default', 0, null) returning queue, priority, max_attempts"
    )
    assert execute(database_url, explicit) == [("default", 0, None)]


def test_the_timeline_keeps_what_operators_did_and_every_end_there_was(system: JobSystem, worker: Worker) -> None:
    job = system.submit("TEST_JOB")
    [mine] = worker.claim()
    failure = {"options": ["{}"], "type": ["E"], "message": ["m"], "traceback": ["t"], "fingerprint": ["f"]}
    system.database.run("bury", id=[mine[0]], claim=[mine[1]], status=["FAILED"], **failure)
    assert [event.kind for event in system.events(job.id)] == ["created", "started", "failed", "finished"]
    system.bury(job.id, by="me")
    system.retry(job.id, by="you")
    worker.finish(*worker.claim())
    told = [(event.kind, event.by or event.message) for event in system.events(job.id)]
    assert told == [
        ("created", None),
        ("started", None),
        ("failed", "m"),
        ("finished", "FAILED"),
        ("buried", "me"),
        ("finished", "DEAD"),
        ("retried", "you"),
        ("started", None),
        ("finished", "COMPLETED"),
    ]


def test_a_jobs_history_is_of_one_moment(system: JobSystem, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = system.submit("TEST_JOB")
    [(id, claim)] = worker.claim()
    run = db.run

    def slowly(connection: Any, name: str, /, **parameters: Any) -> list[db.Row]:
        rows = run(connection, name, **parameters)
        if name == "job":
            worker.fail((id, claim))
        return rows

    monkeypatch.setattr(db, "run", slowly)
    history = system.history(job.id)
    assert history.job.status == "PROCESSING" and history.failures == []


def test_a_job_submitted_on_your_connection_is_part_of_your_transaction(system: JobSystem, database_url: str) -> None:
    with psycopg2.connect(database_url) as connection:
        rolled_back = system.submit("TEST_JOB", connection=connection)
        connection.rollback()
        committed = system.submit("TEST_JOB", connection=connection)
        assert system.counts()["PENDING"] == 0, "nobody else sees it before the commit"
        connection.commit()
    connection.close()
    assert [job.id for job in system.jobs().jobs] == [committed.id]
    assert rolled_back.id != committed.id


def test_an_idempotency_key_makes_one_job_and_refuses_another(system: JobSystem) -> None:
    first = system.submit("TEST_JOB", {"sleepMs": 1}, idempotency_key="k")
    again = system.submit("TEST_JOB", {"sleepMs": 1}, idempotency_key="k")
    assert (again.id, again.replayed, first.replayed) == (first.id, True, False)
    with pytest.raises(Exception, match="already used"):
        system.submit("TEST_JOB", {"sleepMs": 2}, idempotency_key="k")
    assert system.submit_many([Submission("TEST_JOB", {"sleepMs": 1}, idempotency_key="k")]) == [first.id]


def test_submit_many_is_all_or_none_and_names_the_item(system: JobSystem) -> None:
    with pytest.raises(Exception, match=r"item 1: payload\.sleepMs") as caught:
        system.submit_many([Submission("TEST_JOB"), Submission("TEST_JOB", {"sleepMs": "no"})])
    assert caught.value.errors[0]["loc"][:3] == [1, "payload", "sleepMs"]  # type: ignore[attr-defined]
    assert system.jobs().jobs == []


def test_paging_walks_every_job_once_newest_first(system: JobSystem) -> None:
    ids = system.submit_many(Submission("TEST_JOB") for _ in range(25))
    seen: list[str] = []
    cursor = None
    while True:
        page = system.jobs(limit=7, cursor=cursor)
        seen += [job.id for job in page.jobs]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == ids[::-1]


@pytest.mark.parametrize(
    "filters", [{"status": "FAILED"}, {"status": ("FAILED", "DEAD")}, {"q": "100%_"}, {"queue": "x"}, {"priority": "low"}]
)
def test_every_filter_makes_a_statement_that_runs(system: JobSystem, filters: dict[str, Any]) -> None:
    assert system.jobs(**filters).jobs == []


@pytest.mark.parametrize("name", sorted(set(db.STATEMENTS)))
def test_every_statement_is_valid_against_the_schema(database_url: str, name: str) -> None:
    prepare(database_url, name)


def prepare(database_url: str, name: str) -> None:
    """Have PostgreSQL read one of the statements, without running it."""
    names: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    statement = db.STATEMENTS[name].replace("{conditions}", "true").replace("{status}", "PENDING")
    statement = statement.replace("{rows}", "(new_job_id(), 'TEST_JOB', 'default', 0, '{}', '{}', 4, null)")
    if statement.startswith("copy"):
        with contextlib.closing(psycopg2.connect(database_url)) as connection:
            connection.cursor().copy_expert(statement, io.StringIO(""))
        return
    execute(database_url, f"prepare it as {re.sub(r'%[(]([a-z_]+)[)]s', number, statement)}".replace("%%", "%"))


def blocked(url: str, pid: int) -> bool:
    """Whether a session waits for another."""
    return bool(execute(url, "select cardinality(pg_blocking_pids(%s)) > 0", pid)[0][0])


@pytest.mark.parametrize("table", ["jobs", "workers", "queues", "tally_log"])
def test_a_claim_that_waits_while_a_column_is_added_gets_its_jobs(system: JobSystem, worker: Worker, database_url: str, table: str) -> None:
    jobs = [system.submit("TEST_JOB").id for _ in range(4)]
    assert worker.finish(*worker.claim(2))  # its session has its plans now
    [(pid,)] = execute(database_url, "select session_pid from workers")
    claimed: list[tuple[str, int]] = []
    claiming = threading.Thread(target=lambda: claimed.extend(worker.claim(2)))
    with contextlib.closing(psycopg2.connect(database_url)) as altering:
        altering.cursor().execute(f"alter table {table} add column note text")
        claiming.start()
        eventually(lambda: blocked(database_url, pid))
        altering.commit()
    claiming.join()
    assert [id for id, _ in claimed] == jobs[2:]
    assert worker.finish(*claimed) == jobs[2:]


@pytest.mark.parametrize("table", ["tallies", "tally_log"])
def test_counting_goes_on_when_a_column_is_added(system: JobSystem, database_url: str, table: str) -> None:
    system.submit("TEST_JOB")
    execute(database_url, f"alter table {table} add column note text")
    assert ("default", "TEST_JOB", "PENDING", 1, 0) in system.database.run("counts")


def test_a_plan_with_closed_ways_is_never_compiled(database_url: str) -> None:
    """Before PostgreSQL 18 a closed way that is taken all the same counts as so dear that each execution would be compiled, for 0.1 s."""
    closing = "select proname from pg_proc where array_to_string(proconfig, ' ') like '%%enable\\_%%=off%%'"
    functions = execute(database_url, closing)
    assert {name for (name,) in functions} == {"claim_jobs", "finish_jobs", "events_between"}
    assert functions == execute(database_url, f"{closing} and 'jit=off' = any(proconfig)")


def touched(where: str | Any, statement: str, **parameters: Any) -> int:
    """Pages a statement touches once its connection knows the tables (one that is given, and may have plans already); rolled back."""
    if isinstance(where, str):
        with contextlib.closing(psycopg2.connect(where)) as connection:
            return touched(connection, statement, **parameters)
    for _ in range(2):
        with where.cursor() as cursor:
            cursor.execute("explain (analyze, buffers, format json) " + db.STATEMENTS[statement], parameters)
            plan = cursor.fetchone()[0][0]["Plan"]
        where.rollback()
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def pile_up(database_url: str, status: str, **columns: str) -> None:
    """Ten thousand jobs, of which the counters know nothing: what is looked at are the other statements."""
    given = {"type": "'TEST_JOB'", "queue": "'default'", "priority": "0", "max_attempts": "4", "status": f"'{status}'", **columns}
    insert = f"insert into jobs ({', '.join(given)}) select {', '.join(given.values())} from generate_series(1, 10000) n"
    execute(database_url, f"set session_replication_role = replica; {insert}")


def test_what_was_planned_on_an_empty_table_serves_a_full_one(system: JobSystem, worker: Worker, database_url: str) -> None:
    """Workers start, and then the jobs come: nobody plans anew before PostgreSQL has analyzed the table, a minute later."""
    claim = {"worker": worker.id, "types": ["TEST_JOB"], **LOOK}
    execute(database_url, "vacuum analyze jobs")
    with contextlib.closing(psycopg2.connect(database_url)) as connection:
        touched(connection, "claim", **claim, n=1)
        touched(connection, "finish", id=[new_job_id()], claim=[1], result=[None])
        for _ in range(5):
            pile_up(database_url, "PENDING")
        [(id, number)] = worker.claim()
        [(table, ready)] = execute(database_url, "select pg_relation_size('jobs') / 8192, pg_relation_size('jobs_ready') / 8192")
        assert touched(connection, "claim", **claim, n=1) < 60 < ready < table
        assert touched(connection, "finish", id=[id], claim=[number], result=[None]) < 60


def test_looking_for_due_and_for_old_jobs_does_not_walk_the_others(system: JobSystem, database_url: str) -> None:
    execute(
        database_url,
        """insert into jobs (type, queue, priority, max_attempts, status, run_at, finished_at)
           select 'TEST_JOB', 'default', 0, 4, case when n % 2 = 0 then 'SCHEDULED' else 'COMPLETED' end::job_status,
               now() + interval '1 day', case when n % 2 = 0 then null else now() end
           from generate_series(1, 20000) n""",
    )
    execute(database_url, "vacuum analyze jobs")
    assert touched(database_url, "promote") < 30
    assert touched(database_url, "prune", after=BEGINNING[1], days=30) < 30
    assert touched(database_url, "unfinished", queue="nothing here") < 400


def test_a_claim_costs_the_same_whatever_has_piled_up(system: JobSystem, worker: Worker, database_url: str) -> None:
    claim = {"worker": worker.id, "types": ["TEST_JOB"], **LOOK, "n": 100}
    urgent = claim | {name: column[:1] for name, column in PLACES.items()} | {"n": 8}
    pile_up(database_url, "PENDING")
    execute(database_url, "vacuum analyze jobs")
    few, look = touched(database_url, "claim", **claim), touched(database_url, "claim", **urgent)
    pile_up(database_url, "COMPLETED", finished_at="now()", started_at="now()", worker="gen_random_uuid()")
    pile_up(database_url, "SCHEDULED", run_at="now() + interval '1 day'", priority="-10")
    pile_up(database_url, "PENDING")
    pile_up(database_url, "PENDING", queue="'q' || n % 500")
    execute(database_url, "vacuum analyze jobs")
    assert touched(database_url, "claim", **claim) <= 1.2 * few
    assert touched(database_url, "claim", **urgent) <= look + 3
    assert touched(database_url, "stop_requests", worker=worker.id) <= 3
    assert touched(database_url, "waiting_queues", queues=["default", "q7", "nothing here"]) <= 12


def test_a_look_at_empty_queues_does_not_read_the_table_when_a_paused_one_is_full(system: JobSystem, database_url: str) -> None:
    for _ in range(5):
        pile_up(database_url, "PENDING", queue="'paused'")
    execute(database_url, "vacuum analyze jobs")
    assert touched(database_url, "waiting_queues", queues=["default", "ingestion"]) <= 8


def test_what_was_just_claimed_is_not_walked_over_in_search_of_other_priorities(
    system: JobSystem, worker: Worker, database_url: str
) -> None:
    pile_up(database_url, "PENDING")
    execute(database_url, "vacuum analyze jobs")
    execute(database_url, "alter table jobs set (autovacuum_enabled = off)")
    execute(database_url, "update jobs set status = 'PROCESSING', worker = %s, started_at = now()", worker.id)
    for priority in (-32768, -50, -49, 5, 5, 32767):
        execute(database_url, "insert into jobs (type, priority) values ('TEST_JOB', %s)", priority)
    named = sorted(PRIORITIES.values())
    found = system.database.run("other_priorities", queue="default", named=named)
    assert sorted(found) == [(-32768,), (-50,), (-49,), (5,), (32767,)]
    assert touched(database_url, "other_priorities", queue="default", named=named) < 60


def test_an_array_written_as_one_string_is_read_back_as_it_was(database_url: str) -> None:
    names = ["", " ", "null", "NULL", 'a"b', "a\\b", '\\"', "{a,b}", "it's", "%s", "ä\n\t"]
    assert execute(database_url, "select %s::text[]", db.array(names)) == [(names,)]
    assert execute(database_url, "select %s::bigint[]", db.array([1, -2])) == [([1, -2],)]
    assert execute(database_url, "select %s::bigint[]", db.array([])) == [([],)]


def test_large_claims_of_a_queue_take_turns_and_others_do_not_wait_for_them(system: JobSystem, worker: Worker, database_url: str) -> None:
    ids = system.submit_many(Submission("TEST_JOB") for _ in range(9))
    where = {"worker": worker.id, "types": ["TEST_JOB"], **LOOK}
    with (
        contextlib.closing(psycopg2.connect(database_url)) as first,
        contextlib.closing(psycopg2.connect(database_url)) as second,
        ThreadPoolExecutor(1) as threads,
    ):
        execute(database_url, "alter function take_turn set lock_timeout = '1s'")
        claimed = db.run(first, "claim", **where | {"turn": "wait"}, n=3)
        assert {row[0] for row in claimed} == set(ids[:3])
        for turn in ("wait", "try"):
            assert [row[0] for row in db.run(second, "claim", **where | {"turn": turn}, n=3)] == [None], "it is not its turn yet"
        assert [row[0] for row in system.database.run("claim", **where, n=1)] == ids[3:4], "one that asks for none goes on"
        assert system.database.run("claim", **where | {"queues": ["another"] * 3, "turn": "wait"}, n=3) == []
        late = threads.submit(db.run, second, "claim", **where | {"turn": "wait"}, n=3)
        waits = "select count(*) from pg_stat_activity where wait_event = 'advisory'"
        eventually(lambda: late.done() or execute(database_url, waits) == [(1,)], interval=0.001)
        first.commit()
        # It sees what was committed before its turn, and locks none of that.
        assert {row[0] for row in late.result()} == set(ids[4:7])
        assert worker.finish(*((row[0], row[6]) for row in claimed)) == [row[0] for row in claimed]


def test_a_worker_that_dies_while_it_waits_for_its_turn_claims_nothing(system: JobSystem, worker: Worker, database_url: str) -> None:
    """PostgreSQL does not notice that a client is gone while its statement waits for a lock."""
    ids = system.submit_many(Submission("TEST_JOB") for _ in range(3))
    dying = Worker(system.database, pid=2)
    where = {"types": ["TEST_JOB"], **LOOK, "turn": "wait", "n": 2}
    execute(database_url, "alter function take_turn set lock_timeout = '5s'")
    with contextlib.closing(psycopg2.connect(database_url)) as first, ThreadPoolExecutor(1) as threads:
        db.run(first, "claim", worker=worker.id, **where)
        late = threads.submit(system.database.run, "claim", worker=dying.id, **where)
        eventually(lambda: execute(database_url, "select pid from pg_stat_activity where wait_event = 'advisory'"))
        execute(database_url, "update workers set heartbeat_at = '-infinity' where id = %s", dying.id)
        first.commit()
        assert late.result() == []
    assert system.job(ids[2]).status == "PENDING"


def test_after_an_outage_silence_alone_condemns_nobody(system: JobSystem, worker: Worker, database_url: str) -> None:
    execute(database_url, "update workers set heartbeat_at = now() - interval '1 hour'")
    assert system.database.run("lost_workers", silence_counts=False) == []
    assert system.database.run("lost_workers", silence_counts=True) == [(worker.id,)]


def test_a_death_is_reported_of_a_worker_whose_session_is_gone(system: JobSystem, database_url: str) -> None:
    with contextlib.closing(psycopg2.connect(database_url)) as session:
        session.autocommit = True
        row = {"host": "h", "pid": 9, "version": "0", "queues": [], "types": [], "threads": 1, "heartbeat": 5, "lost_after": 30}
        db.run(session, "register_worker", id=new_job_id(), **row)
        assert system.database.run("report_death", host="h", pid=9) == [], "its session is there: another machine's process"
    execute(database_url, "select pg_sleep(0.2)")
    assert len(system.database.run("report_death", host="h", pid=9)) == 1


def test_who_has_just_got_the_database_back_condemns_nobody_for_silence(system: JobSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    chores = system.broker.attend(threads=1)._chores
    chores.stop()
    asked: list[bool] = []
    monkeypatch.setattr(chores._database, "run", lambda name, silence_counts: asked.append(silence_counts) or [])

    def away() -> None:
        raise DatabaseUnavailable("an outage")

    chores.rescue()
    chores._silence_counts_from = 0.0
    chores.rescue()
    chores._attempt(away)
    chores.rescue()
    assert asked == [False, True, False]
