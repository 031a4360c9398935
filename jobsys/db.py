"""PostgreSQL: a pool that waits instead of raising, and named statements from `sql/*.sql`.

Connections are in autocommit, so that one statement is one round trip; `transaction()` groups several. Nothing here keeps state
in a session, so a transaction pooler may stand in between. Whatever means "the server is away" leaves as DatabaseUnavailable.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

import psycopg2
from psycopg2 import errors as pg_errors
from psycopg2 import extensions, extras

from jobsys.errors import DatabaseUnavailable, LockTimeout, NotMigrated, SettingsError
from jobsys.interrupt import undisturbed
from jobsys.secrecy import mask
from jobsys.settings import Settings

Row = tuple[Any, ...]

SQL = next(place for place in (Path(__file__).parent / "sql", Path(__file__).parent.parent / "sql") if place.is_dir())
"""Where the SQL is: inside the package once installed, beside it in a checkout."""

LONGEST_TRANSACTION = 60.0
"""Seconds after which a transaction of several statements is cut, where connections are watched at all."""
LONGEST_IDLE = 10.0
"""Seconds that a transaction may wait for its next statement before PostgreSQL ends the session: a process that is stuck, or stopped, in
the middle of one must not keep its locks."""
UNREADABLE = "invalid dsn: DATABASE_URL is not an address such as postgresql://user:password@host:5432/name"
NEVER_WORTH_REPEATING = (pg_errors.StatementTooComplex, pg_errors.ProgramLimitExceeded)


def load_statements(*files: str) -> dict[str, str]:
    """The statements of `sql/<file>`, by the name in the `-- name: …` line that opens each."""
    statements: dict[str, str] = {}
    for file in files:
        name = None
        for line in (SQL / file).read_text(encoding="utf-8").splitlines():
            if match := re.fullmatch(r"-- name: (\w+)", line):
                name = match[1]
                if name in statements:
                    raise ValueError(f"two statements are named {name}")
                statements[name] = ""
            elif name is not None and not line.lstrip().startswith("--"):
                statements[name] += line + "\n"
    return {name: text.strip().rstrip(";") for name, text in statements.items()}


STATEMENTS = load_statements("queue.sql", "jobs.sql", "doctor.sql")


class Database:
    """A bounded pool of connections to one PostgreSQL. Opens none before the first use; safe for threads.

    `wait` bounds, in seconds, the wait for a free connection and for a new one to open; `patience` the time a connection may be in use:
    one that is used longer is cut, because the server may never answer.
    """

    def __init__(self, url: str, *, size: int = 4, wait: float = 5.0, name: str = "jobsys", patience: float | None = None) -> None:
        self.url = url
        self.wait = wait
        self._patience = patience
        self.name = name
        self.size = size
        self.waits: deque[float] = deque(maxlen=10_000)
        """Seconds that threads waited for a free connection, where none was, since somebody last took them from here."""
        self._turns: SimpleQueue[None] = SimpleQueue()
        """One for each connection that may yet be in use."""
        for _ in range(size):
            self._turns.put(None)
        self._idle: list[Any] = []
        self._in_use: dict[Any, float] = {}
        self._watch: threading.Thread | None = None

    def connect(self) -> Any:
        """A fresh connection in autocommit, not part of the pool. Raises DatabaseUnavailable."""
        parameters: dict[str, Any] = {
            "application_name": self.name,
            "connect_timeout": max(2, int(self.wait)),
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        }
        with translated():
            try:
                connection = psycopg2.connect(self.url, **parameters)
            except psycopg2.ProgrammingError:  # whose text quotes the address, with the password in it
                raise DatabaseUnavailable(UNREADABLE) from None
            connection.autocommit = True
        extras.register_default_jsonb(connection, loads=_read_json)
        return connection

    def connection(self, *, patience: float | None = None) -> InUse:
        """A connection of the pool, for the time of a `with` block; waits for one up to `wait` seconds. A broken one is closed, not
        returned. What psycopg2 raises in the block leaves it as `translated` says."""
        return InUse(self, patience)

    def run(self, name: str, /, **parameters: Any) -> list[Row]:
        """Run one named statement in a transaction of its own; the rows it returns."""
        with self.connection() as connection:
            return run(connection, name, **parameters)

    @contextmanager
    def transaction(self, *, lock_timeout: str | None = None, patience: float = LONGEST_TRANSACTION, durable: bool = True) -> Iterator[Any]:
        """A connection inside a transaction: committed when the block ends, rolled back when it raises. It waits for no lock longer than
        `lock_timeout`, and for the disk only when it must be `durable`: else a crash of PostgreSQL may undo it as a whole."""
        with self.connection(patience=patience) as connection, connection:
            with connection.cursor() as cursor:
                bounds = {
                    "idle_in_transaction_session_timeout": f"{LONGEST_IDLE:g}s",
                    "lock_timeout": lock_timeout,
                    "synchronous_commit": None if durable else "off",
                }
                cursor.execute("; ".join(f"set local {name} = '{value}'" for name, value in bounds.items() if value is not None))
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Any]:
        """A connection whose statements all see the same moment; they only read."""
        with self.transaction() as connection:
            with connection.cursor() as cursor:
                cursor.execute("set transaction isolation level repeatable read, read only")
            yield connection

    def close(self) -> None:
        """Close the idle connections. Those in use are closed by whoever holds them."""
        self._watch = None
        while self._idle:
            _close(self._idle.pop())

    @property
    def in_use(self) -> int:
        """How many connections are in use."""
        return len(self._in_use)

    @property
    def idle(self) -> int:
        """How many are open and wait for use."""
        return len(self._idle)

    def _wait_for_turn(self) -> None:
        try:
            self._turns.get_nowait()
            return
        except Empty:
            began = time.monotonic()
        try:
            self._turns.get(timeout=self.wait)
        except Empty:
            raise DatabaseUnavailable(f"no database connection came free within {self.wait:g} s") from None
        finally:
            self.waits.append(time.monotonic() - began)

    def _start_watch(self) -> None:
        if self._watch is None or not self._watch.is_alive():
            self._watch = threading.Thread(target=self._cut_the_unanswered, name="jobsys database watch", daemon=True)
            self._watch.start()

    def _cut_the_unanswered(self) -> None:
        """libpq waits for an answer without end; what ends the wait is the end of the socket."""
        while self._watch is threading.current_thread():
            time.sleep(0.25)
            now = time.monotonic()
            for connection, deadline in list(self._in_use.items()):
                if now > deadline and self._in_use.pop(connection, None) is not None:
                    with contextlib.suppress(OSError, psycopg2.Error), socket.socket(fileno=os.dup(connection.fileno())) as cut:
                        cut.shutdown(socket.SHUT_RDWR)

    def _take(self) -> Any:
        while self._idle:
            connection = self._idle.pop()
            if alive(connection):
                return connection
            _close(connection)
        return self.connect()


class InUse:
    """A pool's connection in a `with` block. A class, because every statement pays for it: as generators, one in another, it took more
    than twice as long."""

    _connection: Any = None
    _has_turn = False

    def __init__(self, database: Database, patience: float | None) -> None:
        self._database = database
        self._patience = None if database._patience is None else patience or database._patience

    def __enter__(self) -> Any:
        database = self._database
        # A job's function may use a pool, and be stopped meanwhile: not in here, where locks are held.
        self._undisturbed = undisturbed()
        self._undisturbed.__enter__()
        try:
            database._wait_for_turn()
            self._has_turn = True
            self._connection = connection = database._take()
            database._in_use[connection] = math.inf if self._patience is None else time.monotonic() + self._patience
            if self._patience is not None:
                database._start_watch()
        except BaseException:
            self._end()
            self._undisturbed.__exit__(*sys.exc_info())
            raise
        return connection

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None) -> None:
        try:
            self._end()
        finally:
            self._undisturbed.__exit__(kind, error, frames)
        if error is not None:
            _translate(error)

    def __del__(self) -> None:
        self._end()  # Ctrl-C may have come just before the block began, or while it ended

    def _end(self) -> None:
        """Give everything back; what was given back before is not given back again."""
        connection = self._connection
        if connection is not None:
            # (Where it is not in use any more it was cut, or an end was cut short.)
            if self._database._in_use.pop(connection, None) is not None and _usable(connection):
                self._database._idle.append(connection)
            else:
                _close(connection)
            self._connection = None
        if self._has_turn:
            self._has_turn = False
            self._database._turns.put(None)


def run(connection: Any, name: str, /, **parameters: Any) -> list[Row]:
    """Run one named statement on a connection, inside whatever transaction it has; the rows it returns."""
    with connection.cursor() as cursor:
        cursor.execute(STATEMENTS[name], parameters)
        return cursor.fetchall() if cursor.description else []


def array(values: Iterable[object]) -> str:
    """An array as PostgreSQL reads it from one string: that costs it less than an expression for each element, which a list becomes."""
    return "{" + ",".join('"' + str(value).replace("\\", r"\\").replace('"', r"\"") + '"' for value in values) + "}"


class Lent:
    """Somebody else's connection: rows are tuples to us, whatever its owner wants them to be."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def cursor(self) -> Any:
        """A cursor that returns tuples."""
        return self._connection.cursor(cursor_factory=extensions.cursor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@contextmanager
def nested(connection: Any) -> Iterator[None]:
    """A block on somebody else's connection, whose statements happen all or not at all: a transaction of their own in autocommit, else
    part of the one at hand, which stays usable when the block raises."""
    if connection.autocommit and connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE:
        try:
            connection.__enter__()
        except psycopg2.ProgrammingError:
            pass  # inside a `with connection` of the caller's, which has not said BEGIN yet
        else:
            try:
                yield
            except BaseException as error:
                connection.__exit__(type(error), error, error.__traceback__)
                raise
            connection.__exit__(None, None, None)
            return
    with connection.cursor() as cursor:
        cursor.execute("savepoint jobsys")
        try:
            yield
        except BaseException:
            if not connection.closed:
                cursor.execute("rollback to savepoint jobsys")
            raise
        finally:
            if not connection.closed:
                cursor.execute("release savepoint jobsys")


def _usable(connection: Any) -> bool:
    return not connection.closed and connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE


def alive(connection: Any) -> bool:
    """Whether an idle connection is still good, as far as the socket tells; no round trip.

    An idle server has nothing to say: a socket with something to read was closed by the other side. (`connection.poll()` does not notice.)
    """
    if not _usable(connection):
        return False
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return not poll.poll(0)


@contextmanager
def translated() -> Iterator[None]:
    """What psycopg2 raises when the server is away, or has no tables yet, becomes DatabaseUnavailable. A killed connection is an
    InterfaceError, too."""
    try:
        yield
    except psycopg2.Error as error:
        _translate(error)
        raise


def _translate(error: BaseException) -> None:
    if isinstance(error, NEVER_WORTH_REPEATING):
        return
    if isinstance(error, pg_errors.LockNotAvailable):
        raise LockTimeout(mask(_first_line(error))) from error
    if isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError, pg_errors.ReadOnlySqlTransaction)):
        raise DatabaseUnavailable(mask(_first_line(error))) from error
    if isinstance(error, (pg_errors.UndefinedTable, pg_errors.UndefinedColumn, pg_errors.UndefinedFunction)):
        raise NotMigrated from error


def url_of(settings: Settings) -> str:
    """The database to use: DATABASE_URL, else the one `bin/dev` runs. Raises SettingsError when there is neither."""
    from jobsys import local

    url = settings.database_url or local.database_url(settings.data_dir)
    if url is None:
        raise SettingsError(
            f"DATABASE_URL is not set, and no database of bin/dev is under {settings.data_dir}: "
            "start bin/dev, or set DATABASE_URL=postgresql://user:password@host/name"
        )
    if _is_cut_short(url):  # libpq would quote a part of the password, taking it for the host or the port
        raise SettingsError(
            "DATABASE_URL has characters in its password that mean something in an address: "
            "write @ : / ? # % there as %40 %3A %2F %3F %23 %25"
        )
    return url


def _is_cut_short(url: str) -> bool:
    """Whether a password that was not escaped ends too early, as libpq reads the address."""
    match = re.match(r"postgres(?:ql)?://([^/?]*)(.*)", url, re.DOTALL)
    if match is None:
        return False
    authority, rest = match.groups()
    ports = [host.rpartition(":")[2] for host in authority.split(",") if ":" in host.rpartition("]")[2]]
    return authority.count("@") > 1 or ("@" in rest and "@" not in authority and not all(port.isdecimal() for port in ports))


def _read_json(text: str) -> Any:
    """What a jsonb column holds. What only PostgreSQL can read (deep nesting, numbers of thousands of digits) must not hide the rest of a
    page: it comes as its text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"unreadable": f"{text[:200]}…"}


def _close(connection: Any) -> None:
    with contextlib.suppress(psycopg2.Error):
        connection.close()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
