"""A TCP proxy in front of PostgreSQL that can be told to misbehave. It speaks no TLS, and passes on what both sides say otherwise."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import quote

import psycopg2.extensions

ENDS_AN_ATTEMPT = (b"finish_jobs(", b"COMMIT", b"insert into jobs")
"""In what a client says, what will be committed when the server has heard it."""


class Proxy:
    """Listens on 127.0.0.1; `url` leads through it. What it is told applies to the connections there are, and to those that come."""

    def __init__(self, url: str) -> None:
        self._target = psycopg2.extensions.parse_dsn(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._links: set[Link] = set()
        self._lock = threading.Lock()
        self.delay = 0.0
        """Seconds each piece takes, either way."""
        self.swallows = False
        """Nothing comes through, and nobody is told: a black hole."""
        self.refuses = False
        """Whoever connects is cut off."""
        self.cuts_commits: Callable[[], bool] = lambda: False
        """Asked at what a client wants to commit: whether the server is to hear it, and the client never to hear the answer."""
        self.mutes_notifications = False
        threading.Thread(target=self._accept, name="chaos proxy", daemon=True).start()

    @property
    def url(self) -> str:
        """The same database, through the proxy."""
        user, name = quote(self._target.get("user", "postgres"), safe=""), quote(self._target.get("dbname", "postgres"), safe="")
        password = f":{quote(self._target['password'], safe='')}" if self._target.get("password") else ""
        return f"postgresql://{user}{password}@127.0.0.1:{self.port}/{name}?sslmode=disable&gssencmode=disable"

    def cut(self, which: Callable[[Link], bool] = lambda link: True) -> int:
        """Cut connections; how many."""
        with self._lock:
            chosen = [link for link in self._links if which(link)]
        for link in chosen:
            link.cut()
        return len(chosen)

    def close(self) -> None:
        """Listen no more, and cut what there is."""
        self.refuses = True
        self._listener.close()
        self.cut()

    def __len__(self) -> int:
        """How many connections there are."""
        with self._lock:
            return len(self._links)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), name="chaos link", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.closing(client):
            if self.refuses:
                return
            try:
                server = self._connect()
            except OSError:
                return
            link = Link(self, client, server)
            with self._lock:
                self._links.add(link)
            with contextlib.closing(server):
                link.pump()
                link.cut()
            with self._lock:
                self._links.discard(link)

    def _connect(self) -> socket.socket:
        host, port = self._target.get("host") or "127.0.0.1", int(self._target.get("port") or 5432)
        if not host.startswith("/"):
            return socket.create_connection((host, port), 5)
        local = socket.socket(socket.AF_UNIX)
        local.connect(f"{host}/.s.PGSQL.{port}")
        return local


class Link:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.listens = False
        """Whether the client has said LISTEN."""
        self.server = server
        self._proxy = proxy
        self._client = client
        self._cut_at: float | None = None
        self._answers = Messages()

    def cut(self) -> None:
        """End it for both sides."""
        for end in (self._client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def pump(self) -> None:
        """Pass on what comes, until one side ends."""
        with contextlib.suppress(OSError, ValueError):
            while True:
                if self._cut_at is not None and time.monotonic() >= self._cut_at:
                    return
                ready = select.select([self._client, self.server], [], [], 0.05)[0]
                for end in ready:
                    if self._proxy.swallows:
                        time.sleep(0.05)
                        continue
                    data = end.recv(65536)
                    if not data:
                        return
                    time.sleep(self._proxy.delay)
                    if end is self._client:
                        self._from_client(data)
                    elif self._cut_at is None:
                        self._client.sendall(self._answers.whole(data, notifications=not self._proxy.mutes_notifications))

    def _from_client(self, data: bytes) -> None:
        self.listens = self.listens or b"listen jobsys" in data
        if any(words in data for words in ENDS_AN_ATTEMPT) and self._cut_at is None and self._proxy.cuts_commits():
            self._cut_at = time.monotonic() + 0.1  # the server has it, and has answered into the void
        self.server.sendall(data)


class Messages:
    """What a server says, as messages of PostgreSQL's protocol: a letter, a length, and so much."""

    def __init__(self) -> None:
        self._rest = b""

    def whole(self, data: bytes, *, notifications: bool) -> bytes:
        """The whole messages there are by now; those of NOTIFY only if they are to be heard."""
        self._rest += data
        passed: list[bytes] = []
        while len(self._rest) >= 5:
            length = 1 + int.from_bytes(self._rest[1:5], "big")
            if len(self._rest) < length:
                break
            message, self._rest = self._rest[:length], self._rest[length:]
            if notifications or message[:1] != b"A":
                passed.append(message)
        return b"".join(passed)
