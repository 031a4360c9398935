"""The timeline of a job, read on from a place in it: nothing twice, and nothing left out.

What is written about a job carries the number of its transaction. Transactions commit in another order than they are numbered, so a
place is not "after number 7": it is a snapshot of PostgreSQL's, which says exactly which transactions had been seen. What the row of the
job itself tells (the present attempt's start, the end) is written down nowhere else before it is overwritten; the place remembers which of
it was told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

from jobsys.errors import JobNotFound
from jobsys.ids import is_job_id
from jobsys.system import FINISHED, Event, JobSystem

PAGE = 200
"""Rows that are read at a time."""
_SNAPSHOT = r"(?:\d{1,18}:\d{1,18}:(?:\d{1,18}(?:,\d{1,18})*)?)?"
_PLACE = re.compile(rf"({_SNAPSHOT});({_SNAPSHOT})" + r";(\d{1,18})" * 7, re.ASCII)


class Place(NamedTuple):
    """How far somebody has read. `str` of it is safe in a header, and `Place.parse` reads it."""

    seen: str = ""
    """All that is visible in this snapshot was told,"""
    upto: str = ""
    """and of what is visible in this one"""
    xact: int = 0
    number: int = 0
    """all up to here, in the order of writing,"""
    told: int = 0
    """and so many of the page that follows."""
    claim: int = 0
    """The last start that was told,"""
    due: int = 0
    """and for when the job was said to be due, and when to have finished, in microseconds."""
    finished: int = 0
    ended: int = 0
    """1: that this is all was told, too."""

    def __str__(self) -> str:
        return ";".join(str(field) for field in self)

    @classmethod
    def parse(cls, text: str) -> Place:
        """The place that such a text names. Raises ValueError when it names none."""
        match = _PLACE.fullmatch(text)
        if match is None or not all(_is_snapshot(snapshot) for snapshot in match.group(1, 2)):
            raise ValueError("is not the id of an event that was sent")
        return cls(match[1], match[2], *map(int, match.groups()[2:]))


class Look(NamedTuple):
    """What was found from a place on: events, each with the place behind it, and the place behind all."""

    events: list[tuple[Place, Event]]
    place: Place
    more: bool
    """Whether there may be more to read at once."""
    status: str
    version: str
    """With `place.seen`, for `JobSystem.stirred`."""

    @property
    def finished(self) -> bool:
        """Whether this is all, as long as nobody retries the job."""
        return self.status in FINISHED and not self.more


def look(system: JobSystem, job_id: str, place: Place) -> Look:
    """What there is to tell about a job from a place on, a page at a time; within the page by time. Raises JobNotFound."""
    asked = {"seen": place.seen or None, "upto": place.upto or None, "xact": place.xact, "number": place.number, "limit": PAGE}
    rows = system.database.run("timeline", id=job_id, **asked) if is_job_id(job_id) else []
    if not rows:
        raise JobNotFound(job_id)
    version, upto, status = rows[0][:3]
    written = [row[10:] for row in rows if row[10] is not None]
    more = len(written) == PAGE
    told = [(event, mark, True) for row in written for event, mark in _written(row)]
    if place == Place():
        told.append((Event(_utc(rows[0][5]), "created"), None, False))
    if not (more or place.upto):  # what was written before the row said so has been told, or is on this page
        told += [(event, mark, False) for event, mark in _present(rows[0][:10])]
    told.sort(key=lambda each: (each[0].at, each[0].kind == "finished"))

    events = []
    here, number = place._replace(upto=upto), 0
    for event, mark, counts in told:
        if counts:
            number += 1
            if number <= place.told:
                continue
            here = here._replace(told=number)
        if mark is not None:
            field, value = mark
            if value == getattr(here, field) or (field == "claim" and value < here.claim):
                continue
            here = here._replace(**{field: value})  # type: ignore[arg-type]
        events.append((here, event))
    if more:
        here = here._replace(xact=written[-1][0], number=written[-1][1], told=0)
    else:
        here = Place(seen=upto, claim=here.claim, due=here.due, finished=here.finished)
    if events:
        events[-1] = (here, events[-1][1])
    return Look(events, here, more or bool(place.upto), status, version)


Mark = tuple[str, int] | None
"""The field of the place that remembers it, and what it remembers."""


def _written(row: tuple[Any, ...]) -> Iterator[tuple[Event, Mark]]:
    _, _, at, kind, attempt, by, message, claim, started_at, worker, type, traceback = row
    if claim is None:
        yield Event(_utc(at), kind, attempt, by, message), ("finished", _microseconds(at)) if kind == "finished" else None
        return
    yield Event(_utc(started_at), "started", attempt, None, None, {"worker": worker}), ("claim", claim)
    detail = {"type": type, "traceback": traceback, "worker": worker, "duration": (at - started_at).total_seconds()}
    yield Event(_utc(at), "failed", attempt, None, message, detail), None


def _present(row: tuple[Any, ...]) -> Iterator[tuple[Event, Mark]]:
    _, _, status, claim, attempt, _, run_at, started_at, finished_at, worker = row
    if started_at is not None:
        yield Event(_utc(started_at), "started", attempt, None, None, {"worker": worker}), ("claim", claim)
    if status == "SCHEDULED":
        yield Event(_utc(run_at), "due"), ("due", _microseconds(run_at))
    if finished_at is not None:
        yield Event(_utc(finished_at), "finished", attempt, None, status), ("finished", _microseconds(finished_at))


def _is_snapshot(text: str) -> bool:
    """Whether PostgreSQL can read it: the transactions in progress lie between its two bounds, in order."""
    if not text:
        return True
    first, end, running = text.split(":")
    numbers = [int(number) for number in running.split(",") if number]
    bounds = [int(first), *numbers, int(end)]
    return int(first) > 0 and bounds == sorted(bounds) and len(set(numbers)) == len(numbers) and int(end) not in numbers


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(timezone.utc)


def _microseconds(moment: datetime) -> int:
    since = moment - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds
