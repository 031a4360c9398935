"""The job type of `jobsys chaos`: it works for a moment and writes into a file outside the database what it does."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pydantic import Field

from jobsys import Job, Payload, job
from jobsys.chaos import CLOCK, LEDGERS, QUEUE
from jobsys.errors import JobStopped

if wrong := float(os.environ.get(CLOCK, "0")):
    _right = time.time
    time.time = lambda: _right() + wrong


class Step(Payload):
    """What the job does."""

    number: int = Field(description="The submitter's own number for it.")
    ledger: str = Field(pattern=r"^[a-z0-9-]+$", description="The file to append to.")
    seconds: float = Field(0.0, ge=0, le=60, description="How long it works.")
    fail_times: int = Field(0, ge=0, le=5, description="How many of its attempts fail.")


@job("CHAOS_STEP", queue=QUEUE, max_retries=5, example={"number": 1, "ledger": "ledger"})
def step(payload: Step, job: Job) -> int:
    """Write into the ledger when it starts and how it ends."""
    ledger = os.open(Path(os.environ[LEDGERS], payload.ledger), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(what: str) -> None:
        os.write(ledger, f"{what} {payload.number} {job.id} {job.attempt} {os.getpid()} {time.monotonic():.6f}\n".encode())

    try:
        note("start")
        until = time.monotonic() + payload.seconds
        while (left := until - time.monotonic()) > 0:
            job.checkpoint()
            time.sleep(min(left, 0.01))
        if job.attempt <= payload.fail_times:
            note("fail")
            raise RuntimeError("told to fail")
        note("end")
    except JobStopped:
        note("stop")
        raise
    finally:
        os.close(ledger)
    return payload.number
