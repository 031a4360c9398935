"""Taking jobs from the queue: how many, whose turn it is, where to look, and what to do when there is nothing.

A process takes what it will start within about 100 ms at the pace it has just measured (and within the time until the jobs are there):
no-op jobs come by the hundred, slow ones only into free threads. Where jobs compute, one at a time, it is twice as much, because each claim
interrupts one. A more urgent job that comes meanwhile overtakes them: see lookout.py.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection
from operator import itemgetter
from typing import NamedTuple

import psycopg2

from jobsys import db, logs
from jobsys.errors import DatabaseUnavailable, LockTimeout
from jobsys.job_types import PRIORITIES
from jobsys.running import RunningJob
from jobsys.work_queue import WorkQueue

AHEAD = 0.1
"""Seconds of work a process holds in memory…"""
AHEAD_COMPUTING = 0.2
"""…and while its jobs keep the interpreter busy: see concurrency.py. With jobs of 1 ms that saves 2 to 3 % of both cores."""
LATEST_START = 1.0
"""Seconds after which a job that is still held in memory goes back to the queue: the pace was measured on jobs that were faster."""
LARGEST_CLAIM = (250, 500)
"""Jobs; the second where there are MANY processes. Larger claims drain no-op jobs 3 % faster with two processes, and 10 % with 32; but an
urgent job waits 1 to 2 ms longer for a core, which such a claim keeps busy."""
MOST_UNWRITTEN = 1000
"""Outcomes that wait to be written. When there are more, nothing is claimed."""
LONGEST_AHEAD = 2.0
"""Seconds within which a queue is looked at from its start again: somebody may have committed late, or given jobs back."""
STAND_BY = (0.02, 0.25)
"""Seconds from one try to the next, the first and the longest, of a process that waited for its turn in vain."""
MANY = 16
"""From so many processes on the longest is longer, up to a second: one of them tries soon enough."""
LINE_UP = 0.4
"""Who stands by waits in line again after so many seconds for each worker process there is, because tries alone may fail for ever…"""
HANGING = 5.0
"""…and after this many at least. Then it is looked whether somebody has had the turn for that long: such a claim hangs."""
OCCUPIED = 0.1
"""Seconds without room for a claim, after which others are to be told first of jobs."""
IN_VAIN = 60.0
"""Seconds for which, if so, large claims don't ask for their turn."""
BEGINNING = ("-infinity", "00000000-0000-0000-0000-000000000000")
BRISK = 30.0
"""So many jobs in a tenth of a second, found in one queue by one process, are a crowd…"""
GATHER = 0.008
"""…for which it does not look more often than this, in seconds, and needs no notifications."""
NAPS = (0.01, 0.05)
"""The first waits after falling asleep, in seconds: a job may have been inserted by somebody who did not see the sleeper yet."""
UNKNOWN = float("-inf")
NAMED = sorted(PRIORITIES.values())
log = logs.get(__name__)


class StandBy(NamedTuple):
    """How a process stands that does not get its turn: how often it has tried, how often it has waited in line since, and when it does so
    again."""

    tries: int
    waits: int
    wait_at: float


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
    """The claims of one process. Each queue's consumer thread calls `take`. They share two connections by taking turns, of which one is for
    large claims, which may have to wait; a look whether anything waits takes a moment of a third."""

    def __init__(
        self,
        database: db.Database,
        work: WorkQueue,
        *,
        worker: Callable[[], str],
        types: Callable[[], list[str]],
        rooms: Callable[[], dict[str, int]] = dict,
        make: Callable[[list[db.Row]], list[RunningJob]],
        backlog: Callable[[], int],
        poll_interval: float,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.work = work
        self.workers = 1
        """How many worker processes there are."""
        self.above: int | None = None
        """While claims bring more jobs than can start at once: the priority that most of them have…"""
        self.overtake = threading.Event()
        """…and set when there may be a more urgent one."""
        self._database = database
        self._worker = worker
        self._types = types
        self._rooms = rooms
        self._bounded: Collection[str] = ()
        """The types of which this process may not take any number: see bulkheads.py."""
        self._crowds: dict[tuple[str, str], int] = {}
        """(queue, type) of which more wait than this process may take, and how many claims have brought none since."""
        self._full_before: dict[str, frozenset[str]] = {}
        self._make = make
        self._backlog = backlog
        self._took = took
        """Told how long each claim took that brought jobs."""
        self._poll_interval = poll_interval
        self._turns = Turns()
        self._large = threading.Lock()
        """Held for a claim of more jobs than there are threads: one queue's at a time."""
        self._no_turn_until = float("-inf")
        self._closing = threading.Event()
        self._standing_by: dict[str, StandBy] = {}
        """The queues whose turn this process does not get."""
        self._bells: dict[str, threading.Event] = {}
        self._naps: dict[str, int] = {}
        """The queues this process sleeps on, as its row says, and how often it has looked since."""
        self._sound: set[str] = set()
        """Those of them that it claims from only when it is told, or finds that anything waits there: it looks at all of them together."""
        self._looking = threading.Lock()
        self._looked_at = float("-inf")
        self._busy_above: float | None = None
        """What this process's row says that it is busy with, and until when that needs no correction downwards. UNKNOWN: no answer came."""
        self._busy_until = 0.0
        self._saying = threading.Lock()
        """Held while it is said how this process stands, so that no queue's consumer says otherwise in the same moment."""
        self._occupied = False
        """Whether this process's row says, or may say, that it has had no room for long."""
        self._found: dict[str, tuple[float, float]] = {}
        self._heard: set[str] = set()
        """The queues of which somebody said that a job is due, and that this process has not claimed from since."""
        self._passed_on_at: dict[str, float] = {}
        self._emptied: dict[str, float] = {}
        """The queues in which the last claim left nothing, and until when not to look again."""
        self._overtaken: set[str] = set()
        """The queues of which the last claim brought only what is more urgent than most: the next one brings whatever there is."""
        self._places: dict[str, dict[int, tuple[str, str]]] = {}
        self._look_from_start_at: dict[str, float] = {}
        self._priorities: defaultdict[str, list[int]] = defaultdict(lambda: NAMED)
        self._priorities_read_at: dict[str, float] = {}
        self._limited: set[str] = set()
        self._limits_read_at = float("-inf")
        self._lead = 0.0
        """Seconds from when a large claim is due until it brings its jobs, of late. (Threads that compute in Python keep it waiting for the
        interpreter.)"""
        self._left_some: set[str] = set()
        """The queues of which the last claim was a large one and brought all it asked for."""
        self._pace_samples: deque[tuple[float, int, float]] = deque([(time.monotonic(), 0, 0.0)])

    @property
    def closed(self) -> bool:
        """Whether nothing is claimed any more."""
        return self._closing.is_set()

    def wake(self, queue_name: str) -> bool:
        """Somebody says that a job of this queue is due. False: no thread is free for it, and another process should be told."""
        if bell := self._bells.get(queue_name):
            self._heard.add(queue_name)
            bell.set()
        if self.above is not None:
            self.overtake.set()
        return self.above is not None or self.work.idle_threads > 0

    def may_wait_for(self, job: RunningJob) -> bool:
        """Whether others of its queue or its type may only be claimed when it has ended, and that is written."""
        return job.queue_name in self._limited or job.actor_name in self._bounded

    def ended(self, jobs: list[RunningJob]) -> None:
        """Jobs have ended, and that is written: should their queue or their type have been full, it is no longer."""
        for queue_name in {job.queue_name for job in jobs if self.may_wait_for(job)}:
            if bell := self._bells.get(queue_name):
                bell.set()

    def wake_all(self) -> None:
        """Look at every queue again: something may have been missed."""
        for bell in list(self._bells.values()):
            bell.set()

    def close(self) -> None:
        """Claim nothing any more; every `take` returns at once."""
        self._closing.set()
        self.wake_all()
        self.overtake.set()
        self.work.room.set()

    def take(self, queue_name: str, timeout: float) -> list[RunningJob]:
        """The next jobs of a queue, most urgent first; [] when there was none for `timeout` seconds. Raises DatabaseUnavailable."""
        bell = self._bells.setdefault(queue_name, threading.Event())
        deadline = time.monotonic() + timeout
        while not self.closed:
            self._rest(queue_name, bell)
            if told := bell.is_set():
                bell.clear()
            pause = None
            if told or queue_name not in self._sound or self._something_waits(queue_name):
                if (claimed := self._claim_in_turn(queue_name, deadline)) is None:
                    return []
                jobs, pause = claimed
                if jobs:
                    return jobs
            if (standing := self._standing_by.get(queue_name)) is not None:
                shortest, longest = STAND_BY
                longest *= min(max(1.0, self.workers / MANY), 4.0)
                self._closing.wait(min(shortest * 2**standing.tries, longest) * random.uniform(0.8, 1.2))
                if time.monotonic() >= deadline:
                    return []
                continue
            wait = self._note_nothing(queue_name, pause)
            if wait and not bell.wait(wait) and time.monotonic() >= deadline:
                return []
        return []

    def claim_urgent(self) -> list[RunningJob]:
        """The most urgent of the jobs that are more urgent than those in memory, of whichever queue. Raises DatabaseUnavailable.

        For the lookout: takes no turn, and needs no room. Dramatiq's threads ask each job for its queue, so that it needn't come through
        that queue's consumer."""
        above = self.above
        if above is None or self.closed:
            return []
        looks = [
            (priority, queue_name)
            for queue_name in list(self._places)
            if queue_name not in self._limited
            for priority in self._priorities[queue_name]
            if priority < above
        ]
        if not looks:
            return []
        jobs, _ = self._claim_fitting([(queue_name, priority) for priority, queue_name in sorted(looks)], self.work.threads)
        return jobs

    def _wait_for(self, room: Callable[[], int], deadline: float) -> int:
        """The room for another claim, as soon as there is any; 0 when there is none until the deadline. While it is long in coming, others
        are told first of jobs."""
        occupied_at = time.monotonic() + OCCUPIED
        while not self.closed:
            self.work.room.clear()
            if (found := room()) > 0:
                return found
            now = time.monotonic()
            if now >= deadline:
                return 0
            if now >= occupied_at:
                occupied_at = now + OCCUPIED
                self._be_occupied()
            self.work.room.wait(min(deadline, occupied_at) - now)
        return 0

    def _free_threads(self) -> int:
        return 0 if self.work.expected else self.work.idle_threads

    def _room(self) -> int:
        """None until there are no more jobs left than start in an eighth of AHEAD, or in twice the time in which a claim brings others when
        that is longer; then for as many as make up AHEAD, or AHEAD_COMPUTING, when it has brought them, or for the largest claim. The fewer
        the claims, the less they cost."""
        pace = self._pace()
        ahead = int(pace * (AHEAD_COMPUTING if self.work.one_at_a_time else AHEAD))
        meanwhile = int(pace * self._lead)
        self.work.low_water = min(max(int(pace * AHEAD) // 8, 2 * meanwhile), ahead)
        unstarted = len(self.work.expected)
        if self._backlog() > MOST_UNWRITTEN or self.work.holds_suspects:
            return 0
        free = self.work.idle_threads if unstarted == 0 else 0
        return min(max(free, ahead + meanwhile - unstarted if unstarted <= self.work.low_water else 0), self._largest)

    @property
    def _largest(self) -> int:
        return LARGEST_CLAIM[self.workers >= MANY]

    def _note_lead(self, seconds: float) -> None:
        self._lead += (min(seconds, AHEAD) - self._lead) / 4

    def _pace(self) -> float:
        """How many jobs per second the threads can do: how many they did in the time in which at least one ran, because a process that
        waits for work is not slow. (Not by the time that each took: those that compute in Python would seem as many times too fast as there
        are threads, because one does several in a row while the others wait for the interpreter.) 0 when none has finished just now: what
        was measured before says nothing of those that run."""
        now, finished, active = time.monotonic(), self.work.finished, self.work.active_seconds
        if now - self.work.finished_at > AHEAD:
            return 0.0
        samples = self._pace_samples
        if now - samples[-1][0] > 0.02:
            samples.append((now, finished, active))
        while len(samples) > 1 and samples[1][0] < now - 2 * AHEAD:
            samples.popleft()
        _, finished_before, active_before = samples[0]
        return (finished - finished_before) / max(active - active_before, 1e-6)

    def _something_waits(self, queue_name: str) -> bool:
        """Whether anything waits in a queue on which this process sleeps soundly. Who asks first asks for all of them, and rings for the
        others."""
        with self._looking:
            now = time.monotonic()
            if now < self._looked_at + 0.9 * self._poll_interval:
                return False
            waiting = {name for (name,) in self._database.run("waiting_queues", queues=db.array(list(self._sound)))}
            self._looked_at = now
        for other in waiting - {queue_name}:
            self._bells[other].set()
        return queue_name in waiting

    def _claim_in_turn(self, queue_name: str, deadline: float) -> tuple[list[RunningJob], float | None] | None:
        """Claim as soon as there is room, the queues of this process in turns; and how long to wait before the next claim, where that is
        known. None: there was no room until the deadline."""
        slept, heard = queue_name in self._sound, queue_name in self._heard
        self._sound.discard(queue_name)
        self._heard.discard(queue_name)
        with self._turns:
            room = self._wait_for(self._room, deadline)
            if room == 0 or self.closed:
                return None
            large = room > self.work.threads and queue_name not in self._limited and self._large.acquire(blocking=False)
            if not large:
                room = min(room, self.work.threads)
                jobs, pause = self._claim(queue_name, room, deadline, slept)
        if large:  # it may have to wait for those of other processes, and the other queues of this one don't wait with it
            try:
                jobs, pause = self._claim(queue_name, room, deadline, slept)
            finally:
                self._large.release()
        try:
            self._note_due(queue_name, large and len(jobs) >= room)
            if jobs:
                self._note_work(queue_name, jobs, room)
            elif heard and self._full():
                self._pass_on(queue_name)
        except Exception:
            if not jobs:
                raise
            log.exception("what a claim says of those to come could not be noted; its jobs are done all the same", jobs=len(jobs))
        return jobs, pause

    def _note_due(self, queue_name: str, all_came: bool) -> None:
        """A claim has ended; all jobs came if it was a large one and brought as many as it asked for. How late such a one came is known if
        the one before was of the same kind; else the process may have had few jobs for long because there were none."""
        due_at, self.work.low_since = self.work.low_since, None
        if not all_came:
            self._left_some.discard(queue_name)
        elif queue_name not in self._left_some:
            self._left_some.add(queue_name)
        elif due_at is not None:
            self._note_lead(time.monotonic() - due_at)

    def _claim(self, queue_name: str, room: int, deadline: float, slept: bool) -> tuple[list[RunningJob], float | None]:
        """Claim, knowing which queues have limits and which priorities wait. Who slept starts a job at once by what it knew before, and
        looks around when that brings none."""
        if not slept:
            self._look_around(queue_name)
        known = self._known(queue_name)
        jobs, pause = self._claim_knowing(queue_name, room, deadline)
        if slept and not jobs:
            self._look_around(queue_name)
            if self._known(queue_name) != known:
                jobs, pause = self._claim_knowing(queue_name, room, deadline)
        return jobs, pause

    def _look_around(self, queue_name: str) -> None:
        """Look, once in a poll interval, which queues have limits, and which priorities besides the named ones wait in this one (Dramatiq's
        actors may have any); the latter more rarely the more processes there are while work comes briskly."""
        now = time.monotonic()
        if self._limits_read_at < now - self._poll_interval:
            self._limited = {name for (name,) in self._database.run("limited_queues")}
            self._limits_read_at = time.monotonic()
        every = self._poll_interval * (1 if queue_name in self._naps else self.workers)
        if queue_name not in self._limited and self._priorities_read_at.get(queue_name, UNKNOWN) < now - every:
            others = {priority for (priority,) in self._database.run("other_priorities", queue=queue_name, named=NAMED)}
            self._priorities[queue_name] = sorted(others.union(NAMED))
            self._priorities_read_at[queue_name] = time.monotonic()

    def _known(self, queue_name: str) -> tuple[bool, list[int]]:
        return queue_name in self._limited, self._priorities[queue_name]

    def _claim_knowing(self, queue_name: str, room: int, deadline: float) -> tuple[list[RunningJob], float | None]:
        if queue_name not in self._limited:
            return self._claim_freely(queue_name, room), None
        self._standing_by.pop(queue_name, None)
        return self._claim_limited(queue_name, deadline)

    def _claim_freely(self, queue_name: str, room: int) -> list[RunningJob]:
        """Claim from where the last claim ended, or from the start: now and then (somebody may have committed late), whenever fewer came
        than were asked for, and when a type that was full has room again. So dead index entries, which an old snapshot keeps, and the
        backlog of a full type are walked over rarely and not at each claim.

        Who claims many first takes what is more urgent than most that are in memory, if there is any: so few start at once, among hundreds
        of others when all of those are claimed. The next claim takes whatever there is: a trickle of urgent jobs keeps no thread idle."""
        now = time.monotonic()
        full = self._full()
        from_start = now >= self._look_from_start_at.get(queue_name, 0.0) or full != self._full_before.get(queue_name, full)
        self._full_before[queue_name] = full
        if from_start:
            self._places[queue_name] = {}
        looks = [(queue_name, priority) for priority in self._priorities[queue_name]]
        ahead_of = self.above if room > self.work.threads and queue_name not in self._overtaken else None
        jobs, all_found = self._claim_fitting(looks, room, self._turn(queue_name, room, now), ahead_of)
        if queue_name in self._standing_by:
            return jobs
        overtaken = ahead_of is not None and bool(jobs) and not all_found and all(job.priority < ahead_of for job in jobs)
        if overtaken:
            self._overtaken.add(queue_name)
            return jobs
        self._overtaken.discard(queue_name)
        if not all_found and not full:
            self._look_from_start_at[queue_name] = 0.0
        elif from_start:
            self._look_from_start_at[queue_name] = now + min(max(AHEAD, 20 * (time.monotonic() - now)), LONGEST_AHEAD)
        return jobs

    def _turn(self, queue_name: str, room: int, now: float) -> str | None:
        """What a claim has to do for its turn. Small ones disturb others little: nothing, unless this process stands by."""
        if now < self._no_turn_until:
            self._standing_by.pop(queue_name, None)
            return None
        if (standing := self._standing_by.get(queue_name)) is not None:
            return "wait" if now >= standing.wait_at else "try"
        return "wait" if room > self.work.threads else None

    def _full(self) -> frozenset[str]:
        """The types of which this process may take no more now."""
        return frozenset(name for name, room in self._rooms().items() if room == 0)

    def _claim_fitting(
        self, looks: list[tuple[str, int]], room: int, turn: str | None = None, ahead_of: int | None = None
    ) -> tuple[list[RunningJob], bool]:
        """Claim what this process may take; and whether there were as many as asked for. By one statement, unless a type that crowds has
        some room left: then first that many jobs of any type, in their order, and the rest without the types that are full by then."""
        queues = {queue_name for queue_name, _ in looks}
        jobs: list[RunningJob] = []
        give_up_at = time.monotonic() + HANGING
        while not self.closed:
            rooms = self._rooms()
            self._bounded = rooms.keys()
            crowds = [rooms[name] << misses for (queue, name), misses in list(self._crowds.items()) if queue in queues and rooms.get(name)]
            n = min([room - len(jobs), *crowds])
            try:
                rows = self._claim_at(looks, n, [name for name in self._types() if rooms.get(name, 1) > 0], turn, ahead_of)
            except LockTimeout:
                if not jobs and time.monotonic() < give_up_at:
                    continue  # a fresh look may not meet it, and else waits again: a migration, say, is soon over
                if not jobs:
                    log.warning("somebody has long had a lock on jobs, and claims wait for it", queues=sorted(queues))
                return jobs, False
            except (DatabaseUnavailable, psycopg2.Error) as error:
                if not jobs:
                    raise
                log.warning("a claim failed; what others brought is done first", jobs=len(jobs), error=str(error).strip())
                return jobs, False
            if rows is None:
                return jobs, False
            fitting = self._make(rows)
            self.work.expected.update(fitting)
            jobs += fitting
            self._note_crowds(queues, rooms, rows)
            if len(rows) < n:
                return jobs, False
            if len(jobs) >= room or not fitting:
                break
        return jobs, True

    def _note_crowds(self, queues: set[str], rooms: dict[str, int], rows: list[db.Row]) -> None:
        """A type crowds in a queue when a claim brought as many as there was room for. Each claim that then brings none may be followed by
        one twice as large, until it doesn't matter any more."""
        came = Counter((row[11], row[1]) for row in rows) if rooms else Counter()
        for queue in queues:
            for name in (name for name, room in rooms.items() if room > 0):
                if came[queue, name] >= rooms[name]:
                    self._crowds[queue, name] = 0
                elif not came[queue, name] and (queue, name) in self._crowds:
                    self._crowds[queue, name] += 1
                    if rooms[name] << self._crowds[queue, name] >= self._largest:
                        del self._crowds[queue, name]

    def _claim_at(
        self, looks: list[tuple[str, int]], room: int, types: list[str], turn: str | None, ahead_of: int | None
    ) -> list[db.Row] | None:
        """Claim from some queues and priorities, each from where the last claim of it ended. None: it was not its turn."""
        begin = [self._places.get(queue_name, {}).get(priority, BEGINNING) for queue_name, priority in looks]
        began = time.monotonic()
        rows = self._database.run(
            "claim",
            worker=self._worker(),
            types=db.array(types),
            queues=db.array(queue_name for queue_name, _ in looks),
            priorities=db.array(priority for _, priority in looks),
            from_run_at=db.array(run_at for run_at, _ in begin),
            from_id=db.array(id for _, id in begin),
            n=room,
            turn=turn,
            ahead_of=ahead_of,
        )
        if turn is not None:
            if rows and rows[0][0] is None:
                self._stand_by(looks[0][0])
                return None
            self._standing_by.pop(looks[0][0], None)
        if rows:
            self._took(time.monotonic() - began)
        rows.sort(key=_order)
        for row in {(row[11], row[2]): row for row in rows}.values():
            self._places.setdefault(row[11], {})[row[2]] = (row[8] + "+00", row[0])
        return rows

    def _stand_by(self, queue_name: str) -> None:
        """It was not this process's turn: as many as PostgreSQL has time for claim by the hundred already. These go on, with warm caches,
        and the others try now and then: when all of 32 took turns, two cores did a sixth fewer jobs."""
        now = time.monotonic()
        standing = self._standing_by.get(queue_name)
        first = standing is None
        again = now + max(HANGING, LINE_UP * self.workers)
        if standing is None:
            standing = StandBy(0, 0, again)
        elif now < standing.wait_at:
            standing = standing._replace(tries=min(standing.tries + 1, 8))
        else:
            standing = standing._replace(waits=standing.waits + 1, wait_at=again)
            if self._database.run("turn_hangs", queue=queue_name, seconds=HANGING, for_long=standing.waits > 3)[0][0]:
                log.warning("somebody's claim hangs; large claims don't wait for it", queue=queue_name)
                self._no_turn_until = now + IN_VAIN
        self._standing_by[queue_name] = standing
        if first:
            self._be_awake(queue_name)  # it tries by itself…
            if self.above is None:
                self._be_busy(PRIORITIES["default"])  # …and whose threads are idle is the first to go for urgent jobs

    def _claim_limited(self, queue_name: str, deadline: float) -> tuple[list[RunningJob], float | None]:
        """Claim what the queue's limits allow, and only into free threads: what is claimed starts now, so the pace of the claims is the
        pace of the starts. When a start is allowed and no thread is free, it waits for one, with the turn in its hands: else the other
        queues' jobs would take every thread that comes free. Also says how long to wait for the next allowed start."""
        rooms = self._rooms()
        self._bounded = rooms.keys()
        types = [name for name in self._types() if rooms.get(name, 1) > 0]
        gate = self._database.run("look_at_gate", queue=queue_name, types=types)
        if not gate or gate[0][0] > 0:
            return [], gate[0][0] if gate else None
        room = self._wait_for(self._free_threads, deadline)
        if room <= 0:
            return [], 0.001
        began = time.monotonic()
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
            rows = db.run(connection, "claim_limited", worker=self._worker(), queue=queue_name, types=types, n=room)
            rows.sort(key=_order)
            if rows and paced:
                db.run(connection, "spend_start", queue=queue_name)
        if rows:
            self._took(time.monotonic() - began)
        jobs = self._make(rows)
        self.work.expected.update(jobs)
        return jobs, None

    def _note_work(self, queue_name: str, jobs: list[RunningJob], room: int) -> None:
        """Work was found. When it comes briskly it is worth a write to say that this process is awake and needs no notifications."""
        if len(jobs) > self.work.threads and queue_name not in self._overtaken:
            self._be_busy(jobs[len(jobs) // 2].priority)
        brisk = self._briskness(queue_name, len(jobs)) > BRISK
        if brisk:
            self._be_awake(queue_name)
        left_some = queue_name in self._limited or queue_name in self._overtaken
        if len(jobs) < room and (brisk or queue_name in self._naps) and not left_some:
            self._emptied[queue_name] = time.monotonic() + (GATHER if brisk else NAPS[0])

    def _note_nothing(self, queue_name: str, pause: float | None) -> float:
        """Nothing was found. How long to wait: while work came briskly just now, a moment; not at all right after saying that this process
        sleeps; then longer and longer."""
        if not self.work.expected and not self._standing_by:
            self.above = None
        with self._saying:
            asleep = self._naps  # the heart may replace them just now
            if queue_name not in asleep:
                if self._briskness(queue_name, 0) > BRISK / 4:
                    return GATHER
                self._database.run("sleep", id=self._worker(), queue=queue_name)
                asleep[queue_name] = 0
                return 0
            naps = asleep[queue_name]
            if naps >= len(NAPS) and self.above is None and self._busy_above is not None:
                self._database.run("be_busy", id=self._worker(), above=None)
                self._busy_above = None
            if self._occupied and queue_name not in self._sound:
                self._database.run("be_occupied", id=self._worker(), occupied=False)
                self._occupied = False
            asleep[queue_name] = naps + 1
        if pause is not None:
            return min(pause, self._poll_interval)
        if naps < len(NAPS):
            return NAPS[naps]
        self._sound.add(queue_name)
        # Until the next look at all of them is due: who finds that it was made just now waits no longer than the others.
        wait = self._looked_at + self._poll_interval - time.monotonic()
        return wait if wait > 0 else self._poll_interval

    def _pass_on(self, queue_name: str) -> None:
        """This process was told of a job that may be of a type of which it may take no more just now: another one may. Once in a poll
        interval, because all may be full."""
        now = time.monotonic()
        if now - self._passed_on_at.get(queue_name, UNKNOWN) > self._poll_interval:
            self._passed_on_at[queue_name] = now
            self._database.run("pass_on", id=self._worker(), queue=queue_name)

    def _be_busy(self, above: int) -> None:
        """Jobs of this priority wait in memory. It is worth a write to hear of more urgent ones; to hear of fewer, now and then."""
        with self._saying:
            self.above = above
            now = time.monotonic()
            if above == self._busy_above:
                self._busy_until = now + LATEST_START
            elif self._busy_above is None or above > self._busy_above or now > self._busy_until:
                self._busy_above = above if self._say("be_busy", above=above) else UNKNOWN
                self._busy_until = now + LATEST_START
                self.overtake.set()  # one may have come before this was known

    def _be_awake(self, queue_name: str) -> None:
        """This process need not be told of jobs of this queue."""
        with self._saying:
            if queue_name in self._naps:
                # Whether or not it could be said: it may have been. Then this process has to say again that it sleeps, when it does.
                self._say("wake", queue=queue_name)
                self._naps.pop(queue_name, None)

    def _be_occupied(self) -> None:
        """Others are to be told of jobs first. That holds until a queue is found empty while there is room."""
        with self._saying:
            if not self._occupied:
                self._occupied = True
                self._say("be_occupied", occupied=True)

    def _say(self, statement: str, **parameters: object) -> bool:
        """Say how this process stands; whether that was answered. Jobs are in hand, which must not be lost over it, whatever is wrong."""
        try:
            self._database.run(statement, id=self._worker(), **parameters)
        except (DatabaseUnavailable, psycopg2.Error) as error:
            log.warning("how this process stands could not be said", statement=statement, error=str(error).strip())
            return False
        return True

    def _briskness(self, queue_name: str, found: int) -> float:
        """About how many jobs were found in the last tenth of a second, `found` of them now: each counts half after 70 ms."""
        now = time.monotonic()
        then, briskness = self._found.get(queue_name, (now, 0.0))
        briskness = briskness * 0.5 ** ((now - then) / 0.07) + found
        self._found[queue_name] = (now, briskness)
        return briskness

    def _rest(self, queue_name: str, bell: threading.Event) -> None:
        """Wait a moment after a claim that emptied the queue. While work comes briskly, the next one then brings more than a job or two;
        else nothing can have come of which nobody was told, and what was claimed starts the sooner."""
        left = self._emptied.pop(queue_name, 0.0) - time.monotonic()
        if left <= 0:
            return
        if queue_name in self._naps:
            bell.wait(left)
        else:
            time.sleep(left)

    def forget(self) -> None:
        """This process is a new worker now: nobody knows what it waits for, or only what it has just said."""
        self._naps = {}
        self._busy_above = UNKNOWN
        self._occupied = True
        self.wake_all()


_order = itemgetter(2, 8, 0)
"""Of a row that a claim returned: priority, run_at, id."""
