"""Requests that are answered once something has happened to a job. They hold no thread and no connection to the database.

`Waits` has them all, and one thread that asks the database about all of their jobs together: often, but never for more than a small part
of its time. Whoever is due, or has waited long enough, is woken, and answered by a thread of the server's (see `Exchange` in
gunicorn_worker.py). Under a server that knows no such thing, waiting holds a thread, and half of the threads may be held.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import falcon

from jobsys import logs
from jobsys.api import problem, wire
from jobsys.errors import DatabaseUnavailable
from jobsys.system import JobRecord, JobSystem

log = logs.get(__name__)

PAUSE, SHARE, LONGEST_PAUSE = 0.02, 0.05, 0.25
"""Seconds between two looks at least; the share of its time that looking may take; and seconds at most."""
PATIENCE = 4.0
"""Seconds for which the database may be away before those who wait for a job are told."""


class Exchange(Protocol):
    """What `jobsys.exchange` in the environ of a request does, where the server has it."""

    over: bool

    def postpone(self, proceed: Any) -> bool: ...
    def hold(self, proceed: Any) -> bool: ...
    def unhold(self) -> None: ...
    def release(self) -> None: ...
    def wake(self) -> None: ...
    def answer(self, body: bytes, status: str | None = None, headers: Any = ()) -> None: ...
    def send(self, piece: bytes) -> None: ...
    def end(self) -> None: ...


class Waiter:
    """One request that waits; `deadline` (of the monotonic clock) is when it is woken at the latest."""

    seen: tuple[str, str] | None = None
    """How it saw the job last, for one that wants to know of every change; None for one that waits for the end."""
    lasts = False
    """Whether it goes on waiting while the database is away."""
    error: DatabaseUnavailable | None = None
    """Why nothing can be said of the job now."""

    def __init__(self, job_id: str, exchange: Exchange, deadline: float) -> None:
        self.job_id = job_id
        self.exchange = exchange
        self.deadline = deadline


class Waits:
    """Those who wait in this process. Safe for threads; starts its own when the first one comes."""

    def __init__(self, system: JobSystem) -> None:
        self.system = system
        self._waiters: dict[Waiter, None] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._next_look = 0.0
        # Under a server of another kind whoever waits holds a thread; half of them stay free for those who don't.
        self._threads = threading.Semaphore(max(1, system.settings.web_threads // 2))

    def add(self, waiter: Waiter) -> None:
        """From now on it waits; it is removed when it is woken."""
        with self._changed:
            self._waiters[waiter] = None
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look_out, name="jobsys waits", daemon=True)
                self._thread.start()
            elif len(self._waiters) == 1 or waiter.deadline < self._next_look:
                self._changed.notify()

    def remove(self, waiter: Waiter) -> None:
        """It no longer waits, if it did."""
        with self._changed:
            self._waiters.pop(waiter, None)

    @contextlib.contextmanager
    def thread(self) -> Iterator[bool]:
        """For the time of the block: whether the thread at hand may be held."""
        free = self._threads.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._threads.release()

    def _look_out(self) -> None:
        away_since: float | None = None
        error: DatabaseUnavailable | None = None
        while True:
            with self._changed:
                while not self._waiters:
                    self._changed.wait()
                waiters = list(self._waiters)
            began = time.monotonic()
            due: set[Waiter] = set()
            try:
                due = self._due(waiters)
                away_since = error = None
            except DatabaseUnavailable as unavailable:
                away_since, error = away_since or began, unavailable
            except Exception:
                log.exception("looking at what is waited for went wrong")
            now = time.monotonic()
            gave_up = away_since is not None and now - away_since >= PATIENCE
            for waiter in waiters:
                if waiter in due or waiter.deadline <= now or waiter.exchange.over or (gave_up and not waiter.lasts):
                    waiter.error = error
                    self.remove(waiter)
                    waiter.exchange.wake()
            pause = min(max(PAUSE, (now - began) / SHARE), LONGEST_PAUSE)
            with self._changed:
                self._next_look = min([now + pause, *(waiter.deadline for waiter in self._waiters)])
                self._changed.wait_for(self._is_time, max(0.0, self._next_look - time.monotonic()))

    def _is_time(self) -> bool:
        return any(waiter.deadline < self._next_look for waiter in self._waiters)

    def _due(self, waiters: list[Waiter]) -> set[Waiter]:
        unfinished = self.system.unfinished({waiter.job_id for waiter in waiters if waiter.seen is None})
        stirred = self.system.stirred({(waiter.job_id, *waiter.seen) for waiter in waiters if waiter.seen is not None})
        return {each for each in waiters if (each.job_id in stirred if each.seen is not None else each.job_id not in unfinished)}


class JobWaiter(Waiter):
    """A client that waits for the end of a job."""

    def __init__(self, waits: Waits, exchange: Exchange, req: falcon.Request, resp: falcon.Response, job_id: str, seconds: float) -> None:
        super().__init__(job_id, exchange, time.monotonic() + seconds)
        self._waits = waits
        self._req, self._resp = req, resp

    def proceed(self) -> None:
        """Answer with the job as it is, if it has ended or the time is over; else wait on."""
        if self.exchange.over:
            self._waits.remove(self)
        status, headers, resp = 200, list[tuple[str, str]](), self._resp
        try:
            if self.error is not None:
                raise self.error
            record = self._waits.system.job(self.job_id)
            if not (record.finished or self.exchange.over or self.deadline <= time.monotonic()):
                self._waits.add(self)
                return
            resp.media = wire.job(record)
            body = resp.render_body() or b""
        except Exception as error:
            body, status, headers = problem.answer(self._req, error)
        try:
            self.exchange.answer(body, falcon.code_to_http_status(status), headers)
        finally:
            self._req.context.at_end(self._req, status)


def for_job(waits: Waits, req: falcon.Request, resp: falcon.Response, job_id: str, seconds: float) -> JobRecord:
    """The job as it is, when it has ended, or `seconds` is 0, or too many wait already. Else it is answered later, where the server can do
    that, and otherwise awaited."""
    record = waits.system.job(job_id)
    if record.finished or not seconds:
        return record
    exchange: Exchange | None = req.env.get("jobsys.exchange")
    if exchange is None:
        with waits.thread() as free:
            return waits.system.wait(job_id, seconds) if free else record
    waiter = JobWaiter(waits, exchange, req, resp, job_id, seconds)
    if exchange.postpone(waiter.proceed):
        req.context.postponed = True
        waits.add(waiter)
    return record
