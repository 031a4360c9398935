"""The queue's real SQL against a model of a few lines: Hypothesis looks for steps after which the two disagree.

Several workers, some of them lost, use the claims they have and claims they had; operators and chores come between; time is moved in the
database, whose clock is the clock. `MODEL_EXAMPLES=5000` looks longer, `MODEL_SEED=…` looks at what a failed run looked at.
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from test_queue import BEGINNING, Worker

from jobsys import db
from jobsys.errors import IdempotencyConflict, JobNotFound, WrongState
from jobsys.job_types import PRIORITIES
from jobsys.system import JobSystem, Submission

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", 100))
STEPS = 40
MAX_CRASHES = 3
TYPES = {"TEST_JOB": ("default", {}), "INGEST_BATCH": ("ingestion", {"ids": [1]})}
ENDED = ("COMPLETED", "FAILED", "DEAD", "CANCELLED")
SECOND, HOUR, DAY = 1_000, 3_600_000, 86_400_000  # the model's clock counts milliseconds, and a step is one
BEAT, LOST_AFTER, SPACING = 60 * SECOND, 600 * SECOND, 1800 * SECOND
LONG_AGO = -(10**12)

types = st.sampled_from(sorted(TYPES))
recent_claims = st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True)
"""0 is the latest that was made; some of them are void."""
queues = st.sampled_from(["default", "ingestion"])


@dataclass(eq=False)
class Modelled:
    """A job as it should be."""

    id: str
    type: str
    priority: int
    key: str | None
    created: int
    due: int
    status: str
    attempt: int = 0
    crashes: int = 0
    claim: int = 0
    worker: str | None = None
    started: int = 0
    finished: int | None = None
    stop: str | None = None
    progress: int | None = None
    failures: int = 0
    run_at: Any = None  # decides between jobs that fell due in the same step

    @property
    def queue(self) -> str:
        return TYPES[self.type][0]

    def __repr__(self) -> str:
        return f"<{self.id[-4:]} {self.status}>"


@dataclass
class Process:
    """A row in `workers` as it should be."""

    heard: int
    session: bool = True
    suspect: str | None = None


@dataclass
class Limits:
    """A row in `queues` as it should be."""

    paused: bool = False
    max_running: int | None = None
    paced: bool = False
    next_start: int = LONG_AGO

    @property
    def any(self) -> bool:
        return self.paused or self.paced or self.max_running is not None


class Machine(RuleBasedStateMachine):
    """One step is what one party does to the queue. What it gets back, and the tables after it, must be what the model says."""

    jobs: Bundle[Modelled] = Bundle("jobs")
    workers: Bundle[Worker] = Bundle("workers")

    def __init__(self, system: JobSystem) -> None:
        super().__init__()
        self.system = system
        self.run = system.database.run
        self.execute("truncate jobs, failures, events, workers, queues, tallies, tally_log")
        self.clock = 0
        self.made: list[tuple[Modelled, int]] = []
        self.known: dict[str, Modelled] = {}
        self.alive: dict[str, Process] = {}
        self.everybody: list[Worker] = []
        self.limits: defaultdict[str, Limits] = defaultdict(Limits)
        self.gone: list[Modelled] = []
        self.entered: Counter[str] = Counter()
        self.by_operator: set[str] = set()
        self.rows: dict[str, Any] = {}

    def execute(self, statement: str) -> list[Any]:
        with self.system.database.connection() as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    # The model

    def move(self, job: Modelled, status: str) -> None:
        job.status, job.finished = status, self.clock if status in ENDED else None
        job.worker = None if status in ("SCHEDULED", "PENDING") else job.worker
        self.entered[status] += 1

    def having(self, **fields: Any) -> list[Modelled]:
        return [job for job in self.known.values() if all(getattr(job, name) == value for name, value in fields.items())]

    def running(self, worker: Worker) -> list[Modelled]:
        return self.having(status="PROCESSING", worker=worker.id)

    def next_of(self, queue: str, priority: int, known_types: list[str]) -> list[Modelled]:
        waiting = self.having(status="PENDING", priority=priority)
        return sorted((j for j in waiting if j.queue == queue and j.type in known_types), key=lambda j: (j.due, j.run_at, j.id))

    def forget(self, jobs: list[Modelled]) -> None:
        for job in jobs:
            self.gone.append(self.known.pop(job.id))

    # Submitting

    @initialize(target=workers)
    def first_worker(self) -> Any:
        return self.register()

    @initialize(target=jobs)
    def first_jobs(self) -> Any:
        return self.submit_many("TEST_JOB", 3)

    def add(self, id: str, type: str, priority: str, delay: int, key: str | None = None) -> Modelled:
        job = Modelled(id, type, PRIORITIES[priority], key, self.clock, self.clock + delay, "SCHEDULED" if delay else "PENDING")
        self.known[id] = job
        self.entered.update(["CREATED", job.status])
        return job

    @rule(
        target=jobs,
        type=types,
        priority=st.sampled_from(sorted(PRIORITIES)),
        delay=st.sampled_from([0, 0, HOUR, 2 * HOUR]),
        key=st.sampled_from([None, None, "a", "b"]),
    )
    def submit(self, type: str, priority: str, delay: int, key: str | None) -> Any:
        first = next(iter(self.having(key=key)), None) if key else None
        try:
            record = self.system.submit(type, TYPES[type][1], priority=priority, delay=delay / SECOND or None, idempotency_key=key)
        except IdempotencyConflict:
            assert first and (first.type, first.priority) != (type, PRIORITIES[priority])
            return multiple()
        assert record.replayed == bool(first)
        if first:
            assert (record.id, type, PRIORITIES[priority]) == (first.id, first.type, first.priority)
            return multiple()
        job = self.add(record.id, type, priority, delay, key)
        assert record.status == job.status
        return job

    @rule(target=jobs, type=types, n=st.integers(2, 3))
    def submit_many(self, type: str, n: int) -> Any:
        return multiple(
            *(self.add(id, type, "default", 0) for id in self.system.submit_many(Submission(type, TYPES[type][1]) for _ in range(n)))
        )

    # Workers

    @rule(target=workers)
    def register(self) -> Any:
        seconds = {"heartbeat": BEAT / SECOND, "lost_after": LOST_AFTER / SECOND}
        worker = Worker(self.system.database, host=str(len(self.alive)), pid=self.clock, **seconds)
        self.alive[worker.id] = Process(self.clock)
        self.everybody.append(worker)
        return worker

    def take(self, rows: list[db.Row], worker: Worker, expected: list[Modelled]) -> None:
        """These jobs and no others were claimed, most urgent first."""
        rows.sort(key=itemgetter(2, 8, 0))
        assert [row[0] for row in rows] == [job.id for job in sorted(expected, key=lambda j: (j.priority, j.due, j.run_at, j.id))]
        for id, type, _, _, _, attempt, claim, *_ in rows:
            job = self.known[id]
            assert (type, attempt) == (job.type, job.attempt + 1)
            assert claim > job.claim, "a claim number is never used again"
            job.attempt, job.claim, job.worker, job.started, job.progress = attempt, claim, worker.id, self.clock, None
            self.move(job, "PROCESSING")
            self.made.append((job, claim))

    def may_claim(self, worker: Worker) -> bool:
        """Who was declared lost may not, nor who was reported dead and has not beaten since."""
        return worker.id in self.alive and self.alive[worker.id].heard != LONG_AGO

    @rule(
        worker=workers,
        n=st.integers(1, 4),
        names=st.sampled_from([["default", "ingestion"], ["ingestion", "default"], ["default"]]),
        all_types=st.sampled_from([True, True, False]),
        ahead_of=st.sampled_from([None, None, *PRIORITIES.values()]),
    )
    def claim(self, worker: Worker, n: int, names: list[str], all_types: bool, ahead_of: int | None = None) -> None:
        known_types = sorted(TYPES) if all_types else ["TEST_JOB"]
        places = [(queue, priority) for priority in sorted(PRIORITIES.values()) for queue in names]
        expected = [job for place in places if not self.limits[place[0]].any for job in self.next_of(*place, known_types)]
        if ahead_of is not None:
            expected = [job for job in expected if job.priority < ahead_of] or expected
        rows = self.run(
            "claim",
            worker=worker.id,
            types=known_types,
            queues=[queue for queue, _ in places],
            priorities=[priority for _, priority in places],
            from_run_at=[BEGINNING[0]] * len(places),
            from_id=[BEGINNING[1]] * len(places),
            n=n,
            turn="wait" if n > 1 else None,
            ahead_of=ahead_of,
        )
        self.take(rows, worker, expected[:n] if self.may_claim(worker) else [])

    @rule(worker=workers, n=st.integers(1, 4), queue=queues)
    def claim_limited(self, worker: Worker, n: int, queue: str) -> None:
        """As `Claims` does it, for whoever holds the gate."""
        with self.system.database.transaction() as connection:
            gate = db.run(connection, "open_gate", queue=queue)
            if not gate:
                return
            limits = self.limits[queue]
            paused, max_running, paced, next_start_in = gate[0]
            assert (paused, max_running, paced) == (limits.paused, limits.max_running, limits.paced)
            assert (next_start_in > 0) == (limits.next_start > self.clock)
            if paused or (paced and next_start_in > 0):
                return
            [(running,)] = db.run(connection, "count_running", queue=queue)
            assert running == sum(job.queue == queue for job in self.having(status="PROCESSING"))
            room = min(n, n if max_running is None else max_running - running, 1 if paced else n)
            if room <= 0:
                return
            rows = db.run(connection, "claim_limited", worker=worker.id, queue=queue, types=sorted(TYPES), n=room)
            if rows and paced:
                db.run(connection, "spend_start", queue=queue)
                limits.next_start = self.clock + SPACING
        expected = [job for priority in sorted(PRIORITIES.values()) for job in self.next_of(queue, priority, sorted(TYPES))]
        self.take(rows, worker, expected[:room] if self.may_claim(worker) else [])

    def some(self, numbers: list[int]) -> list[tuple[Modelled, int]]:
        return [self.made[-1 - number] for number in numbers if number < len(self.made)]

    def fenced(self, statement: str, numbers: list[int], **columns: Any) -> list[Modelled]:
        """Write outcomes of these claims. The jobs that it counts for are those which still run under the same claim."""
        claims = self.some(numbers)
        held = [job for job, claim in claims if job.id in self.known and (job.status, job.claim) == ("PROCESSING", claim)]
        fence = {"id": [job.id for job, _ in claims], "claim": [claim for _, claim in claims]}
        rows = self.run(statement, **fence, **{name: [value] * len(claims) for name, value in columns.items()})
        assert sorted(id for (id,) in rows) == sorted(job.id for job in held)
        return held

    @rule(claims=recent_claims)
    def finish(self, claims: list[int]) -> None:
        for job in self.fenced("finish", claims, result='"done"'):
            self.move(job, "COMPLETED")

    @rule(claims=recent_claims, worker=workers, delay=st.sampled_from([0, HOUR]))
    def retry(self, claims: list[int], worker: Worker, delay: int) -> None:
        failure = {"options": "{}", "type": "E", "message": "m", "traceback": "t", "fingerprint": "f"}
        for job in self.fenced("retry", claims, worker=worker.id, delay=delay / SECOND, **failure):
            job.due, job.failures = self.clock + delay, job.failures + 1
            self.entered["RETRIED"] += not job.stop
            self.move(job, "CANCELLED" if job.stop else "SCHEDULED" if delay else "PENDING")

    @rule(claims=recent_claims, status=st.sampled_from(["FAILED", "DEAD"]))
    def bury(self, claims: list[int], status: str) -> None:
        failure = {"options": "{}", "type": "E", "message": "m", "traceback": "t", "fingerprint": "f"}
        for job in self.fenced("bury", claims, status=status, **failure):
            job.failures += 1
            self.move(job, status)

    @rule(claims=recent_claims)
    def release(self, claims: list[int]) -> None:
        for job in self.fenced("release", claims):
            job.attempt, job.worker = job.attempt - 1, None
            self.move(job, "CANCELLED" if job.stop else "PENDING")

    @rule()
    def come_late(self) -> None:
        """Nothing counts that is said under a claim which is void."""
        void = [n for n, (job, claim) in enumerate(reversed(self.made)) if (job.status, job.claim) != ("PROCESSING", claim)][:6]
        if void:
            for say in (self.finish, self.release, self.cancel_running, self.report):
                say(void)
            self.bury(void, "DEAD")
            self.retry(void, self.everybody[0], 0)

    @rule(claims=recent_claims, worker=workers)
    def lose_to_another(self, claims: list[int], worker: Worker) -> None:
        """Given back and claimed again: the first claims are void, and who made them may not know."""
        self.release(claims)
        self.claim(worker, 4, ["default", "ingestion"], True)

    @rule(claims=recent_claims)
    def cancel_running(self, claims: list[int]) -> None:
        for job in self.fenced("cancel_running", claims):
            self.move(job, "CANCELLED")

    @rule(claims=recent_claims)
    def report(self, claims: list[int]) -> None:
        made = self.some(claims)
        ids, numbers = [job.id for job, _ in made], [claim for _, claim in made]
        lines = {"job_id": ids, "ago": [0.0] * len(ids), "kind": ["log"] * len(ids), "attempt": [1] * len(ids)}
        self.run("report", id=ids, claim=numbers, progress=[str(self.clock)] * len(ids), message=["hello"] * len(ids), **lines)
        for job, claim in made:
            if (job.status, job.claim) == ("PROCESSING", claim):
                job.progress = self.clock

    def what_is_asked_of(self, worker: Worker) -> None:
        running = self.running(worker)
        stopping = {(job.id, job.claim) for job in running if job.stop}
        assert set(self.run("stop_requests", worker=worker.id)) == stopping
        old = {(job.id, job.claim) for job in running if job.started < self.clock - 10 * SECOND}
        held = [job.id for job in running[:1]]
        assert set(self.run("unheld", worker=worker.id, held=held)) == {each for each in old if each[0] not in held}

    @rule(worker=workers, suspect=st.none() | jobs, beat=st.booleans())
    def say(self, worker: Worker, suspect: Modelled | None, beat: bool) -> None:
        """What runs alone; and that it lives, if it does."""
        id = suspect.id if suspect else None
        rows = self.run("beat", id=worker.id, suspect=id, held_back=[]) if beat else self.run("run_alone", id=worker.id, job=id)
        assert bool(rows) == (worker.id in self.alive)
        if rows:
            self.alive[worker.id].suspect = id
            if beat:
                self.alive[worker.id].heard, self.alive[worker.id].session = self.clock, True

    def lose_the_session(self, worker: Worker) -> None:
        self.execute(f"update workers set session_start = '-infinity' where id = '{worker.id}'")
        if worker.id in self.alive:
            self.alive[worker.id].session = False

    def leave(self, worker: Worker) -> None:
        self.run("unregister_worker", id=worker.id)
        if not self.running(worker):
            self.alive.pop(worker.id, None)

    @rule(worker=workers, what=st.sampled_from(["lose_the_session", "what_is_asked_of", "what_is_asked_of", "leave"]))
    def be(self, worker: Worker, what: str) -> None:
        getattr(self, what)(worker)

    # Chores

    @rule(by=st.sampled_from([300 * SECOND, HOUR, 2 * DAY]))
    def time_passes(self, by: int) -> None:
        self.clock += by
        moved = {"jobs": ("run_at", "created_at", "started_at", "finished_at"), "workers": ("heartbeat_at",), "queues": ("next_start_at",)}
        for table, columns in moved.items():
            changes = ", ".join(f"{column} = {column} - interval '{by} milliseconds'" for column in columns)
            self.execute(f"update {table} set {changes}")

    def promote(self) -> None:
        due = [job for job in self.having(status="SCHEDULED") if job.due <= self.clock]
        assert sorted(queue for (queue,) in self.run("promote")) == sorted(job.queue for job in due)
        for job in due:
            self.move(job, "PENDING")

    @rule(silence_counts=st.booleans())
    def who_is_lost(self, silence_counts: bool) -> None:
        limit = {id: self.clock - (LOST_AFTER if process.session else BEAT * 1.5) for id, process in self.alive.items()}
        lost = {id for id, process in self.alive.items() if process.heard == LONG_AGO or (silence_counts and process.heard < limit[id])}
        assert {id for (id,) in self.run("lost_workers", silence_counts=silence_counts)} == lost
        assert self.run("orphans") == []

    @rule(worker=workers, dies=st.sampled_from([True, True, False]), forget=st.sampled_from([False, False, True]))
    def rescue(self, worker: Worker, dies: bool, forget: bool) -> None:
        process = self.alive.get(worker.id)
        if dies and process:
            self.execute(f"update workers set heartbeat_at = '-infinity' where id = '{worker.id}'")
            process.heard = LONG_AGO
        with self.system.database.transaction() as connection:
            locked = db.run(connection, "lock_lost_worker", id=worker.id)
            assert bool(locked) == (process is not None and process.heard < self.clock - BEAT * 1.5)
            if not locked or process is None:
                return
            rows = db.run(connection, "rescue", worker=worker.id, max_crashes=MAX_CRASHES, message="gone")
            if forget:
                db.run(connection, "forget_worker", id=worker.id)
                del self.alive[worker.id]
        for job in (rescued := self.running(worker)):
            last = job.crashes + 1 >= MAX_CRASHES
            crashed = job.id == process.suspect if process.suspect else not (job.crashes and last)
            job.crashes, job.failures = job.crashes + crashed, job.failures + 1
            self.move(job, "CANCELLED" if job.stop else "DEAD" if crashed and last else "PENDING")
        assert sorted(rows) == sorted((job.id, job.status) for job in rescued)

    def prune(self) -> None:
        old = [job for job in self.known.values() if job.created < self.clock - DAY]
        gone = [job for job in old if job.finished is not None and job.finished < self.clock - DAY]
        assert self.run("prune", after=BEGINNING[1], days=1)[0][1:] == (len(old), len(gone))
        self.forget(gone)

    def remove_stopped(self) -> None:
        self.run("remove_stopped")
        self.forget([job for job in self.having(stop="remove") if job.status in ENDED])

    def sum_tallies(self) -> None:
        self.run("sum_tallies")
        assert self.execute("select * from tally_log") == []

    def look_at_the_numbers(self) -> None:
        """What happened is counted for good, so that now and then is often enough."""
        assert {worker.id for worker in self.system.workers()} == {*self.alive}
        live = {name: len(self.having(status=name.upper())) for name in ("pending", "scheduled", "processing")}
        names = {
            "created": "CREATED",
            "retried": "RETRIED",
            "success": "COMPLETED",
            "failed": "FAILED",
            "dlq": "DEAD",
            "cancelled": "CANCELLED",
        }
        counted = {name: self.entered[status] for name, status in names.items()}
        assert self.system.totals() == {f"jobs_{name}": n for name, n in {**live, **counted}.items()}

    @rule(chore=st.sampled_from(["promote", "prune", "remove_stopped", "sum_tallies", "look_at_the_numbers"]))
    def do(self, chore: str) -> None:
        getattr(self, chore)()

    # Operators

    def ask(self, verb: str, job: Modelled, *allowed: str) -> bool:
        """Whether the verb was obeyed, as the job's state has it."""
        self.by_operator.add(job.id)
        try:
            getattr(self.system, verb)(job.id, by="me")
        except JobNotFound:
            assert job.id not in self.known
            return False
        except WrongState:
            assert job.id in self.known and job.status not in allowed
            return False
        assert job.id in self.known and job.status in allowed
        return True

    def cancel(self, job: Modelled) -> None:
        if self.ask("cancel", job, "SCHEDULED", "PENDING", "PROCESSING"):
            if job.status == "PROCESSING":
                job.stop = job.stop or "cancel"
            else:
                self.move(job, "CANCELLED")

    def requeue(self, job: Modelled) -> None:
        if self.ask("retry", job, "FAILED", "DEAD", "CANCELLED"):
            job.attempt, job.crashes, job.due, job.stop, job.progress = 0, 0, self.clock, None, None
            self.entered["RETRIED"] += 1
            self.move(job, "PENDING")

    def dead_letter(self, job: Modelled) -> None:
        if self.ask("bury", job, "FAILED", "SCHEDULED", "PENDING"):
            self.move(job, "DEAD")

    def remove(self, job: Modelled) -> None:
        runs = job.status == "PROCESSING"
        if self.ask("remove", job, "SCHEDULED", "PENDING", "PROCESSING", *ENDED):
            if runs:
                job.stop = "remove"
            else:
                self.forget([job])

    @rule(number=st.integers(0, 5), verbs=st.lists(st.sampled_from(["cancel", "requeue", "dead_letter", "remove"]), min_size=1, max_size=2))
    def operate(self, number: int, verbs: list[str]) -> None:
        """On one of those that run, if there are some; now and then on one that is gone."""
        ordered = sorted(self.known.values(), key=lambda job: (job.status != "PROCESSING", job.id))
        for job in (ordered + self.gone[-1:])[number:][:1]:
            for verb in verbs:
                getattr(self, verb)(job)

    @rule(queue=queues, paused=st.sampled_from([False, False, True]))
    def pause(self, queue: str, paused: bool) -> None:
        (self.system.pause if paused else self.system.resume)(queue)
        self.limits[queue].paused = paused

    @rule(queue=queues, max_running=st.sampled_from([None, None, None, 2]), paced=st.sampled_from([False, False, False, True]))
    def limit(self, queue: str, max_running: int | None, paced: bool) -> None:
        self.system.limit(queue, max_running=max_running, rate=(2, 2 * SPACING / SECOND) if paced else None)
        self.limits[queue].max_running, self.limits[queue].paced = max_running, paced

    # After each step

    @invariant()
    def the_tables_are_as_the_model_says(self) -> None:
        self.clock += 1
        rows = self.execute(
            """select id::text, status::text, attempt, crashes, claim, worker::text, stop_requested::text, (progress)::text::int,
                   (select count(*) from failures where job_id = id), run_at,
                   to_jsonb(jobs) - array['run_at', 'created_at', 'started_at', 'finished_at'], finished_at - created_at
               from jobs"""
        )
        expected = {
            id: (job.status, job.attempt, job.crashes, job.claim, job.worker, job.stop, job.progress, job.failures)
            for id, job in self.known.items()
        }
        assert {row[0]: row[1:9] for row in rows} == expected
        for id, *_, run_at, _, _ in rows:
            self.known[id].run_at = run_at
        now = {row[0]: (row[1], *row[10:]) for row in rows}
        for id, row in self.rows.items():
            if row[0] in ENDED and id in now and id not in self.by_operator:
                assert now[id] == row, "an ended job changes only by an operator's verb"
        self.rows, self.by_operator = now, set()
        there = Counter(job.status for job in self.known.values())
        assert {status: n for status, n in self.system.counts().items() if n} == there


def test_whatever_is_done_in_whatever_order_the_queue_is_as_the_model_says(system: JobSystem) -> None:
    number = int(os.environ.get("MODEL_SEED") or random.getrandbits(32))
    print(f"MODEL_SEED={number}")
    profile = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )

    @seed(number)
    def machine() -> Machine:
        return Machine(system)

    run_state_machine_as_test(machine, settings=profile)  # type: ignore[arg-type]  # a function will do, it says
