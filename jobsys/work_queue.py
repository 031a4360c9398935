"""The jobs a worker process has claimed and not started: what Dramatiq's threads take from."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from jobsys.concurrency import PATIENCE, Concurrency
from jobsys.running import RunningJob

_order = attrgetter("order")


class WorkQueue(queue.Queue):
    """What Dramatiq's threads take from, in the order of the jobs themselves (Dramatiq's own orders by actor). Counts what it needs to
    measure the pace.

    A suspect (a job whose next crash would be its last) runs alone: it waits until nothing else runs here, and nothing else starts before
    it has ended. So if it kills its process, it was itself.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads = threads
        self.expected: set[RunningJob] = set()
        """Jobs that were claimed and are not started: here, or on their way here."""
        self.finished = 0
        self.finished_at = float("-inf")
        """When the last one did, by time.monotonic."""
        self.active_seconds = 0.0
        """For how long, until then, at least one job ran."""
        self._active_since = 0.0
        self.room = threading.Event()
        """Set when another claim may be due."""
        self.closed = False
        self.low_water = 0
        """So many unstarted jobs, or fewer, make room for a claim."""
        self.low_since: float | None = None
        """When they became so few, by time.monotonic; who claims sets it back."""
        self._concurrency = Concurrency()
        self._suspects: list[RunningJob] = []
        self._suspect_runs = False

    def _init(self, maxsize: int) -> None:
        self.queue: list[RunningJob] = []
        """Like the suspects, the next one last: jobs come by the hundred and in order, which sorts faster than a heap gives them out."""

    def _qsize(self) -> int:
        return len(self.queue) + len(self._suspects)

    def put_all(self, jobs: list[RunningJob]) -> None:
        """Put some jobs at once."""
        with self.mutex:
            self._add(jobs)
            self.unfinished_tasks += len(jobs)
            if not self.one_at_a_time:
                self.not_empty.notify(len(jobs))
            elif self._startable:
                self.not_empty.notify()

    def put(self, item: tuple[int, RunningJob], block: bool = True, timeout: float | None = None) -> None:
        """Put a job, as Dramatiq does."""
        self.put_all([item[1]])

    def _add(self, jobs: list[RunningJob]) -> None:
        self._suspects += [job for job in jobs if job.suspect]
        self._suspects.sort(key=_order, reverse=True)
        self.queue += [job for job in jobs if not job.suspect]
        self.queue.sort(key=_order, reverse=True)

    def _get(self) -> tuple[int, RunningJob]:
        if not self.running:
            self._active_since = time.monotonic()
        if self.queue:
            job = self.queue.pop()
        else:
            job = self._suspects.pop()
            self._suspect_runs = True
        self.expected.discard(job)
        self._signal_room()
        return (0, job)

    @property
    def _startable(self) -> bool:
        if self._suspect_runs or self.closed:
            return False
        if self.queue:
            return not (self.one_at_a_time and self.running)
        return bool(self._suspects) and self.unfinished_tasks == len(self._suspects)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        with self.mutex:
            if block and not self._startable and not self.closed:
                self.not_empty.wait(timeout)
            if self._startable if block else self._qsize() > 0:
                return self._get()
        if self.closed:
            time.sleep(0.001)
        raise queue.Empty

    def task_done(self) -> None:
        with self.mutex:
            now = time.monotonic()  # in here: who waits for the interpreter before it has the lock would turn back the clock
            self.finished += 1
            self.finished_at = now
            self.active_seconds += now - self._active_since
            self._active_since = now
            self._forget(1)
            if not self.unfinished_tasks:
                self._concurrency.one_at_a_time = False  # what comes next may be of another kind
            if now >= self._concurrency.judge_at:
                before = self.one_at_a_time
                self._concurrency.judge(now, waiting=bool(self.queue))
                if before and not self.one_at_a_time:
                    self.not_empty.notify_all()
            if self._suspect_runs or self._suspects:
                self._suspect_runs = False
                self.not_empty.notify_all()
        self._signal_room()

    @property
    def one_at_a_time(self) -> bool:
        """Whether no job starts before the one that runs has ended, because they compute: see concurrency.py."""
        return self._concurrency.one_at_a_time

    @property
    def at_once(self) -> int:
        """How many jobs may run at once."""
        return 1 if self.one_at_a_time else self.threads

    def lose_patience(self) -> None:
        """To be called now and then: no others wait any longer for a job that takes its time."""
        with self.mutex:
            now = time.monotonic()
            if self.one_at_a_time and self.running and now > self._active_since + PATIENCE:
                self._concurrency.give_up(now)
                self.not_empty.notify_all()

    @property
    def running(self) -> int:
        """How many jobs were taken from here and have not ended."""
        return self.unfinished_tasks - self._qsize()

    @property
    def could_start(self) -> bool:
        """Whether a more urgent job would start soon: a thread is idle, or takes the next one from here presently."""
        return not self.holds_suspects and (bool(self.queue) or self.idle_threads > 0)

    @property
    def holds_suspects(self) -> bool:
        """Whether a suspect waits or runs: then nothing else is to be taken in."""
        return self._suspect_runs or bool(self._suspects)

    @property
    def idle_threads(self) -> int:
        """Threads with nothing to do and nothing waiting for them."""
        return 0 if self.holds_suspects else self.threads - self.unfinished_tasks

    def take_back(self, which: Callable[[RunningJob], bool]) -> list[RunningJob]:
        """Those of the jobs that still wait for a thread; they are no longer here. Suspects stay: given back they would come again, and
        never find the process empty."""
        with self.mutex:
            taken = [job for job in self.queue if which(job)]
            if taken:
                self.queue = [job for job in self.queue if not which(job)]
                self._forget(len(taken))
        return taken

    def close(self) -> list[RunningJob]:
        """Hand nothing out any more; the jobs that were not started."""
        with self.mutex:
            self.closed = True
            unstarted = [*self.queue, *self._suspects]
            self.queue.clear()
            self._suspects.clear()
            self._forget(len(unstarted))
            self.not_empty.notify_all()
        self.room.set()
        return unstarted

    def _signal_room(self) -> None:
        if len(self.expected) <= self.low_water:
            if self.low_since is None:
                self.low_since = time.monotonic()
            if not self.room.is_set():
                self.room.set()

    def _forget(self, jobs: int) -> None:
        self.unfinished_tasks -= jobs
        if self.unfinished_tasks == 0:
            self.all_tasks_done.notify_all()
