"""A claimed job in a worker's memory: Dramatiq's message, the fence it holds, and how it is asked to stop."""

from __future__ import annotations

import json
import time
from functools import cached_property
from typing import Any

import psycopg2
from dramatiq.message import Message
from psycopg2 import errors as pg_errors

from jobsys import db, trail
from jobsys.errors import InvalidSubmission, JobStopped
from jobsys.interrupt import Interruptible
from jobsys.job_types import Job, JobType, encode

MOST_LINES = 10_000
ELSEWHERE = "complete_in needs a connection to the database, and the schema, where the jobs are"
FORGOTTEN = MemoryError("the attempt failed, and there was no memory left to keep how")
_VOLATILE = frozenset(("max_retries", "traceback", "requeue_timestamp", "args"))


class RunningJob:
    """One attempt at one job. `order` is the queue's: priority, then due time, then arrival.

    To middleware it is what Dramatiq's MessageProxy would be, and is none: what has `__getattr__` is slow at every attribute (the
    interpreter can't specialize these, see PEP 659)."""

    # What most attempts never change stands here: it is made some ten thousand times a second.
    readable = True
    failed = False
    dead = False
    stopped: str | None = None
    retry_delay: float | None = None
    result = "null"
    outcome: str | None = None
    settled = False
    deadline: float | None = None
    stop_asked_at: float | None = None
    began_at: float | None = None
    ended_at = 0.0
    trace: Any = None
    """What of OpenTelemetry's belongs to the attempt, see tracing.py."""
    raised: BaseException | None = None
    """What the function raised, where it ran on the straight way (straight.py): Dramatiq's begins with it."""
    _exception: BaseException | None = None

    def __init__(self, row: tuple[Any, ...], *, worker: str, job_type: JobType | None, max_crashes: int) -> None:
        (
            self.message_id,
            self.actor_name,
            self.priority,
            self.payload,
            options,
            self.attempt,
            self.claim,
            self.max_attempts,
            run_at,
            age,
            crashes,
            self.queue_name,
            self.waited,
        ) = row
        # As if it had been sent at that moment of this machine's clock, which Dramatiq's AgeLimit compares it with.
        self.message_timestamp = int(time.time() * 1000) - age
        self.worker = worker
        self.suspect = crashes > 0 and crashes + 1 >= max_crashes
        self.claimed_at = time.monotonic()
        self.job_type = job_type
        self.carried: dict[str, Any] = {}
        """What goes from a request to its jobs, see trail.py. No options of Dramatiq's: they make no job less plain."""
        self.options: dict[str, Any] = {} if options == "{}" else self._read(options)
        self.options["max_retries"] = None if self.max_attempts is None else self.max_attempts - 1
        self.order: tuple[int, str, str] = (self.priority, run_at, self.message_id)
        """As the queue is ordered: run_at is PostgreSQL's text in UTC, which sorts as the times do."""
        self.followups: list[Any] = []
        self.job = LiveJob(self)
        self.attempt_call = Interruptible(JobStopped)

    def _read(self, options: str) -> dict[str, Any]:
        if (request_id := trail.only_id(options)) is not None:
            self.carried["request_id"] = request_id
            return {}
        try:
            read: dict[str, Any] = json.loads(options)
        except (ValueError, RecursionError):
            self.readable = False
            return {}
        # Another broker's way of delaying: what was claimed is due, and Dramatiq would put it aside again.
        read.pop("eta", None)
        # Classes, which JSON can't hold: Dramatiq would fail where it asks for them, and lose the thread.
        read.pop("throws", None)
        self.carried = trail.taken_from(read)
        return read

    @property
    def plain(self) -> bool:
        """Whether this is an attempt at a job type without options of Dramatiq's."""
        return self.job_type is not None and len(self.options) == 1 and self.readable  # max_retries

    @property
    def args(self) -> tuple[Any, ...]:
        """What the actor is called with. The actor of a job type gets this object, and validates the payload itself."""
        return (self,) if self.job_type is not None else tuple(self.options.get("args", ()))

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments the actor is called with."""
        return {} if self.job_type is not None else json.loads(self.payload)

    @cached_property
    def _message(self) -> Message[Any]:
        """The Dramatiq message, for whoever wants it whole (callbacks, pipelines, middleware of the user's)."""
        return Message(
            queue_name=self.queue_name,
            actor_name=self.actor_name,
            args=tuple(self.options.get("args", ())),
            kwargs=json.loads(self.payload),
            options=self.options,
            message_id=self.message_id,
            message_timestamp=self.message_timestamp,
        )

    def asdict(self) -> dict[str, Any]:
        """See Message, also of those below."""
        return self._message.asdict()

    def encode(self) -> bytes:
        return self._message.encode()

    def copy(self, **attributes: Any) -> Message[Any]:
        return self._message.copy(**attributes)

    def get_result(self, **how: Any) -> Any:
        return self._message.get_result(**how)

    def __or__(self, other: Any) -> Any:
        return self._message | other

    def fail(self) -> None:
        """Mark the attempt as one that failed for good."""
        self.failed = True

    def stuff_exception(self, exception: BaseException) -> None:
        """Note what the attempt raised."""
        self._exception = exception

    def clear_exception(self) -> None:
        """Forget the exception, and the frames it holds."""
        self.__dict__.pop("_exception", None)
        self.__dict__.pop("raised", None)

    def __repr__(self) -> str:
        return f"<RunningJob {self}>"

    def __str__(self) -> str:
        return f"{self.actor_name} {self.message_id} (attempt {self.attempt})"

    def lasting_options(self) -> dict[str, Any]:
        """The options that belong in the row: what Dramatiq derives again at each attempt stays out."""
        kept = {name: value for name, value in self.options.items() if name not in _VOLATILE}
        if "args" in self.options:
            kept["args"] = self.options["args"]
        return kept | self.carried

    def stop(self, reason: str) -> None:
        """Ask the job to stop: `job.stopping` is true from here on, and `job.checkpoint()` raises. The first reason stays."""
        if self.job.stop_reason is None or self.job.stop_reason == "shutdown":
            self.job.stop_reason = reason
            self.stop_asked_at = time.monotonic()


class LiveJob(Job):
    """The `job` a function gets in a worker: what it says is kept for the job's record until the next report."""

    fraction: float | None = None
    stop_reason: str | None = None
    must_end = False
    latest: dict[str, Any] | None = None
    """Progress that is not yet in the record."""
    completing = False
    """Whether the job has completed in a transaction of its own, should that have committed."""
    _followed = False
    _logged = 0

    def __init__(self, running: RunningJob) -> None:
        self.id = running.message_id
        self.type = running.actor_name
        self.attempt = running.attempt
        self.request_id = running.carried.get("request_id")
        self._claim = running.claim
        if len(running.options) > 1:
            self._followed = not running.options.keys().isdisjoint(("pipe_target", "on_success", "on_failure"))
        self.unreported: list[tuple[float, str, str]] = []

    def log(self, line: str) -> None:
        """Add a line to the job's timeline."""
        self._logged += 1
        if self._logged < MOST_LINES:
            self.unreported.append((time.monotonic(), "log", str(line)))
        elif self._logged == MOST_LINES:
            self.unreported.append((time.monotonic(), "log", f"no more than {MOST_LINES:,} lines of an attempt are kept"))

    def progress(self, fraction: float, message: str = "") -> None:
        """Say how far the job is: `fraction` from 0 to 1, and a few words. Raises ValueError outside that range."""
        super().progress(fraction, message)
        self.latest = {"fraction": float(fraction), "message": str(message)}

    def complete_in(self, connection: Any, result: Any = None) -> None:
        """See Job."""
        if self._followed:
            raise ValueError("a job with a pipeline or callbacks can't complete in a transaction of its own: nothing would follow")
        try:
            stored = None if result is None else encode(result)
        except InvalidSubmission as error:
            raise TypeError(f"the result {error}") from None
        with connection.cursor(cursor_factory=psycopg2.extensions.cursor) as cursor:
            _check_transaction(cursor)
            try:
                if not _finish(cursor, id=[self.id], claim=[self._claim], result=[stored]):
                    cursor.execute(db.STATEMENTS["completed"], {"id": self.id, "claim": self._claim})
                    raise _why_not(cursor.fetchone())
            except pg_errors.UndefinedFunction:
                raise ValueError(ELSEWHERE) from None
        self.completing = True

    def checkpoint(self) -> None:
        """Raise JobStopped when the job has to stop. A shutdown lets it go on until its grace is used up."""
        if self.stop_reason is not None and (self.stop_reason != "shutdown" or self.must_end):
            raise JobStopped(self.stop_reason)


def _check_transaction(cursor: Any) -> None:
    try:
        cursor.execute("savepoint jobsys; release savepoint jobsys; show transaction_isolation")  # there are no savepoints outside
    except pg_errors.NoActiveSqlTransaction:
        raise ValueError("complete_in needs a connection inside a transaction: without one nothing would commit together") from None
    level = cursor.fetchone()[0]
    if level != "read committed":
        raise ValueError(f"complete_in needs a transaction of isolation level read committed, not {level}: the job's row changes meanwhile")


def _finish(cursor: Any, **parameters: Any) -> bool:
    """Whether the job was finished. The row may be in use for a moment, by a report of its progress or an operator."""
    deadline = time.monotonic() + 10
    while True:
        cursor.execute("savepoint jobsys")
        try:
            cursor.execute(db.STATEMENTS["finish"], parameters)
            return cursor.fetchone() is not None
        except pg_errors.LockNotAvailable:
            if time.monotonic() > deadline:
                raise
            cursor.execute("rollback to savepoint jobsys")


def _why_not(row: tuple[bool] | None) -> BaseException:
    if row is None:
        return ValueError(ELSEWHERE)
    return ValueError("complete_in was called before in this transaction") if row[0] else JobStopped("lost")
