"""Two who want the same job at the same moment. One has done its half in an open transaction; the other comes, and is seen waiting or
finds nothing; then the first commits or rolls back. No luck is involved: each order is played out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import psycopg2
import pytest
from conftest import at_database, eventually, execute
from test_queue import BEGINNING, LOOK, Worker

from jobsys import db
from jobsys.errors import IdempotencyConflict, JobNotFound, LockTimeout, WrongState
from jobsys.outcomes import Outcome, finish
from jobsys.running import RunningJob
from jobsys.settlements import Settlements
from jobsys.system import JobSystem, Submission

MAX_CRASHES = 3
FAILURE = {"options": "{}", "type": "E", "message": "m", "traceback": "t", "fingerprint": "f"}


class Rivals:
    """One job in the state that they fight over, and two connections: `first` has a transaction that is ended by hand."""

    def __init__(self, system: JobSystem, url: str) -> None:
        self.system, self.url = system, url
        self.worker, self.other = Worker(system.database), Worker(system.database, pid=2)
        self.id, self.claim = "", 0
        self.connection = psycopg2.connect(url)
        self.threads = ThreadPoolExecutor(1)

    def prepare(self, state: str) -> None:
        """A job that is waiting, scheduled (and due), running, or failed (long ago)."""
        self.id = self.system.submit("TEST_JOB", delay=3600 if state == "scheduled" else None).id
        if state in ("running", "failed"):
            [(_, self.claim)] = self.worker.claim()
        if state == "scheduled":
            execute(self.url, "update jobs set run_at = now()")
        if state == "failed":
            self.system.database.run("bury", **self.outcome(status="FAILED", **FAILURE))
            long_ago = "now() - interval '40 days'"
            execute(self.url, f"update jobs set created_at = {long_ago}, finished_at = {long_ago}")

    def outcome(self, **columns: Any) -> dict[str, list[Any]]:
        return {name: [value] for name, value in {"id": self.id, "claim": self.claim, **columns}.items()}

    def first(self, act: Act) -> Any:
        """The first one's half: done, and not committed."""
        return act(self, partial(db.run, self.connection))

    def second(self, act: Act, *, waits: bool) -> Future[Any]:
        """The other one, who is left waiting for the first, or is through when this returns."""
        future = self.threads.submit(act, self, self.system.database.run)
        if waits:
            eventually(lambda: self.waiting or future.done(), interval=0.005)
            assert not future.done(), f"it did not wait: {future.result()}"
        else:
            future.result(10)
        return future

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a lock that the first connection holds."""
        waits = "select pid from pg_stat_activity where wait_event_type = 'Lock' and %s = any(pg_blocking_pids(pid))"
        return bool(execute(self.url, waits, self.connection.info.backend_pid))

    def end(self, *, commit: bool) -> None:
        self.connection.commit() if commit else self.connection.rollback()

    @property
    def kinds(self) -> list[str]:
        return [kind for (kind,) in execute(self.url, "select kind from events order by at")]

    def close(self) -> None:
        self.connection.close()
        self.threads.shutdown()


Act = Callable[[Rivals, Callable[..., Any]], Any]
"""What a rival does, with the function that runs its statements; true when it had its way."""


@pytest.fixture(scope="module")
def database_url(server: str, template: str) -> Iterator[str]:
    """One database for all races: emptied, which is quicker than made."""
    name = template.replace("template", "races")
    execute(server, f'create database "{name}" template "{template}"')
    yield at_database(server, name)
    execute(server, f'drop database "{name}" with (force)')


@pytest.fixture
def rivals(system: JobSystem, database_url: str) -> Iterator[Rivals]:
    execute(database_url, "truncate jobs, failures, events, workers, tallies, tally_log")
    rivals = Rivals(system, database_url)
    yield rivals
    rivals.close()


def finishes(it: Rivals, run: Callable[..., Any]) -> Any:
    while True:
        try:
            return run("finish", **it.outcome(result=None))
        except LockTimeout:
            continue  # who writes outcomes gives up waiting after a tenth of a second, and comes again


def fails(it: Rivals, run: Callable[..., Any]) -> Any:
    return run("retry", **it.outcome(worker=it.worker.id, delay=0.0, **FAILURE))


def releases(it: Rivals, run: Callable[..., Any]) -> Any:
    return run("release", **it.outcome())


def rescues(it: Rivals, run: Callable[..., Any]) -> Any:
    return run("rescue", worker=it.worker.id, max_crashes=MAX_CRASHES, message="gone")


def cancels(it: Rivals, run: Callable[..., Any]) -> Any:
    return [row for row in run("cancel", id=[it.id], by="me", stop="cancel") if row[2]]


def requeues(it: Rivals, run: Callable[..., Any]) -> Any:
    return [row for row in run("requeue", id=[it.id], by="me") if row[2]]


def buries(it: Rivals, run: Callable[..., Any]) -> Any:
    return [row for row in run("bury_job", id=[it.id], by="me") if row[2]]


def removes(it: Rivals, run: Callable[..., Any]) -> Any:
    return run("remove", id=it.id)


def claims(it: Rivals, run: Callable[..., Any]) -> Any:
    return run("claim", worker=it.other.id, types=["TEST_JOB"], **LOOK, n=1)


def claims_limited(it: Rivals, run: Callable[..., Any]) -> Any:
    return run("claim_limited", worker=it.other.id, types=["TEST_JOB"], queue="default", n=1)


def takes_over(it: Rivals, run: Callable[..., Any]) -> Any:
    """Rescues the job and claims it again."""
    return rescues(it, run) and claims(it, run)


def promotes(it: Rivals, run: Callable[..., Any]) -> Any:
    return run("promote")


def prunes(it: Rivals, run: Callable[..., Any]) -> Any:
    # A day's margin for ids, which are of today: whoever is older than a day by its columns is older by its id, too.
    return run("prune", after=BEGINNING[1], days=1)[0][2]


class Race(NamedTuple):
    """Who comes first and second, whether the second waits, who has its way, and what is left: (status, attempt, crashes) or None,
    the events, and how many failures and retries were counted."""

    state: str
    first: Act
    second: Act
    waits: bool
    commit: bool
    second_wins: bool
    job: tuple[str, int, int] | None
    events: tuple[str, ...] = ()
    failures: int = 0
    retried: int = 0


DONE, STOPPED, BACK, RUNS = ("COMPLETED", 1, 0), ("CANCELLED", 1, 0), ("PENDING", 1, 1), ("PROCESSING", 1, 0)
COMMITS, ROLLS_BACK, WAITS, PASSES = True, False, True, False
RACES = [
    # A rescue passes over what somebody is just ending, and looks again later.
    Race("running", finishes, rescues, PASSES, COMMITS, False, DONE),
    Race("running", finishes, rescues, PASSES, ROLLS_BACK, False, RUNS),
    Race("running", rescues, finishes, WAITS, COMMITS, False, BACK, failures=1),
    Race("running", rescues, finishes, WAITS, ROLLS_BACK, True, DONE),
    Race("running", fails, rescues, PASSES, COMMITS, False, ("PENDING", 1, 0), failures=1, retried=1),
    Race("running", fails, rescues, PASSES, ROLLS_BACK, False, RUNS),
    Race("running", rescues, fails, WAITS, COMMITS, False, BACK, failures=1),
    Race("running", rescues, fails, WAITS, ROLLS_BACK, True, ("PENDING", 1, 0), failures=1, retried=1),
    Race("running", releases, rescues, PASSES, COMMITS, False, ("PENDING", 0, 0)),
    Race("running", releases, rescues, PASSES, ROLLS_BACK, False, RUNS),
    Race("running", rescues, releases, WAITS, COMMITS, False, BACK, failures=1),
    Race("running", rescues, releases, WAITS, ROLLS_BACK, True, ("PENDING", 0, 0)),
    Race("running", rescues, rescues, PASSES, COMMITS, False, BACK, failures=1),
    Race("running", rescues, rescues, PASSES, ROLLS_BACK, False, RUNS),
    # A job that runs again, elsewhere, is no longer whose it was.
    *(Race("running", takes_over, late, WAITS, COMMITS, False, ("PROCESSING", 2, 1), failures=1) for late in (finishes, fails, releases)),
    Race("running", takes_over, finishes, WAITS, ROLLS_BACK, True, DONE),
    # A running job is only asked to stop: who finishes after that has finished, who gives up has been cancelled.
    Race("running", finishes, cancels, WAITS, COMMITS, False, DONE),
    Race("running", finishes, cancels, WAITS, ROLLS_BACK, True, RUNS, ("stop requested",)),
    Race("running", cancels, finishes, WAITS, COMMITS, True, DONE, ("stop requested",)),
    Race("running", cancels, finishes, WAITS, ROLLS_BACK, True, DONE),
    Race("running", cancels, fails, WAITS, COMMITS, True, STOPPED, ("stop requested",), failures=1),
    Race("running", fails, cancels, WAITS, COMMITS, True, STOPPED, ("cancelled",), failures=1, retried=1),
    Race("running", cancels, rescues, PASSES, COMMITS, False, RUNS, ("stop requested",)),
    Race("running", rescues, cancels, WAITS, COMMITS, True, ("CANCELLED", 1, 1), ("cancelled",), failures=1),
    Race("running", cancels, releases, WAITS, COMMITS, True, ("CANCELLED", 0, 0), ("stop requested",)),
    Race("running", releases, cancels, WAITS, COMMITS, True, ("CANCELLED", 0, 0), ("cancelled",)),
    # A claim passes over what somebody has in hand.
    *(
        race
        for claim in (claims, claims_limited)
        for race in (
            Race("waiting", claim, claims, PASSES, COMMITS, False, RUNS),
            Race("waiting", claim, claims, PASSES, ROLLS_BACK, False, ("PENDING", 0, 0)),
            Race("waiting", claim, cancels, WAITS, COMMITS, True, RUNS, ("stop requested",)),
            Race("waiting", claim, cancels, WAITS, ROLLS_BACK, True, ("CANCELLED", 0, 0), ("cancelled",)),
            Race("waiting", claim, buries, WAITS, COMMITS, False, RUNS),
            Race("waiting", claim, buries, WAITS, ROLLS_BACK, True, ("DEAD", 0, 0), ("buried",)),
            Race("waiting", claim, removes, WAITS, COMMITS, False, RUNS),
            Race("waiting", claim, removes, WAITS, ROLLS_BACK, True, None),
            Race("waiting", cancels, claim, PASSES, COMMITS, False, ("CANCELLED", 0, 0), ("cancelled",)),
            Race("waiting", cancels, claim, PASSES, ROLLS_BACK, False, ("PENDING", 0, 0)),
            Race("waiting", removes, claim, PASSES, COMMITS, False, None),
            Race("waiting", removes, claim, PASSES, ROLLS_BACK, False, ("PENDING", 0, 0)),
        )
    ),
    Race("scheduled", promotes, cancels, WAITS, COMMITS, True, ("CANCELLED", 0, 0), ("cancelled",)),
    Race("scheduled", promotes, cancels, WAITS, ROLLS_BACK, True, ("CANCELLED", 0, 0), ("cancelled",)),
    Race("scheduled", cancels, promotes, PASSES, COMMITS, False, ("CANCELLED", 0, 0), ("cancelled",)),
    Race("scheduled", cancels, promotes, PASSES, ROLLS_BACK, False, ("SCHEDULED", 0, 0)),
    Race("scheduled", promotes, promotes, PASSES, COMMITS, False, ("PENDING", 0, 0)),
    Race("failed", prunes, requeues, WAITS, COMMITS, False, None),
    Race("failed", prunes, requeues, WAITS, ROLLS_BACK, True, ("PENDING", 0, 0), ("finished", "retried"), failures=1, retried=1),
    Race("failed", requeues, prunes, WAITS, COMMITS, False, ("PENDING", 0, 0), ("finished", "retried"), failures=1, retried=1),
    Race("failed", requeues, prunes, WAITS, ROLLS_BACK, True, None),
    Race("failed", requeues, requeues, WAITS, COMMITS, False, ("PENDING", 0, 0), ("finished", "retried"), failures=1, retried=1),
    Race("failed", requeues, requeues, WAITS, ROLLS_BACK, True, ("PENDING", 0, 0), ("finished", "retried"), failures=1, retried=1),
    Race("failed", requeues, buries, WAITS, COMMITS, True, ("DEAD", 0, 0), ("finished", "retried", "buried"), failures=1, retried=1),
    Race(
        "failed",
        buries,
        requeues,
        WAITS,
        COMMITS,
        True,
        ("PENDING", 0, 0),
        ("finished", "buried", "finished", "retried"),
        failures=1,
        retried=1,
    ),
    Race("failed", requeues, removes, WAITS, COMMITS, True, None, retried=1),
    Race("failed", removes, requeues, WAITS, COMMITS, False, None),
]


def said(race: Race) -> str:
    return f"{race.first.__name__}-{'commits' if race.commit else 'rolls_back'}-other_{race.second.__name__}"


@pytest.mark.parametrize("race", RACES, ids=said)
def test_of_two_who_want_a_job_one_sees_what_the_other_did(rivals: Rivals, race: Race) -> None:
    rivals.prepare(race.state)
    assert rivals.first(race.first)
    second = rivals.second(race.second, waits=race.waits)
    rivals.end(commit=race.commit)
    assert bool(second.result(10)) == race.second_wins
    rows = execute(rivals.url, "select status, attempt, crashes from jobs")
    assert rows == ([] if race.job is None else [race.job])
    assert sorted(rivals.kinds) == sorted(race.events)
    assert execute(rivals.url, "select count(*) from failures") == [(race.failures,)]
    assert {status: n for status, n in rivals.system.counts().items() if n} == ({} if race.job is None else {race.job[0]: 1})
    totals = rivals.system.totals()
    assert (totals["jobs_created"], totals["jobs_retried"], totals["jobs_dlq"]) == (1, race.retried, race.events.count("buried"))
    status = race.job[0] if race.job else None
    ends = (status == "COMPLETED", status == "CANCELLED", race.state == "failed")
    assert (totals["jobs_success"], totals["jobs_cancelled"], totals["jobs_failed"]) == ends


def test_two_rescuers_do_not_wait_for_each_other(rivals: Rivals) -> None:
    rivals.prepare("running")
    rivals.worker.die()
    execute(rivals.url, "update workers set heartbeat_at = '-infinity'")

    def locks(it: Rivals, run: Callable[..., Any]) -> Any:
        return run("lock_lost_worker", id=it.worker.id)

    assert rivals.first(locks) and rivals.first(rescues)
    assert not rivals.second(locks, waits=False).result()
    rivals.end(commit=False)
    assert rivals.second(locks, waits=False).result()


@pytest.mark.parametrize(
    ("verb", "commit", "outcome"),
    [
        ("cancel", COMMITS, "PROCESSING"),
        ("cancel", ROLLS_BACK, "CANCELLED"),
        ("bury", COMMITS, WrongState),
        ("bury", ROLLS_BACK, "DEAD"),
        ("retry", COMMITS, WrongState),
        ("remove", COMMITS, False),
        ("remove", ROLLS_BACK, True),
    ],
)
def test_an_operator_hears_what_became_of_a_verb_that_waited_for_a_claim(rivals: Rivals, verb: str, commit: bool, outcome: Any) -> None:
    rivals.prepare("waiting")

    def act(it: Rivals, _: Any) -> Any:
        try:
            answer = getattr(it.system, verb)(it.id, by="me")
            return answer if isinstance(answer, bool) else answer.status
        except (WrongState, JobNotFound) as error:
            return type(error)

    assert rivals.first(claims)
    second = rivals.second(act, waits=True)
    rivals.end(commit=commit)
    assert second.result(10) == outcome
    if verb == "remove":
        assert execute(rivals.url, "select stop_requested from jobs") == ([("remove",)] if commit else [])


def test_an_operator_who_came_too_late_hears_what_the_job_has_become(rivals: Rivals) -> None:
    rivals.prepare("running")
    assert rivals.first(finishes)
    second = rivals.second(lambda it, run: run("cancel", id=[it.id], by="me", stop="cancel"), waits=True)
    rivals.end(commit=True)
    assert second.result(10)[0][1:3] == ("COMPLETED", False)


@pytest.mark.parametrize("sleep_ms", [1, 2])
@pytest.mark.parametrize("commit", [COMMITS, ROLLS_BACK])
def test_of_two_submissions_with_one_key_the_second_waits_for_the_first(rivals: Rivals, commit: bool, sleep_ms: int) -> None:
    def submits(it: Rivals, _: Any) -> Any:
        try:
            return it.system.submit("TEST_JOB", {"sleepMs": sleep_ms}, idempotency_key="k")
        except IdempotencyConflict as error:
            return error

    first = rivals.system.submit("TEST_JOB", {"sleepMs": 1}, idempotency_key="k", connection=rivals.connection)
    second = rivals.second(submits, waits=True)
    rivals.end(commit=commit)
    answer = second.result(10)
    if commit and sleep_ms != 1:
        assert isinstance(answer, IdempotencyConflict)
    else:
        assert (answer.id == first.id, answer.replayed) == (commit, commit)
    assert [job.id for job in rivals.system.jobs().jobs] == [first.id if commit else answer.id]
    assert (rivals.system.totals()["jobs_created"], rivals.system.counts()["PENDING"]) == (1, 1)


def test_two_batches_with_the_same_keys_in_other_orders_do_not_wait_for_each_other_for_ever(rivals: Rivals) -> None:
    def batch(keys: str, **where: Any) -> list[str]:
        return rivals.system.submit_many([Submission("TEST_JOB", idempotency_key=key) for key in keys], **where)

    [a] = batch("a", connection=rivals.connection)
    second = rivals.second(lambda it, run: batch("cba"), waits=True)
    c, b = batch("cb", connection=rivals.connection)
    rivals.end(commit=True)
    assert second.result(10) == [c, b, a]


# What takes several jobs at once, in whatever order.


@pytest.fixture
def several(system: JobSystem, rivals: Rivals) -> list[tuple[str, int]]:
    """Running jobs of the worker, and their claims, in the order of their ids."""
    system.submit_many(Submission("TEST_JOB") for _ in range(3))
    return sorted(rivals.worker.claim(3))


def reports(several: list[tuple[str, int]]) -> Act:
    """Says something of these jobs, in this order."""
    ids, claims = (list(column) for column in zip(*several, strict=True))
    lines = {"job_id": ids, "ago": [0.0] * 3, "kind": ["log"] * 3, "attempt": [1] * 3, "message": ["hello"] * 3}
    return lambda it, run: run("report", id=ids, claim=claims, progress=["{}"] * 3, **lines)


def outcome(rivals: Rivals, statement: str, held: tuple[str, int]) -> Outcome:
    row = (held[0], "TEST_JOB", 0, "{}", "{}", 1, held[1], 4, "2030-01-01", 0, 0, "default", 0.0)
    job = RunningJob(row, worker=rivals.worker.id, job_type=None, max_crashes=MAX_CRASHES)
    return finish(job) if statement == "finish" else Outcome(statement, job, {**FAILURE, "status": "FAILED"})


def test_a_report_waits_for_nobody_who_ends_a_job(rivals: Rivals, several: list[tuple[str, int]]) -> None:
    a, b, c = several
    (rivals.id, rivals.claim) = b
    assert rivals.first(finishes)
    rivals.second(reports([c, b, a]), waits=False).result()
    rivals.end(commit=True)
    told = execute(rivals.url, "select id::text from jobs where progress is not null")
    assert {id for (id,) in told} == {a[0], c[0]} and rivals.kinds == ["log"] * 3


@pytest.mark.parametrize("statements", [("finish", "finish"), ("bury", "finish"), ("finish", "bury"), ("bury", "bury")])
def test_outcomes_wait_for_a_report_and_hold_nothing_meanwhile(
    rivals: Rivals, several: list[tuple[str, int]], statements: tuple[str, str]
) -> None:
    a, b, c = several
    settlements = Settlements(rivals.system.database, written=lambda job: None, lost=lambda job: None)
    assert rivals.first(reports([c, b, a])) == []
    for statement, held in zip(statements, (a, c), strict=True):
        settlements.add(outcome(rivals, statement, held))
    settlements.write()
    assert len(settlements) == 2, "they gave up waiting, and come again"
    rivals.end(commit=True)
    assert {id for (id,) in execute(rivals.url, "select id::text from jobs for update skip locked")} == {a[0], b[0], c[0]}

    def written() -> bool:
        settlements.write()
        return not len(settlements)

    eventually(written)
    ends = {"finish": "COMPLETED", "bury": "FAILED"}
    assert [rivals.system.job(id).status for id, _ in (a, c)] == [ends[statement] for statement in statements]
