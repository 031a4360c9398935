"""Taking jobs from the queue: how many, whose turn it is, where to look, and what to do when there is nothing.

A process takes what it will start within about 100 ms at the pace it has just measured: no-op jobs come by the hundred, slow ones only
into free threads, and so an urgent job never waits long behind claimed ones.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from operator import itemgetter
from typing import Any

from jobsys import db
from jobsys.errors import DatabaseUnavailable
from jobsys.job_types import PRIORITIES
from jobsys.running import RunningJob

AHEAD = 0.03
"""Seconds of work a process holds in memory."""
LATEST_START = 1.0
"""Seconds after which a job that is still held in memory goes back to the queue: the pace was measured on jobs that were faster."""
LARGEST_CLAIM = 500
Entry = tuple[tuple[int, str, str], RunningJob]
BEGINNING = ("-infinity", "00000000-0000-0000-0000-000000000000")
NAPS = (0.01, 0.05)
"""The first waits after falling asleep, in seconds: a job may have been inserted by somebody who did not see the sleeper yet."""


class WorkQueue(queue.PriorityQueue):
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
        self.room = threading.Event()
        self.closed = False
        self.low_water = 0
        """So many unstarted jobs, or fewer, make room for a claim."""
        self._suspects: list[Entry] = []
        self._suspect_runs = False

    def _qsize(self) -> int:
        return len(self.queue) + len(self._suspects)

    def put_all(self, jobs: list[RunningJob]) -> None:
        """Put some jobs at once."""
        with self.mutex:
            for job in jobs:
                self._put((0, job))
            self.unfinished_tasks += len(jobs)
            self.not_empty.notify(len(jobs))

    def _put(self, item: tuple[int, RunningJob]) -> None:
        job = item[1]
        heappush(self._suspects if job.suspect else self.queue, (job.order, job))

    def _get(self) -> tuple[int, RunningJob]:
        if self.queue:
            job = heappop(self.queue)[1]
        else:
            job = heappop(self._suspects)[1]
            self._suspect_runs = True
        self.expected.discard(job)
        return (0, job)

    @property
    def _startable(self) -> bool:
        if self._suspect_runs:
            return False
        return bool(self.queue) or (bool(self._suspects) and self.unfinished_tasks == len(self._suspects))

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        with self.not_empty:
            if block and not self.closed and not self._startable:
                self.not_empty.wait(timeout)
            if self._startable and not self.closed if block else self._qsize():
                return self._get()
        if self.closed:
            time.sleep(0.001)
        raise queue.Empty

    def task_done(self) -> None:
        with self.mutex:
            self.finished += 1
            self._forget(1)
            if self._suspect_runs or self._suspects:
                self._suspect_runs = False
                self.not_empty.notify_all()
        if len(self.expected) <= self.low_water and not self.room.is_set():
            self.room.set()

    @property
    def holds_suspects(self) -> bool:
        """Whether a suspect waits or runs: then nothing else is to be taken in."""
        return self._suspect_runs or bool(self._suspects)

    @property
    def idle_threads(self) -> int:
        """Threads with nothing to do and nothing waiting for them."""
        return 0 if self.holds_suspects else self.threads - self.unfinished_tasks

    def take_back(self, claimed_before: float) -> list[RunningJob]:
        """The jobs that were claimed before that moment (of time.monotonic) and still wait for a thread; they are no longer here."""
        with self.mutex:
            late = [job for _, job in [*self.queue, *self._suspects] if job.claimed_at < claimed_before]
            if late:
                self._keep(claimed_before)
                self._forget(len(late))
        return late

    def close(self) -> list[RunningJob]:
        """Hand nothing out any more; the jobs that were not started."""
        with self.mutex:
            self.closed = True
            unstarted = [job for _, job in [*self.queue, *self._suspects]]
            self._keep(math.inf)
            self._forget(len(unstarted))
            self.not_empty.notify_all()
        self.room.set()
        return unstarted

    def _keep(self, claimed_since: float) -> None:
        for entries in (self.queue, self._suspects):
            entries[:] = [entry for entry in entries if entry[1].claimed_at >= claimed_since]
            heapify(entries)

    def _forget(self, jobs: int) -> None:
        self.unfinished_tasks -= jobs
        if self.unfinished_tasks == 0:
            self.all_tasks_done.notify_all()


class Turns:
    """A lock that is given in the order it was asked for, so that no queue's consumer starves another's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        gate.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


class Claims:
    """The claims of one process. Each queue's consumer thread calls `take`; they share one connection by taking turns."""

    def __init__(
        self,
        database: db.Database,
        work: WorkQueue,
        *,
        worker: Callable[[], str],
        types: Callable[[], list[str]],
        make: Callable[[str, list[db.Row]], list[RunningJob]],
        backlog: Callable[[], int],
        poll_interval: float,
    ) -> None:
        self.work = work
        self.closed = False
        self._database = database
        self._worker = worker
        self._types = types
        self._make = make
        self._backlog = backlog
        self._poll_interval = poll_interval
        self._turns = Turns()
        self._bells: dict[str, threading.Event] = {}
        self._asleep: dict[str, int] = {}
        self._places: dict[str, dict[int, tuple[str, str]]] = {}
        self._look_from_start_at: dict[str, float] = {}
        self._priorities: dict[str, tuple[float, list[int]]] = {}
        self._limited: set[str] = set()
        self._limits_read_at = float("-inf")
        self._pace_samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def wake(self, queue_name: str) -> None:
        """Somebody says that a job of this queue is due."""
        if bell := self._bells.get(queue_name):
            bell.set()

    def wake_all(self) -> None:
        """Look at every queue again: something may have been missed."""
        for bell in list(self._bells.values()):
            bell.set()

    def close(self) -> None:
        """Claim nothing any more; every `take` returns at once."""
        self.closed = True
        self.wake_all()
        self.work.room.set()

    def take(self, queue_name: str, timeout: float) -> list[RunningJob]:
        """The next jobs of a queue, most urgent first; [] when there was none for `timeout` seconds. Raises DatabaseUnavailable."""
        bell = self._bells.setdefault(queue_name, threading.Event())
        deadline = time.monotonic() + timeout
        while not self.closed:
            bell.clear()
            with self._turns:
                room = self._wait_for_room(deadline)
                if room == 0 or self.closed:
                    return []
                rows, pause = self._claim(queue_name, room, deadline)
                jobs = self._make(queue_name, sorted(rows, key=_order))
                self.work.expected.update(jobs)
            if jobs:
                self._note_work(queue_name)
                return jobs
            wait = self._note_nothing(queue_name, pause)
            if wait and not bell.wait(wait) and time.monotonic() >= deadline:
                return []
        return []

    def _wait_for_room(self, deadline: float) -> int:
        while not self.closed:
            self.work.room.clear()
            room = self._room()
            if room > 0 or self.closed:
                return room
            left = deadline - time.monotonic()
            if left <= 0:
                return 0
            self.work.room.wait(left)
        return 0

    def _wait_for_free_thread(self, deadline: float) -> int:
        while not self.closed and time.monotonic() < deadline:
            self.work.room.clear()
            if self.work.idle_threads > 0 and not self.work.expected:
                return self.work.idle_threads
            self.work.room.wait(max(0.0, deadline - time.monotonic()))
        return 0

    def _room(self) -> int:
        ahead = int(self._pace() * AHEAD)
        self.work.low_water = ahead // 2
        unstarted = len(self.work.expected)
        if self._backlog() > 2 * LARGEST_CLAIM or self.work.holds_suspects:
            return 0
        free = self.work.idle_threads if unstarted == 0 else 0
        return min(max(free, ahead - unstarted if unstarted <= self.work.low_water else 0), LARGEST_CLAIM)

    def _pace(self) -> float:
        """Jobs finished per second, over the last tenths of a second."""
        now, finished = time.monotonic(), self.work.finished
        samples = self._pace_samples
        if now - samples[-1][0] > 0.02:
            samples.append((now, finished))
        while len(samples) > 1 and samples[1][0] < now - 2 * AHEAD:
            samples.popleft()
        then, before = samples[0]
        return (finished - before) / max(now - then, AHEAD)

    def _claim(self, queue_name: str, room: int, deadline: float) -> tuple[list[db.Row], float | None]:
        if time.monotonic() - self._limits_read_at > self._poll_interval:
            self._limited = {name for (name,) in self._database.run("limited_queues")}
            self._limits_read_at = time.monotonic()
        return self._claim_limited(queue_name, deadline) if queue_name in self._limited else (self._claim_freely(queue_name, room), None)

    def _claim_freely(self, queue_name: str, room: int) -> list[db.Row]:
        """Claim from where the last claim ended, or from the start: now and then (somebody may have committed late), and whenever
        fewer came than were asked for. So dead index entries, which an old snapshot keeps, are walked over rarely and not at each claim."""
        now = time.monotonic()
        from_start = now >= self._look_from_start_at.get(queue_name, 0.0)
        places = self._places.setdefault(queue_name, {})
        if from_start:
            places.clear()
        priorities = self._known_priorities(queue_name, now)
        begin = [places.get(priority, BEGINNING) for priority in priorities]
        rows = self._database.run(
            "claim",
            worker=self._worker(),
            queue=queue_name,
            types=self._types(),
            priorities=priorities,
            from_run_at=[run_at for run_at, _ in begin],
            from_id=[id for _, id in begin],
            n=room,
        )
        rows.sort(key=_order)
        for priority, run_at, id in map(_order, {row[2]: row for row in rows}.values()):
            places[priority] = (run_at + "+00", id)
        if len(rows) < room:
            self._look_from_start_at[queue_name] = 0.0
        elif from_start:
            self._look_from_start_at[queue_name] = now + max(AHEAD, 20 * (time.monotonic() - now))
        return rows

    def _known_priorities(self, queue_name: str, now: float) -> list[int]:
        """The named priorities, and whatever others Dramatiq's actors brought into this queue, looked up once in a while."""
        read_at, priorities = self._priorities.get(queue_name, (float("-inf"), []))
        if now - read_at > self._poll_interval:
            priorities = sorted({*PRIORITIES.values(), *(row[0] for row in self._database.run("priorities", queue=queue_name))})
            self._priorities[queue_name] = (now, priorities)
        return priorities

    def _claim_limited(self, queue_name: str, deadline: float) -> tuple[list[db.Row], float | None]:
        """Claim what the queue's limits allow, and only into free threads: what is claimed starts now, so the pace of the claims is the
        pace of the starts. When a start is allowed and no thread is free, it waits for one, with the turn in its hands: else the other
        queues' jobs would take every thread that comes free. Also says how long to wait for the next allowed start."""
        gate = self._database.run("look_at_gate", queue=queue_name, types=self._types())
        if not gate or gate[0][0] > 0:
            return [], gate[0][0] if gate else None
        room = self._wait_for_free_thread(deadline)
        if room <= 0:
            return [], 0.001
        with self._database.transaction() as connection:
            limits = db.run(connection, "open_gate", queue=queue_name)
            if not limits:
                return [], AHEAD
            paused, max_running, paced, next_start_in = limits[0]
            if paused:
                return [], None
            if paced and next_start_in > 0:
                return [], next_start_in
            if max_running is not None:
                room = min(room, max_running - db.run(connection, "count_running", queue=queue_name)[0][0])
            room = min(room, 1) if paced else room
            if room <= 0:
                return [], AHEAD
            rows = db.run(connection, "claim_limited", worker=self._worker(), queue=queue_name, types=self._types(), n=room)
            if rows and paced:
                db.run(connection, "spend_start", queue=queue_name)
        return rows, None

    def _note_work(self, queue_name: str) -> None:
        """Work was found. Only after a row of finds without a pause is it worth a write to say that this process is awake."""
        naps = self._asleep.get(queue_name, -1)
        if naps >= 0:
            if naps > 0:
                self._asleep[queue_name] = 0
            elif len(self.work.expected) > self.work.threads:
                with contextlib.suppress(DatabaseUnavailable):
                    self._database.run("wake", id=self._worker(), queue=queue_name)
                    self._asleep[queue_name] = -1

    def _note_nothing(self, queue_name: str, pause: float | None) -> float:
        """Nothing was found. How long to wait: not at all right after saying that this process sleeps, then longer and longer."""
        naps = self._asleep.get(queue_name, -1)
        self._asleep[queue_name] = naps + 1
        if naps < 0:
            self._database.run("sleep", id=self._worker(), queue=queue_name)
            return 0
        nap = NAPS[naps] if naps < len(NAPS) else self._poll_interval
        return nap if pause is None else min(pause, self._poll_interval)

    def forget(self) -> None:
        """This process is a new worker now: nobody knows what it sleeps on."""
        self._asleep.clear()
        self.wake_all()


_order = itemgetter(2, 8, 0)
"""Of a row that a claim returned: priority, run_at, id."""
