"""gunicorn's threaded worker, for which a slow client costs little, and a fast one less.

As it comes, a client that has connected and says nothing, or stops in the middle of a request, holds a thread: a few of them stop the
service. And a connection that ends badly is closed in the thread that accepts all others, up to 2 s each. Here a thread is
taken only once something has arrived, a request must arrive at a decent pace, and each thread closes its own connections.

As it comes, one thread also hands each request to another and takes the connection back, and both want the interpreter's lock for it.
Here the threads themselves wait for the next request, of whichever connection.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import select
import selectors
import socket
import sys
import threading
import time
from typing import Any

from gunicorn import util
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn, ThreadWorker

PATIENCE, HURRY = 4.0, 1.5
"""Seconds a request may take to arrive while other threads are free, and while none is…"""
PACE = 20_000
"""…and the bytes that earn it one second more."""
LONGEST_SEND = 60.0
"""Seconds one piece of an answer may take to leave."""
LINGER = 0.5
"""Seconds to wait, before closing, for a client that still sends: closing at once would cost it the answer."""


class PatientSocket(socket.socket):
    """A connection whose `deadline` (of the monotonic clock) ends every wait for the client; what arrives puts it off."""

    deadline = math.inf
    late = False

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Like socket.recv. Raises TimeoutError at the deadline, with an errno that gunicorn passes over in silence."""
        self.settimeout(max(0.001, self.deadline - time.monotonic()) if self.deadline < math.inf else None)
        try:
            data = super().recv(size, flags)
        except TimeoutError:
            self.late = True
            raise TimeoutError(errno.ECONNRESET, "the request did not arrive in time") from None
        self.settimeout(LONGEST_SEND)
        self.deadline += len(data) / PACE
        return data


if sys.platform == "linux":

    class Readable:
        """Says of each watched descriptor once, and to one thread, that it has something to read."""

        ONCE = select.EPOLLIN | select.EPOLLONESHOT

        def __init__(self) -> None:
            self._epoll = select.epoll()

        def watch(self, descriptor: int) -> None:
            try:
                self._epoll.modify(descriptor, self.ONCE)
            except FileNotFoundError:
                self._epoll.register(descriptor, self.ONCE)

        def next(self) -> int:
            [(descriptor, _)] = self._epoll.poll(None, 1)
            return descriptor

else:

    class Readable:
        """The same by kqueue."""

        def __init__(self) -> None:
            self._kqueue = select.kqueue()

        def watch(self, descriptor: int) -> None:
            once = select.kevent(descriptor, select.KQ_FILTER_READ, select.KQ_EV_ADD | select.KQ_EV_ONESHOT)
            self._kqueue.control([once], 0)

        def next(self) -> int:
            [event] = self._kqueue.control([], 1, None)
            return int(event.ident)


class Idle:
    """Connections that wait for a request of their client's. Each thread takes for itself one that has something to read."""

    def __init__(self) -> None:
        self._readable = Readable()
        self._connections: dict[int, TConn] = {}
        """By file descriptor, in the order in which they became idle."""

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: TConn) -> None:
        """Wait for its next request."""
        connection.set_timeout()
        descriptor = connection.sock.fileno()
        # In this order, and from here on the connection may be another thread's: should it be closed meanwhile, there is nothing to watch.
        self._connections[descriptor] = connection
        with contextlib.suppress(OSError):
            self._readable.watch(descriptor)

    def take(self) -> TConn:
        """Wait until one of them has something to read; it is the caller's then."""
        while True:
            connection = self._connections.pop(self._readable.next(), None)
            if connection is not None:
                return connection

    def take_late(self, moment: float) -> list[TConn]:
        """Those whose time for another request is over at that moment, and that have sent none; they are the caller's then."""
        late = dict(itertools.takewhile(lambda each: each[1].timeout <= moment, list(self._connections.items())))
        arrived = select.poll()
        for descriptor in late:
            arrived.register(descriptor, select.POLLIN)
        for descriptor, _ in arrived.poll(0) if late else ():
            del late[descriptor]  # a thread takes it as soon as one is free
        return [connection for descriptor in late if (connection := self._connections.pop(descriptor, None)) is not None]


class PatientWorker(ThreadWorker):
    """The worker class of `gunicorn_conf`. The main thread accepts, and closes what stays idle for too long; the others serve."""

    def accept(self, listener: Any) -> None:
        try:
            accepted, address = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        client = PatientSocket(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        connection = TConn(self.cfg, client, address, listener.getsockname())
        connection.data_ready = True  # by the time a thread takes it
        self._count_connections(1)
        self.keepalived_conns.add(connection)

    def run(self) -> None:
        self._counting = threading.Lock()
        self.keepalived_conns = Idle()  # gunicorn has a deque of this name, and looks at its length
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        for _ in range(self.cfg.threads):
            threading.Thread(target=self._serve, name="jobsys web", daemon=True).start()
        while self.alive and self.is_parent_alive():
            self.notify()
            self.set_accept_enabled(self.nr_conns < self.worker_connections)
            self.wait_for_and_dispatch_events(1.0)
            self._close_late(time.monotonic())
        self.set_accept_enabled(False)
        began = time.monotonic()
        while self.nr_conns > 0 and time.monotonic() < began + self.cfg.graceful_timeout:
            self.notify()
            # Who was promised that the connection stays may be sending the next request; it is answered with "Connection: close".
            self._close_late(time.monotonic() if time.monotonic() < began + STOP_KEEPALIVE_LINGER else math.inf)
            self.wait_for_and_dispatch_events(0.1)
        for listener in self.sockets:
            listener.close()

    def handle(self, conn: TConn) -> Any:
        taken = self.nr_conns - len(self.keepalived_conns)
        conn.sock.deadline = time.monotonic() + (PATIENCE if taken < self.cfg.threads else HURRY)
        keep = super().handle(conn)
        if keep is False and not conn.sock.late:
            conn.sock.deadline = time.monotonic() + LINGER
            util.close_graceful(conn.sock, timeout=LINGER)
        return keep

    def _serve(self) -> None:
        while True:
            connection = self.keepalived_conns.take()
            try:
                # Of a client that doesn't wait for answers, the next request may have been read along with this one.
                while (keep := self.handle(connection)) and connection.parser.unreader.buf.getvalue():
                    pass
                if keep:
                    self.keepalived_conns.add(connection)
                    continue
            except BaseException:  # also SystemExit: the thread has others to serve
                self.log.exception("a connection ended badly")
            self._end(connection)

    def _end(self, connection: TConn) -> None:
        connection.close()
        self._count_connections(-1)
        if not self._accepting:
            self.method_queue.defer(lambda: None)  # the main thread may accept again, or end

    def _close_late(self, moment: float) -> None:
        for connection in self.keepalived_conns.take_late(moment):
            self._end(connection)

    def _count_connections(self, change: int) -> None:
        with self._counting:
            self.nr_conns += change


def _write_problem(client: socket.socket, status: int, reason: str, message: str) -> None:
    """What gunicorn answers to what is no HTTP request: an error of the same shape as ours, not its page of HTML."""
    document = {"type": "about:blank", "title": reason, "status": status, "detail": message or reason}
    data = json.dumps(document).encode()
    head = f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/problem+json\r\nContent-Length: {len(data)}"
    util.write_nonblock(client, f"{head}\r\n\r\n".encode("latin-1") + data)


util.write_error = _write_problem
