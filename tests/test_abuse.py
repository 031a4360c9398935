"""Whatever a job does to its worker, the mail server to a mail, or the disk to a file: every job has one end, and nobody else loses his."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from conftest import Launcher, Running, environment, eventually, execute, is_alive
from misbehaviour import ERRORS, STORABLE, UNSTORABLE

from jobsys.settings import Settings
from jobsys.system import JobRecord, JobSystem

StartWorker = Callable[..., Running]

FAIL = [*ERRORS, "recursion", *(f"returns {how}" for how in UNSTORABLE), "progress_NaN", "signal_handlers"]
FAIL += ["closes_stdout", "closes_stderr", "loops"]
SUCCEED = [f"returns {how}" for how in STORABLE]
SUCCEED += ["logs_100_000_lines", "logs_10_MB", "leaves_the_directory", "umask", "leaves_threads"]
SUCCEED += ["forks_and_both_return", "forks_and_the_child_fails", "forks_and_ends_the_child"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(__file__).parent)
    monkeypatch.setattr("conftest.CHECKOUT", f"{Path(here).parent}{os.pathsep}{here}")


@pytest.fixture
def abused(start_worker: StartWorker) -> StartWorker:
    """Starts a worker that knows the abusive types. (This process doesn't: it would know them in every other test, too.)"""
    return lambda **env: start_worker(**{"JOB_MODULES": "example_types,abusive_types"} | env)


class Jobs:
    """Jobs inserted as SQL clients do, and what became of them."""

    def __init__(self, system: JobSystem, url: str, ledger: Path) -> None:
        self.system, self.url, self.ledger = system, url, ledger

    def insert(self, **columns: Any) -> str:
        names, places = ", ".join(columns), ", ".join(["%s"] * len(columns))
        return str(execute(self.url, f"insert into jobs ({names}) values ({places}) returning id::text", *columns.values())[0][0])

    def submit(self, type: str, label: str = "", max_attempts: int = 0, **payload: Any) -> str:
        if type in ("ABUSE", "LEDGER"):
            payload |= {"ledger": str(self.ledger), "label": label}
        return self.insert(type=type, payload=json.dumps(payload), max_attempts=max_attempts)

    def misbehave(self, *ways: str) -> dict[str, str]:
        """A job for each way; their ids."""
        return {how: self.submit("ABUSE", "guilty", how=how) for how in ways}

    def neighbours(self, number: int = 100) -> list[str]:
        """Innocent jobs beside them."""
        return [self.submit("LEDGER", f"innocent-{n}", seconds=0.02) for n in range(number)]

    def ends(self, ids: Iterable[str], timeout: float = 60) -> list[JobRecord]:
        """Wait for the ends of some jobs."""

        def all_finished() -> bool:
            unfinished = "select type, status, payload from jobs where id::text = any(%s) and finished_at is null"
            left = execute(self.url, unfinished, list(ids))
            assert left == []
            return True

        eventually(all_finished, timeout)
        return [self.system.job(id) for id in ids]

    def wait_for_workers(self, number: int) -> None:
        eventually(lambda: len([each for each in self.system.workers() if each.alive]) == number, 20)

    def noted(self, what: str) -> list[tuple[str, int]]:
        """What the jobs wrote down: label and process of each."""
        return [(words[1], int(words[3])) for line in self.ledger.read_text().splitlines() if (words := line.split())[0] == what]


def session(process: psutil.Process) -> int:
    with contextlib.suppress(OSError):
        return os.getsid(process.pid)
    return -1


@pytest.fixture
def jobs(system: JobSystem, database_url: str, tmp_path: Path, abused: StartWorker) -> Jobs:
    return Jobs(system, database_url, tmp_path / "ledger")


def test_a_job_can_harm_itself_and_nobody_else(jobs: Jobs, abused: StartWorker, system: JobSystem, tmp_path: Path) -> None:
    worker = abused(OUTPUT_DIR="output")
    jobs.wait_for_workers(1)
    guilty, innocent = jobs.misbehave(*FAIL, *SUCCEED), jobs.neighbours()
    done = dict(zip(guilty, jobs.ends(guilty.values()), strict=True))
    expected = {**dict.fromkeys(FAIL, "FAILED"), **dict.fromkeys(SUCCEED, "COMPLETED")}
    assert {how: job.status for how, job in done.items() if job.status != expected[how]} == {}
    assert {job.attempt for job in done.values()} == {1}
    for how in FAIL:
        error = done[how].error or {}
        assert error["type"] and len(error["type"]) + len(error["message"]) < 10_000, how
        assert len(system.failures(guilty[how])) == 1
    assert done["forks_and_ends_the_child"].result == -signal.SIGTERM
    assert {job.status for job in jobs.ends(innocent)} == {"COMPLETED"}
    assert set(Counter(label for label, _ in jobs.noted("end")).values()) == {1}
    [export] = jobs.ends([jobs.submit("CSV_EXPORT", data=[{"a": 1}])])
    assert (tmp_path / export.result["file"]).read_text() == "a\n1\n", "a relative OUTPUT_DIR is where the worker was started"
    [pid] = {pid for _, pid in jobs.noted("start")}
    assert worker.stop() == 0
    assert [process for process in psutil.process_iter() if session(process) == pid and is_alive(process)] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_worker_that_can_log_nowhere_does_its_work(jobs: Jobs, launcher: Launcher, settings: Settings) -> None:
    command = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh", sys.executable, "-m", "jobsys", "worker"]
    worker = launcher.start("worker", command, environment(settings, LOG_FILE="/dev/full"))
    failing = [jobs.submit("TEST_JOB", max_attempts=2, failTimes=9) for _ in range(20)]
    assert {(job.status, job.attempt) for job in jobs.ends(failing)} == {("FAILED", 2)}
    assert jobs.ends([jobs.submit("TEST_JOB")])[0].status == "COMPLETED"
    assert len(jobs.system.workers()) == 1 and worker.stop() == 0


def test_a_job_that_kills_its_process_ends_alone(jobs: Jobs, abused: StartWorker) -> None:
    worker = abused(WORKER_PROCESSES=4, MAX_CRASHES=2)
    jobs.wait_for_workers(4)
    killers = jobs.misbehave("os_exit", "segfault", "abort", "killed_for_its_memory", "catastrophic_regex")
    innocent = jobs.neighbours()
    for how, job in zip(killers, jobs.ends(killers.values(), 90), strict=True):
        assert (job.status, (job.error or {})["type"]) == ("DEAD", "WorkerLost"), how
    assert {job.status for job in jobs.ends(innocent)} == {"COMPLETED"}
    assert "in segfault" in worker.output
    eventually(lambda: "in catastrophic_regex" in worker.output, 20)


def test_a_process_that_a_job_has_crippled_is_replaced(jobs: Jobs, abused: StartWorker, system: JobSystem) -> None:
    worker = abused(WORKER_PROCESSES=2)
    jobs.wait_for_workers(2)
    stones = jobs.misbehave("sleeps_in_python", "sleeps_in_c", "waits_for_a_lock", "loops_and_catches_everything")
    others = jobs.misbehave("closes_every_descriptor", "little_recursion", "too_much_memory")
    innocent = jobs.neighbours()
    for how, job in zip(stones, jobs.ends(stones.values()), strict=True):
        assert (job.status, (job.error or {})["type"]) == ("FAILED", "TimeLimitExceeded"), how
    assert [job.status for job in jobs.ends(others.values())] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert {job.status for job in jobs.ends(innocent)} == {"COMPLETED"}
    jobs.wait_for_workers(2)
    assert "somebody closed its file descriptors" in worker.output
    assert system.wait(jobs.submit("TEST_JOB"), 20).status == "COMPLETED"


def test_a_row_that_makes_no_sense_is_a_failure_of_its_own(jobs: Jobs, abused: StartWorker, system: JobSystem, database_url: str) -> None:
    abused()
    jobs.wait_for_workers(1)
    [before] = system.workers()
    deep = '{"a":' * 3000 + "1" + "}" * 3000
    fails = {"payload": '{"failTimes": 9}'}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("COMPLETED", {"options": '{"time_limit": "soon"}'}),
        ("COMPLETED", {"options": '{"max_age": "young", "pipe_target": 5, "on_success": 5}'}),
        ("COMPLETED", {"priority": -32768, "max_attempts": 2147483647}),
        ("COMPLETED", {"priority": 32767, "run_at": "0001-01-02"}),
        ("FAILED", {"options": '{"throws": "stones"}', "max_attempts": 1, **fails}),
        ("FAILED", {"options": '{"throws": [5]}', "max_attempts": 3, **fails}),
        ("FAILED", {"options": '{"retries": "many"}', "max_attempts": 2, **fails}),
        ("FAILED", {"options": '{"min_backoff": "short", "on_failure": "nobody"}', "max_attempts": 2, **fails}),
        ("FAILED", {"type": "add", "queue": "plain", "options": '{"args": 5}', "max_attempts": 1}),
        ("FAILED", {"type": "add", "queue": "plain", "payload": '{"c": 5}', "max_attempts": 1}),
        ("FAILED", {"type": "add", "queue": "plain", "payload": deep, "max_attempts": 1}),
        ("DEAD", {"options": deep}),
        ("DEAD", {"type": "LEDGER", "payload": '{"ledger": ["of", "another", "shape"]}'}),
        ("DEAD", {"type": "LEDGER", "payload": deep}),
    ]
    ids = [jobs.insert(**{"type": "TEST_JOB"} | columns) for _, columns in rows for _ in range(2)]
    innocent = jobs.neighbours(10)
    for (status, columns), job in zip([row for row in rows for _ in range(2)], jobs.ends(ids), strict=True):
        assert job.status == status, columns
        assert status == "COMPLETED" or (job.error or {})["message"], columns
    assert {job.status for job in jobs.ends(innocent)} == {"COMPLETED"}
    assert [each.id for each in system.workers() if each.alive] == [before.id]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("attempt", 2**31 - 1),
        ("crashes", 2**31 - 1),
        ("claim", 2**63 - 1),
        *((column, moment) for column in ("run_at", "created_at") for moment in ("infinity", "-infinity", "294276-01-01")),
    ],
)
def test_a_row_that_could_not_be_claimed_cannot_be_stored(jobs: Jobs, column: str, value: Any) -> None:
    with pytest.raises(psycopg2.errors.CheckViolation):
        jobs.insert(type="TEST_JOB", **{column: value})
