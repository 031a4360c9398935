"""Outgoing requests, against real servers that misbehave: each ends in time, in size, and at no address that is not public."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import itertools
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Running
from test_email_send import CERTIFICATE

from jobsys import Job, outgoing
from jobsys.errors import SettingsError
from jobsys.job_types import registry
from jobsys.jobs import ingestion, settings
from jobsys.outgoing import Answer, Refused, get, is_public, names_private_address
from jobsys.settings import Settings

Says = Callable[[str], Iterator[bytes]]


class Server(socketserver.ThreadingTCPServer):
    """Answers each request with the bytes that `says(path)` yields, for as long as somebody takes them."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, says: Says, *, address: tuple[str, int] = ("127.0.0.1", 0), tls: ssl.SSLContext | None = None) -> None:
        self.says, self.tls = says, tls
        self.requests: list[str] = []
        self.names: list[Any] = []
        if tls is not None:
            tls.sni_callback = lambda _socket, name, _context: self.names.append(name)
        self.closing = threading.Event()
        super().__init__(address, Exchange)
        self.port = self.server_address[1]
        self.url = f"{'https' if tls else 'http'}://localhost:{self.port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that trusts no certificate, or has had enough


class Exchange(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        connection = self.server.tls.wrap_socket(self.request, server_side=True) if self.server.tls else self.request
        with contextlib.suppress(OSError), connection:
            request = b""
            while b"\r\n\r\n" not in request and (more := connection.recv(65536)):
                request += more
            self.server.requests.append(request.decode())
            for part in self.server.says(request.decode().split(" ")[1]):
                connection.sendall(part)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """`serve(says)`: a server that answers so."""
    with contextlib.ExitStack() as servers:
        yield lambda says, **options: servers.enter_context(contextlib.closing(Server(says, **options)))


def ask(url: str, **options: Any) -> Answer:
    return get(url, **{"most_bytes": 100_000, "timeout": 1.0, "total": 2.0, "allow_private": True, **options})


def answer(body: bytes = b"{}", *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(to: str) -> bytes:
    return answer(b"", f"Location: {to}", status="302 Found")


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),  # private
        *("127.0.0.1", "127.255.0.9", "::1"),  # loopback
        *("169.254.169.254", "fe80::1", "fe80::1%eth0"),  # link-local, and there the metadata of clouds
        *("100.64.0.1", "100.127.255.255"),  # carrier-grade NAT
        *("224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"),  # multicast
        *("0.0.0.0", "0.1.2.3", "::", "240.0.0.1", "255.255.255.255", "192.0.0.8", "192.0.2.1", "198.18.0.1", "192.88.99.1"),
        *("fc00::1", "fd12:3456::1", "fec0::1", "100::1", "2001:db8::1", "5f00::1", "4000::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::169.254.169.254"),  # IPv4 as IPv6
        *("2002:7f00:1::1", "2002:a9fe:a9fe::1", "2001:0:7f00:1::1"),  # 6to4, Teredo
        *("64:ff9b::7f00:1", "64:ff9b::10.0.0.1", "64:ff9b:1::a00:1"),  # NAT64
    ],
)
def test_an_address_of_somebodys_own_net_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_an_address_on_the_internet_is_public(address: str) -> None:
    assert is_public(address)


HOSTS = ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]", "localhost"]


@pytest.mark.parametrize("host", [*HOSTS, "LOCALHOST.", "10.0.0.1", "169.254.169.254", "[64:ff9b::a9fe:a9fe]"])
def test_a_setting_that_names_such_an_address_is_refused_at_the_start(host: str) -> None:
    url = f"http://{host}:8080/{{id}}"
    with pytest.raises(
        SettingsError, match=r"^INGEST_URL: names an address that is not public: set INGEST_ALLOW_PRIVATE=1 if that is meant$"
    ):
        Settings(_env_file=None, ingest_url=url)
    assert Settings(_env_file=None, ingest_url=url, ingest_allow_private=True).ingest_url == url


@pytest.mark.parametrize(
    "host", ["example.org", "8.8.8.8", "[2606:4700::1111]", "cafe.org", "0xcafe.example", "{id}.example.org", "10.example"]
)
def test_a_setting_that_names_another_host_is_not(host: str) -> None:
    assert not names_private_address(f"https://{host}/{{id}}")
    Settings(_env_file=None, ingest_url=f"https://{host}/{{id}}")


@pytest.mark.parametrize("host", [*HOSTS[:-1], "①②⑦.0.0.1", "127。0。0。1", "localhost"])
def test_what_is_not_public_is_not_connected_to_however_it_is_written(serve: Callable[..., Server], host: str) -> None:
    server = serve(lambda path: iter([answer()]))
    with pytest.raises(Refused, match="is not a public address"):
        ask(f"http://{host}:{server.port}/", allow_private=False)
    assert server.requests == []


def test_where_it_is_allowed_it_is(serve: Callable[..., Server]) -> None:
    server = serve(lambda path: iter([answer(b"[1]", "Content-Type: application/json; charset=latin-1")]))
    assert ask(server.url + "/items/1?x=y#z") == (b"[1]", "application/json", "latin-1")
    (request,) = server.requests
    assert request.startswith("GET /items/1?x=y HTTP/1.1\r\n") and f"\r\nHost: localhost:{server.port}\r\n" in request
    assert "\r\nAccept-Encoding: identity\r\n" in request


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`resolve(answers…)`: names lead to the next of these lists of addresses; 127.0.0.1 counts as public, no other does. Returns
    the names asked for."""

    def use(*answers: list[str]) -> list[str]:
        asked: list[str] = []
        rest = iter(answers)

        def lookup(host: str, port: int, **_: Any) -> list[Any]:
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(rest)]

        monkeypatch.setattr(outgoing.socket, "getaddrinfo", lookup)
        monkeypatch.setattr(outgoing, "is_public", lambda address: address == "127.0.0.1")
        return asked

    return use


def test_a_name_that_leads_elsewhere_the_second_time_is_asked_once(serve: Callable[..., Server], resolve: Callable[..., list[str]]) -> None:
    good = serve(lambda path: iter([answer(b"good")]))
    asked = resolve(["127.0.0.1"], ["127.0.0.2"])
    assert ask(f"http://rebind.example:{good.port}/", allow_private=False).body == b"good"
    assert asked == ["rebind.example"] and f"\r\nHost: rebind.example:{good.port}\r\n" in good.requests[0]


def test_of_several_addresses_only_public_ones_are_tried(serve: Callable[..., Server], resolve: Callable[..., list[str]]) -> None:
    good = serve(lambda path: iter([answer(b"good")]))
    evil = serve(lambda path: iter([answer(b"evil")]), address=("127.0.0.2", good.port))
    resolve(["127.0.0.2", "127.0.0.1"], ["127.0.0.2"])
    assert ask(f"http://two.example:{good.port}/", allow_private=False).body == b"good"
    with pytest.raises(Refused, match=r"two.example is 127.0.0.2, which is not a public address"):
        ask(f"http://two.example:{good.port}/", allow_private=False)
    assert evil.requests == []


def test_each_redirect_is_judged_anew(serve: Callable[..., Server], resolve: Callable[..., list[str]]) -> None:
    inner = serve(lambda path: iter([answer(b"the keys")]), address=("127.0.0.2", 0))
    outer = serve(lambda path: iter([redirect(f"http://inner.example:{inner.port}/latest/meta-data/")]))
    resolve(["127.0.0.1"], ["127.0.0.2"])
    with pytest.raises(Refused, match=r"inner.example is 127.0.0.2, which is not a public address"):
        ask(f"http://outer.example:{outer.port}/", allow_private=False)
    assert inner.requests == [] and len(outer.requests) == 1


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("file:///etc/passwd", "not http or https"),
        ("ftp://localhost/x", "not http or https"),
        ("gopher://localhost/x", "not http or https"),
        ("http://user:hush@localhost/", "must not hold a user or password"),
        ("http://good.example\\@localhost/", "must not hold a user or password"),
        ("http://:80/x", "needs a host"),
        ("http://[::1/", "Invalid IPv6 URL"),
        ("http://localhost:99999/", "Port out of range"),
        (f"http://{'a' * 64}.example/", "not the name of a host"),
    ],
)
def test_a_redirect_that_is_none_is_not_followed(serve: Callable[..., Server], location: str, complaint: str) -> None:
    server = serve(lambda path: iter([redirect(location)]))
    with pytest.raises((OSError, ValueError), match=complaint) as failure:
        ask(server.url)
    assert "hush" not in str(failure.value)


def test_redirects_end(serve: Callable[..., Server]) -> None:
    server = serve(lambda path: iter([redirect(path + "x")]))
    with pytest.raises(OSError, match="more than 5 redirects"):
        ask(server.url + "/")
    assert len(server.requests) == 6


def test_a_redirect_with_odd_letters_is_followed(serve: Callable[..., Server]) -> None:
    server = serve(lambda path: iter([redirect("/caf\u00e9 x?y=z w").decode().encode("latin-1") if path == "/" else answer(path.encode())]))
    assert ask(server.url + "/").body == b"/caf%C3%A9%20x?y=z%20w"


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([HEAD + b"\r\n", itertools.repeat(b"x" * 65536)], "longer than 100,000 bytes"),
        ([CHUNKED, itertools.repeat(b"4\r\nabcd\r\n" * 1000)], "longer than 100,000 bytes"),
        ([CHUNKED + b"7fffffffffffffff\r\n", itertools.repeat(b"x" * 65536)], "longer than 100,000 bytes"),
        ([HEAD + b"Content-Length: 9999999999999999\r\n\r\n", itertools.repeat(b"x" * 65536)], "longer than 100,000 bytes"),
        ([CHUNKED + b"1;", itertools.repeat(b"x" * 65536)], "chunk|line"),
        ([CHUNKED + b"0\r\n", itertools.repeat(b"a: b\r\n" * 1000)], "timed out|trailer"),
        ([HEAD, itertools.repeat(b"a: b\r\n" * 1000)], "more than 100 headers"),
        ([HEAD + b"a: ", itertools.repeat(b"x" * 65536)], "header line"),
        ([itertools.repeat(b"x" * 65536)], "status line|Remote|xxx"),
        ([itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)], "timed out"),
        ([answer(gzip.compress(b"\0" * 50_000_000, 1)[:1000], "Content-Encoding: gzip")], 'content encoding "gzip"'),
        ([HEAD + b"Content-Length: 100\r\n\r\nbreaks off"], "IncompleteRead"),
        ([CHUNKED + b"64\r\nbreaks off"], "IncompleteRead"),
        ([HEAD + b"Content-Le"], "broke off in its header"),
        ([b""], "closed connection without response"),
        ([b"220 mail.example ESMTP\r\n"], "220 mail"),
        ([answer(b"", status="500 Oops")], "HTTP 500 Oops"),
        ([answer(b"", status="204 No Content").replace(b"204", b"304")], "HTTP 304"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value,
)
def test_an_answer_that_is_endless_or_none_is_an_error_soon(serve: Callable[..., Server], parts: list[Any], complaint: str) -> None:
    def says(_path: str) -> Iterator[bytes]:
        for part in parts:
            yield from [part] if isinstance(part, bytes) else part

    with pytest.raises((OSError, http.client.HTTPException), match=complaint):
        ask(serve(says).url, total=0.5)


@pytest.mark.parametrize("begins", [b"", HEAD, HEAD + b"\r\n"], ids=["status", "header", "body"])
def test_a_slow_drip_ends_when_the_whole_time_is_over(serve: Callable[..., Server], begins: bytes) -> None:
    def says(_path: str) -> Iterator[bytes]:
        yield begins
        while not server.closing.wait(0.05):
            yield b"1"

    server = serve(says)
    with pytest.raises(TimeoutError, match="timed out"):
        ask(server.url, timeout=10.0, total=0.4)


def test_a_drip_of_redirects_ends_then_too(serve: Callable[..., Server]) -> None:
    def says(path: str) -> Iterator[bytes]:
        server.closing.wait(0.15)
        yield redirect(path + "x")

    server = serve(says)
    with pytest.raises(TimeoutError, match="timed out"):
        ask(server.url + "/", total=0.4)


def test_a_server_that_takes_no_connection_is_waited_for_only_so_long() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as crowd:
            for _ in range(4):
                other = crowd.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(full.getsockname())
            with pytest.raises(TimeoutError, match="timed out"):
                ask(f"http://127.0.0.1:{full.getsockname()[1]}/", timeout=0.2)


# --- TLS


@pytest.fixture
def secure(serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Says], Server]]:
    """`secure(says)`: a server with the certificate of localhost, which is trusted."""
    file = tmp_path / "certificate.pem"
    file.write_text(CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    outgoing._context.cache_clear()

    def start(says: Says) -> Server:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(file)
        return serve(says, tls=context)

    yield start
    outgoing._context.cache_clear()


def test_https_asks_for_the_name_and_checks_the_certificate(
    secure: Callable[[Says], Server], resolve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = secure(lambda path: iter([answer(b"safe")]))
    assert ask(server.url).body == b"safe" and server.names == ["localhost"]
    resolve(["127.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError, match=r"elsewhere.example"):
        ask(f"https://elsewhere.example:{server.port}/", allow_private=False)
    monkeypatch.undo()
    outgoing._context.cache_clear()
    with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed certificate|self signed certificate"):
        ask(server.url)
    assert len(server.requests) == 1


def test_a_redirect_from_https_to_http_is_not_followed(secure: Callable[[Says], Server], serve: Callable[..., Server]) -> None:
    plain = serve(lambda path: iter([answer()]))
    with pytest.raises(Refused, match="from https to http"):
        ask(secure(lambda path: iter([redirect(f"http://localhost:{plain.port}/")])).url)
    assert plain.requests == []
    up = secure(lambda path: iter([redirect("/b") if path == "/" else answer(b"there")]))
    assert ask(up.url + "/").body == b"there"


def test_a_server_that_begins_tls_and_says_no_more_is_waited_for_only_so_long(serve: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(TimeoutError, match="timed out"):
        ask(f"https://localhost:{mute.getsockname()[1]}/", timeout=0.2)


# --- as a job


def test_proxies_of_the_environment_see_nothing(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, server = serve(lambda path: iter([answer(b"proxy")])), serve(lambda path: iter([answer(b"direct")]))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(server.url).body == b"direct" and proxy.requests == []


def test_a_worker_fails_the_job_clearly_and_goes_on(
    serve: Callable[..., Server], system: Any, start_worker: Callable[..., Running]
) -> None:
    def says(path: str) -> Iterator[bytes]:
        if path == "/1":
            yield HEAD + b"\r\n"
            yield from itertools.repeat(b"x" * 65536)
        yield answer(b'{"n": 2}', "Content-Type: application/json")

    server = serve(says)
    start_worker(INGEST_URL=f"{server.url}/{{id}}", INGEST_ALLOW_PRIVATE="1", INGEST_RATE="0")
    endless = system.submit("INGEST_BATCH", {"ids": [1]}, max_retries=0)
    fine = system.submit("INGEST_BATCH", {"ids": [2]})
    assert system.wait(fine.id, 15).result == {"results": [{"id": 2, "data": {"n": 2}}]}
    failed = system.wait(endless.id, 15)
    assert failed.status == "FAILED" and "1: the answer is longer than 1,000,000 bytes" in failed.error["message"]


def test_a_batch_asks_nobody_at_an_address_that_is_not_public(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = serve(lambda path: iter([answer(b"inner")]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INGEST_URL", f"http://inner.example:{server.port}/{{id}}")
    monkeypatch.setattr(ingestion, "PAUSES", ())
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))]
    monkeypatch.setattr(outgoing.socket, "getaddrinfo", lambda *_, **__: found)
    run = registry.load().types["INGEST_BATCH"].run
    try:
        settings.cache_clear()
        with pytest.raises(RuntimeError, match=r"1: inner.example is 127.0.0.1, which is not a public address"):
            run('{"ids": [1]}', Job())
        assert server.requests == []
        monkeypatch.setenv("INGEST_ALLOW_PRIVATE", "1")
        settings.cache_clear()
        assert run('{"ids": [1]}', Job()) == {"results": [{"id": 1, "data": "inner"}]}
    finally:
        settings.cache_clear()
