"""An operator's verb for many jobs: those of some ids, or all that match a filter.

A thousand at a time, each thousand in a transaction of its own, for a bounded time: what is left then is for the next call, which goes on
by itself, because a job that was retried, buried or cancelled is no longer one that can be. Nobody is waited for who has a job locked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

from jobsys import db
from jobsys.search import Condition

BATCH = 1000
MOST = 100_000
"""So many ids are looked up at once."""
PATIENCE = 3.0
"""Seconds after which a call begins no other thousand, unless it is given more."""
ROUNDS, PAUSE = 10, 0.05
"""How often, and after how many seconds, it comes back to jobs that others have locked."""


@dataclass(frozen=True)
class Verb:
    """What an operator can ask: the statement that does it, the word for what it did, the statuses it can be asked of, and those that are
    meant where none is named."""

    statement: str
    done: str
    allowed: tuple[str, ...]
    usual: tuple[str, ...]
    parameters: dict[str, str]


VERBS = {
    "retry": Verb("requeue", "retried", ("FAILED", "DEAD", "CANCELLED"), ("FAILED", "DEAD"), {}),
    "bury": Verb("bury_job", "dead-lettered", ("FAILED", "SCHEDULED", "PENDING"), ("FAILED",), {}),
    "cancel": Verb(
        "cancel", "cancelled", ("SCHEDULED", "PENDING", "PROCESSING"), ("SCHEDULED", "PENDING", "PROCESSING"), {"stop": "cancel"}
    ),
}
"""By name. What was cancelled on purpose is retried only where that is named, and what still waits is buried only where that is."""


class Outcome(NamedTuple):
    """What became of it: `done` jobs are retried, buried or cancelled, `stopping` run and were asked to stop. `left` has the ids of those
    to which nothing was done though they were named, with their status, or None where there is no such job. With `more` others match:
    the time was up, or somebody else had them locked. What came to its status after `as_of` was left alone."""

    done: int
    stopping: int
    left: dict[str, str | None]
    more: bool
    as_of: datetime


def now(database: db.Database) -> datetime:
    """The database's time, in whole milliseconds, none of which is to come for a job that ended before this was asked."""
    moment: datetime = database.run("now")[0][0].astimezone(timezone.utc)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000) + timedelta(milliseconds=1)


def count(database: db.Database, statuses: Iterable[str], where: Condition, as_of: datetime) -> int:
    """How many jobs have one of these statuses, match, and can be asked; MOST + 1 when they are more than MOST."""
    return int(_ask(database, "count(*)", statuses, where, as_of, MOST + 1)[0][0])


def matching(database: db.Database, statuses: Iterable[str], where: Condition, as_of: datetime) -> list[str]:
    """The ids of those jobs, in order, or of MOST of them."""
    return sorted(id for (id,) in _ask(database, "id::text", statuses, where, as_of, MOST))


def act(
    database: db.Database, verb: Verb, ids: Sequence[str], statuses: Sequence[str], *, by: str | None, as_of: datetime, patience: float
) -> tuple[Outcome, set[str]]:
    """Ask it of those of these jobs that have one of these statuses; what became of it, and the ids of those it was asked of."""
    deadline = time.monotonic() + patience
    stopping, asked = 0, set[str]()
    todo, late = list(ids), False
    for _ in range(ROUNDS):
        locked: list[str] = []
        for start in range(0, len(todo), BATCH):
            if late := time.monotonic() > deadline:
                break
            with database.transaction() as connection:
                taken = db.run(connection, "take", id=todo[start : start + BATCH], status=list(statuses), as_of=as_of)
                free = [id for id, is_free in taken if is_free]
                rows = db.run(connection, verb.statement, id=free, by=by, **verb.parameters) if free else []
            asked.update(row[0] for row in rows)
            stopping += sum(row[1] == "PROCESSING" for row in rows)
            locked += [id for id, is_free in taken if not is_free]
        todo = locked
        if late or not todo:
            break
        time.sleep(PAUSE)
    return Outcome(len(asked) - stopping, stopping, {}, late or bool(todo), as_of), asked


def _ask(database: db.Database, what: str, statuses: Iterable[str], where: Condition, as_of: datetime, limit: int) -> list[db.Row]:
    with database.transaction() as connection, connection.cursor() as cursor:
        cursor.execute("set local enable_seqscan = off")
        cursor.execute(_statement(what, statuses, where), {**where.parameters, "as_of": as_of, "limit": limit})
        return list(cursor.fetchall())


def _statement(what: str, statuses: Iterable[str], where: Condition) -> str:
    """Each status that a verb can be asked of has its index, which leads to its jobs, however many others there are."""
    arm = db.STATEMENTS["matching"].replace("{conditions}", where.text)
    arms = " union all ".join(arm.replace("{status}", status) for status in statuses)
    return f"select {what} from ({arms} limit %(limit)s) as found"
