"""Who may do what: the doors that stay shut when the settings are careless, and the one of `/admin`."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from typing import Any

import pytest
import webtest
from conftest import CHECKOUT

from jobsys.app import create_app
from jobsys.errors import SettingsError
from jobsys.settings import Settings
from jobsys.system import JobSystem

NO_DATABASE = Settings(_env_file=None, database_url="postgresql://127.0.0.1:1/none")
USER, PASSWORD = "root", "pass:wörd"


def basic(text: str | bytes) -> dict[str, str]:
    raw = text.encode() if isinstance(text, str) else text
    return {"Authorization": "Basic " + base64.b64encode(raw).decode()}


ABSENT = "01a20560-59f6-7000-9635-42139b8250d8"
RIGHT = basic(f"{USER}:{PASSWORD}")


def app(settings: Settings, **changes: Any) -> webtest.TestApp:
    changed = settings.model_copy(update=changes)
    return webtest.TestApp(create_app(changed, JobSystem(changed)))


@pytest.fixture
def guarded(settings: Settings) -> webtest.TestApp:
    return app(settings, admin_user=USER, admin_pass=PASSWORD)


@pytest.fixture(scope="module")
def shut() -> webtest.TestApp:
    """The same without a database: who is turned away at the door doesn't get that far."""
    return app(NO_DATABASE, admin_user=USER, admin_pass=PASSWORD)


@pytest.fixture
def job_id(guarded: webtest.TestApp) -> str:
    return str(guarded.post_json("/jobs", {}).json["jobId"])


@pytest.mark.parametrize(
    ("careless", "named"),
    [
        ({"host": "0.0.0.0"}, "ALLOW_INSECURE"),
        ({"host": "::"}, "ALLOW_INSECURE"),
        ({"host": "192.0.2.1"}, "ALLOW_INSECURE"),
        ({"host": "jobs.example"}, "ALLOW_INSECURE"),
        ({"host": ""}, "ALLOW_INSECURE"),
        ({"host": "0.0.0.0", "admin_user": "a", "admin_pass": "b"}, "ALLOW_INSECURE"),
        ({"jwt_secret": "x" * 40}, "JWT_SECRET"),
        ({"jwt_secret": "x" * 40, "allow_insecure": True}, "JWT_SECRET"),
        ({"admin_user": "a"}, "ADMIN_PASS"),
        ({"admin_pass": "b"}, "ADMIN_USER"),
    ],
)
def test_a_careless_configuration_does_not_start(careless: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named) as refusal:
        app(NO_DATABASE, **careless)
    assert "\n" not in str(refusal.value) and "xxxx" not in str(refusal.value)


@pytest.mark.parametrize(
    "careful",
    [
        {"host": "127.0.0.1"},
        {"host": "127.0.0.2"},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "allow_insecure": True},
        {"admin_password": "b"},
    ],
)
def test_a_careful_configuration_starts(careful: dict[str, Any]) -> None:
    app(NO_DATABASE, **careful).get("/health/live", status=200)


@pytest.mark.parametrize(
    "arguments",
    [
        {"HOST": "0.0.0.0"},
        {"JWT_SECRET": "x" * 40},
        {"GUNICORN_CMD_ARGS": "--bind 0.0.0.0:0"},
        {"JOB_MODULES": "no_such_module"},
        {"DATABASE_URL": "", "DATA_DIR": "/nonexistent"},
        {"PORT": "x"},
    ],
)
def test_the_server_ends_with_one_sentence_instead(arguments: dict[str, str]) -> None:
    command = [sys.executable, "-m", "gunicorn", "jobsys.app:create_app()", "--config", "python:jobsys.gunicorn_conf"]
    env = os.environ | {"PYTHONPATH": str(CHECKOUT), "PORT": "3999"} | arguments
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, cwd="/")
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert [line for line in ended.stderr.splitlines() if line.startswith("jobsys: ")]


def test_the_right_name_and_password_open_the_admin_routes(guarded: webtest.TestApp) -> None:
    for path in ("/admin/jobs", "/admin/failed", "/admin/dead", "/admin/ui"):
        guarded.get(path, headers=RIGHT, status=200)


def test_the_password_may_come_by_its_other_name(settings: Settings) -> None:
    api = app(settings, admin_password="secret")
    api.get("/admin/jobs", headers=basic("admin:secret"), status=200)
    api.get("/admin/jobs", headers=basic("root:secret"), status=401)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Basic"},
        {"Authorization": "Basic "},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic ä"},
        {"Authorization": "Basic cm9vdA"},
        {"Authorization": "Bearer " + RIGHT["Authorization"][6:]},
        {"Authorization": RIGHT["Authorization"][6:]},
        {"Authorization": RIGHT["Authorization"] + ", " + RIGHT["Authorization"]},
        basic("root"),
        basic("rootpass:wörd"),
        basic(":"),
        basic(f":{PASSWORD}"),
        basic(f"{USER}:"),
        basic(f"{USER}:wrong"),
        basic(f"wrong:{PASSWORD}"),
        basic(f"{USER}:{PASSWORD} "),
        basic(f"{USER}:{PASSWORD}".encode("latin-1")),
        basic(b"\xff:\xff"),
        basic(b"\x00:\x00"),
        basic("x" * 5000 + ":y"),
    ],
)
@pytest.mark.parametrize("path", ["/admin/jobs", "/admin/ui", "/admin/ui/static/admin.css", "/admin/nothing", "/admin"])
def test_nobody_else_gets_in(shut: webtest.TestApp, path: str, headers: dict[str, str]) -> None:
    problem = shut.get(path, headers=headers, status=401)
    assert problem.headers["WWW-Authenticate"] == 'Basic realm="jobsys", charset="UTF-8"'
    assert problem.content_type == "application/problem+json"


@pytest.mark.parametrize(
    "path", ["//admin/jobs", "///admin/jobs", "/admin//jobs", "/%61dmin/jobs", "/admin/jobs/", "/./admin/jobs", "/jobs/../admin/jobs"]
)
def test_no_other_way_of_writing_the_path_leads_around_the_door(shut: webtest.TestApp, path: str) -> None:
    assert shut.get(path, status="*").status_int in (401, 404)


def test_the_api_does_not_ask_for_the_admins_password(guarded: webtest.TestApp) -> None:
    guarded.get("/jobs", status=200)
    guarded.get("/health", status=200)


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:80"},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:81"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://["},
    ],
)
@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"])
def test_a_form_of_another_site_is_refused_before_anything_is_done(
    shut: webtest.TestApp, headers: dict[str, str], content_type: str
) -> None:
    for path in (f"/admin/jobs/{ABSENT}/cancel", f"/admin/ui/jobs/{ABSENT}/retry", "/admin/queues/default/pause", "/admin/nothing"):
        shut.post(path, b"", RIGHT | headers | {"Content-Type": content_type}, status=403)


def test_our_own_pages_and_programs_may_change_things(guarded: webtest.TestApp, job_id: str) -> None:
    ours = [
        {},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost:80"},
        {"Origin": "https://localhost:80"},
    ]
    for headers in ours:
        assert guarded.post(f"/admin/jobs/{job_id}/cancel", b"", RIGHT | headers, status=202).json["status"] == "CANCELLED"
        guarded.post(f"/admin/jobs/{job_id}/retry", b"", RIGHT | headers, status=202)


def test_reading_is_no_ones_harm_wherever_the_link_was(guarded: webtest.TestApp) -> None:
    guarded.get("/admin/jobs", headers=RIGHT | {"Sec-Fetch-Site": "cross-site"}, status=200)


def test_without_a_password_only_this_machines_own_names_open_the_admin_routes(settings: Settings) -> None:
    api = app(settings)
    for host in ("localhost:3000", "127.0.0.1:3000", "[::1]:3000", "LOCALHOST", "127.0.0.1"):
        api.get("/admin/jobs", headers={"Host": host}, status=200)
    for host in ("evil.example", "localhost.evil.example:3000", "192.0.2.1", "[", "user@evil.example", "0.0.0.0"):
        api.get("/admin/jobs", headers={"Host": host}, status=403)
    app(settings, allow_insecure=True).get("/admin/jobs", headers={"Host": "jobs.example"}, status=200)


def test_the_operators_verbs_do_what_they_say_and_say_who_did(guarded: webtest.TestApp, job_id: str) -> None:
    def act(verb: str, status: int = 202) -> Any:
        return guarded.post(f"/admin/jobs/{job_id}/{verb}", headers=RIGHT, status=status).json

    def listed(path: str) -> list[str]:
        return [job["id"] for job in guarded.get(path, headers=RIGHT).json["jobs"]]

    assert "PENDING" in act("retry", 409)["detail"]
    assert act("dlq")["status"] == "DEAD"
    assert "DEAD" in act("dlq", 409)["detail"]
    assert listed("/admin/dead") == listed("/admin/jobs?status=dead") == [job_id] and listed("/admin/failed") == []
    assert act("retry")["status"] == "PENDING"
    assert act("cancel")["status"] == "CANCELLED"
    done = {(event["kind"], event["by"]) for event in guarded.get(f"/jobs/{job_id}/events").json["events"]}
    assert {("buried", USER), ("retried", USER), ("cancelled", USER)} <= done
    guarded.get("/admin/failed?status=DEAD", headers=RIGHT, status=400)
    guarded.post("/admin/jobs/nope/retry", headers=RIGHT, status=404)


def test_a_queue_is_paused_and_resumed(guarded: webtest.TestApp, job_id: str, settings: Settings) -> None:
    system = JobSystem(settings)
    for verb, paused in (("pause", True), ("resume", False)):
        answer = guarded.post(f"/admin/queues/default/{verb}", headers=RIGHT, status=200)
        assert answer.json == {"queue": "default", "paused": paused}
        assert [queue.paused for queue in system.queues() if queue.name == "default"] == [paused]
    for name in ("nosuch", "%00", "a%2Fb"):
        guarded.post(f"/admin/queues/{name}/pause", headers=RIGHT, status=404)
    system.close()
