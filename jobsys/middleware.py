"""The middleware between Dramatiq and a job, in the order of `stack`. They decide; the broker writes.

Dramatiq logs and swallows whatever an `after_…` hook raises, so nothing durable is written here: a hook notes on the RunningJob what is to
become of it, and `ack` or `nack` makes one outcome of that, which one statement writes.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import AgeLimit, Callbacks, Middleware
from dramatiq.middleware import Pipelines as DramatiqPipelines
from dramatiq.middleware import Retries as DramatiqRetries
from pydantic import ValidationError

from jobsys.errors import GiveUp, InvalidSubmission, JobStopped
from jobsys.job_types import PRIORITIES
from jobsys.running import RunningJob

if TYPE_CHECKING:
    from jobsys.broker import JobsBroker
    from jobsys.settings import Settings


# What became of a failed attempt is logged when it has been written (presence.py), in one line; Dramatiq's lines would say it again,
# with its own frames.
logging.getLogger("dramatiq.middleware.retries.Retries").setLevel(logging.ERROR)
logging.getLogger("dramatiq.worker.WorkerThread").addFilter(lambda record: not str(record.msg).startswith("Failed to process message"))


class TimeLimitExceeded(Exception):
    """The attempt ran longer than its time limit."""


class CannotRun(Exception):
    """The job can't be run at all: its payload is no longer valid, or its row can't be read."""


class Priority(Middleware):
    """Gives every message its number: the option `priority` (a name or a number), else the actor's own."""

    def before_enqueue(self, broker: JobsBroker, message: Any, delay: int | None) -> None:
        chosen = message.options.get("priority")
        if isinstance(chosen, str):
            if chosen.lower() not in PRIORITIES:
                raise InvalidSubmission.of(["priority"], f'priority "{chosen}" is not one of {", ".join(PRIORITIES)}')
            message.options["priority"] = PRIORITIES[chosen.lower()]
        elif chosen is None:
            actor = broker.actors.get(message.actor_name)
            message.options["priority"] = actor.priority if actor is not None else PRIORITIES["default"]


class Stopping(Middleware):
    """Sets each attempt's deadline. Who watches it, and the order to cancel, is heart.py; how a thread is stopped, interrupt.py.

    Takes the place of Dramatiq's TimeLimit and ShutdownNotifications, which throw their exceptions at any bytecode, also into a
    connection pool.
    """

    def __init__(self, *, default_limit: float = 600.0) -> None:
        self.default_limit = default_limit

    @property
    def actor_options(self) -> set[str]:
        return {"time_limit", "notify_shutdown"}

    def before_process_message(self, broker: JobsBroker, message: RunningJob) -> None:
        limit = message.options.get("time_limit")
        if not isinstance(limit, (int, float)):
            limit = broker.actors[message.actor_name].options.get("time_limit")
        # Dramatiq counts in milliseconds.
        message.deadline = time.monotonic() + (self.default_limit if limit is None else limit / 1000)


class Pipelines(DramatiqPipelines):
    """Dramatiq's Pipelines, which imports a module at each call: asked only where there is a pipeline."""

    def after_process_message(self, broker: JobsBroker, message: RunningJob, *, result: Any = None, exception: Any = None) -> None:
        if "pipe_target" in message.options:
            super().after_process_message(broker, message, result=result, exception=exception)


class Retries(DramatiqRetries):
    """Dramatiq's Retries with our defaults; knows that a stopped job did not fail, and that GiveUp is final."""

    def after_process_message(
        self, broker: JobsBroker, message: RunningJob, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        if exception is None:
            return
        # Who raises JobStopped without having been asked to stop has failed: given back as the same attempt, it would do so for ever.
        if isinstance(exception, JobStopped) and (reason := message.job.stop_reason) is not None:
            if reason != "time limit":
                message.stopped = reason
                return
            exception = TimeLimitExceeded("the attempt ran longer than its time limit")
            message.stuff_exception(exception)
        if isinstance(exception, (GiveUp, CannotRun)):
            message.fail()
            return
        super().after_process_message(broker, message, result=result, exception=exception)


class DeadLetters(Middleware):
    """Tells apart what failed (FAILED: it may be tried again) and what can't be run at all (DEAD)."""

    def after_process_message(
        self, broker: JobsBroker, message: RunningJob, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        message.dead = isinstance(exception, CannotRun)


NOT_FOR_PLAIN_JOBS = (AgeLimit, Callbacks, Pipelines, Retries, DeadLetters)
"""What has nothing to do with a job that did not fail and has no options."""


def stack(settings: Settings) -> list[Middleware]:
    """The middleware, first to last. `before_…` hooks run in this order, `after_…` hooks in the opposite one.

    Priority is first, so that a message has its number before anything else looks at it. Retries is after Callbacks and Pipelines, so
    that its `after_…` comes before theirs and they see whether the attempt failed for good. DeadLetters is last: it decides first.
    """
    return [
        Priority(),
        AgeLimit(),
        Callbacks(),
        Pipelines(),
        Stopping(),
        Retries(
            max_retries=settings.max_retries,
            min_backoff=int(settings.retry_min_backoff * 1000),
            max_backoff=int(settings.retry_max_backoff * 1000),
        ),
        DeadLetters(),
    ]


def unreadable(error: ValidationError) -> CannotRun:
    """The CannotRun for a payload that no longer fits its model."""
    problems = "; ".join(f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors())
    return CannotRun(f"the payload is not valid for this job type: {problems}")
