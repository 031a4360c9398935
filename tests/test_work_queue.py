"""What Dramatiq's threads take from: the most urgent job first, and a suspect alone."""

from __future__ import annotations

import queue

import pytest

from jobsys.ids import new_job_id
from jobsys.running import RunningJob
from jobsys.work_queue import WorkQueue

NOON = "2030-01-01 12:00:00"


def claimed(priority: int = 0, crashes: int = 0) -> RunningJob:
    row = (new_job_id(), "TEST_JOB", priority, "{}", "{}", 1, 1, 4, NOON, 0, crashes, "default", 0.0)
    return RunningJob(row, worker=new_job_id(), job_type=None, max_crashes=3)


def holding(*jobs: RunningJob) -> WorkQueue:
    work = WorkQueue(4)
    for job in jobs:
        work.expected.add(job)
        work.put((0, job))
    return work


def taken(work: WorkQueue) -> RunningJob | None:
    try:
        return work.get(timeout=0.01)[1]
    except queue.Empty:
        return None


def test_the_most_urgent_job_comes_first_and_then_the_one_that_came_first() -> None:
    first, second, urgent = claimed(), claimed(), claimed(-10)
    work = holding(second, first, urgent)
    assert [taken(work), taken(work), taken(work), taken(work)] == [urgent, first, second, None]


def test_a_suspect_starts_when_nothing_else_runs_and_nothing_starts_beside_it() -> None:
    suspect, neighbour = claimed(-10, crashes=2), claimed()
    work = holding(suspect, neighbour)
    assert taken(work) is neighbour and taken(work) is None
    assert work.holds_suspects and work.idle_threads == 0, "nothing more is claimed"
    work.task_done()
    assert taken(work) is suspect
    work.put((0, claimed()))
    assert taken(work) is None
    work.task_done()
    assert taken(work) is not None and not work.holds_suspects


def test_two_suspects_run_one_after_the_other() -> None:
    work = holding(claimed(crashes=2), claimed(crashes=2))
    assert taken(work) and not taken(work)
    work.task_done()
    assert taken(work)


def test_what_waits_too_long_is_taken_back_and_a_suspect_stays() -> None:
    runs, job, suspect = claimed(), claimed(), claimed(crashes=2)
    work = holding(runs, job, suspect)
    assert taken(work) is runs
    assert work.take_back(lambda _: False) == [] and work.take_back(lambda _: True) == [job]
    work.task_done()
    assert taken(work) is suspect


def test_there_is_room_as_soon_as_the_last_job_has_started() -> None:
    work = holding(claimed())
    work.room.clear()
    taken(work)
    assert work.room.is_set()


def test_a_process_is_active_while_a_job_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("jobsys.work_queue.time.monotonic", lambda: now)
    work = holding(claimed(), claimed(), claimed())
    for moment, act in ((100.0, work.get), (101.0, work.get), (103.0, work.task_done), (104.0, work.task_done)):
        now = moment
        act()
    assert (work.finished, work.active_seconds, work.finished_at) == (2, 4.0, 104.0), "two ran at once for a while"
    for moment, act in ((110.0, work.get), (111.0, work.task_done)):
        now = moment
        act()
    assert (work.finished, work.active_seconds, work.finished_at) == (3, 5.0, 111.0), "in between none did"


def test_a_closed_queue_hands_nothing_out() -> None:
    job, suspect = claimed(), claimed(crashes=2)
    work = holding(job, suspect)
    assert set(work.close()) == {job, suspect}
    assert taken(work) is None and work.unfinished_tasks == 0
