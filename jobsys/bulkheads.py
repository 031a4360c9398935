"""How much of a process a job type may take: no more than its share of the threads, and next to nothing while all its attempts fail alike.

So a mail server that hangs holds up mails and nothing else; and one that is away costs some jobs an attempt, not every job all of them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping

from jobsys.job_types import JobType
from jobsys.running import RunningJob

SHORTEST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
"""Seconds between two trials of a type that is held back, per process: from the first to the second they double."""


class Streak:
    """Different jobs of one type, one after the other, that failed the same way; from `trip_after` on the type is held back."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.jobs: set[str] = set()
        self.pause = 0.0
        self.trial_at = float("-inf")


class Bulkheads:
    """Counts what this process holds of each type, from the claim until its outcome is written."""

    def __init__(self, threads: int, job_types: Mapping[str, JobType]) -> None:
        self._threads = threads
        self._job_types = job_types
        self._held: Counter[str] = Counter()
        self._streaks: dict[str, Streak] = {}
        self._lock = threading.Lock()

    def rooms(self) -> dict[str, int]:
        """How many more jobs may be claimed now of each type that has a bound. The others have none."""
        bounds = {name: self._most(each) for name, each in self._job_types.items() if each.max_share < 1}
        with self._lock:
            for name, streak in self._streaks.items():
                if streak.pause:
                    bounds[name] = 1 if time.monotonic() >= streak.trial_at else 0
            return {name: max(0, bound - self._held[name]) for name, bound in bounds.items()}

    def enter(self, jobs: Iterable[RunningJob]) -> list[RunningJob]:
        """Count jobs in that were claimed; those for which there is no room have to be given back."""
        if not (counted := self._counted(jobs)):
            return []
        rooms = self.rooms()
        too_many = []
        with self._lock:
            for job in counted:
                name = job.actor_name
                self._held[name] += 1
                if name in rooms:
                    rooms[name] -= 1
                    if rooms[name] < 0:
                        too_many.append(job)
        return too_many

    def leave(self, jobs: Iterable[RunningJob]) -> None:
        """Count jobs out: their outcomes are written."""
        if counted := self._counted(jobs):
            with self._lock:
                self._held.subtract(job.actor_name for job in counted)

    def failed(self, job: RunningJob, fingerprint: str) -> float:
        """An attempt failed; for how many seconds the type is held back from now on, 0 if it isn't."""
        job_type = self._job_types.get(job.actor_name)
        trip_after = 0 if job_type is None else job_type.trip_after
        if not trip_after:
            return 0.0
        with self._lock:
            streak = self._streaks.get(job.actor_name)
            if streak is None or (streak.fingerprint != fingerprint and not streak.pause):
                streak = self._streaks[job.actor_name] = Streak(fingerprint)
            if len(streak.jobs) < trip_after:
                streak.jobs.add(job.message_id)
            if len(streak.jobs) < trip_after or time.monotonic() < streak.trial_at:
                return 0.0
            streak.pause = min(streak.pause * 2 or SHORTEST_PAUSE, LONGEST_PAUSE)
            streak.trial_at = time.monotonic() + streak.pause
            return streak.pause

    def succeeded(self, job: RunningJob) -> bool:
        """An attempt went well, or gave up: what its type depends on has answered. Whether the type was held back until now."""
        if job.actor_name not in self._streaks:
            return False
        with self._lock:
            streak = self._streaks.pop(job.actor_name, None)
        return streak is not None and streak.pause > 0

    @property
    def held_back(self) -> list[str]:
        """The types that are held back."""
        with self._lock:
            return sorted(name for name, streak in self._streaks.items() if streak.pause)

    def _counted(self, jobs: Iterable[RunningJob]) -> list[RunningJob]:
        """Those of types that can have a bound."""
        return [job for job in jobs if (declared := job.job_type) is not None and (declared.max_share < 1 or declared.trip_after)]

    def _most(self, job_type: JobType) -> int:
        return max(1, int(self._threads * job_type.max_share))
