"""INGEST_BATCH, against a real HTTP server that answers as a test tells it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobsys import GiveUp, Job
from jobsys.errors import InvalidSubmission, JobStopped
from jobsys.job_types import encode, registry
from jobsys.jobs import ingestion, settings


class Source(ThreadingHTTPServer):
    """Answers each path with the next of `answers[path]`, (status, headers, body) or None to hang up; else with a small JSON object."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.answers: dict[str, list[Any]] = {}
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Exchange(BaseHTTPRequestHandler):
    server: Source
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        self.server.headers.append(dict(self.headers))
        answers = self.server.answers.get(self.path)
        answer = answers.pop(0) if answers else (200, {"Content-Type": "application/json"}, json.dumps({"path": self.path}).encode())
        if answer == "silence":
            self.server.closing.wait(10)
        if not isinstance(answer, tuple):
            self.close_connection = True
            return
        status, headers, body = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have read enough
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


Use = Callable[..., None]


@pytest.fixture(autouse=True)
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """`use(url)`: the INGEST_URL from now on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INGEST_URL", raising=False)
    monkeypatch.setenv("INGEST_ALLOW_PRIVATE", "1")
    monkeypatch.setattr(ingestion, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(ingestion, "TIMEOUT", 2.0)
    settings.cache_clear()

    def use(url: str) -> None:
        monkeypatch.setenv("INGEST_URL", url)
        settings.cache_clear()

    yield use
    settings.cache_clear()


@pytest.fixture
def source(use: Use) -> Iterator[Source]:
    """A server in use, asked for `/items/<id>`."""
    with contextlib.closing(Source()) as source:
        use(f"{source.url}/items/{{id}}")
        yield source


def ingest(*ids: int, job: Job | None = None) -> list[dict[str, Any]]:
    result: dict[str, Any] = registry.load().find("ingestBatch").run(json.dumps({"ids": ids}), job or Job())
    assert list(result) == ["results"]
    encode(result)
    results: list[dict[str, Any]] = result["results"]
    return results


def data_of(source: Source, *answers: Any) -> Any:
    """What id 1 brings when the server answers so."""
    source.answers["/items/1"] = list(answers)
    return ingest(1)[0]["data"]


JSON = {"Content-Type": "application/json"}


def test_without_a_url_every_id_is_processed_in_the_order_given() -> None:
    assert ingest(3, 10**9 + 7, 1) == [
        {"id": 3, "data": "processed"},
        {"id": 10**9 + 7, "data": "processed"},
        {"id": 1, "data": "processed"},
    ]


def test_it_runs_on_the_queue_that_has_the_pace() -> None:
    assert registry.load().types["INGEST_BATCH"].queue == "ingestion"


def test_each_id_is_fetched_from_the_url(source: Source) -> None:
    assert ingest(2, 1) == [{"id": 2, "data": {"path": "/items/2"}}, {"id": 1, "data": {"path": "/items/1"}}]
    assert source.headers[0]["User-Agent"] == "jobsys"


def test_an_id_named_twice_is_fetched_once(source: Source) -> None:
    assert [result["id"] for result in ingest(5, 6, 5)] == [5, 6, 5]
    assert source.asked == {"/items/5": 1, "/items/6": 1}


@pytest.mark.parametrize(
    ("headers", "body", "data"),
    [
        (JSON, b"[1, null]", [1, None]),
        ({"Content-Type": "application/vnd.api+json; charset=utf-8"}, '"é"'.encode(), "é"),
        ({"Content-Type": "text/plain; charset=latin-1"}, b"caf\xe9", "café"),
        ({"Content-Type": "text/plain"}, b"\xff\x00!", "\ufffd\ufffd!"),
        ({}, b"", ""),
        ({"Content-Type": "text/plain", "Content-Length": None}, b"until the end", "until the end"),
        ({"Content-Type": "text/plain", "Content-Length": None, "Transfer-Encoding": "chunked"}, b"2\r\nok\r\n0\r\n\r\n", "ok"),
    ],
)
def test_an_answer_is_json_when_it_says_so_and_else_text(source: Source, headers: dict[str, Any], body: bytes, data: Any) -> None:
    assert data_of(source, (200, headers, body)) == data


def test_only_the_ids_that_failed_are_asked_for_again(source: Source) -> None:
    source.answers = {"/items/2": [(503, {}, b""), None]}
    job = Job()
    assert [result["data"] for result in ingest(1, 2, 3, job=job)] == [{"path": f"/items/{n}"} for n in (1, 2, 3)]
    assert source.asked == {"/items/1": 1, "/items/2": 3, "/items/3": 1}
    assert job.lines[0] == "1 of 3 ids could not be fetched: 2: HTTP 503 Service Unavailable"


def test_when_ids_fail_to_the_last_the_attempt_fails_and_names_them(source: Source) -> None:
    source.answers = {"/items/2": [(404, {}, b"")] * 9, "/items/4": [None] * 9}
    with pytest.raises(RuntimeError, match=r"2 of 4 ids could not be fetched: 2: HTTP 404 Not Found; 4: .+") as failure:
        ingest(1, 2, 3, 4)
    assert source.asked == {"/items/1": 1, "/items/2": 3, "/items/3": 1, "/items/4": 3}
    assert "127.0.0.1" not in str(failure.value)


@pytest.mark.parametrize(
    "answer",
    [
        (500, {}, b"oops"),
        (200, JSON, b"{"),
        (200, JSON, b""),
        (200, JSON, b'{"a": NaN}'),
        (200, JSON, b"1e999"),
        (200, JSON, b'"\\u0000"'),
        (200, JSON, b'"\\ud800"'),
        (200, JSON, b"[" * 200_000),
        (200, JSON, b"\xff\xfe\xfd"),
        (200, {"Content-Type": "text/plain; charset=klingon"}, b"x"),
        (200, {"Content-Length": "100"}, b"breaks off"),
        (200, {"Content-Length": None, "Transfer-Encoding": "chunked"}, b"64\r\nbreaks off"),
        (200, {}, b"x" * 1_000_001),
        (302, {"Location": "/items/1"}, b""),
        (302, {"Location": "file:///etc/passwd"}, b""),
        (302, {"Location": "ftp://127.0.0.1/x"}, b""),
        (302, {}, b""),
        None,
    ],
)
def test_an_answer_that_is_none_or_cannot_be_stored_fails_that_id(source: Source, answer: Any) -> None:
    with pytest.raises(RuntimeError, match="1 of 1 ids could not be fetched: 1: "):
        data_of(source, *[answer] * 99)


def test_redirects_are_followed_a_few_times(source: Source) -> None:
    for n in range(8):
        source.answers[f"/hop/{n}"] = [(302, {"Location": f"/hop/{n + 1}"}, b"")] * 3
    assert data_of(source, (302, {"Location": "/hop/5"}, b"")) == {"path": "/hop/8"}
    with pytest.raises(RuntimeError, match="more than 5 redirects"):
        data_of(source, *[(302, {"Location": "/hop/0"}, b"")] * 3)


def test_a_silent_server_is_waited_for_only_so_long(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "TIMEOUT", 0.1)
    source.answers["/items/1"] = ["silence"] * 3
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="timed out"):
        ingest(1)
    assert time.monotonic() - started < 2


def test_a_server_that_is_not_there_fails_the_attempt(use: Use) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        use(f"http://127.0.0.1:{taken.getsockname()[1]}/{{id}}")
        with pytest.raises(RuntimeError, match=r"1: .*refused"):
            ingest(1)


def test_answers_that_are_too_much_together_are_final(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "BATCH_BYTES", 50)
    with pytest.raises(GiveUp, match="submit fewer ids"):
        ingest(*range(1, 10))


def test_a_batch_can_be_stopped_between_two_ids(source: Source) -> None:
    class StoppedSoon(Job):
        def checkpoint(self) -> None:
            self.stop_reason = "cancelled" if source.asked.total() == 2 else None
            super().checkpoint()

    with pytest.raises(JobStopped):
        ingest(1, 2, 3, 4, job=StoppedSoon())
    assert source.asked.total() == 2


def test_a_long_batch_tells_its_progress(source: Source) -> None:
    job = Job()
    ingest(*range(1, 151), job=job)
    assert job.fraction == 100 / 150


@pytest.mark.parametrize(
    "ids", [[], None, 5, "1,2", [0], [-1], [10**9 + 8], [1.0], [1.5], ["1"], [True], [None], [[1]], [2**70], [1] * 100_001]
)
def test_ids_that_are_none_are_refused_by_name(ids: Any) -> None:
    with pytest.raises(InvalidSubmission) as refusal:
        registry.load().types["INGEST_BATCH"].check({"ids": ids})
    assert all(error["loc"][:2] == ["payload", "ids"] for error in refusal.value.errors)


def test_a_hundred_thousand_ids_are_one_batch() -> None:
    registry.load().types["INGEST_BATCH"].check({"ids": list(range(1, 100_001))})
