"""gunicorn's threaded worker, for which a slow client costs little, and a fast one less.

As it comes, a client that has connected and says nothing, or stops in the middle of a request, holds a thread: a few of them stop the
service. And a connection that ends badly is closed in the thread that accepts all others, up to 2 s each. Here a thread is
taken only once a request has arrived, as far as it is not large; it must arrive at a decent pace; and no thread waits for a client to
close its connection.

As it comes, one thread also hands each request to another and takes the connection back, and both want the interpreter's lock for it.
Here the threads themselves wait for the next request, of whichever connection.

And an application may say that it will answer later, or that its answer is to be sent later (`Exchange`). No thread waits for that either.

As it comes, whichever process looks first accepts all who come at once; clients that keep their connections stay with it, and the other
processes have nothing to do. Here each leaves those who come to the processes that have fewer (`Loads`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import mmap
import os
import re
import select
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from gunicorn import util
from gunicorn.http import wsgi
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn, ThreadWorker

from jobsys import gunicorn_request
from jobsys.api.envelope import HEADERS, UNLESS_SET
from jobsys.ids import new_request_id

PATIENCE, HURRY = 4.0, 1.5
"""Seconds a request may take to arrive; and what is left of a large one when a thread has begun to read it, while none other is free…"""
PACE = 20_000
"""…and the bytes that earn it one second more."""
AHEAD = 64 * 1024
"""Bytes of a request that are waited for without a thread. A body that says it is longer is the application's to read, or to refuse: of
these, which may take long to come and long to be understood, as many are served at a time as half of the threads."""
LONGEST_SEND = 60.0
"""Seconds that an answer which waits may go without its client's taking any of it."""
KEPT, KEPT_IN_ALL = 2 * 1024**2, 64 * 1024**2
"""Bytes of one answer, and of all, that wait for their clients while no thread does. For what is more, a thread…"""
PIECE, LONGEST_PIECE = 256 * 1024, 4.0
"""…waits, and each so many bytes may take LONGEST_SEND to leave, or so many seconds where half of the threads are taken."""
LINGER = 0.5
"""Seconds to wait, before closing, for a client that still sends: closing at once would cost it the answer."""
ROOM = 20
"""When there are as many connections as may be, one in so many is closed for others to come: of those that wait for a request."""
LEAVES_TO_OTHERS, IN_VAIN = 0.03, 0.1
"""Seconds for which who comes is left to processes with fewer connections; and for which none is, after one that they did not take."""
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_EXPECTS = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*(?=\r\n)", re.IGNORECASE)


class Exchange:
    """A request that may be answered later: what is `jobsys.exchange` in its environ.

    While the application answers, it can `postpone`. What it has answered then is not sent; from then on a thread calls `proceed` after
    each `wake`, after what was sent has left, and once `over` is true: the client has gone, or the server ends. `proceed` either
    answers, or sends a piece, or does nothing yet.

    Or it can `hold` what it is about to answer until `release`. Then `proceed` is called once, and may answer otherwise.
    """

    over = False
    held = False
    proceed: Callable[[], None] | None = None
    # What follows is the server's. (Few requests need any of it, so it is the class's until then.)
    connection: TConn = None
    descriptor = -1
    ended = False
    woken = False
    stuck_since = math.inf
    _status = ""
    keeps = False

    def __init__(self, worker: PatientWorker, start_response: Callable[..., Any]) -> None:
        self._worker = worker
        self._start = start_response

    @classmethod
    def with_rest_of_answer(cls, worker: PatientWorker, connection: TConn, stays: bool) -> Exchange:
        """What is left of an exchange that is over but for the client, which has not taken all of its answer yet."""
        exchange = cls(worker, util.write)
        exchange.ended, exchange.keeps = True, stays
        exchange.connection, exchange.descriptor = connection, connection.sock.fileno()
        exchange.unsent, exchange.stuck_since = connection.sock.take_unsent(), time.monotonic()
        worker.count_postponed(1)
        return exchange

    def postpone(self, proceed: Callable[[], None]) -> bool:
        """Answer later. False: there are too many of these already, or the server ends; then answer now."""
        if type(self._response) not in (wsgi.Response, gunicorn_request.Response) or not self._worker.may_postpone():
            return False
        self.proceed = proceed
        self.unsent = bytearray()
        return True

    def hold(self, proceed: Callable[[], None]) -> bool:
        """Have what is answered now sent after `release`. False: that can't be; it is sent at once."""
        if type(self._response) is not gunicorn_request.Response or self._response.sock.is_large:
            return False
        self.held, self.proceed = True, proceed
        self._parties = itertools.count()
        return True

    def unhold(self) -> None:
        """Have it sent at once after all. Not after `release`."""
        self.held, self.proceed = False, None

    def release(self) -> None:
        """What is held may be sent. May be said by any thread, at any time, once; if all was said by then, this thread sends it."""
        if next(self._parties):
            self._worker.end_held(self)

    def wake(self) -> None:
        """Have `proceed` called. May be said by any thread, at any time."""
        self._worker.keepalived_conns.wake(self)

    def answer(self, body: bytes, status: str | None = None, headers: Iterable[tuple[str, str | None]] = ()) -> None:
        """The whole answer: as it was begun, but with this status, these headers (None: without it) and this body."""
        changed = {name.lower(): (name, value) for name, value in (*headers, ("Content-Length", str(len(body))))}
        kept = [header for header in self._headers if header[0].lower() not in changed]
        if self.held:
            self.connection.sock.take_unsent()
            self._start = gunicorn_request.Response(self._response.req, self.connection.sock, self._response.cfg).start_response
        if not self._worker.alive:
            self._response.force_close()
        self._start(status or self._status, [*kept, *(header for header in changed.values() if header[1] is not None)])
        self.ended = True
        self.connection.sock.collects = True
        self._response.write(b"" if self._response.req.method == "HEAD" else body)
        self._response.close()
        self.connection.sock.collects = False
        self.keeps = not self._response.should_close()

    def send(self, piece: bytes) -> None:
        """A piece of an answer of unknown length. The next one is due after this one has left, when `proceed` is called again."""
        if self._response.status is None:
            self._response.force_close()
            self._response.sock = self
            self._start(self._status, [header for header in self._headers if header[0].lower() != "content-length"])
        self._response.write(piece)

    def end(self) -> None:
        """The end of what was sent in pieces."""
        self.ended = True
        if self._response.status is not None:
            self._response.close()

    # The server's side

    @property
    def _response(self) -> Any:
        return self._start.__self__  # type: ignore[attr-defined]

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """WSGI's; what is answered later is kept."""
        self._status, self._headers = status, headers
        if self.held or self.proceed is None:
            return self._start(status, headers, exc_info)
        return self._response.write

    def refused_after_all(self) -> bool:
        """Whether the application postponed its answer and then met an error, which is its answer."""
        if self._status.startswith("2"):
            return False
        self.proceed = None
        self._worker.count_postponed(-1)
        self._start(self._status, self._headers)
        return True

    def sendall(self, data: bytes) -> None:
        """A socket's, for gunicorn to write to: nobody waits for the client here."""
        self.unsent += data

    def flush(self) -> bool:
        """Send what can be sent at once. True: all of it."""
        self.unsent += self.connection.sock.take_unsent()
        if not self.unsent:
            return True
        try:
            while self.unsent:
                del self.unsent[: self.connection.sock.send(self.unsent)]
                self.stuck_since = math.inf
        except BlockingIOError:
            self.stuck_since = min(self.stuck_since, time.monotonic())
            return False
        return True

    def break_promise(self) -> None:
        """What is held says that the connection stays. It does not: the server has been told to end meanwhile."""
        self.keeps, sock = False, self.connection.sock
        sock.unsent = sock.unsent.replace(b"\r\nConnection: keep-alive\r\n", b"\r\nConnection: close\r\n", 1)

    def stays(self) -> bool:
        """Whether the connection, after the answer, is good for another request."""
        return self.keeps and self.connection.sock.reads_on(self.connection.parser)


class Postponed(BaseException):
    """Carries an Exchange past all of gunicorn's handlers: nothing is answered now."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange


class PatientSocket(socket.socket):
    """A connection whose `deadline` (of the monotonic clock) ends every wait for the client; what arrives puts it off.

    The kernel never blocks it, and it waits by itself: to set a timeout for each call anew takes longer than the call, and gives the
    interpreter's lock away each time.
    """

    deadline = math.inf
    arrived = b""
    """What has come and was not read yet."""
    is_large = False
    """Whether what has come is a request of more than AHEAD bytes."""
    lingers = False
    """Whether everything was said, and only its client's end is waited for."""
    unsent = b""
    collects = False
    """Whether what is said is kept until it is all, or much."""
    patience = LONGEST_PIECE
    """For whoever takes an answer, while a thread waits."""
    kept_in_all: Callable[[], int]
    """Of all connections of this process."""

    def setblocking(self, flag: bool) -> None:
        """Nothing, whatever the flag; nor are other timeouts heeded."""

    def settimeout(self, value: float | None) -> None:
        """Nothing."""

    def gettimeout(self) -> float:
        """How long it waits for its client to take something."""
        return self.patience

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Like socket.sendall, but what the client doesn't take at once is kept, as far as it is not much; whoever has this socket then
        has it sent. While it `collects`, a few small pieces are one for the network."""
        rest = memoryview(data)
        if self.collects and len(self.unsent) + len(rest) <= AHEAD:
            self.unsent += rest
            return
        if self.collects and self.unsent:
            rest = memoryview(self.take_unsent() + rest)
        if not self.unsent:
            with contextlib.suppress(BlockingIOError):
                rest = rest[self.send(rest, flags) :]
        size = len(self.unsent) + len(rest)
        if size <= KEPT and (not rest or size + self.kept_in_all() <= KEPT_IN_ALL):
            self.unsent += rest
        else:
            rest = memoryview(self.take_unsent() + rest)
            for start in range(0, len(rest), PIECE):
                self._send_waiting(rest[start : start + PIECE])

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Like socket.sendfile, after all that was kept. (That one doesn't rest while the client takes nothing, on some file systems.)"""
        self._send_waiting(memoryview(self.take_unsent()))
        file.seek(offset)
        sent = 0
        while piece := file.read(PIECE if count is None else min(PIECE, count - sent)):
            self._send_waiting(memoryview(piece))
            sent += len(piece)
        return sent

    def shutdown(self, how: int) -> None:
        """Like socket.shutdown, after all that was collected."""
        with contextlib.suppress(OSError):
            self.send_collected()
        super().shutdown(how)

    def send_collected(self) -> None:
        """All was said. What its client doesn't take at once stays `unsent`."""
        self.collects = False
        if self.unsent:
            with contextlib.suppress(BlockingIOError):
                self.unsent = self.unsent[self.send(self.unsent) :]

    def _send_waiting(self, data: memoryview) -> None:
        end = time.monotonic() + self.patience
        while data:
            try:
                data = data[self.send(data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, end, "the answer was not taken in time")

    def _wait(self, events: int, end: float, why_not: str) -> None:
        """Raises TimeoutError at the end, with an errno that gunicorn passes over in silence."""
        waiter = select.poll()
        waiter.register(self.fileno(), events)
        if not waiter.poll(min(max((end - time.monotonic()) * 1000, 1), 60_000)) and time.monotonic() >= end:
            raise TimeoutError(errno.ECONNRESET, why_not)

    def take_unsent(self) -> bytearray:
        """What was kept, which is the caller's to send now."""
        unsent, self.unsent = bytearray(self.unsent), b""
        return unsent

    def goes_on(self) -> bool:
        """Take in what has come, without waiting. Whether a thread is needed: for a request, or because the client has gone."""
        try:
            data = super().recv(AHEAD)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if not data or self.lingers:
            return not data
        self.arrived += data
        self.deadline = (time.monotonic() + PATIENCE if self.deadline == math.inf else self.deadline) + len(data) / PACE
        return self.has_request()

    def has_request(self) -> bool:
        """Whether a whole request has come, or as much of a large one as is waited for. Who wants to be told to go on is told."""
        head = self.arrived.find(b"\r\n\r\n") + 4
        fields = self.arrived[: head - 2] if head >= 4 else b""
        length = _LENGTH.search(fields)
        if not fields or len(self.arrived) > AHEAD:
            whole = len(self.arrived) > AHEAD
        elif length:
            whole = len(self.arrived) - head >= int(length[1]) or int(length[1]) > AHEAD
        else:
            chunked = b"\r\ntransfer-encoding:" in fields.lower()
            whole = not chunked or self.arrived.endswith(b"\r\n\r\n", head) or b"\r\n0\r\n\r\n" in self.arrived[head:]
        if whole:
            self.deadline = math.inf
            self.is_large = len(self.arrived) > AHEAD or bool(length and int(length[1]) > AHEAD)
        elif _EXPECTS.search(fields) and b" HTTP/1.1\r\n" in fields:
            with contextlib.suppress(OSError):
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                self.arrived = _EXPECTS.sub(b"", fields, 1) + self.arrived[head - 2 :]
        return whole

    def reads_on(self, parser: Any) -> bool:
        """Whether the connection is good for another request: what the application left of the body has come, and is read now."""
        if parser is not None:  # else none was of gunicorn's kind yet
            self.deadline = 0.0
            try:
                if not parser.finish_body(deadline=time.monotonic() + HURRY):
                    return False
            except OSError:
                return False
            self.arrived = parser.unreader.take_buffered() + self.arrived
        self.awaits_request()
        return True

    def awaits_request(self) -> None:
        """From now on, the next one; a part of it may have come."""
        self.deadline = time.monotonic() + PATIENCE if self.arrived else math.inf

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Like socket.recv. Raises TimeoutError at the deadline."""
        if self.arrived:
            data, self.arrived = self.arrived[:size], self.arrived[size:]
            return data
        while True:
            try:
                data = super().recv(size, flags)
            except BlockingIOError:
                self._wait(select.POLLIN, self.deadline, "the request did not arrive in time")
            else:
                self.deadline += len(data) / PACE
                return data


if sys.platform == "linux":

    class Readable:
        """Says of each watched descriptor once, and to one thread, that it has something to read, or that for which it is watched."""

        ONCE = select.EPOLLIN | select.EPOLLONESHOT
        GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

        def __init__(self) -> None:
            self._epoll = select.epoll()

        def watch(self, descriptor: int, events: int = ONCE) -> None:
            try:
                self._epoll.modify(descriptor, events)
            except FileNotFoundError:
                self._epoll.register(descriptor, events)

        def watch_for_end(self, descriptor: int, *, writable: bool) -> None:
            """Whether its client has gone; and, if asked, whether it takes more."""
            self.watch(descriptor, select.EPOLLRDHUP | select.EPOLLONESHOT | (select.EPOLLOUT if writable else 0))

        def watch_for_room(self, descriptor: int) -> None:
            """Whether its client takes more; it may have said all it has to say."""
            self.watch(descriptor, select.EPOLLOUT | select.EPOLLONESHOT)

        def next(self) -> tuple[int, bool]:
            """The descriptor, and whether its client has gone, as far as one sees."""
            [(descriptor, events)] = self._epoll.poll(None, 1)
            return descriptor, bool(events & self.GONE)

else:

    class Readable:
        """The same by kqueue."""

        def __init__(self) -> None:
            self._kqueue = select.kqueue()

        def watch(self, descriptor: int) -> None:
            once = select.kevent(descriptor, select.KQ_FILTER_READ, select.KQ_EV_ADD | select.KQ_EV_ONESHOT)
            self._kqueue.control([once], 0)

        def watch_for_end(self, descriptor: int, *, writable: bool) -> None:
            # However much there is to read, only the end is told.
            flags = select.KQ_EV_ADD | select.KQ_EV_ONESHOT
            events = [select.kevent(descriptor, select.KQ_FILTER_READ, flags, select.KQ_NOTE_LOWAT, 2**31 - 1)]
            if writable:
                events.append(select.kevent(descriptor, select.KQ_FILTER_WRITE, flags))
            self._kqueue.control(events, 0)

        def watch_for_room(self, descriptor: int) -> None:
            once = select.kevent(descriptor, select.KQ_FILTER_WRITE, select.KQ_EV_ADD | select.KQ_EV_ONESHOT)
            self._kqueue.control([once], 0)

        def next(self) -> tuple[int, bool]:
            [event] = self._kqueue.control([], 1, None)
            return int(event.ident), bool(event.flags & select.KQ_EV_EOF)


class Idle:
    """Connections that wait: for a request of their client's, or for a later answer. Each thread takes for itself one that goes on."""

    def __init__(self) -> None:
        self._readable = Readable()
        self._connections: dict[int, TConn] = {}
        """By file descriptor, in the order in which they became idle."""
        self._arriving: dict[int, TConn] = {}
        """By file descriptor, too: those of which not all has come that is waited for."""
        self._later: dict[int, Exchange] = {}
        """By file descriptor, too. Whoever removes one, with the lock, has it and its connection for himself."""
        self._lock = threading.Lock()
        self._ready: deque[TConn | Exchange] = deque()
        self._bell, self._rope = os.pipe()
        os.set_blocking(self._rope, False)
        self._readable.watch(self._bell)

    def __len__(self) -> int:
        return len(self._connections) + len(self._arriving) + len(self._later) + len(self._ready)

    def bytes_kept(self) -> int:
        """How much of answers waits for clients to take it."""
        return sum(len(exchange.unsent) for exchange in list(self._later.values()))

    def add(self, connection: TConn) -> None:
        """Wait for its next request, or the rest of it, or for its end."""
        connection.set_timeout()
        descriptor = connection.sock.fileno()
        # In this order, and from here on the connection may be another thread's: should it be closed meanwhile, there is nothing to watch.
        (self._connections if connection.sock.deadline == math.inf else self._arriving)[descriptor] = connection
        with contextlib.suppress(OSError):
            self._readable.watch(descriptor)

    def put_behind(self, connection: TConn) -> None:
        """Its next request is here already; it is served after all others that wait for a thread."""
        with self._lock:
            self._make_ready(connection)

    def add_exchange(self, exchange: Exchange) -> None:
        """Wait until it goes on. From here on it may be another thread's."""
        with self._lock:
            if exchange.over or (exchange.woken and not exchange.unsent):
                self._make_ready(exchange)
            else:
                self._later[exchange.descriptor] = exchange
                if exchange.ended:
                    self._readable.watch_for_room(exchange.descriptor)
                else:
                    self._readable.watch_for_end(exchange.descriptor, writable=bool(exchange.unsent))

    def wake(self, exchange: Exchange, *, over: bool = False) -> None:
        """It goes on: now, or once what was sent has left. And `over` is not waited with."""
        with self._lock:
            exchange.woken = True
            exchange.over = exchange.over or over
            if self._later.get(exchange.descriptor) is exchange and (exchange.over or not exchange.unsent):
                del self._later[exchange.descriptor]
                self._make_ready(exchange)

    def end_exchanges(self, stuck_since: float = math.inf) -> None:
        """It is over for all that are not answered yet; or for those that have been stuck since then."""
        for exchange in list(self._later.values()):
            if exchange.stuck_since < stuck_since if stuck_since < math.inf else not exchange.ended:
                self.wake(exchange, over=True)

    def take(self) -> TConn | Exchange:
        """Wait until one of them goes on; it is the caller's then."""
        while True:
            descriptor, gone = self._readable.next()
            connection = self._connections.pop(descriptor, None) or self._arriving.pop(descriptor, None)
            if connection is not None:
                return connection
            if descriptor == self._bell:
                os.read(self._bell, 1)
                ready = self._ready.popleft()
                self._readable.watch(self._bell)
                return ready
            with self._lock:
                if (taken := self._later.pop(descriptor, None)) is not None:
                    taken.over = taken.over or gone
                    return taken

    def _make_ready(self, which: TConn | Exchange) -> None:
        self._ready.append(which)
        os.write(self._rope, b"!")

    def take_late(self, moment: float, most_others: int) -> list[TConn]:
        """Those whose time for another request is over at that moment, and of the others those that have been idle for
        longest, as far as they have sent nothing. They are the caller's then. Whoever is late with what he has begun, a thread tells so."""
        for descriptor, connection in list(self._arriving.items()):
            if connection.sock.deadline < time.monotonic() and self._arriving.pop(descriptor, None) is not None:
                self.put_behind(connection)
        waiting = list(self._connections.items())
        late = dict(itertools.takewhile(lambda each: each[1].timeout <= moment, waiting)) | dict(waiting[:most_others])
        arrived = select.poll()
        for descriptor in late:
            arrived.register(descriptor, select.POLLIN)
        for descriptor, _ in arrived.poll(0) if late else ():
            del late[descriptor]  # a thread takes it as soon as one is free
        return [connection for descriptor in late if (connection := self._connections.pop(descriptor, None)) is not None]


class Loads:
    """How many connections each process has, in memory that those forked from this one share. `number` is a process's own, more or less:
    those of two that are SLOTS apart are one."""

    SLOTS = 64
    STALE = 3.0
    """Seconds after which a process counts as stuck, that should have said each second that it takes connections."""

    def __init__(self) -> None:
        self._seen = memoryview(mmap.mmap(-1, self.SLOTS * 8)).cast("d")
        self._counts = memoryview(mmap.mmap(-1, self.SLOTS * 4)).cast("i")

    def accepts(self, number: int, connections: int) -> None:
        """The process takes connections, and has so many."""
        self.tell(number, connections)
        self._seen[number % self.SLOTS] = time.monotonic()

    def tell(self, number: int, connections: int) -> None:
        """It has so many."""
        self._counts[number % self.SLOTS] = connections

    def leave(self, number: int) -> None:
        """It takes no more."""
        self._seen[number % self.SLOTS] = 0.0

    def least(self) -> float:
        """How many that process has that has fewest, of those that take more."""
        fresh = time.monotonic() - self.STALE
        return min((count for count, seen in zip(self._counts, self._seen, strict=True) if seen > fresh), default=math.inf)


LOADS = Loads()


class PatientWorker(ThreadWorker):
    """The worker class of `gunicorn_conf`. The main thread accepts, and closes what stays idle for too long; the others serve."""

    alive: bool
    wsgi: Any
    _leaves_to_others_from: float

    def accept(self, listener: Any) -> None:
        now = time.monotonic()
        patient = self._leaves_to_others_from < now
        while patient and self.nr_conns > LOADS.least() and time.monotonic() < now + LEAVES_TO_OTHERS:
            time.sleep(0.001)
        try:
            accepted, address = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        client = PatientSocket(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        super(PatientSocket, client).setblocking(False)
        client.kept_in_all = self.keepalived_conns.bytes_kept
        if patient and self.nr_conns > LOADS.least():
            self._leaves_to_others_from = now + IN_VAIN
        connection = TConn(self.cfg, client, address, listener.getsockname())
        connection.data_ready = True  # by the time a thread takes it
        self._count_connections(1)
        self.keepalived_conns.add(connection)

    def init_process(self) -> None:
        self._counting = threading.Lock()
        self._postponed = 0
        self._large = 0
        self._large_ones: deque[TConn] = deque()
        """Large requests that wait for others of their kind."""
        self._held: dict[Exchange, None] = {}
        """What was answered, and waits to be released."""
        self._leaves_to_others_from = -math.inf
        # They don't change any more; looking them up in gunicorn's way takes 5 % of a request's time.
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        self._reader = gunicorn_request.Reader(self.cfg)
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        self._application = self.wsgi
        self.wsgi = self._call

    def may_postpone(self) -> bool:
        """Whether one more answer may come later: half of the connections remain for requests that are answered at once."""
        with self._counting:
            if not self.alive or self._postponed >= self.worker_connections // 2:
                return False
            self._postponed += 1
            return True

    def run(self) -> None:
        self.keepalived_conns = Idle()  # gunicorn has a deque of this name, and looks at its length
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        for _ in range(self.cfg.threads):
            threading.Thread(target=self._serve, name="jobsys web", daemon=True).start()
        while self.alive and self.is_parent_alive():
            self.notify()
            LOADS.accepts(self.age, self.nr_conns)
            self._close_late(time.monotonic(), self.worker_connections // ROOM if self.nr_conns >= self.worker_connections else 0)
            self.set_accept_enabled(self.nr_conns < self.worker_connections)
            self.wait_for_and_dispatch_events(1.0)
            self.keepalived_conns.end_exchanges(stuck_since=time.monotonic() - LONGEST_SEND)
        self.alive = False
        LOADS.leave(self.age)
        self.set_accept_enabled(False)
        self.keepalived_conns.end_exchanges()
        began = time.monotonic()
        while self.nr_conns > 0 and time.monotonic() < began + self.cfg.graceful_timeout:
            self.notify()
            # Who was promised that the connection stays may be sending the next request; it is answered with "Connection: close".
            self._close_late(time.monotonic() if time.monotonic() < began + STOP_KEEPALIVE_LINGER else math.inf)
            self.wait_for_and_dispatch_events(0.1)
        for listener in self.sockets:
            listener.close()

    def handle(self, conn: TConn) -> Any:
        taken = self.nr_conns - len(self.keepalived_conns) - len(self._large_ones) - len(self._held)
        conn.sock.patience = LONGEST_SEND if taken <= self.cfg.threads // 2 else LONGEST_PIECE
        conn.sock.collects = True
        request = self._reader.read(conn.sock.arrived, conn.client)
        try:
            if request is not None:
                keep = self._handle_usual(conn, request)
            else:
                conn.sock.deadline = min(conn.sock.deadline, time.monotonic() + (PATIENCE if taken < self.cfg.threads else HURRY))
                keep = super().handle(conn)
        except Postponed as postponed:
            exchange = postponed.exchange
            exchange.connection, exchange.descriptor = conn, conn.sock.fileno()
            return exchange
        finally:
            conn.sock.collects = False
        return keep if isinstance(keep, Exchange) else self._send_collected(conn, keep)

    def _send_collected(self, connection: TConn, keep: Any) -> Any:
        """`keep`, if all can be sent; or an Exchange, for the rest."""
        try:
            connection.sock.send_collected()
        except OSError:  # the client has gone
            return False
        if connection.sock.unsent and connection.sock.fileno() >= 0:
            return Exchange.with_rest_of_answer(self, connection, bool(keep))
        return keep

    def _handle_usual(self, connection: TConn, request: gunicorn_request.Request) -> bool | Exchange:
        """Whether the connection stays, after the answer; an Exchange, if that is held."""
        connection.sock.arrived = request.rest
        response = gunicorn_request.Response(request, connection.sock, self.cfg)
        try:
            if not self.alive or not self.cfg.keepalive or len(self.keepalived_conns) >= self.max_keepalived:
                response.force_close()
            environ = self._reader.environ(request, connection)
            answer = self.wsgi(environ, response.start_response)
            try:
                if isinstance(answer, wsgi.FileWrapper):
                    response.write_file(answer)
                else:
                    for item in answer:
                        response.write(item)
                response.close()
            finally:
                if hasattr(answer, "close"):
                    answer.close()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):  # those say that the client has gone
                self.log.exception("Socket error processing request.")
            return False
        except Exception as error:
            if response.headers_sent:
                self.log.exception("Error handling request")
            else:
                self.handle_error(request, connection.sock, connection.client, error)
            return False
        exchange: Exchange = environ["jobsys.exchange"]
        if not exchange.held:
            connection.sock.awaits_request()
            return not response.should_close()
        exchange.connection, exchange.keeps = connection, not response.should_close()
        return exchange

    def _keepalive_after(self, conn: TConn, keepalive: bool) -> bool:
        conn.sock.send_collected()
        return keepalive and conn.sock.reads_on(conn.parser)

    def _linger(self, connection: TConn) -> bool:
        """Say that nothing more will come. Whether its client is there to hear it."""
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return False
        connection.sock.lingers, connection.sock.arrived, connection.sock.deadline = True, b"", time.monotonic() + LINGER
        return True

    def _serve(self) -> None:
        while True:
            taken = self.keepalived_conns.take()
            connection = taken.connection if isinstance(taken, Exchange) else taken
            try:
                if isinstance(taken, Exchange):
                    keep = self._resume(taken)
                elif not (connection.sock.has_request() or connection.sock.goes_on()) and connection.sock.deadline > time.monotonic():
                    self.keepalived_conns.add(connection)
                    continue
                elif connection.sock.is_large:
                    if not self._begin_large(connection):
                        continue
                    try:
                        keep = self.handle(connection)
                    finally:
                        connection.sock.is_large = False
                        self._end_large()
                else:
                    keep = not connection.sock.lingers and self.handle(connection)
                self._let_go(connection, keep)
            except BaseException:  # also SystemExit: the thread has others to serve
                self.log.exception("a connection ended badly")
                self._end(connection)

    def _let_go(self, connection: TConn, keep: Any) -> None:
        """What was asked is answered, as far as it can be now. From here on the connection may be another thread's."""
        if isinstance(keep, Exchange):
            self._wait_with(keep)
        elif keep and connection.sock.has_request():
            # Of a client that doesn't wait for answers, the next request came along with this one. Others have their turn first.
            self.keepalived_conns.put_behind(connection)
        elif keep or (not connection.sock.lingers and self._linger(connection)):
            self.keepalived_conns.add(connection)
        else:
            self._end(connection)

    def end_held(self, exchange: Exchange) -> None:
        """Send what was held."""
        self._held.pop(exchange, None)
        connection = exchange.connection
        try:
            exchange.proceed()  # type: ignore[misc]
            if exchange.keeps and not self.alive:
                exchange.break_promise()
            connection.sock.awaits_request()
            self._let_go(connection, self._send_collected(connection, exchange.keeps))
        except BaseException:
            self.log.exception("a connection ended badly")
            self._end(connection)

    def _begin_large(self, connection: TConn) -> bool:
        """Whether a large request may be served now; else it has its turn later."""
        with self._counting:
            if self._large < max(self.cfg.threads // 2, 1):
                self._large += 1
                return True
            self._large_ones.append(connection)
            return False

    def _end_large(self) -> None:
        with self._counting:
            self._large -= 1
            following = self._large_ones.popleft() if self._large_ones else None
        if following is not None:
            self.keepalived_conns.put_behind(following)

    def _call(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The application, which may postpone its answer."""
        exchange = Exchange(self, start_response)
        environ["jobsys.exchange"] = exchange
        answer = self._application(environ, exchange.start_response)
        if exchange.held or exchange.proceed is None or exchange.refused_after_all():
            return answer
        raise Postponed(exchange)

    def _wait_with(self, exchange: Exchange) -> None:
        if exchange.held:
            self._held[exchange] = None
            exchange.release()
            return
        self.keepalived_conns.add_exchange(exchange)
        if not self.alive and not exchange.ended:  # perhaps the others had been woken just before
            self.keepalived_conns.wake(exchange, over=True)

    def _resume(self, exchange: Exchange) -> Any:
        """Go on with an exchange; itself when it waits again, else whether the connection stays."""
        stays, again = False, False
        try:
            sent = exchange.flush()
            if not exchange.ended and (sent or exchange.over):
                exchange.woken = False
                exchange.proceed()  # type: ignore[misc]
                sent = exchange.flush()
            again = not ((sent and exchange.ended) or exchange.over)
            stays = not again and exchange.stays()
        except OSError:  # the client has gone
            if not exchange.ended:
                exchange.over = True
                exchange.proceed()  # type: ignore[misc]
        finally:
            if not again:
                self.count_postponed(-1)
        return exchange if again else stays

    def count_postponed(self, change: int) -> None:
        with self._counting:
            self._postponed += change

    def _end(self, connection: TConn) -> None:
        connection.close()
        self._count_connections(-1)
        if not self._accepting:
            self.method_queue.defer(lambda: None)  # the main thread may accept again, or end

    def _close_late(self, moment: float, most_others: int = 0) -> None:
        for connection in self.keepalived_conns.take_late(moment, most_others):
            self._end(connection)

    def _count_connections(self, change: int) -> None:
        with self._counting:
            self.nr_conns += change
            LOADS.tell(self.age, self.nr_conns)


def _write_problem(client: socket.socket, status: int, reason: str, message: str) -> None:
    """What gunicorn answers to what is no HTTP request: an error of the same shape as ours, not its page of HTML."""
    said = message.partition("'")[0].rstrip(" :")  # what it quotes may be a header with a password
    document = {"type": "about:blank", "title": reason, "status": status, "detail": said or reason}
    data = json.dumps(document).encode()
    own = {
        "Connection": "close",
        "Content-Type": "application/problem+json",
        "Content-Length": len(data),
        "X-Request-ID": new_request_id(),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in {**own, **HEADERS, **UNLESS_SET}.items())
    util.write_nonblock(client, f"HTTP/1.1 {status} {reason}\r\n{head}\r\n".encode("latin-1") + data)


util.write_error = _write_problem
