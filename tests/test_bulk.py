"""Many at once: jobs submitted by one request, and an operator's verb for all that match."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
import webtest
from conftest import Running, eventually, execute

from jobsys import db, verbs
from jobsys.search import Condition
from jobsys.system import JobSystem

JSON = {"Content-Type": "application/json"}
LINES = {"Content-Type": "application/x-ndjson"}
BULK = 16 * 1024 * 1024


def lines(items: list[Any]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def job(n: int, **fields: Any) -> dict[str, Any]:
    return {"payload": {"n": n}, **fields}


def places(problem: Any) -> list[Any]:
    return [error["loc"][0] for error in problem.json["errors"]]


# Submitting


@pytest.mark.parametrize("path", ["/jobs/bulk", "/api/jobs/bulk"])
@pytest.mark.parametrize("content_type", ["application/json", "application/x-ndjson", "application/jsonl; charset=utf-8"])
def test_many_jobs_are_accepted_in_their_order(api: webtest.TestApp, path: str, content_type: str) -> None:
    items = [job(n, priority="high" if n == 3 else "low", **({"delay": 60} if n == 5 else {})) for n in range(250)]
    body = json.dumps(items, indent=1).encode() if content_type[-4:] == "json" and "nd" not in content_type else lines(items)
    answer = api.post(path, body, {"Content-Type": content_type}, status=202).json
    assert (answer["message"], answer["count"], answer["replayed"]) == ("Jobs accepted!", 250, 0)
    jobs = [api.get(f"/jobs/{id}").json for id in answer["jobIds"]]
    assert [each["payload"]["n"] for each in jobs] == list(range(250))
    assert (jobs[3]["priority"], jobs[4]["priority"], jobs[5]["status"]) == ("high", "low", "SCHEDULED")


def test_an_older_clients_words_are_understood_in_each_item(api: webtest.TestApp) -> None:
    mail = {"name": "sendEmail", "data": {"recipient": "a@example.org", "subject": "Hello"}}
    [id] = api.post_json("/api/jobs/bulk", [mail], status=202).json["jobIds"]
    assert api.get(f"/jobs/{id}").json["payload"]["to"] == "a@example.org"
    problem = api.post_json("/api/jobs/bulk", [mail, {**mail, "data": {"recipient": "nobody", "subject": "Hello"}}], status=422)
    assert problem.json["errors"][0]["loc"][:3] == [1, "data", "recipient"]


def test_lines_may_end_as_on_windows_be_empty_and_lack_the_last_break(api: webtest.TestApp) -> None:
    answer = api.post("/jobs/bulk", b'{"payload":{"a":1}}\r\n\r\n\n  {"payload":{"a":"\xc3\xa9"}}', LINES, status=202).json
    assert [api.get(f"/jobs/{id}").json["payload"] for id in answer["jobIds"]] == [{"a": 1}, {"a": "é"}]


def test_what_is_wrong_is_named_with_the_number_of_its_item_and_nothing_is_made(api: webtest.TestApp, system: JobSystem) -> None:
    items: list[Any] = [job(n) for n in range(300)]
    items[7], items[9], items[200] = {"type": "NOPE"}, {"payload": {"a": "\0"}}, job(1, delay=-1, colour="red")
    for body, headers in ((json.dumps(items).encode(), JSON), (lines(items), LINES)):
        problem = api.post("/jobs/bulk", body, headers, status=422)
        assert [error["loc"] for error in problem.json["errors"]] == [[7, "type"], [9, "payload", "a"], [200, "delay"], [200, "colour"]]
        said = problem.json["detail"]
        assert (
            said.startswith('item 7: job type "NOPE"') and "; item 9: payload.a: contains" in said and "; item 200: colour: is not" in said
        )
    problem = api.post("/jobs/bulk", lines([{"type": "NOPE"}] * 9000), LINES, status=422)
    assert places(problem) == list(range(50)), "no more than a person would read"
    assert system.totals()["jobs_created"] == 0


ITEM = b'{"payload":{"text":"%s"}}'


@pytest.mark.parametrize(
    ("array", "status", "place"),
    [
        (b"", 400, None),
        (b"  ", 400, None),
        (b"{}", 400, None),
        (b"nonsense", 400, None),
        (b"[]", 422, None),
        (b"[{}", 400, None),
        (b"[{},", 400, None),
        (b"[{},]", 400, None),
        (b"[{} {}]", 400, None),
        (b"[{}] x", 400, None),
        (b"[{}][{}]", 400, None),
        (b"[{}] \xc3", 400, None),
        (b"\xef\xbb\xbf[{}]", 400, None),
        ("[{}]".encode("utf-16"), 400, None),
        (b"[" * 1_000_000, 422, 0),
        (b'[{},"x"]', 422, 1),
        (b"[{}, 12", 422, 1),
        (b'[{}, {"payload":', 400, 1),
        (b'[{}, {"payload" 1}, %s]' % ITEM, 400, 1),
        (b'[{}, {"payload":{"a":NaN}}]', 400, 1),
        (b'[{}, {"a":1,"a":1}]', 400, 1),
        (b'[{}, {"payload":{"a":"\xff"}}]', 400, None),
        (b"[{}, " + b'{"payload":' * 90_000, 400, 1),
        (b'[{}, {"payload":{"a":' + b"[" * 40 + b"]" * 40 + b"}}]", 400, 1),
        (b'[{}, {"payload":{"a":123456789012345678901}}]', 422, 1),
        (b'[{}, {"payload":{"a":1e999}}]', 422, 1),
        (b'[{}, {"payload":{"a":"\\ud800"}}]', 422, 1),
        (b"[{}, " + ITEM % (b"x" * 1024 * 1024) + b"]", 422, 1),
        (b"[{}, " + ITEM % (b"x" * 3 * 1024 * 1024) + b", {}]", 422, 1),
        (b"[{}, " + ITEM % ("é" * 600_000).encode() + b", {}]", 422, 1),
        (b"[{}, {" + b",".join(b'"k%d":1' % n for n in range(10_001)) + b"}]", 422, 1),
        (b'[{}, {"payload":{"%s":1}}]' % (b"k" * 1001), 422, 1),
        (b"[" + b",".join([b"{}"] * 10_001) + b"]", 422, None),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else None,
)
def test_an_array_that_is_none_is_refused(away: webtest.TestApp, array: bytes, status: int, place: int | None) -> None:
    problem = away.post("/jobs/bulk", array, JSON, status=status)
    assert problem.content_type == "application/problem+json" and len(problem.body) < 1000
    if place is not None:
        assert places(problem) == [place]


@pytest.mark.parametrize(
    ("body", "status", "place"),
    [
        (b"", 400, None),
        (b"\n\r\n", 422, None),
        (b"[{},{}]", 422, 0),
        (b"{}\n\n12\n", 422, 1),
        (b"{}\n{", 400, 1),
        (b"{}\n{}{}\n", 400, 1),
        (b"{}\nnonsense\n" * 3, 400, 1),
        (b'{}\n{"payload":{"a":"\xff"}}', 400, 1),
        (b'{}\n{"a":1,"a":1}', 400, 1),
        (b"{}\n" + b"[" * 500_000, 400, 1),
        (b"{}\n" + ITEM % (b"x" * 1024 * 1024) + b"\n{}", 422, 1),
        (b"{}\n" + b"x" * 3 * 1024 * 1024, 422, 1),
        (b"{}\n" * 10_001, 422, None),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else None,
)
def test_lines_that_are_none_are_refused(away: webtest.TestApp, body: bytes, status: int, place: int | None) -> None:
    problem = away.post("/jobs/bulk", body, LINES, status=status)
    assert problem.content_type == "application/problem+json" and len(problem.body) < 1000
    if place is not None:
        assert places(problem) == [place]


def test_wherever_a_body_is_cut_into_pieces_its_items_are_the_same(away: webtest.TestApp, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobsys.api import items

    text = '[ {"a": "é]}\\"", "n": [1.5e-3, 12345678901234567890123.5, true, null]} ,\n{"b": {"c": "🙂"}},{}]'
    expected = json.loads(text)
    for size in range(1, 40):
        data = text.encode()
        pieces = iter([data[at : at + size] for at in range(0, len(data), size)])
        assert list(items._from_array(pieces, 1000)) == expected
        data = b"\n".join(json.dumps(item).encode() for item in expected)
        pieces = iter([data[at : at + size] for at in range(0, len(data), size)])
        assert list(items._from_lines(pieces, 1000)) == expected


def test_a_bulk_may_have_ten_thousand_jobs_and_16_mebibytes(api: webtest.TestApp, system: JobSystem) -> None:
    item = ITEM % (b"x" * 1600)
    body = (item + b"\n") * 10_000
    body += b" " * (BULK - len(body))
    assert api.post("/jobs/bulk", body, LINES, status=202).json["count"] == 10_000
    assert api.post("/jobs/bulk", b"[" + item + b" " * (BULK - len(item) - 2) + b"]", JSON, status=202).json["count"] == 1
    api.post("/jobs/bulk", body + b" ", LINES, status=413)
    assert system.totals()["jobs_created"] == 10_001


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/x-ndjson; charset=latin-1", "json"]
)
def test_a_bulk_says_what_it_is(away: webtest.TestApp, content_type: str) -> None:
    away.post("/jobs/bulk", b"[{}]", {"Content-Type": content_type}, status=415)
    away.post("/jobs/bulk", b"[{}]", JSON | {"Content-Encoding": "gzip"}, status=415)


# Idempotency


def test_each_item_may_have_a_key_of_its_own(api: webtest.TestApp, system: JobSystem) -> None:
    first = api.post_json("/jobs", job(1, idempotencyKey="one"), status=202).json["jobId"]
    items = [job(n) for n in range(150)]
    items[1] = job(1, idempotencyKey="one")
    items[2] = items[140] = job(2, idempotencyKey="two")
    answer = api.post_json("/jobs/bulk", items, status=202)
    ids = answer.json["jobIds"]
    assert ids[1] == first and ids[2] == ids[140] and len(set(ids)) == 149
    assert answer.json["replayed"] == 2 and "Idempotency-Replayed" not in answer.headers
    assert system.totals()["jobs_created"] == 149

    items[3], items[4] = job(4, idempotencyKey="two"), job(9, idempotencyKey="one")
    problem = api.post_json("/jobs/bulk", items, status=422)
    assert [error["loc"] for error in problem.json["errors"]] == [[3, "idempotencyKey"], [4, "idempotencyKey"]]
    assert system.totals()["jobs_created"] == 149
    problem = api.post_json("/jobs/bulk", [job(1, idempotencyKey="new"), job(2, idempotencyKey="new")], status=422)
    assert places(problem) == [1]


def test_a_key_for_the_whole_bulk_makes_it_once(api: webtest.TestApp, system: JobSystem) -> None:
    key = {"Idempotency-Key": "import 7"}
    items = [job(n) for n in range(120)]
    first = api.post_json("/jobs/bulk", items, headers=key, status=202)
    assert "Idempotency-Replayed" not in first.headers
    again = api.post("/jobs/bulk", lines(items), LINES | key, status=202)
    assert again.json["jobIds"] == first.json["jobIds"] and again.headers["Idempotency-Replayed"] == "true"
    for others in (items[:-1], [*items, job(120)], [*items[:-1], job(1)], items[:1]):
        problem = api.post_json("/jobs/bulk", others, headers=key, status=422)
        assert "already used" in problem.json["detail"]
    problem = api.post_json("/jobs/bulk", [job(1), job(2, idempotencyKey="own")], headers=key, status=422)
    assert places(problem) == [1]
    for bad in ("x" * 256, "\x7f"):
        api.post_json("/jobs/bulk", items, headers={"Idempotency-Key": bad}, status=422)
    assert system.totals()["jobs_created"] == 120
    api.delete(f"/jobs/{first.json['jobIds'][5]}", status=204)
    problem = api.post_json("/jobs/bulk", items, headers=key, status=422)
    assert "removed" in problem.json["detail"] and system.totals()["jobs_created"] == 120


# Behind the real server


def send(web: Running, *pieces: bytes, close: bool = False) -> bytes:
    """Send raw bytes; the answer, read to its end. With `close` the client says meanwhile that nothing more comes."""
    address = urlsplit(web.url)
    with contextlib.closing(socket.create_connection((address.hostname or "", address.port or 0), timeout=20)) as client:
        for piece in pieces:
            with contextlib.suppress(ConnectionError):
                client.sendall(piece)
        if close:
            client.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        return b"%d %s" % (answer.status, answer.read())


HEAD = b"POST /jobs/bulk HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/x-ndjson\r\n"


def test_a_bulk_that_is_cut_off_leaves_nothing(start_web: Callable[..., Running], system: JobSystem) -> None:
    web = start_web(WEB_PROCESSES=1, WEB_THREADS=2)
    whole = b'{"payload":{"a":1}}\n' * 1000
    for head, body in (
        (b"Content-Length: %d\r\n\r\n" % (len(whole) + 40), whole),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n" % (len(whole), whole)),
    ):
        assert send(web, HEAD, head, body, close=True)[:4] in (b"400 ", b"408 "), "each line that came is whole, and yet it isn't all"
    assert send(web, HEAD, b"Content-Length: 60\r\n\r\n", b"{}\n" * 10).startswith(b"408 ")
    assert system.totals()["jobs_created"] == 0
    assert send(web, HEAD, b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(whole), whole)).startswith(b"202 ")
    assert system.totals()["jobs_created"] == 1000


def test_when_the_server_is_killed_in_the_middle_nothing_is_there(
    start_web: Callable[..., Running], system: JobSystem, database_url: str
) -> None:
    web = start_web(WEB_PROCESSES=1, WEB_THREADS=2)
    body = lines([job(n, idempotencyKey=f"key {n}" if n % 2 else None) if n % 2 else job(n) for n in range(5000)])
    with contextlib.closing(psycopg2.connect(database_url)) as gate, ThreadPoolExecutor(1) as threads:
        gate.cursor().execute(
            "insert into jobs (type, idempotency_key) values ('TEST_JOB', 'key 4999')"
        )  # the last but a few that the bulk comes to
        sent = threads.submit(send, web, HEAD, b"Content-Length: %d\r\n\r\n" % len(body), body)
        waiting = "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        eventually(lambda: execute(database_url, waiting))
        for each in web.family:
            each.send_signal(signal.SIGKILL)
        assert isinstance(sent.exception(), (ConnectionError, http.client.HTTPException))
        gate.rollback()
    eventually(lambda: not execute(database_url, "select from pg_stat_activity where query like 'insert into jobs%' and state <> 'idle'"))
    assert system.totals()["jobs_created"] == 0 and execute(database_url, "select count(*) from jobs") == [(0,)]


def test_a_bulk_needs_little_more_memory_than_its_jobs(start_web: Callable[..., Running]) -> None:
    """Megabytes of small values: as Python objects they would be several times as much."""
    web = start_web(WEB_PROCESSES=1, WEB_THREADS=1)
    [process] = [each for each in web.family if each.pid != web.pid]
    row = b'{"payload":{"data":[%s]}}' % b",".join([b'{"a":1,"b":"x","c":null}'] * 2_400)
    small = lines([{}] * 100)
    assert send(web, HEAD, b"Content-Length: %d\r\n\r\n" % len(small), small).startswith(b"202 ")
    before, most, over = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    bodies = ((HEAD, (row + b"\n") * 100), (HEAD.replace(b"x-ndjson", b"json"), b"[" + b",".join([row] * 100) + b"]"))
    answers = [send(web, head, b"Content-Length: %d\r\n\r\n" % len(body), body) for head, body in bodies]
    over.set()
    watching.join()
    assert [answer[:4] for answer in answers] == [b"202 "] * 2, answers
    body = bodies[0][1]
    assert (most[0] - before) / len(body) < 3


# An operator's verbs


@pytest.fixture
def add_jobs(database_url: str) -> Callable[..., list[str]]:
    """`add_jobs("FAILED", 3, type=…)` puts jobs of that status into the table; their ids, oldest first."""

    def add(status: str, count: int = 1, type: str = "TEST_JOB", queue: str = "default") -> list[str]:
        ran = status not in ("SCHEDULED", "PENDING")
        columns = {
            "type": f"'{type}'",
            "queue": f"'{queue}'",
            "status": f"'{status}'::job_status",
            "attempt": "4" if ran else "0",
            "started_at": "now() - interval '9 s'" if ran else "null",
            "worker": "gen_random_uuid()" if ran else "null",
            "finished_at": "now() - interval '5 s'" if ran and status != "PROCESSING" else "null",
            "run_at": "now() + interval '1 h'" if status == "SCHEDULED" else "now()",
        }
        statement = (
            f"insert into jobs ({', '.join(columns)}) select {', '.join(columns.values())} from generate_series(1, %s) returning id::text"
        )
        return sorted(id for (id,) in execute(database_url, statement, count))

    return add


def counts(system: JobSystem) -> dict[str, int]:
    return {status: count for status, count in system.counts().items() if count}


def test_all_that_match_are_retried_and_their_timelines_say_by_whom(
    api: webtest.TestApp, system: JobSystem, add_jobs: Callable[..., list[str]]
) -> None:
    failed, dead = add_jobs("FAILED", 2500), add_jobs("DEAD", 3)
    add_jobs("FAILED", 4, type="EMAIL_SEND"), add_jobs("CANCELLED", 2), add_jobs("COMPLETED", 2), add_jobs("PROCESSING")
    answer = api.post_json("/admin/jobs/retry", {"filter": {"type": "TEST_JOB", "status": "FAILED"}}).json
    assert {**answer, "asOf": None} == {"count": 2500, "more": False, "asOf": None}
    job = api.get(f"/jobs/{failed[-1]}").json
    assert (job["status"], job["attempts"], job["finishedAt"]) == ("PENDING", 0, None)
    events = [(event["kind"], event["by"]) for event in api.get(f"/jobs/{failed[0]}/events").json["events"]]
    assert ("retried", "admin") in events and ("finished", None) in events
    assert system.totals()["jobs_retried"] == 2500
    assert counts(system) == {"PENDING": 2500, "FAILED": 4, "DEAD": 3, "CANCELLED": 2, "COMPLETED": 2, "PROCESSING": 1}
    assert api.post_json("/admin/jobs/retry", {"filter": {"status": ["failed", "DEAD"]}}).json["count"] == 7
    assert api.get(f"/jobs/{dead[0]}").json["status"] == "PENDING"
    assert api.post_json("/admin/jobs/retry", {"all": True}).json["count"] == 0, "what was cancelled on purpose is named or left alone"
    assert api.post_json("/admin/jobs/retry", {"filter": {"status": "CANCELLED"}}).json["count"] == 2


def test_waiting_jobs_are_cancelled_and_running_ones_asked_once(
    api: webtest.TestApp, system: JobSystem, add_jobs: Callable[..., list[str]]
) -> None:
    add_jobs("PENDING", 5), add_jobs("SCHEDULED", 2), add_jobs("PENDING", queue="other"), add_jobs("FAILED")
    [running] = add_jobs("PROCESSING")
    answer = api.post_json("/admin/jobs/cancel", {"filter": {"queue": "default"}}).json
    assert (answer["count"], answer["stopping"]) == (7, 1)
    answer = api.post_json("/admin/jobs/cancel", {"filter": {"queue": "default"}}).json
    assert (answer["count"], answer["stopping"], answer["more"]) == (0, 0, False)
    assert [event.kind for event in system.events(running)].count("stop requested") == 1
    answer = api.post_json("/admin/jobs/cancel", {"ids": [running]}).json
    assert (answer["stopping"], answer["skipped"], answer["reasons"][0]["msg"]) == (0, 1, "it runs, and was asked to stop before")
    assert counts(system) == {"PENDING": 1, "PROCESSING": 1, "CANCELLED": 7, "FAILED": 1}


def test_what_failed_is_buried_and_what_waits_only_when_it_is_named(
    api: webtest.TestApp, system: JobSystem, add_jobs: Callable[..., list[str]]
) -> None:
    add_jobs("FAILED", 3), add_jobs("PENDING", 2), add_jobs("SCHEDULED")
    assert api.post_json("/admin/jobs/dlq", {"all": True}).json["count"] == 3
    assert api.post_json("/admin/jobs/dlq", {"filter": {"status": "SCHEDULED"}}).json["count"] == 1
    assert counts(system) == {"DEAD": 4, "PENDING": 2}


def test_jobs_can_be_named_one_by_one_and_each_that_is_left_has_its_reason(
    api: webtest.TestApp, add_jobs: Callable[..., list[str]]
) -> None:
    failed, cancelled, done = add_jobs("FAILED", 3), add_jobs("CANCELLED"), add_jobs("COMPLETED")
    gone = "01a20560-59f6-7000-9635-42139b8250d8"
    answer = api.post_json("/admin/jobs/retry", {"ids": [*failed, failed[0].upper(), *cancelled, *done, gone, "no id"]}).json
    assert (answer["count"], answer["skipped"], answer["more"]) == (4, 3, False)
    reasons = {reason["id"]: reason["msg"] for reason in answer["reasons"]}
    assert reasons[done[0]] == "a job that is COMPLETED can't be retried; only FAILED, DEAD, CANCELLED can"
    assert reasons[gone] == reasons["no id"] == "there is no job with this id"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, []),
        ({"filter": {}}, ["filter"]),
        ({"filter": None}, ["filter"]),
        ({"filter": "FAILED"}, ["filter"]),
        ({"filter": {"type": ""}}, ["filter", "type"]),
        ({"filter": {"type": None}}, ["filter", "type"]),
        ({"filter": {"status": "COMPLETED"}}, ["filter", "status"]),
        ({"filter": {"status": []}}, ["filter", "status"]),
        ({"filter": {"status": ["FAILED", "NOPE"]}}, ["filter", "status"]),
        ({"filter": {"priority": "urgent"}}, ["filter", "priority"]),
        ({"filter": {"limit": "5"}}, ["filter", "limit"]),
        ({"filter": {"createdBefore": "yesterday"}}, ["filter", "createdBefore"]),
        ({"status": "FAILED"}, ["status"]),
        ({"ids": []}, ["ids"]),
        ({"ids": "x"}, ["ids"]),
        ({"ids": [1]}, ["ids"]),
        ({"ids": ["x"] * 10_001}, ["ids"]),
        ({"all": False}, ["all"]),
        ({"all": "true"}, ["all"]),
        ({"all": True, "filter": {"status": "FAILED"}}, []),
        ({"all": True, "asOf": "now"}, ["asOf"]),
        ({"all": True, "asOf": None}, ["asOf"]),
    ],
)
def test_that_all_are_meant_must_be_said_and_so_must_everything_else(away: webtest.TestApp, body: Any, place: list[str]) -> None:
    for verb in ("retry", "dlq", "cancel"):
        problem = away.post_json(f"/admin/jobs/{verb}", body, status=422)
        assert place in [error["loc"] for error in problem.json["errors"]]


def test_an_empty_body_and_a_filter_in_the_address_are_refused(away: webtest.TestApp) -> None:
    away.post("/admin/jobs/retry", b"", status=400)
    problem = away.post_json("/admin/jobs/retry?status=FAILED", {"all": True}, status=400)
    assert "body" in problem.json["detail"]


def test_a_call_that_was_cut_off_goes_on_when_it_is_made_again_and_does_nothing_twice(
    system: JobSystem, add_jobs: Callable[..., list[str]], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = add_jobs("FAILED", 3500)
    as_of = verbs.now(system.database)
    with contextlib.closing(psycopg2.connect(database_url)) as connection:
        connection.cursor().execute("select from jobs where id = %s for update", (ids[2500],))
        monkeypatch.setattr(verbs, "PATIENCE", 60.0)
        first = system.act_on_many("retry", status="FAILED", as_of=as_of, by="ann")
        assert (first.done, first.more) == (3499, True), "nobody waits for a job that somebody else has locked, and it isn't forgotten"
    execute(database_url, "update jobs set status = 'FAILED', finished_at = clock_timestamp() where id = any(%s::uuid[])", ids[:7])
    again = system.act_on_many("retry", status="FAILED", as_of=first.as_of, by="ann")
    assert (again.done, again.more) == (1, False), "what failed again is another failure"
    assert counts(system) == {"FAILED": 7, "PENDING": 3493}
    assert system.act_on_many("retry", status="FAILED").done == 7


def test_a_call_ends_in_time_and_says_that_there_is_more(
    system: JobSystem, add_jobs: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_jobs("FAILED", 3000)
    moments = iter(range(100))
    monkeypatch.setattr(verbs, "time", SimpleNamespace(monotonic=lambda: next(moments)))  # each thousand takes a second
    monkeypatch.setattr(verbs, "PATIENCE", 2)
    outcome = system.act_on_many("retry", status="FAILED")
    monkeypatch.undo()
    assert (outcome.done, outcome.more) == (2000, True)
    monkeypatch.setattr(verbs, "MOST", 400)
    assert (outcome := system.act_on_many("retry", status="FAILED"))[0] == 400 and outcome.more
    assert system.count_matching("retry", status="FAILED", as_of=verbs.now(system.database)) == 401, "that is: more than 400"
    monkeypatch.undo()
    assert (outcome := system.act_on_many("retry", status="FAILED"))[0] == 600 and not outcome.more


def test_an_index_leads_to_what_a_verb_can_be_asked_of(database_url: str, add_jobs: Callable[..., list[str]]) -> None:
    add_jobs("COMPLETED", 10_000)
    indexes = {"SCHEDULED": "jobs_scheduled", "PENDING": "jobs_ready", "PROCESSING": "jobs_running"}
    asked = {"as_of": datetime.now(timezone.utc), "limit": verbs.MOST}
    for verb in verbs.VERBS.values():
        statement = verbs._statement("id::text", verb.allowed, Condition("type = 'TEST_JOB'", {}))
        with contextlib.closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
            cursor.execute(f"set enable_seqscan = off; explain {statement}", asked)
            plan = "\n".join(line for (line,) in cursor.fetchall())
        for status in verb.allowed:
            assert indexes.get(status, "jobs_retriable") in plan, plan
        assert "Seq Scan" not in plan and "jobs_pkey" not in plan, plan


@pytest.mark.parametrize(("verb", "status"), [("retry", "FAILED"), ("bury", "FAILED"), ("bury", "PENDING"), ("cancel", "PENDING")])
def test_of_a_status_that_many_came_to_just_now_not_all_are_read_each_time(
    verb: str, status: str, database_url: str, add_jobs: Callable[..., list[str]]
) -> None:
    """PostgreSQL still believes that there are none."""
    add_jobs("COMPLETED", 20_000)
    execute(database_url, "analyze jobs")
    asked = {"id": add_jobs(status, 5_000)[:1000], "status": [status], "as_of": datetime.now(timezone.utc), "by": "ann", "stop": "cancel"}
    for name in ("take", verbs.VERBS[verb].statement):
        with contextlib.closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
            cursor.execute(f"set enable_seqscan = off; explain {db.STATEMENTS[name]}", asked)
            plan = "\n".join(line for (line,) in cursor.fetchall())
        assert set(re.findall(r"Scan using (\w+) on jobs", plan)) == {"jobs_pkey"} and "Join Filter" not in plan, plan


def test_however_many_jobs_there_are_no_transaction_has_more_than_a_thousand(
    system: JobSystem, add_jobs: Callable[..., list[str]], database_url: str
) -> None:
    add_jobs("FAILED", 20_000)
    as_of = verbs.now(system.database)
    assert system.count_matching("retry", type="TEST_JOB", as_of=as_of) == 20_000
    done, calls = 0, 0
    while True:
        outcome = system.act_on_many("retry", type="TEST_JOB", as_of=as_of, by="ann")
        done, calls = done + outcome.done, calls + 1
        if not outcome.more:
            break
    assert done == 20_000 and calls < 50
    assert counts(system) == {"PENDING": 20_000} and system.totals()["jobs_retried"] == 20_000
    in_one = "select max(n) from (select count(*) as n from events where kind = 'retried' group by xmin::text) as transactions"
    assert execute(database_url, in_one) == [(1000,)]


def test_two_operators_and_a_worker_at_once_do_each_thing_once(
    api: webtest.TestApp, system: JobSystem, add_jobs: Callable[..., list[str]], database_url: str, start_worker: Callable[..., Running]
) -> None:
    add_jobs("FAILED", 2000), add_jobs("PENDING", 2000)
    start_worker(WORKER_PROCESSES=1)
    with ThreadPoolExecutor(4) as threads:
        outcomes = list(
            threads.map(lambda verb: system.act_on_many(verb, type="TEST_JOB", by=verb), ("retry", "cancel", "retry", "cancel"))
        )
    eventually(lambda: not system.counts()["PENDING"] and not system.counts()["PROCESSING"], timeout=30)
    for kind, verb in (("retried", "retry"), ("cancelled", "cancel")):
        [(noted,)] = execute(database_url, "select count(*) from events where kind = %s and by = %s", kind, verb)
        assert noted == sum(outcome.done for outcome in outcomes[verb == "cancel" :: 2]), "a worker may have stopped a running one itself"
    live = counts(system)
    assert sum(live.values()) == 4000 and execute(database_url, "select count(*) from jobs") == [(4000,)]
    assert {status: number for status, number in execute(database_url, "select status, count(*) from jobs group by status")} == live
