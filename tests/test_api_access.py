"""Who may do what: the doors that stay shut when the settings are careless, and who gets through which."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import argon2
import pytest
import webtest
from conftest import CHECKOUT, NO_DATABASE, Running, eventually, execute
from falcon import inspect
from test_tokens import FORGED, SECRET, payload, signed

from jobsys import passwords, tokens
from jobsys.api.access import check, needed
from jobsys.app import create_app
from jobsys.errors import SettingsError
from jobsys.settings import Settings
from jobsys.system import JobSystem
from jobsys.tokens import Tokens

USER, PASSWORD = "root", "pass:wörd"
ISSUED_HERE = Tokens(Settings(_env_file=None, jwt_secret=SECRET))


def basic(text: str | bytes) -> dict[str, str]:
    raw = text.encode() if isinstance(text, str) else text
    return {"Authorization": "Basic " + base64.b64encode(raw).decode()}


def bearer(*scopes: str, sub: str = "billing") -> dict[str, str]:
    return {"Authorization": f"Bearer {ISSUED_HERE.issue(sub, scopes, 600)[0]}"}


ABSENT = "01a20560-59f6-7000-9635-42139b8250d8"
RIGHT = basic(f"{USER}:{PASSWORD}")
VIEWER = basic("vic:look around")
HASH = argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash("open sesame")


def app(settings: Settings, **changes: Any) -> webtest.TestApp:
    changed = settings.model_copy(update=changes)
    return webtest.TestApp(create_app(changed, JobSystem(changed)))


@pytest.fixture
def guarded(settings: Settings) -> webtest.TestApp:
    return app(settings, admin_user=USER, admin_pass=PASSWORD)


@pytest.fixture
def closed(settings: Settings) -> webtest.TestApp:
    """The API wants a token, and /admin a token or one of two passwords."""
    return app(settings, jwt_secret=SECRET, admin_user=USER, admin_pass=PASSWORD, viewer_user="vic", viewer_pass="look around")


@pytest.fixture(scope="module")
def shut() -> webtest.TestApp:
    """The same without a database: who is turned away at the door doesn't get that far."""
    return app(NO_DATABASE, jwt_secret=SECRET, admin_user=USER, admin_pass=PASSWORD)


@pytest.fixture
def job_id(guarded: webtest.TestApp) -> str:
    return str(guarded.post_json("/jobs", {}).json["jobId"])


# Whether it starts

CREDENTIALS: dict[str, dict[str, Any]] = {
    "nobody": {},
    "admin": {"admin_user": "ada", "admin_pass": "open sesame"},
    "admin by the other name": {"admin_password": "open sesame"},
    "both": {"admin_user": "ada", "admin_pass": HASH, "viewer_user": "vic", "viewer_pass": HASH},
    "viewer": {"viewer_user": "vic", "viewer_pass": HASH},
}


def test_what_counts_as_this_machine() -> None:
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        check(NO_DATABASE, host)
    for host in ("0.0.0.0", "::", "192.0.2.1", "jobs.example", ""):
        with pytest.raises(SettingsError, match="can be reached from other machines"):
            check(NO_DATABASE, host)
        check(NO_DATABASE.model_copy(update={"jwt_secret": SECRET}), host)


@pytest.mark.parametrize("who", CREDENTIALS)
@pytest.mark.parametrize("allow_insecure", [False, True])
@pytest.mark.parametrize("jwt_secret", [None, SECRET])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_which_settings_start_and_what_they_leave_open(host: str, jwt_secret: str | None, allow_insecure: bool, who: str) -> None:
    chosen = {"host": host, "jwt_secret": jwt_secret, "allow_insecure": allow_insecure, **CREDENTIALS[who]}
    if jwt_secret is None and (who == "viewer" or (host == "0.0.0.0" and not allow_insecure)):
        with pytest.raises(SettingsError, match="VIEWER_USER" if who == "viewer" else "set JWT_SECRET, or .* or set ALLOW_INSECURE=1"):
            app(NO_DATABASE, **chosen)
        return
    api = app(NO_DATABASE, **chosen)
    api.get("/health/live", status=200)
    # 503: the door is open, and there is no database behind it.
    for name in ("localhost", "jobs.example"):
        by_name = {"Host": name}
        open_to_all = jwt_secret is None and (allow_insecure or name == "localhost")
        refused = 401 if jwt_secret else 403
        assert api.get("/jobs", headers=by_name, status="*").status_int == (503 if open_to_all else refused)
        assert api.post_json("/jobs", {}, headers=by_name, status="*").status_int == (503 if open_to_all else refused)
        admin = api.get("/admin/jobs", headers=by_name, status="*").status_int
        assert admin == (401 if who != "nobody" else 503 if open_to_all else refused)


@pytest.mark.parametrize(
    ("careless", "named"),
    [
        ({"admin_user": "a"}, "ADMIN_PASS"),
        ({"admin_pass": "b"}, "ADMIN_USER"),
        ({"viewer_user": "b"}, "VIEWER_PASS"),
        ({"admin_user": "a", "admin_pass": "$argon2id$nonsense"}, "ADMIN_PASS"),
        ({"jwt_secret": "x" * 31}, "openssl rand -base64 48"),
        ({"jwt_secret": SECRET, "jwt_secret_previous": "x"}, "JWT_SECRET_PREVIOUS"),
        ({"jwt_secret_previous": SECRET}, "JWT_SECRET_PREVIOUS is set without JWT_SECRET"),
    ],
)
def test_a_careless_configuration_does_not_start(careless: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named) as refusal:
        app(NO_DATABASE, **careless)
    assert "\n" not in str(refusal.value) and "xxxx" not in str(refusal.value) and SECRET not in str(refusal.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"HOST": "0.0.0.0"},
        {"JWT_SECRET": "x" * 31},
        {"GUNICORN_CMD_ARGS": "--bind 0.0.0.0:0"},
        {"JOB_MODULES": "no_such_module"},
        {"DATABASE_URL": "", "DATA_DIR": "/nonexistent"},
        {"PORT": "x"},
        {"CORS_ORIGINS": "*"},
    ],
)
def test_the_server_ends_with_one_sentence_instead(arguments: dict[str, str]) -> None:
    command = [sys.executable, "-m", "gunicorn", "jobsys.app:create_app()", "--config", "python:jobsys.gunicorn_conf"]
    env = os.environ | {"PYTHONPATH": str(CHECKOUT), "PORT": "3999"} | arguments
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, cwd="/")
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr and "xxxx" not in ended.stderr
    assert [line for line in ended.stderr.splitlines() if line.startswith("jobsys: ")]


# Every route


def routes(api: webtest.TestApp) -> list[tuple[str, str]]:
    """(method, path) of every route there is, with something in the place of each parameter."""
    found = [
        (method.method, "/".join(ABSENT if part.startswith("{") else part for part in route.path.split("/")))
        for route in inspect.inspect_compiled_router(api.app._router)
        for method in route.methods
        if method.method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    ]
    assert len(found) > 60 and ("POST", "/jobs") in found
    return found


OPEN_TO_ALL = {"/health", "/health/live", "/api/login", "/openapi.json", "/docs"}


def test_no_route_is_open_that_should_not_be(shut: webtest.TestApp) -> None:
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
    for path in sorted({path for _, path in routes(shut)} | {"/", "/nothing", "/jobs/a/b/c", "/api", "/api/jobs/x", "/docsx", "/healthy"}):
        for method in methods:
            answer = shut.request(path, method=method, status="*")
            if path in OPEN_TO_ALL or path.startswith("/docs/"):
                assert answer.status_int not in (401, 403), (method, path)
            else:
                assert answer.status_int == 401, (method, path, answer.status)
                assert 'Bearer realm="jobsys"' in answer.headers["WWW-Authenticate"]
                assert answer.content_type == "application/problem+json"


def test_each_route_wants_its_scope_and_no_less(shut: webtest.TestApp) -> None:
    """Without a database only who gets in finds out (503) that it is away; who came with too little is told before."""
    for method, path in routes(shut):
        if path in OPEN_TO_ALL or path.startswith("/docs"):
            continue
        scope = (
            "admin" if path.startswith(("/admin", "/dashboard")) else "jobs:read" if method in ("GET", "HEAD", "OPTIONS") else "jobs:write"
        )
        assert needed(method, path) == scope
        for having in tokens.SCOPES:
            answer = shut.request(path, method=method, headers=bearer(having), status="*")
            assert (answer.status_int == 403) == (having not in (scope, "admin")), (method, path, having, answer.status)
            if answer.status_int == 403:
                assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]
                assert f'scope="{scope}"' in answer.headers["WWW-Authenticate"]


PATHS = [
    *("//jobs", "///jobs", "/jobs/", "/JOBS", "/Jobs", "/%6Aobs", "/./jobs", "/health/../jobs", "/docs/../jobs", "/docs/..%2fjobs"),
    *("/health%2f..%2fjobs", "/api//jobs", "/api/login/../jobs", "/jobs?x=/health", "/jobs;/health", "/jobs#/health"),
    *("/health/../admin/jobs", "//health", "/%2fjobs", "/jobs%00", "/jobs%2f", "/metrics/", "/openapi.json/../jobs"),
    *("//admin/jobs", "///admin/jobs", "/admin//jobs", "/%61dmin/jobs", "/admin/jobs/", "/./admin/jobs", "/jobs/../admin/jobs"),
    *("/ADMIN/jobs", "/admin%2fjobs", "/admin/ui/../jobs", "/jobs/..%2fadmin%2fjobs", "/health\\..\\jobs"),
]


def test_no_other_way_of_writing_a_path_leads_around_the_door(closed: webtest.TestApp) -> None:
    for path in PATHS:
        for method in ("GET", "POST", "HEAD", "DELETE"):
            assert closed.request(path, method=method, status="*").status_int in (401, 404), (method, path)
        answer = closed.get(path, headers=bearer("jobs:read"), status="*")
        assert "admin" not in path.lower().replace("%61", "a") or answer.status_int in (403, 404), path


def test_a_route_that_nobody_thought_of_is_closed(settings: Settings) -> None:
    class Forgotten:
        def on_get(self, req: Any, resp: Any) -> None:
            resp.media = "a secret"

        on_post = on_get

    api = app(settings, jwt_secret=SECRET)
    for path in ("/forgotten", "/admin/forgotten", "/api/login/forgotten"):
        api.app.add_route(path, Forgotten())
        api.get(path, status=401)
        api.post(path, status=401)
    api.get("/forgotten", headers=bearer("jobs:write"), status=403)
    api.get("/admin/forgotten", headers=bearer("jobs:read", "jobs:write"), status=403)
    api.post("/forgotten", headers=bearer("jobs:write"), status=200)


# Tokens


def test_a_token_of_the_right_scope_opens_the_api(closed: webtest.TestApp) -> None:
    write, read = bearer("jobs:write"), bearer("jobs:read")
    made = closed.post_json("/jobs", {}, headers=write, status=202).json["jobId"]
    closed.get(f"/jobs/{made}", headers=write, status=403)
    closed.get(f"/jobs/{made}", headers=read, status=200)
    closed.head(f"/jobs/{made}", headers=read, status=200)
    closed.options(f"/jobs/{made}", headers=read, status=200)
    closed.delete(f"/jobs/{made}", headers=read, status=403)
    ingested = closed.post_json("/api/ingest", {"ids": [1]}, headers=write, status=201).json["data"]["ingestion_id"]
    closed.get(f"/api/status/{ingested}", headers=read, status=200)
    closed.get("/metrics", headers=read, status=200)
    for scheme in ("bearer", "BEARER", "Bearer  "):
        closed.get("/jobs", headers={"Authorization": f"{scheme} {read['Authorization'][7:]}"}, status=200)


def test_the_metrics_may_be_made_public(settings: Settings) -> None:
    app(settings, jwt_secret=SECRET).get("/metrics", status=401)
    app(settings, jwt_secret=SECRET, metrics_public=True).get("/metrics", status=200)


ONE_TOKEN = ISSUED_HERE.issue("billing", ["admin"], 3600)[0]


WRONG: list[tuple[str | None, int, str | None]] = [
    (None, 401, None),
    ("", 401, None),
    ("Bearer", 401, None),
    ("Bearer ", 401, None),
    (ONE_TOKEN, 401, None),
    (f"Basic {ONE_TOKEN}", 401, None),
    (RIGHT["Authorization"], 401, None),
    (f"Token {ONE_TOKEN}", 401, None),
    (f"Bearer {ONE_TOKEN}, Bearer {ONE_TOKEN}", 400, "invalid_request"),
    (f"Bearer {ONE_TOKEN} {ONE_TOKEN}", 400, "invalid_request"),
    (f'Bearer "{ONE_TOKEN}"', 400, "invalid_request"),
    (f"Bearer token={ONE_TOKEN}", 400, "invalid_request"),
    ("Bearer täken".encode().decode("latin-1"), 400, "invalid_request"),
    ('Bearer ", error="none', 400, "invalid_request"),
    (f"Bearer {ONE_TOKEN}x", 401, "invalid_token"),
    (f"Bearer {'x' * 100_000}", 401, "invalid_token"),
    (f"Bearer {signed(payload(exp=1))}", 401, "invalid_token"),
    (f"Bearer {signed(payload(sub='a' + chr(34) + ', realm=' + chr(34), jti=' '))}", 403, "insufficient_scope"),
    (f"Bearer {signed(payload(scope=['admin']))}", 401, "invalid_token"),
]


def test_what_is_wrong_with_a_token_is_said_as_the_standard_wants(closed: webtest.TestApp) -> None:
    for header, status, code in WRONG:
        answer = closed.post_json("/jobs", {}, headers={} if header is None else {"Authorization": header}, status=status)
        challenge = answer.headers["WWW-Authenticate"]
        assert challenge.startswith('Bearer realm="jobsys"') and challenge.isascii() and challenge.isprintable()
        assert (f'error="{code}"' in challenge) if code else ("error" not in challenge)
        assert challenge.count('"') % 2 == 0 and ONE_TOKEN[20:] not in answer.text + challenge


def test_no_forged_token_opens_anything(shut: webtest.TestApp) -> None:
    for token, path in itertools.product(FORGED, ("/jobs", "/admin/jobs")):
        if token == token.strip() and token.isascii() and token.isprintable():
            shut.get(path, headers={"Authorization": f"Bearer {token}"}, status=[400, 401])


def test_the_admin_routes_take_a_token_of_scope_admin(closed: webtest.TestApp) -> None:
    for path in ("/admin/jobs", "/admin/failed", "/admin/ui", "/dashboard"):
        closed.get(path, headers=bearer("admin"), status=[200, 302])
        closed.get(path, headers=bearer("jobs:read", "jobs:write"), status=403)
        challenge = closed.get(path, status=401).headers["WWW-Authenticate"]
        assert challenge == 'Basic realm="jobsys", charset="UTF-8", Bearer realm="jobsys"'
    only_tokens = app(NO_DATABASE, jwt_secret=SECRET)
    assert only_tokens.get("/admin/jobs", status=401).headers["WWW-Authenticate"] == 'Bearer realm="jobsys"'
    only_tokens.get("/admin/jobs", headers=basic("admin:"), status=401)


def test_a_token_is_no_harm_wherever_it_is_sent_from(closed: webtest.TestApp) -> None:
    """No browser adds one by itself."""
    closed.post_json("/jobs", {}, headers=bearer("jobs:write") | {"Origin": "https://app.example", "Host": "jobs.example"}, status=202)


def test_who_did_it_is_the_tokens_subject(closed: webtest.TestApp) -> None:
    made = closed.post_json("/jobs", {}, headers=bearer("jobs:write")).json["jobId"]
    closed.post(f"/jobs/{made}/cancel", headers=bearer("jobs:write", sub="night shift"), status=202)
    closed.post(f"/admin/jobs/{made}/retry", headers=bearer("admin", sub="day shift"), status=202)
    done = [(event["kind"], event["by"]) for event in closed.get(f"/jobs/{made}/events", headers=bearer("admin")).json["events"]]
    assert ("cancelled", "night shift") in done and ("retried", "day shift") in done


def test_a_revoked_token_opens_nothing_in_any_process(start_web: Callable[..., Running], settings: Settings, database_url: str) -> None:
    web = start_web(WEB_PROCESSES=2, WEB_THREADS=2, JWT_SECRET=SECRET)
    kept, lost = bearer("jobs:read"), bearer("jobs:read", sub="gone")

    def status(headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection(urlsplit(web.url).netloc, timeout=20)
        connection.request("GET", "/jobs", headers=headers)
        answer = connection.getresponse().status
        connection.close()
        return answer

    assert {status(headers) for headers in [kept, lost] * 5} == {200}
    tokens.revoke(JobSystem(settings).database, sub="gone")
    eventually(lambda: {status(lost) for _ in range(10)} == {401}, timeout=5)
    assert {status(kept) for _ in range(10)} == {200}

    # With the database away, a token that was good is still good, and what it asks for is not to be had.
    execute(database_url, "alter table jobs rename to hidden")
    execute(database_url, "alter table revocations rename to hidden_too")
    time.sleep(2.5)  # the lists are read anew, in vain
    assert {status(kept) for _ in range(10)} == {503}
    # (A process that nobody had asked before has no list, and lets nobody in.)
    refused = {status(lost) for _ in range(10)}
    assert 401 in refused and refused <= {401, 503}
    assert lost["Authorization"][7:] not in web.output and SECRET not in web.output


# Login


def test_a_login_gives_a_token_for_an_hour(closed: webtest.TestApp) -> None:
    answer = closed.post_json("/api/login", {"username": USER, "password": PASSWORD}, status=200).json
    assert answer.keys() == {"token", "tokenType", "expiresIn"} and (answer["tokenType"], answer["expiresIn"]) == ("Bearer", 3600)
    read = ISSUED_HERE.read(answer["token"])
    assert read.sub == USER and read.scopes == {"admin"} and 3599 <= read.expires_at - read.issued_at <= 3601
    closed.get("/admin/jobs", headers={"Authorization": f"Bearer {answer['token']}"}, status=200)
    viewer = closed.post_json("/api/login", {"username": "vic", "password": "look around"}).json["token"]
    assert ISSUED_HERE.read(viewer).scopes == {"jobs:read"}


def test_five_wrong_logins_a_minute_and_no_more(closed: webtest.TestApp) -> None:
    for number, wrong in enumerate(({"username": USER, "password": "x"}, {"username": "nobody", "password": PASSWORD}) * 2):
        answer = closed.post_json("/api/login", wrong, status=401)
        assert answer.json["detail"] == "wrong user name or password" and "WWW-Authenticate" in answer.headers, number
    wrong = closed.get("/admin/jobs", headers=basic("root:wrong"), status=401)  # counts as well
    assert wrong.json["detail"] == "wrong user name or password" and "Basic" in wrong.headers["WWW-Authenticate"]
    for refused in (
        closed.post_json("/api/login", {"username": USER, "password": PASSWORD}, status=429),
        closed.get("/admin/jobs", headers=RIGHT, status=429),
    ):
        assert 1 <= int(refused.headers["Retry-After"]) <= 60 and "try again in" in refused.json["detail"]
    elsewhere = {"REMOTE_ADDR": "192.0.2.7"}
    closed.post_json("/api/login", {"username": USER, "password": PASSWORD}, extra_environ=elsewhere, status=200)
    closed.get("/admin/jobs", headers=bearer("admin"), status=200)


NO_LOGINS: list[tuple[Any, int]] = [
    ({}, 422),
    ({"username": "a"}, 422),
    ({"username": "a", "password": ""}, 422),
    ({"username": "a", "password": 1}, 422),
    ({"username": ["a"], "password": "b"}, 422),
    ({"username": "a", "password": "b", "scope": "admin"}, 422),
    ({"username": "a", "password": "x" * 1001}, 422),
    ({"username": "a", "password": "x" * 20_000}, 413),
    ([], 400),
]


def test_what_is_no_login_is_told_so_and_counts_for_nothing(closed: webtest.TestApp) -> None:
    for body, status in NO_LOGINS:
        assert "xxxx" not in closed.post_json("/api/login", body, status=status).text
    right = {"username": USER, "password": PASSWORD}
    closed.post("/api/login", json.dumps(right), content_type="text/plain", status=415)
    closed.get("/api/login", status=405)
    closed.post_json("/api/login", right, status=200)


def test_without_a_secret_a_login_says_what_to_set(guarded: webtest.TestApp) -> None:
    assert "JWT_SECRET" in guarded.post_json("/api/login", {"username": USER, "password": PASSWORD}, status=409).json["detail"]
    nobody = app(NO_DATABASE, jwt_secret=SECRET)
    assert "ADMIN_USER" in nobody.post_json("/api/login", {"username": USER, "password": PASSWORD}, status=409).json["detail"]


def test_without_the_database_nobody_new_gets_in_and_who_was_in_stays(
    closed: webtest.TestApp, shut: webtest.TestApp, database_url: str
) -> None:
    assert shut.post_json("/api/login", {"username": USER, "password": PASSWORD}, status=503).headers["Retry-After"]
    shut.get("/admin/ui", headers=RIGHT, status=503)
    closed.get("/admin/ui", headers=RIGHT, status=200)
    execute(database_url, "alter table logins rename to hidden")
    closed.get("/admin/ui", headers=RIGHT, status=200)
    closed.get("/admin/ui", headers=VIEWER, status=503)


# Names and passwords


def test_the_right_name_and_password_open_the_admin_routes(guarded: webtest.TestApp) -> None:
    for path in ("/admin/jobs", "/admin/failed", "/admin/dead", "/admin/ui"):
        guarded.get(path, headers=RIGHT, status=200)


def test_the_password_may_come_by_its_other_name(settings: Settings) -> None:
    api = app(settings, admin_password="secret")
    api.get("/admin/jobs", headers=basic("admin:secret"), status=200)
    api.get("/admin/jobs", headers=basic("root:secret"), status=401)


NOBODY: list[dict[str, str]] = [
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
]


def test_nobody_else_gets_in(guarded: webtest.TestApp, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("PER_ADDRESS", "PER_NAME", "IN_ALL"):
        monkeypatch.setattr(passwords, limit, 1000)
    paths = ("/admin/jobs", "/admin/ui", "/admin/ui/static/admin.css", "/admin/nothing", "/admin")
    for headers, path in itertools.product(NOBODY, paths):
        problem = guarded.get(path, headers=headers, status=401)
        assert problem.headers["WWW-Authenticate"] == 'Basic realm="jobsys", charset="UTF-8"'
        assert problem.content_type == "application/problem+json"


def test_a_password_may_be_known_by_its_hash_only(settings: Settings) -> None:
    api = app(settings, admin_user=USER, admin_pass=HASH)
    api.get("/admin/jobs", headers=basic("root:open sesame"), status=200)
    api.get("/admin/jobs", headers=basic(f"root:{HASH}"), status=401)


def test_the_api_does_not_ask_for_the_admins_password(guarded: webtest.TestApp) -> None:
    guarded.get("/jobs", status=200)
    guarded.get("/health", status=200)


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


# Who may only look


def test_a_viewer_sees_everything_and_changes_nothing(closed: webtest.TestApp, settings: Settings) -> None:
    system = JobSystem(settings)
    made = system.submit("TEST_JOB").id
    for path in ("/admin/jobs", "/admin/failed", "/admin/dead", "/admin/ui", "/admin/ui/jobs", f"/admin/ui/jobs/{made}", "/dashboard"):
        closed.get(path, headers=VIEWER, status=[200, 302])
    token = closed.get("/admin/ui", headers=RIGHT).html.select_one("input[name=csrf]")["value"]
    posts = [path for method, path in routes(closed) if method not in ("GET", "HEAD", "OPTIONS") and path.startswith("/admin")]
    assert len(posts) > 6
    for path in posts:
        path = path.replace(ABSENT, made, 1)
        answer = closed.request(path, method="POST", headers=VIEWER, status=403)
        page = path.startswith("/admin/ui")
        assert answer.content_type == ("text/html" if page else "application/problem+json"), path
        assert "vic may look at everything" in answer.text
        closed.post(path, {"csrf": token, "back": "job"}, headers=VIEWER, status=403)
    for verb in ("retry", "dead-letter", "cancel"):
        closed.post(f"/admin/ui/jobs/{made}/{verb}", {"csrf": token}, headers=VIEWER, status=403)
    assert system.job(made).status == "PENDING" and not any(queue.paused for queue in system.queues())
    closed.get("/jobs", headers=VIEWER, status=401)
    system.close()


def test_a_viewer_is_offered_no_button(closed: webtest.TestApp, settings: Settings) -> None:
    system = JobSystem(settings)
    made = system.submit("TEST_JOB").id
    system.pause("default")
    pages = ("/admin/ui", "/admin/ui/jobs", f"/admin/ui/jobs/{made}", "/admin/ui/many/cancel?type=TEST_JOB")
    offered = [len(closed.get(path, headers=RIGHT).html.select("form[method=post]")) for path in pages]
    assert offered[0] and offered[2] and offered[3]
    for path in pages:
        page = closed.get(path, headers=VIEWER)
        assert not page.html.select("form[method=post], input[name=csrf], .reason .acts")
        assert "vic may only look" in page.text
    system.close()


def test_the_token_of_a_form_is_the_users_own(settings: Settings) -> None:
    api = app(settings, admin_user=USER, admin_pass=PASSWORD, jwt_secret=SECRET)
    made = api.post_json("/jobs", {}, headers=bearer("jobs:write")).json["jobId"]
    token = api.get(f"/admin/ui/jobs/{made}", headers=RIGHT).html.select_one("input[name=csrf]")["value"]
    path = f"/admin/ui/jobs/{made}/cancel"
    api.post(path, {"csrf": token}, headers=bearer("admin", sub="eve"), status=403)
    api.post(path, {"csrf": token}, headers=RIGHT, status=303)


def test_a_file_can_be_had_from_its_page(closed: webtest.TestApp, settings: Settings) -> None:
    system = JobSystem(settings)
    made = system.submit("CSV_EXPORT", {"data": [{"a": 1}]}).id
    settings.output_dir.mkdir()
    (settings.output_dir / f"{made}.csv").write_text("a\n1\n")
    execute(
        str(settings.database_url),
        """update jobs set status = 'COMPLETED', finished_at = now(), started_at = now(), result = '{"file": "x"}' where id = %s""",
        made,
    )
    link = closed.get(f"/admin/ui/jobs/{made}", headers=VIEWER).html.find("a", string="Download the file")["href"]
    assert closed.get(link, headers=VIEWER).text == "a\n1\n"
    closed.get(link, status=401)
    system.close()


# Browsers


ELSEWHERE = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:80"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "http://localhost:81"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "http://["},
    {"Referer": "http://evil.example/localhost:80"},
    {"Origin": "null", "Referer": "http://localhost:80/"},
]


def test_a_form_of_another_site_is_refused_before_anything_is_done(guarded: webtest.TestApp) -> None:
    kinds = ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x", "application/json")
    for headers, kind in itertools.product(ELSEWHERE, kinds):
        of_the_page = headers | {"Content-Type": kind}
        for path in (f"/admin/jobs/{ABSENT}/cancel", f"/admin/ui/jobs/{ABSENT}/retry", "/admin/queues/default/pause", "/admin/nothing"):
            guarded.post(path, b"", RIGHT | of_the_page, status=403)
        for path in ("/jobs", f"/jobs/{ABSENT}/cancel", f"/api/jobs/{ABSENT}/retry", "/api/ingest"):
            guarded.post(path, b"{}", of_the_page, status=403)


def test_our_own_pages_and_programs_may_change_things(guarded: webtest.TestApp, job_id: str) -> None:
    ours = [
        {},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost:80"},
        {"Origin": "http://localhost"},
        {"Origin": "https://localhost:80"},
        {"Referer": "http://localhost/admin/ui?x=http://evil.example"},
    ]
    for headers in ours:
        assert guarded.post(f"/admin/jobs/{job_id}/cancel", b"", RIGHT | headers, status=202).json["status"] == "CANCELLED"
        guarded.post(f"/admin/jobs/{job_id}/retry", b"", RIGHT | headers, status=202)
        guarded.post_json("/jobs", {}, headers=headers, status=202)


def test_reading_is_no_ones_harm_wherever_the_link_was(guarded: webtest.TestApp) -> None:
    guarded.get("/admin/jobs", headers=RIGHT | {"Sec-Fetch-Site": "cross-site"}, status=200)


OWN_NAMES = ("localhost:3000", "127.0.0.1:3000", "[::1]:3000", "LOCALHOST", "127.0.0.1", "127.1.2.3:1")
STRANGE_NAMES = (
    "evil.example",
    "localhost.evil.example:3000",
    "127.0.0.1.evil.example",
    "192.0.2.1",
    "[",
    "user@evil.example",
    "0.0.0.0",
    "::1",
)


def test_without_credentials_only_this_machines_own_names_open_anything(settings: Settings) -> None:
    api = app(settings)
    made = api.post_json("/jobs", {}, status=202).json["jobId"]
    for host in OWN_NAMES:
        api.get("/admin/jobs", headers={"Host": host}, status=200)
        api.get("/jobs", headers={"Host": host}, status=200)
    closed_to_strangers = [(method, path) for method, path in routes(api) if path not in OPEN_TO_ALL and not path.startswith("/docs")]
    for host, (method, path) in itertools.product(STRANGE_NAMES, closed_to_strangers):
        assert api.request(path.replace(ABSENT, made), method=method, headers={"Host": host}, status="*").status_int == 403, (method, path)
    for path in ("/health", "/health/live"):
        api.get(path, headers={"Host": "probe.example"}, status=200)
    assert "ALLOW_INSECURE=1" in api.get("/jobs", headers={"Host": "jobs.example"}, status=403).json["detail"]


def test_any_name_will_do_where_that_is_wanted_or_credentials_are_asked_for(settings: Settings, closed: webtest.TestApp) -> None:
    proxied = {"Host": "jobs.example"}
    app(settings, allow_insecure=True).get("/admin/jobs", headers=proxied, status=200)
    app(settings, allow_insecure=True).post_json("/jobs", {}, headers=proxied, status=202)
    closed.get("/admin/jobs", headers=RIGHT | proxied, status=200)
    closed.get("/jobs", headers=bearer("jobs:read") | proxied, status=200)
    with_password = app(settings, admin_user=USER, admin_pass=PASSWORD)
    with_password.get("/admin/jobs", headers=RIGHT | proxied, status=200)
    with_password.get("/jobs", headers=RIGHT | proxied, status=403)  # the API asks for none


# Other sites that may

PAGE = "https://app.example.org"
PREFLIGHT = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.fixture
def shared(settings: Settings) -> webtest.TestApp:
    return app(settings, jwt_secret=SECRET, admin_user=USER, admin_pass=PASSWORD, cors_origins=[PAGE, "http://localhost:8080"])


def test_a_page_of_a_named_origin_may_call_the_api(shared: webtest.TestApp) -> None:
    for path in ("/jobs", "/api/login", "/admin/jobs", "/nothing"):
        leave = shared.options(path, headers=PREFLIGHT, status=204)
        assert leave.headers["Access-Control-Allow-Origin"] == PAGE and leave.headers["Vary"] == "Origin"
        assert {"GET", "POST", "DELETE"} <= set(leave.headers["Access-Control-Allow-Methods"].split(", "))
        named = {"Authorization", "Idempotency-Key", "Content-Type", "X-Request-ID"}
        assert named == set(leave.headers["Access-Control-Allow-Headers"].split(", "))
    answers = [
        shared.post_json("/jobs", {}, headers=bearer("jobs:write") | {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}, status=202),
        shared.get("/jobs", headers={"Origin": PAGE}, status=401),
        shared.get("/nothing", headers=bearer("admin") | {"Origin": PAGE}, status=404),
        shared.post_json("/jobs", {"type": "NOPE"}, headers=bearer("jobs:write") | {"Origin": PAGE}, status=422),
    ]
    for answer in answers:
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE and "Origin" in answer.headers["Vary"]
        exposed = set(answer.headers["Access-Control-Expose-Headers"].split(", "))
        assert {"Location", "Idempotency-Replayed", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"} <= exposed
        assert {"Retry-After", "X-Request-ID"} <= exposed
        assert "Access-Control-Allow-Credentials" not in answer.headers


def test_a_page_of_any_other_origin_may_not(shared: webtest.TestApp) -> None:
    strange = ("https://evil.example", "null", "*", f"{PAGE}.evil.example", "http://app.example.org", f"{PAGE}:443", PAGE.upper())
    for origin in strange:
        for answer in (
            shared.options("/jobs", headers=PREFLIGHT | {"Origin": origin}, status=401),
            shared.get("/jobs", headers=bearer("jobs:read") | {"Origin": origin}, status=200),
        ):
            assert not [name for name in answer.headers if name.startswith("Access-Control")]
            assert "Origin" in answer.headers["Vary"]


def test_no_page_of_another_origin_may_use_the_password_a_browser_keeps(shared: webtest.TestApp) -> None:
    shared.post("/admin/queues/default/pause", headers=RIGHT | {"Origin": PAGE}, status=403)
    shared.post("/admin/queues/default/pause", headers=bearer("admin") | {"Origin": PAGE}, status=404)


def test_a_named_origin_may_use_an_open_api_and_no_other_may(settings: Settings) -> None:
    api = app(settings, cors_origins=[PAGE])
    cross = {"Sec-Fetch-Site": "cross-site"}
    api.post_json("/jobs", {}, headers=cross | {"Origin": PAGE}, status=202)
    api.post_json("/jobs", {}, headers=cross | {"Origin": "https://evil.example"}, status=403)
    api.post("/admin/queues/default/pause", headers=cross | {"Origin": PAGE}, status=403)


def test_without_named_origins_nothing_is_said_about_them(guarded: webtest.TestApp) -> None:
    answer = guarded.get("/jobs", headers={"Origin": PAGE}, status=200)
    assert not [name for name in answer.headers if name.startswith("Access-Control") or name == "Vary"]


@pytest.mark.parametrize(
    "origins",
    ["*", "https://*.example.org", "app.example.org", "https://app.example.org/", "null", "https://app.example.org:443", "HTTPS://A.B"],
)
def test_what_is_no_origin_is_refused(origins: str) -> None:
    with pytest.raises(SettingsError, match="CORS_ORIGINS"):
        Settings(_env_file=None, cors_origins=f"https://good.example,{origins}")
    assert Settings(_env_file=None, cors_origins="https://a.example, http://[::1]:8080").cors_origins == [
        "https://a.example",
        "http://[::1]:8080",
    ]


# Every answer


def test_every_answer_has_the_headers_of_the_contract(closed: webtest.TestApp) -> None:
    answers = [
        closed.get("/health", status=200),
        closed.get("/jobs", status=401),
        closed.get("/nothing", headers=bearer("admin"), status=404),
        closed.request("/jobs", method="PUT", headers=bearer("jobs:write"), status=405),
        closed.request("/jobs", method="WEBSOCKET", status="*"),
        closed.post_json("/api/login", {}, status=422),
        closed.get("/admin/ui", headers=RIGHT, status=200),
        closed.post("/admin/ui/queues/default/pause", headers=VIEWER, status=403),
        closed.get("/admin/ui/static/admin.css", headers=RIGHT, status=200),
    ]
    for answer in answers:
        assert answer.headers["X-Request-ID"] and answer.headers["Referrer-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["X-Frame-Options"] == "DENY"
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
