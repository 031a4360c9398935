"""Whatever a job does to its worker, the mail server to a mail, or the disk to a file: every job has one end, and nobody else loses his."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import psycopg2
import pytest
from conftest import Launcher, Running, environment, eventually, execute, is_alive
from misbehaviour import ERRORS, STORABLE, UNSTORABLE
from test_email_send import Conversation, MailServer, RawServer

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
            unfinished = "select type, status, left(payload::text, 100) from jobs where id::text = any(%s) and finished_at is null"
            left = execute(self.url, unfinished, list(ids))
            assert not left, left
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
    # Pauses as long as by default: those of the tests' settings are over before the process is replaced.
    worker = abused(WORKER_PROCESSES=2, RETRY_MIN_BACKOFF="1s", RETRY_MAX_BACKOFF="5s")
    jobs.wait_for_workers(2)
    [closed] = jobs.ends(jobs.misbehave("closes_every_descriptor").values())
    assert closed.status == "COMPLETED"
    eventually(lambda: "somebody closed its file descriptors" in worker.output)
    jobs.wait_for_workers(2)
    stones = jobs.misbehave("sleeps_in_python", "sleeps_in_c", "waits_for_a_lock", "loops_and_catches_everything")
    others = jobs.misbehave("little_recursion", "too_much_memory", "no_memory_for_its_error")
    innocent = jobs.neighbours()
    for how, job in zip(stones, jobs.ends(stones.values()), strict=True):
        assert (job.status, (job.error or {})["type"]) == ("FAILED", "TimeLimitExceeded"), how
    assert [job.status for job in jobs.ends(others.values())] == ["COMPLETED", "FAILED", "FAILED"]
    assert [(job.attempt, job.max_attempts, job.error) for job in jobs.ends(innocent) if job.status != "COMPLETED"] == []
    jobs.wait_for_workers(2)
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
        ("COMPLETED" if sys.version_info >= (3, 13) else "DEAD", {"options": deep}),  # from 3.13 on that is not too deep to be read
        ("DEAD", {"options": f'{{"a": {"9" * 5000}}}'}),  # more digits than Python reads
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


# --- mail servers that misbehave (what one may answer: test_email_send.py)

HELLO: dict[str, Any] = {"to": "ada@example.test", "subject": "Hello", "body": "It works."}


class Dropping(MailServer):
    """Takes its first mail, and hangs up instead of saying so."""

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        answer = await super().handle_DATA(server, session, envelope)
        if len(self.envelopes) == 1:
            server.transport.abort()
        return answer


class Moody(Conversation):
    """Says to its first visitor one character in a while, to the second nothing, and to later ones what is proper."""

    def converse(self) -> None:
        self.server.heard.append("visit")
        visits = self.server.heard.count("visit")
        while visits == 1 and not self.server.closing.wait(0.05):
            self.wfile.write(b"2")
        if visits == 2:
            self.server.closing.wait(60)
        super().converse()


def sending_to(server: Any) -> dict[str, Any]:
    return {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": server.port, "MAIL_FROM": "jobs@example.test"}


def test_a_mail_whose_answer_was_lost_is_sent_again_with_the_same_message_id(jobs: Jobs, abused: StartWorker) -> None:
    with contextlib.closing(Dropping()) as server:
        abused(**sending_to(server))
        [mail] = jobs.ends([jobs.submit("EMAIL_SEND", **HELLO)])
        assert (mail.status, mail.attempt) == ("COMPLETED", 2)
        assert [each["Message-ID"] for each in server.mails] == [f"<{mail.id}@example.test>"] * 2


def test_a_mail_waits_for_a_server_that_is_too_busy(jobs: Jobs, abused: StartWorker, system: JobSystem) -> None:
    with contextlib.closing(RawServer(HI=[b"421 too busy", b"421 still too busy", b"220 welcome"])) as server:
        abused(**sending_to(server))
        [mail] = jobs.ends([jobs.submit("EMAIL_SEND", **HELLO)])
        assert (mail.status, mail.attempt, server.heard.count(".")) == ("COMPLETED", 3, 1)
        assert ["421" in failure.message for failure in system.failures(mail.id)] == [True, True]


def test_a_mail_server_that_hangs_holds_up_no_other_job(jobs: Jobs, abused: StartWorker, system: JobSystem) -> None:
    with contextlib.closing(RawServer()) as server:
        server.RequestHandlerClass = Moody
        abused(**sending_to(server))
        mail_id = jobs.submit("MAIL_IN_HASTE", max_attempts=5, **HELLO)
        eventually(lambda: "visit" in server.heard, 20)
        innocent = jobs.ends(jobs.neighbours(30))
        [mail] = jobs.ends([mail_id])
        assert (mail.status, mail.attempt, server.heard.count(".")) == ("COMPLETED", 3, 1)
        assert {failure.type for failure in system.failures(mail_id)} == {"TimeLimitExceeded"}
        assert {each.status for each in innocent} == {"COMPLETED"}
        assert max(str(each.finished_at) for each in innocent) < str(mail.finished_at)


# --- disks that are full, and processes that die while they write

ROWS = [{"number": number, "text": "x" * 100} for number in range(500)]


class Crowded(NamedTuple):
    """Where a worker's files are as seen from here, and what makes room there."""

    output: Path
    make_room: Callable[[], object]


@pytest.fixture
def full_disk(launcher: Launcher, settings: Settings, jobs: Jobs) -> Crowded:
    """A worker with an OUTPUT_DIR that is a full disk of its own."""
    settings.output_dir.mkdir()
    unshare = "-m" if os.geteuid() == 0 else "-rm"
    mount = ["unshare", unshare, "sh", "-c", 'mount -t tmpfs -o size=256k none "$0" && exec "$@"', str(settings.output_dir)]
    try:
        subprocess.run([*mount, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk of the test's own needs unshare(1) and the right to mount, which this machine doesn't give")
    env = environment(settings, LOG_FILE=settings.output_dir / "log")
    running = launcher.start("worker", [*mount, sys.executable, "-m", "jobsys", "worker"], env)
    jobs.wait_for_workers(1)
    output = Path(f"/proc/{running.pid}/root{settings.output_dir}")
    ballast = output / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return Crowded(output, ballast.unlink)


@pytest.fixture
def small_files(start_worker: StartWorker, settings: Settings, jobs: Jobs) -> Crowded:
    """A worker whose kernel refuses to write files of more than 20 kB, as it refuses where a disk or a quota is full."""
    start_worker(LOG_FILE=settings.output_dir / "log")
    jobs.wait_for_workers(1)
    process = psutil.Process(jobs.system.workers()[0].pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (20_000, before[1]))
    return Crowded(settings.output_dir, lambda: process.rlimit(psutil.RLIMIT_FSIZE, before))


@pytest.mark.parametrize(("place", "reason"), [("full_disk", "No space left on device"), ("small_files", "File too large")])
def test_a_file_that_finds_no_room_is_written_when_there_is_some(
    place: str, reason: str, request: pytest.FixtureRequest, jobs: Jobs, system: JobSystem
) -> None:
    output, make_room = request.getfixturevalue(place)
    export = jobs.submit("CSV_EXPORT", max_attempts=1000, data=ROWS)
    failures = eventually(lambda: system.failures(export)[1:], 20)
    assert {failure.type for failure in failures} == {"OSError"} and reason in failures[0].message
    assert not (output / f"{export}.csv").exists()
    make_room()
    [job] = jobs.ends([export])
    data = (output / f"{export}.csv").read_bytes()
    assert job.status == "COMPLETED" and hashlib.sha256(data).hexdigest() == job.result["sha256"]
    assert list((output / ".partial").iterdir()) == []
    [told] = jobs.ends([jobs.submit("TEST_JOB", max_attempts=1, failTimes=1)])
    eventually(lambda: told.id in (output / "log").read_text())


def test_a_process_that_is_killed_while_it_writes_leaves_no_file_that_is_not_whole(
    jobs: Jobs, start_worker: StartWorker, system: JobSystem, settings: Settings
) -> None:
    start_worker()
    jobs.wait_for_workers(1)
    [before] = system.workers()
    export = jobs.submit("CSV_EXPORT", data=ROWS * 300)
    partial, final = settings.output_dir / ".partial", settings.output_dir / f"{export}.csv"
    eventually(lambda: partial.is_dir() and list(partial.iterdir()), 30, interval=0.002)
    os.kill(before.pid, signal.SIGKILL)
    assert not final.exists() and list(partial.iterdir())
    [job] = jobs.ends([export])
    assert (job.status, job.attempt) == ("COMPLETED", 2)
    assert hashlib.sha256(final.read_bytes()).hexdigest() == job.result["sha256"]
    assert list(partial.iterdir()) == []
