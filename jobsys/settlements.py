"""Writing how attempts ended: in groups, fenced, and never lost while the process lives.

The thread that ends a job hands the outcome over and takes the next job; a thread of its own writes. An outcome that is alone is written at
once; whatever ends while a write is on its way goes into the next one, so that a crowd shares commits. While more jobs wait in memory, the
outcomes gather for longer, unless other jobs wait for one of them.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import psycopg2

from jobsys import db, logs
from jobsys.errors import DatabaseUnavailable, LockTimeout
from jobsys.outcomes import Outcome, unstorable
from jobsys.submissions import insert
from jobsys.work_queue import WorkQueue

LARGEST_GROUP = 500
GATHER = 0.004
"""Seconds from one write to the next, at least: who comes a moment after another shares a commit with whoever else does."""
BUSY_GATHER = 0.02
"""The same while jobs wait in memory that need no outcome to start. A write of a few costs about as much CPU as one of some dozens; but
what is not written when the process is killed will run once more…"""
WORK_AT_STAKE = 0.1
"""…of which there is less when few jobs may run at once. Then it is longer: until they have done so many seconds of work, all together…"""
FULL_GROUP = 100
"""…and so many outcomes are worth a write."""
RETRY = 1.0
UNSTORABLE = (psycopg2.DataError, psycopg2.IntegrityError, *db.NEVER_WORTH_REPEATING, ValueError, TypeError)
"""What says that one outcome is at fault, and not the database."""
log = logs.get(__name__)


class Settlements:
    """The outcomes of one process on their way into the database."""

    def __init__(
        self,
        database: db.Database,
        *,
        written: Callable[[list[Outcome]], None],
        lost: Callable[[list[Outcome]], None],
        wrote: Callable[[], None] = lambda: None,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.some = threading.Event()
        """Set when an outcome waits to be written."""
        self.enough = threading.Event()
        """Set when it is worth writing again soon, and not only when the longest time of gathering is over."""
        self._database = database
        self._written = written
        self._lost = lost
        self._wrote = wrote
        self._took = took
        """Told how long each write took."""
        self._waiting: deque[Outcome] = deque()
        self._locked: list[Outcome] = []
        """Outcomes of jobs that somebody has locked, and when to try them again."""
        self._try_locked_at = 0.0
        self._lock = threading.Lock()
        self._in_flight = 0

    def __len__(self) -> int:
        """How many outcomes are not written yet."""
        with self._lock:
            return len(self._waiting) + len(self._locked) + self._in_flight

    @property
    def pause(self) -> float:
        """Seconds until it is worth looking again, should nobody wake the writer: who sets an event where the stack ends may fail to."""
        with self._lock:
            return max(0.0, self._try_locked_at - time.monotonic()) if self._locked else RETRY

    def add(self, outcome: Outcome, *, soon: bool = True) -> None:
        """Take an outcome over, to be written `soon` or together with those to come. An outcome for a job that has one is ignored."""
        with self._lock:
            if outcome.job.outcome is not None:
                return
            outcome.job.outcome = outcome.statement
            self._waiting.append(outcome)
        if not self.some.is_set():
            self.some.set()
        if (soon or len(self._waiting) >= FULL_GROUP) and not self.enough.is_set():
            self.enough.set()

    def follow_claim(self) -> None:
        """A claim has just run: a group of about a hundred costs PostgreSQL a quarter less CPU now than when others had the processors'
        caches since (measured: 1.15 ms and not 1.5 for 90 jobs)."""
        if len(self._waiting) >= FULL_GROUP // 2:
            self.enough.set()

    def write(self) -> None:
        """Write whatever waits by now, unless another thread is at it: what comes meanwhile is for the next `write`, so that a trickle
        shares commits. Raises DatabaseUnavailable when the database is away; what is not written is kept, and the next `write` tries again
        on a fresh connection."""
        left = len(self._waiting)
        while True:
            with self._lock:
                if self._in_flight:
                    return
                group = [self._waiting.popleft() for _ in range(min(left, len(self._waiting), LARGEST_GROUP))]
                left -= len(group)
                if not group and time.monotonic() >= self._try_locked_at:
                    group, self._locked = self._locked[:LARGEST_GROUP], self._locked[LARGEST_GROUP:]
                if not group:
                    return
                self._in_flight = len(group)
            began = time.monotonic()
            try:
                self._write_group(group)
                self._took(time.monotonic() - began)
            except Exception as error:
                # Whatever it was: what is not written stays, and is tried again.
                with self._lock:
                    unwritten = (outcome for outcome in reversed(group) if not outcome.job.settled and outcome not in self._locked)
                    self._waiting.extendleft(unwritten)
                if isinstance(error, DatabaseUnavailable):
                    raise
                log.exception("outcomes could not be written; they are tried again", outcomes=len(self._waiting))
                raise DatabaseUnavailable(str(error)) from error
            finally:
                self._in_flight = 0
                self._wrote()

    def write_all(self, patience: float) -> None:
        """Write all there is, and wait up to `patience` seconds for jobs that somebody has locked, and for another thread that is writing.
        Raises DatabaseUnavailable."""
        deadline = time.monotonic() + patience
        self.write()
        while len(self) and time.monotonic() < deadline:
            time.sleep(0.05)
            self._try_locked_at = 0.0
            self.write()

    def _write_group(self, group: list[Outcome]) -> None:
        group = [outcome for outcome in group if not outcome.job.settled]
        try:
            self._write_together(group)
        except UNSTORABLE as error:
            self._write_each(group, error)
        except LockTimeout:
            self._write_what_is_free(group)

    def _write_each(self, group: list[Outcome], error: Exception) -> None:
        """One of them can't be stored. The others can."""
        if len(group) == 1:
            self._write_as_failure(group[0], error)
        else:
            for outcome in group:
                self._write_group([outcome])

    def _write_what_is_free(self, group: list[Outcome]) -> None:
        """Somebody's transaction has some of the jobs (perhaps the job's own, see complete_in): no other waits for these."""
        ids = [outcome.job.message_id for outcome in group]
        if len(set(ids)) < len(ids):
            for outcome in group:
                self._write_group([outcome])
            return
        try:
            with self._database.transaction(lock_timeout="100ms") as connection:
                taken = {id for id, free in db.run(connection, "free", id=ids) if not free}
                free = [outcome for outcome in group if outcome.job.message_id not in taken]
                written = self._write_on(connection, free)
        except UNSTORABLE as error:
            self._write_each(group, error)
            return
        self._note_written(free, written)
        self._locked += [outcome for outcome in group if outcome.job.message_id in taken]
        self._try_locked_at = time.monotonic() + RETRY

    def _write_together(self, group: list[Outcome]) -> None:
        if len({outcome.job.message_id for outcome in group}) < len(group):
            # Two attempts at one job, one of them lost: which one was written must be known.
            for outcome in group:
                self._write_together([outcome])
            return
        only_finished = all(outcome.statement == "finish" and not outcome.job.followups for outcome in group)
        # `finish` bounds its wait for locks itself.
        with self._database.connection() if only_finished else self._database.transaction(lock_timeout="100ms") as connection:
            written = self._write_on(connection, group)
        self._note_written(group, written)

    def _write_on(self, connection: Any, group: list[Outcome]) -> set[str]:
        """Write some outcomes, and what follows from them; the ids of the jobs whose were written."""
        by_statement: defaultdict[str, list[Outcome]] = defaultdict(list)
        for outcome in group:
            by_statement[outcome.statement].append(outcome)
        written = {
            row[0] for statement in sorted(by_statement) for row in db.run(connection, statement, **_columns(by_statement[statement]))
        }
        followups = [job for outcome in group if outcome.job.message_id in written for job in outcome.job.followups]
        if followups:
            insert(connection, followups)
        return written

    def _note_written(self, group: list[Outcome], written: set[str]) -> None:
        for outcome in group:
            outcome.job.settled = True
        if lost := [outcome for outcome in group if outcome.job.message_id not in written]:
            self._lost(lost)
            group = [outcome for outcome in group if outcome.job.message_id in written]
        self._written(group)

    def _write_as_failure(self, outcome: Outcome, error: Exception) -> None:
        """The outcome itself can't be stored (a result jsonb refuses, a value out of range): that is the failure to keep."""
        log.error("outcome can't be stored", job_id=outcome.job.message_id, error=str(error))
        followups, outcome.job.followups = outcome.job.followups, []
        try:
            self._write_together([unstorable(outcome.job, error)])
        except UNSTORABLE:
            log.exception("neither the outcome nor its failure can be stored", job_id=outcome.job.message_id)
            outcome.job.settled = True
            self._lost([outcome])
        except BaseException:
            outcome.job.followups = followups  # the outcome will be tried again, and may be storable then
            raise


class Writer(threading.Thread):
    """Writes outcomes as they come, until it is stopped."""

    def __init__(self, settlements: Settlements, work: WorkQueue) -> None:
        super().__init__(name="jobsys writer", daemon=True)
        self._settlements = settlements
        self._work = work
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            self._settlements.some.wait(self._settlements.pause)
            self._settlements.some.clear()
            self._settlements.enough.clear()
            began = time.monotonic()
            try:
                self._settlements.write()
            except DatabaseUnavailable as error:
                log.warning("outcomes wait for the database", outcomes=len(self._settlements), error=str(error))
                self._stopped.wait(RETRY)
                self._settlements.some.set()
            self._stopped.wait(max(0.0, began + GATHER - time.monotonic()))
            self._settlements.enough.wait(max(0.0, began + self._gather - time.monotonic()))

    @property
    def _gather(self) -> float:
        return max(BUSY_GATHER, WORK_AT_STAKE / self._work.at_once)

    def stop(self) -> None:
        """Begin no further write, and wait for the one at hand."""
        self._stopped.set()
        self._settlements.some.set()
        self._settlements.enough.set()
        if self.is_alive():
            self.join(5)


def _columns(outcomes: list[Outcome]) -> dict[str, Any]:
    outcomes = sorted(outcomes, key=lambda outcome: outcome.job.message_id)
    # As one text each: psycopg2 would quote every element by itself.
    ids, claims = (o.job.message_id for o in outcomes), (str(o.job.claim) for o in outcomes)
    columns: dict[str, Any] = {"id": f"{{{','.join(ids)}}}", "claim": f"{{{','.join(claims)}}}"}
    for name in outcomes[0].parameters:
        columns[name] = [outcome.parameters[name] for outcome in outcomes]
    return columns
