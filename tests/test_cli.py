"""The command line as a person or a script meets it: what it prints where, and how it exits."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, eventually

from jobsys import Job, Payload, arguments, cli, terminal
from jobsys.job_types import JobType
from jobsys.settings import Settings
from jobsys.system import JobSystem, Submission


@dataclass
class Said:
    """What a command printed, and its exit status."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[list[str]]:
        return [line.split("\t") for line in self.out.splitlines()]


@pytest.fixture
def jobsys(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """`jobsys("job", id, stdin="…", PORT=…)` runs a command in this process, on `settings` and with no terminal."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(settings.data_dir.parent)

    def run(*words: str, stdin: str = "", **env: Any) -> Said:
        with monkeypatch.context() as patch:
            for name in Settings.model_fields:
                patch.delenv(name.upper(), raising=False)
            for name, value in environment(settings, **env).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["jobsys", *words])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            with pytest.raises(SystemExit) as exit:
                cli.main()
        said = capsys.readouterr()
        return Said(int(exit.value.code or 0), said.out, said.err)

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def on_a_terminal(settings: Settings, *words: str) -> tuple[int, str]:
    """Exit status and screen contents of a command that has a terminal of 100 columns."""
    main, side = pty.openpty()
    command = ["sh", "-c", 'stty cols 100; exec "$@"', "sh", sys.executable, "-m", "jobsys", *words]
    process = subprocess.Popen(command, env=environment(settings), stdin=side, stdout=side, stderr=side, cwd=settings.data_dir.parent)
    os.close(side)
    seen = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # how Linux says that the other side is closed
            part = b""
        if not part:
            break
        seen += part
    os.close(main)
    return process.wait(), seen.decode().replace("\r\n", "\n")


def test_help_is_there_at_once() -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "jobsys", "--help"], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert time.monotonic() - begun < 1  # 0.1 s on an idle machine
    assert done.returncode == 0
    for command in ("dev", "migrate", "worker", "submit", "jobs", "job", "retry", "cancel", "types", "queues", "workers", "smoke"):
        assert f"\n  {command} " in done.stdout
    modules = subprocess.run([sys.executable, "-X", "importtime", "-m", "jobsys", "--help"], capture_output=True, text=True).stderr
    assert "click" in modules and "pydantic" not in modules and "psycopg2" not in modules


def test_submit_prints_nothing_but_the_id_into_a_pipe(jobsys: Any, system: JobSystem) -> None:
    said = jobsys("submit", "test_job", "note=hello", "n=2", "--priority", "HIGH", "--delay", "1h", "--max-retries", "7")
    assert said.code == 0 and said.err == ""
    submitted = system.job(said.out.strip())
    assert submitted.type == "TEST_JOB" and submitted.payload == {"note": "hello", "n": 2}
    assert submitted.status == "SCHEDULED" and submitted.priority == -10 and submitted.max_attempts == 8


def test_a_whole_payload_comes_from_an_option_or_from_standard_input(jobsys: Any) -> None:
    assert jobsys("submit", "TEST_JOB", "--payload", '{"a": [1]}', "--json").json["payload"] == {"a": [1]}
    assert jobsys("submit", "TEST_JOB", "--payload", "-", "--json", stdin='{"ž": "\\u017e"}').json["payload"] == {"ž": "ž"}


class Letter(Payload):
    """A payload with a field of each kind."""

    to: str
    copies: int = 1
    tags: list[str] | None = None
    zip: str | int = ""


def send(payload: Letter, job: Job) -> None:
    """Send a letter."""


@pytest.mark.parametrize(
    ("words", "payload"),
    [
        (["to=123", "copies=2"], {"to": "123", "copies": 2}),
        (["to=true", 'tags=["a", "b"]'], {"to": "true", "tags": ["a", "b"]}),
        (['to={"a": 1}', "zip=01234"], {"to": '{"a": 1}', "zip": "01234"}),
        (["to=NaN", "zip=10115"], {"to": "NaN", "zip": 10115}),
        (['to="quoted"', "zip=1e999"], {"to": '"quoted"', "zip": "1e999"}),
        (["to=a=b=c", "copies:=3"], {"to": "a=b=c", "copies": 3}),
        (["to=", 'tags:=["1"]'], {"to": "", "tags": ["1"]}),
        (["to=x", "copies=many"], {"to": "x", "copies": "many"}),
        (["to=" + "[" * 100_000], {"to": "[" * 100_000}),
    ],
)
def test_a_value_is_json_where_it_is_json_and_text_where_the_job_type_wants_text(words: list[str], payload: Any) -> None:
    letter = JobType("LETTER", send, Letter)
    assert arguments.payload_from_fields(letter, words) == payload


WRONG_COMMANDS = [
    (["submit", "TEST_JOB", "hello"], '"hello" is not KEY=VALUE'),
    (["submit", "TEST_JOB", "a=1", "a=2"], '"a" is given twice'),
    (["submit", "TEST_JOB", "a:=x"], "a:=x: not JSON"),
    (["submit", "TEST_JOB", "--payload", "{"], "--payload: not JSON"),
    (["submit", "TEST_JOB", "a=1", "--payload", "{}"], "not both"),
    (["submit", "TEST_JOB", "--delay", "soon"], '"soon" is not a duration such as 500ms'),
    (["submit", "TEST_JOB", "--run-at", "2026-02-30"], "is not a time such as"),
    (["submit", "TEST_JOB", "--priority", "urgent"], "'urgent' is not one of"),
    (["jobs", "--status", "BUSY"], 'status "BUSY" is not one of SCHEDULED'),
    (["jobs", "--limit", "0"], "0 is not in the range x>=1"),
    (["smoke", "ftp://example.org"], "is not a URL such as"),
    (["nothing"], "No such command"),
]


def test_a_wrong_command_is_explained_and_exits_with_2(jobsys: Any) -> None:
    for words, complaint in WRONG_COMMANDS:
        said = jobsys(*words)
        assert said.code == 2 and complaint in said.err and said.out == "", said


def test_whatever_cannot_be_done_is_one_sentence_and_exits_with_1(jobsys: Any, closed_port: int) -> None:
    nowhere = f"postgresql://bob:secret@127.0.0.1:{closed_port}/jobs"
    for sentence, words, env in [
        ('"NOPE" is not one of ', ["submit", "NOPE"], {}),
        ("payload.sleepMs: Input should be a valid integer", ["submit", "TEST_JOB", "sleepMs=soon"], {}),
        ('there is no job "42"', ["job", "42"], {}),
        ("connection to server", ["jobs"], {"DATABASE_URL": nowhere}),
        ("DATABASE_URL is not set", ["migrate"], {"DATABASE_URL": None}),
        ("WORKER_THREADS: Input should be greater than or equal to 1", ["jobs"], {"WORKER_THREADS": 0}),
        ('JOB_MODULES: there is no module "nope.jobs"', ["types"], {"JOB_MODULES": "nope.jobs"}),
        ("invalid dsn", ["migrate"], {"DATABASE_URL": "nonsense"}),
        ("invalid dsn", ["migrate"], {"DATABASE_URL": "postgresql//bob:secret@localhost/jobs"}),
    ]:
        said = jobsys(*words, **env)
        assert (said.code, said.out) == (1, ""), said
        assert said.err.startswith("jobsys: ") and sentence in said.err and len(said.err.splitlines()) == 1, said.err
        assert "secret" not in said.err


def test_migrate_says_what_it_did_and_a_database_without_tables_what_to_do(jobsys: Any, server: str) -> None:
    from conftest import at_database, execute

    name = f"jobsys_cli_{os.getpid()}"
    execute(server, f"create database {name}")
    try:
        empty = {"DATABASE_URL": at_database(server, name)}
        assert jobsys("jobs", **empty).err.endswith("run `jobsys migrate`\n")
        assert jobsys("migrate", **empty).out.startswith("applied schema")
        assert jobsys("migrate", **empty).out == "the schema is up to date\n"
    finally:
        execute(server, f"drop database {name} with (force)")


def test_wait_shows_progress_prints_the_result_and_tells_how_it_went(jobsys: Any, worker: Any) -> None:
    said = jobsys("submit", "TEST_JOB", "sleepMs=1200", "progressSteps=2", "--wait")
    assert said.code == 0
    assert said.json == {"sleepMs": 1200, "progressSteps": 2}
    assert "50% step 1 of 2" in said.err and said.err.splitlines()[-1].endswith("COMPLETED 100% step 2 of 2")

    said = jobsys("submit", "TEST_JOB", "giveUp=true", "failWith=no\nluck", "--wait")
    assert (said.code, said.out) == (1, "")
    assert said.err.splitlines()[-1].endswith(" is FAILED after 1 attempt: GiveUp: no\\nluck")

    said = jobsys("submit", "TEST_JOB", "giveUp=true", "--wait", "--json")
    assert said.code == 1 and said.json["status"] == "FAILED"


def test_interrupting_a_wait_leaves_the_job_and_exits_with_130(settings: Settings, system: JobSystem) -> None:
    command = [sys.executable, "-m", "jobsys", "submit", "TEST_JOB", "--wait"]
    process = subprocess.Popen(command, env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    eventually(lambda: system.jobs().jobs)
    assert process.stderr is not None and "PENDING" in process.stderr.readline()
    assert "no worker is running; start one with: jobsys worker" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert f"the job goes on: jobsys job {system.jobs().jobs[0].id}" in err and "Traceback" not in err


def test_jobs_in_a_pipe_are_whole_lines_with_tabs(jobsys: Any, system: JobSystem) -> None:
    ids = [system.submit("TEST_JOB", {"n": n}, priority="low").id for n in range(3)]
    system.cancel(ids[0])
    said = jobsys("jobs")
    assert [line[:5] for line in said.lines] == [
        [id, "TEST_JOB", status, "low", "default"] for id, status in zip(ids[::-1], ["PENDING", "PENDING", "CANCELLED"], strict=True)
    ]
    assert [line[0] for line in jobsys("jobs", "--status", "queued", "--limit", "1").lines] == [ids[2]]
    assert [each["id"] for each in jobsys("jobs", "--status", "CANCELLED", "--status", "DEAD", "--json").json] == [ids[0]]


def test_more_jobs_than_fit_one_page_are_listed_too(jobsys: Any, system: JobSystem) -> None:
    ids = system.submit_many([Submission("TEST_JOB", {"n": n}) for n in range(250)])
    assert [line[0] for line in jobsys("jobs", "--limit", "230").lines] == ids[:19:-1]


def test_whoever_stops_reading_is_not_answered_with_a_traceback(settings: Settings, system: JobSystem) -> None:
    system.submit_many([Submission("TEST_JOB", {"n": n}) for n in range(1000)])
    pipeline = f"{shlex.quote(sys.executable)} -m jobsys jobs --limit 1000 | head -n 1"
    done = subprocess.run(["sh", "-c", pipeline], env=environment(settings), capture_output=True, text=True, timeout=30)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


EVIL = "evil \x1b[2J \x9b [bold]x[/bold]\r\ttab\nline"


def test_a_job_is_shown_with_its_timeline_and_its_last_traceback(jobsys: Any, system: JobSystem, worker: Any) -> None:
    submitted = system.submit("TEST_JOB", {"failTimes": 9, "failWith": EVIL}, max_retries=1)
    assert system.wait(submitted.id, timeout=10).status == "FAILED"
    said = jobsys("job", submitted.id)
    assert said.code == 0
    for words in (
        f"TEST_JOB {submitted.id} FAILED",
        "attempt   2 of 2",
        '"failTimes": 9',
        "created",
        "traceback of attempt 2",
        "RuntimeError: evil",
    ):
        assert words in said.out
    assert said.out.count("  failed  ") == 2
    assert not set(said.out) & set("\x1b\x9b\r\t") and "[bold]x[/bold]" in said.out
    shown = jobsys("job", submitted.id, "--json").json
    assert shown["status"] == "FAILED" and [each["attempt"] for each in shown["events"] if each["kind"] == "failed"] == [1, 2]


def test_jobs_are_retried_and_cancelled_by_the_handful(jobsys: Any, system: JobSystem) -> None:
    one, two = (system.submit("TEST_JOB").id for _ in range(2))
    said = jobsys("cancel", one, two)
    assert (said.code, said.out) == (0, f"{one} is CANCELLED\n{two} is CANCELLED\n")
    said = jobsys("retry", one, "42", two)
    assert (said.code, said.out) == (1, f"{one} is PENDING again\n{two} is PENDING again\n")
    assert said.err == 'jobsys: there is no job "42"\n'
    assert [event.by for event in system.events(one)][-2:] == ["cli", "cli"]
    said = jobsys("retry", one)
    assert said.code == 1 and "a job that is PENDING can't be retried" in said.err


def test_jobs_that_options_describe_are_cancelled_and_retried_all_together(jobsys: Any, system: JobSystem) -> None:
    mails = [system.submit("TEST_JOB", priority="low").id for _ in range(3)]
    other = system.submit("TEST_JOB").id
    said = jobsys("cancel", "--priority", "low", "--status", "pending")
    assert (said.code, said.out) == (0, "3 jobs cancelled\n")
    assert system.job(other).status == "PENDING"
    said = jobsys("retry", "--all")
    assert (said.code, said.out) == (0, "0 jobs retried\n"), "what was cancelled on purpose is not among them"
    said = jobsys("retry", "--status", "CANCELLED", "--search", mails[0])
    assert (said.code, said.out) == (0, "1 job retried\n")
    assert [event.by for event in system.events(mails[0])][-1] == "cli"
    said = jobsys("retry", "--status", "COMPLETED")
    assert said.code == 1 and "a job that is COMPLETED can't be retried" in said.err
    for words in ([], [other, "--all"], ["--all", "--type", "TEST_JOB"]):
        said = jobsys("cancel", *words)
        assert said.code == 2 and "say which jobs: their ids, or --status" in said.err and "only one of these" in said.err, words


def test_on_a_terminal_there_are_tables_colours_and_a_progress_bar(settings: Settings, system: JobSystem, worker: Any) -> None:
    failed = system.submit("TEST_JOB", {"giveUp": True, "failWith": EVIL})
    system.wait(failed.id, timeout=10)
    code, screen = on_a_terminal(settings, "jobs")
    heading, row = screen.splitlines()
    assert code == 0 and "\x1b[1mid " in heading and failed.id in row and "\x1b[31mFAILED" in row
    assert row.endswith("…") and "\x1b[2J" not in screen and "\x9b" not in screen
    code, screen = on_a_terminal(settings, "submit", "TEST_JOB", "sleepMs=1200", "progressSteps=2", "--wait")
    assert code == 0 and "━" in screen and "50% step 1 of 2" in screen and '"progressSteps": 2' in screen
    code, screen = on_a_terminal(settings, "submit", "TEST_JOB", "--delay", "1h")
    assert code == 0 and screen.startswith("TEST_JOB \x1b[1m") and "SCHEDULED" in screen and ", due 20" in screen


def test_every_job_type_is_listed_with_all_it_needs_and_an_example_that_works(jobsys: Any, system: JobSystem) -> None:
    said = jobsys("types", DATABASE_URL=None)
    objects = jobsys("types", "--json", DATABASE_URL=None).json
    assert {each["name"] for each in objects} == set(system.types.types)
    for each in objects:
        job_type = system.types.find(each["name"])
        assert re.search(rf"^{each['name']}\b", said.out, re.MULTILINE) and each["summary"] in said.out
        assert all(f"    {field}" in said.out for field in each["payload"]["properties"])
        assert terminal.example(job_type) in said.out
        assert (
            f"queue {job_type.queue}, priority {job_type.priority}, " in said.out and f"{job_type.time_limit:g} s per attempt" in said.out
        )
    only = jobsys("types", "sendEmail")
    assert only.out.startswith("EMAIL_SEND") and "CSV_EXPORT" not in only.out


def test_the_example_of_every_job_type_means_its_payload(system: JobSystem) -> None:
    for job_type in system.types.types.values():
        _, _, name, *fields = shlex.split(terminal.example(job_type))
        assert name == job_type.name and arguments.payload_from_fields(job_type, fields) == job_type.example


def test_queues_and_workers_are_listed(jobsys: Any, worker: Any, system: JobSystem) -> None:
    eventually(lambda: any(each.alive for each in system.workers()))
    queues = jobsys("queues", "--json").json
    assert {"default", "ingestion"} <= {each["queue"] for each in queues}
    assert next(each["rate"] for each in queues if each["queue"] == "ingestion") == "1/5s"
    (line,) = jobsys("workers").lines
    assert line[3] == "alive" and "default" in line[-1]


SHOP = """
from jobsys import Job, Payload, job

class Order(Payload):
    number: int

@job("ORDER", example={"number": 7})
def order(payload: Order, job: Job) -> int:
    "Ship an order to Škoda."
    return payload.number
"""


def test_own_job_types_are_found_in_the_current_directory(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "shop_jobs.py").write_text(SHOP)
    (tmp_path / "jobsys").write_text("from jobsys.cli import main\nmain()\n")  # what pip installs: only its own directory is on the path
    env = environment(settings, JOB_MODULES="shop_jobs", PYTHONIOENCODING="latin-1")
    command = [sys.executable, tmp_path / "jobsys", "types", "order"]
    done = subprocess.run(command, env=env, cwd=tmp_path / "shop", capture_output=True, text=True)
    assert done.stdout.startswith("ORDER\n  Ship an order to \\u0160koda.\n"), done.stderr


def test_a_command_on_a_queue_says_how_the_queue_stands(jobsys: Any) -> None:
    limited = jobsys("limit", "mail", "--rate", "10/1m", "--max-running", "2")
    assert (
        limited.out
        == "queue mail: not paused, 10 starts per 60 s, at most 2 running, 0 workers; it has no jobs either: is the name right?\n"
    )
    assert jobsys("pause", "mail").out.startswith("queue mail: paused, 10 starts per 60 s, ")
    assert jobsys("limit", "mail").out.startswith("queue mail: paused, any rate, any number running")
    assert jobsys("resume", "nosuch").out == "there is no queue nosuch: it has no jobs, no limits and no workers\n"
