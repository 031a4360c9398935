"""Posts jobs over connections that stay open: by wrk where it is on the PATH, else by a loop over plain sockets in a process of its own.

`python -m tests.benchmarks.posts PORT SECONDS` is that process. With CLIENTS=n in its environment, a proxy says that n clients are posting.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jobsys.system import JobSystem
from tests.benchmarks.harness import CHECKOUT, PROCESSES, environment, free_port, program, wait_until
from tests.benchmarks.result import percentiles

CONNECTIONS = 32
BODY = b'{"type": "NOOP", "payload": {}}'
HEAD = b"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(BODY)


@contextlib.contextmanager
def web(system: JobSystem, **env: str) -> Iterator[tuple[int, int]]:
    """The web server as the Procfile starts it, without a rate limit unless one is given; its port, and the number of its process."""
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "jobsys.app:create_app()", "--config", "python:jobsys.gunicorn_conf"]
    ours = {"HOST": "127.0.0.1", "PORT": str(port), "WEB_PROCESSES": str(PROCESSES), "RATE_LIMIT": "0"}
    env = environment(system, **ours | env)
    with program(command, env) as process:
        wait_until(lambda: answers(port), "the web server answers", process=process)
        yield port, process.pid


def post(port: int, seconds: int, *, clients: int = 0) -> dict[str, float]:
    """What came of posting for so long: `requests`, `failed`, `rate` in a second, `p50` and `p99` in ms.

    The requests are those of so many `clients`, by X-Forwarded-For.
    """
    if wrk := shutil.which("wrk"):
        script = str(Path(__file__).parent / "post_jobs.lua")
        command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s", "-s", script, f"http://127.0.0.1:{port}/jobs"]
    else:
        command = [sys.executable, "-m", __name__, str(port), str(seconds)]
    env = os.environ | {"PYTHONPATH": str(CHECKOUT), "CLIENTS": str(clients)}
    done = subprocess.run(command, env=env, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.rpartition("RESULT ")[2])
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} of {found['requests']} posts failed")
    return found | {"rate": found["requests"] / found["seconds"]}


def main(port: int, seconds: float) -> dict[str, float]:
    """The loop over plain sockets: the next request follows each answer."""
    selector = selectors.DefaultSelector()
    sent: dict[socket.socket, float] = {}
    answers: dict[socket.socket, bytes] = {}
    waits: list[float] = []
    failed = 0
    requests = itertools.cycle(_requests(int(os.environ.get("CLIENTS", "0"))))
    start = time.perf_counter()
    for _ in range(CONNECTIONS):
        connection = socket.create_connection(("127.0.0.1", port))
        selector.register(connection, selectors.EVENT_READ)
        sent[connection] = time.perf_counter()
        connection.sendall(next(requests))
    while time.perf_counter() < start + seconds:
        for key, _ in selector.select(1):
            connection = key.fileobj  # type: ignore[assignment]
            if not (part := connection.recv(65536)):
                raise ConnectionError("the web server closed a connection")
            answers[connection] = answers.get(connection, b"") + part
            if not _whole(answers[connection]):
                continue
            failed += not answers.pop(connection).startswith(b"HTTP/1.1 202")
            now = time.perf_counter()
            waits.append((now - sent[connection]) * 1000)
            sent[connection] = now
            connection.sendall(next(requests))
    return {"requests": len(waits), "seconds": time.perf_counter() - start, "failed": failed} | percentiles(waits, 50, 99)


def _requests(clients: int) -> list[bytes]:
    headers = [b"X-Forwarded-For: 10.0.%d.%d\r\n" % divmod(number, 256) for number in range(clients)]
    return [HEAD + header + b"\r\n" + BODY for header in headers or [b""]]


def _whole(answer: bytes) -> bool:
    """Whether all of the answer is there."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return length is not None and len(body) >= int(length[1])


def answers(port: int) -> bool:
    """Whether a web server is there, and well."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /health/live HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        return b" 200 " in connection.recv(1000)
    return False


if __name__ == "__main__":
    print("RESULT", json.dumps(main(int(sys.argv[1]), float(sys.argv[2]))))
