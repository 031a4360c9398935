"""`jobsys dev`, really started: everything comes up with one command, goes down with Ctrl-C, and what is in the way is one sentence."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Running, environment, eventually, execute, free_port, is_alive

from jobsys import local
from jobsys.local import LocalError, MailCatcher, Postgres
from jobsys.settings import Settings


class Place:
    """A directory only its owner may enter, with a space in its path, and the `jobsys dev`s started in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "a place"
        self.directory.mkdir(mode=0o700)
        self.started: list[Running] = []

    def start(self, **env: Any) -> Running:
        """`jobsys dev`, with nothing set but a free port and these."""
        port = env.setdefault("PORT", free_port())
        log = self.directory / f"dev-{len(self.started)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobsys", "dev"],
                env=plain_environment(**env),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.started.append(Running(process, log, f"http://127.0.0.1:{port}"))
        return self.started[-1]

    def close(self) -> None:
        for dev in self.started:
            if dev.process.poll() is None:
                dev.stop(timeout=60)
        left = processes_of(self.directory)
        for process in left:
            process.kill()
        assert not left


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory only its owner may enter, with a space in its path."""
    return tmp_path / "a place"


@pytest.fixture
def start_dev(place: Path) -> Iterator[Callable[..., Running]]:
    """`start_dev(PORT=…)`: `jobsys dev` in `place`."""
    here = Place(place.parent)
    yield here.start
    here.close()


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One `jobsys dev` that is up, for all tests that only look at it."""
    here = Place(tmp_path_factory.mktemp("dev"))
    yield up(here.start())
    here.close()


def plain_environment(**env: Any) -> dict[str, str]:
    """The environment of someone who has set nothing but these."""
    return environment(Settings(_env_file=None), **{name.upper(): None for name in Settings.model_fields} | env)


def up(dev: Running) -> Running:
    """Wait until it is healthy and has said so."""

    def said() -> bool:
        if dev.process.poll() is not None:
            pytest.fail(dev.output)
        return "jobsys is up" in dev.output

    eventually(said, timeout=30)
    return dev


def processes_of(directory: Path) -> list[psutil.Process]:
    """The living processes that have `directory` in their command line or environment, or were started by one that has."""
    found = {}
    for process in psutil.process_iter():
        try:
            traces = [*process.cmdline(), *process.environ().values(), process.cwd()]
            if any(str(directory) in trace for trace in traces) and process.pid != os.getpid():
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        except psutil.Error:
            continue
    return [process for process in found.values() if is_alive(process)]


def post(dev: Running, job: dict[str, Any]) -> str:
    request = urllib.request.Request(f"{dev.url}/jobs", json.dumps(job).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["jobId"])


def get(dev: Running, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(dev.url + path, timeout=40) as answer:
        return dict(json.load(answer))


def stored(place: Path, job_id: str) -> tuple[Any, ...]:
    """The job's status and attempt, as the database under `place` holds them after everything has stopped."""
    postgres = Postgres(place / "var")
    try:
        return execute(postgres.start(), "select status, attempt from jobs where id = %s", job_id)[0]
    finally:
        postgres.stop()


def mails(place: Path) -> list[str]:
    return [file.read_text() for file in (place / "var" / "mail" / "new").glob("*")]


def test_one_command_brings_everything_up_and_ctrl_c_takes_it_down(start_dev: Callable[..., Running], place: Path) -> None:
    dev = up(start_dev())
    job = post(dev, {"type": "EMAIL_SEND", "payload": {"to": "ann@example.org", "subject": "Hello", "body": "It works."}})
    assert get(dev, f"/jobs/{job}?wait=20")["status"] == "COMPLETED"
    assert "Delivered-To: ann@example.org" in mails(place)[0]
    assert "It works." in mails(place)[0]

    os.killpg(dev.pid, signal.SIGINT)  # as a terminal does: to the whole group

    assert dev.wait(60) == 0, dev.output
    assert processes_of(place) == []
    assert "Traceback" not in dev.output
    assert local.database_url(place / "var") is None


def test_what_it_prints_can_be_typed(dev: Running) -> None:
    curl = re.search(r"^  (curl .*)$", dev.output, re.MULTILINE)
    assert curl
    answer = subprocess.run(curl[1], shell=True, capture_output=True, text=True, timeout=20)
    assert json.loads(answer.stdout)["status"] == "PENDING"
    eventually(lambda: "you@example.org" in "".join(mails(dev.log.parent)))
    for name in ("Admin", "Health"):
        address = re.search(rf"^  {name} +(\S+)$", dev.output, re.MULTILINE)
        assert address and urllib.request.urlopen(address[1], timeout=10).status == 200


def test_another_terminal_finds_the_database(dev: Running) -> None:
    command = [sys.executable, "-m", "jobsys", "submit", "TEST_JOB", "--wait"]
    done = subprocess.run(command, cwd=dev.log.parent, env=plain_environment(), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_a_second_one_in_the_same_place_is_one_sentence(dev: Running) -> None:
    command = [sys.executable, "-m", "jobsys", "dev"]
    done = subprocess.run(command, cwd=dev.log.parent, env=plain_environment(), capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == (
        f"jobsys: var is in use by another bin/dev (process {dev.pid}): stop that one, or give this one a DATA_DIR and a PORT of its own\n"
    )


def test_the_second_start_makes_nothing_anew(start_dev: Callable[..., Running], place: Path) -> None:
    first = up(start_dev())
    assert first.stop(60) == 0 and "applied schema" in first.output
    made = (place / "var" / "postgres" / "data" / "PG_VERSION").stat()
    again = up(start_dev())
    assert again.stop(60) == 0 and "applied" not in again.output
    assert (place / "var" / "postgres" / "data" / "PG_VERSION").stat().st_ino == made.st_ino


def test_two_run_at_once_with_a_port_and_a_data_dir_each(start_dev: Callable[..., Running], place: Path) -> None:
    one, two = start_dev(), start_dev(DATA_DIR="other")
    for dev in (up(one), up(two)):
        post(dev, {"type": "EMAIL_SEND", "payload": {"to": f"{dev.pid}@example.org", "subject": "Hello", "body": "Hello"}})
    for dev, data_dir in ((one, "var"), (two, "other")):

        def arrived(dev: Running = dev, data_dir: str = data_dir) -> bool:
            return [f"{dev.pid}@" in file.read_text() for file in (place / data_dir / "mail" / "new").glob("*")] == [True]

        eventually(arrived)
    assert one.stop(60) == 0
    assert get(two, "/health")["status"] == "ok"


def test_a_running_job_is_finished_before_the_rest_stops(start_dev: Callable[..., Running], place: Path) -> None:
    dev = up(start_dev())
    job = post(dev, {"type": "TEST_JOB", "payload": {"sleepMs": 2500}})
    eventually(lambda: get(dev, f"/jobs/{job}")["status"] == "PROCESSING")
    assert dev.stop(60) == 0
    assert stored(place, job) == ("COMPLETED", 1)


def test_a_second_ctrl_c_hurries(start_dev: Callable[..., Running], place: Path) -> None:
    dev = up(start_dev())
    job = post(dev, {"type": "TEST_JOB", "payload": {"sleepMs": 60_000}})
    eventually(lambda: get(dev, f"/jobs/{job}")["status"] == "PROCESSING")
    began = time.monotonic()
    dev.signal(signal.SIGINT)
    eventually(lambda: "stopping worker" in dev.output)
    dev.signal(signal.SIGINT)
    assert dev.wait(60) == 0
    assert time.monotonic() - began < 15
    assert processes_of(place) == []


def test_a_killed_one_leaves_nothing_behind_and_the_next_one_goes_on(start_dev: Callable[..., Running], place: Path) -> None:
    port = free_port()
    # the database goes at the same time, and a worker that has a job then waits that long for it to come back
    dev = up(start_dev(PORT=port, SHUTDOWN_GRACE="5"))
    job = post(dev, {"type": "TEST_JOB", "payload": {}, "delay": 2})
    dev.signal(signal.SIGKILL)
    dev.wait()
    if sys.platform == "linux":
        eventually(lambda: processes_of(place) == [], timeout=30)
    again = up(start_dev(PORT=port))
    assert get(again, f"/jobs/{job}?wait=20")["status"] == "COMPLETED"


def test_when_a_process_ends_by_itself_it_is_named_and_all_stop(start_dev: Callable[..., Running], place: Path) -> None:
    dev = up(start_dev())
    [web] = [each for each in psutil.Process(dev.pid).children() if any("gunicorn" in word for word in each.cmdline())]
    web.kill()
    assert dev.wait(60) == 1
    assert "web ended by itself, by SIGKILL" in dev.output
    eventually(lambda: processes_of(place) == [])


def test_a_database_of_yours_is_used_when_named(database_url: str, start_dev: Callable[..., Running], place: Path) -> None:
    dev = up(start_dev(DATABASE_URL=database_url))
    job = post(dev, {"type": "TEST_JOB"})
    assert execute(database_url, "select type from jobs where id = %s", job) == [("TEST_JOB",)]
    assert not (place / "var" / "postgres").exists()


def refuses(dev: Running, *words: str) -> None:
    """It ends with status 1 and one sentence that holds these words."""
    assert dev.wait(30) == 1
    assert len(dev.output.splitlines()) == 1, dev.output
    for word in words:
        assert word in dev.output


def test_a_port_in_use_is_one_sentence(start_dev: Callable[..., Running]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refuses(start_dev(PORT=port), f"port {port} is in use", "set PORT")


def test_a_mail_port_in_use_is_one_sentence_when_it_was_chosen(start_dev: Callable[..., Running]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refuses(start_dev(SMTP_PORT=port), f"port {port}", "SMTP_PORT", "SMTP_HOST")


def test_an_address_that_is_not_ours_is_one_sentence(start_dev: Callable[..., Running]) -> None:
    refuses(start_dev(HOST="192.0.2.1", ALLOW_INSECURE=1), "192.0.2.1", "HOST")


def test_an_open_door_is_one_sentence(start_dev: Callable[..., Running]) -> None:
    refuses(start_dev(HOST="0.0.0.0"), "HOST 0.0.0.0", "ALLOW_INSECURE=1")


@pytest.mark.parametrize("name", ["DATA_DIR", "OUTPUT_DIR"])
def test_a_directory_that_can_not_be_written_is_one_sentence(start_dev: Callable[..., Running], place: Path, name: str) -> None:
    (place / "file").touch()
    refuses(start_dev(**{name: "file/directory"}), f"{name} file/directory can't be written", f"set {name}")


def test_an_unreachable_database_is_one_sentence(start_dev: Callable[..., Running], closed_port: int) -> None:
    url = f"postgresql://someone:secret@127.0.0.1:{closed_port}/jobsys"
    dev = start_dev(DATABASE_URL=url)
    refuses(dev, "DATABASE_URL leads to no PostgreSQL", "Connection refused", "unset it")
    assert "secret" not in dev.output


def test_a_database_url_that_is_none_is_one_sentence(start_dev: Callable[..., Running]) -> None:
    refuses(start_dev(DATABASE_URL="my database"), "DATABASE_URL is not an address like postgresql://")


def test_data_of_another_major_version_is_one_sentence(start_dev: Callable[..., Running], place: Path) -> None:
    data = place / "var" / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("17\n")
    refuses(start_dev(), "made by PostgreSQL 17 and this is 18")


def test_a_setting_that_makes_no_sense_is_one_sentence(start_dev: Callable[..., Running]) -> None:
    refuses(start_dev(SHUTDOWN_GRACE="soon"), "SHUTDOWN_GRACE", "soon")


def test_the_server_starts_although_its_old_number_is_another_program_s(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path)
    postgres.start()
    postgres.stop()
    (postgres.home / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n{postgres.home / 'data'}\n")
    assert execute(postgres.start(), "select 1") == [(1,)]
    postgres.stop()


def test_the_server_starts_where_an_earlier_one_still_runs(tmp_path: Path) -> None:
    left, next_one = Postgres(tmp_path), Postgres(tmp_path)
    left.start()
    assert execute(next_one.start(), "select 1") == [(1,)]
    assert not left.running
    next_one.stop()


def test_the_server_survives_a_crash_with_what_was_committed(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path)
    execute(postgres.start(), "create table kept as select 1 as one")
    [server] = [each for each in processes_of(tmp_path) if each.name() == "postgres" and "-D" in each.cmdline()]
    server.kill()
    eventually(lambda: not postgres.running)
    assert execute(postgres.start(), "table kept") == [(1,)]
    assert execute(postgres.url, "show fsync") == [("on",)]
    postgres.stop()


def test_a_path_too_long_for_a_socket_is_no_obstacle(tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 20) / ("longer" * 10)
    postgres = Postgres(deep)
    url = postgres.start()
    sockets = Path(str(execute(url, "show unix_socket_directories")[0][0]).strip('"'))
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert local.database_url(deep) == url
    postgres.stop()
    assert not sockets.exists()
    assert local.database_url(deep) is None


def test_nobody_else_on_the_machine_gets_into_the_database(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path)
    postgres.start()
    try:
        assert stat.S_IMODE((tmp_path / "database_url").stat().st_mode) == 0o600
        assert stat.S_IMODE(postgres.home.stat().st_mode) == 0o700
        assert execute(postgres.url, "show listen_addresses") == [("",)]
        assert execute(postgres.url, "select distinct auth_method from pg_hba_file_rules") == [("peer",)]
    finally:
        postgres.stop()


def test_a_server_that_can_not_start_says_why(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path)
    postgres.start()
    postgres.stop()
    (postgres.home / "data" / "global" / "pg_control").unlink()
    with pytest.raises(LocalError, match=r"PostgreSQL did not start: .*pg_control"):
        postgres.start()


def test_the_mail_catcher_keeps_mail_as_it_was_sent(tmp_path: Path) -> None:
    import smtplib

    catcher = MailCatcher(tmp_path / "mail", 0)
    catcher.start()
    try:
        with smtplib.SMTP("127.0.0.1", catcher.port) as smtp:
            smtp.sendmail("me@example.org", ["a@example.org", "hidden@example.org"], b"Subject: Hello\r\n\r\n.dot\r\nFrom here\r\n\xff\r\n")
        [file] = (tmp_path / "mail" / "new").iterdir()
        assert file.read_bytes() == (
            b"Return-Path: <me@example.org>\nDelivered-To: a@example.org\nDelivered-To: hidden@example.org\n"
            b"Subject: Hello\n\n.dot\nFrom here\n\xff\n"
        )
    finally:
        catcher.stop()
