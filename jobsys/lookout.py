"""Looks out for urgent jobs while a worker process is busy with others.

No-op jobs are claimed by the hundred, and one such claim takes tens of milliseconds. A more urgent job that comes meanwhile would wait for
it; this thread hears of it (see `busy_above` in schema.sql), claims it by itself, and puts it in front. Should it not hear, the next of
those claims brings the job all the same.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from jobsys import logs
from jobsys.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from jobsys.presence import Presence

PAUSE = 0.001
"""Seconds between two claims, at least."""
log = logs.get(__name__)


class Lookout(threading.Thread):
    """Goes for more urgent jobs when there may be one, until it is stopped."""

    def __init__(self, presence: Presence) -> None:
        super().__init__(name="jobsys lookout", daemon=True)
        self._claims = presence.claims
        self._work = presence.work

    def run(self) -> None:
        while not self._claims.closed:
            self._claims.overtake.wait()
            self._claims.overtake.clear()
            if self._work.could_start:
                self._overtake()
            time.sleep(PAUSE)

    def stop(self) -> None:
        """Wait for its end, which closing the claims brings about."""
        if self.is_alive():
            self.join(5)

    def _overtake(self) -> None:
        try:
            self._work.put_all(self._claims.claim_urgent())
        except DatabaseUnavailable:
            time.sleep(1)  # the consumers say so, and go on trying
        except Exception:
            log.exception("the lookout stumbled")
            time.sleep(1)
