"""The timeline of a job as it comes about: `text/event-stream`, as browsers' EventSource reads it.

Each event has an id that is the place behind it (see timeline.py), so who comes again with `Last-Event-ID` reads on exactly there. After
the last one comes an event named `end`; who comes again after that gets 204, which ends EventSource's attempts. A stream lasts a few
minutes at most, and the client comes again by itself: so it shows its token anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import falcon
from falcon import mediatypes

from jobsys import timeline
from jobsys.api import wire
from jobsys.api.problem import RETRY_AFTER, Problem
from jobsys.api.waiting import Exchange, Waiter, Waits
from jobsys.errors import DatabaseUnavailable, JobNotFound
from jobsys.timeline import Look, Place

CONTENT_TYPE = "text/event-stream"
HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent, so that no proxy takes the connection for dead."""
LONGEST = 300.0
"""Seconds a stream lasts at most."""
RETRY = 2000
"""Milliseconds after which a client whose stream broke off comes again."""
POLL = 0.25
"""Seconds between two looks under a server that can't answer later."""


def is_wanted(req: falcon.Request) -> bool:
    """Whether the client prefers a stream to JSON."""
    try:
        return mediatypes.best_match(("application/json", CONTENT_TYPE), req.accept) == CONTENT_TYPE
    except falcon.InvalidMediaRange:
        return False


def answer(waits: Waits, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
    """Begin the stream, or answer 204 when all of it was told. Raises JobNotFound; Problem for a Last-Event-ID that is none of ours, and
    when too many wait already."""
    try:
        place = Place.parse(req.get_header("Last-Event-ID") or str(Place()))
    except ValueError as error:
        raise Problem(400, f"the header Last-Event-ID {error}: send the one received last, or none to begin at the beginning") from None
    look = timeline.look(waits.system, job_id, place._replace(ended=0))
    if place.ended and look.finished and not look.events:
        resp.status = falcon.HTTP_204
        return
    resp.content_type = CONTENT_TYPE
    resp.set_header("X-Accel-Buffering", "no")
    exchange: Exchange | None = req.env.get("jobsys.exchange")
    if req.method == "HEAD":
        resp.stream = iter(())
    elif exchange is None:
        resp.stream = _held(Stream(waits, req, job_id, look))
    else:
        stream = Stream(waits, req, job_id, look, exchange)
        if not exchange.postpone(stream.proceed):
            raise Problem(503, "too many wait for jobs already; try again soon", headers={"Retry-After": str(RETRY_AFTER)})
        req.context.postponed = True
        exchange.wake()


class Stream(Waiter):
    """What is told to one client; it waits for changes."""

    lasts = True

    def __init__(self, waits: Waits, req: falcon.Request, job_id: str, look: Look, exchange: Any = None) -> None:
        super().__init__(job_id, exchange, 0.0)
        self._waits = waits
        self._req = req
        self._look: Look | None = look
        self._place = look.place
        self._over_at = time.monotonic() + LONGEST
        self._beat_at = 0.0
        self._begun = False
        self.ended = False
        self.more = False

    def proceed(self) -> None:
        """Send what there is to tell, and wait for more."""
        self._waits.remove(self)
        piece = b"" if self._begun and self.exchange.over else self.piece()
        if piece:
            self.exchange.send(piece)
        if self.ended or self.exchange.over:
            self.exchange.end()
            self._req.context.at_end(self._req, 200)
        elif self.more:
            self.exchange.wake()
        else:
            self.deadline = self._beat_at if self._over_at <= time.monotonic() else min(self._beat_at, self._over_at)
            self._waits.add(self)

    def piece(self) -> bytes:
        """What is to be sent now; `ended` says whether it was all, `more` whether there is more at once."""
        try:
            text, over = self._told(), time.monotonic() >= self._over_at
        except JobNotFound:
            text, over = _frame(None, {"jobId": self.job_id, "status": None}, "end"), True
        except DatabaseUnavailable:  # the client could do no better than wait, either
            text, over = "", False
        if not self._begun:
            text, self._begun = f"retry: {RETRY}\n\n{text}", True
        now = time.monotonic()
        if not text and now >= self._beat_at:
            text = ":\n\n"
        if text:
            self._beat_at = now + HEARTBEAT
        self.ended = self.ended or over
        return text.encode()

    def _told(self) -> str:
        self.more = False
        if self.error is not None:
            raise self.error
        look, self._look = self._look or timeline.look(self._waits.system, self.job_id, self._place), None
        self._place, self.seen, self.more = look.place, (look.version, look.place.seen), look.more
        frames = [_frame(place, wire.event(event)) for place, event in look.events]
        if look.finished:
            self.ended = True
            frames.append(_frame(look.place._replace(ended=1), {"jobId": self.job_id, "status": look.status}, "end"))
        return "".join(frames)


def _held(stream: Stream) -> Iterator[bytes]:
    """The stream under a server that holds a thread for it."""
    with stream._waits.thread() as free:
        if not free:
            yield f"retry: {RETRY_AFTER * 1000}\n\n".encode()
            return
        while not stream.ended:
            if piece := stream.piece():
                yield piece
            elif not stream.more:
                time.sleep(POLL)


def _frame(place: Place | None, data: Mapping[str, Any], name: str | None = None) -> str:
    lines = [f"id: {place}" if place else "", f"event: {name}" if name else "", f"data: {json.dumps(data)}"]
    return "\n".join(line for line in lines if line) + "\n\n"
