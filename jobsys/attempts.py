"""One line in the log for each attempt that has ended, when that is written.

Of those that succeeded a process logs LOG_ATTEMPTS a second, and then how many more there were: at ten thousand a second nobody reads
them, and each costs as much as a small job.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from jobsys import logs, trail
from jobsys.outcomes import Outcome

log = logs.get(__name__)


class AttemptLog:
    """The lines of one process; `most` of successful attempts a second."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._left = 0
        self._more = 0
        self._until = 0.0

    def add(self, outcome: Outcome) -> None:
        """Log how an attempt ended; nothing of a job that was given back before it began."""
        if outcome.job.began_at is None and outcome.statement not in ("retry", "bury"):
            return
        if outcome.statement == "finish":
            if log.isEnabledFor(logs.INFO) and self._may_log():
                log.info("attempt succeeded", **_what(outcome))
        elif outcome.statement in ("retry", "bury"):
            values = outcome.parameters
            then = f"retry in {values['delay']:.1f} s" if outcome.statement == "retry" else values["status"]
            log.warning("attempt failed", **_what(outcome), error=f"{values['type']}: {values['message']}", then=then)
        else:
            log.info("attempt interrupted", **_what(outcome), then="CANCELLED" if outcome.statement == "cancel_running" else "PENDING")

    def sum_up(self) -> None:
        """Log how many attempts had no line of their own, once their second is over."""
        if self._more and time.monotonic() >= self._until:
            with self._lock:
                more, self._more = self._more, 0
            log.info("more attempts succeeded", attempts=more)

    def _may_log(self) -> bool:
        now = time.monotonic()
        if now >= self._until:
            self.sum_up()
            self._left, self._until = self._most, now + 1
        with self._lock:
            if self._left > 0:
                self._left -= 1
                return True
            self._more += 1
            return False


def _what(outcome: Outcome) -> dict[str, Any]:
    job = outcome.job
    seconds = {} if job.began_at is None else {"seconds": round(job.ended_at - job.began_at, 3)}
    return {"job_id": job.message_id, **trail.ids(job.carried), "type": job.actor_name, "attempt": job.attempt, **seconds}
