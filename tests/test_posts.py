"""Posts that are committed together: none is answered before that, none holds a thread meanwhile, and what is answered is there."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
from conftest import Running, eventually, execute

from jobsys.system import JobSystem

Start = Callable[..., Running]
PEOPLE = 24


@pytest.fixture
def web(start_web: Start) -> Running:
    return start_web(WEB_PROCESSES=1, WEB_THREADS=2)


@contextlib.contextmanager
def held_up(database_url: str) -> Iterator[Any]:
    """No job can be inserted until the block ends, or this connection commits."""
    with contextlib.closing(psycopg2.connect(database_url)) as connection:
        connection.cursor().execute("lock table jobs in share mode")
        yield connection


@contextlib.contextmanager
def connections(web: Running, number: int) -> Iterator[list[http.client.HTTPConnection]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(contextlib.closing(http.client.HTTPConnection(urlsplit(web.url).netloc, timeout=30))) for _ in range(number)
        ]


def post(client: http.client.HTTPConnection, document: object, **headers: str) -> None:
    client.request("POST", "/jobs", json.dumps(document), {"Content-Type": "application/json"} | headers)


def answer(client: http.client.HTTPConnection) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
    response = client.getresponse()
    return response.status, json.loads(response.read()), response.headers


def until_they_wait(web: Running, clients: list[http.client.HTTPConnection]) -> None:
    """Return when these posts were read, and none is answered."""
    with connections(web, 1) as [another]:
        for _ in range(len(clients)):  # each is read by the one thread that is free, after those that came before
            another.request("GET", "/health/live")
            assert answer(another)[0] == 200
    time.sleep(0.1)
    for client in clients:
        client.sock.settimeout(0.001)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
        client.sock.settimeout(30)


def test_posts_that_wait_for_a_commit_hold_no_thread_and_are_answered_after_it(web: Running, system: JobSystem, database_url: str) -> None:
    with connections(web, PEOPLE) as clients:
        for _ in range(2):
            execute(database_url, "truncate jobs cascade")
            with held_up(database_url) as lock:
                for number, client in enumerate(clients):
                    post(client, {"payload": {"n": number}}, **{"X-Request-ID": f"r{number}"})
                until_they_wait(web, clients)
                lock.commit()
                answers = [answer(client) for client in clients]
            for number, (status, document, headers) in enumerate(answers):
                assert status == 202 and document == {"message": "Job accepted!", "jobId": document["jobId"], "status": "PENDING"}
                assert headers["Location"] == f"/jobs/{document['jobId']}" and headers["X-Request-ID"] == f"r{number}"
                job = system.job(document["jobId"])
                assert job.payload == {"n": number} and job.request_id == f"r{number}"
            assert execute(database_url, "select count(*), count(distinct xmin::text) from jobs") == [(PEOPLE, 2)], (
                "the first, and the others"
            )
    lines = [line for line in web.output.splitlines() if "path=/jobs" in line]
    assert len(lines) == 2 * PEOPLE
    for number, (_, document, _) in enumerate(answers):
        [line] = [line for line in lines if document["jobId"] in line]
        assert line.endswith(f" request_id=r{number}") and "status=202" in line
        assert float(re.search(r" ms=([\d.]+)", line)[1]) > 100  # type: ignore[index]

    def measured() -> str:
        with connections(web, 1) as [client]:
            client.request("GET", "/metrics", headers={"Accept": "text/plain"})
            return client.getresponse().read().decode()

    counted = f'jobsys_http_requests_total{{method="POST",route="/jobs",status="202"}} {2 * PEOPLE}.0'
    eventually(lambda: counted in measured())


def test_when_the_database_goes_away_all_of_them_are_told_and_may_ask_again(web: Running, system: JobSystem, database_url: str) -> None:
    with connections(web, PEOPLE) as clients, held_up(database_url):
        for client in clients:
            post(client, {})
        until_they_wait(web, clients)
        waiting = "from pg_stat_activity where wait_event_type = 'Lock' and query ~ 'submit_job|insert into jobs'"
        end = f"select pg_terminate_backend(pid) {waiting}"
        while execute(database_url, "select count(*) from pg_stat_activity where wait_event_type = 'Lock'")[0][0]:
            execute(database_url, end)
            time.sleep(0.05)
        for client in clients:
            status, document, headers = answer(client)
            assert status == 503 and document["detail"].startswith("the database is away")
            assert headers["Retry-After"] == "5" and headers["X-Request-ID"] and headers["Content-Type"] == "application/problem+json"
            assert "Location" not in headers
    assert system.counts()["PENDING"] == 0
    with connections(web, 1) as [client]:
        post(client, {})
        assert answer(client)[0] == 202


def test_one_that_is_refused_is_told_so_in_its_own_words(web: Running, system: JobSystem, database_url: str) -> None:
    execute(
        database_url,
        """
        create function refuse() returns trigger language plpgsql as $$
        begin raise exception 'not this one' using errcode = '22023'; end $$;
        create trigger refuse before insert on jobs for each row when (new.payload ? 'refused') execute function refuse()
        """,
    )
    with connections(web, PEOPLE) as clients, held_up(database_url) as lock:
        for number, client in enumerate(clients):
            post(client, {"data": {"refused": 1} if number == 7 else {"n": number}})
        until_they_wait(web, clients)
        lock.commit()
        answers = [answer(client) for client in clients]
        status, document, headers = answers.pop(7)
        assert status == 422 and document["errors"] == [{"loc": ["data"], "msg": "PostgreSQL can't store it: not this one"}]
        assert "Location" not in headers
        assert {document["jobId"] for _, document, _ in answers} == {job.id for job in system.jobs().jobs}
        post(clients[7], {"data": {"n": 7}})  # the connection is as it was
        assert answer(clients[7])[0] == 202


def test_what_waits_for_a_commit_takes_little_memory(web: Running, database_url: str) -> None:
    [server] = [each for each in web.family if each.pid != web.pid]
    document = {"payload": {"list": [{}] * 15_000}}
    with connections(web, PEOPLE) as clients:
        post(clients[0], document)
        assert answer(clients[0])[0] == 202
        with held_up(database_url) as lock:
            before = server.memory_info().rss
            for client in clients:
                post(client, document)
            until_they_wait(web, clients)
            assert server.memory_info().rss - before < PEOPLE * 600_000
            lock.commit()
            assert {answer(client)[0] for client in clients} == {202}


def test_who_goes_away_meanwhile_leaves_a_job_and_nothing_else(web: Running, system: JobSystem, database_url: str) -> None:
    with connections(web, PEOPLE) as clients, held_up(database_url) as lock:
        for client in clients:
            post(client, {})
        until_they_wait(web, clients)
        for client in clients[::2]:
            client.close()
        lock.commit()
        assert {answer(client)[0] for client in clients[1::2]} == {202}
        assert system.counts()["PENDING"] == PEOPLE
        [server] = [each for each in web.family if each.pid != web.pid]
        eventually(lambda: sum(each.laddr.port == urlsplit(web.url).port for each in server.net_connections("tcp")) <= PEOPLE // 2 + 1)
    assert "Traceback" not in web.output


def test_the_next_request_has_its_time_from_the_answer_on(web: Running, database_url: str) -> None:
    with connections(web, 2) as [first, client], held_up(database_url) as lock:
        post(first, {})
        client.connect()
        client.sock.sendall(
            b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}GET /he"
        )
        until_they_wait(web, [client])
        time.sleep(3)
        lock.commit()
        assert client.sock.recv(4096).startswith(b"HTTP/1.1 202 ")
        time.sleep(2.5)  # together they are more than a request may take
        client.sock.sendall(b"alth/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.sock.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_server_that_is_told_to_end_answers_those_that_wait_for_a_commit(web: Running, system: JobSystem, database_url: str) -> None:
    with connections(web, PEOPLE) as clients, held_up(database_url) as lock:
        for client in clients:
            post(client, {})
        until_they_wait(web, clients)
        web.signal(signal.SIGTERM)
        time.sleep(0.5)
        lock.commit()
        answers = [answer(client) for client in clients]
        assert {status for status, _, _ in answers} == {202}
        assert sum(headers["Connection"] == "close" for _, _, headers in answers) >= PEOPLE - 1, "all but the one that was alone"
    assert web.wait() == 0
    assert system.counts()["PENDING"] == PEOPLE


def test_what_a_killed_server_has_answered_is_there(start_web: Start, system: JobSystem) -> None:
    web = start_web(WEB_PROCESSES=2, WEB_THREADS=2)
    accepted: list[str] = []
    over = threading.Event()

    def go_on_posting() -> None:
        while not over.is_set():
            with connections(web, 1) as [client], contextlib.suppress(OSError, http.client.HTTPException):
                while not over.is_set():
                    post(client, {})
                    accepted.append(answer(client)[1]["jobId"])

    threads = [threading.Thread(target=go_on_posting) for _ in range(PEOPLE)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        time.sleep(random.uniform(0.3, 0.8))
        random.choice([each for each in web.family if each.pid != web.pid]).kill()
    time.sleep(0.5)
    over.set()
    for thread in threads:
        thread.join()
    there = {job_id for (job_id,) in execute(str(system.settings.database_url), "select id::text from jobs")}
    assert len(accepted) > 100 and len(accepted) == len(set(accepted)) and there.issuperset(accepted)
    assert len(there) <= len(accepted) + 5 * PEOPLE
