"""Secrets: one is settings in every place it could leak from, and looked for everywhere it could come out."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
import test_cli
from conftest import CHECKOUT, Running, eventually, execute

from jobsys import secrecy
from jobsys.db import url_of
from jobsys.errors import SettingsError
from jobsys.secrecy import mask
from jobsys.settings import Settings

ADMIN, SMTP = 'admin "hush" ž-8b1c', "smtp-hush-91aa"
TYPES = {"JOB_MODULES": "secret_types", "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'tests'}"}
Found = list[tuple[str, str]]
Command = Callable[..., test_cli.Said]
command = test_cli.jobsys


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What this process learns is forgotten."""
    before = set(secrecy._ours), secrecy._OURS
    yield
    secrecy._ours, secrecy._OURS = before


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Those of every test, with a secret wherever one can stand."""
    url = str(settings.database_url)
    if urlsplit(url).password is None:
        url = url.replace("@", ":" + quote("db@hush/7f3a:x", safe="") + "@", 1)
    secrets = {"database_url": url, "admin_user": "ada", "admin_pass": ADMIN, "smtp_user": "bob", "smtp_password": SMTP}
    secrets |= {"viewer_user": "val", "viewer_pass": "viewer-hush-62"}
    return settings.model_copy(update={**secrets, "log_level": "DEBUG"})


def places(settings: Settings) -> list[str]:
    """Every way a settings secret could be written."""
    password = str(urlsplit(str(settings.database_url)).password)
    basic = base64.b64encode(f"ada:{ADMIN}".encode()).decode()
    given = [ADMIN, SMTP, password, unquote(password), basic, "hush", "ZXhjOmh1c2gtYmFzaWM=", "eyJzdWIi"]
    return [form for text in given for form in {text, json.dumps(text)[1:-1], quote(text, safe="")}]


def leaks(found: Found, settings: Settings) -> list[str]:
    """Where any stands, with some text around."""
    forms = [form for form in places(settings) if len(form) > 3]
    return [f"{where}: …{text[max(0, at - 80) : at + 60]}…" for where, text in found for form in forms if (at := text.find(form)) >= 0]


def ask(url: str, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[str, str]:
    """(what was asked, status, headers and body of the answer), whatever the status."""
    request = urllib.request.Request(
        url + path, method=method, data=body, headers={name.replace("_", "-"): each for name, each in headers.items()}
    )
    try:
        answer: Any = urllib.request.urlopen(request, timeout=10)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return f"{method} {path}", f"{answer.status} {answer.headers} {answer.read().decode()}"


def raw(url: str, request: bytes) -> tuple[str, str]:
    """What the server says to bytes that are no request."""
    address = urlsplit(url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=5) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(OSError):
            while more := connection.recv(65536):
                answer += more
    return f"raw {request[:20]!r}", answer.decode("utf-8", "replace")


def test_no_secret_comes_out_anywhere(
    settings: Settings,
    command: Command,
    start_web: Callable[..., Running],
    start_worker: Callable[..., Running],
    system: Any,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    env = TYPES | {"LOG_FILE": str(log), "WEB_PROCESSES": 1}
    keys = {"JWT_SECRET": "the-hush-key-that-signs-the-tokens", "JWT_SECRET_PREVIOUS": "the-hush-key-that-signed-the-tokens"}
    web, worker = start_web(**env), start_worker(**env, **keys)  # (with them the web server would answer nothing but 401)
    admin = {"Authorization": "Basic " + base64.b64encode(f"ada:{ADMIN}".encode()).decode()}
    wrong = {"Authorization": "Basic " + base64.b64encode(b"eve:basic-hush-1234").decode(), "Cookie": "session=cookie-hush-77"}
    bearer = {"Authorization": "Bearer bearer-hush-55c1.abc", "Cookie": "token=cookie-hush-78"}

    # what runs: a job that tells all it knows, and one that repeats what it was given
    content = {"Content_Type": "application/json"}
    jobs = []
    for body in (
        {"type": "TALKER", "payload": {"password": "payload-hush-1"}},
        {"payload": {"password": "payload-hush-2", "nested": [{"api_key": "payload-hush-3"}], "failTimes": 9}, "maxRetries": 0},
    ):
        _, answer = ask(web.url, "/jobs?access_token=query-hush-1", method="POST", body=json.dumps(body).encode(), **content, **bearer)
        jobs.append(json.loads(answer[answer.index("{") :])["jobId"])
    eventually(lambda: all(system.job(job).status == "FAILED" for job in jobs), timeout=20)
    eventually(lambda: len(system.failures(jobs[0])) == 2)

    found: Found = []
    for headers in (admin, bearer, wrong):  # too many wrong passwords would be refused unread, and right ones after them
        for path in (
            "/admin/jobs",
            "/admin/failed",
            "/admin/ui",
            "/admin/ui/jobs",
            "/metrics",
            "/health",
            "/openapi.json",
            "/docs",
            "/nowhere",
        ):
            found.append(ask(web.url, f"{path}?token=query-hush-2&password=query-hush-3", **headers))
            found.append(ask(web.url, path, **headers))
        for job in jobs:
            found += [ask(web.url, f"/admin/ui/jobs/{job}", **headers), ask(web.url, f"/jobs/{job}/events", **headers)]
    found.append(ask(web.url, "/metrics", Accept="text/plain", **bearer))
    login = json.dumps({"username": "ada", "password": "login-hush"}).encode()
    for body in (
        login,
        login[:-5],
        b"password=login-hush",
        b'{"type": "TALKER", "payload": {"password": ["wrong-hush"]}}',
        b'"wrong-hush"',
    ):
        for path in ("/api/login", "/jobs", "/api/ingest"):
            found.append(ask(web.url, path, method="POST", body=body, **content, **wrong))
    for request in (
        b"GET /x?token=raw-hush-1 HTTP/9.7\r\n\r\n",
        b"GET /x?password=raw-hush-2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization Bearer raw-hush-3\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nCookie : session=raw-hush-4\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer raw-hush-5\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: raw-hush-6\r\n\r\n",
    ):
        found.append(raw(web.url, request))
    commands = ["--help", "doctor", "jobs", "jobs --json", "types", "queues", "workers", f"job {jobs[0]}", f"retry {jobs[0]}"]
    for words in commands:
        said = command(*words.split(), JOB_MODULES="secret_types")
        assert said.out or said.err
        found.append((words, said.out + said.err))
    kept = execute(str(settings.database_url), "select message, traceback from failures union all select message, null from events")
    found += [("failures and events", str(row)) for row in kept]
    found += [
        ("pg_stat_activity", str(row)) for row in execute(str(settings.database_url), "select application_name from pg_stat_activity")
    ]
    web.stop()
    worker.stop()
    found += [("the web server", web.output), ("the worker", worker.output), ("LOG_FILE", log.read_text())]

    # a payload is the user's, who reads it back, also with the command that shows a job; it stands in no error, page or log
    own = ("GET /admin/jobs", "GET /admin/failed", "jobs", "job ")
    found = [(where, re.sub(r"payload-hush-\d", "", text) if where.startswith(own) else text) for where, text in found]
    assert not (leaked := leaks(found, settings)), "\n".join(leaked)
    everywhere = "".join(text for _, text in found)
    assert "at work" not in everywhere and everywhere.count("***") > 20 and "••••••" in everywhere
    assert system.job(jobs[0]).payload == {"password": "payload-hush-1"}


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://bob:se@cret-hush@127.0.0.1:{port}/jobs",
        "postgresql://bob:secret-hush/more-hush@127.0.0.1:{port}/jobs",
        "postgresql://bob:secret-hush?more-hush@127.0.0.1:{port}/jobs",
        "postgresql://bob:secret-hush#more-hush@127.0.0.1:{port}/jobs",
        "postgresql://bob:secret-hush%zz@127.0.0.1:{port}/jobs",
        "postgresql://bob:secret-hush%40x@127.0.0.1:{port}/jobs",
        "postgresql://bob:secret-hush:x@127.0.0.1:{port}/jobs",
        "postgresql:/bob:secret-hush@127.0.0.1:{port}/jobs",
        "host=127.0.0.1 port={port} user=bob password='secret hush'",
        "host=127.0.0.1 port={port} user=bob password='secret-hush",
    ],
)
def test_no_piece_of_a_password_is_told_however_the_address_is_written(address: str, command: Command, closed_port: int) -> None:
    for word in ("jobs", "doctor", "migrate", "worker") if "se@" in address else ("jobs", "doctor"):
        said = command(word, DATABASE_URL=address.format(port=closed_port))
        assert said.code == 1 and not re.search("hush|cret|Traceback", said.out + said.err), said


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://bob:pass%40word@db.example:5432/jobs?application_name=a@b",
        "postgresql://db.example:5432/jobs?application_name=a@b",
        "postgresql://db1:5432,db2:5433/jobs@home",
        "postgresql://bob@[::1]:5432/jobs",
        "postgresql://postgres@/jobs?host=%2Ftmp%2Fa",
        "host=db user=a@b",
    ],
)
def test_an_address_that_is_right_is_not_refused(address: str) -> None:
    assert url_of(Settings(_env_file=None, database_url=address)) == address


def test_an_address_that_is_wrong_says_how_to_write_it() -> None:
    with pytest.raises(SettingsError, match=r"write @ : / \? # % there as %40 %3A"):
        url_of(Settings(_env_file=None, database_url="postgresql://bob:se@cret@db/jobs"))


def test_a_setting_that_is_a_secret_is_hidden_wherever_it_stands() -> None:
    names = [name for name, field in Settings.model_fields.items() if not field.repr]
    assert {"smtp_password", "admin_pass", "admin_password", "jwt_secret"} <= set(names)
    for name, field in Settings.model_fields.items():
        assert not (field.repr and re.search(r"pass|secret|token|key", name)), f"{name} looks like a secret and has no repr=False"
    for name in names:
        secret = f"{name} \"hush\" 'ž' long enough for any rule there is"
        settings = Settings(_env_file=None).model_copy(update={name: secret})
        secrecy.learn(settings)
        for written in (secret, repr(secret), json.dumps(secret), json.dumps({"a": [secret]}, ensure_ascii=False), quote(secret, safe="")):
            assert "hush" not in mask(f"it was {written}, wasn't it")
        assert "hush" not in repr(settings)


@pytest.mark.parametrize(
    "text",
    [
        "the job ended after 3 tries: basic authentication failed",
        "Bearer authentication is needed",
        "GET https://example.org/a?b=1&c=2#d",
        "user ann@example.org at http://example.org:8080/x",
        "compass=7 bypass: on",
        "sha256: 005e8338, key=value",
    ],
)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert mask(text) == text


def test_hiding_takes_no_time_to_speak_of_whatever_the_text() -> None:
    secrecy.learn(Settings(_env_file=None, smtp_password=SMTP))
    for piece in ("://a:", "password=", "Bearer ", "eyJaaaaaa.", "-eyJ", "token='", "\\", "pass"):
        text = piece * (100_000 // len(piece)) + ":"
        began = time.thread_time()
        mask(text)
        assert time.thread_time() - began < 5, piece


def test_a_token_is_hidden_wherever_a_word_begins_it() -> None:
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZGEifQ.c2lnbmF0dXJl"
    for before, kept in (("", ""), ("it was ", "it was "), ("session-", "session-"), ("a.", "a."), ("-eyJ-", "-")):
        assert mask(f"{before}{token}, and more") == f"{kept}***, and more"
