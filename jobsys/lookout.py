"""Looks out for urgent jobs while a worker process is busy with others.

No-op jobs are claimed by the hundred, and one such claim takes tens of milliseconds. A more urgent job that comes meanwhile would wait for
it; this thread finds it within some milliseconds, claims it by itself, and puts it in front.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from jobsys import logs
from jobsys.errors import DatabaseUnavailable
from jobsys.job_types import PRIORITIES

if TYPE_CHECKING:
    from jobsys.presence import Presence

GLANCE = 0.0025
"""Seconds between two glances, for each worker process there is: more of them share the work."""
MANY_QUEUES = 20
"""With more queues a glance costs more, and there are fewer."""
MOST_URGENT = min(PRIORITIES.values())
log = logs.get(__name__)


class Lookout(threading.Thread):
    """Glances at the queues while there is something to be overtaken, until it is stopped."""

    def __init__(self, presence: Presence) -> None:
        super().__init__(name="jobsys lookout", daemon=True)
        self._claims = presence.claims
        self._work = presence.work
        self._stopped = False

    def run(self) -> None:
        while not self._stopped:
            self._claims.busy.wait()
            above = self._claims.above
            if above is not None and above > MOST_URGENT and self._work.could_start:
                self._glance(above)
            time.sleep(GLANCE * self._claims.workers * max(1.0, self._claims.queues / MANY_QUEUES))

    def stop(self) -> None:
        """Look no more."""
        self._stopped = True
        self._claims.busy.set()
        if self.is_alive():
            self.join(5)

    def _glance(self, above: int) -> None:
        try:
            self._work.put_all(self._claims.claim_urgent(above))
        except DatabaseUnavailable:
            time.sleep(1)  # the consumers say so, and go on trying
        except Exception:
            log.exception("the lookout stumbled")
            time.sleep(1)
