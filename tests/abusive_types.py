"""Job types that misbehave, and one that is short of time. test_abuse.py loads them into real workers through JOB_MODULES."""

from __future__ import annotations

from typing import Any

from example_types import Ledger, note
from misbehaviour import WAYS

from jobsys import Job, job
from jobsys.jobs.email import Email, send_email


class Abuse(Ledger):
    how: str


@job("ABUSE", max_retries=0, time_limit="3s")
def abuse(payload: Abuse, job: Job) -> object:
    """Misbehave."""
    note(payload, job, "start")
    return WAYS[payload.how](job)


@job("MAIL_IN_HASTE", max_retries=50, time_limit="1s")
def mail_in_haste(payload: Email, job: Job) -> dict[str, Any]:
    """Send an e-mail, and have little time for it."""
    return send_email(payload, job)
