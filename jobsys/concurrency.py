"""Whether a process runs its jobs one at a time, because more threads would get no more done.

Python's interpreter runs one thread at a time. Of eight jobs that compute, seven wait for it, and it goes from thread to thread every 5 ms
(sys.getswitchinterval): that costs time, each job ends late, and a claim, the heart or an urgent job wait for it behind all of them. So a
process that has enough to do tries now and then to run one job at a time, and goes on as long as that keeps a processor as busy. It does
not when jobs wait for something. With one thread that changes nothing but how much is claimed at once: see AHEAD_COMPUTING in claims.py.
"""

from __future__ import annotations

import time

WINDOW = 0.05
"""Seconds over which it is measured how busy the process is, at least."""
BUSY = 0.8
"""So many processors a process uses, on average of the last windows, whose threads keep the interpreter busy (the rest is the database's);
and so many it has to use while it runs one job at a time. A burst of some dozen short jobs is no reason to try."""
PARALLEL = 1.2
"""When it uses more, its jobs compute in something else than Python, which runs in several threads at once. Each window in which it does so
counts as a try that failed: rather too few tries than jobs that could have run."""
TRUST = 10.0
"""Seconds after which all threads may run for one window, to see whether they would do more by now."""
PAUSE = (10.0, 300.0)
"""Seconds from a try that failed to the next, the first and the longest: twice as long each time."""
PATIENCE = 0.05
"""Seconds that a job may take for which all others wait."""


class Concurrency:
    """What one process knows. Not for several threads at once: WorkQueue asks and tells it under its lock."""

    def __init__(self) -> None:
        self.one_at_a_time = False
        self.judge_at = time.monotonic() + WINDOW
        """When it is time to judge again."""
        self._measured = time.monotonic(), time.process_time()
        self._busy = 0.0
        self._try_at = 0.0
        self._trust_until = 0.0
        self._pause = 0.0

    def judge(self, now: float, *, waiting: bool) -> None:
        """Decide how to go on until `judge_at`. `waiting`: whether jobs wait for a thread."""
        before, processor_seconds = self._measured
        self._measured = now, time.process_time()
        self.judge_at = now + WINDOW
        processors = (self._measured[1] - processor_seconds) / max(now - before, WINDOW)
        self._busy += (processors - self._busy) / (8 if self.one_at_a_time else 4)
        if processors > PARALLEL:
            self.give_up(now)
        elif not self.one_at_a_time:
            if waiting and self._busy >= BUSY and now >= self._try_at:
                self.one_at_a_time, self._busy, self._trust_until = True, 1.0, now + TRUST
        elif waiting and self._busy < BUSY:
            self.give_up(now)
        elif now >= self._trust_until:
            self.one_at_a_time, self._pause = False, 0.0
        else:
            self.one_at_a_time = waiting

    def give_up(self, now: float) -> None:
        """Let all threads run, and don't try again soon."""
        shortest, longest = PAUSE
        self._pause = min(max(2 * self._pause, shortest), longest)
        self.one_at_a_time, self._try_at = False, now + self._pause
