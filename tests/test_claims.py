"""One process's claims: what is urgent beside the rest, and when it sleeps."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg2
import pytest
from conftest import eventually, execute
from test_queue import LOOK, Worker, heard

from jobsys import db
from jobsys.claims import LONGEST_AHEAD, Claims, StandBy
from jobsys.errors import DatabaseUnavailable, LockTimeout
from jobsys.running import RunningJob
from jobsys.system import JobSystem, Submission
from jobsys.work_queue import WorkQueue

THREADS = 64


@pytest.fixture
def worker(system: JobSystem) -> Worker:
    return Worker(system.database)


@pytest.fixture
def claims(system: JobSystem, worker: Worker) -> Claims:
    """The claims of a process whose threads are idle and take nothing."""

    def make(rows: list[db.Row]) -> list[RunningJob]:
        return [RunningJob(row, worker=worker.id, job_type=None, max_crashes=3) for row in rows]

    return Claims(
        system.database,
        WorkQueue(THREADS),
        worker=lambda: worker.id,
        types=lambda: list(system.types.types),
        make=make,
        backlog=lambda: 0,
        poll_interval=1.0,
    )


def asleep(database_url: str) -> list[str]:
    [(queues,)] = execute(database_url, "select asleep from workers")
    return list(queues)


@pytest.mark.parametrize(("type", "queue"), [("TEST_JOB", "default"), ("INGEST_BATCH", "ingestion")])
def test_an_urgent_job_is_claimed_while_a_crowd_is_in_memory(system: JobSystem, claims: Claims, type: str, queue: str) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(2 * THREADS))
    claims.take("ingestion", 0.01)
    assert len(claims.take("default", 0.1)) == THREADS
    claims.above = 0
    assert claims.claim_urgent() == [], "those that wait are no more urgent than those that are here"
    urgent = system.submit(type, {"ids": [1]} if type == "INGEST_BATCH" else None, priority="high")
    [claimed] = claims.claim_urgent()
    assert (claimed.message_id, claimed.queue_name) == (urgent.id, queue)
    assert claims.claim_urgent() == []
    assert claimed in claims.work.expected


def test_many_are_claimed_after_the_more_urgent_ones_of_which_a_trickle_holds_up_nothing(
    system: JobSystem, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims.work.threads = 2
    monkeypatch.setattr(claims, "_room", lambda: THREADS)
    waiting = system.submit_many(Submission("TEST_JOB") for _ in range(2 * THREADS))

    def taken() -> list[str]:
        claims.work.expected.clear()
        return [job.message_id for job in claims.take("default", 1)]

    assert taken() == waiting[:THREADS] and claims.above == 0
    urgent = [system.submit("TEST_JOB", priority="high").id for _ in range(3)]
    claims._look_from_start_at["default"] = 0.0
    assert taken() == urgent, "they come alone, and soon"
    assert claims.above == 0, "most of those in memory are of the others"
    assert claims._look_from_start_at["default"] == 0.0, "it is still to be looked at from its start"
    more = system.submit("TEST_JOB", priority="high").id
    assert taken() == [more, *waiting[THREADS:-1]], "and next comes whatever there is"
    many = system.submit_many(Submission("TEST_JOB", priority="high") for _ in range(THREADS))
    assert taken() == many and taken() == waiting[-1:]


@pytest.fixture
def asked(system: JobSystem, claims: Claims, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """`claims` asks for more jobs than it has threads. What each claim did for its turn, and what else was said or looked for."""
    asked: list[str | None] = []
    run = system.database.run

    def recorded(name: str, **given: Any) -> list[db.Row]:
        asked.append(given["turn"] if name == "claim" else name)
        return run(name, **given)

    claims.work.threads = 2
    monkeypatch.setattr(claims, "_room", lambda: THREADS)
    claims._look_around("default")
    monkeypatch.setattr(system.database, "run", recorded)
    return asked


def test_a_claim_that_hangs_holds_up_the_others_of_its_queue_only_once(
    system: JobSystem, claims: Claims, worker: Worker, database_url: str, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobsys.claims.HANGING", 0.3)
    monkeypatch.setattr("jobsys.claims.LINE_UP", 0.0)
    ids = system.submit_many(Submission("TEST_JOB") for _ in range(4 * THREADS))
    with contextlib.closing(psycopg2.connect(database_url)) as hanging:
        db.run(hanging, "claim", worker=worker.id, types=["TEST_JOB"], **LOOK | {"turn": "wait"}, n=THREADS)
        assert [job.message_id for job in claims.take("default", 5)] == ids[THREADS : 2 * THREADS]
        claims.work.expected.clear()
        assert [job.message_id for job in claims.take("default", 1)] == ids[2 * THREADS : 3 * THREADS]
        assert asked[:3] == ["wait", "be_busy", "try"]
        assert [each for each in asked[3:] if each not in ("try", "be_busy", "limited_queues", "other_priorities")] == [
            "wait",
            "turn_hangs",
            None,
            None,
        ]
    asked.clear()
    claims._no_turn_until = 0.0
    claims.work.expected.clear()
    claims._look_from_start_at["default"] = 0.0
    assert [job.message_id for job in claims.take("default", 1)] == ids[:THREADS]
    assert asked == ["wait"]


def test_who_does_not_get_its_turn_stands_by(
    system: JobSystem, claims: Claims, worker: Worker, database_url: str, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = system.submit_many(Submission("TEST_JOB") for _ in range(2 * THREADS))
    with contextlib.closing(psycopg2.connect(database_url)) as others:
        db.run(others, "claim", worker=worker.id, types=["TEST_JOB"], **LOOK | {"turn": "wait"}, n=THREADS)
        assert claims.take("default", 0.3) == []
        monkeypatch.setattr(claims, "_room", lambda: 1)
        assert claims.take("default", 0.1) == []
        assert asked[:3] == ["wait", "be_busy", "try"] and set(asked[3:]) == {"try"}, "no small claims instead, and it does not sleep"
        urgent = system.submit("TEST_JOB", priority="high").id
        assert [job.message_id for job in claims.claim_urgent()] == [urgent]
        claims.work.expected.clear()
        hangs = partial(system.database.run, "turn_hangs", for_long=False)
        assert hangs(queue="default", seconds=60) == [(False,)]
        assert hangs(queue="default", seconds=0.1) == [(True,)]
        assert hangs(queue="ingestion", seconds=0.1) == [(False,)]
        others.commit()
    monkeypatch.setattr(claims, "_room", lambda: THREADS)
    asked.clear()
    assert [job.message_id for job in claims.take("default", 1)] == ids[THREADS:]
    claims.work.expected.clear()
    assert claims.take("default", 0.5) == []
    assert asked[0] == "try" and asked.count("wait") > 0 and asked.count("sleep") == 1


def test_who_stands_by_waits_in_line_now_and_then_because_others_may_hand_the_turn_on_for_ever(
    system: JobSystem, claims: Claims, database_url: str, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobsys.claims.HANGING", 0.2)
    monkeypatch.setattr("jobsys.claims.LINE_UP", 0.0)
    [job] = system.submit_many([Submission("TEST_JOB")])
    over = threading.Event()

    def have_the_turn() -> None:
        with contextlib.closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
            while not over.is_set():
                cursor.execute("select take_turn('default', true), pg_sleep(0.02)")
                connection.commit()

    others = [threading.Thread(target=have_the_turn) for _ in range(3)]
    for other in others:
        other.start()
    eventually(lambda: execute(database_url, "select pid from pg_stat_activity where wait_event = 'advisory'"))
    claims._standing_by["default"] = StandBy(8, 0, time.monotonic() + 0.5)
    assert [job.message_id for job in claims.take("default", 10)] == [job]
    assert asked.count("wait") and asked.index("try") < asked.index("wait") and claims._standing_by == {}
    over.set()
    for other in others:
        other.join()


@pytest.mark.parametrize("limit", [{"max_running": 1}, {"rate": (1000, 1)}])
def test_who_stands_by_when_the_queue_is_limited_does_so_no_longer(system: JobSystem, claims: Claims, limit: dict[str, Any]) -> None:
    job = system.submit("TEST_JOB")
    claims._standing_by["default"] = StandBy(8, 0, time.monotonic() + 60)
    system.limit("default", **limit)
    assert [job.message_id for job in claims.take("default", 1)] == [job.id]
    assert claims._standing_by == {}


def test_that_it_is_not_its_turn_says_nothing_of_what_crowds(
    system: JobSystem, claims: Claims, worker: Worker, database_url: str, bounded: list[int]
) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(3 * THREADS))
    claims.take("default", 1)
    claims.work.expected.clear()
    crowds = dict(claims._crowds)
    assert crowds
    with contextlib.closing(psycopg2.connect(database_url)) as others, others.cursor() as cursor:
        cursor.execute("select take_turn('default', true)")
        claims._standing_by["default"] = StandBy(0, 0, time.monotonic() + 60)
        assert claims.take("default", 0.5) == []
    assert claims._crowds == crowds


def test_a_claim_that_waits_for_its_turn_holds_up_no_other_queue(
    system: JobSystem, claims: Claims, worker: Worker, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = system.submit_many(Submission("TEST_JOB") for _ in range(2 * THREADS))
    batch = system.submit("INGEST_BATCH", {"ids": [1]})
    claims.work.threads = 2
    monkeypatch.setattr(claims, "_room", lambda: THREADS)
    waiting: list[RunningJob] = []
    with contextlib.closing(psycopg2.connect(database_url)) as other:
        execute(database_url, "alter function take_turn set lock_timeout = '5s'")
        db.run(other, "claim", worker=worker.id, types=["TEST_JOB"], **LOOK | {"turn": "wait"}, n=THREADS)
        taking = threading.Thread(target=lambda: waiting.extend(claims.take("default", 10)))
        taking.start()
        eventually(lambda: execute(database_url, "select pid from pg_stat_activity where wait_event = 'advisory'"))
        assert [job.message_id for job in claims.take("ingestion", 1)] == [batch.id]
        assert not waiting
        time.sleep(0.2)  # which is no reason to look from the start so much more rarely
        other.commit()
    taking.join()
    assert [job.message_id for job in waiting] == ids[THREADS:]
    assert claims._look_from_start_at["default"] <= time.monotonic() + LONGEST_AHEAD


def test_a_claim_waits_for_a_lock_only_for_a_moment_and_looks_again(
    system: JobSystem, claims: Claims, worker: Worker, database_url: str, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = system.submit("TEST_JOB")
    end = "-c idle_in_transaction_session_timeout=10s"
    with contextlib.closing(psycopg2.connect(database_url, options=end)) as somebody, ThreadPoolExecutor(1) as threads:
        somebody.cursor().execute("lock table jobs")
        with pytest.raises(LockTimeout):
            db.Database.run(system.database, "claim", worker=worker.id, types=["TEST_JOB"], **LOOK, n=1)
        taken = threads.submit(claims.take, "default", 10)
        eventually(lambda: asked.count("wait") > 2)
        somebody.rollback()
        assert [job.message_id for job in taken.result()] == [job.id]
        somebody.cursor().execute("lock table jobs")
        asked.clear()
        taken = threads.submit(claims.take, "default", 10)
        eventually(lambda: asked.count("wait") > 2)
        monkeypatch.setattr("jobsys.claims.HANGING", 0.0)
        assert claims.take("default", 0.01) == [], "nor does it look for ever"
        claims.close()
        assert taken.result() == []


def test_nothing_urgent_is_claimed_from_a_paused_queue_nor_by_a_process_that_leaves(system: JobSystem, claims: Claims) -> None:
    claims.take("default", 0.01)
    claims.above = 0
    system.submit("TEST_JOB", priority="high")
    system.pause("default")
    assert claims.claim_urgent() == []
    system.resume("default")
    claims.close()
    assert claims.claim_urgent() == []


def test_a_process_sleeps_when_it_finds_nothing_and_is_awake_while_work_comes_briskly(
    system: JobSystem, claims: Claims, database_url: str
) -> None:
    assert claims.take("default", 0.3) == [] and asleep(database_url) == ["default"]
    system.submit("TEST_JOB")
    assert len(claims.take("default", 1)) == 1 and asleep(database_url) == ["default"], "one is no crowd"
    claims.work.expected.clear()
    system.submit_many(Submission("TEST_JOB") for _ in range(THREADS))
    assert len(claims.take("default", 1)) == THREADS and asleep(database_url) == []
    claims.work.expected.clear()
    assert claims.take("default", 2) == [] and asleep(database_url) == ["default"]


def test_who_sleeps_soundly_looks_at_all_its_queues_by_one_statement(
    system: JobSystem, claims: Claims, database_url: str, asked: list[str | None]
) -> None:
    queues = ("default", "ingestion")
    with ThreadPoolExecutor(2) as threads:

        def take(seconds: float) -> list[list[str]]:
            return [[job.message_id for job in jobs] for jobs in threads.map(claims.take, queues, (seconds, seconds))]

        assert take(0.3) == [[], []] and asleep(database_url) == [*queues]
        asked.clear()
        assert take(2.5) == [[], []]
        assert set(asked) == {"waiting_queues"} and len(asked) <= 4
        asked.clear()
        execute(database_url, "alter table jobs disable trigger jobs_inserted")
        jobs = [system.submit("TEST_JOB").id, system.submit("INGEST_BATCH", {"ids": [1]}).id]
        claims._looked_at = 0.0
        found = [[job.message_id for job in claims.take(queue, 0.1)] for queue in queues]
        assert found == [[job] for job in jobs] and asked.count("waiting_queues") == 1, "nobody was told"


def test_who_is_told_claims_at_once_and_looks_around_when_that_brings_nothing(
    system: JobSystem, claims: Claims, database_url: str, asked: list[str | None]
) -> None:
    def taken() -> list[str]:
        asked.clear()
        claims.work.expected.clear()
        claims.wake("default")
        return [job.message_id for job in claims.take("default", 0.5)]

    claims.work.threads = THREADS
    assert claims.take("default", 0.3) == []
    claims._limits_read_at = claims._priorities_read_at["default"] = 0.0
    job = system.submit("TEST_JOB")
    assert taken() == [job.id] and asked == [None]
    assert claims.take("default", 0.3) == []
    claims._limits_read_at = claims._priorities_read_at["default"] = 0.0
    [(odd,)] = execute(database_url, "insert into jobs (type, priority) values ('TEST_JOB', 7) returning id::text")
    assert taken() == [odd] and asked == [None, "limited_queues", "other_priorities", None]
    assert claims.take("default", 0.3) == []
    claims._limits_read_at = 0.0
    system.limit("default", max_running=3)
    job = system.submit("TEST_JOB")
    assert taken() == [job.id] and asked[:2] == [None, "limited_queues"]


def test_who_has_work_looks_around_before_each_claim_also_when_it_is_slow(
    system: JobSystem, claims: Claims, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert claims.take("default", 0.3) == []
    monkeypatch.setattr(claims, "_room", lambda: 1)
    waiting = system.submit_many(Submission("TEST_JOB") for _ in range(4))
    claims.wake("default")
    assert [job.message_id for job in claims.take("default", 1)] == waiting[:1] and asleep(database_url) == ["default"]
    [(odd,)] = execute(database_url, "insert into jobs (type, priority) values ('TEST_JOB', -50) returning id::text")
    claims._priorities_read_at["default"] = 0.0
    assert [job.message_id for job in claims.take("default", 1)] == [odd]
    system.limit("default", max_running=3)
    claims._limits_read_at = 0.0
    claims.work.expected.clear()
    assert len(claims.take("default", 1)) == 1 and claims._limited == {"default"}
    system.limit("default", max_running=None)
    claims._limits_read_at = 0.0
    assert len(claims.take("default", 1)) == 1 and claims._limited == set()


class RungWhileLookedAt(threading.Event):
    """An event that is set right after somebody saw that it is not, once."""

    armed = False

    def is_set(self) -> bool:
        was_set = super().is_set()
        if self.armed and not was_set:
            self.armed = False
            self.set()
        return was_set


def test_who_is_told_just_as_its_nap_ends_does_not_miss_it(system: JobSystem, claims: Claims) -> None:
    claims._bells["default"] = bell = RungWhileLookedAt()
    assert claims.take("default", 0.3) == []
    job = system.submit("TEST_JOB")
    claims._looked_at = time.monotonic()
    bell.armed = True
    assert [job.message_id for job in claims.take("default", 0.5)] == [job.id]


def test_a_queue_that_sleeps_says_nothing_of_the_room_that_another_has_not(
    system: JobSystem, claims: Claims, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    queues = ("default", "ingestion")
    for queue in queues:
        assert claims.take(queue, 0.3) == []
    monkeypatch.setattr(claims, "_room", lambda: 0)
    claims.wake("default")
    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(claims.take, queues, (1.5, 1.5))] == [[], []]
    assert [each for each in asked if each == "be_occupied"] == ["be_occupied"]


def test_a_job_of_which_a_process_was_told_that_had_no_room_is_claimed_when_it_has_some(
    system: JobSystem, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert claims.take("default", 0.3) == []
    claims._looked_at = time.monotonic()
    job = system.submit("TEST_JOB")
    with monkeypatch.context() as full:
        full.setattr(claims, "_room", lambda: 0)
        claims.wake("default")
        assert claims.take("default", 0.05) == []
    assert [job.message_id for job in claims.take("default", 0.5)] == [job.id]


def test_a_process_says_when_it_has_had_no_room_for_a_while(
    system: JobSystem, claims: Claims, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def occupied() -> bool:
        return execute(database_url, "select occupied from workers") == [(True,)]

    assert claims.take("default", 0.1) == [] and not occupied()
    with monkeypatch.context() as full:
        full.setattr(claims, "_room", lambda: 0)
        claims.wake("default")
        assert claims.take("default", 0.05) == [] and not occupied()
        assert claims.take("default", 0.3) == [] and occupied()
    assert asleep(database_url) == ["default"], "it is told all the same, should there be nobody else"
    system.submit_many(Submission("TEST_JOB") for _ in range(2 * THREADS))
    assert len(claims.take("default", 0.1)) == THREADS and occupied(), "those that came while it was full leave it full"
    claims.work.expected.clear()
    assert len(claims.take("default", 0.1)) == THREADS
    claims.work.expected.clear()
    assert claims.take("default", 0.3) == [] and not occupied()


def test_a_paced_queue_is_not_given_a_rest_that_its_pace_does_not_ask_for(system: JobSystem, claims: Claims, database_url: str) -> None:
    for queue in ("default", "ingestion"):
        claims.take(queue, 0.05)
    assert asleep(database_url) == ["default", "ingestion"]
    system.limit("default", rate=(1000, 1))
    system.submit_many(Submission("TEST_JOB") for _ in range(3))
    system.submit("INGEST_BATCH", {"ids": [1]})
    claims._limits_read_at = 0.0
    assert len(claims.take("default", 1)) == 1
    claims.work.expected.clear()
    assert len(claims.take("ingestion", 1)) == 1
    assert set(claims._emptied) == {"ingestion"}, "of the other one more waits, and may start a millisecond later"


def test_a_full_queue_is_looked_at_again_as_soon_as_one_of_its_jobs_has_ended(
    system: JobSystem, claims: Claims, worker: Worker, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(db.STATEMENTS, "look_at_gate", db.STATEMENTS["look_at_gate"].replace("0.1", "60"))
    claims._poll_interval = 60.0
    system.limit("default", max_running=1)
    system.submit_many(Submission("TEST_JOB") for _ in range(2))
    [first] = claims.take("default", 1)
    claims.work.expected.clear()
    second: list[RunningJob] = []
    taking = threading.Thread(target=lambda: second.extend(claims.take("default", 60)), daemon=True)
    taking.start()
    while "default" not in asleep(database_url):
        time.sleep(0.01)
    time.sleep(0.3)
    assert not second
    worker.finish((first.message_id, first.claim))
    claims.ended([first])
    taking.join(20)
    assert len(second) == 1


@pytest.mark.parametrize(("ago", "crowd"), [(0.0, True), (1.0, False)])
def test_only_jobs_that_end_right_now_set_a_pace(system: JobSystem, claims: Claims, ago: float, crowd: bool) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(4 * THREADS))
    claims.work.finished, claims.work.active_seconds, claims.work.finished_at = 10_000, 0.1, time.monotonic() - ago
    taken = len(claims.take("default", 0.1))
    assert taken > THREADS if crowd else taken == THREADS


def test_the_pace_is_what_all_threads_did_together(system: JobSystem, claims: Claims) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(500))
    claims.work.threads, claims.work.finished_at = 4, time.monotonic() + 60
    claims.work.finished, claims.work.active_seconds = 200, 0.2
    assert len(claims.take("default", 0.1)) == 100


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.sleep = time.sleep

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of `claims`, whose process has four threads and does a thousand jobs a second."""
    clock = Clock()
    monkeypatch.setattr("jobsys.claims.time", clock)
    monkeypatch.setattr("jobsys.work_queue.time", clock)
    claims.work.threads = 4
    monkeypatch.setattr(claims, "_pace", lambda: 1000.0)
    return clock


def start_one(claims: Claims) -> None:
    claims.work.expected.pop()
    claims.work._signal_room()


def test_the_next_claim_is_due_while_twice_as_many_are_left_as_start_until_it_brings_others(
    system: JobSystem, claims: Claims, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(2_000))
    claim, ahead, meanwhile = claims._claim, 100, 10

    def claim_while_some_start(*asked: Any) -> Any:
        clock.now += meanwhile / 1000
        jobs, pause = claim(*asked)
        claims.work.expected.difference_update([job for job in claims.work.expected if job not in jobs][:meanwhile])
        return jobs, pause

    monkeypatch.setattr(claims, "_claim", claim_while_some_start)
    in_memory = []
    for _ in range(20):
        taken = claims.take("default", 0.1)
        in_memory.append(len(claims.work.expected))
        while claims._room() == 0:
            start_one(claims)
        left = len(claims.work.expected)
    assert left == pytest.approx(2 * meanwhile, abs=2)
    assert len(taken) == pytest.approx(ahead - meanwhile, abs=2)
    assert in_memory[0] == ahead and in_memory[-1] == pytest.approx(ahead, abs=2)


@pytest.mark.parametrize("burst", [3, 100, 150])
def test_a_claim_that_came_late_for_want_of_jobs_took_no_time(
    system: JobSystem, claims: Claims, monkeypatch: pytest.MonkeyPatch, burst: int
) -> None:
    claims.work.threads = 4
    monkeypatch.setattr(claims, "_pace", lambda: 1000.0)
    for _ in range(5):
        system.submit_many(Submission("TEST_JOB") for _ in range(burst))
        for came in range(0, burst + 1, 100):
            assert len(claims.take("default", 0.01)) == min(100, burst - came)
            while claims.work.expected:
                start_one(claims)
        time.sleep(0.1)
    system.submit_many(Submission("TEST_JOB") for _ in range(300))
    assert len(claims.take("default", 0.01)) == 100


def test_the_largest_claim_is_larger_where_many_processes_take_turns(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_pace", lambda: 100_000.0)
    largest = []
    for claims.workers in (1, 15, 16, 64):
        largest.append(claims._room())
    assert largest == [250, 250, 500, 500]


def test_a_process_whose_jobs_compute_claims_half_as_often(claims: Claims, clock: Clock) -> None:
    side_by_side = claims._room(), claims.work.low_water
    claims.work._concurrency.one_at_a_time = True
    assert side_by_side == (100, 12)
    assert (claims._room(), claims.work.low_water) == (200, 12)


def test_nothing_is_claimed_while_too_many_outcomes_wait_to_be_written(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_backlog", lambda: 1000)
    assert claims._room() == THREADS
    monkeypatch.setattr(claims, "_backlog", lambda: 1001)
    assert claims._room() == 0


def test_claims_that_take_long_let_no_process_hoard(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    claims.work.threads = 4
    for _ in range(50):
        claims._note_lead(60.0)
    monkeypatch.setattr(claims, "_pace", lambda: 10.0)
    assert claims._room() == 4, "what was measured of fast jobs is no reason to take many slow ones"
    monkeypatch.setattr(claims, "_pace", lambda: 1000.0)
    assert 150 < claims._room() <= 200, "nor is it the other way round"


def test_jobs_that_a_claim_brought_are_done_whatever_goes_wrong_after_it(
    system: JobSystem, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(claims, "_note_work", fail)
    job = system.submit("TEST_JOB")
    assert [taken.message_id for taken in claims.take("default", 1)] == [job.id]


@pytest.fixture
def bounded(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`claims` may take four more TEST_JOBs, whatever it takes. The sizes of its claims."""
    asked: list[int] = []
    claim_at = claims._claim_at

    def recorded(looks: list[tuple[str, int]], room: int, *rest: Any) -> list[db.Row]:
        asked.append(room)
        return claim_at(looks, room, *rest)

    monkeypatch.setattr(claims, "_rooms", lambda: {"TEST_JOB": 4})
    monkeypatch.setattr(claims, "_claim_at", recorded)
    return asked


def test_who_is_told_of_a_job_of_a_type_that_is_full_tells_another_process_once_in_a_while(
    system: JobSystem, claims: Claims, worker: Worker, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Worker(system.database)
    system.database.run("sleep", id=other.id, queue="default")
    monkeypatch.setattr(claims, "_rooms", lambda: {"TEST_JOB": 0})
    with contextlib.closing(psycopg2.connect(database_url)) as listener:
        listener.autocommit = True
        assert claims.take("default", 0.3) == []
        system.submit("TEST_JOB")
        listener.cursor().execute(f'listen "jobsys {other.id}"; listen "jobsys {worker.id}"')

        def told() -> list[str]:
            claims.wake("default")
            assert claims.take("default", 0.01) == []
            return [notification.channel for notification in heard(listener)]

        assert told() == [f"jobsys {other.id}"]
        claims._passed_on_at["default"] = time.monotonic() + 60
        assert told() == [], "one was told just now"
        monkeypatch.setattr(claims, "_rooms", lambda: {"TEST_JOB": 1})
        claims._passed_on_at.clear()
        claims.wake("default")
        assert len(claims.take("default", 0.01)) == 1 and heard(listener) == []


def test_a_type_that_crowds_is_claimed_as_it_has_room_also_when_other_queues_are_looked_at(
    system: JobSystem, claims: Claims, bounded: list[int]
) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(3 * THREADS))
    system.submit("INGEST_BATCH", {"ids": [1]})
    claims.take("default", 1)
    claims.work.expected.clear()
    claims.take("ingestion", 1)
    claims.work.expected.clear()
    bounded.clear()
    claims.take("default", 1)
    assert bounded[0] == 4


def test_what_a_claim_brought_is_not_forgotten_when_the_next_one_fails(
    system: JobSystem, claims: Claims, bounded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(3 * THREADS))
    claims.take("default", 1)
    claims.work.expected.clear()
    bounded.clear()
    claim_at = claims._claim_at

    def fail_at_the_second(looks: list[tuple[str, int]], room: int, *rest: Any) -> list[db.Row]:
        if bounded:
            raise DatabaseUnavailable("cut")
        return claim_at(looks, room, *rest)

    monkeypatch.setattr(claims, "_claim_at", fail_at_the_second)
    assert len(claims.take("default", 1)) == 4
