"""The rate limit: one count over all processes, told in the headers, and no reason to refuse anybody when it can't be kept."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import pytest
import webtest
from conftest import Running, eventually, execute
from falcon import testing

from jobsys.api import rate_limit
from jobsys.api.clients import address, client
from jobsys.api.rate_limit import SHARE, Limiter
from jobsys.app import create_app
from jobsys.errors import SettingsError
from jobsys.settings import Settings
from jobsys.system import JobSystem

Start = Callable[..., Running]
LIMITED = "/jobs/no-such-id"
"""What is answered with 404 and no query."""


def ask(web: Running, path: str = LIMITED, method: str = "GET", body: Any = None, headers: Any = ()) -> tuple[int, dict[str, str], Any]:
    """One request on a connection of its own, for whichever process takes it: status, headers in lower case, document."""
    connection = http.client.HTTPConnection(web.url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.putrequest(method, path)
        data = b"" if body is None else json.dumps(body).encode()
        for name, value in [("Content-Type", "application/json"), ("Content-Length", str(len(data))), *headers]:
            connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        text = answer.read()
    found = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, found, json.loads(text) if "json" in found.get("content-type", "") else text


def ask_in_turn(webs: list[Running], times: int, threads: int = 1) -> list[int]:
    """The statuses of so many requests, to one web server after the other."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda web: ask(web)[0], itertools.islice(itertools.cycle(webs), times)))


@pytest.fixture
def limiter(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Limiter]:
    """`limiter(600, 60)`: one process's part, which waits for its answers however busy the machine is."""
    monkeypatch.setattr(rate_limit, "PATIENCE", 30.0)
    return lambda limit, period=60.0: Limiter(limit, period, database_url)


@pytest.fixture
def api(settings: Settings, system: JobSystem) -> Callable[..., webtest.TestApp]:
    """`api(rate_limit="10/minute", …)`: the application in this process."""
    return lambda **given: webtest.TestApp(create_app(Settings(**settings.model_dump() | {"_env_file": None} | given), system))


def counted(database_url: str) -> dict[str, int]:
    return dict(execute(database_url, "select client, used from rate_limits"))


# How many pass


def test_six_hundred_a_minute_pass_and_hardly_more_over_all_processes_of_all_servers(start_web: Start) -> None:
    webs = [start_web(WEB_PROCESSES=3, RATE_LIMIT="600/minute") for _ in range(2)]
    statuses = ask_in_turn(webs, 800, threads=8)
    passed = statuses.count(404)
    assert passed + statuses.count(429) == 800
    assert 600 <= passed <= 600 + 6 * (600 // SHARE)
    assert ask_in_turn(webs, 30) == [429] * 30


def test_a_small_limit_is_kept_exactly_over_all_processes(start_web: Start) -> None:
    webs = [start_web(WEB_PROCESSES=3, RATE_LIMIT="40/minute") for _ in range(2)]
    answers = [ask(web) for web in webs * 25]
    assert [status for status, _, _ in answers] == [404] * 40 + [429] * 10
    assert [headers["ratelimit-remaining"] for _, headers, _ in answers] == [str(max(0, 39 - number)) for number in range(50)]


def test_a_slow_client_reads_exact_numbers_whichever_process_answers(limiter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "STALE", 0.0)
    monkeypatch.setattr(rate_limit, "QUIET", 0.0)
    processes = [limiter(100_000) for _ in range(3)]
    assert [each.admit("a").remaining for each in processes * 4] == list(range(99_999, 99_987, -1))


def test_many_at_the_same_time_are_counted_right(limiter: Any, database_url: str) -> None:
    processes = [limiter(200), limiter(200)]
    names = [f"client {number}" for number in range(5)]
    with ThreadPoolExecutor(16) as pool:
        asked = [(process, name) for process in processes for name in names for _ in range(150)]
        passed = list(pool.map(lambda each: (each[1], each[0].admit(each[1]).passes), asked))
    for name in names:
        assert 200 <= passed.count((name, True)) <= 200 + 2 * (200 // SHARE)


def test_the_window_moves_on(start_web: Start) -> None:
    web = start_web(WEB_PROCESSES=2, RATE_LIMIT="2/2s")
    refused = eventually(lambda: next((headers for status, headers, _ in (ask(web) for _ in range(3)) if status == 429), None))
    time.sleep(int(refused["retry-after"]))
    assert ask(web)[0] == 404


def test_a_window_is_as_long_as_the_limit_says_now(limiter: Any, database_url: str) -> None:
    assert 3500 < limiter(5, 3600.0).admit("a").seconds_left <= 3600
    verdict = limiter(5).admit("a")
    assert (verdict.passes, verdict.remaining) == (True, 3)
    assert 50 < verdict.seconds_left <= 60


def test_a_window_that_is_over_does_not_count(limiter: Any, database_url: str) -> None:
    process = limiter(2)
    assert [process.admit("a").passes for _ in range(3)] == [True, True, False]
    execute(database_url, "update rate_limits set ends_at = clock_timestamp()")
    assert [limiter(2).admit("a").remaining for _ in range(2)] == [1, 0]
    assert not process.admit("a").passes, "it was told when its window ends, and need not ask again"


# What it costs


def test_few_requests_are_asked_about_and_none_of_those_refused(limiter: Any, database_url: str) -> None:
    process = limiter(10_000)
    questions = []
    run = process._database.run
    process._database.run = lambda *args, **given: questions.append(given) or run(*args, **given)
    verdicts = [process.admit("a") for _ in range(11_000)]
    assert [each.remaining for each in verdicts] == [max(0, 9_999 - number) for number in range(11_000)]
    # About SHARE * ln(limit / SHARE) + SHARE, and one each second.
    assert len(questions) < 500
    del questions[:]
    assert not any(process.admit("a").passes for _ in range(1000))
    assert questions == []


def test_clients_without_number_cost_a_process_bounded_memory_and_lose_no_count(
    limiter: Any, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    monkeypatch.setattr(rate_limit, "MOST_CLIENTS", 100)
    process = limiter(6400)
    assert [process.admit("known").remaining for _ in range(21)][-1] == 6379
    for number in range(500):
        process.admit(f"client {number}")
        assert len(process._clients) <= 101
    process.admit("known")
    eventually(lambda: counted(database_url)["known"] == 22)


def test_the_table_is_pruned(limiter: Any, system: JobSystem, database_url: str) -> None:
    process = limiter(10)
    for name in ("over", "not over"):
        process.admit(name)
    execute(database_url, "update rate_limits set ends_at = clock_timestamp() where client = 'over'")
    chores = system.broker.attend(threads=1)._chores
    chores.prune_rate_limits()
    assert counted(database_url) == {"not over": 1}


def test_without_a_limit_nothing_is_counted_and_nothing_said(api: Any, database_url: str) -> None:
    answer = api(rate_limit="0").get(LIMITED, status=404)
    assert not [name for name in answer.headers if name.lower().startswith("ratelimit")]
    assert counted(database_url) == {}


# What is said


def test_every_limited_answer_says_how_many_are_left_errors_too(api: Any) -> None:
    app = api(rate_limit="7/minute")
    left = iter(range(6, -1, -1))
    for answer in (
        app.post_json("/jobs", {}, status=202),
        app.get("/jobs", status=200),
        app.get("/nothing", status=404),
        app.post_json("/jobs", {"type": "NOPE"}, status=422),
        app.post("/jobs", "{", status=400, content_type="application/json"),
        app.put("/jobs", status=405),
        app.options("/jobs", status=200),
    ):
        assert (answer.headers["RateLimit-Limit"], answer.headers["RateLimit-Remaining"]) == ("7", str(next(left)))
        assert 50 < int(answer.headers["RateLimit-Reset"]) <= 60
    refused = app.post_json("/jobs", {}, status=429)
    assert refused.content_type == "application/problem+json"
    assert refused.headers["RateLimit-Remaining"] == "0"
    seconds = refused.headers["RateLimit-Reset"]
    assert refused.headers["Retry-After"] == seconds
    said = f"too many requests from address 127.0.0.1: 7 per minute may be made; come back in {seconds} s"
    assert refused.json == {"type": "about:blank", "title": "Too Many Requests", "status": 429, "detail": said}


def test_probes_and_the_pages_of_people_are_not_limited(api: Any) -> None:
    app = api(rate_limit="1/hour")
    app.get("/jobs", status=200)
    app.get("/jobs", status=429)
    for path in ("/health", "/health/live", "/metrics", "/admin/jobs", "/admin/ui", "/dashboard"):
        answer = app.get(path, headers={"Host": "localhost"}, status="*")
        assert answer.status_int in (200, 302, 303, 307, 308, 503), path
        assert "RateLimit-Limit" not in answer.headers
    for path in ("/", "/healthy", "/metrics2", "/adminjobs"):
        app.get(path, headers={"Host": "localhost"}, status=429)


# Who is the client


def request(peer: str = "192.0.2.1", *forwarded: str, user: str | None = None) -> Any:
    req = testing.create_req(headers=[("X-Forwarded-For", ", ".join(forwarded))] if forwarded else [])
    req.env["REMOTE_ADDR"] = peer
    req.context.user = user
    return req


@pytest.mark.parametrize(
    ("peer", "forwarded", "seen"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["203.0.113.9"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1, 203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1", "203.0.113.9, 10.2.3.4"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1", "203.0.113.9,10.2.3.4 ,  fd00::7"], "203.0.113.9"),
        ("10.0.0.1", ["10.9.9.9, 10.2.3.4"], "10.9.9.9"),
        ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", ['"203.0.113.9"'], "203.0.113.9"),
        ("10.0.0.1", ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["[2001:db8:1:2::9]"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["[2001:db8:1:2::9]:443"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["::ffff:203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9, [::ffff:10.1.1.1]:80"], "203.0.113.9"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9, unknown, 10.2.3.4"], "10.2.3.4"),
        ("10.0.0.1", ["203.0.113.9, "], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4.5"], "10.0.0.1"),
        ("10.0.0.1", ["[::1"], "::/64"),
        ("10.0.0.1", ["[]:80"], "10.0.0.1"),
        ("10.0.0.1", ["0x7f.1", "٣.٣.٣.٣"], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("::ffff:192.0.2.1", ["203.0.113.9"], "192.0.2.1"),
        ("fd00::1", ["203.0.113.9"], "203.0.113.9"),
        ("fe80::1%eth0", ["203.0.113.9"], "fe80::/64"),
        ("2001:db8:1:2:3:4:5:6", [], "2001:db8:1:2::/64"),
        ("", ["203.0.113.9"], "unknown"),
    ],
)
def test_the_address_is_the_last_one_that_no_trusted_proxy_has(peer: str, forwarded: list[str], seen: str, settings: Settings) -> None:
    trusting = Settings(**settings.model_dump() | {"_env_file": None, "trusted_proxies": "10.0.0.0/8, fd00::/8"})
    assert address(request(peer, *forwarded), trusting) == seen
    if not forwarded or seen == peer:
        assert address(request(peer, "203.0.113.77"), settings) == seen, "nobody is trusted"


def test_what_is_trusted_is_read_at_the_start() -> None:
    for wrong, said in (("proxy.example.org", "neither an address nor a network"), ("10.0.0.1/8", "host bits")):
        with pytest.raises(SettingsError, match=f"TRUSTED_PROXIES: .*{said}"):
            Settings(_env_file=None, trusted_proxies=wrong)


def test_a_name_is_no_address_and_whatever_it_is_it_can_be_counted(settings: Settings, limiter: Any) -> None:
    names = ["billing", "Billing", "192.0.2.1", "address 192.0.2.1", "a\0b", "\ud800", "x" * 5000, "x" * 5001, "%s'\"\\"]
    clients = [client(request(user=name), settings) for name in names] + [client(request(), settings)]
    process = limiter(1)
    assert [process.admit(each).passes for each in clients] == [True] * len(clients)
    assert clients[-1] == "address 192.0.2.1" and clients[0] == "user billing"


def test_a_made_up_header_gains_nothing_and_a_trusted_proxys_is_believed(start_web: Start, database_url: str) -> None:
    web = start_web(WEB_PROCESSES=1, RATE_LIMIT="3/minute")
    names = ("X-Forwarded-For", "X_Forwarded_For", "Forwarded", "X-Real-IP", "X-Forwarded-For")
    made_up = [ask(web, headers=[(name, f"203.0.113.{number}")])[0] for number, name in enumerate(names)]
    assert made_up == [404] * 3 + [429] * 2
    execute(database_url, "truncate rate_limits")
    proxied = start_web(WEB_PROCESSES=1, RATE_LIMIT="2/minute", TRUSTED_PROXIES="127.0.0.1,10.0.0.0/8")
    for number in range(4):
        forwarded = [("X-Forwarded-For", f"1.1.1.{number}"), ("X-Forwarded-For", "203.0.113.9"), ("X-Forwarded-For", "10.0.0.2")]
        assert ask(proxied, headers=forwarded)[0] == (404 if number < 2 else 429)
    assert counted(database_url) == {"address 203.0.113.9": 2}


# When the table is away


def test_requests_pass_while_the_table_is_dropped_and_are_limited_when_it_is_back(start_web: Start, database_url: str) -> None:
    web = start_web(WEB_PROCESSES=1, RATE_LIMIT="5/minute")
    execute(database_url, "alter table rate_limits rename to elsewhere")
    for _ in range(30):
        status, headers, _ = ask(web)
        assert status == 404 and "ratelimit-limit" not in headers
    assert web.output.count("the rate limit is off while its table is away") == 1
    execute(database_url, "alter table elsewhere rename to rate_limits")
    eventually(lambda: "ratelimit-limit" in ask(web)[1])
    assert "the rate limit is on again" in web.output
    eventually(lambda: ask(web)[0] == 429)


@pytest.mark.parametrize("lock", ["lock table rate_limits", "select * from rate_limits for update"])
def test_requests_pass_while_the_table_or_a_row_is_locked(start_web: Start, database_url: str, lock: str) -> None:
    web = start_web(WEB_PROCESSES=1, RATE_LIMIT="5/minute")
    assert ask(web)[0] == 404
    with contextlib.closing(psycopg2.connect(database_url)) as holding:
        holding.cursor().execute(lock)
        for _ in range(30):
            assert ask(web)[0] == 404
        waiting = "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'jobsys rate limit'"
        assert execute(database_url, waiting) <= [(1,)], "who waits for the lock gives up, and is not left behind"
    eventually(lambda: ask(web)[0] == 429)
    assert web.output.count("the rate limit is off while its table is away") == 1


def test_requests_pass_while_nothing_answers() -> None:
    for url in ("postgresql://127.0.0.1:1/none", "nonsense"):
        process = Limiter(5, 60.0, url)
        assert [process.admit(f"client {number}") for number in range(1000)] == [None] * 1000
        assert process._clients.keys() <= {"client 0"}


def test_a_table_that_does_not_answer_keeps_one_request_waiting_and_no_other(limiter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "PATIENCE", 0.5)
    process = limiter(5)
    hung = threading.Event()
    run = process._database.run
    process._database.run = lambda *args, **given: hung.wait() and run(*args, **given)
    assert [process.admit("a") for _ in range(1000)] == [None] * 1000
    assert not process._questions or len(process._questions["a"]) <= 1
    hung.set()
    eventually(lambda: process.admit("a") is not None)
