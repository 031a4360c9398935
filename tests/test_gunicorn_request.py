"""Requests of the usual kind are read and answered as gunicorn does it, and nothing is taken that gunicorn would refuse."""

from __future__ import annotations

import random
from typing import Any

import pytest
from gunicorn import util
from gunicorn.config import Config
from gunicorn.http import wsgi
from gunicorn.http.parser import RequestParser

from jobsys import gunicorn_request

CLIENT, SERVER = ("127.0.0.1", 50_000), ("127.0.0.1", 3000)
NOT_COMPARED = ("wsgi.input", "wsgi.errors", "wsgi.early_hints", "gunicorn.socket")
USUAL = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /jobs?status=DEAD&q=a%20b+c&x=%C3%A9 HTTP/1.1\r\nHost: a.example:8080\r\nUser-Agent: curl/8\r\nAccept: */*\r\n\r\n",
    b"GET /jobs? HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /jobs/a%2Fb%00%ff/../c HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\n\r\n",
    b"HEAD /health HTTP/1.1\r\nhost:localhost\r\nConnection: keep-alive\r\n\r\n",
    b"DELETE /jobs/1 HTTP/1.1\r\nHost: localhost\r\nConnection: Close\r\n\r\n",
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}GET /next HTTP/1.1\r\n\r\n",
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n{}",
    b"OPTIONS /jobs HTTP/1.1\r\nHost: localhost\r\nOrigin: https://a.example\r\nX-Empty:\r\nX-Spaces: \t a  b \t\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Proto: https\r\nX-Forwarded-For: 192.0.2.1, 10.0.0.1\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Proto: http\r\nAuthorization: Bearer a.b.c\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Ssl: on\r\nCookie: a=b; c=d\r\nIdempotency-Key: k: v\r\n\r\n",
]
UNUSUAL = [
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere\r\n\r\n",
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: +2\r\n\r\n{}",
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2, 2\r\n\r\n{}",
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length:\r\n\r\n{}",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nSCRIPT_NAME: /elsewhere\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX : a\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\nX: a\r\n\r\n",
    b"GET /jobs HTTP/1.0\r\nHost: localhost\r\n\r\n",
    b"GET //jobs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /jobs#top HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://localhost/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET  /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"get /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /?" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
    b"GET /jobs HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % number for number in range(101)) + b"\r\n",
    b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n",
    b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n{}",
]


class Wire:
    """What an answer is written to."""

    def __init__(self) -> None:
        self.said = b""

    def sendall(self, data: bytes) -> None:
        self.said += data


class Connection:
    sock, client, server = Wire(), CLIENT, SERVER


def config() -> Config:
    cfg = Config()
    cfg.set("forwarder_headers", "")
    cfg.set("accesslog", None)
    return cfg


CONFIG = config()
READER = gunicorn_request.Reader(CONFIG)


def by_gunicorn(raw: bytes) -> tuple[dict[str, Any], bytes, bool, bytes]:
    """(the environ, the body, whether the connection is to be closed, what came after it)."""
    parser = RequestParser(CONFIG, iter([raw]), CLIENT)
    request = next(parser)
    _, environ = wsgi.create(request, Wire(), CLIENT, SERVER, CONFIG)
    environ["wsgi.multithread"] = True
    return environ, request.body.read(), request.should_close(), parser.unreader.take_buffered()


def by_us(raw: bytes) -> tuple[dict[str, Any], bytes, bool, bytes] | None:
    assert READER.reads
    request = READER.read(raw, CLIENT)
    if request is None:
        return None
    environ = READER.environ(request, Connection)
    return environ, environ["wsgi.input"].read(), request.should_close(), request.rest


def compared(found: tuple[dict[str, Any], bytes, bool, bytes]) -> Any:
    environ, *rest = found
    return {name: value for name, value in environ.items() if name not in NOT_COMPARED}, *rest


@pytest.mark.parametrize("raw", USUAL)
def test_a_usual_request_is_read_as_gunicorn_reads_it(raw: bytes) -> None:
    ours = by_us(raw)
    assert ours is not None
    assert compared(ours) == compared(by_gunicorn(raw))


@pytest.mark.parametrize("raw", UNUSUAL, ids=lambda raw: repr(raw[:100]))
def test_whatever_is_unusual_is_left_for_gunicorn(raw: bytes) -> None:
    assert by_us(raw) is None


def test_no_damaged_request_is_read_otherwise_than_gunicorn_reads_it() -> None:
    chance = random.Random(7)
    whole = [*USUAL, *UNUSUAL]
    pieces = [b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"\x0b", b"\x80", b"/", b"#", b"?", b"%", b"0", b"-1", b"Host: b\r\n"]
    pieces += [
        b"Content-Length: 1\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"X_Y: z\r\n",
        b"\xc2\xa0",
        b"[",
        b"]",
        b"\\",
        b";",
    ]
    read = 0
    for _ in range(20_000):
        raw = chance.choice(whole)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(raw) + 1)
            raw = raw[:at] + chance.choice((b"", chance.choice(pieces))) + raw[at + chance.choice((0, 0, 1, 2)) :]
        ours = by_us(raw)
        if ours is not None:
            read += 1
            assert compared(ours) == compared(by_gunicorn(raw)), raw
    assert read > 1000


def test_only_a_trusted_proxy_says_that_the_client_came_by_https() -> None:
    raw = USUAL[-3]
    for address, scheme in (("127.0.0.1", "https"), ("192.0.2.1", "http")):
        request = READER.read(raw, (address, 1))
        assert request is not None and request.scheme == scheme


def test_nothing_is_read_where_gunicorn_was_told_to_read_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("limit_request_fields", 5), ("header_map", "refuse"), ("proxy_protocol", True), ("casefold_http_method", True)):
        cfg = config()
        cfg.set(name, value)
        assert not gunicorn_request.Reader(cfg).reads, name
    monkeypatch.setenv("SCRIPT_NAME", "/below")
    assert not gunicorn_request.Reader(config()).reads
    assert gunicorn_request.Reader(config()).read(b"GET / HTTP/1.1\r\n\r\n", "a socket's path") is None


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        ("200 OK", [("content-type", "text/plain"), ("content-length", "5")], [b"hello"]),
        ("200 OK", [("content-type", "text/plain"), ("Content-Length", "5")], [b"hello", b" and more"]),
        ("200 OK", [("content-type", "text/plain")], [b"hello", b"", b"you"]),
        ("200 OK", [("x-y", " \u00e9\t"), ("content-length", "0")], []),
        ("200 OK", [("x-y", " \u00e9 "), ("connection", "close"), ("keep-alive", "1"), ("content-length", "0")], []),
        ("204 No Content", [("content-length", "0")], []),
        ("304 Not Modified", [("etag", '"1"')], []),
    ],
)
def test_an_answer_is_written_as_gunicorn_writes_it(
    method: str, status: str, headers: list[tuple[str, str]], body: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util, "http_date", lambda timestamp=None: "Mon, 23 Nov 2026 00:00:00 GMT")
    gunicorn_request._date.cache_clear()
    said = []
    for kind in (wsgi.Response, gunicorn_request.Response):
        raw = method.encode() + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        wire = Wire()
        response = kind(READER.read(raw, CLIENT), wire, CONFIG)
        response.start_response(status, headers)
        for piece in body:
            response.write(piece)
        response.close()
        said.append((wire.said, response.should_close()))
    gunicorn_request._date.cache_clear()
    assert said[0] == said[1]


@pytest.mark.parametrize("header", [("x", "a\r\nb"), ("x", "a\x00"), ("x\r\ny", "a"), ("x y", "a"), ("", "a"), ("content-length", "many")])
def test_no_answer_has_a_header_that_gunicorn_would_not_send(header: tuple[str, str]) -> None:
    request = READER.read(USUAL[0], CLIENT)
    for kind in (wsgi.Response, gunicorn_request.Response):
        with pytest.raises(Exception, match=r".") as error:
            kind(request, Wire(), CONFIG).start_response("200 OK", [("content-type", "text/plain"), header])
        assert error.type.__name__ in (
            "InvalidHeader",
            "InvalidHeaderName",
            "InvalidResponseHeader",
            "InvalidResponseHeaderName",
            "ValueError",
        )
