"""Job types that say where they are, for test_trail.py. Its workers load this module through JOB_MODULES."""

from __future__ import annotations

import logging

import dramatiq

from jobsys import Job, JobSystem, Payload, job

system = JobSystem()


class Nothing(Payload):
    """No fields."""


@job("LEADER")
def leader(payload: Nothing, job: Job) -> None:
    """Say something, fail once, and then lead to other jobs."""
    logging.getLogger("somebodys.library").warning("at work")
    if job.attempt == 1:
        raise RuntimeError("not yet")
    system.submit("EMAIL_SEND", {"to": "ada@example.test", "subject": "Led", "body": "on"})
    follow.send_with_options(args=(1,), pipe_target=follow.message())


@dramatiq.actor
def follow(*given: int) -> int:
    """Follow, twice: as a job of its own and at the end of a pipeline."""
    logging.getLogger("somebodys.library").warning("following")
    return 2
