"""Requests that wait for jobs, on the real server: what they get, what they hold meanwhile, and how each kind of waiting ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg2
import pytest
from conftest import Running, eventually, execute

from jobsys.chaos.proxy import Proxy
from jobsys.settings import Settings
from jobsys.system import JobSystem, Submission

Start = Callable[..., Running]


class Client:
    """One connection, over which one thing after the other is sent and read."""

    def __init__(self, web: Running) -> None:
        address = urlsplit(web.url)
        self.socket = socket.create_connection((address.hostname or "", address.port or 0), timeout=30)
        self.file = self.socket.makefile("rb")

    def send(self, path: str, *headers: str, method: str = "GET", version: str = "1.1", body: str = "") -> Client:
        lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers, "", body]
        self.socket.sendall("\r\n".join(lines).encode())
        return self

    def post(self) -> int:
        """The status of a job's submission."""
        self.send("/jobs", "Content-Type: application/json", "Content-Length: 2", method="POST", body="{}")
        return self.answer()[0]

    def answer(self, method: str = "GET") -> tuple[int, http.client.HTTPMessage, Any]:
        """The next answer: status, headers, body."""
        answer = self.begin(method)
        body = answer.read()
        return answer.status, answer.headers, json.loads(body) if body else None

    def begin(self, method: str = "GET") -> http.client.HTTPResponse:
        """The next answer, of which only the head has been read."""
        answer = http.client.HTTPResponse(self._next(), method=method)  # type: ignore[arg-type]
        answer.begin()
        return answer

    def ask(self, path: str, *headers: str) -> tuple[int, http.client.HTTPMessage, Any]:
        return self.send(path, *headers).answer()

    def is_silent(self) -> bool:
        """Whether nothing has been sent to it that it has not read."""
        self.socket.setblocking(False)
        try:
            return not self.file.peek(1)  # type: ignore[attr-defined]
        finally:
            self.socket.settimeout(30)

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def _next(self) -> Any:
        """What HTTPResponse takes for a socket, and may not close."""

        class Kept:
            def __init__(self, file: Any) -> None:
                self.file = file

            def makefile(self, _mode: str) -> Any:
                return self

            def close(self) -> None:
                pass

            def flush(self) -> None:
                pass

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        return Kept(self.file)


@pytest.fixture
def connect() -> Iterator[Callable[[Running], Client]]:
    """`connect(web)`: a client, closed at the end."""
    with contextlib.ExitStack() as stack:

        def connected(web: Running) -> Client:
            client = Client(web)
            stack.callback(client.close)
            return client

        yield connected


Connect = Callable[[Running], Client]


@pytest.fixture
def web(start_web: Start) -> Running:
    return start_web(WEB_PROCESSES=1, WEB_THREADS=2)


def connections(web: Running) -> int:
    """How many connections of clients its processes have."""
    port = urlsplit(web.url).port
    found = [each for process in web.family if process.pid != web.pid for each in process.net_connections("tcp")]
    return sum(each.status in (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT) and each.laddr.port == port for each in found)


def until_it_waits(web: Running, clients: list[Client]) -> None:
    """Return when the server has read what these say, and answered none."""
    eventually(lambda: connections(web) >= len(clients))
    for _ in range(3):  # each is read by one of the threads, in order
        assert Client(web).ask("/health/live")[0] == 200
    assert all(client.is_silent() for client in clients)


def lines(web: Running, request_id: str) -> list[str]:
    return [line for line in web.output.splitlines() if request_id in line]


def test_five_hundred_wait_without_a_thread_or_a_connection_to_the_database_for_each(
    start_web: Start, system: JobSystem, settings: Settings, connect: Connect
) -> None:
    web = start_web(WEB_PROCESSES=2, WEB_THREADS=2)
    job_ids = system.submit_many([Submission("TEST_JOB")] * 250)
    waiting = [(connect(web).send(f"/jobs/{job_id}?wait=30"), job_id) for job_id in job_ids]
    waiting += [(connect(web).send(f"/api/jobs/{job_ids[0]}?wait=30"), job_ids[0]) for _ in range(250)]
    submitting = connect(web)
    assert [submitting.post() for _ in range(50)] == [202] * 50
    assert all(client.is_silent() for client, _ in waiting)
    # In each process the main one, two that serve, one that looks for all of them, one that watches the
    # connections to the database, and one that reports what was measured; but some processes get no connection.
    threads = [process.num_threads() for process in web.family if process.pid != web.pid]
    assert len(threads) == 2 and max(threads) == 1 + 2 + 3
    counted = "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'jobsys'"
    assert execute(str(settings.database_url), counted)[0][0] <= 2 * (2 + 2) + 1  # who looks and who reports have one each; one is ours

    for number, job_id in enumerate(job_ids[:100]):
        if number % 2:
            system.remove(job_id)
        else:
            system.cancel(job_id)
    for client, job_id in waiting:
        if (number := job_ids.index(job_id)) < 100:
            status, _, body = client.answer()
            assert (status, body.get("id"), body["status"]) == ((404, None, 404) if number % 2 else (200, job_id, "CANCELLED"))
        else:
            assert client.is_silent()
    assert [submitting.post() for _ in range(50)] == [202] * 50

    web.signal(signal.SIGTERM)
    for client, job_id in waiting:
        if job_ids.index(job_id) >= 100:
            status, headers, body = client.answer()
            assert (status, body["id"], body["status"], headers["Connection"]) == (200, job_id, "PENDING", "close")
    assert web.wait() == 0
    assert "Traceback" not in web.output


def test_a_wait_leaves_one_line_in_the_log_and_the_connection_as_it_was(web: Running, system: JobSystem, connect: Connect) -> None:
    job_id = system.submit("TEST_JOB").id
    client = connect(web)
    for wait in (0.4, 20):
        request_id = f"waited-for-{wait}"
        client.send(f"/jobs/{job_id}?wait={wait}", f"X-Request-ID: {request_id}")
        client.send("/health/live")  # at once, behind the one that waits
        if wait == 20:
            until_it_waits(web, [client])
            assert not lines(web, request_id)
            system.cancel(job_id)
        status, headers, body = client.answer()
        assert (status, body["id"], body["status"]) == (200, job_id, "CANCELLED" if wait == 20 else "PENDING")
        assert (headers["X-Request-ID"], headers["Cache-Control"], headers["Connection"]) == (request_id, "no-store", "keep-alive")
        assert client.answer()[2]["status"] == "ok"
        [line] = eventually(lambda name=request_id: lines(web, name))  # type: ignore[misc]
        assert "status=200" in line
        assert float(line.partition(" ms=")[2].split()[0]) >= (400 if wait < 1 else 0)


def test_old_clients_and_those_who_want_no_body_may_wait(web: Running, system: JobSystem, connect: Connect) -> None:
    job_id = system.submit("TEST_JOB").id
    old, head = connect(web), connect(web)
    old.send(f"/jobs/{job_id}?wait=20", version="1.0")
    head.send(f"/jobs/{job_id}?wait=20", method="HEAD")
    assert old.is_silent() and head.is_silent()
    system.cancel(job_id)
    status, headers, body = old.answer()
    assert (status, body["status"], headers["Connection"], old.file.read()) == (200, "CANCELLED", "close", b"")
    status, headers, body = head.answer("HEAD")
    assert (status, body) == (200, None) and int(headers["Content-Length"]) > 100
    assert head.ask(f"/jobs/{job_id}?wait=20")[2]["status"] == "CANCELLED"


def test_who_goes_is_let_go_and_who_has_only_said_all_is_answered(web: Running, system: JobSystem, connect: Connect) -> None:
    job_id = system.submit("TEST_JOB").id
    gone, reset, done, staying = (connect(web).send(f"/jobs/{job_id}?wait=30", f"X-Request-ID: it-{name}") for name in "abcd")
    until_it_waits(web, [gone, reset, done, staying])
    gone.close()
    reset.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    done.socket.shutdown(socket.SHUT_WR)
    assert done.answer()[2]["status"] == "PENDING"
    eventually(lambda: connections(web) == 1)
    assert staying.is_silent()
    assert [len(lines(web, f"it-{name}")) for name in "abcd"] == [1, 1, 1, 0]
    system.cancel(job_id)
    assert staying.answer()[2]["status"] == "CANCELLED"


def test_only_half_of_the_connections_may_wait(start_web: Start, system: JobSystem, connect: Connect) -> None:
    web = start_web(WEB_PROCESSES=1, WEB_THREADS=2, GUNICORN_CMD_ARGS="--worker-connections 12")
    job_id = system.submit("TEST_JOB").id
    for number in range(2):  # who was let go counts no more
        waiting = [connect(web).send(f"/jobs/{job_id}?wait=30") for _ in range(6)]
        until_it_waits(web, waiting)
        assert connect(web).ask(f"/jobs/{job_id}?wait=30")[2]["status"] == "PENDING"
        for client in waiting:
            client.close()
        eventually(lambda number=number: web.output.count(f"/jobs/{job_id}") == (number + 1) * 7)  # type: ignore[misc]


def test_each_gets_its_own_answer_however_clients_come_and_go(web: Running, system: JobSystem, connect: Connect) -> None:
    rounds, mixed = range(25), []

    def come_and_go(number: int) -> None:
        dice = random.Random(number)
        for _ in rounds:
            job_id = system.submit("TEST_JOB").id
            client = Client(web)
            client.send(f"/jobs/{job_id}?wait={dice.choice(('0.05', '5'))}")
            if dice.random() < 0.5:
                client.close()
                continue
            client.send(f"/jobs/{job_id}")
            time.sleep(dice.random() / 20)
            system.cancel(job_id)
            mixed.extend(each for each in (client.answer(), client.answer()) if (each[0], each[2]["id"]) != (200, job_id))
            client.close()

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mixed == []
    eventually(lambda: connections(web) == 0)
    assert "Traceback" not in web.output


def test_those_who_wait_outlast_a_short_absence_of_the_database_and_are_told_of_a_long_one(
    start_web: Start, system: JobSystem, settings: Settings, connect: Connect
) -> None:
    with contextlib.closing(Proxy(str(settings.database_url))) as proxy:
        web = start_web(WEB_PROCESSES=1, WEB_THREADS=2, DATABASE_URL=proxy.url)
        first, second = system.submit("TEST_JOB").id, system.submit("TEST_JOB").id
        waiting = [connect(web).send(f"/jobs/{job_id}?wait=30") for job_id in (first, *[second] * 20)]
        until_it_waits(web, waiting)
        proxy.refuses = True
        proxy.cut()
        time.sleep(1)
        proxy.refuses = False
        system.cancel(first)
        assert waiting.pop(0).answer()[2]["status"] == "CANCELLED"
        assert all(client.is_silent() for client in waiting)

        proxy.refuses = True
        proxy.cut()
        for client in waiting:
            status, headers, body = client.answer()
            assert (status, body["status"], headers["Retry-After"]) == (503, 503, "5")
            assert headers["Content-Type"] == "application/problem+json"
        assert connect(web).ask("/health/live")[0] == 200


class Events:
    """A stream of events being read; `ids`, `kinds` and `names` of what came so far."""

    def __init__(self, client: Client, job_id: str, last_id: str | None = None) -> None:
        again = (f"Last-Event-ID: {last_id}",) if last_id else ()
        self.client = client.send(f"/jobs/{job_id}/events", "Accept: text/event-stream", *again)
        self.answer = client.begin()
        self.ids: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.fields: list[tuple[str, str]] = []

    def next(self) -> dict[str, str]:
        """The fields of the next block; {} at the end of the stream."""
        block = {}
        while line := self.answer.readline().decode():
            if line == "\n":
                if "data" in block:
                    self.ids.append(block.get("id", ""))
                    self.events.append(json.loads(block["data"]))
                return block
            name, _, value = line.rstrip("\n").partition(":")
            block[name or "comment"] = value.lstrip()
        return {}

    def until(self, kind: str) -> Events:
        """Read up to the next event of this kind."""
        while block := self.next():
            if "data" in block and self.events[-1].get("kind", block.get("event")) == kind:
                return self
        raise AssertionError(f"the stream ended before {kind}: {self.events}")

    @property
    def kinds(self) -> list[str]:
        return [event.get("kind", "end") for event in self.events]


def timeline_of(web: Running, job_id: str) -> list[dict[str, Any]]:
    client = Client(web)
    with contextlib.closing(client):
        events: list[dict[str, Any]] = client.ask(f"/jobs/{job_id}/events")[2]["events"]
        return events


def test_a_stream_tells_each_event_when_it_comes_and_ends_after_the_last(
    web: Running, system: JobSystem, connect: Connect, start_worker: Start
) -> None:
    job_id = system.submit("TEST_JOB", {"failTimes": 2, "progressSteps": 3, "sleepMs": 300}).id
    stream = Events(connect(web), job_id)
    headers = stream.answer.headers
    assert (stream.answer.status, headers["Content-Type"], headers["Connection"]) == (200, "text/event-stream", "close")
    assert (headers["X-Accel-Buffering"], headers["Content-Length"], headers["Cache-Control"]) == ("no", None, "no-store")
    assert stream.next() == {"retry": "2000"}
    assert stream.until("created").kinds == ["created"]
    start_worker()
    stream.until("end")
    assert stream.next() == {}
    assert stream.events[-1] == {"jobId": job_id, "status": "COMPLETED"}
    told = [event for event in stream.events[:-1] if event["kind"] != "due"]
    assert told == timeline_of(web, job_id)
    assert [kind for kind in stream.kinds if kind in ("started", "failed", "finished")] == ["started", "failed"] * 2 + [
        "started",
        "finished",
    ]
    assert "log" in stream.kinds

    again = connect(web).send(f"/jobs/{job_id}/events", "Accept: text/event-stream", f"Last-Event-ID: {stream.ids[-1]}")
    assert again.begin().status == 204
    for number, last_id in enumerate(stream.ids[:-1]):
        rest = Events(connect(web), job_id, last_id).until("end")
        assert [event for event in rest.events if event.get("kind") != "due"] == [
            event for event in stream.events[number + 1 :] if event.get("kind") != "due"
        ]
    system_events = [event.kind for event in system.events(job_id)]
    assert system_events == [event["kind"] for event in told]


def test_a_broken_stream_goes_on_where_it_was_however_much_there_is_and_in_whatever_order_it_was_committed(
    web: Running, system: JobSystem, settings: Settings, connect: Connect
) -> None:
    job_id = system.submit("TEST_JOB").id
    url = str(settings.database_url)
    write = "insert into events (job_id, at, kind, message) select %s, '2030-01-01', 'log', %s || n from generate_series(1, %s) as n"
    execute(url, write, job_id, "early ", 1000)
    dice = random.Random(1)
    last_id, told = None, []

    def read_some(upto: str | None) -> None:
        """Read on, over streams that break off anywhere."""
        nonlocal last_id
        for _ in range(100):
            client = connect(web)
            stream = Events(client, job_id, last_id)
            for _ in range(dice.randint(1, 150)):
                if "data" in stream.next() and stream.events[-1].get("message") == upto:
                    break
            client.close()
            told.extend(stream.events)
            last_id = stream.ids[-1] if stream.ids else last_id
            if told[-1].get("message") == upto:
                return
        raise AssertionError(f"{upto} never came")

    with contextlib.closing(psycopg2.connect(url)) as late:
        late.cursor().execute(write, (job_id, "late ", 300))  # numbered now, committed later
        execute(url, write, job_id, "between ", 300)
        read_some("between 300")
        with late.cursor() as cursor:
            cursor.execute("savepoint here")
            cursor.execute(write, (job_id, "later ", 1))
            cursor.execute("release savepoint here")
        stream = Events(connect(web), job_id, last_id)
        assert stream.next() == {"retry": "2000"}
        execute(url, write, job_id, "meanwhile ", 1)
        stream.until("log")
        late.commit()
        stream.until("log")
    assert [event["message"] for event in stream.events] == ["meanwhile 1", "late 1"]
    stream.client.close()
    told += stream.events
    last_id = stream.ids[-1]
    read_some("later 1")
    execute(url, write, job_id, "last ", 1)
    system.cancel(job_id)
    stream = Events(connect(web), job_id, last_id).until("end")
    told += stream.events[:-1]
    counts = {"early": 1000, "late": 300, "between": 300, "later": 1, "meanwhile": 1, "last": 1}
    messages = [event["message"] for event in told if event["kind"] == "log"]
    assert sorted(messages) == sorted(f"{name} {n}" for name, count in counts.items() for n in range(1, count + 1))
    for name, count in counts.items():
        assert [each for each in messages if each.startswith(f"{name} ")] == [f"{name} {n}" for n in range(1, count + 1)]
    assert sorted(event["kind"] for event in told if event["kind"] != "log") == ["cancelled", "created", "finished"]


def test_a_retried_job_goes_on_in_its_stream(web: Running, system: JobSystem, connect: Connect) -> None:
    job_id = system.submit("TEST_JOB").id
    system.cancel(job_id)
    first = Events(connect(web), job_id).until("end")
    assert sorted(first.kinds[:-1]) == ["cancelled", "created", "finished"]
    system.retry(job_id, by="somebody")
    second = Events(connect(web), job_id, first.ids[-1]).until("retried")
    system.remove(job_id)
    assert second.until("end").kinds == ["retried", "end"]
    assert second.events[-1]["status"] is None
    gone = connect(web).send(f"/jobs/{job_id}/events", "Accept: text/event-stream", f"Last-Event-ID: {second.ids[0]}")
    assert gone.begin().status == 404


def test_who_does_not_read_its_stream_stops_nobody_and_fills_no_memory(
    web: Running, system: JobSystem, settings: Settings, connect: Connect
) -> None:
    job_id = system.submit("TEST_JOB").id
    write = "insert into events (job_id, kind, message) select %s, 'log', repeat('x', 4000) || n from generate_series(1, 5000) as n"
    execute(str(settings.database_url), write, job_id)
    [process] = [process for process in web.family if process.pid != web.pid]
    before = process.memory_info().rss
    deaf = [Events(connect(web), job_id) for _ in range(10)]  # 20 MB for each of them
    assert [connect(web).post() for _ in range(20)] == [202] * 20
    assert process.memory_info().rss - before < 60 * 2**20
    one = deaf[7]
    system.cancel(job_id)
    one.until("end")
    assert [event["message"][4000:] for event in one.events if event.get("kind") == "log"] == [str(n) for n in range(1, 5_001)]
    for stream in deaf:
        stream.client.close()
    eventually(lambda: connections(web) <= 20 + 1)
    assert "Traceback" not in web.output


def test_only_who_prefers_a_stream_gets_one_and_only_from_a_place_there_was(web: Running, system: JobSystem, connect: Connect) -> None:
    job_id = system.submit("TEST_JOB").id
    client = connect(web)
    for accept in ("*/*", "application/json", "text/event-stream;q=0.5, application/json", "nonsense"):
        status, headers, body = client.ask(f"/jobs/{job_id}/events", f"Accept: {accept}")
        assert (status, headers["Content-Type"], headers["Vary"]) == (200, "application/json", "Accept")
        assert [event["kind"] for event in body["events"]] == ["created"]
    for wrong in ("7", "x" * 500, ";;0;0;0;0;0;0", "9:3:;;0;0;0;0;0;0;0", "1:9:9;;0;0;0;0;0;0;0", "' or 1=1", "1:9:;;-1;0;0;0;0;0;0"):
        status, headers, body = client.ask(f"/jobs/{job_id}/events", "Accept: text/event-stream", f"Last-Event-ID: {wrong}")
        assert (status, headers["Content-Type"]) == (400, "application/problem+json") and "Last-Event-ID" in body["detail"]
    head = client.send(f"/jobs/{job_id}/events", "Accept: text/event-stream", method="HEAD").answer("HEAD")
    assert (head[0], head[1]["Content-Type"], head[2]) == (200, "text/event-stream", None)
    old = connect(web).send(f"/jobs/{job_id}/events", "Accept: text/event-stream", version="1.0")
    system.cancel(job_id)
    answer = old.begin()
    assert answer.headers["Transfer-Encoding"] is None and answer.read().rstrip().endswith(b'"status": "CANCELLED"}')


def test_streams_end_with_the_server_and_outlast_the_database(
    start_web: Start, system: JobSystem, settings: Settings, connect: Connect
) -> None:
    with contextlib.closing(Proxy(str(settings.database_url))) as proxy:
        web = start_web(WEB_PROCESSES=1, WEB_THREADS=2, DATABASE_URL=proxy.url, SHUTDOWN_GRACE="60s")
        job_id = system.submit("TEST_JOB").id
        streams = [Events(connect(web), job_id).until("created") for _ in range(20)]
        waiting = connect(web).send(f"/jobs/{job_id}?wait=30")
        proxy.refuses = True
        proxy.cut()
        assert waiting.answer()[0] == 503
        proxy.refuses = False
        execute(str(settings.database_url), "insert into events (job_id, kind, message) values (%s, 'log', 'after all')", job_id)
        for stream in streams:
            assert stream.until("log").events[-1]["message"] == "after all"
        web.signal(signal.SIGTERM)
        for stream in streams:
            stream.client.socket.settimeout(10)  # before it would have beaten the next time
            assert stream.next() == {}
        assert web.wait() == 0
        assert "Traceback" not in web.output
