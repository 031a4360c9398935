"""What every request and every answer have in common: strict JSON in, one shape of error out, the same headers on all."""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

import pytest
import webtest
from conftest import NO_DATABASE
from falcon import inspect

from jobsys.api.envelope import Router
from jobsys.app import create_app
from jobsys.errors import DatabaseUnavailable
from jobsys.system import JobSystem

JSON = {"Content-Type": "application/json"}
ROUTES = [
    ("/jobs", "GET, HEAD, POST, OPTIONS"),
    ("/jobs/bulk", "POST, OPTIONS"),
    ("/jobs/x", "DELETE, GET, HEAD, OPTIONS"),
    ("/jobs/x/cancel", "POST, OPTIONS"),
    ("/jobs/x/retry", "POST, OPTIONS"),
    ("/jobs/x/events", "GET, HEAD, OPTIONS"),
    ("/jobs/x/artifact", "GET, HEAD, OPTIONS"),
    ("/api/jobs", "GET, HEAD, POST, OPTIONS"),
    ("/api/jobs/bulk", "POST, OPTIONS"),
    ("/api/jobs/x", "DELETE, GET, HEAD, OPTIONS"),
    ("/api/jobs/x/retry", "POST, OPTIONS"),
    ("/api/login", "POST, OPTIONS"),
    ("/api/ingest", "POST, OPTIONS"),
    ("/api/status/x", "GET, HEAD, OPTIONS"),
    ("/admin/jobs", "GET, HEAD, OPTIONS"),
    ("/admin/failed", "GET, HEAD, OPTIONS"),
    ("/admin/dead", "GET, HEAD, OPTIONS"),
    ("/admin/jobs/x/artifact", "GET, HEAD, OPTIONS"),
    ("/admin/jobs/retry", "POST, OPTIONS"),
    ("/admin/jobs/dlq", "POST, OPTIONS"),
    ("/admin/jobs/cancel", "POST, OPTIONS"),
    ("/admin/jobs/x/retry", "POST, OPTIONS"),
    ("/admin/jobs/x/dlq", "POST, OPTIONS"),
    ("/admin/jobs/x/cancel", "POST, OPTIONS"),
    ("/admin/queues/x/pause", "POST, OPTIONS"),
    ("/admin/queues/x/resume", "POST, OPTIONS"),
    ("/health", "GET, HEAD, OPTIONS"),
    ("/health/live", "GET, HEAD, OPTIONS"),
    ("/metrics", "GET, HEAD, OPTIONS"),
    ("/openapi.json", "GET, HEAD, OPTIONS"),
    ("/docs", "GET, HEAD, OPTIONS"),
    ("/docs/x", "GET, HEAD, OPTIONS"),
]


def nested(levels: int) -> str:
    """A body with an object at the top and `levels` levels in all."""
    return '{"payload":{"a":' + "[" * (levels - 2) + "]" * (levels - 2) + "}}"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b" ", 400),
        (b"{", 400),
        (b"{} x", 400),
        (b"[]", 400),
        (b"[{}]", 400),
        (b"1", 400),
        (b'"x"', 400),
        (b"null", 400),
        (b'{"payload":{"a":NaN}}', 400),
        (b'{"payload":{"a":-Infinity}}', 400),
        (b'{"payload":{},"payload":{}}', 400),
        (b'{"payload":{"a":{"b":1,"b":1}}}', 400),
        (b'{"payload":{"a":"\x00"}}', 400),
        (b'\xef\xbb\xbf{"payload":{}}', 400),
        ('{"payload":{}}'.encode("utf-16"), 400),
        (b'{"payload":{"a":"\xff"}}', 400),
        (b'{"payload":{"a":"\xed\xa0\x80"}}', 400),
        (nested(33).encode(), 400),
        (nested(100_000).encode(), 400),
        (b'{"payload":' * 50_000, 400),
        (b'{"payload":{"a":1e999}}', 422),
        (b'{"payload":{"a":9223372036854775808}}', 422),
        (b'{"payload":{"a":-9223372036854775809}}', 422),
        (b'{"payload":{"a":' + b"9" * 5000 + b"}}", 422),
        (b'{"payload":{"a":"\\u0000"}}', 422),
        (b'{"payload":{"a\\u0000":1}}', 422),
        (b'{"payload":{"a":["\\ud800"]}}', 422),
        (b'{"payload":{"\\udfff":1}}', 422),
        (b'{"\\u0000":1}', 422),
    ],
)
def test_a_body_that_is_no_sound_json_object_is_refused(away: webtest.TestApp, raw: bytes, status: int) -> None:
    problem = away.post("/jobs", raw, JSON, status=status)
    assert problem.content_type == "application/problem+json"
    assert len(problem.body) < 1000
    if status == 422:
        assert problem.json["errors"]


def test_a_character_that_cannot_be_stored_is_located(away: webtest.TestApp) -> None:
    problem = away.post("/jobs", rb'{"payload":{"rows":[{"a":1},{"b":"\u0000"}]}}', JSON, status=422)
    assert problem.json["errors"][0]["loc"] == ["payload", "rows", 1, "b"]


def test_everything_json_can_say_soundly_arrives_unchanged(api: webtest.TestApp) -> None:
    payload = {
        "text": 'ü 漢 🙂 \\u0000 "\n\t\u007f\u2028',
        "numbers": [0, -1, 1.5, 2**63 - 1, -(2**63), 1e-7],
        "other": [True, False, None, {}, []],
        "": {"__proto__": 1},
    }
    job_id = api.post_json("/jobs", {"payload": payload}, status=202).json["jobId"]
    assert api.get(f"/jobs/{job_id}").json["payload"] == payload
    escaped = json.dumps({"payload": {"a": "🙂"}})
    assert "\\ud83d" in escaped
    job_id = api.post("/jobs", escaped.encode(), JSON, status=202).json["jobId"]
    assert api.get(f"/jobs/{job_id}").json["payload"] == {"a": "🙂"}
    api.post("/jobs", nested(32).encode(), JSON, status=202)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
        "json",
    ],
)
def test_a_body_that_does_not_say_it_is_json_is_refused(away: webtest.TestApp, content_type: str | None) -> None:
    environment = {"CONTENT_TYPE": content_type} if content_type is not None else {}
    request = webtest.TestRequest.blank("/jobs", method="POST", body=b"{}", environ=environment)
    if content_type is None:
        request.environ.pop("CONTENT_TYPE", None)
    assert away.do_request(request, status=415).content_type == "application/problem+json"


def test_json_may_be_announced_at_length(api: webtest.TestApp) -> None:
    for content_type in ("application/json; charset=utf-8", "application/json;charset=UTF-8", "Application/JSON"):
        api.post("/jobs", b"{}", {"Content-Type": content_type}, status=202)


def test_a_compressed_body_is_refused(away: webtest.TestApp) -> None:
    away.post("/jobs", b"{}", JSON | {"Content-Encoding": "gzip"}, status=415)


def test_a_body_of_a_mebibyte_is_taken_and_one_byte_more_is_not(api: webtest.TestApp) -> None:
    frame = b'{"payload":{"a":"%s"}}'
    most = 1024 * 1024 - len(frame) + 2
    api.post("/jobs", frame % (b"x" * most), JSON, status=202)
    api.post("/jobs", frame % (b"x" * (most + 1)), JSON, status=413)


def test_an_answer_names_the_first_of_many_mistakes(away: webtest.TestApp) -> None:
    many = {f"field {n}": n for n in range(9_000)}
    for path, body in (("/jobs", many), ("/api/ingest", {"ids": [1], **many}), ("/admin/jobs/retry", many), ("/jobs/bulk", [many] * 5)):
        problem = away.post_json(path, body, status=422)
        assert len(problem.json["errors"]) == 50 and len(problem.body) < 20_000


def test_an_object_has_a_bounded_number_of_keys_and_keys_of_a_bounded_length(away: webtest.TestApp) -> None:
    for raw, said in (
        (b'{"payload":{%s}}' % b",".join(b'"%d":1' % n for n in range(10_001)), "more than 10000 keys"),
        (b'{"payload":{"%s":1}}' % (b"k" * 1001), "more than 1000 characters"),
    ):
        problem = away.post("/jobs", raw, JSON, status=422)
        assert said in problem.json["detail"] and len(problem.body) < 1000
    for raw in (b'{"payload":{%s},"x":1}' % b",".join(b'"%d":1' % n for n in range(10_000)), b'{"payload":{"%s":1},"x":1}' % (b"k" * 1000)):
        assert away.post("/jobs", raw, JSON, status=422).json["errors"][0]["loc"] == ["x"], "these are all right"


def test_a_hostile_body_costs_no_more_than_a_harmless_one_of_its_size(away: webtest.TestApp) -> None:
    def cost(raw: bytes, status: int) -> float:
        began = time.process_time()
        away.post("/jobs", raw, JSON, status=status)
        return time.process_time() - began

    harmless = cost(b'{"x":[' + b",".join(b'{"%d":1}' % n for n in range(80_000)) + b"]}", 422)
    many = b",".join(b'"%d":1' % n for n in range(90_000))
    for raw in (
        b"{" + many + b',"0":1}',
        b'{"payload":' + b"[1," * 30 + b"1" + b"]" * 30 + b"}" + b" " * 900_000 + b"x",
        b'{"a":' * 150_000,
    ):
        assert cost(raw, 400) < 5 * harmless


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
@pytest.mark.parametrize(("path", "allow"), ROUTES)
def test_a_method_a_route_does_not_know_is_answered_with_those_it_does(away: webtest.TestApp, path: str, allow: str) -> None:
    for method in ("PUT", "PATCH", "TRACE", "FROBNICATE"):
        problem = away.request(path, method=method, status=405)
        assert problem.headers["Allow"] == allow
        assert problem.content_type == "application/problem+json"


def test_every_route_is_one_of_those_tested_here(away: webtest.TestApp) -> None:
    inspect.register_router(Router)(inspect.inspect_compiled_router)
    templates = {route.path for route in inspect.inspect_routes(away.app) if not route.path.startswith(("/admin/ui", "/dashboard"))}
    known = {path.replace("/x", "/{}") for path, _ in ROUTES}
    assert {re.sub(r"\{\w+\}", "{}", template) for template in templates} == known


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/jobs/x/y/z", "/Jobs", "//jobs", "//admin/jobs", "/admin/nothing", "/%00", "/api/status"]
)
def test_a_path_that_leads_nowhere_is_a_problem_like_any_other(away: webtest.TestApp, path: str) -> None:
    problem = away.get(path, status=404)
    assert problem.content_type == "application/problem+json"
    assert problem.json["status"] == 404


def test_a_trailing_slash_makes_no_difference(api: webtest.TestApp) -> None:
    assert api.post_json("/jobs/", {}, status=202).json["jobId"] == api.get("/jobs/").json["jobs"][0]["id"]


def test_head_answers_what_get_does_without_the_body(api: webtest.TestApp) -> None:
    job_id = api.post_json("/jobs", {}).json["jobId"]
    for path in ("/jobs", f"/jobs/{job_id}", f"/jobs/{job_id}/events", "/admin/jobs", "/metrics"):
        got, head = api.get(path), api.head(path, status=200)
        assert (head.body, head.headers["Content-Length"]) == (b"", str(len(got.body)))
    assert api.head("/health").status_int == 200
    assert api.head("/jobs/x", status=404).body == b""


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/health/live", 200), ("POST", "/jobs", 400), ("GET", "/nothing", 404), ("PUT", "/jobs", 405), ("WEBSOCKET", "/jobs", 400)],
)
def test_every_answer_carries_the_same_headers(away: webtest.TestApp, method: str, path: str, status: int) -> None:
    answer = away.request(path, method=method, status=status)
    assert answer.headers["X-Request-ID"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"]
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Strict-Transport-Security" not in answer.headers
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_over_tls_browsers_are_told_to_stay_there(away: webtest.TestApp) -> None:
    answer = away.get("/health/live", extra_environ={"wsgi.url_scheme": "https"})
    assert "max-age" in answer.headers["Strict-Transport-Security"]


def test_a_request_id_is_echoed_when_it_is_a_sane_one(away: webtest.TestApp) -> None:
    def answered(**headers: str) -> str:
        return str(away.get("/health/live", headers=headers).headers["X-Request-ID"])

    sane = "order-17/3.b:4@x"
    assert answered(**{"X-Request-ID": sane}) == sane
    for other in ("", "a b", "x" * 129, "<script>", "ä"):
        assert answered(**{"X-Request-ID": other}) not in ("", other)
    assert answered() != answered()


def test_an_origin_elsewhere_is_given_no_leave_to_read(away: webtest.TestApp) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert "Access-Control-Allow-Origin" not in away.get("/health/live", headers=headers).headers
        preflight = away.options("/jobs", headers=headers | {"Access-Control-Request-Method": "POST"})
        assert not [name for name in preflight.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/jobs"),
        ("GET", "/jobs/01a20560-59f6-7000-9635-42139b8250d8"),
        ("POST", "/jobs/01a20560-59f6-7000-9635-42139b8250d8/retry"),
        ("GET", "/api/status/01a20560-59f6-7000-9635-42139b8250d8"),
        ("GET", "/admin/failed"),
        ("GET", "/metrics"),
    ],
)
def test_without_a_database_clients_are_told_to_come_again(away: webtest.TestApp, method: str, path: str) -> None:
    problem = away.request(path, method=method, status=503)
    assert problem.content_type == "application/problem+json"
    assert int(problem.headers["Retry-After"]) > 0
    assert "127.0.0.1" not in problem.text


def test_a_submission_without_a_database_is_not_accepted(away: webtest.TestApp) -> None:
    away.post_json("/jobs", {}, status=503)
    problem = away.post_json("/api/ingest", {"ids": [1]}, status=503).json
    assert problem["success"] is False and problem["message"] == problem["detail"]


def test_what_nobody_foresaw_is_logged_and_told_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(JobSystem):
        def job(self, job_id: str) -> Any:
            raise KeyError("the secret of /etc/passwd")

    api = webtest.TestApp(create_app(system=Broken(NO_DATABASE)))
    with caplog.at_level(logging.ERROR):
        problem = api.get("/jobs/x", headers={"X-Request-ID": "find-me"}, status=500)
    assert problem.content_type == "application/problem+json"
    assert "secret" not in problem.text and "Traceback" not in problem.text and "find-me" in problem.text
    assert "find-me" in caplog.text and "KeyError" in caplog.text


def test_a_database_that_goes_away_in_the_middle_is_no_riddle() -> None:
    class Leaving(JobSystem):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            raise DatabaseUnavailable("server closed the connection: host=db password=x")

    problem = webtest.TestApp(create_app(system=Leaving(NO_DATABASE))).post_json("/jobs", {}, status=503)
    assert "password" not in problem.text
