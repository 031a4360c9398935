"""Dramatiq's broker on the table `jobs`: the row is the message, the claim is the delivery, and `ack` and `nack` hand over how an
attempt ended, which settlements.py writes.

JobsBroker and JobsConsumer are dramatiq_pg's PostgresBroker and PostgresConsumer with everything below the interface replaced; the reasons
are in the README under design decisions. What a process is as a worker is presence.py.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

from dramatiq import Actor
from dramatiq.common import compute_backoff
from dramatiq.errors import ConnectionError, QueueJoinTimeout
from dramatiq.message import Message
from dramatiq.middleware import Middleware, MiddlewareError, SkipMessage
from dramatiq.results import ResultBackend, Results
from dramatiq.results.errors import ResultFailure, ResultMissing, ResultTimeout
from dramatiq_pg.broker import PostgresBroker, PostgresConsumer
from pydantic import ValidationError

from jobsys import db, tracing, trail
from jobsys.errors import DatabaseUnavailable, InvalidSubmission, NotCommitted
from jobsys.ids import new_job_id
from jobsys.job_types import PRIORITIES, JobType, Registry, encode
from jobsys.measurements import Measurements
from jobsys.middleware import NOT_FOR_PLAIN_JOBS, Stopping, stack, unreadable
from jobsys.outcomes import Outcome, bury, cancel, finish, release, retry, unstorable
from jobsys.presence import Presence
from jobsys.running import FORGOTTEN, RunningJob
from jobsys.settings import Settings
from jobsys.straight import StraightWay
from jobsys.submissions import Submitted, insert

PATIENCE = 3.0
"""Seconds in which the end of an attempt is tried again where the process lacks memory or depth."""

OTHERS = ("others", True)
"""Where it is kept with them which listeners are not ours."""


class JobsBroker(PostgresBroker):
    """The broker. Opens no connection before something is sent or consumed."""

    def __init__(self, database: db.Database, *, settings: Settings) -> None:
        own = stack(settings)
        super().__init__(pool=database, results=False, middleware=own)
        self.database = database
        self.settings = settings
        self.job_types: dict[str, JobType] = {}
        self.measurements = Measurements()
        self.presence: Presence | None = None
        self._hooks: dict[tuple[str, bool], list[Callable[..., Any]]] = {}
        self._running = threading.local()
        self._lock = threading.Lock()
        results = Results(backend=JobResults(database), store_results=True)
        self.add_middleware(results)
        self._not_for_plain_jobs = {id(results), *(id(each) for each in own if isinstance(each, NOT_FOR_PLAIN_JOBS))}
        self.add_middleware(Attendance())

    def declare_job_types(self, registry: Registry) -> None:
        """Make a Dramatiq actor of every job type that has none yet."""
        for job_type in registry.types.values():
            if job_type.name not in self.actors:
                self.job_types[job_type.name] = job_type
                self._declare(job_type)

    # Sending

    def enqueue(self, message: Any, *, delay: int | None = None) -> Any:
        """Insert a message as a job, due in `delay` milliseconds. Committed when this returns.

        Called while an attempt ends (by Retries with the job itself, by Pipelines and Callbacks with the next one) it writes nothing:
        the statement that ends the attempt writes both or neither.
        """
        if isinstance(message, RunningJob):
            message.retry_delay = (delay or 0) / 1000
            return message
        self.emit_before("enqueue", message, delay)
        submitted = self._submitted(message, delay)
        running = self.running
        if running is not None and running.attempt_call.over:
            running.followups.append(submitted)
        else:
            try:
                with self.database.connection() as connection:
                    insert(connection, [submitted])
            except DatabaseUnavailable as error:
                raise ConnectionError(str(error)) from error
        self.emit_after("enqueue", message, delay)
        return message

    def declare_actor(self, actor: Actor[Any, Any]) -> None:
        """Declare an actor: its function becomes one that can be stopped, and its messages get ids that sort by time."""
        super().declare_actor(actor)
        function, build = actor.fn, actor.message_with_options

        @functools.wraps(function)
        def stoppable(*args: Any, **kwargs: Any) -> Any:
            running = self.running
            if running is not None and running.raised is not None:
                raise running.__dict__.pop("raised")
            if running is None or running.attempt_call.over:  # called by a hook, say
                return function(*args, **kwargs)
            process = os.getpid()
            # Should it raise, and there be no memory to note even that, the attempt has failed all the same.
            running._exception = FORGOTTEN
            try:
                if tracing.active is not None:
                    result = tracing.active.attempt(running, function, *args, **kwargs)
                else:
                    result = running.attempt_call.call(function, *args, **kwargs)
                running._exception = None
                return result
            finally:
                if os.getpid() != process:  # a fork that the job let come back: it is no worker
                    os._exit(0 if sys.exc_info()[0] is None else 1)

        def message_with_options(**options: Any) -> Message[Any]:
            return build(**options)._replace(message_id=new_job_id())

        actor.fn = stoppable
        actor.message_with_options = message_with_options  # type: ignore[method-assign]

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue. There are no delay queues here: what is due later stays in the table."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues[queue_name] = True
            self.emit_after("declare_queue", queue_name)

    # Consuming

    @property
    def running(self) -> RunningJob | None:
        """The job whose attempt this thread is running or ending."""
        return getattr(self._running, "job", None)

    @running.setter
    def running(self, job: RunningJob | None) -> None:
        self._running.job = job
        trail.enter_attempt(job)

    def attend(self, *, threads: int, queues: Collection[str] | None = None) -> Presence:
        """Make this process a worker, once: from here on it has a row in `workers`, and its heart beats."""
        with self._lock:
            if self.presence is None:
                self.presence = Presence(self, threads=threads, queues=queues)
                self.presence.start()
            return self.presence

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30000) -> JobsConsumer:
        """The consumer of a queue: an iterator over RunningJobs, or None when none came for `timeout` milliseconds."""
        return JobsConsumer(broker=self, presence=self.attend(threads=prefetch), queue_name=queue_name, prefetch=prefetch, timeout=timeout)

    def make_running(self, row: db.Row, worker: str) -> RunningJob:
        """The RunningJob for a row that a claim returned."""
        job_type = self.job_types.get(row[1])
        return RunningJob(row, worker=worker, job_type=job_type, max_crashes=self.settings.max_crashes)

    # Signals: Dramatiq asks every middleware about every signal; here only those that listen are asked, and about a plain job that has
    # not failed (no options, hence no callbacks, no pipeline, no age limit; its result already noted) only those it may concern.

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        if signal == "process_message" and args[0].raised is not None and self.running is args[0]:
            return  # it has begun, on the straight way
        for hook in self._listeners("before_" + signal, signal == "process_message" and args[0].plain):
            try:
                hook(self, *args, **kwargs)
            except (MiddlewareError, InvalidSubmission):
                raise
            except Exception:
                self.logger.critical("Unexpected failure in before_%s of %r.", signal, hook, exc_info=True)

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        for hook in self._listeners("after_" + signal, signal == "process_message" and "exception" not in kwargs and args[0].plain):
            try:
                hook(self, *args, **kwargs)
            except Exception:
                self.logger.critical("Unexpected failure in after_%s of %r.", signal, hook, exc_info=True)
            except BaseException as error:  # raised by an odd exception of the job's own, when it was looked at
                self.logger.critical("Unexpected %s in after_%s of %r.", type(error).__name__, signal, hook)

    @property
    def only_own_listen(self) -> bool:
        """Whether of a plain job that does not fail only `Attendance` and `Stopping` want to know."""
        hooks = self._hooks
        others = hooks.get(OTHERS)
        if others is None:
            asked = (("before_process_message", True), ("after_process_message", True), ("before_ack", False), ("after_ack", False))
            listeners = [hook for each in asked for hook in self._listeners(*each)]
            others = [hook for hook in listeners if type(getattr(hook, "__self__", None)) not in (Attendance, Stopping)]
            hooks[OTHERS] = others
        return not others

    def add_middleware(self, middleware: Middleware, *, before: Any = None, after: Any = None) -> None:
        self._hooks = {}
        super().add_middleware(middleware, before=before, after=after)
        self._hooks = {}

    def _listeners(self, hook: str, plain: bool) -> list[Callable[..., Any]]:
        hooks = self._hooks  # others take its place when a middleware is added just now
        listeners = hooks.get((hook, plain))
        if listeners is None:
            default = getattr(Middleware, hook, None)
            order = reversed(self.middleware) if hook.startswith("after_") else self.middleware
            listening = (each for each in order if getattr(type(each), hook, None) is not default)
            listeners = [getattr(each, hook) for each in listening if not (plain and id(each) in self._not_for_plain_jobs)]
            hooks[hook, plain] = listeners
        return listeners

    # The rest of Dramatiq's interface

    def join(self, queue_name: str, *, timeout: int | None = None) -> None:
        """Wait until nothing in the queue is waiting, scheduled or running. Raises QueueJoinTimeout after `timeout` milliseconds."""
        deadline = None if timeout is None else time.monotonic() + timeout / 1000
        while self.database.run("unfinished", queue=queue_name)[0][0]:
            if deadline is not None and time.monotonic() >= deadline:
                raise QueueJoinTimeout(queue_name)
            time.sleep(0.05)

    def flush(self, queue_name: str) -> None:
        """Remove every waiting job of the queue."""
        self.database.run("drop_waiting", queue=queue_name)

    def flush_all(self) -> None:
        """Remove every waiting job of every declared queue."""
        for queue_name in self.get_declared_queues():
            self.flush(queue_name)

    def close(self) -> None:
        """End what this process is as a worker, and close the idle connections."""
        if self.presence is not None:
            self.presence.leave()
        self.database.close()

    def declared_types(self, queues: Collection[str]) -> dict[str, list[Any]]:
        """What the actors of these queues declare, as the parameters of the statement `declare_types`."""
        actors = [actor for actor in self.actors.values() if actor.queue_name in queues]
        retries = [actor.options.get("max_retries", self.settings.max_retries) for actor in actors]
        types = [self.job_types.get(actor.actor_name) for actor in actors]
        return {
            "name": [actor.actor_name for actor in actors],
            "queue": [actor.queue_name for actor in actors],
            "priority": [actor.priority if each is None else PRIORITIES[each.priority] for actor, each in zip(actors, types, strict=True)],
            "max_attempts": [None if each is None else each + 1 for each in retries],
        }

    def _declare(self, job_type: JobType) -> None:
        def perform(running: RunningJob) -> None:
            try:
                payload = job_type.payload.model_validate_json(running.payload)
            except ValidationError as error:
                raise unreadable(error) from None
            result = job_type.function(payload, running.job)
            if result is None:
                return
            try:
                running.result = encode(result)
            except InvalidSubmission as error:
                raise TypeError(f"what {job_type.name} returned {error}") from None

        perform.__name__ = job_type.name
        options: dict[str, Any] = {"time_limit": int(job_type.time_limit * 1000)}
        if job_type.max_retries is not None:
            options["max_retries"] = job_type.max_retries
        Actor(perform, broker=self, actor_name=job_type.name, queue_name=job_type.queue, priority=0, options=options)

    def _submitted(self, message: Message[Any], delay: int | None) -> Submitted:
        actor = self.actors.get(message.actor_name)
        defaults = actor.options if actor is not None else {}
        retries = message.options.get("max_retries", defaults.get("max_retries", self.settings.max_retries))
        options = {name: value for name, value in message.options.items() if name not in ("priority", "max_retries")}
        options = trail.options(job=(message.message_id, message.actor_name, message.queue_name)) | options
        if message.args:
            options["args"] = list(message.args)
        return Submitted(
            id=message.message_id,
            type=message.actor_name,
            queue=message.queue_name,
            priority=message.options["priority"],
            payload=encode(message.kwargs, ("kwargs",)),
            options=encode(options, ("options",)),
            max_attempts=None if retries is None else retries + 1,
            run_at=None,
            delay=None if delay is None else delay / 1000,
            group_id=None,
            idempotency_key=None,
        )


class JobsConsumer(PostgresConsumer):
    """One queue's jobs for one process. Dramatiq gives each queue a thread that iterates over its consumer."""

    def __init__(self, *, broker: JobsBroker, presence: Presence, queue_name: str, prefetch: int, timeout: int) -> None:
        super().__init__(pool=broker.database, queue_name=queue_name, prefetch=prefetch, timeout=timeout)
        self.broker = broker
        self.presence = presence
        self.wait = timeout / 1000
        self.batch: deque[RunningJob] = deque()

    def __next__(self) -> RunningJob | None:
        if not self.batch:
            if self.presence.serves and not self.presence.booted.wait(self.wait):
                return None
            try:
                jobs = self.presence.claims.take(self.queue_name, self.wait)
            except DatabaseUnavailable as error:
                raise ConnectionError(str(error)) from error
            if self.presence.serves:
                # All but one go where Dramatiq's thread would put them one after the other, asking for delayed messages in between.
                self.presence.work.put_all(jobs[1:])
                return jobs[0] if jobs else None
            self.batch.extend(jobs)
        return self.batch.popleft() if self.batch else None

    def ack(self, message: RunningJob) -> None:
        """The attempt is over and did not fail for good: finished, to be retried, interrupted or cancelled."""
        self._settle(message, self._outcome)

    def nack(self, message: RunningJob) -> None:
        """The attempt was the last: FAILED, or DEAD when the job can't be run."""
        self._settle(message, bury)

    def requeue(self, messages: Iterable[RunningJob]) -> None:
        """Give back what was claimed and not started, as the same attempt."""
        for message in messages:
            self.presence.settle(message, release(message))

    def close(self) -> None:
        """Give back what was claimed and not handed over."""
        while self.batch:
            message = self.batch.popleft()
            self.presence.settle(message, release(message))

    def _settle(self, message: RunningJob, decide: Callable[[RunningJob], Outcome]) -> None:
        deadline = 0.0
        while True:
            try:
                self.presence.settle(message, decide(message))
                return
            except (RecursionError, MemoryError) as error:
                # Another job's doing (it may have lowered the limit, which worker.py puts back), and no fault of this one's.
                deadline = deadline or time.monotonic() + PATIENCE
                if time.monotonic() > deadline:
                    self.presence.settle(message, unstorable(message, error))
                    return
                time.sleep(0.05)
            except BaseException as error:  # Dramatiq would take it for its own bug and go on, and the job would never end
                self.presence.settle(message, unstorable(message, error))
                return

    def _outcome(self, message: RunningJob) -> Outcome:
        if message.retry_delay is not None:
            return retry(message, message.retry_delay)
        if message.stopped == "cancelled":
            return cancel(message)
        if message.stopped is not None:
            return release(message)
        if message._exception is not None and not isinstance(message._exception, MiddlewareError):
            # The function raised and no middleware decided what follows: it must not count as done.
            return self._undecided(message)
        if message.job.completing:
            # Changes nothing where the job's own transaction committed.
            message.stuff_exception(NotCommitted(NotCommitted.__doc__))
            return self._undecided(message)
        return finish(message)

    def _undecided(self, message: RunningJob) -> Outcome:
        if message.max_attempts is not None and message.attempt >= message.max_attempts:
            return bury(message)
        settings = self.broker.settings
        shortest, longest = int(settings.retry_min_backoff * 1000), int(settings.retry_max_backoff * 1000)
        _, delay = compute_backoff(message.attempt - 1, factor=shortest, max_backoff=longest)
        return retry(message, delay / 1000)


class JobResults(ResultBackend):
    """Dramatiq's results, which here are the jobs' own: kept as long as the job, written by the statement that finishes it."""

    def __init__(self, database: db.Database) -> None:
        super().__init__()
        self._database = database

    def store_result(self, message: RunningJob, result: Any, ttl: int) -> None:
        """Note the result on the running job. (The result of a job type was noted when its function returned.)"""
        if isinstance(message, RunningJob) and message.job_type is None:
            message.result = encode(result, ("result",))

    def store_exception(self, message: RunningJob, exception: BaseException, ttl: int) -> None:
        """Nothing to do: the failure is in the job's record."""

    def get_result(self, message: Any, *, block: bool = False, timeout: int | None = None) -> Any:
        """What the job returned. Raises ResultMissing when it has not finished (with `block`: ResultTimeout after `timeout` milliseconds),
        ResultFailure when it never will."""
        deadline = time.monotonic() + (10_000 if timeout is None else timeout) / 1000
        pause = 0.005
        while True:
            rows = self._database.run("result", id=message.message_id)
            status, result, error = rows[0] if rows else ("PENDING", None, None)
            if status == "COMPLETED":
                return None if result is None else self.encoder.decode(result.encode())
            if status in ("FAILED", "DEAD", "CANCELLED"):
                failure = self.encoder.decode(error.encode()) if error else {"type": status, "message": f"the job is {status}"}
                raise ResultFailure(f"actor raised {failure['type']}: {failure['message']}", failure["type"], failure["message"])
            if not block:
                raise ResultMissing(message)
            if time.monotonic() + pause > deadline:
                raise ResultTimeout(message)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)


class Attendance(Middleware):
    """Ties Dramatiq's Worker to the presence of this process: its queue, its running jobs, its end."""

    def before_worker_boot(self, broker: JobsBroker, worker: Any) -> None:
        presence = broker.attend(threads=worker.worker_threads, queues=worker.consumer_whitelist or None)
        presence.serves = True
        worker.work_queue = presence.work

    def after_worker_thread_boot(self, broker: JobsBroker, thread: Any) -> None:
        thread.process_message = StraightWay(broker, thread).process_message

    def after_worker_boot(self, broker: JobsBroker, worker: Any) -> None:
        if broker.presence is not None:
            broker.presence.booted.set()

    def before_process_message(self, broker: JobsBroker, message: RunningJob) -> None:
        broker.running = message
        if broker.presence is not None and not broker.presence.begin(message):
            message.stopped = "lost"
            raise SkipMessage("the job was lost while it waited in memory")
        if not message.readable:
            message.dead = True
            message.fail()
            raise SkipMessage("the job's options can't be read")

    def after_ack(self, broker: JobsBroker, message: RunningJob) -> None:
        broker.running = None

    after_nack = after_ack

    def before_worker_shutdown(self, broker: JobsBroker, worker: Any) -> None:
        if broker.presence is not None:
            broker.presence.stop_claiming()

    def after_worker_shutdown(self, broker: JobsBroker, worker: Any) -> None:
        if broker.presence is not None:
            broker.presence.leave()
