"""What Dramatiq's threads take from: the most urgent job first, and a suspect alone."""

from __future__ import annotations

import queue
import random
import threading
from collections import Counter

import pytest
from conftest import eventually

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


def test_a_thread_that_was_kept_waiting_turns_back_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("jobsys.work_queue.time.monotonic", lambda: now)
    work = holding(claimed(), claimed())
    taken(work), taken(work)
    with work.mutex:
        late = threading.Thread(target=work.task_done)
        late.start()
        late.join(0.1)
        now = 101.0
    late.join(60)
    assert (work.finished, work.finished_at) == (1, 101.0)


def test_one_at_a_time_a_job_starts_when_the_one_before_has_ended() -> None:
    first, second, third = claimed(), claimed(), claimed()
    work = holding(first, second, third)
    assert work.at_once == 4
    work._concurrency.one_at_a_time = True
    assert work.at_once == 1
    assert taken(work) is first and taken(work) is None
    work.task_done()
    assert taken(work) is second and taken(work) is None
    work.task_done()
    assert taken(work) is third
    work.task_done()
    work.put_all([claimed(), claimed()])
    assert taken(work) and taken(work), "what comes after a rest is tried afresh"


@pytest.mark.parametrize("how", ["it is judged so", "patience is lost"])
def test_threads_that_waited_go_on_as_soon_as_jobs_may_run_beside_each_other(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = holding(*[claimed() for _ in range(4)])
    work._concurrency.judge_at = float("inf")
    work._concurrency.one_at_a_time = True
    assert taken(work)
    got: list[RunningJob] = []
    threads = [threading.Thread(target=lambda: got.append(work.get(timeout=60)[1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(work.not_empty._waiters) == 2)  # type: ignore[attr-defined]
    if how == "it is judged so":
        monkeypatch.setattr(work._concurrency, "judge", lambda now, waiting: work._concurrency.give_up(now))
        work._concurrency.judge_at = 0.0
        work.task_done()
    else:
        work.lose_patience()
        assert not got, "it has only just begun"
        work._active_since -= 1.0
        work.lose_patience()
    for thread in threads:
        thread.join(60)
    assert len(got) == 2


def test_whatever_is_decided_meanwhile_each_job_is_taken_once_and_none_is_left() -> None:
    jobs = [claimed(random.randint(-3, 3)) for _ in range(2_000)]
    work = WorkQueue(8)
    work._concurrency.judge_at = float("inf")
    got: Counter[str] = Counter()
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            try:
                _, job = work.get(timeout=600)
            except queue.Empty:
                continue
            got[job.message_id] += 1
            with work.mutex:
                work._concurrency.one_at_a_time = random.random() < 0.5
                if not work.one_at_a_time:
                    work.not_empty.notify_all()
            work.task_done()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    while jobs:
        several = [jobs.pop() for _ in range(min(random.randint(1, 30), len(jobs)))]
        work.expected.update(several)
        work.put((0, several[0]))
        work.put_all(several[1:])
    work.join()
    done.set()
    work.close()
    for thread in threads:
        thread.join(60)
    assert len(got) == 2_000 and set(got.values()) == {1}


def test_a_closed_queue_hands_nothing_out() -> None:
    job, suspect = claimed(), claimed(crashes=2)
    work = holding(job, suspect)
    assert set(work.close()) == {job, suspect}
    assert taken(work) is None and work.unfinished_tasks == 0
