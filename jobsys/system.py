"""JobSystem: the one object that the API, the admin UI, the CLI, the tests and your programs talk to."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import dramatiq
import psycopg2

from jobsys import db, logs, secrecy, tracing, trail, verbs
from jobsys.broker import JobsBroker
from jobsys.errors import BulkConflict, DatabaseUnavailable, IdempotencyConflict, InvalidSubmission, JobNotFound, WrongState
from jobsys.ids import is_job_id, new_job_id
from jobsys.job_types import MAX_ERRORS, Registry, encode, priority_number, registry
from jobsys.measurements import Recorder
from jobsys.search import Condition, search
from jobsys.settings import Settings
from jobsys.submissions import MANY, Submissions, Submitted, insert, insert_one, stream
from jobsys.verbs import Outcome

STATUSES = ("SCHEDULED", "PENDING", "PROCESSING", "COMPLETED", "FAILED", "DEAD", "CANCELLED")
FINISHED = ("COMPLETED", "FAILED", "DEAD", "CANCELLED")
LONGEST_DELAY = 10 * 366 * 86400
"""Seconds: a job can be scheduled ten years ahead."""
PATIENCE_FOR_KEYS = "4s"
"""How long many jobs wait for others with the same idempotency keys to be committed."""
TRIES = 25
"""How often a key is tried whose job is removed between the insert and the look at it."""
JUST_REMOVED = "the job with this idempotency key is just being removed; try again"
log = logs.get(__name__)


class JobRecord(NamedTuple):
    """One job as it stands. Times are aware, in UTC; `attempt` counts the starts, `error` is the last failed attempt's."""

    id: str
    type: str
    queue: str
    priority: int
    payload: dict[str, Any]
    options: dict[str, Any]
    status: str
    attempt: int
    max_attempts: int | None
    run_at: datetime
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    worker: str | None
    result: Any
    error: dict[str, Any] | None
    progress: dict[str, Any] | None
    group_id: str | None
    idempotency_key: str | None
    stop_requested: bool
    replayed: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The payload as people see it: with the positional arguments of a plain Dramatiq actor as `args`."""
        return {"args": self.options["args"], **self.payload} if "args" in self.options else self.payload

    @property
    def finished(self) -> bool:
        """Whether the job has ended."""
        return self.status in FINISHED

    @property
    def request_id(self) -> str | None:
        """The id of the request that led to the job, where there was one."""
        carried = self.options.get("request_id")
        return str(carried) if trail.is_request_id(carried) else None


class Submission(NamedTuple):
    """A job to be submitted, for `submit_many`; the fields are the arguments of `JobSystem.submit`."""

    type: str
    payload: Any = None
    priority: str | None = None
    delay: float | None = None
    run_at: datetime | None = None
    max_retries: int | None = None
    group_id: str | None = None
    idempotency_key: str | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class Page:
    """Some jobs, newest first, and the cursor that continues the list, or None at its end. `cut_short`: there may be fewer than asked for,
    or none, because looking for more took too long; the cursor goes on from there."""

    jobs: list[JobRecord]
    next_cursor: str | None
    cut_short: bool = False


@dataclass(frozen=True)
class Failure:
    """One failed attempt. Failures alike in kind and place share a fingerprint."""

    attempt: int
    started_at: datetime
    at: datetime
    worker: str
    type: str
    message: str
    traceback: str
    fingerprint: str

    @property
    def duration(self) -> float:
        """Seconds from the attempt's start to its failure."""
        return (self.at - self.started_at).total_seconds()


@dataclass(frozen=True)
class Event:
    """One entry of a job's timeline."""

    at: datetime
    kind: str
    attempt: int | None = None
    by: str | None = None
    message: str | None = None
    detail: dict[str, Any] | None = None


class History(NamedTuple):
    """A job and what happened to it, oldest first."""

    job: JobRecord
    failures: list[Failure]
    events: list[Event]


@dataclass(frozen=True)
class QueueState:
    """A queue as the operator sees it. `rate` is (starts, seconds); `workers` counts the live processes that serve it; `due` are its
    PENDING jobs by type."""

    name: str
    paused: bool
    rate: tuple[int, float] | None
    max_running: int | None
    counts: dict[str, int]
    oldest_due: datetime | None
    workers: int
    due: dict[str, int]


@dataclass(frozen=True)
class WorkerState:
    """A worker process. It is alive while its heart beats; `held_back` are the types it tries only now and then, because all fail alike."""

    id: str
    host: str
    pid: int
    version: str
    queues: list[str]
    types: list[str]
    threads: int
    started_at: datetime
    heartbeat_at: datetime
    alive: bool
    running: int
    held_back: list[str]


class JobSystem:
    """jobsys in a program: submit jobs, look at them, act on them. Safe for threads; opens no connection before it needs one.

    `JobSystem()` reads the environment. Every method raises DatabaseUnavailable when PostgreSQL is away or takes over 5 s.
    """

    def __init__(self, settings: Settings | None = None, *, pool_size: int = 8) -> None:
        self.settings = settings or Settings()
        secrecy.learn(self.settings)
        tracing.configure(self.settings)
        self.database = db.Database(db.url_of(self.settings), size=pool_size, wait=2.0, patience=4.0)
        self._submissions = Submissions(self.database)
        self.broker = JobsBroker(self.database, settings=self.settings)
        self.recorder = Recorder(
            self.broker.measurements,
            kind="web",
            every=self.settings.worker_heartbeat,
            database=self.database,
            pools=[self.database],
        )
        """For a web process to start: a worker's is its presence's."""
        if dramatiq.broker.global_broker is None:
            # So that plain `@dramatiq.actor` in JOB_MODULES lands here and not on a RabbitMQ that Dramatiq would look for.
            dramatiq.set_broker(self.broker)
        self.types: Registry = registry.load(self.settings.job_modules)
        self.broker.declare_job_types(self.types)

    # Submitting

    def submit(
        self,
        type: str,
        payload: Any = None,
        *,
        priority: str | None = None,
        delay: float | None = None,
        run_at: datetime | None = None,
        max_retries: int | None = None,
        group_id: str | None = None,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        connection: Any = None,
    ) -> JobRecord:
        """Submit one job; committed when this returns.

        `delay` is in seconds, `run_at` an aware datetime (one of the two, or neither for now). With `connection`, a psycopg2 connection
        of yours, the job is part of your transaction: it exists and runs if and when you commit. The same idempotency key again answers
        the first job, with `replayed` true. `request_id` is kept with the job and stands on the log's lines about it; left out, it is
        that of the job in whose course this one is submitted. Raises InvalidSubmission, which names each wrong field.
        """
        submission = Submission(type, payload, priority, delay, run_at, max_retries, group_id, idempotency_key, request_id)
        submitted = self._described(submission, ())
        if connection is not None:
            connection = db.Lent(connection)
            with db.translated():
                return self._answer(submitted, partial(insert_one, connection), connection)
        return self.submit_described(submitted)

    def submit_described(self, job: Submitted) -> JobRecord:
        """Submit what `describe` made. Committed when this returns."""
        return self._answer(job, self._submissions.insert)

    def submit_with_others(self, job: Submitted, then: Callable[[Exception | None], None]) -> bool:
        """Submit what `describe` made together with what others submit at this moment, and don't wait for it: `then` is called by another
        thread, once, when it is committed (with None), or with what `submit` would have raised; maybe before this returns. False: no others
        do, or the job is no plain one; nothing has happened."""

        def told(error: Exception | None) -> None:
            then(_not_storable(error) if isinstance(error, psycopg2.DataError) else error)

        return job.plain and self._submissions.insert_with_others(job, told)

    def submit_many(
        self, submissions: Iterable[Submission | Submitted], *, idempotency_key: str | None = None, connection: Any = None
    ) -> list[str]:
        """Submit many jobs in one transaction, all or none; their ids, in the order given.

        A job whose idempotency key was used before is not made again: its place has the first job's id. With `idempotency_key` that goes
        for all of them as a whole: the same jobs again with the same key give the first ones' ids. Raises InvalidSubmission with the
        item's number at the front of each `loc`.
        """
        # Whatever yields the submissions may take its time: not while the transaction is open.
        given = list(submissions)
        jobs = (self._described(submission, (number,)) for number, submission in enumerate(given))
        if _checked_key(idempotency_key) is not None:
            jobs = (_keyed(job, str(idempotency_key), number) for number, job in enumerate(jobs))
        first = list(islice(jobs, MANY))
        write = self._insert_all if len(first) < MANY else self._stream_all
        if connection is None:
            with self.database.transaction(lock_timeout=PATIENCE_FOR_KEYS) as own:
                return self._write_many(own, write, chain(first, jobs), idempotency_key)
        connection = db.Lent(connection)
        with db.translated(), db.nested(connection):
            return self._write_many(connection, write, chain(first, jobs), idempotency_key)

    def describe(self, submission: Submission) -> Submitted:
        """The submission, checked, as `submit_many` takes it as well: its payload is text and needs a fraction of the memory. Raises
        InvalidSubmission."""
        return self._described(submission, ())

    # Reading

    def job(self, job_id: str) -> JobRecord:
        """One job. Raises JobNotFound."""
        rows = self.database.run("job", id=_known_id(job_id))
        if not rows:
            raise JobNotFound(job_id)
        return _record(rows[0])

    def jobs(
        self,
        *,
        status: str | Iterable[str] | None = None,
        type: str | None = None,
        queue: str | None = None,
        priority: str | None = None,
        group_id: str | None = None,
        q: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page:
        """A page of jobs, newest first, in a few seconds at most. Filters narrow it together; `q` is text found in type, payload or error,
        or a job's id.

        Raises InvalidSubmission for a filter that can't be: a status there is not, a cursor that is none of ours.
        """
        where = self._where(status, type, queue, priority, group_id, q, created_after, created_before)
        if cursor is not None and not is_job_id(cursor):
            raise InvalidSubmission.of(["cursor"], "is not a cursor that an earlier page gave")
        rows, next_cursor, cut_short = search(self.database, where, limit=limit, cursor=cursor)
        return Page([_record(row) for row in rows], next_cursor, cut_short)

    def wait(self, job_id: str, timeout: float) -> JobRecord:
        """The job as soon as it has ended, else as it is after `timeout` seconds. Raises JobNotFound."""
        deadline = time.monotonic() + timeout
        pause = 0.01
        while True:
            record = self.job(job_id)
            left = deadline - time.monotonic()
            if record.finished or left <= 0:
                return record
            time.sleep(min(pause, left))
            pause = min(pause * 1.3, 0.25)

    def unfinished(self, job_ids: Iterable[str]) -> set[str]:
        """Those of these jobs that have not ended. Who is missing has, or there is no such job."""
        ids = list(job_ids)
        return {job_id for (job_id,) in self.database.run("unfinished_jobs", ids=ids)} if ids else set()

    def stirred(self, watched: Iterable[tuple[str, str, str]]) -> set[str]:
        """Those of these jobs of which there is something new since a `timeline.Look` at them, given as (id, version, snapshot)."""
        ids, versions, snapshots = ([*column] for column in zip(*watched, strict=True)) if watched else ([], [], [])
        return (
            {job_id for (job_id,) in self.database.run("stirred_jobs", ids=ids, versions=versions, snapshots=snapshots)} if ids else set()
        )

    def group(self, group_id: str) -> list[JobRecord]:
        """The jobs of a group, in the order they were submitted; [] when there is no such group."""
        return [_record(row) for row in self.database.run("group", group_id=group_id)] if is_job_id(group_id) else []

    def failures(self, job_id: str) -> list[Failure]:
        """The failed attempts of a job, oldest first. Raises JobNotFound."""
        return self.history(job_id).failures

    def events(self, job_id: str) -> list[Event]:
        """The timeline of a job, oldest first. Raises JobNotFound."""
        return self.history(job_id).events

    def history(self, job_id: str) -> History:
        """A job, its failed attempts and its timeline, all of one moment. Raises JobNotFound."""
        with self.database.snapshot() as connection:
            found = {name: db.run(connection, name, id=_known_id(job_id)) for name in ("job", "failures", "events")}
        if not found["job"]:
            raise JobNotFound(job_id)
        record = _record(found["job"][0])
        failures = [Failure(row[0], _utc(row[1]), _utc(row[2]), *row[3:]) for row in found["failures"]]
        events = [Event(_utc(at), *rest) for at, *rest in found["events"]]
        events.append(Event(record.created_at, "created", detail={"requestId": record.request_id} if record.request_id else None))
        if record.status == "SCHEDULED":
            events.append(Event(record.run_at, "due"))
        for failure in failures:
            events.append(Event(failure.started_at, "started", failure.attempt, None, None, {"worker": failure.worker}))
            detail = {"type": failure.type, "traceback": failure.traceback, "worker": failure.worker, "duration": failure.duration}
            events.append(Event(failure.at, "failed", failure.attempt, None, failure.message, detail))
        if record.started_at is not None and record.started_at not in {event.at for event in events if event.kind == "started"}:
            events.append(Event(record.started_at, "started", record.attempt, None, None, {"worker": record.worker}))
        if record.finished_at is not None:
            events.append(Event(record.finished_at, "finished", record.attempt, None, record.status))
        # A job's end is written in the same moment as what led to it, and comes after that.
        return History(record, failures, sorted(events, key=lambda event: (event.at, event.kind == "finished")))

    # The operator's verbs

    def cancel(self, job_id: str, by: str | None = None) -> JobRecord:
        """Cancel a waiting job at once; ask a running one to stop. Raises JobNotFound, WrongState."""
        return self._act("cancel", job_id, by)

    def retry(self, job_id: str, by: str | None = None) -> JobRecord:
        """Put an ended job back into the queue; attempts start again at 0, history is kept. Raises JobNotFound, WrongState."""
        return self._act("retry", job_id, by)

    def bury(self, job_id: str, by: str | None = None) -> JobRecord:
        """Dead-letter a job that waits or failed. Raises JobNotFound, WrongState."""
        return self._act("bury", job_id, by)

    def act_on_many(
        self,
        verb: str,
        ids: Iterable[str] | None = None,
        *,
        by: str | None = None,
        as_of: datetime | None = None,
        patience: float | None = None,
        **filters: Any,
    ) -> Outcome:
        """`retry`, `bury` or `cancel` many jobs: those of `ids`, or all that match `filters`, which are those of `jobs`.

        It takes `patience` seconds (3), hardly more, and says whether there are more: the same call again then goes on. With the `as_of`
        of the first call nothing is done twice, not even to a job that was retried and has failed again. Without a status among the filters
        those are meant that the verb is mostly for (`verbs.VERBS`). Raises InvalidSubmission for a status that it can't be asked of.
        """
        statuses, where = self._meant(verb, filters)
        as_of = as_of or self.now()
        ask = partial(
            verbs.act, self.database, verbs.VERBS[verb], by=by, as_of=as_of, patience=verbs.PATIENCE if patience is None else patience
        )
        if ids is None:
            found = verbs.matching(self.database, statuses, where, as_of)
            outcome, _ = ask(found, statuses)
            return outcome._replace(more=outcome.more or len(found) == verbs.MOST)
        given = list({id.lower(): id for id in ids}.values())
        before: dict[str, str] = dict(self.database.run("statuses", id=[id for id in given if is_job_id(id)]))
        can = [id for id, status in before.items() if status in verbs.VERBS[verb].allowed]
        outcome, asked = ask(can, verbs.VERBS[verb].allowed)
        return outcome._replace(left={id: before.get(id.lower()) for id in given if id.lower() not in asked})

    def now(self) -> datetime:
        """The database's time, for an `as_of`: what has come to its status before this was asked has done so by then."""
        return verbs.now(self.database)

    def count_matching(self, verb: str, *, as_of: datetime, **filters: Any) -> int:
        """How many jobs `act_on_many` with these filters would act on; up to 100,000 exactly, and beyond that 100,001."""
        return verbs.count(self.database, *self._meant(verb, filters), as_of)

    def remove(self, job_id: str, by: str | None = None) -> bool:
        """Remove a job and its history. True: it is gone. False: it runs and was asked to stop; it goes when it has. Raises JobNotFound."""
        if self.database.run("remove", id=_known_id(job_id)):
            return True
        rows = self.database.run("cancel", id=[job_id], by=by, stop="remove")
        if not rows:
            raise JobNotFound(job_id)
        if not rows[0][2] or rows[0][1] != "PROCESSING":
            # It ended, or was given back, between the two statements.
            return bool(self.database.run("remove", id=job_id)) or self.remove(job_id, by)
        return False

    # Queues, workers, numbers

    def pause(self, queue: str, by: str | None = None) -> None:
        """Start no further job of this queue, anywhere. What runs goes on."""
        self.database.run("pause_queue", queue=queue)
        log.info("queue paused", queue=queue, by=by)

    def resume(self, queue: str, by: str | None = None) -> None:
        """Undo `pause`."""
        self.database.run("resume_queue", queue=queue)
        self.database.run("wake_queue", queue=queue)
        log.info("queue resumed", queue=queue, by=by)

    def limit(self, queue: str, *, rate: tuple[int, float] | None = None, max_running: int | None = None) -> None:
        """Limit a queue over all workers: `rate` is (starts, seconds), evenly spaced. None takes a limit away. Takes effect at once."""
        count, period = rate if rate is not None else (None, None)
        self.database.run("set_limits", queue=queue, rate_count=count, rate_period=period, max_running=max_running)

    def queues(self) -> list[QueueState]:
        """Every queue that has a job, a limit or a worker."""
        waiting: defaultdict[str, dict[str, int]] = defaultdict(dict)
        due: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for queue, type, status, entered, departed in self._counts():
            if status in ("SCHEDULED", "PENDING", "PROCESSING"):
                waiting[queue][status] = waiting[queue].get(status, 0) + entered - departed
            if status == "PENDING" and entered > departed:
                due[queue][type] = entered - departed
        limits = {name: (paused, count, period, running) for name, paused, count, period, running in self.database.run("queue_settings")}
        alive = [worker for worker in self.workers() if worker.alive]
        names = sorted({*waiting, *limits, *(queue for worker in alive for queue in worker.queues)})
        states = []
        for name in names:
            paused, count, period, max_running = limits.get(name, (False, None, None, None))
            oldest = self.database.run("oldest_due", queue=name) if waiting[name].get("PENDING") else []
            states.append(
                QueueState(
                    name=name,
                    paused=paused,
                    rate=None if count is None else (count, period),
                    max_running=max_running,
                    counts=waiting[name],
                    oldest_due=_utc(oldest[0][0]) if oldest else None,
                    workers=sum(name in worker.queues for worker in alive),
                    due=due[name],
                )
            )
        return states

    def workers(self) -> list[WorkerState]:
        """Every worker process that has not left, oldest first."""
        states = (WorkerState(*row) for row in self.database.run("workers"))
        return [replace(state, started_at=_utc(state.started_at), heartbeat_at=_utc(state.heartbeat_at)) for state in states]

    def counts(self) -> dict[str, int]:
        """How many jobs there are in each status. Exact, and never a look at the jobs themselves."""
        counts = dict.fromkeys(STATUSES, 0)
        for _, _, status, entered, departed in self._counts():
            if status in counts:
                counts[status] += entered - departed
        return counts

    def totals(self) -> dict[str, int]:
        """What has happened since the database was made, exact, whatever was removed since; and how many jobs wait and run now."""
        entered: defaultdict[str, int] = defaultdict(int)
        live: defaultdict[str, int] = defaultdict(int)
        for _, _, status, came, went in self._counts():
            entered[status] += came
            live[status] += came - went
        return {
            "jobs_created": entered["CREATED"],
            "jobs_pending": live["PENDING"],
            "jobs_scheduled": live["SCHEDULED"],
            "jobs_processing": live["PROCESSING"],
            "jobs_success": entered["COMPLETED"],
            "jobs_failed": entered["FAILED"],
            "jobs_retried": entered["RETRIED"],
            "jobs_dlq": entered["DEAD"],
            "jobs_cancelled": entered["CANCELLED"],
        }

    def health(self) -> dict[str, Any]:
        """`database`: it answers. `broker`: a live worker serves every queue that has due jobs. `workers`: how many live. Raises
        nothing."""
        try:
            queues = self.queues()
            workers = sum(worker.alive for worker in self.workers())
        except (DatabaseUnavailable, psycopg2.Error):
            return {"database": False, "broker": False, "workers": 0}
        return {"database": True, "broker": all(queue.workers for queue in queues if queue.oldest_due is not None), "workers": workers}

    def close(self) -> None:
        """Close the idle connections."""
        self.recorder.close()
        self.broker.close()

    def _described(self, submission: Submission | Submitted, loc: tuple[str | int, ...]) -> Submitted:
        """The submission as a row, checked. Raises InvalidSubmission with `loc` in front."""
        if isinstance(submission, Submitted):
            return submission
        try:
            job_type = self.types.find(submission.type)
            payload = job_type.check({} if submission.payload is None else submission.payload)
            priority = priority_number(submission.priority if submission.priority is not None else job_type.priority)
            retries = submission.max_retries
            if retries is None:
                retries = self.settings.max_retries if job_type.max_retries is None else job_type.max_retries
            elif isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= 1000:
                raise InvalidSubmission.of(["maxRetries"], "must be a whole number from 0 to 1000")
            id = new_job_id()
            return Submitted(
                id=id,
                type=job_type.name,
                queue=job_type.queue,
                priority=priority,
                payload=payload,
                options=_options(submission, job=None if loc else (id, job_type.name, job_type.queue)),
                max_attempts=retries + 1,
                run_at=_checked_run_at(submission),
                delay=_checked_delay(submission),
                group_id=_checked_group(submission.group_id),
                idempotency_key=_checked_key(submission.idempotency_key),
            )
        except InvalidSubmission as error:
            if not loc:
                raise
            raise InvalidSubmission([{"loc": [*loc, *each["loc"]], "msg": each["msg"]} for each in error.errors]) from None

    def _answer(self, job: Submitted, put_in: Callable[[Submitted], db.Row | None], connection: Any = None) -> JobRecord:
        for _ in range(TRIES):
            try:
                row = put_in(job)
            except psycopg2.DataError as error:
                raise _not_storable(error) from None
            if row is not None:
                _, status, run_at, created_at = row
                return _new_record(job, status, _utc(run_at), _utc(created_at))
            with self.database.connection() if connection is None else nullcontext(connection) as using:
                for _, first, same in _first_with_keys(using, [job]):
                    if not same:
                        raise IdempotencyConflict(str(job.idempotency_key))
                    if found := db.run(using, "job", id=first):
                        return _record(found[0])._replace(replayed=True)
            # The job that had the key was removed in between: the key is free.
        raise DatabaseUnavailable(JUST_REMOVED)

    def _write_many(self, connection: Any, write: Callable[..., list[str]], jobs: Iterable[Submitted], key: str | None) -> list[str]:
        """Insert jobs by `write`; with `key`, all of them are new or none is, and none is missing of those it was used for."""
        if key is None:
            return write(connection, jobs)
        made: list[Submitted] = []
        ids = write(connection, (made.append(job) or job for job in jobs))  # type: ignore[func-returns-value]
        replayed = sum(id != job.id for id, job in zip(ids, made, strict=True))
        if replayed and (replayed < len(ids) or _first_with_keys(connection, [made[0]._replace(idempotency_key=_key_of(key, len(ids)))])):
            raise BulkConflict(key)
        return ids

    def _stream_all(self, connection: Any, jobs: Iterable[Submitted]) -> list[str]:
        """Insert the plain ones as they come, then the others; all their ids, in the order given."""
        ids, others, places = [], [], []

        def plain_ones() -> Iterator[Submitted]:
            for number, job in enumerate(jobs):
                ids.append(job.id)
                if job.plain:
                    yield job
                else:
                    others.append(job)
                    places.append(number)

        with _storable():
            stream(connection, plain_ones())
        for number, id in zip(places, self._insert_all(connection, others, places), strict=True):
            ids[number] = id
        return ids

    def _insert_all(self, connection: Any, jobs: Iterable[Submitted], numbers: Sequence[int] | None = None) -> list[str]:
        """Insert jobs; their ids in the order given. `numbers` are their places in the list they come from, for errors."""
        jobs = list(jobs)
        with _storable():
            inserted = {row[0] for row in insert(connection, jobs)} if jobs else set()
        again = [(place, job) for place, job in enumerate(jobs) if job.id not in inserted]
        ids, errors = [job.id for job in jobs], []
        found = _first_with_keys(connection, [job for _, job in again]) if again else []
        if len(found) < len(again):
            raise DatabaseUnavailable(JUST_REMOVED)
        for (place, job), (_, first, same) in zip(again, found, strict=True):
            ids[place] = first
            if not same:
                conflict = IdempotencyConflict(str(job.idempotency_key)).errors[0]
                errors.append({**conflict, "loc": [numbers[place] if numbers else place, *conflict["loc"]]})
        if errors:
            raise InvalidSubmission(sorted(errors, key=lambda error: error["loc"][0])[:MAX_ERRORS])
        return ids

    def _act(self, name: str, job_id: str, by: str | None) -> JobRecord:
        verb = verbs.VERBS[name]
        rows = self.database.run(verb.statement, id=[_known_id(job_id)], by=by, **verb.parameters)
        if not rows:
            raise JobNotFound(job_id)
        _, status, changed = rows[0][:3]
        if not changed:
            raise WrongState(verb.done, status, verb.allowed)
        return self.job(job_id)

    def _meant(self, name: str, filters: dict[str, Any]) -> tuple[tuple[str, ...], Condition]:
        """The statuses that a verb with these filters is meant for, and what else the jobs must fulfil."""
        verb, status = verbs.VERBS[name], filters.get("status")
        statuses = verb.usual if status is None else (status,) if isinstance(status, str) else tuple(status)
        for each in statuses:
            if each not in verb.allowed:
                raise InvalidSubmission.of(["status"], str(WrongState(verb.done, each, verb.allowed)))
        return statuses, self._where(**{**filters, "status": None})

    def _where(
        self,
        status: str | Iterable[str] | None = None,
        type: str | None = None,
        queue: str | None = None,
        priority: str | None = None,
        group_id: str | None = None,
        q: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Condition:
        """What the filters ask of a job. Raises InvalidSubmission for one that can't be."""
        where: dict[str, Any] = {"true": {}}
        if status is not None:
            statuses = [status] if isinstance(status, str) else list(status)
            if unknown := set(statuses) - set(STATUSES):
                raise InvalidSubmission.of(["status"], f'status "{unknown.pop()}" is not one of {", ".join(STATUSES)}')
            # Constants, so that the planner can use the index of jobs that broke; they were just checked.
            where[f"status in ({', '.join(repr(each) for each in statuses)})"] = {}
        if type is not None:
            where["type = %(type)s"] = {"type": self.types.find(type).name if type.lower() in self.types.names else type}
        if queue is not None:
            where["queue = %(queue)s"] = {"queue": queue}
        if priority is not None:
            where["priority = %(priority)s"] = {"priority": priority_number(priority)}
        if group_id is not None:
            where["group_id = %(group_id)s" if is_job_id(group_id) else "false"] = {"group_id": group_id}
        if created_after is not None:
            where["created_at >= %(created_after)s"] = {"created_after": created_after}
        if created_before is not None:
            where["created_at < %(created_before)s"] = {"created_before": created_before}
        if q is not None:
            if is_job_id(q):
                where["(id = %(q)s or group_id = %(q)s)"] = {"q": q}
            else:
                where["(type ilike %(q)s or payload::text ilike %(q)s or error::text ilike %(q)s)"] = {"q": f"%{_like(q)}%"}
        return Condition(" and ".join(where), {name: value for each in where.values() for name, value in each.items()})

    def _counts(self) -> list[db.Row]:
        return self.database.run("counts")


def _first_with_keys(connection: Any, jobs: list[Submitted]) -> list[db.Row]:
    """(its place in `jobs`, the id of the job that has its key, whether that is the same job) of each whose key is taken, in order."""
    names = ("idempotency_key", "type", "priority", "payload", "max_attempts")
    return db.run(connection, "find_idempotent", **{name: [getattr(job, name) for job in jobs] for name in names})


def _keyed(job: Submitted, key: str, number: int) -> Submitted:
    """A job of many that have one key together."""
    if job.idempotency_key is not None:
        raise InvalidSubmission.of([number, "idempotencyKey"], "must be left out where all have an Idempotency-Key together")
    return job._replace(idempotency_key=_key_of(key, number))


def _key_of(key: str, number: int) -> str:
    return f"{key} #{number}"


def _not_storable(error: psycopg2.DataError) -> InvalidSubmission:
    return InvalidSubmission.of(["payload"], f"PostgreSQL can't store it: {str(error).splitlines()[0]}")


@contextmanager
def _storable() -> Iterator[None]:
    try:
        yield
    except psycopg2.DataError as error:
        raise InvalidSubmission.of([], f"PostgreSQL can't store one of them: {str(error).splitlines()[0]}") from None


def _record(row: db.Row) -> JobRecord:
    times = (_utc(value) if value is not None else None for value in row[9:13])
    return JobRecord(*row[:9], *times, *row[13:])


def _new_record(job: Submitted, status: str, run_at: datetime, created_at: datetime) -> JobRecord:
    return JobRecord(
        id=job.id,
        type=job.type,
        queue=job.queue,
        priority=job.priority,
        payload=_read(job.payload),
        options=_read(job.options),
        status=status,
        attempt=0,
        max_attempts=job.max_attempts,
        run_at=run_at,
        created_at=created_at,
        started_at=None,
        finished_at=None,
        worker=None,
        result=None,
        error=None,
        progress=None,
        group_id=job.group_id,
        idempotency_key=job.idempotency_key,
        stop_requested=False,
    )


def _read(text: str) -> Any:
    return {} if text == "{}" else json.loads(text)


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(timezone.utc)


def _known_id(job_id: str) -> str:
    if not is_job_id(job_id):
        raise JobNotFound(str(job_id))
    return job_id


def _like(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _options(submission: Submission, job: tuple[str, str, str] | None) -> str:
    given = submission.request_id
    if given is not None and not trail.is_request_id(given):
        raise InvalidSubmission.of(["requestId"], "must be 1 to 128 letters, digits or any of _.:/+=@-")
    carried = trail.options(given, job=job)
    if carried.keys() == {"request_id"}:  # as almost always; nothing in it needs to be escaped
        return '{"request_id": "' + carried["request_id"] + '"}'
    return encode(carried) if carried else "{}"


def _checked_delay(submission: Submission) -> float | None:
    delay = submission.delay
    if delay is None:
        return None
    if submission.run_at is not None:
        raise InvalidSubmission.of(["delay"], "give either runAt or delay, not both")
    if isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay <= LONGEST_DELAY:
        raise InvalidSubmission.of(["delay"], f"must be a number of seconds from 0 to {LONGEST_DELAY}")
    return float(delay)


def _checked_run_at(submission: Submission) -> datetime | None:
    run_at = submission.run_at
    if run_at is None:
        return None
    if not isinstance(run_at, datetime) or run_at.tzinfo is None:
        raise InvalidSubmission.of(["runAt"], "must be a time with its offset from UTC, such as 2030-01-01T12:00:00Z")
    if not 1970 <= run_at.year <= 9998:
        raise InvalidSubmission.of(["runAt"], "must lie between the years 1970 and 9998")
    return run_at


def _checked_group(group_id: str | None) -> str | None:
    if group_id is not None and not is_job_id(group_id):
        raise InvalidSubmission.of(["groupId"], "must be a UUID")
    return group_id


def _checked_key(key: str | None) -> str | None:
    if key is None:
        return None
    # A header has no other characters that everybody would read alike.
    if not isinstance(key, str) or not 1 <= len(key) <= 255 or not (key.isascii() and key.isprintable()):
        raise InvalidSubmission.of(["idempotencyKey"], "must be 1 to 255 printable ASCII characters")
    return key
