"""gunicorn's threaded worker, for which a slow client costs little.

As it comes, a client that has connected and says nothing, or stops in the middle of a request, holds a thread: a few of them stop the
service. And a connection that ends badly is closed in the thread that accepts all others, up to 2 s each. Here a thread is
taken only once something has arrived, a request must arrive at a decent pace, and each thread closes its own connections.
"""

from __future__ import annotations

import errno
import json
import math
import socket
import time
from typing import Any

from gunicorn import util
from gunicorn.workers.gthread import TConn, ThreadWorker

PATIENCE, HURRY = 4.0, 1.5
"""Seconds a request may take to arrive while threads are free, and while others wait for one…"""
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


class PatientConnection(TConn):
    """A connection that leaves waiting for its first byte to the poller, and closing to the thread that had it."""

    def wait_for_data(self, timeout: float) -> bool:
        return super().wait_for_data(0)

    def close(self, graceful: bool = False) -> None:
        super().close()


class PatientWorker(ThreadWorker):
    """The worker class of `gunicorn_conf`."""

    def accept(self, listener: Any) -> None:
        try:
            accepted, address = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        client = PatientSocket(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self.nr_conns += 1
        self.enqueue_req(PatientConnection(self.cfg, client, address, listener.getsockname()))

    def handle(self, conn: TConn) -> Any:
        taken = self.nr_conns - len(self.keepalived_conns) - len(self.pending_conns)
        conn.sock.deadline = time.monotonic() + (PATIENCE if taken <= self.cfg.threads else HURRY)
        keep = super().handle(conn)
        if keep is False and not conn.sock.late:
            conn.sock.deadline = time.monotonic() + LINGER
            util.close_graceful(conn.sock, timeout=LINGER)
        return keep


def _write_problem(client: socket.socket, status: int, reason: str, message: str) -> None:
    """What gunicorn answers to what is no HTTP request: an error of the same shape as ours, not its page of HTML."""
    document = {"type": "about:blank", "title": reason, "status": status, "detail": message or reason}
    data = json.dumps(document).encode()
    head = f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/problem+json\r\nContent-Length: {len(data)}"
    util.write_nonblock(client, f"{head}\r\n\r\n".encode("latin-1") + data)


util.write_error = _write_problem
