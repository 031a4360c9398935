"""Workers as the Procfile starts them: jobs run, fail, stop, crash, and nothing is lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import dramatiq
import psutil
import psycopg2
import pytest
from conftest import Launcher, Running, environment, eventually, execute
from dramatiq.errors import QueueJoinTimeout
from dramatiq.results.errors import ResultFailure

from jobsys import migrations
from jobsys.ids import new_job_id
from jobsys.settings import Settings
from jobsys.system import JobRecord, JobSystem, Submission

StartWorker = Callable[..., Running]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With the job types of example_types.py, for this process and the workers."""
    return settings.model_copy(update={"job_modules": ["example_types"]})


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers find example_types.py as a user's module is found: on the path."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr("conftest.CHECKOUT", f"{Path(here).parent}{os.pathsep}{here}")


def lines(ledger: Path, what: str = "") -> list[str]:
    return [line for line in ledger.read_text().splitlines() if line.startswith(what)] if ledger.exists() else []


def started(ledger: Path, n: int = 1, timeout: float = 15) -> list[str]:
    eventually(lambda: len(lines(ledger, "start")) >= n, timeout)
    return lines(ledger, "start")


def until(system: JobSystem, job: JobRecord, *statuses: str, timeout: float = 20) -> JobRecord:
    return eventually(lambda: next((now for now in [system.job(job.id)] if now.status in statuses), None), timeout)


def test_a_job_runs_and_its_result_is_kept(system: JobSystem, worker: Running) -> None:
    done = system.wait(system.submit("TEST_JOB", {"progressSteps": 2, "hello": "world"}).id, 20)
    assert (done.status, done.attempt, (done.result or {})["hello"]) == ("COMPLETED", 1, "world")
    assert (done.progress or {})["fraction"] == 1.0 and done.worker is not None
    kinds = [event.kind for event in system.events(done.id)]
    assert kinds[0] == "created" and kinds[-1] == "finished" and "log" in kinds


def test_a_failing_job_is_retried_with_growing_pauses_and_then_failed(system: JobSystem, worker: Running) -> None:
    done = system.wait(system.submit("TEST_JOB", {"failTimes": 9}, max_retries=2).id, 20)
    assert (done.status, done.attempt, (done.error or {})["attempt"]) == ("FAILED", 3, 3)
    failures = system.failures(done.id)
    assert [failure.attempt for failure in failures] == [1, 2, 3]
    assert all("RuntimeError" in failure.traceback and "dramatiq" not in failure.traceback for failure in failures)
    assert len({failure.fingerprint for failure in failures}) == 1
    assert system.totals()["jobs_retried"] == 2


def test_a_failed_attempt_is_one_line_in_the_log(system: JobSystem, worker: Running) -> None:
    done = system.wait(system.submit("TEST_JOB", {"failTimes": 9, "failWith": "as told"}, max_retries=1).id, 20)
    eventually(lambda: worker.output.count("attempt failed") >= 2)
    lines = [line for line in worker.output.splitlines() if done.id in line]
    assert len(lines) == 2 and all("attempt failed" in line and "as told" in line for line in lines)
    assert "Traceback" not in worker.output


def test_a_retried_job_can_succeed_and_keeps_its_history(system: JobSystem, worker: Running) -> None:
    done = system.wait(system.submit("TEST_JOB", {"failTimes": 1}).id, 20)
    assert (done.status, done.attempt) == ("COMPLETED", 2)
    assert len(system.failures(done.id)) == 1


def test_giving_up_is_final(system: JobSystem, worker: Running, ledger: Path) -> None:
    done = system.wait(system.submit("HOPELESS", {"ledger": str(ledger)}).id, 20)
    assert (done.status, done.attempt, (done.error or {})["message"]) == ("FAILED", 1, "there is no point")


def test_an_operator_can_run_a_failed_job_again(system: JobSystem, worker: Running, ledger: Path) -> None:
    job = system.submit("HOPELESS", {"ledger": str(ledger)})
    system.wait(job.id, 20)
    system.retry(job.id, by="me")
    started(ledger, 2)
    again = until(system, job, "FAILED")
    assert again.attempt == 1 and len(system.failures(job.id)) == 2
    assert [(event.kind, event.by) for event in system.events(job.id) if event.by] == [("retried", "me")]


def test_a_payload_that_no_longer_validates_is_a_dead_letter(system: JobSystem, worker: Running, database_url: str) -> None:
    [(id,)] = execute(database_url, "insert into jobs (type, payload) values ('TEST_JOB', '{\"sleepMs\": \"soon\"}') returning id::text")
    done = system.wait(id, 20)
    assert done.status == "DEAD" and "sleepMs" in (done.error or {})["message"]


@pytest.mark.parametrize("how", ["nul", "surrogate", "huge", "mute", "exit", "set of", "nan", "nul result"])
def test_however_a_job_fails_it_ends_once_and_is_recorded(system: JobSystem, worker: Running, how: str) -> None:
    done = system.wait(system.submit("VICIOUS", {"how": how.removesuffix(" of")}).id, 20)
    if how == "set of":
        assert done.status == "COMPLETED" and sorted(done.result) == [1, 2]
    else:
        assert done.status == "FAILED" and (done.error or {})["message"]
    assert system.wait(system.submit("TEST_JOB").id, 20).status == "COMPLETED"


def test_a_running_job_is_cancelled_in_whichever_process_it_runs(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    start_worker(WORKER_PROCESSES=2)
    asks, deaf = (system.submit(type, {"ledger": str(ledger), "seconds": 60}) for type in ("LEDGER", "DEAF"))
    started(ledger, 2)
    system.cancel(asks.id, by="me")
    assert system.cancel(deaf.id, by="me").status == "PROCESSING"
    for job in (asks, deaf):
        assert until(system, job, "CANCELLED").finished_at is not None
    assert not lines(ledger, "end")


def test_a_job_that_does_not_ask_is_stopped_inside_its_function(system: JobSystem, worker: Running, ledger: Path) -> None:
    job = system.submit("DEAF", {"ledger": str(ledger), "seconds": 60})
    [line] = started(ledger)
    system.cancel(job.id)
    until(system, job, "CANCELLED")
    os.kill(int(line.split()[3]), 0)  # its process lives on
    assert system.wait(system.submit("TEST_JOB").id, 20).status == "COMPLETED"


def test_a_job_that_nothing_can_stop_costs_its_process_and_no_other_job(system: JobSystem, worker: Running, ledger: Path) -> None:
    stone = system.submit("STONE", {"ledger": str(ledger), "seconds": 50})
    [line] = started(ledger)
    neighbour = system.submit("LEDGER", {"ledger": str(ledger), "seconds": 7, "label": "neighbour"})
    started(ledger, 2)
    system.cancel(stone.id)
    assert until(system, stone, "CANCELLED", timeout=15)
    assert system.wait(neighbour.id, 30).status == "COMPLETED"
    eventually(lambda: not psutil.pid_exists(int(line.split()[3])), 15)
    assert system.wait(system.submit("TEST_JOB").id, 20).status == "COMPLETED"


def test_a_job_over_its_time_limit_has_failed(system: JobSystem, worker: Running, ledger: Path) -> None:
    done = system.wait(system.submit("SHORT_OF_TIME", {"ledger": str(ledger)}).id, 20)
    assert (done.status, (done.error or {})["type"]) == ("FAILED", "TimeLimitExceeded")


def test_sigterm_lets_running_jobs_finish_and_gives_the_others_back(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    worker = start_worker(WORKER_THREADS=1, SHUTDOWN_GRACE="20s")
    first = system.submit("LEDGER", {"ledger": str(ledger), "seconds": 1.5})
    started(ledger)
    waiting = system.submit_many(Submission("LEDGER", {"ledger": str(ledger)}) for _ in range(20))
    assert worker.stop() == 0
    assert system.job(first.id).status == "COMPLETED"
    left = [system.job(id) for id in waiting]
    assert {(job.status, job.attempt) for job in left} == {("PENDING", 0)}
    assert system.workers() == []


def test_a_job_that_outlasts_the_grace_goes_back_as_the_same_attempt(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    worker = start_worker(SHUTDOWN_GRACE="500ms")
    stubborn = system.submit("STONE", {"ledger": str(ledger), "seconds": 30})
    willing = system.submit("LEDGER", {"ledger": str(ledger), "seconds": 30})
    started(ledger, 2)
    assert worker.stop() == 0
    for job in (stubborn, willing):
        now = system.job(job.id)
        assert (now.status, now.attempt, now.worker) == ("PENDING", 0, None)
    assert not lines(ledger, "end")


def test_a_killed_workers_job_runs_again_elsewhere(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    start_worker()
    job = system.submit("LEDGER", {"ledger": str(ledger), "seconds": 2})
    [line] = started(ledger)
    os.kill(int(line.split()[3]), signal.SIGKILL)
    done = until(system, job, "COMPLETED")
    assert done.attempt == 2 and len(lines(ledger, "start")) == 2
    assert [failure.type for failure in system.failures(job.id)] == ["WorkerLost"]


def test_when_the_whole_machine_dies_its_jobs_run_on_another(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    one = start_worker()
    job = system.submit("LEDGER", {"ledger": str(ledger), "seconds": 2})
    started(ledger)
    one.process.kill()
    for process in one.family:
        process.kill()
    pids = [int(line.split()[3]) for line in started(ledger)]
    os.kill(pids[0], signal.SIGKILL)
    start_worker()
    assert until(system, job, "COMPLETED").attempt == 2


def test_when_only_the_supervisor_dies_its_workers_end_in_good_order(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    worker = start_worker(SHUTDOWN_GRACE="10s")
    job = system.submit("LEDGER", {"ledger": str(ledger), "seconds": 1})
    [line] = started(ledger)
    worker.process.kill()
    assert until(system, job, "COMPLETED").attempt == 1
    eventually(lambda: not psutil.pid_exists(int(line.split()[3])), 15)
    assert system.workers() == []


def test_a_supervisor_does_not_wait_for_whoever_has_its_dead_worker_locked(
    system: JobSystem, start_worker: StartWorker, database_url: str
) -> None:
    worker = start_worker()
    eventually(system.workers)
    [child] = psutil.Process(worker.pid).children()
    with contextlib.closing(psycopg2.connect(database_url)) as stuck:
        stuck.cursor().execute("select from workers for update")  # as a rescuer that is stuck
        child.kill()
        eventually(lambda: "will be replaced" in worker.output)
        assert worker.stop() == 0


def test_a_frozen_workers_job_runs_elsewhere_and_the_frozen_one_cannot_record_its_end(
    system: JobSystem, start_worker: StartWorker, ledger: Path
) -> None:
    start_worker(WORKER_LOST_AFTER="1s")
    job = system.submit("LEDGER", {"ledger": str(ledger), "seconds": 3})
    [line] = started(ledger)
    frozen = int(line.split()[3])
    os.kill(frozen, signal.SIGSTOP)
    other = start_worker(WORKER_LOST_AFTER="1s")
    started(ledger, 2)
    os.kill(frozen, signal.SIGCONT)
    done = until(system, job, "COMPLETED")
    assert done.attempt == 2
    ends = eventually(lambda: lines(ledger, "end"))
    assert {int(end.split()[3]) for end in ends} != {frozen}
    eventually(lambda: len([worker for worker in system.workers() if worker.alive]) == 2)
    assert other.process.poll() is None


def test_a_job_that_kills_its_worker_three_times_is_a_dead_letter(system: JobSystem, worker: Running, ledger: Path) -> None:
    job = system.submit("KILLER", {"ledger": str(ledger)})
    done = until(system, job, "DEAD", timeout=40)
    assert done.attempt == 3 and len(lines(ledger, "start")) == 3
    assert system.wait(system.submit("TEST_JOB").id, 20).status == "COMPLETED", "the service goes on"


def test_a_row_that_cannot_be_read_is_a_dead_letter_and_holds_up_no_other(system: JobSystem, worker: Running, database_url: str) -> None:
    insert = "insert into jobs (type, options) values ('TEST_JOB', %s::jsonb) returning id::text"
    [(unreadable,)] = execute(database_url, insert, '{"n": ' + "9" * 5000 + "}")
    [(put_aside,)] = execute(database_url, insert, '{"eta": 99999999999999}')
    later = system.submit("TEST_JOB")
    assert system.wait(later.id, 20).status == "COMPLETED"
    assert system.wait(put_aside, 20).status == "COMPLETED"
    dead = system.wait(unreadable, 20)
    # Python before 3.10.7 reads numbers of any length.
    assert dead.status == ("DEAD" if hasattr(sys, "get_int_max_str_digits") else "COMPLETED")


def test_a_killer_does_not_take_its_neighbours_along(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    killer = system.submit("KILLER", {"ledger": str(ledger)})
    others = system.submit_many(Submission("LEDGER", {"ledger": str(ledger), "seconds": 1}) for _ in range(6))
    start_worker(WORKER_THREADS=2)
    assert until(system, killer, "DEAD", timeout=60)
    ends = [system.wait(id, 40) for id in others]
    assert {end.status for end in ends} == {"COMPLETED"}, [(end.status, end.attempt, end.error) for end in ends]


def test_losing_every_database_connection_loses_and_doubles_nothing(
    system: JobSystem, start_worker: StartWorker, ledger: Path, database_url: str
) -> None:
    start_worker(WORKER_THREADS=8)
    ids = system.submit_many(Submission("LEDGER", {"ledger": str(ledger), "seconds": 0.05, "label": f"n{n}"}) for n in range(300))
    started(ledger, 20)
    for _ in range(4):
        execute(
            database_url,
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()",
        )
        time.sleep(0.4)
    eventually(lambda: system.counts()["COMPLETED"] == 300, 40)
    assert len(lines(ledger, "start")) == len(lines(ledger, "end")) == 300, "each ran once: no process died"
    assert {system.job(id).attempt for id in ids} == {1}


def test_a_claim_whose_answer_was_lost_is_given_back(system: JobSystem, worker: Running, database_url: str) -> None:
    job = system.submit("TEST_JOB", delay=3600)
    [state] = eventually(system.workers)
    execute(
        database_url,
        """update jobs set status = 'PROCESSING', attempt = 1, claim = 1, worker = %s, started_at = clock_timestamp() - interval '11
        seconds'""",
        state.id,
    )
    done = until(system, job, "COMPLETED")
    assert done.attempt == 1 and "not answered" in worker.output


def test_a_worker_started_before_the_migration_says_so_and_waits(server: str, start_worker: StartWorker, settings: Settings) -> None:
    execute(server, "create database unmigrated")
    try:
        url = urlunsplit(urlsplit(server)._replace(path="/unmigrated"))
        worker = start_worker(DATABASE_URL=url)
        eventually(lambda: "jobsys migrate" in worker.output)
        migrations.migrate(url)
        late = JobSystem(settings.model_copy(update={"database_url": url}))
        assert late.wait(late.submit("TEST_JOB").id, 20).status == "COMPLETED"
        late.close()
        assert worker.stop() == 0
    finally:
        execute(server, "drop database unmigrated with (force)")


def test_dramatiqs_own_launcher_works_too(system: JobSystem, launcher: Launcher, settings: Settings) -> None:
    command = [sys.executable, "-m", "dramatiq", "jobsys.worker:broker", "--processes", "1", "--threads", "2"]
    dramatiq = launcher.start("dramatiq", command, environment(settings))
    assert system.wait(system.submit("TEST_JOB").id, 20).status == "COMPLETED"
    assert dramatiq.stop() == 0
    assert system.workers() == []


def test_a_type_this_worker_does_not_know_waits_for_one_that_does(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    job = system.submit("LEDGER", {"ledger": str(ledger)})
    start_worker(JOB_MODULES="")
    assert system.wait(system.submit("TEST_JOB").id, 20).status == "COMPLETED"
    assert system.job(job.id).status == "PENDING"
    start_worker()
    assert system.wait(job.id, 20).status == "COMPLETED"


def test_a_delayed_job_starts_when_it_is_due_and_not_before(system: JobSystem, worker: Running) -> None:
    until(system, system.submit("TEST_JOB"), "COMPLETED")  # it works by now
    done = system.wait(system.submit("TEST_JOB", delay=1.0).id, 20)
    assert done.started_at is not None and done.started_at >= done.run_at


def test_an_urgent_job_starts_before_the_backlog(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    system.submit_many(Submission("LEDGER", {"ledger": str(ledger), "seconds": 0.2, "label": f"n{n}"}) for n in range(60))
    start_worker(WORKER_THREADS=2)
    started(ledger, 4)
    before = len(lines(ledger, "start"))
    urgent = system.submit("LEDGER", {"ledger": str(ledger), "label": "urgent"}, priority="high")
    system.wait(urgent.id, 20)
    position = next(number for number, line in enumerate(lines(ledger, "start")) if " urgent " in line)
    assert position <= before + 4, "behind what was running or started meanwhile, and not behind the backlog"


def test_a_claim_made_at_the_pace_of_fast_jobs_does_not_hoard_slow_ones(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    system.submit_many(Submission("TEST_JOB") for _ in range(2000))
    slow = system.submit_many(Submission("LEDGER", {"ledger": str(ledger), "seconds": 4}) for _ in range(60))
    start_worker(WORKER_THREADS=2)
    started(ledger, 2, timeout=30)
    eventually(lambda: system.counts()["PROCESSING"] == 2, 3)
    jobs = [system.job(id) for id in slow]
    assert {job.attempt for job in jobs if job.status == "PENDING"} == {0}


def test_a_paced_queue_keeps_its_pace_over_all_processes_most_urgent_first(system: JobSystem, start_worker: StartWorker) -> None:
    group = new_job_id()
    for priority in ("low", "default", "high"):
        system.submit_many(Submission("INGEST_BATCH", {"ids": [n]}, priority=priority, group_id=group) for n in (1, 2))
    start_worker(WORKER_PROCESSES=3, INGEST_RATE="1/700ms")
    eventually(lambda: all(job.finished for job in system.group(group)), 30)
    order = sorted(system.group(group), key=lambda job: job.started_at or job.created_at)
    assert [job.priority for job in order] == [-10, -10, 0, 0, 10, 10]
    starts = [job.started_at for job in order if job.started_at]
    gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(starts)]
    assert min(gaps) >= 0.7


def test_a_paced_queue_keeps_its_pace_beside_a_backlog_of_another(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    system.submit_many(Submission("LEDGER", {"ledger": str(ledger), "seconds": 0.02}) for _ in range(2000))
    group = new_job_id()
    system.submit_many(Submission("INGEST_BATCH", {"ids": [n]}, group_id=group) for n in range(1, 7))
    start_worker(WORKER_THREADS=4, INGEST_RATE="1/500ms")
    eventually(lambda: all(job.finished for job in system.group(group)), 20)
    assert system.counts()["PENDING"] > 0, "the backlog was there all the time"
    starts = sorted(job.started_at for job in system.group(group) if job.started_at)
    assert min((later - earlier).total_seconds() for earlier, later in itertools.pairwise(starts)) >= 0.5


def test_no_more_jobs_of_a_queue_run_at_once_than_its_maximum(system: JobSystem, start_worker: StartWorker, ledger: Path) -> None:
    system.limit("default", max_running=2)
    start_worker(WORKER_PROCESSES=2)
    system.submit_many(Submission("LEDGER", {"ledger": str(ledger), "seconds": 0.2}) for _ in range(10))
    eventually(lambda: system.counts()["COMPLETED"] == 10, 30)
    running = most = 0
    for line in sorted(lines(ledger), key=lambda line: float(line.split()[4])):
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    assert most == 2


def all_sleep(workers: int, database_url: str) -> None:
    """Wait until so many processes wait for a notification, and for nothing else."""
    eventually(lambda: execute(database_url, "select count(*) from workers where asleep @> queues") == [(workers,)], 30)
    time.sleep(0.5)  # also past the first, shorter looks


def all_start(jobs: int, ledger: Path, database_url: str) -> None:
    """Wait until so many jobs have been started."""

    def have() -> bool:
        state = "select pid, asleep, occupied, (select count(*) from jobs where worker = workers.id) from workers"
        assert [line.split()[0] for line in lines(ledger)] == ["start"] * jobs, (lines(ledger), execute(database_url, state))
        return True

    eventually(have, 10)


def test_a_crowd_of_slow_jobs_wakes_every_process(system: JobSystem, start_worker: StartWorker, ledger: Path, database_url: str) -> None:
    start_worker(WORKER_PROCESSES=6, WORKER_THREADS=2, POLL_INTERVAL=60, SHUTDOWN_GRACE=0)
    all_sleep(6, database_url)
    payload = json.dumps({"ledger": str(ledger), "seconds": 30})
    execute(database_url, "insert into jobs (type, payload) select 'LEDGER', %s from generate_series(1, 12)", payload)
    all_start(12, ledger, database_url)


def test_a_job_that_is_committed_late_is_told_to_those_who_are_idle_by_then(
    system: JobSystem, start_worker: StartWorker, ledger: Path, database_url: str
) -> None:
    start_worker(WORKER_PROCESSES=6, WORKER_THREADS=1, POLL_INTERVAL=60, SHUTDOWN_GRACE=0)
    all_sleep(6, database_url)
    slow = {"ledger": str(ledger), "seconds": 30}
    with contextlib.closing(psycopg2.connect(database_url)) as late:
        system.submit("LEDGER", slow, connection=late)
        for n in range(1, 6):
            system.submit("LEDGER", slow)
            eventually(lambda n=n: len(lines(ledger)) >= n, 20)
        late.commit()
    all_start(6, ledger, database_url)


def test_of_a_queue_with_limits_all_that_may_run_do(system: JobSystem, start_worker: StartWorker, ledger: Path, database_url: str) -> None:
    system.limit("default", max_running=6)
    start_worker(WORKER_PROCESSES=6, WORKER_THREADS=1, POLL_INTERVAL=60, SHUTDOWN_GRACE=0)
    all_sleep(6, database_url)
    payload = json.dumps({"ledger": str(ledger), "seconds": 30})
    execute(database_url, "insert into jobs (type, payload) select 'LEDGER', %s from generate_series(1, 6)", payload)
    all_start(6, ledger, database_url)


def test_a_process_that_ends_is_told_of_no_more_jobs(system: JobSystem, worker: Running, ledger: Path, database_url: str) -> None:
    job = system.submit("LEDGER", {"ledger": str(ledger), "seconds": 5})
    started(ledger)
    assert execute(database_url, "select cardinality(asleep) > 0 from workers") == [(True,)]
    worker.signal()
    eventually(lambda: execute(database_url, "select asleep, busy_above from workers") == [([], None)])
    until(system, job, "COMPLETED")


def test_a_job_that_nobody_is_told_of_is_found_by_looking(system: JobSystem, worker: Running, database_url: str) -> None:
    until(system, system.submit("TEST_JOB"), "COMPLETED")
    eventually(lambda: execute(database_url, "select cardinality(asleep) from workers") > [(0,)])
    time.sleep(1)  # also past the first, shorter looks
    execute(database_url, "alter table jobs disable trigger jobs_inserted")
    until(system, system.submit("TEST_JOB"), "COMPLETED")


def test_a_notification_that_comes_with_the_answer_to_a_heartbeat_is_heard(
    system: JobSystem, start_worker: StartWorker, database_url: str
) -> None:
    start_worker(WORKER_PROCESSES=1, WORKER_HEARTBEAT="2s", POLL_INTERVAL=60)
    all_sleep(1, database_url)
    execute(
        database_url,
        """
        create function tell_with_the_beat() returns trigger language plpgsql as $$
        begin
            perform pg_notify('jobsys', 'default');
            return null;
        end $$;
        create trigger tells after update of heartbeat_at on workers execute function tell_with_the_beat();
        alter table jobs disable trigger jobs_inserted;
        """,
    )
    until(system, system.submit("TEST_JOB"), "COMPLETED")


def test_a_new_worker_soon_looks_again_who_has_started_with_it(start_worker: StartWorker, database_url: str) -> None:
    start_worker(WORKER_PROCESSES=2, WORKER_HEARTBEAT="20s")
    again = "select count(*) from workers where heartbeat_at > started_at + interval '0.5 seconds'"
    eventually(lambda: execute(database_url, again) == [(2,)], timeout=10)


def test_a_worker_serves_the_queues_it_is_told_to_and_says_so(system: JobSystem, start_worker: StartWorker) -> None:
    batch, other = system.submit("INGEST_BATCH", {"ids": [1]}), system.submit("TEST_JOB")
    start_worker(WORKER_QUEUES="ingestion")
    until(system, batch, "COMPLETED")
    assert [(worker.queues, worker.types) for worker in system.workers()] == [(["ingestion"], ["INGEST_BATCH"])]
    assert system.job(other.id).status == "PENDING"


def test_a_queue_that_there_is_not_is_named_at_the_start(start_worker: StartWorker) -> None:
    refused = start_worker(WORKER_QUEUES="ingestion,mail")
    assert refused.wait() == 1 and 'WORKER_QUEUES: no job type has the queue "mail"; there are default, ingestion' in refused.output


def test_a_type_that_hangs_leaves_threads_to_the_others(system: JobSystem, worker: Running, ledger: Path) -> None:
    hanging = system.submit_many(Submission("HANGING", {"ledger": str(ledger), "seconds": 60, "label": "hanging"}) for _ in range(20))
    others = system.submit_many(Submission("LEDGER", {"ledger": str(ledger), "label": "other"}) for _ in range(20))
    for job in others:
        until(system, system.job(job), "COMPLETED")
    assert len(lines(ledger, "start hanging")) == 2, "of four threads its share is two"
    for job in hanging[:3:-1]:
        system.cancel(job)
    for job in hanging[:2]:
        system.cancel(job)
    eventually(lambda: len(lines(ledger, "start hanging")) == 4)
    for job in hanging[2:4]:
        system.cancel(job)


def test_a_type_whose_jobs_all_fail_alike_is_held_back_until_one_succeeds(system: JobSystem, worker: Running, ledger: Path) -> None:
    away = ledger.with_name("away")
    away.touch()
    jobs = system.submit_many(Submission("DEPENDENT", {"ledger": str(ledger), "away": str(away), "label": "dependent"}) for _ in range(40))
    eventually(lambda: [worker.held_back for worker in system.workers()] == [["DEPENDENT"]])
    other = system.submit("LEDGER", {"ledger": str(ledger)})
    until(system, other, "COMPLETED")
    assert len(lines(ledger, "start dependent")) < 20, "not one attempt of each"
    away.unlink()
    for job in jobs:
        until(system, system.job(job), "COMPLETED")
    assert len(lines(ledger, "end dependent")) == 40
    eventually(lambda: system.workers()[0].held_back == [])


def test_a_paused_queue_starts_nothing_until_it_is_resumed(system: JobSystem, worker: Running) -> None:
    system.wait(system.submit("TEST_JOB").id, 20)
    system.pause("default")
    job = system.submit("TEST_JOB")
    assert system.wait(job.id, 1).status == "PENDING"
    system.resume("default")
    assert system.wait(job.id, 10).status == "COMPLETED"


@pytest.fixture
def actors(system: JobSystem) -> dict[str, Any]:
    """The plain actors of example_types.py, as a program that sends to them declares them."""
    import example_types

    for name in ("add", "write_line", "record_success", "record_failure", "again_soon"):
        plain: Any = getattr(example_types, name)
        if name not in system.broker.actors:
            dramatiq.actor(plain.fn, broker=system.broker, actor_name=name, queue_name=plain.queue_name, **plain.options)
    return system.broker.actors


def test_a_plain_actor_gets_its_arguments_and_its_result_can_be_had(system: JobSystem, worker: Running, actors: dict[str, Any]) -> None:
    message = actors["add"].send(1, b=2)
    assert message.get_result(backend=system.broker.get_results_backend(), block=True, timeout=15_000) == 3
    assert system.job(message.message_id).status == "COMPLETED"


def test_pipelines_and_groups_of_plain_actors_work(system: JobSystem, worker: Running, actors: dict[str, Any]) -> None:
    add, broker = actors["add"], system.broker
    pipe = dramatiq.pipeline([add.message(1, 2), add.message(3), add.message(4)], broker=broker).run()
    assert pipe.get_result(block=True, timeout=15_000) == 10
    group = dramatiq.group([add.message(n, n) for n in range(5)], broker=broker).run()
    assert list(group.get_results(block=True, timeout=15_000)) == [0, 2, 4, 6, 8]


def test_delays_retries_and_callbacks_of_plain_actors_work(
    system: JobSystem, worker: Running, actors: dict[str, Any], tmp_path: Path
) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    actors["write_line"].send_with_options(args=(str(one), "later"), delay=300, on_success=actors["record_success"])
    actors["write_line"].send_with_options(args=(str(two), "failing", True), on_failure="record_failure")
    actors["again_soon"].send_with_options(args=(str(three),), on_success=actors["record_success"])
    system.broker.join("plain", timeout=20_000)
    assert one.read_text().splitlines() == ["later", "success None"]
    assert sorted(two.read_text().splitlines()) == ["failing", "failing", "failure RuntimeError", "failure RuntimeError"]
    assert three.read_text().splitlines() == ["try", "try", "try", "success third time"]


def test_a_plain_actor_that_fails_for_good_raises_at_whoever_asks_for_its_result(
    system: JobSystem, worker: Running, actors: dict[str, Any], tmp_path: Path
) -> None:
    message = actors["write_line"].send(str(tmp_path / "file"), "line", fail=True)
    with pytest.raises(ResultFailure, match="RuntimeError: told to"):
        message.get_result(backend=system.broker.get_results_backend(), block=True, timeout=15_000)
    assert len(system.failures(message.message_id)) == 2


def test_flush_removes_what_waits_and_join_waits_for_the_rest(system: JobSystem, actors: dict[str, Any]) -> None:
    actors["add"].send(1, 2)
    with pytest.raises(QueueJoinTimeout):
        system.broker.join("plain", timeout=100)
    system.broker.flush("plain")
    system.broker.join("plain", timeout=1000)
    assert system.jobs().jobs == []


def test_nothing_is_left_in_memory_or_in_the_database_when_a_worker_has_left(
    system: JobSystem, start_worker: StartWorker, database_url: str
) -> None:
    worker = start_worker(WORKER_PROCESSES=2)
    system.submit_many(Submission("TEST_JOB") for _ in range(200))
    eventually(lambda: system.counts()["COMPLETED"] == 200, 20)
    assert worker.stop() == 0
    assert execute(database_url, "select count(*) from workers") == [(0,)]
    assert execute(database_url, "select count(*) from pg_locks where locktype = 'advisory'") == [(0,)]
    sessions = (
        "select count(*) from pg_stat_activity where datname = current_database() and application_name ~ '^jobsys (worker|heart|chores)'"
    )
    eventually(lambda: execute(database_url, sessions) == [(0,)])


def test_the_clock_of_a_workers_machine_does_not_matter(system: JobSystem, start_worker: StartWorker, tmp_path: Path) -> None:
    (tmp_path / "hurried.py").write_text("import time\nright = time.time\ntime.time = lambda: right() + 600\n")
    start_worker(JOB_MODULES="hurried,example_types")
    soon = system.submit("TEST_JOB", {"progressSteps": 1}, delay=1.0)
    done = until(system, soon, "COMPLETED")
    [told] = [event for event in system.events(done.id) if event.kind == "log"]
    assert done.started_at is not None and done.finished_at is not None
    assert done.run_at <= done.started_at <= told.at <= done.finished_at
