"""TEST_JOB: does nothing, for as long and with as many failures as it is told to. For trying things out."""

from __future__ import annotations

import time
from typing import Any

from pydantic import ConfigDict, Field

from jobsys import GiveUp, Job, Payload, job

HOUR = 3_600_000
SLICE = 0.1
"""Seconds between two looks at whether the job has to stop."""


class TestJob(Payload):
    """What TEST_JOB is told to do; further fields are allowed and come back with the others."""

    __test__ = False  # pytest takes the name for its own

    model_config = ConfigDict(extra="allow")

    sleep_ms: int = Field(0, alias="sleepMs", ge=0, le=HOUR, description="How long it runs, in milliseconds.")
    progress_steps: int = Field(0, alias="progressSteps", ge=0, le=1000, description="In how many steps it reports its progress.")
    fail_times: int = Field(0, alias="failTimes", ge=0, le=1000, description="How many attempts fail, at their end.")
    fail_with: str = Field("told to fail", alias="failWith", max_length=1000, description="What a failure says.")
    give_up: bool = Field(False, alias="giveUp", description="Fail in a way that is final, whatever failTimes says.")


@job(
    "TEST_JOB",
    time_limit="70m",
    aliases=["testJob", "test"],
    example={"sleepMs": 100, "progressSteps": 4, "note": "comes back"},
)
def run_test(payload: TestJob, job: Job) -> dict[str, Any]:
    """Echo the payload, after sleeping, reporting progress and failing as it says."""
    steps = max(payload.progress_steps, 1)
    for step in range(1, steps + 1):
        _sleep(payload.sleep_ms / 1000 / steps, job)
        if payload.progress_steps:
            job.progress(step / steps, f"step {step} of {steps}")
            job.log(f"step {step} of {steps} done")
    if payload.give_up:
        raise GiveUp(payload.fail_with)
    if job.attempt <= payload.fail_times:
        raise RuntimeError(payload.fail_with)
    return payload.model_dump(by_alias=True, exclude_unset=True)


def _sleep(seconds: float, job: Job) -> None:
    """Sleep, but stop when the job has to. Raises JobStopped."""
    end = time.monotonic() + seconds
    job.checkpoint()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE))
        job.checkpoint()
