"""Jobs on their way into the table: one at once, what many threads submit meanwhile together, and a great many as a stream."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any, NamedTuple

import psycopg2

from jobsys import db, logs
from jobsys.errors import DatabaseUnavailable
from jobsys.interrupt import undisturbed

LARGEST_INSERT = 1000
LARGEST_GROUP = 1024**2
"""Characters of payloads from which on a group is large enough: PostgreSQL must have inserted it within a connection's patience."""
IDLE = 5.0
"""Seconds after which the thread that inserts for others ends, when it had nothing to do."""
MANY = 100
"""From so many on, jobs are streamed: before that, COPY would cost more than it spares."""
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
log = logs.get(__name__)


class Submitted(NamedTuple):
    """A job to be inserted; the fields are the parameters of `submit_one` and `submit_many`. payload and options are JSON text."""

    id: str
    type: str
    queue: str
    priority: int
    payload: str
    options: str
    max_attempts: int | None
    run_at: Any
    delay: float | None
    group_id: str | None
    idempotency_key: str | None

    @property
    def plain(self) -> bool:
        """Whether the job is due now and has no key: then simpler statements will do."""
        return self.run_at is None and not self.delay and self.idempotency_key is None


def insert(connection: Any, jobs: list[Submitted]) -> list[db.Row]:
    """Insert jobs on a connection, inside its transaction; (id, status, run_at, created_at) of those whose key was not taken."""
    if not jobs:
        return []
    if all(job.plain for job in jobs):
        if len(jobs) == 1:
            return [_answered(answer) for (answer,) in db.run(connection, "submit_one", **jobs[0]._asdict()) if answer is not None]
        with connection.cursor() as cursor:
            # Value by value: psycopg2 takes half as long again to write rows that are tuples.
            cursor.execute(_submit(len(jobs)), [value for job in jobs for value in (*job[:7], job.group_id)])
            rows: list[db.Row] = cursor.fetchall()
            return rows
    # In the order of their keys: two transactions that wait for each other's keys would be a deadlock.
    jobs = sorted(jobs, key=lambda job: job.idempotency_key or "")
    inserted = []
    for start in range(0, len(jobs), LARGEST_INSERT):
        columns = zip(Submitted._fields, zip(*jobs[start : start + LARGEST_INSERT], strict=True), strict=True)
        inserted += db.run(connection, "submit_many", **{name: list(column) for name, column in columns})
    return inserted


def _answered(answer: str) -> db.Row:
    """What `submit_job` answers, as the row that the other statements return."""
    id, status, run_at, created_at = answer.split(" ")
    return id, status, EPOCH + timedelta(microseconds=int(run_at)), EPOCH + timedelta(microseconds=int(created_at))


@lru_cache(MANY)
def _submit(jobs: int) -> str:
    return db.STATEMENTS["submit"].replace("{rows}", ", ".join(["(%s, %s, %s, %s, %s, %s, %s, %s)"] * jobs))


def insert_one(connection: Any, job: Submitted) -> db.Row | None:
    """Insert one job; None when its key is taken."""
    return next(iter(insert(connection, [job])), None)


def stream(connection: Any, jobs: Iterable[Submitted]) -> None:
    """Insert any number of plain jobs by COPY, inside the connection's transaction; all or none.

    PostgreSQL works while `jobs` is still being made. What making them raises leaves from here, nothing inserted.
    """
    rows = _Rows(jobs)
    try:
        with connection.cursor() as cursor:
            cursor.copy_expert(db.STATEMENTS["stream"], rows)
    except psycopg2.Error:
        if rows.error is not None:
            raise rows.error from None
        raise


class _Rows:
    """Jobs as a file in COPY's text format, made as it is read."""

    def __init__(self, jobs: Iterable[Submitted]) -> None:
        self.error: BaseException | None = None
        self._lines = (_line(job) for job in jobs)
        self._rest = ""

    def read(self, size: int) -> str:
        try:
            lines = [self._rest]
            length = len(self._rest)
            while length < size:
                line = next(self._lines, None)
                if line is None:
                    break
                lines.append(line)
                length += len(line)
        except BaseException as error:
            # psycopg2 makes its own error of whatever is raised here, be it a stop or Ctrl-C.
            self.error = error
            raise
        text = "".join(lines)
        self._rest = text[size:]
        return text[:size]


def _line(job: Submitted) -> str:
    # Only JSON can hold a backslash here, and JSON text holds no tab and no line break.
    payload, options = job.payload.replace("\\", "\\\\"), job.options.replace("\\", "\\\\")
    attempts, group = r"\N" if job.max_attempts is None else job.max_attempts, job.group_id or r"\N"
    return f"{job.id}\t{job.type}\t{job.queue}\t{job.priority}\t{payload}\t{options}\t{attempts}\t{group}\n"


class Submissions:
    """Inserts what several threads submit at the same time by one statement in one commit.

    Who finds nobody inserting inserts its job itself, at once. What comes while that is on its way waits, and a thread of our own then
    inserts it, all that waits by then together: so a thread that is alone loses nothing, and a crowd shares commits.
    """

    def __init__(self, database: db.Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._waiting: deque[_Turn] = deque()
        self._inserting = False
        self._thread: threading.Thread | None = None
        self._bell = threading.Semaphore(0)
        """Rung for the thread when something waits and nobody inserts."""

    def insert(self, job: Submitted) -> db.Row | None:
        """(id, status, run_at, created_at) of the job, committed; None when its key is taken. Raises DatabaseUnavailable, and
        psycopg2.DataError for what PostgreSQL can't store."""
        if job.idempotency_key is not None:
            # A key may have to wait for somebody's open transaction: alone.
            with self._database.connection() as connection:
                return insert_one(connection, job)
        # A job's function may submit, and be stopped meanwhile: not in here, where others wait.
        with undisturbed():
            turn = None
            with self._lock:
                if self._inserting:
                    turn = _Awaited(job)
                    self._waiting.append(turn)
                self._inserting = True
            if turn is None:
                try:
                    with self._database.connection() as connection:
                        row = insert_one(connection, job)
                finally:
                    self._go_on()
                if row is None or row[0] != job.id:
                    raise _not_kept()
                return row
            self._await(turn)
        if turn.error is not None:
            raise turn.error
        return turn.row

    def insert_with_others(self, job: Submitted, then: Callable[[Exception | None], None]) -> bool:
        """False: nobody is inserting just now. True: the job, a plain one, goes with the next ones, and `then` is called in another thread,
        once: when it is committed with None, else with what `insert` would have raised. It may have been called by now."""
        with self._lock:
            if self._inserting:
                self._waiting.append(_Told(job, then))
            return self._inserting

    def _await(self, turn: _Awaited) -> None:
        try:
            turn.wait()
        except BaseException:  # Ctrl-C
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove(turn)
            raise

    def _go_on(self) -> None:
        """Whoever has inserted leaves to the thread what came meanwhile."""
        with self._lock:
            self._inserting = bool(self._waiting)
            if not self._inserting or self._ring():
                return
        while self._insert_waiting():
            pass

    def _ring(self) -> bool:
        """Tell the thread; False: there is none to be had. Called under the lock."""
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._insert_for_others, name="jobsys submissions", daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError):
                return False
            self._thread = thread
        self._bell.release()
        return True

    def _insert_for_others(self) -> None:
        """The thread, which ends when it had nothing to do for a while."""
        while True:
            rung = self._bell.acquire(timeout=IDLE)
            with self._lock:
                if not (rung or self._bell.acquire(blocking=False)):
                    self._thread = None
                    return
            while self._insert_waiting():
                pass

    def _insert_waiting(self) -> bool:
        """Insert what waits, as far as it is not too much; whether there is more. It raises nothing: those who come meanwhile rely on
        somebody going on."""
        group: list[_Turn] = []
        size = 0
        try:
            with self._lock:
                while self._waiting and len(group) < LARGEST_INSERT and size < LARGEST_GROUP:
                    group.append(self._waiting[0])
                    self._waiting.popleft()
                    size += len(group[-1].job.payload)
            self._insert(group)
        except Exception:
            with contextlib.suppress(Exception):
                log.exception("a part of the jobs that waited could not be inserted", jobs=len(group))
        finally:
            with self._lock:
                self._inserting = more = bool(self._waiting)
            for turn in group:
                turn.end()
        return more

    def _insert(self, group: list[_Turn]) -> None:
        try:
            with self._database.connection() as connection:
                rows = {row[0]: row for row in insert(connection, [turn.job for turn in group])}
        except Exception as error:
            if len(group) > 1 and not isinstance(error, DatabaseUnavailable):
                # Perhaps one of them is refused, by a trigger of somebody's, say. The others need not be.
                half = len(group) // 2
                self._insert(group[:half])
                self._insert(group[half:])
                return
            for turn in group:
                turn.error = error
        else:
            for turn in group:
                turn.row = rows.get(turn.job.id)
                turn.error = None if turn.row else _not_kept()


def _not_kept() -> DatabaseUnavailable:
    return DatabaseUnavailable("PostgreSQL has kept no row of the job; a trigger's doing?")


class _Turn:
    """A job that is to be inserted, and what became of it."""

    row: db.Row | None = None

    def __init__(self, job: Submitted) -> None:
        self.job = job
        self.error: Exception | None = DatabaseUnavailable("interrupted while the job was being inserted")

    def end(self) -> None:
        """It was inserted, or could not be."""


class _Awaited(_Turn):
    """One that a thread waits for."""

    def __init__(self, job: Submitted) -> None:
        super().__init__(job)
        self._ended = threading.Lock()
        self._ended.acquire()

    def wait(self) -> None:
        """Wait for its end."""
        self._ended.acquire()

    def end(self) -> None:
        """End the wait."""
        self._ended.release()


class _Told(_Turn):
    """One that nobody waits for: `then` is told."""

    def __init__(self, job: Submitted, then: Callable[[Exception | None], None]) -> None:
        super().__init__(job)
        self._then = then

    def end(self) -> None:
        """Tell it."""
        try:
            self._then(self.error)
        except Exception:
            log.exception("whoever submitted a job could not be told of it", job_id=self.job.id)
