"""The straight way of an attempt through one of Dramatiq's threads.

Dramatiq's own way costs as much as all the rest of a no-op job: it asks for listeners four times, words lines for a log that nobody reads,
and looks up what is known. This one does the same in one place, where that is certain: an attempt at a job type, without options of
Dramatiq's, while no middleware listens but ours. Any other goes Dramatiq's way; and so does an attempt that raises, from there on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobsys import tracing

if TYPE_CHECKING:
    from jobsys.broker import JobsBroker
    from jobsys.running import RunningJob


class StraightWay:
    """For one thread."""

    def __init__(self, broker: JobsBroker, thread: Any) -> None:
        self._broker = broker
        self._consumers = thread.consumers
        self._work = thread.work_queue
        self._dramatiqs: Callable[[RunningJob], None] = thread.process_message
        self._logs_all = thread.logger.isEnabledFor(logging.DEBUG)

    def process_message(self, message: RunningJob) -> None:
        """Run one attempt, and hand over how it ended: Dramatiq's promise, see its `process_message`."""
        broker, job_type = self._broker, message.job_type
        usual = message.plain and not message.suspect and broker.only_own_listen and tracing.active is None and not self._logs_all
        if job_type is None or not usual:
            self._dramatiqs(message)
            return
        try:
            broker.running = message
            begun = broker.presence is not None and broker.presence.begin(message)
            if begun:
                message.deadline = time.monotonic() + job_type.time_limit
                broker.actors[message.actor_name].fn(message)
        except BaseException as error:
            message.raised = error
            begun = False
        if not begun:
            self._dramatiqs(message)
            return
        try:
            self._consumers[message.queue_name].consumer.ack(message)
        finally:
            broker.running = None
            self._work.task_done()
