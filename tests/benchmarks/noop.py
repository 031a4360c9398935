"""The job that does nothing, and one that says when it started."""

from __future__ import annotations

import time

from jobsys import Job, Payload, job


class Nothing(Payload):
    pass


@job("NOOP")
def noop(payload: Nothing, job: Job) -> None:
    """Do nothing."""


@job("WHEN")
def when(payload: Nothing, job: Job) -> float:
    """Say when the function was entered, by this machine's clock."""
    return time.time()
