"""This process as a worker: its row in `workers`, what it has claimed, what it runs, and how it leaves.

It needs few connections, whatever the number of queues and threads: two for claims and one for urgent ones, one for outcomes and reports,
one for the heart, one for the chores.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import psycopg2

from jobsys import __version__, db, logs
from jobsys.attempts import AttemptLog
from jobsys.bulkheads import Bulkheads
from jobsys.chores import Chores
from jobsys.claims import LATEST_START, Claims
from jobsys.errors import DatabaseUnavailable, NotCommitted
from jobsys.heart import Heart
from jobsys.ids import new_job_id
from jobsys.job_types import encode
from jobsys.lookout import Lookout
from jobsys.measurements import Recorder
from jobsys.outcomes import Outcome, finish, plain_text, release
from jobsys.running import RunningJob
from jobsys.secrecy import mask
from jobsys.settlements import Settlements, Writer
from jobsys.work_queue import WorkQueue

if TYPE_CHECKING:
    from jobsys.broker import JobsBroker

OUTCOMES = {"finish": "completed", "retry": "failed", "bury": "failed", "release": "interrupted", "cancel_running": "interrupted"}
"""What /metrics calls it how a run ended."""
LAST_WORDS = 1.0
"""Seconds an interrupted job has to end when a shutdown's grace is used up."""
log = logs.get(__name__)


class Presence:
    """One per process and broker. `id` is the worker's; it changes when the worker was declared lost and comes back."""

    def __init__(self, broker: JobsBroker, *, threads: int, queues: Collection[str] | None = None) -> None:
        settings = broker.settings
        self.broker = broker
        self.settings = settings
        self.id = new_job_id()
        self.threads = threads
        self.queues = queues
        """The queues this process was told to serve; None: all that are declared."""
        self.serves = False
        """Whether threads of Dramatiq's take jobs from `work`; else somebody iterates over a consumer."""
        self.booted = threading.Event()
        """Set once these threads have all started. Before that a job could stop the process from becoming a worker, unnoticed:
        who starts a thread waits for it without end, should that lack memory or depth for its first steps."""
        self.work = WorkQueue(threads)
        self.running: set[RunningJob] = set()
        self.held: dict[str, RunningJob] = {}
        """Every job this process has claimed and not yet settled, by its id."""
        self.bulkheads = Bulkheads(threads, broker.job_types)
        self.suspect: str | None = None
        """The job that runs alone, if one does."""
        self.must_end = threading.Event()
        """Set when a job could not be stopped: the process has to end, and be replaced."""
        self._database = db.Database(broker.database.url, size=4, wait=30, name="jobsys worker")
        self.measurements = broker.measurements
        self.recorder = Recorder(
            self.measurements,
            kind="worker",
            every=settings.worker_heartbeat,
            database=self._database,
            pools=[self._database, broker.database],
        )
        self.settlements = Settlements(
            self._database,
            written=self._outcomes_were_written,
            lost=self._outcomes_were_lost,
            wrote=self.work.room.set,
            took=lambda seconds: self.measurements.observe("settle_seconds", (), seconds),
        )
        self.claims = Claims(
            self._database,
            self.work,
            worker=lambda: self.id,
            types=lambda: list(broker.actors),
            rooms=self.bulkheads.rooms,
            make=self._hold,
            backlog=lambda: len(self.settlements),
            poll_interval=settings.poll_interval,
            took=self._note_claim,
        )
        self.attempts = AttemptLog(settings.log_attempts)
        self._reporting = threading.Lock()
        self._untold: list[RunningJob] = []
        """The jobs of a report that could not be written."""
        self._holding = threading.Lock()
        self.telling = threading.Lock()
        """Held while the database is told what runs alone, so that no older word overtakes a newer one."""
        self._left = False
        self._heart = Heart(self)
        self._chores = Chores(self)
        self._lookout = Lookout(self)
        self._writer = Writer(self.settlements, self.work)

    def start(self) -> None:
        """Register, and start the heart and the chores. When the database is away the heart goes on trying."""
        self._heart.start()
        self._heart.first_beat.wait(5)
        self._chores.start()
        self._lookout.start()
        self._writer.start()

    @property
    def threads_it_needs(self) -> list[threading.Thread]:
        """Without any of these the process is no worker."""
        return [self._heart, self._chores, self._lookout, self._writer]

    @property
    def served(self) -> Collection[str]:
        """The queues this process serves."""
        return self.broker.get_declared_queues() if self.queues is None else self.queues

    def row(self) -> dict[str, Any]:
        """What the row in `workers` says of this process."""
        return {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": __version__,
            "queues": sorted(self.served),
            "types": sorted(name for name, actor in self.broker.actors.items() if actor.queue_name in self.served),
            "threads": self.threads,
            "heartbeat": self.settings.worker_heartbeat,
            "lost_after": self.settings.worker_lost_after,
        }

    def come_back(self) -> None:
        """This worker was declared lost: its jobs belong to others now. Be a new one, and stop what still runs."""
        log.warning("this worker was declared lost and comes back as a new one", lost=self.id, running=len(self.running))
        self.id = new_job_id()
        for job in list(self.running):
            job.stop("lost")

    def give_back_unheld(self) -> None:
        """Give back what the database says this worker has, and it doesn't know of: the answer to a claim was lost on the way."""
        stray = self._database.run("unheld", worker=self.id, held=list(self.held))
        stray = [(id, claim) for id, claim in stray if id not in self.held]
        if stray:
            log.warning("giving back jobs whose claim was not answered", jobs=len(stray))
            ids, claims = zip(*stray, strict=True)
            self._database.run("release", id=list(ids), claim=list(claims))

    def give_back_unstarted(self) -> None:
        """Give back what was claimed and then found no free thread: another process may have one, and more urgent jobs may have come."""
        latest = time.monotonic() - LATEST_START
        self._give_back(lambda job: job.claimed_at < latest)

    def begin(self, job: RunningJob) -> bool:
        """A thread is about to start a job. False: it must not, because this worker was declared lost meanwhile and the job is no longer
        its own, or because it is a suspect and the database can't be told."""
        self.running.add(job)
        if job.worker != self.id or (job.suspect and not self._runs_alone(job.message_id)):
            return False
        job.began_at = time.monotonic()
        self.measurements.observe("job_wait_seconds", (job.actor_name, job.queue_name), job.waited + job.began_at - job.claimed_at)
        return True

    @property
    def unfinished(self) -> list[RunningJob]:
        """The running jobs whose end is not decided."""
        return [job for job in list(self.running) if job.outcome is None]

    def settle(self, job: RunningJob, outcome: Outcome) -> None:
        """Have it written how an attempt ended."""
        if job.outcome is None:
            job.ended_at = time.monotonic()
        if job.job.unreported or job.job.latest:
            self.report([job])
        self.work.expected.discard(job)
        if outcome.statement in ("retry", "bury") and not job.job.completing:
            self._count_failure(outcome)
        self.settlements.add(outcome, soon=not self.work.queue or self._is_waited_for(outcome))
        self.running.discard(job)
        if self.suspect == job.message_id:
            self._runs_alone(None)

    def report(self, jobs: list[RunningJob]) -> None:
        """Write the log lines and progress of running jobs. When the database is away, they wait for the next report, also those of jobs
        that end meanwhile."""
        with self._reporting:
            jobs, self._untold = [*{*jobs, *self._untold}], []
            lines, latest = [], []
            for job in jobs:
                taken, job.job.unreported = job.job.unreported, []
                lines += [(job, at, kind, text) for at, kind, text in taken]
                progress, job.job.latest = job.job.latest, None
                if progress is not None:
                    latest.append((job, progress))
            if not lines and not latest:
                return
            try:
                self._database.run("report", **_report(lines, latest))
            except DatabaseUnavailable:
                for job, at, kind, text in reversed(lines):
                    job.job.unreported.insert(0, (at, kind, text))
                for job, progress in latest:
                    job.job.latest = job.job.latest or progress
                self._untold = [job for job in jobs if job.job.unreported or job.job.latest]
            except Exception:
                log.exception("a report of running jobs could not be stored")

    def write_off(self, job: RunningJob, exception: BaseException) -> None:
        """A job ignores every request to stop: decide for it as if it had raised, and have the process replaced."""
        log.error(
            "job can't be stopped, its process will be replaced", job_id=job.message_id, type=job.actor_name, reason=job.job.stop_reason
        )
        job.stuff_exception(exception)
        self.broker.emit_after("process_message", job, exception=exception)
        consumer = self.broker.consume(job.queue_name)
        consumer.nack(job) if job.failed else consumer.ack(job)
        self.must_end.set()

    def stop_claiming(self) -> None:
        """Take no new job, give back at once what was not started, and let running jobs know.

        To be repeated while the process ends: a claim that was on its way may still arrive."""
        self.claims.close()
        for job in self.work.close():
            self.settle(job, release(job))
        for job in list(self.running):
            job.stop("shutdown")

    def leave(self) -> None:
        """The end: interrupt what still runs, give it back, write what waits, and take the row away."""
        if self._left:
            return
        self._left = True
        self.stop_claiming()
        if unfinished := self.unfinished:
            log.warning("interrupting jobs that still run", running=len(unfinished))
            for job in unfinished:
                job.job.must_end = True
                job.attempt_call.throw()
            deadline = time.monotonic() + LAST_WORDS
            while self.unfinished and time.monotonic() < deadline:
                time.sleep(0.01)
        self._lookout.stop()
        self._chores.stop()
        self._heart.stop()
        # Last, because somebody else may start them at once, and this process must be all but gone then. Also what was claimed and is still
        # on its way into memory.
        self.stop_claiming()
        for job in list(self.held.values()):
            if job.outcome is None:
                self.settle(job, release(job))
        self._writer.stop()
        self.report([])
        try:
            self.settlements.write_all(LAST_WORDS)
            self.attempts.sum_up()
            self._database.run("unregister_worker", id=self.id)
            self.recorder.leave()
        except DatabaseUnavailable as error:
            log.warning("left without the database; others will rescue what this worker had", error=str(error))
        self._database.close()

    def _note_claim(self, seconds: float) -> None:
        self.measurements.observe("claim_seconds", (), seconds)
        self.settlements.follow_claim()

    def _is_waited_for(self, outcome: Outcome) -> bool:
        """Whether other jobs, an operator or this one's next attempt can go on only when this outcome is written."""
        job = outcome.job
        return outcome.statement not in ("finish", "bury") or bool(job.followups) or job.suspect or self.claims.may_wait_for(job)

    def _note_success(self, job: RunningJob) -> None:
        if self.bulkheads.succeeded(job):
            log.info("a type is held back no longer, a job of it succeeded", type=job.actor_name)

    def _count_failure(self, outcome: Outcome) -> None:
        """Hold a type back while all its jobs fail alike. What is the job's own fault says nothing of the others."""
        job = outcome.job
        if outcome.final:
            self._note_success(job)
        elif pause := self.bulkheads.failed(job, outcome.parameters["fingerprint"]):
            log.warning("a type is held back, its jobs all fail the same way", type=job.actor_name, next_trial_in=f"{pause:g} s")
            self._give_back(lambda other: other.actor_name == job.actor_name)

    def _give_back(self, which: Callable[[RunningJob], bool]) -> None:
        for job in self.work.take_back(which):
            self.settle(job, release(job))

    def _runs_alone(self, suspect: str | None) -> bool:
        """Say which job runs alone, or that none does; whether that could be said."""
        if suspect is not None:
            log.warning("a job runs alone, because it was there when workers died", job_id=suspect)
        with self.telling:
            self.suspect = suspect
            try:
                return bool(self._database.run("run_alone", id=self.id, job=suspect))
            except (DatabaseUnavailable, psycopg2.Error) as error:
                log.warning("what runs alone could not be said; the next beat says it", error=str(error).strip())
                return False

    def _hold(self, rows: list[db.Row]) -> list[RunningJob]:
        jobs = [self.broker.make_running(row, self.id) for row in rows]
        with self._holding:
            self.held.update((job.message_id, job) for job in jobs)
        too_many = self.bulkheads.enter(jobs)
        for job in too_many:
            self.settle(job, release(job))
        return [job for job in jobs if job.outcome is None] if too_many else jobs

    def _outcomes_were_written(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.statement == "finish":
                self._note_success(outcome.job)
            elif outcome.statement in ("retry", "bury") and outcome.job.job.completing:
                self._count_failure(outcome)
        self._forget([outcome.job for outcome in outcomes])
        self._note_runs(outcomes)

    def _outcomes_were_lost(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            job = outcome.job
            if not job.job.completing:
                log.warning("an outcome came too late: the job is no longer this worker's", job_id=job.message_id, outcome=job.outcome)
            elif outcome.parameters.get("type") in (None, NotCommitted.__name__):
                self._note_runs([finish(job)])
                self._note_success(job)
            else:
                log.warning(
                    "a job raised after complete_in, and was over by then", job_id=job.message_id, error=outcome.parameters["message"]
                )
        self._forget([outcome.job for outcome in outcomes])

    def _note_runs(self, outcomes: list[Outcome]) -> None:
        alike: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
        for outcome in outcomes:
            self.attempts.add(outcome)
            job = outcome.job
            if job.began_at is not None:
                alike[job.actor_name, job.queue_name, OUTCOMES[outcome.statement]].append(job.ended_at - job.began_at)
        for labels, seconds in alike.items():
            self.measurements.observe("job_run_seconds", labels, *seconds)

    def _forget(self, jobs: list[RunningJob]) -> None:
        with self._holding:
            for job in jobs:
                if self.held.get(job.message_id) is job:
                    del self.held[job.message_id]
        self.bulkheads.leave(jobs)
        self.claims.ended(jobs)


def _report(lines: list[Any], latest: list[Any]) -> dict[str, list[Any]]:
    now = time.monotonic()
    return {
        "id": [job.message_id for job, _ in latest],
        "claim": [job.claim for job, _ in latest],
        "progress": [encode({**progress, "message": mask(plain_text(progress["message"], 500))}) for _, progress in latest],
        "job_id": [job.message_id for job, *_ in lines],
        "ago": [now - at for _, at, _, _ in lines],  # by the database's clock, not by this machine's
        "kind": [kind for _, _, kind, _ in lines],
        "attempt": [job.attempt for job, *_ in lines],
        "message": [mask(plain_text(text, 5_000)) for *_, text in lines],
    }
