"""Looking for jobs among any number of them: at once where an index leads to them, and for a bounded time where none does.

An index for every filter would be paid for by every job, three times. So a search that PostgreSQL can't answer in HASTE is cancelled there,
and looks through the jobs part by part instead, the newest first, until TIME is up. The page it makes may be short, even empty; its cursor
goes on where it ended.

That takes a thread of the web server, and a CPU of the database, for seconds. So only AT_ONCE may do it at the same time, and whoever comes
beside them has HASTED, which is enough for what an index finds.
"""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

import psycopg2

from jobsys import db
from jobsys.errors import DatabaseUnavailable, TooManySearches

HASTE, HASTED = 1.0, 0.2
"""Seconds for the database to find a page in its own way; and while AT_ONCE searches look through the jobs."""
UNPACK = 1.0
"""Seconds after which no further row becomes objects here: a payload that the database reads in no time may take a quarter of one."""
AT_ONCE = 2
"""So many in each process."""
TIME = 1.5
"""Seconds after which no further part is begun."""
LONGEST_PART = 3.0
"""Seconds for one part; more than one takes unless the machine is in trouble."""
FIRST_PART, FIRST_ROWS = 10_000, 8
"""Jobs that are looked through, and those of them that are read, large as they may be. What took less than a fifth of a second is followed
by twice as much."""

_free = threading.Semaphore(AT_ONCE)


class Condition(NamedTuple):
    """A part of a WHERE, and its parameters."""

    text: str
    parameters: dict[str, Any]


def search(database: db.Database, where: Condition, *, limit: int, cursor: str | None) -> tuple[list[db.Row], str | None, bool]:
    """Rows of the statement `jobs` for which `where` holds, newest first, from `cursor` on; the cursor that continues them, None at the
    end; and whether time was up before there were `limit`. Raises DatabaseUnavailable, TooManySearches."""
    if free := _free.acquire(blocking=False):
        _free.release()
    try:
        found, whole = _read(database, where, limit, _part(cursor), HASTE if free else HASTED)
        return found[:limit], found[:limit][-1][0] if len(found) > limit or not whole else None, not whole
    except DatabaseUnavailable as error:
        if not isinstance(error.__cause__, psycopg2.errors.QueryCanceled):
            raise
        if not _free.acquire(blocking=False):
            raise TooManySearches from error
    try:
        return _look_through(database, where, limit, cursor)
    finally:
        _free.release()


def _look_through(database: db.Database, where: Condition, limit: int, cursor: str | None) -> tuple[list[db.Row], str | None, bool]:
    found: list[db.Row] = []
    size, rows, deadline = FIRST_PART, FIRST_ROWS, time.monotonic() + TIME
    while True:
        began = time.monotonic()
        [(end,)] = database.run("end_of_part", before=cursor, size=size)
        wanted = min(rows, limit - len(found))
        read, whole = _read(database, where, wanted, _part(cursor, end), LONGEST_PART)
        found += read[:wanted]
        if not whole:
            return found, found[-1][0], True
        full = len(found) == limit and len(read) > wanted
        if full or (end is None and len(read) <= wanted):
            return found, found[-1][0] if full else None, False
        cursor = end if len(read) <= wanted else read[wanted - 1][0]
        if time.monotonic() > deadline:
            return found, cursor, True
        if time.monotonic() - began < 0.2:
            size, rows = size * 2, rows * 2


def _read(database: db.Database, where: Condition, limit: int, part: Condition, seconds: float) -> tuple[list[db.Row], bool]:
    """Up to one row more than `limit`, of one part of the jobs; and whether that is all, rather than what could be unpacked in time."""
    statement = db.STATEMENTS["jobs"].replace("{conditions}", f"{where.text} and {part.text}")
    with database.connection() as connection, connection.cursor() as cursor:
        with connection:
            cursor.execute("select set_config('statement_timeout', %s, true)", [f"{seconds * 1000:.0f}"])
            cursor.execute(statement, {**where.parameters, **part.parameters, "limit": limit + 1})
        # All of it is here, and no transaction waits for what it is made of.
        rows, deadline = [], time.monotonic() + UNPACK
        while (row := cursor.fetchone()) is not None:
            rows.append(row)
            if time.monotonic() > deadline:
                break
        return rows, len(rows) == cursor.rowcount


def _part(before: str | None, end: str | None = None) -> Condition:
    """The jobs older than `before`, down to `end`."""
    newer = "id < %(before)s::uuid" if before else "true"
    return Condition(f"{newer} and id >= %(end)s::uuid" if end else newer, {"before": before, "end": end})
