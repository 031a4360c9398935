"""Makes statements of a real process fail on purpose, and lets the tests look into a worker's memory. Workers and web servers load this
module through JOB_MODULES; with FAULTS=<file> in its environment a process does what that file says.

The file holds `[number, statement, when, kind, times]`: *before*, PostgreSQL never executes the statement; *after*, its transaction is
committed and the answer lost. `listen` and `commit` are statements, too. The errors are those that PostgreSQL or psycopg2 raises itself,
on a socket that was really cut, on a connection that was really closed. Each failure is a line in `<file>.struck`.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dramatiq
import psycopg2
from example_types import Ledger, note
from psycopg2 import extensions

from jobsys import GiveUp, Job, JobSystem, Payload, chores, db, job, worker
from jobsys.errors import DatabaseUnavailable, InvalidSubmission

RAISED = {"data": ("data_exception", "unique_violation"), "timeout": ("query_canceled", "lock_not_available")}


class Faults:
    """What the file says, and how often that is still to happen."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._number = 0
        self._left = 0

    def strike(self, name: str, *moments: str) -> tuple[str, str, int] | None:
        """(when, kind, number of the strike) when this statement is to fail now."""
        try:
            number, statement, when, kind, times = json.loads(self._file.read_text())
        except FileNotFoundError:
            return None
        if statement != name or when not in moments:
            return None
        with self._lock:
            if number != self._number:
                self._number, self._left = number, times
            if not self._left:
                return None
            self._left -= 1
            with Path(f"{self._file}.struck").open("a") as struck:
                struck.write(f"{number} {name} {when} {kind}\n")
            return when, kind, self._number + self._left


class Connection(extensions.connection):
    """A connection whose statements fail."""

    lost: tuple[str, int] | None = None
    """The answer to the transaction at hand will be lost."""

    def fail(self, kind: str, number: int) -> None:
        """Raise what this kind of failure raises."""
        if kind == "pool":
            raise DatabaseUnavailable("no database connection came free")
        if kind == "operational":
            with socket.socket(fileno=os.dup(self.fileno())) as cut:
                cut.shutdown(socket.SHUT_RDWR)
        if kind == "interface":
            self.close()
        with extensions.connection.cursor(self, cursor_factory=extensions.cursor) as cursor:
            cursor.execute(f"do $$ begin raise {RAISED[kind][number % 2]}; end $$" if kind in RAISED else "select")

    def __exit__(self, type: Any, *error: Any) -> None:
        lost, self.lost = self.lost, None
        # (What a web server measured is reported at any time, and not what is meant.)
        if type is None and threading.current_thread().name != "jobsys recorder":
            strike = FAULTS.strike("commit", "before", "after")
            if strike and strike[0] == "before":
                try:
                    self.fail(*strike[1:])
                except BaseException as failure:
                    if not self.closed:
                        super().__exit__(failure.__class__, failure, failure.__traceback__)
                    raise
            lost = strike[1:] if strike else lost
        super().__exit__(type, *error)
        if type is None and lost:
            self.fail(*lost)


class Cursor(extensions.cursor):
    """A cursor whose statements fail."""

    def execute(self, query: Any, vars: Any = None) -> None:
        self._run(query, super().execute, query, vars)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        self._run(sql, super().copy_expert, sql, file, size)

    def _run(self, text: str, run: Any, *arguments: Any) -> None:
        connection: Any = self.connection
        strike = FAULTS.strike(_name(text), "before", "after")
        if strike and strike[0] == "before":
            connection.fail(*strike[1:])
        run(*arguments)
        if strike and connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE:
            connection.fail(*strike[1:])
        elif strike:
            connection.lost = strike[1:]


def _name(text: str) -> str:
    return NAMES.get(text) or next((name for known, name in NAMES.items() if text.startswith(known.partition("{")[0])), text.split()[0])


def _hurry() -> None:
    """Have each rare chore done soon, and a process that was ended replaced at once."""
    original = chores.Chores.__init__

    def hurried(self: Any, presence: Any) -> None:
        original(self, presence)
        self._chores = [chore._replace(every=min(chore.every, 0.2)) for chore in self._chores]
        self._due = [time.monotonic()] * len(self._chores)

    chores.Chores.__init__ = hurried  # type: ignore[method-assign]
    db.STATEMENTS["unheld"] = db.STATEMENTS["unheld"].replace("'10 seconds'", "'3 seconds'")
    worker.HEALTHY_AFTER = 0.0


if "FAULTS" in os.environ:
    FAULTS = Faults(Path(os.environ["FAULTS"]))
    _hurry()
    NAMES = {text: name for name, text in db.STATEMENTS.items()}
    psycopg2.connect = functools.partial(psycopg2.connect, connection_factory=Connection, cursor_factory=Cursor)


class Script(Ledger):
    """What a job does besides writing into the ledger."""

    failures: int = 0
    child: str = ""
    alone: bool = False


@job("SCRIPT", time_limit="60s", max_retries=3, priority="low")
def script(payload: Script, job: Job) -> str:
    """Say something, submit a job twice under one key, and fail the first times; for good when it is to run alone and nobody was told."""
    note(payload, job, "start")
    if payload.alone and not _announced(job.id):
        raise GiveUp("nobody was told that this job runs alone")
    job.log("a line")
    job.progress(0.5, "half way")
    for _ in range(2 if payload.child else 0):
        _submit(payload.ledger, payload.child)
    if job.attempt <= payload.failures:
        raise RuntimeError("not yet")
    note(payload, job, "end")
    return payload.label


@job("PACED", queue="paced", time_limit="60s")
def paced(payload: Ledger, job: Job) -> str:
    """A job of a queue with limits."""
    note(payload, job, "start")
    note(payload, job, "end")
    return payload.label


@job("INSPECT", priority="high")
def inspect(payload: Payload, job: Job) -> dict[str, Any]:
    """What this process has in memory besides this job, and which of its threads live."""
    presence: Any = dramatiq.get_broker().presence  # type: ignore[attr-defined]
    return {
        "held": sorted(set(presence.held) - {job.id}),
        "running": sorted({each.message_id for each in presence.running} - {job.id}),
        "expected": len(presence.work.expected),
        "unwritten": len(presence.settlements),
        "connections": presence._database.size - presence._database._turns.qsize(),
        "suspect": presence.suspect,
        "threads": Counter(name for thread in threading.enumerate() if (name := type(thread).__name__) not in ("Thread", "_MainThread")),
    }


@dramatiq.actor(queue_name="plain", max_retries=3)
def note_down(*before: str, ledger: str, label: str) -> str:
    """A plain actor, for pipelines."""
    _note_both(ledger, label)
    return label


@dramatiq.actor(queue_name="plain", max_retries=3)
def note_success(message: dict[str, Any], result: str) -> None:
    """A callback."""
    _note_both(message["kwargs"]["ledger"], f"after {result}")


def _note_both(ledger: str, label: str) -> None:
    with Path(ledger).open("a") as file:
        file.write(f"start {label} 0 {os.getpid()} {time.time():.6f}\nend {label} 0 {os.getpid()} {time.time():.6f}\n")


@functools.cache
def _client() -> JobSystem:
    return JobSystem()


def _announced(job_id: str) -> bool:
    with _client().database.connection() as connection, connection.cursor() as cursor:
        cursor.execute("select from workers where suspect = %s", (job_id,))
        return cursor.rowcount == 1


def _submit(ledger: str, label: str) -> None:
    """As a client does that has a key: again until it is told that the job is in."""
    while True:
        try:
            _client().submit("LEDGER", {"ledger": ledger, "label": label}, idempotency_key=f"{ledger} {label}")
            return
        except (DatabaseUnavailable, InvalidSubmission, psycopg2.Error):
            time.sleep(0.05)
