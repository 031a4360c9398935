"""A real web server of several processes under what is meant to stop it: bad bodies all at once, and one key a thousand times."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from conftest import Running, execute

from jobsys.errors import JobNotFound
from jobsys.system import JobSystem

Start = Callable[..., Running]
JSON = b"Content-Type: application/json\r\n"
MEBIBYTE = 1024 * 1024


def post(*head: bytes, path: bytes = b"/jobs") -> bytes:
    return b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + b"".join(head) + b"\r\n"


def with_length(body: bytes, *head: bytes) -> bytes:
    return post(*(head or (JSON,)), b"Content-Length: %d\r\n" % len(body)) + body


def chunked(*chunks: bytes) -> bytes:
    return post(JSON, b"Transfer-Encoding: chunked\r\n") + b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in chunks)


BAD: dict[str, tuple[set[int], bytes]] = {
    "empty": ({400}, with_length(b"")),
    "brackets": ({400}, with_length(b"[" * MEBIBYTE)),
    "objects": ({400}, with_length(b'{"a":' * (MEBIBYTE // 5))),
    "arrays, 10,000 deep": ({400}, with_length(b'{"payload":{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}}")),
    "deep and escaped": ({400}, with_length(b'{"payload":{"\\u0061":' + b"[" * 500 + b"]" * 500 + b"}}")),
    "NUL": ({422}, with_length(b'{"payload":{"a":"\\u0000"}}')),
    "raw NUL": ({400}, with_length(b'{"payload":{"a":"\0"}}')),
    "half a surrogate pair": ({422}, with_length(b'{"payload":{"a":"\\udc00"}}')),
    "surrogate in UTF-8": ({400}, with_length(b'{"payload":{"a":"\xed\xb0\x80"}}')),
    "a key twice": ({400}, with_length(b'{"payload":{"a":1,"\\u0061":1}}')),
    "many keys": ({422}, with_length(b'{"payload":{%s}}' % b",".join(b'"%d":1' % n for n in range(80_000)))),
    "a long key": ({422}, with_length(b'{"payload":{"%s":1}}' % (b"k" * 900_000))),
    "NaN": ({400}, with_length(b'{"payload":{"a":NaN}}')),
    "-Infinity": ({400}, with_length(b'{"payload":{"a":-Infinity}}')),
    "65 bits": ({422}, with_length(b'{"payload":{"a":18446744073709551616}}')),
    "a million digits": ({422}, with_length(b'{"payload":{"a":%s}}' % (b"9" * 1_000_000))),
    "a million digits and a point": ({422}, with_length(b'{"payload":{"a":%s.5}}' % (b"9" * 1_000_000))),
    "1e999999": ({422}, with_length(b'{"payload":{"a":1e999999}}')),
    "a byte order mark": ({400}, with_length(b"\xef\xbb\xbf{}")),
    "UTF-16": ({400}, with_length("{}".encode("utf-16"))),
    "UTF-16 that says so": ({415}, with_length("{}".encode("utf-16"), b"Content-Type: application/json; charset=utf-16\r\n")),
    "latin-1": ({415}, with_length(b'{"payload":{"a":"\xe9"}}', b"Content-Type: application/json; charset=latin-1\r\n")),
    "a form": ({415}, with_length(b"type=TEST_JOB", b"Content-Type: application/x-www-form-urlencoded\r\n")),
    "no type": ({415}, with_length(b"{}", b"X-Nothing: 1\r\n")),
    "a gzip bomb": ({415}, with_length(gzip.compress(b"[" * 100 * MEBIBYTE, 9), JSON, b"Content-Encoding: gzip\r\n")),
    "too long": ({413}, with_length(b'{"payload":{"a":"%s"}}' % (b"x" * MEBIBYTE))),
    "too long, and it would be told before": ({413}, post(JSON, b"Expect: 100-continue\r\n", b"Content-Length: 99999999\r\n")),
    "too long in pieces": ({413}, chunked(*[b" " * 65536] * 17)),
    "cut off in pieces": ({400, 408}, chunked(b'{"payload"')),
    "no number of bytes": ({400}, post(JSON, b"Content-Length: x\r\n") + b"{}"),
    "a negative length": ({400}, post(JSON, b"Content-Length: -5\r\n") + b"{}"),
    "two lengths": ({400}, post(JSON, b"Content-Length: 2\r\n", b"Content-Length: 3\r\n") + b"{} "),
    "a length and pieces": ({400}, post(JSON, b"Content-Length: 2\r\n", b"Transfer-Encoding: chunked\r\n") + b"2\r\n{}\r\n0\r\n\r\n"),
    "pieces that are none": ({400}, post(JSON, b"Transfer-Encoding: chunked\r\n") + b"zz\r\n{}\r\n0\r\n\r\n"),
    "compressed on the way": ({415}, post(JSON, b"Transfer-Encoding: gzip, chunked\r\n") + b"2\r\n{}\r\n0\r\n\r\n"),
    "shorter than it says": ({400, 408}, post(JSON, b"Content-Length: 50\r\n") + b"{}"),
    "an array": ({400}, with_length(b"[{}]")),
    "a bulk that ends": (
        {400, 408},
        post(b"Content-Type: application/x-ndjson\r\n", b"Content-Length: 99\r\n", path=b"/jobs/bulk") + b"{}\n",
    ),
    "a bulk of brackets": ({400, 422}, post(JSON, b"Content-Length: 5000000\r\n", path=b"/jobs/bulk") + b"[" * 5_000_000),
    "a verb for many without a word": ({400}, post(JSON, b"Content-Length: 0\r\n", path=b"/admin/jobs/retry")),
}


def exchange(web: Running, data: bytes, patience: float = 60) -> tuple[int, str, bytes]:
    """Send raw bytes; the status, type and body of the last answer."""
    address = urlsplit(web.url)
    with contextlib.closing(socket.create_connection((address.hostname or "", address.port or 0), timeout=patience)) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
        answer = http.client.HTTPResponse(client, method=data.split()[0].decode())
        answer.begin()
        return answer.status, answer.getheader("Content-Type") or "", answer.read()


def test_bad_bodies_all_at_once_are_each_refused_and_others_are_served_meanwhile(start_web: Start, system: JobSystem) -> None:
    web = start_web(WEB_PROCESSES=2, WEB_THREADS=4)
    over, served = threading.Event(), []

    def probe() -> None:
        while not over.is_set():
            served.append(exchange(web, with_length(b'{"type":"TEST_JOB"}'))[0])

    def drip() -> None:
        """A body that comes byte by byte for as long as it is let."""
        address = urlsplit(web.url)
        with contextlib.closing(socket.create_connection((address.hostname or "", address.port or 0))) as client:
            client.sendall(post(JSON, b"Content-Length: 100000\r\n") + b'{"payload":{"a":"')
            while not over.wait(0.2):
                with contextlib.suppress(OSError):
                    client.sendall(b"x")

    around = [threading.Thread(target=probe), *(threading.Thread(target=drip) for _ in range(4))]
    for thread in around:
        thread.start()
    with ThreadPoolExecutor(len(BAD)) as threads:
        answers = dict(zip(BAD, threads.map(lambda name: exchange(web, BAD[name][1]), BAD), strict=True))
    during = len(served)
    over.set()
    for thread in around:
        thread.join()
    wrong = {name: answer for name, answer in answers.items() if answer[0] not in BAD[name][0] or answer[1] != "application/problem+json"}
    assert not wrong
    assert not {name: body for name, (_, _, body) in answers.items() if len(body) > 1000 or not json.loads(body)["detail"]}
    assert set(served) == {202} and during > 0
    assert system.totals()["jobs_created"] == len(served), "nothing else became a job"
    assert "Traceback" not in web.output and " status=500 " not in web.output
    # No thread is stuck: all of them are free at once.
    with ThreadPoolExecutor(16) as threads:
        assert set(threads.map(lambda _: exchange(web, with_length(b"{}"))[0], range(64))) == {202}


def test_a_body_is_read_as_far_as_it_says_and_no_further(start_web: Start) -> None:
    web = start_web(WEB_PROCESSES=1, WEB_THREADS=2)
    address = urlsplit(web.url)
    with contextlib.closing(socket.create_connection((address.hostname or "", address.port or 0), timeout=20)) as client:
        client.sendall(post(JSON, b"Content-Length: 50\r\n") + b"{}")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1000).startswith(b"HTTP/1.1 400 "), "whoever cut it off, it is not what was meant"
    status, _, body = exchange(web, post(JSON, b"Content-Length: 2\r\n") + b'{}, "and": "more"}')
    assert status == 202 and json.loads(body)["status"] == "PENDING"
    assert exchange(web, b"HEAD /jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")[0] == 200
    assert exchange(web, with_length(b"{}", JSON, b"Expect: 100-continue\r\n"))[0] == 202
    assert exchange(web, chunked(b"{", b"}", b""))[0] == 202
    for chosen, most in (("2KiB", 2048), ("3000", 3000)):
        small = start_web(WEB_PROCESSES=1, WEB_THREADS=2, MAX_BODY=chosen)
        assert exchange(small, with_length(b"{}" + b" " * (most - 2)))[0] == 202
        status, _, body = exchange(small, with_length(b"{}" + b" " * (most - 1)))
        assert status == 413 and str(most).encode() in body


def storm(web: Running, requests: list[bytes], connections: int = 100) -> list[tuple[int, dict[str, str], Any]]:
    """Send these bodies, each with the same key, over so many connections at once; the answers."""
    address, gate = urlsplit(web.url).netloc, threading.Barrier(connections)
    answers: list[tuple[int, dict[str, str], Any]] = []

    def one(mine: list[bytes]) -> None:
        with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as client:
            client.connect()
            gate.wait(60)
            for body in mine:
                client.request("POST", "/jobs", body, {"Content-Type": "application/json", "Idempotency-Key": "one and the same"})
                answer = client.getresponse()
                answers.append((answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.loads(answer.read())))

    with ThreadPoolExecutor(connections) as threads:
        for future in [threads.submit(one, requests[start::connections]) for start in range(connections)]:
            future.result()
    return answers


def test_a_thousand_duplicates_at_once_make_one_job_and_get_one_answer(start_web: Start, system: JobSystem, database_url: str) -> None:
    web = start_web(WEB_PROCESSES=3, WEB_THREADS=8)
    answers = storm(web, [b'{"payload":{"n":1}}'] * 1000)
    assert Counter(status for status, _, _ in answers) == {202: 1000}
    assert len({document["jobId"] for _, _, document in answers}) == 1
    assert sum("idempotency-replayed" not in headers for _, headers, _ in answers) == 1
    assert execute(database_url, "select count(*) from jobs") == [(1,)] and system.totals()["jobs_created"] == 1


def test_of_different_bodies_with_one_key_one_wins_and_the_others_hear_of_it(start_web: Start, database_url: str) -> None:
    web = start_web(WEB_PROCESSES=2, WEB_THREADS=8)
    answers = storm(web, [b'{"payload":{"n":%d}}' % (n % 7) for n in range(350)], connections=50)
    [(id,)] = execute(database_url, "select id::text from jobs")
    assert Counter(status for status, _, _ in answers) == {202: 50, 422: 300}
    assert {document["jobId"] for status, _, document in answers if status == 202} == {id}
    assert sum(status == 202 and "idempotency-replayed" not in headers for status, headers, _ in answers) == 1
    refused = next(document for status, _, document in answers if status == 422)
    assert refused["errors"][0]["loc"] == ["idempotencyKey"] and "already used" in refused["detail"]


def test_while_its_job_is_removed_again_and_again_a_key_gets_no_error(system: JobSystem) -> None:
    until = time.monotonic() + 2
    made: list[Any] = []

    def submit() -> None:
        while time.monotonic() < until:
            made.append(system.submit("TEST_JOB", idempotency_key="k"))

    def remove() -> None:
        while time.monotonic() < until:
            for job in system.jobs(limit=1).jobs:
                with contextlib.suppress(JobNotFound):
                    system.remove(job.id)

    with ThreadPoolExecutor(5) as threads:
        for future in [*(threads.submit(submit) for _ in range(4)), threads.submit(remove)]:
            future.result()
    assert len({job.id for job in made}) == sum(not job.replayed for job in made) > 1


def prune(system: JobSystem) -> None:
    """What every worker process does now and then."""
    system.database.run("prune", days=30, after="00000000-0000-0000-0000-000000000000")


def test_a_key_is_free_again_when_its_job_is_gone(system: JobSystem, database_url: str) -> None:
    first = system.submit("TEST_JOB", {"n": 1}, idempotency_key="k")
    system.cancel(first.id)
    assert system.submit("TEST_JOB", {"n": 1}, idempotency_key="k").replayed, "however the job ended, for as long as it is kept"
    old = "finished_at = now() - interval '31 days', created_at = now() - interval '40 days', id = '01000000-0000-7000-8000-000000000000'"
    execute(database_url, f"alter table events drop constraint events_job_id_fkey; update jobs set {old}")
    prune(system)
    again = system.submit("TEST_JOB", {"n": 2}, idempotency_key="k")
    assert again.id != first.id and not again.replayed
    system.remove(again.id)
    assert not system.submit("TEST_JOB", {"n": 3}, idempotency_key="k").replayed


def test_a_key_that_cannot_be_one_is_refused_with_what_would_be_right(start_web: Start, system: JobSystem) -> None:
    web = start_web(WEB_PROCESSES=1, WEB_THREADS=1)
    for key in (b"", b"x" * 256, b"a\tb", "schlüssel".encode(), b"\xff\xfe"):
        status, _, body = exchange(web, with_length(b"{}", JSON, b"Idempotency-Key: " + key + b"\r\n"))
        assert status == 422, (key, body)
        assert json.loads(body)["errors"] == [{"loc": ["idempotencyKey"], "msg": "must be 1 to 255 printable ASCII characters"}]
    assert exchange(web, with_length(b"{}", JSON, b"Idempotency-Key: " + b"~" * 255 + b"\r\n"))[0] == 202
    assert system.totals()["jobs_created"] == 1
