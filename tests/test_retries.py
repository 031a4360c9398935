"""When a failed job is tried again."""

from __future__ import annotations

from itertools import pairwise

import pytest

from jobsys.running import RunningJob
from jobsys.settings import Settings
from jobsys.system import JobSystem


def delays(system: JobSystem, retries: int, number: int = 200) -> list[float]:
    """In how many seconds the next attempt follows, for so many jobs that failed after `retries` retries."""
    found = []
    for _ in range(number):
        row = (
            "01a2057e-02b3-7000-8e7e-b3f3ad405f07",
            "TEST_JOB",
            0,
            "{}",
            f'{{"retries": {retries}}}',
            retries + 1,
            1,
            100,
            "",
            0,
            0,
            "default",
            0.0,
        )
        job = RunningJob(row, worker="w", job_type=system.types.find("TEST_JOB"), max_crashes=3)
        system.broker.emit_after("process_message", job, exception=RuntimeError("no"))
        assert job.retry_delay is not None
        found.append(job.retry_delay)
    return found


@pytest.fixture
def system(settings: Settings) -> JobSystem:
    return JobSystem(settings.model_copy(update={"retry_min_backoff": 1.0, "retry_max_backoff": 64.0, "max_retries": 99}))


@pytest.mark.parametrize("retries", [7, 20, 90])
def test_jobs_that_failed_together_are_not_tried_again_together_however_often_they_did(system: JobSystem, retries: int) -> None:
    found = delays(system, retries)
    assert min(found) >= 32 and max(found) <= 64, "between half of RETRY_MAX_BACKOFF and all of it"
    assert len({round(delay) for delay in found}) > 20


def test_pauses_double_from_one_retry_to_the_next(system: JobSystem) -> None:
    means = [sum(found) / len(found) for found in (delays(system, retries) for retries in range(5))]
    assert all(1.5 < later / earlier < 2.7 for earlier, later in pairwise(means))
