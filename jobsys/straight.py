"""The straight way of an attempt through one of Dramatiq's threads.

Dramatiq's own way costs a third of what a no-op job does: it asks for listeners four times, words lines for a log that nobody reads, and
looks up what is known. This one does the same in one place, where that is certain: an attempt at a job type, without options of
Dramatiq's, while no middleware but ours listens for its beginning, its end or its acknowledgement. Any other goes Dramatiq's way, and so
does an attempt that raises, from there on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobsys import logs
from jobsys.running import FORGOTTEN

if TYPE_CHECKING:
    from jobsys.broker import JobsBroker
    from jobsys.running import RunningJob

log = logs.get(__name__)


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
        begun = False
        try:
            begun = self._begin(message)
            if begun:
                self._broker.actors[message.actor_name].fn(message)
        except BaseException as error:
            if begun:
                with contextlib.suppress(MemoryError):  # it counts as failed, though nothing is known of it
                    message.raised = error
        if not begun or message.raised is not None:
            self._dramatiqs(message)
            return
        try:
            consumer = self._consumers[message.queue_name].consumer
            consumer.nack(message) if message.failed else consumer.ack(message)
        except Exception:
            log.exception("how an attempt ended could not be handed over", job_id=message.message_id)
        finally:
            try:
                self._broker.running = None
            finally:
                self._work.task_done()

    def _begin(self, message: RunningJob) -> bool:
        """What Dramatiq's signal `before_process_message` would do. False: let it do that, and all else."""
        broker, job_type = self._broker, message.job_type
        if job_type is None or not message.plain or message.suspect or not broker.only_own_listen or self._logs_all:
            return False
        broker.running = message
        if broker.presence is None or not broker.presence.begin(message):
            return False
        message.deadline = time.monotonic() + job_type.time_limit
        message._exception = FORGOTTEN  # until the function has returned
        return True
