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
        answer = http.client.HTTPResponse(self._next(), method=method)  # type: ignore[arg-type]
        answer.begin()
        body = answer.read()
        return answer.status, answer.headers, json.loads(body) if body else None

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
    # connections to the database, and one that reports what was measured.
    assert [process.num_threads() for process in web.family if process.pid != web.pid] == [1 + 2 + 3] * 2
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
