"""Logs: one line per event, safe to read and to share, cheap when off."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import environment, eventually

from jobsys import logs
from jobsys.errors import SettingsError
from jobsys.settings import Settings

log = logs.get("jobsys.trial")


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`configure(log_level=…)` sends this process's logs to standard error, which `capsys` reads, until the test ends."""
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level, excepthook = list(root.handlers), root.level, threading.excepthook
    yield lambda **values: logs.configure(Settings(_env_file=None, **values), process="worker")
    root.handlers[:], threading.excepthook = handlers, excepthook
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.contextvars.clear_contextvars()


def events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_event_is_one_line_with_time_level_process_words_and_job(configure: Any, capsys: Any) -> None:
    configure()
    with structlog.contextvars.bound_contextvars(job_id="0190-abc"):
        log.info("job finished", seconds=0.25, note="took a while")
    time, level, process, rest = capsys.readouterr().err.split(maxsplit=3)
    assert time.endswith("Z") and level == "info" and process == f"worker[{os.getpid()}]"
    assert rest == 'job finished 0190-abc seconds=0.25 note="took a while"\n'


def test_a_line_is_the_same_whether_or_not_others_listen(configure: Any, capsys: Any, tmp_path: Path, caplog: Any) -> None:
    def said(*, accompanied: bool) -> tuple[list[str], list[dict[str, Any]]]:
        file = tmp_path / "log"
        configure(log_file=file)
        if accompanied:
            logging.getLogger().addHandler(caplog.handler)
        with structlog.contextvars.bound_contextvars(job_id="0190-abc", note="of the context", more=1):
            log.bind(note="bound", size=3).info(
                "job\nfinished", seconds=0.25, password="hunter22", note="a=b", items=[1, {"token": "x"}], none=None
            )
        lines = [line.split(maxsplit=1)[1] for line in str(capsys.readouterr().err).splitlines()]
        entries = [{name: value for name, value in each.items() if name != "time"} for each in events(file)]
        file.unlink()
        return lines, entries

    alone, accompanied = said(accompanied=False), said(accompanied=True)
    assert alone == accompanied
    assert len(alone[0]) == len(alone[1]) == len(caplog.records) == 1
    assert "hunter22" not in str(alone)


def test_a_value_that_cannot_be_written_costs_the_line_and_not_the_thread(configure: Any, capsys: Any) -> None:
    class Unwritable:
        def __str__(self) -> str:
            raise RuntimeError("boom")

    configure()
    for value in (Unwritable(), {"a": Unwritable()}):
        log.info("one", value=value)
        log.warning("one", value=value)
    log.info("two")
    assert "two" in capsys.readouterr().err


def test_a_lock_that_a_dying_thread_took_along_costs_lines_and_stops_nobody(configure: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(logs, "LONGEST_LOCK", 0.05)
    configure()
    lock: Any = logging.getLogger().handlers[0].lock
    taken, given_back = threading.Event(), threading.Event()

    def take_along() -> None:
        with lock:
            taken.set()
            given_back.wait(30)

    holder = threading.Thread(target=take_along)
    holder.start()
    taken.wait(30)
    try:
        writers = [threading.Thread(target=say, args=("lost",), daemon=True) for say in (log.info, log.warning)]
        for writer in writers:
            writer.start()
            writer.join(10)
        assert not any(writer.is_alive() for writer in writers)
    finally:
        given_back.set()
        holder.join()
    log.info("here again")
    said = capsys.readouterr().err
    assert "here again" in said and "lost" not in said


def test_a_level_or_filter_of_a_handler_holds_for_all_lines(configure: Any, capsys: Any) -> None:
    configure()
    handler = logging.getLogger().handlers[0]
    handler.addFilter(lambda record: False)
    log.info("filtered")
    handler.filters.clear()
    handler.setLevel(logging.ERROR)
    log.info("too low")
    assert capsys.readouterr().err == ""


def test_where_colour_is_wanted_lines_are_short_and_coloured(configure: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        configure()
        log.warning("queue is full", waiting=7)
        return str(capsys.readouterr().err)

    assert "\x1b" not in said()
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = said()
    assert "\x1b[33mwarning" in coloured and "worker[" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in said()


def test_the_file_holds_one_json_object_per_line(configure: Any, tmp_path: Path) -> None:
    file = tmp_path / "logs" / "jobsys.log"
    configure(log_file=file)
    structlog.contextvars.bind_contextvars(request_id="r1", job_id="j1")
    log.info("said\ntwice", pid=7, count=2, nested={"a": [1, None]}, odd={1}, text="žluťoučký \x9b \u2028")
    logging.getLogger("somebody.else").warning("%d of %d", 1, 2, extra={"colour": "red"})
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError:
        log.exception("attempt failed")
    ours, foreign, failure = events(file)
    assert ours["event"] == "said\ntwice" and ours["nested"] == {"a": [1, None]} and ours["odd"] == "{1}"
    assert ours["text"] == "žluťoučký \x9b \u2028" and "\u2028" not in file.read_text()
    assert ours["level"] == "info" and ours["process"] == "worker" and ours["time"].endswith("Z") and ours["pid"] == 7
    assert (
        foreign["pid"] == os.getpid()
        and foreign["event"] == "1 of 2"
        and foreign["colour"] == "red"
        and foreign["logger"] == "somebody.else"
    )
    assert {(each["job_id"], each["request_id"]) for each in (ours, foreign, failure)} == {("j1", "r1")}
    assert failure["exception"].endswith("ZeroDivisionError: division by zero")


def test_what_users_sent_can_neither_start_a_line_nor_steer_the_terminal(configure: Any, capsys: Any) -> None:
    configure()
    evil = "x\n2030-01-01T00:00:00.000Z info     worker[1] all is well\r\x1b[2J\x9b2J\u2028\u202e"
    log.info(evil, **{"subject": evil, "bad\nkey": 1}, job_id=evil)
    logging.getLogger("dramatiq.worker").warning(evil)
    try:
        raise ValueError(evil)
    except ValueError:
        log.exception("attempt failed")
    output = capsys.readouterr().err
    assert not set(output) & set("\r\x1b\x9b\u2028\u202e")
    assert len([line for line in output.split("\n") if line and not line.startswith("    ")]) == 3
    assert "    ValueError: x\n    2030-01-01" in output


def test_secrets_appear_in_no_log(configure: Any, capsys: Any, tmp_path: Path) -> None:
    url, smtp, admin, jwt = "postgresql://bob:h%40rd-to-guess@db/jobs", "smtp-hush", 'admin-"hush"', "jwt-hush-hush"
    file = tmp_path / "log"
    viewer, before = "viewer-hush", "before-hush"
    secrets = {"admin_pass": admin, "viewer_pass": viewer, "jwt_secret": jwt, "jwt_secret_previous": before}
    configure(log_file=file, database_url=url, smtp_password=smtp, **secrets)
    log.info("connecting", url=url, smtp_password="abc", headers={"Authorization": "Basic Zm9vOmJhcg=="})
    log.info(f"as text: {url} {smtp} {admin} {viewer} {jwt} {before}")
    log.info("by hand", nested={"deep": [admin]}, dsn="host=db password=classified user=bob", other="mysql://me:sesame@h/x")
    log.warning('{"api_key": "abc-key", "token":"abc-token"} Authorization: Bearer abc.def.ghi')
    try:
        raise OSError(f"connection to {url} with h@rd-to-guess failed")
    except OSError:
        log.exception("failed", payload={"password": 'two words "quoted"', "to": "ann@example.org"})
    assert len(events(file)) == 5
    for text in (capsys.readouterr().err, file.read_text()):
        for secret in ("rd-to-guess", "-hush", "Zm9v", "classified", "sesame", "abc", "two words", "quoted"):
            assert secret not in text
        assert "postgresql://bob:***@db/jobs" in text and "ann@example.org" in text


def test_a_long_value_is_cut_and_says_so(configure: Any, capsys: Any) -> None:
    configure()
    log.info("submitted", rows=["x" * 100] * 1000, text="y" * 10_000)
    output = capsys.readouterr().err
    assert len(output) < 5_000 and "8,000 more characters" in output


@pytest.mark.parametrize(("level", "said"), [("DEBUG", 4), ("INFO", 3), ("ERROR", 1)])
def test_log_level_holds_for_every_logger(configure: Any, capsys: Any, level: str, said: int) -> None:
    configure(log_level=level)
    log.debug("a")
    log.info("b")
    logging.getLogger("dramatiq.broker").info("c")
    log.error("d")
    assert len(capsys.readouterr().err.splitlines()) == said


def test_dramatiqs_own_lines_are_readable_and_keep_their_traceback(configure: Any, capsys: Any) -> None:
    configure()
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logging.getLogger("dramatiq.worker.ConsumerThread(default)").exception("You've found a bug in Dramatiq.\nPlease report it!")
    first, *traceback = capsys.readouterr().err.splitlines()
    assert first.endswith("You've found a bug in Dramatiq.\\nPlease report it! (dramatiq.worker.ConsumerThread(default))")
    assert traceback[-1] == "    RuntimeError: boom"


def test_gunicorns_own_lines_go_the_same_way(configure: Any, tmp_path: Path) -> None:
    from gunicorn.config import Config

    file = tmp_path / "log"
    configure(log_file=file)
    gunicorn = Config()
    gunicorn.set("logger_class", logs.gunicorn_logger_class())
    gunicorn.logger_class(gunicorn).info("Listening at: %s", "http://127.0.0.1")
    assert [(each["logger"], each["event"]) for each in events(file)] == [("gunicorn.error", "Listening at: http://127.0.0.1")]


def test_a_thread_that_dies_is_logged(configure: Any, capsys: Any) -> None:
    configure()
    thread = threading.Thread(target=lambda: 1 // 0, name="heartbeat")
    thread.start()
    thread.join()
    output = capsys.readouterr().err
    assert "a thread died thread=heartbeat" in output and "ZeroDivisionError" in output


FOUR_WRITERS = """
import logging, os, sys
from pathlib import Path
from jobsys import logs

def handler():
    return logs.SharedFile(Path(sys.argv[1]), lambda event: event["event"], limit=50_000, keep=100)

logger = logging.getLogger("trial")
logger.addHandler(handler())
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        if number % 2:  # two share the open file, as forked web workers do; two open their own, as separate processes do
            logger.handlers = [handler()]
        for line in range(1000):
            logger.warning('{"process": %d, "line": %d, "filler": "%s"}', number, line, "x" * 60)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""


def test_processes_that_share_and_rotate_a_file_lose_and_break_no_line(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(logs.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", FOUR_WRITERS, str(tmp_path / "log")], env=env, check=True, timeout=30)
    files = list(tmp_path.iterdir())
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(files) > 5
    assert sorted((each["process"], each["line"]) for each in lines) == [(number, line) for number in range(4) for line in range(1000)]


def test_only_so_many_rotated_files_are_kept(tmp_path: Path) -> None:
    handler = logs.SharedFile(tmp_path / "log", lambda event: str(event["event"]), limit=100, keep=2)
    for number in range(20):
        handler.handle(logging.makeLogRecord({"msg": f"{number:02}" * 60}))
    handler.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert [(tmp_path / name).read_text()[:2] for name in ("log", "log.1", "log.2")] == ["19", "18", "17"]


def test_a_file_that_somebody_moved_away_is_made_anew(configure: Any, tmp_path: Path) -> None:
    file = tmp_path / "log"
    configure(log_file=file)
    log.info("one")
    file.rename(tmp_path / "old")
    log.info("two")
    assert [each["event"] for each in events(file)] == ["two"]


def test_a_log_file_that_cannot_be_written_is_a_settings_error(configure: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"LOG_FILE: .* can't be written"):
        configure(log_file=tmp_path / "file" / "log")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_lines_and_not_the_process(configure: Any, capsys: Any) -> None:
    configure(log_file="/dev/full")
    for _ in range(3):
        log.info("still here")
    output = capsys.readouterr().err
    assert output.count("LOG_FILE /dev/full can't be written") == 1 and output.count("still here") == 3


def test_a_debug_line_that_is_off_costs_next_to_nothing(configure: Any) -> None:
    configure()
    seconds = min(timeit.repeat(lambda: log.debug("claimed", count=3), number=10_000, repeat=5)) / 10_000
    assert seconds < 3e-6


def test_a_reader_that_stopped_costs_lines_and_no_time(settings: Settings) -> None:
    program = """
import sys, time
from jobsys import logs
from jobsys.settings import Settings
logs.configure(Settings(_env_file=None), process="worker")
log = logs.get("trial")
for number in range(2000):
    log.info("line", number=number, text="x" * (number % 7 * 1500))
print("done", flush=True)
sys.stdin.readline()
log.info("the last")
"""
    read: list[str] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment(settings), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        watchdog = threading.Timer(30, process.kill)
        watchdog.start()
        assert process.stdout.readline() == "done\n", "it waits for its reader"
        reader = threading.Thread(target=read.extend, args=[process.stderr])
        reader.start()
        eventually(lambda: len(read) > 1)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait() == 0
        reader.join()
        watchdog.cancel()
    assert "number=0 " in read[0] and "lost=" in read[-2] and "the last" in read[-1]
