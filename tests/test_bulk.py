"""Many at once: jobs submitted by one request, and an operator's verb for all that match."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
import webtest
from conftest import Running, eventually, execute

from jobsys.app import create_app
from jobsys.settings import Settings
from jobsys.system import JobSystem

NO_DATABASE = Settings(_env_file=None, database_url="postgresql://127.0.0.1:1/none")
JSON = {"Content-Type": "application/json"}
LINES = {"Content-Type": "application/x-ndjson"}
BULK = 16 * 1024 * 1024


@pytest.fixture
def api(system: JobSystem) -> webtest.TestApp:
    return webtest.TestApp(create_app(system=system))


@pytest.fixture(scope="module")
def away() -> webtest.TestApp:
    """The application while its database is away: what it answers, it answers without one."""
    return webtest.TestApp(create_app(system=JobSystem(NO_DATABASE)))


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
    row = b'{"type":"CSV_EXPORT","payload":{"data":[%s]}}' % b",".join([b'{"a":1,"b":"x","c":null}'] * 600)
    small = lines([{}] * 100)
    assert send(web, HEAD, b"Content-Length: %d\r\n\r\n" % len(small), small).startswith(b"202 ")
    before, most, over = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    bodies = ((HEAD, (row + b"\n") * 250), (HEAD.replace(b"x-ndjson", b"json"), b"[" + b",".join([row] * 250) + b"]"))
    answers = [send(web, head, b"Content-Length: %d\r\n\r\n" % len(body), body) for head, body in bodies]
    over.set()
    watching.join()
    assert [answer[:4] for answer in answers] == [b"202 "] * 2, answers
    body = bodies[0][1]
    assert (most[0] - before) / len(body) < 4
