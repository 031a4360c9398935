"""The rate limit: so many requests of one client in a window of time, over all processes of all web servers.

A table counts. Of what a client has left, a process lets one in SHARE pass before it waits for the table to count it: so a fast client
costs few questions while it has much left, and the last SHARE requests of a window are all waited for. A limit of N lets N requests pass,
and at most N / SHARE more for each process that the client talks to; exactly N, if N is less than SHARE. (It lets fewer pass only where
the last few of one window were told to the table just after it had ended, and count in the next.)

A window begins with a client's first request. Its end is the database's business: a process is told the seconds left, and measures them
by its monotonic clock. One thread asks, for all requests together that wait meanwhile; should it get no answer, requests pass.
"""

from __future__ import annotations

import math
import threading
import time
from typing import NamedTuple

import falcon

from jobsys import db, logs
from jobsys.api.clients import client
from jobsys.api.problem import Problem
from jobsys.openapi import Parameter
from jobsys.settings import Settings

SHARE = 64
"""The part of what a client has left that a process lets pass before it asks, as 1 / SHARE."""
STALE, QUIET = 1.0, 0.2
"""The table is told, too, of a request whose client it has not spoken of for so long. That is waited for when it was left in peace for the
time QUIET, so that slow clients read exact numbers; in a crowd, it is told of many together, so often."""
PATIENCE = 1.0
"""Seconds a request waits for the answer."""
AGAIN = 1.0
"""Seconds after which a table that was away is looked for again."""
MOST_CLIENTS = 5000
"""So many clients a process remembers, before it tells the table of them all and forgets them."""
UNLIMITED = ("health", "metrics", "admin", "dashboard")
"""What probes and people look at: the first part of the path."""
HEADERS = (
    Parameter("RateLimit-Limit", {"type": "integer", "minimum": 1}, "How many requests the client may make in a window of time."),
    Parameter("RateLimit-Remaining", {"type": "integer", "minimum": 0}, "How many more there may be in this window."),
    Parameter("RateLimit-Reset", {"type": "integer", "minimum": 0}, "Seconds until the window ends."),
)
"""What every answer to a limited request says, while the table that counts can be asked."""
_NAMED: dict[float, str] = {1: "second", 60: "minute", 3600: "hour", 86400: "day"}
log = logs.get(__name__)


class RateLimit:
    """The middleware, after whatever says who the client is. Every answer to a limited request says how many more there may be."""

    def __init__(self, settings: Settings, database_url: str) -> None:
        self._settings = settings
        self._limit, self._period = settings.rate_limit
        self._limiter = Limiter(self._limit, self._period, database_url) if self._limit else None

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Let the request pass, or raise Problem 429."""
        if self._limiter is None or not counts(req.path):
            return
        who = client(req, self._settings)
        verdict = self._limiter.admit(who)
        if verdict is None:
            return
        # Rounded up: who comes back then comes into the next window.
        seconds = str(min(math.floor(verdict.seconds_left) + 1, math.ceil(self._period)))
        resp.set_header("RateLimit-Limit", str(self._limit))
        resp.set_header("RateLimit-Remaining", str(verdict.remaining))
        resp.set_header("RateLimit-Reset", seconds)
        if not verdict.passes:
            rate = f"{self._limit} per {_NAMED.get(self._period, f'{self._period:g} s')}"
            raise Problem(
                429, f"too many requests from {who}: {rate} may be made; come back in {seconds} s", headers={"Retry-After": seconds}
            )


def counts(path: str) -> bool:
    """Whether requests to this path are limited, where there is a limit."""
    return path[1:].partition("/")[0] not in UNLIMITED


class Verdict(NamedTuple):
    """Whether a request passes, how many more there may be in this window, and how long it lasts."""

    passes: bool
    remaining: int
    seconds_left: float


class Limiter:
    """Counts the requests of clients, together with the other processes."""

    def __init__(self, limit: int, period: float, database_url: str) -> None:
        self._limit = limit
        self._period = period
        self._database = db.Database(database_url, size=1, wait=2.0, patience=2.0, name="jobsys rate limit")
        self._clients: dict[str, _Client] = {}
        self._questions: dict[str, list[_Question]] = {}
        """The requests that wait, by client; clients of whom to tell are there without any."""
        self._waited_for = False
        self._quiet_from = -math.inf
        self._away = False
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None

    def admit(self, name: str) -> Verdict | None:
        """Count a request of the client of this name, and say whether it passes; None while the table is away."""
        now = time.monotonic()
        with self._changed:
            known = self._clients.get(name)
            if known is None or now >= known.ends:
                if self._away:
                    return None
                known = self._clients[name] = _Client(self._limit, now + self._period)
            if known.left == 0:
                return Verdict(False, 0, known.ends - now)
            stale = now > known.heard + STALE
            wants_to_know = stale and (now > self._quiet_from or self._away or len(self._clients) > MOST_CLIENTS)
            if known.used < known.left // SHARE and not wants_to_know:
                known.used += 1
                if stale and name not in self._questions:
                    self._questions[name] = []
                    self._wake()
                return Verdict(True, known.left - known.used, known.ends - now)
            if self._away:
                return None
            question = _Question()
            self._questions.setdefault(name, []).append(question)
            self._waited_for = True
            self._wake()
        if not question.answered.acquire(timeout=PATIENCE):
            with self._changed:
                if not question.answered.acquire(blocking=False):
                    self._lose(f"no answer within {PATIENCE:g} s")
        return question.verdict

    def _wake(self) -> None:
        self._changed.notify()
        if self._thread is None:  # not before the first request: the process may have been forked since this object was made
            self._thread = threading.Thread(target=self._ask, name="jobsys rate limit", daemon=True)
            self._thread.start()

    def _ask(self) -> None:
        while True:
            with self._changed:
                if self._away:
                    self._changed.wait(AGAIN)
                while not (self._away or self._waited_for or (self._questions and time.monotonic() > self._quiet_from)):
                    self._changed.wait(max(0.0, self._quiet_from - time.monotonic()) if self._questions else None)
                questions, self._questions, self._waited_for = self._questions, {}, False
                told = {name: self._clients[name] for name in questions}
                if len(self._clients) > MOST_CLIENTS:
                    told |= {name: known for name, known in self._clients.items() if known.used}
                    self._clients = {name: self._clients[name] for name in questions}
                used = {name: known.used for name, known in told.items()}
                self._quiet_from = math.inf
            numbers = [number + len(questions.get(name, ())) for name, number in used.items()]
            rows, error = [], None
            try:
                rows = self._database.run("count_requests", clients=list(used), numbers=numbers, period=self._period)
            except Exception as caught:  # whatever it is: it is no reason to refuse anybody
                error = str(caught).strip()
            with self._changed:
                self._find() if error is None else self._lose(error)
                self._quiet_from = time.monotonic() + QUIET
                for name, known in told.items():
                    known.used -= used[name]  # what failed to be counted may have been counted all the same: not again
                for name, total, seconds_left in rows:
                    self._answer(questions.get(name, []), told[name], total, seconds_left)
                for question in [each for waiting in questions.values() for each in waiting]:
                    question.answered.release()

    def _answer(self, waiting: list[_Question], known: _Client, total: int, seconds_left: float) -> None:
        now = time.monotonic()
        known.left, known.ends, known.heard = max(0, self._limit - total), now + seconds_left, now
        for number, question in enumerate(waiting, total - len(waiting) + 1):
            question.verdict = Verdict(number <= self._limit, max(0, self._limit - number), seconds_left)

    def _lose(self, reason: str) -> None:
        if not self._away:
            log.warning("the rate limit is off while its table is away", error=reason.partition("\n")[0])
        self._away = True

    def _find(self) -> None:
        if self._away:
            log.info("the rate limit is on again")
        self._away = False


class _Client:
    """What a process knows of a client: how much it has left of a window that ends at `ends`, when the table was `heard` to say so, and how
    many requests were let pass since. Until it has said anything, the window is new."""

    __slots__ = ("ends", "heard", "left", "used")

    def __init__(self, left: int, ends: float) -> None:
        self.left, self.ends, self.heard, self.used = left, ends, -math.inf, 0


class _Question:
    """A request that waits for the table's answer; without a verdict the table was away."""

    verdict: Verdict | None = None

    def __init__(self) -> None:
        self.answered = threading.Lock()
        self.answered.acquire()
