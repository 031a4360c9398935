"""The heart of a worker process: beats, hears notifications, and stops jobs that were cancelled or run too long.

It has a thread and a connection of its own, so that neither a slow statement nor a busy pool can make the process look dead. Losing
the connection is no death: the heart opens another, and the process keeps its running jobs.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg2

from jobsys import db, logs
from jobsys.errors import DatabaseUnavailable, JobStopped
from jobsys.middleware import TimeLimitExceeded
from jobsys.running import RunningJob

if TYPE_CHECKING:
    from jobsys.presence import Presence

COOPERATION = 1.0
"""Seconds a job has to end by itself once it was asked to; then JobStopped is thrown into its function."""
STUBBORNNESS = 5.0
"""Seconds after which a job that ignored that too costs its process."""
TICK = 0.1
SECOND_BEAT = 1.0
"""Seconds after which a new worker beats again, and learns how many there are by now: others have started with it."""
PAUSE = 0.01
"""Seconds from one time that a job is passed on to the next: where all are full, it would go round and round."""
log = logs.get(__name__)


class Heart(threading.Thread):
    """Beats until it is stopped."""

    def __init__(self, presence: Presence) -> None:
        super().__init__(name="jobsys heart", daemon=True)
        self.first_beat = threading.Event()
        self._presence = presence
        self._database = db.Database(presence.broker.database.url, wait=5, name="jobsys heart")
        self._connection: Any = None
        self._registered = ""
        self._introduced = ""
        self._stopped = threading.Event()
        self._woken, self._wake = os.pipe()
        self._beat_at = 0.0
        self._look_for_stops_at = 0.0
        self._pass_on_at = 0.0
        self._in_peace = False
        self._said_one_at_a_time = False

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._listen()
                self._beat()
                self._leave_in_peace()
                self._hear()
                self._ask_for_stops()
                self._enforce_stops()
                self._mind_the_interpreter()
            except (DatabaseUnavailable, psycopg2.Error) as error:
                self._reconnect(error)
                self._enforce_stops()
            except Exception:
                log.exception("the heart stumbled")
                self._stopped.wait(1)

    def stop(self) -> None:
        """Beat no more, and end the session."""
        self._stopped.set()
        with contextlib.suppress(OSError):  # closed by a job
            os.write(self._wake, b".")
        if self.is_alive() and threading.current_thread() is not self:
            self.join(5)
        self._close()
        for descriptor in (self._woken, self._wake):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _listen(self) -> None:
        if self._connection is None:
            self._connection = self._database.connect()
            with db.translated(), self._connection.cursor() as cursor:
                cursor.execute(f'listen jobsys; listen "jobsys {self._presence.id}"')  # what is for all, and what is for this worker
            self._beat_at = 0.0
            self._presence.claims.wake_all()

    def _beat(self) -> None:
        presence = self._presence
        if time.monotonic() < self._beat_at:
            return
        with db.translated():
            # Beat first, also when this process believes that it is not registered: the answer may have been lost.
            with presence.telling:
                beaten = db.run(self._connection, "beat", id=presence.id, suspect=presence.suspect, held_back=presence.bulkheads.held_back)
            newly = not beaten
            if newly:
                if self._registered == presence.id:
                    presence.come_back()
                beaten = db.run(self._connection, "register_worker", **presence.row())
            presence.claims.workers = beaten[0][0]
            self._registered = presence.id
            if self._introduced != presence.id:
                with self._connection.cursor() as cursor:
                    cursor.execute(f'listen "jobsys {presence.id}"')
                # By itself, because registering may have been done, and its answer lost.
                db.run(self._connection, "declare_types", **presence.broker.declared_types(presence.served))
                presence.claims.forget()
                self._introduced = presence.id
        every = presence.settings.worker_heartbeat
        self._beat_at = time.monotonic() + (min(every, SECOND_BEAT) if newly else every)
        self.first_beat.set()

    def _leave_in_peace(self) -> None:
        """A process that claims nothing any more is not to be told of jobs in others' place."""
        if self._presence.claims.closed and not self._in_peace:
            with db.translated():
                self._in_peace = bool(db.run(self._connection, "leave_in_peace", id=self._presence.id))

    def _hear(self) -> None:
        """Wait for a notification: until the next beat, or only for a tick while jobs run whose time may end."""
        unfinished = self._presence.work.unfinished_tasks  # not only those that run: for a moment between two none does
        wait = max(0.0, min(self._beat_at - time.monotonic(), TICK if unfinished else 1.0))
        if self._connection.notifies:  # came together with the answer to a statement
            wait = 0.0
        with db.translated():
            listening = select.poll()
            for descriptor in (self._connection.fileno(), self._woken):
                listening.register(descriptor, select.POLLIN)
            if any(descriptor != self._woken for descriptor, _ in listening.poll(wait * 1000)):
                self._connection.poll()
            while self._connection.notifies:
                queue_name = self._connection.notifies.pop(0).payload
                if not queue_name:
                    self._look_for_stops_at = 0.0
                elif not self._presence.claims.wake(queue_name) and time.monotonic() >= self._pass_on_at:
                    self._pass_on_at = time.monotonic() + PAUSE
                    db.run(self._connection, "pass_on", id=self._presence.id, queue=queue_name)

    def _ask_for_stops(self) -> None:
        presence = self._presence
        if presence.running and time.monotonic() >= self._look_for_stops_at:
            self._look_for_stops_at = time.monotonic() + presence.settings.poll_interval
            with db.translated():
                asked = {(id, claim) for id, claim in db.run(self._connection, "stop_requests", worker=presence.id)}
            for job in list(presence.running):
                if (job.message_id, job.claim) in asked:
                    job.stop("cancelled")

    def _enforce_stops(self) -> None:
        now = time.monotonic()
        for job in list(self._presence.running):
            if job.deadline is not None and now > job.deadline:
                job.stop("time limit")
            asked_at = job.stop_asked_at
            if asked_at is None or job.job.stop_reason == "shutdown" or job.outcome is not None:
                continue
            # A job that was lost is fenced off, and not worth the process.
            stubborn = now > asked_at + COOPERATION + STUBBORNNESS and job.job.stop_reason != "lost"
            if stubborn and not job.attempt_call.over:
                self._presence.write_off(job, _ending(job))
            elif now > asked_at + COOPERATION:
                job.attempt_call.throw()

    def _mind_the_interpreter(self) -> None:
        work = self._presence.work
        work.lose_patience()
        if work.one_at_a_time and work.threads > 1 and not self._said_one_at_a_time:
            self._said_one_at_a_time = True
            log.info("jobs keep Python busy and run one at a time here; more threads do not help, more processes do where a core is idle")

    def _reconnect(self, error: Exception) -> None:
        if self._stopped.is_set():
            return
        log.warning("the heart lost its connection", error=str(error).strip())
        self._close()
        self._stopped.wait(0.5)

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg2.Error):
                connection.close()


def _ending(job: RunningJob) -> BaseException:
    if job.job.stop_reason == "time limit":
        return TimeLimitExceeded("the attempt ran longer than its time limit, and could not be stopped")
    return JobStopped(job.job.stop_reason or "cancelled")
