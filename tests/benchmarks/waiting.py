"""Jobs posted while 500 others wait for jobs of theirs; the floor is the same while nobody waits."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from jobsys.system import JobSystem, Submission
from tests.benchmarks.harness import Bench, alternate, tell
from tests.benchmarks.posts import CONNECTIONS, post, web
from tests.benchmarks.result import Result, percentiles

UNIT = "jobs/s"
WAITERS = 500


def measure(bench: Bench) -> Result:
    """Posts a second; details have the ms from the end of a job to the answer of whoever waits for it, alone and among 500."""
    seconds, jobs = bench.sized(3, quick=1, full=10), bench.sized(150, quick=10)
    last: dict[str, Any] = {}
    with bench.system() as system, web(system) as (port, _):
        post(port, 1)
        waiters = {"jobsys": WAITERS, "floor": 0}
        runs = alternate({name: partial(posted, system, port, seconds, last, number) for name, number in waiters.items()}, 4 * bench.runs)
    delays = {f"delay_among_{waiters}": delay(bench, jobs, waiters) for waiters in (1, WAITERS)}
    tell(f"  {delays}")
    return Result.of_runs(UNIT, runs, waiters=WAITERS, connections=CONNECTIONS, seconds=seconds, **last, **delays)


def posted(system: JobSystem, port: int, seconds: int, last: dict[str, Any], waiters: int) -> float:
    """Posts a second while so many wait."""
    with waiting(system, port, waiters):
        time.sleep(1)  # that they come takes as much as other requests; what they take while they wait is asked here
        found = post(port, seconds)
    last[f"among_{waiters}"] = {name: found[name] for name in ("rate", "p50", "p99")}
    return found["rate"]


def delay(bench: Bench, jobs: int, waiters: int) -> dict[str, float]:
    """The percentiles of the time from the end of a job to the answer, in ms, while others wait for other jobs."""
    delays = []
    with bench.system() as system, web(system) as (port, _), waiting(system, port, waiters - 1):
        for _ in range(jobs):
            job_id = system.submit("NOOP").id
            with contextlib.closing(wait_for(port, job_id)) as client:
                time.sleep(random.uniform(0.05, 0.1))
                system.cancel(job_id)
                ended = time.perf_counter()
                answer = b""
                while b'"status": "' not in answer:
                    answer += client.recv(65536)
                if b'"status": "CANCELLED"' not in answer:
                    raise RuntimeError(f"a wait ended before the job did: {answer!r}")
                delays.append((time.perf_counter() - ended) * 1000)
    return percentiles(delays, 50, 99)


@contextlib.contextmanager
def waiting(system: JobSystem, port: int, waiters: int) -> Iterator[None]:
    """So many connections, each of which waits for a job that nobody runs. Raises RuntimeError when one was answered before the end."""
    with contextlib.ExitStack() as stack:
        job_ids = system.submit_many([Submission("NOOP")] * waiters)
        clients = [stack.enter_context(contextlib.closing(wait_for(port, job_id))) for job_id in job_ids]
        yield
        for client in clients:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                raise RuntimeError(f"one that waited was answered: {client.recv(1000)!r}")


def wait_for(port: int, job_id: str) -> socket.socket:
    """A connection that has asked to wait for the job."""
    client = socket.create_connection(("127.0.0.1", port), timeout=40)
    client.sendall(b"GET /jobs/%s?wait=30 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % job_id.encode())
    return client
