"""The schema's versions: `sql/schema.sql` is the first, `sql/migrations/NNNN_name.sql` follow. How to write one: sql/migrations/README.md.

Each is applied in one transaction with the row that records it, which holds an advisory lock: who is killed leaves nothing, several at
once take turns, and no session keeps any state (a transaction pooler may stand in between). What must not run in a transaction runs on
a connection beside that one, which has no snapshot meanwhile: `concurrently` waits for everybody's.

Who waits for a table's lock stops everybody who comes later. So a migration waits briefly, lets the others through, and tries again.
"""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import psycopg2
from psycopg2 import errors as pg_errors

from jobsys.db import SQL, Database, nested, translated
from jobsys.errors import DatabaseUnavailable, JobsysError

LOCK_TIMEOUT = 2.0
"""Seconds that a statement of a migration waits for a lock, and so the longest that it makes others wait. (Autovacuum gives way after
PostgreSQL's deadlock_timeout, 1 s.)"""
PATIENCE = 60.0
"""Seconds after which a migration that others' transactions hold up is given up."""
OUTSIDE = "-- outside a transaction"
"""The first line of a migration whose one statement must not run in a transaction."""

_NAME = "jobsys migrate"
_CREATED_INDEX = re.compile(r"\bcreate\s+(?:unique\s+)?index\s+concurrently\s+(?:if\s+not\s+exists\s+)?([\w.\"]+)\s+on\b", re.IGNORECASE)
_HOLDER = """
    select holder.pid, coalesce(nullif(holder.application_name, ''), holder.backend_type), holder.state,
        extract(epoch from clock_timestamp() - holder.xact_start)::integer, holder.query
    from pg_stat_activity as waiting
    cross join unnest(pg_blocking_pids(waiting.pid)) as blocking(pid)
    join pg_stat_activity as holder on holder.pid = blocking.pid
    where waiting.application_name = %s and waiting.datname = current_database()
    order by holder.xact_start
    limit 1
"""


class MigrationFailed(JobsysError):
    """The schema can't be brought up to date; the text says what is in the way, and what to do."""


@dataclass(frozen=True)
class Migration:
    """One file."""

    version: int
    name: str
    text: str

    @property
    def sha256(self) -> str:
        """What tells whether it has been changed since."""
        return sha256(self.text.encode()).hexdigest()

    @property
    def outside(self) -> bool:
        """Whether it must not run in a transaction."""
        return self.text.split("\n")[0].strip() == OUTSIDE


@dataclass(frozen=True)
class Plan:
    """How a database and the files differ: what it lacks, in order, or what it has beyond them, by name. One of them is empty."""

    pending: list[Migration]
    unknown: list[str]


def plan(url: str) -> Plan:
    """What `migrate` would do. Raises MigrationFailed when the database was made from other files than these."""
    with translated(), closing(Database(url, name=_NAME).connect()) as connection, connection.cursor() as cursor:
        return _plan(cursor)


def migrate(url: str, *, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Bring the schema up to date, while everything runs; the names of what was applied. Nothing is done to a newer schema.

    Safe to run many times, at once, and to be killed. `say` hears why it takes long. Raises MigrationFailed; what was applied stays.
    """
    database = Database(url, name=_NAME)
    applied: list[str] = []
    told = False
    with translated(), closing(database.connect()) as connection, connection.cursor() as cursor:
        while _plan(cursor).pending:
            # This transaction idles during pauses, and while something runs beside it, which a snapshot of it would hold up.
            cursor.execute("begin isolation level read committed")
            cursor.execute("set local idle_in_transaction_session_timeout = 0")
            cursor.execute("set local client_connection_check_interval = '1s'")  # a program that is killed ends its statement, too
            cursor.execute("select set_config('lock_timeout', %s, true)", [f"{LOCK_TIMEOUT * 1000:.0f}"])
            cursor.execute("select pg_try_advisory_xact_lock(hashtext(%s))", [_NAME])
            mine = cursor.fetchone()[0]
            if mine and (pending := _plan(cursor).pending):
                migration = pending[0]
                _apply(database, connection, migration, say)
                record = "insert into schema_versions (version, name, sha256) values (%s, %s, %s)"
                cursor.execute(record, [migration.version, migration.name, migration.sha256])
                applied.append(migration.name)
            cursor.execute("commit")
            if not mine:
                # Not in the lock's own queue: `create index concurrently` would wait for who waits there.
                if not told:
                    say("another `jobsys migrate` is at work on this database; waiting for it")
                    told = True
                time.sleep(random.uniform(0.1, 0.3))
    return applied


def known() -> list[Migration]:
    """Every version of the schema there is, in order. Raises MigrationFailed when two have one number."""
    files = [(1, SQL / "schema.sql"), *((int(file.name.split("_")[0]), file) for file in sorted((SQL / "migrations").glob("[0-9]*_*.sql")))]
    found = [Migration(version, file.stem, file.read_text(encoding="utf-8")) for version, file in files]
    for one, other in itertools.pairwise(found):
        if one.version >= other.version:
            raise MigrationFailed(f"{other.name} can't come after {one.name}: each migration has a number of its own, from 0002 on")
    return found


def _plan(cursor: Any) -> Plan:
    cursor.execute("select attname from pg_attribute where attrelid = to_regclass('schema_versions') and attnum > 0")
    columns = {name for (name,) in cursor.fetchall()}
    recorded: dict[int, tuple[str, str]] = {}
    if columns:
        cursor.execute(f"select version, name, {'sha256' if 'sha256' in columns else 'null'} from schema_versions order by version")
        recorded = {version: (name, digest) for version, name, digest in cursor.fetchall()}
    files = {migration.version: migration for migration in known()}
    for version, (name, digest) in recorded.items():
        if version in files and files[version].sha256 != digest:
            _refuse(name, files[version])
    pending = [migration for version, migration in files.items() if version not in recorded]
    unknown = [name for version, (name, _) in recorded.items() if version not in files]
    if pending and unknown:
        lacking = ", ".join(migration.name for migration in pending)
        raise MigrationFailed(
            f"the database has {', '.join(unknown)}, which this jobsys doesn't know, and lacks {lacking}: use a newer jobsys"
        )
    return Plan(pending, unknown)


def _refuse(name: str, migration: Migration) -> None:
    if migration.version == 1:
        raise MigrationFailed(
            "this database was made from another schema.sql, of before the first release, from which no migration leads to this one: "
            "go back to the jobsys that made it, or start with an empty database (for `bin/dev`: another DATA_DIR)"
        )
    raise MigrationFailed(
        f"{migration.name}.sql has changed since it was applied to this database (as {name}): put the file back as it was, "
        "and make the change a migration of its own"
    )


def _apply(database: Database, connection: Any, migration: Migration, say: Callable[[str], None]) -> None:
    with _Watch(database, migration, say) as watch:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if migration.outside:
                    _apply_outside(database, migration, watch)
                else:
                    with nested(connection), connection.cursor() as cursor:
                        cursor.execute(migration.text)
                return
            except (pg_errors.LockNotAvailable, pg_errors.DeadlockDetected) as error:
                if time.monotonic() > deadline:
                    raise MigrationFailed(watch.verdict()) from error
            except psycopg2.Error as error:
                complaint = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise MigrationFailed(watch.verdict() if watch.gave_up else f"{migration.name} failed: {complaint}") from error
            time.sleep(LOCK_TIMEOUT * random.uniform(1, 3))  # most of the time belongs to the others


def _apply_outside(database: Database, migration: Migration, watch: _Watch) -> None:
    """Also after an earlier try, which may have built the index without recording it, or left it unfinished."""
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        watch.patient = connection
        if index := _CREATED_INDEX.search(migration.text):
            cursor.execute("select indexrelid::regclass, indisvalid from pg_index where indexrelid = to_regclass(%s)", [index[1]])
            for name, valid in cursor.fetchall():
                if valid:
                    return
                cursor.execute(f"drop index concurrently if exists {name}")
        cursor.execute(migration.text)


class _Watch(threading.Thread):
    """Tells, while a migration waits for a lock, who has it. What waits outside a transaction is in nobody's way: it has no lock timeout,
    but is cancelled when one session has held it up for PATIENCE seconds."""

    def __init__(self, database: Database, migration: Migration, say: Callable[[str], None]) -> None:
        super().__init__(name="jobsys migration watch", daemon=True)
        self.patient: Any = None
        """The connection that waits without a timeout."""
        self.gave_up = False
        self._database = database
        self._migration = migration
        self._say = say
        self._holder: tuple[Any, ...] | None = None
        self._over = threading.Event()

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        if not self._over.wait(0.2):
            # What can't be told, because the database is away, is not worth an error of its own.
            with suppress(DatabaseUnavailable), translated():
                self._look()

    def _look(self) -> None:
        since = time.monotonic()
        with closing(self._database.connect()) as connection, connection.cursor() as cursor:
            while not self._over.wait(0.1):
                cursor.execute(_HOLDER, [_NAME])
                found = cursor.fetchone()
                if found is None:
                    since = time.monotonic()
                    continue
                if self._holder is None or found[0] != self._holder[0]:
                    since = time.monotonic()
                    self._say(f"{self._migration.name} waits for {_described(*found)}")
                self._holder = found
                if self.patient is not None and time.monotonic() > since + PATIENCE:
                    self.gave_up = True
                    self.patient.cancel()
                    return

    def verdict(self) -> str:
        """Why the migration was given up, and what to do."""
        who, end = "others' transactions (see pg_stat_activity)", "wait until they have ended"
        if self._holder is not None:
            who, end = _described(*self._holder), f"wait until that has ended, or end it (select pg_terminate_backend({self._holder[0]}))"
        left = "an index it left unfinished is replaced then" if self._migration.outside else "nothing of it was kept"
        return f"{self._migration.name} was held up for {PATIENCE:g} s by {who}: {end}, and run `jobsys migrate` again; {left}"


def _described(pid: int, name: str, state: str | None, seconds: int | None, query: str | None) -> str:
    what = " ".join((query or "").split())
    return f"session {pid} ({name}, {state or 'state unknown'}, in its transaction for {seconds or 0} s, {what[:100]})"
