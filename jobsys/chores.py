"""What keeps the store in order: promotion of due jobs, rescue of lost workers' jobs, counting, removal, pruning.

Every worker process does all of it, safely many times over; none must be alone, and each statement is bounded. The more there are, the
more rarely each does.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from jobsys import db, logs
from jobsys.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from jobsys.presence import Presence

FIRST_ID = "00000000-0000-0000-0000-000000000000"
SHORTEST_LOOK = 0.001
"""Seconds from one look at the scheduled jobs to the next, at least, but where a thousand were due."""
PRUNE_PAUSE = 10.0
"""After a page was pruned, so many times as long as that took belongs to the jobs."""
log = logs.get(__name__)


class Chore(NamedTuple):
    """What to do every so many seconds, unless `do` says that it is to be sooner. What is `shared` is there for all workers to do."""

    do: Callable[[], float | None]
    every: float
    shared: bool = False


class Chores(threading.Thread):
    """Does each chore when it is time, until it is stopped."""

    def __init__(self, presence: Presence) -> None:
        super().__init__(name="jobsys chores", daemon=True)
        self._presence = presence
        self._settings = presence.settings
        self._database = db.Database(presence.broker.database.url, size=1, wait=30, name="jobsys chores")
        self._stopped = threading.Event()
        self._pruned_to = FIRST_ID
        self._distrust_silence()
        poll = self._settings.poll_interval
        self._chores = [
            Chore(self.report, min(0.25, poll)),
            Chore(self.give_back_unstarted, min(0.5, poll)),
            Chore(self.give_back_unheld, 2 * self._settings.worker_heartbeat),
            Chore(self.measure, presence.recorder.every),
            Chore(self.promote, min(0.2, poll), shared=True),
            Chore(self.rescue, poll, shared=True),
            Chore(self.remove_stopped, poll, shared=True),
            Chore(self.sum_tallies, poll, shared=True),
            Chore(self.rescue_orphans, 30.0, shared=True),
            Chore(self.prune, 60.0, shared=True),
            Chore(self.prune_rate_limits, 60.0, shared=True),
            Chore(self.prune_access, 60.0, shared=True),
        ]
        self._due = [time.monotonic() + chore.every for chore in self._chores]

    def run(self) -> None:
        while not self._stopped.is_set():
            for number, chore in enumerate(self._chores):
                if time.monotonic() >= self._due[number] and not self._stopped.is_set():
                    again = self._attempt(chore.do)
                    every = chore.every * self._share() if chore.shared else chore.every
                    self._due[number] = time.monotonic() + (every if again is None else min(again, every))
            self._stopped.wait(max(0.0, min(self._due) - time.monotonic()))

    def stop(self) -> None:
        """Start no further chore, and wait for the one at hand."""
        self._stopped.set()
        if self.is_alive():
            self.join(5)
        self._database.close()

    def promote(self) -> float | None:
        """Make due jobs PENDING, a thousand at most; when to look again: at once after a thousand, else when the next one is due, but not
        sooner than in a millisecond."""
        next_due = self._database.run("next_due")
        if not next_due:
            return None
        [(wait,)] = next_due
        if wait > 0:
            return max(SHORTEST_LOOK, wait)
        promoted = len(self._database.run("promote"))
        if promoted == 0:
            return None  # somebody has locked what is due
        return 0.0 if promoted == 1000 else SHORTEST_LOOK

    def report(self) -> None:
        """Write what running jobs logged."""
        self._presence.report(list(self._presence.running))
        self._presence.attempts.sum_up()

    def give_back_unstarted(self) -> None:
        """Give back what was claimed too early."""
        self._presence.give_back_unstarted()

    def measure(self) -> float:
        """Add what this process measured to what all did; if that can't be, with the next report."""
        with contextlib.suppress(DatabaseUnavailable):  # the other chores say so, and a lock on these numbers is no concern of theirs
            self._presence.recorder.report(self._database)
        return self._presence.recorder.pause

    def rescue(self) -> None:
        """Give the jobs of lost workers back to the queue."""
        for (worker,) in self._database.run("lost_workers", silence_counts=time.monotonic() >= self._silence_counts_from):
            if worker != self._presence.id:
                self._rescue_jobs_of(worker, "its worker died or was cut off")

    def give_back_unheld(self) -> None:
        """Give back jobs of this worker's that it does not know of."""
        self._presence.give_back_unheld()

    def rescue_orphans(self) -> None:
        """Give jobs back whose worker has no row: nobody else would."""
        for (worker,) in self._database.run("orphans"):
            with self._database.transaction() as connection:
                db.run(connection, "rescue", worker=worker, max_crashes=self._settings.max_crashes, message="its worker is not known")

    def remove_stopped(self) -> None:
        """Remove the records of jobs whose removal waited for them to stop."""
        self._database.run("remove_stopped")

    def sum_tallies(self) -> None:
        """Move the log of counts into the sums."""
        self._database.run("sum_tallies")

    def prune(self) -> float | None:
        """Remove finished jobs past their retention, a bounded number at a time; soon again while there are more."""
        if self._settings.retention_days == 0:
            return None
        began = time.monotonic()
        last, seen, _ = self._database.run("prune", after=self._pruned_to, days=self._settings.retention_days)[0]
        self._pruned_to = last if seen == 1000 else FIRST_ID
        return self._share() * PRUNE_PAUSE * (time.monotonic() - began) if seen == 1000 else None

    def prune_rate_limits(self) -> None:
        """Forget clients whose window of the rate limit is over."""
        while len(self._database.run("prune_rate_limits")) == 10_000:
            pass

    def prune_access(self) -> None:
        """Forget revocations of tokens that have expired by now, and wrong passwords of long ago."""
        self._database.run("prune_revocations")
        self._database.run("prune_logins")

    def _rescue_jobs_of(self, worker: str, reason: str) -> None:
        while not self._stopped.is_set():
            with self._database.transaction() as connection:
                if not db.run(connection, "lock_lost_worker", id=worker):
                    return
                rescued = db.run(connection, "rescue", worker=worker, max_crashes=self._settings.max_crashes, message=reason)
                if not rescued:
                    db.run(connection, "forget_worker", id=worker)
            if not rescued:
                return
            log.warning(
                "rescued the jobs of a lost worker", worker=worker, jobs=len(rescued), dead=sum(status == "DEAD" for _, status in rescued)
            )

    def _share(self) -> float:
        """Many workers share what is there for all: each does it more rarely, at no particular moment."""
        return max(1.0, self._presence.claims.workers / 2) * random.uniform(0.8, 1.2)

    def _distrust_silence(self) -> None:
        """The others' hearts may have had no database, as this process: give them two beats to be heard again."""
        self._silence_counts_from = time.monotonic() + 2 * self._settings.worker_heartbeat

    def _attempt(self, chore: Callable[[], float | None]) -> float | None:
        try:
            return chore()
        except DatabaseUnavailable as error:
            self._distrust_silence()
            log.warning("chore put off, the database is away", chore=chore.__name__, error=str(error))
            self._stopped.wait(1)
        except Exception:
            log.exception("chore failed", chore=chore.__name__)
        return None
