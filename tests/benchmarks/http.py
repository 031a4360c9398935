"""Jobs posted over 32 connections that stay open, to two web processes; the floor is bare inserts from 16 threads. In turn with Express."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial
from typing import Any

from jobsys.ids import new_job_id
from tests.benchmarks import floor, peers
from tests.benchmarks.harness import Bench, alternate
from tests.benchmarks.peers import Peer
from tests.benchmarks.posts import CONNECTIONS, post, web
from tests.benchmarks.result import Result

UNIT = "jobs/s"
WRITERS = 16


def measure(bench: Bench) -> Result:
    """Posts a second while nothing runs the jobs; details have the waits in ms, too, and both again while two worker processes run them."""
    seconds = bench.sized(8, quick=2, full=30)
    last: dict[str, Any] = {}
    contenders = {"jobsys": partial(posted, bench, seconds, last), "floor": partial(inserted, bench, seconds)}
    contenders |= {peer.name: partial(theirs, bench, peer, seconds, last) for peer in peers.available("express")}
    runs = alternate(contenders, bench.few_runs)
    posted(bench, seconds, last, workers=True)
    return Result.of_runs(UNIT, runs, connections=CONNECTIONS, seconds=seconds, **last)


def posted(bench: Bench, seconds: int, last: dict[str, Any], *, workers: bool = False) -> float:
    """Posts a second."""
    with contextlib.ExitStack() as stack:
        system = stack.enter_context(bench.system())
        if workers:
            stack.enter_context(bench.workers(system))
        port, _ = stack.enter_context(web(system))
        post(port, 1)
        found = post(port, seconds)
    last["with_workers" if workers else "without_workers"] = _shown(found)
    return found["rate"]


def theirs(bench: Bench, peer: Peer, seconds: int, last: dict[str, Any]) -> float:
    """The same of a peer."""
    found = peer.posted(bench, seconds)
    last[peer.name] = _shown(found)
    return found["rate"]


def _shown(found: dict[str, float]) -> dict[str, float]:
    return {name: found[name] for name in ("rate", "p50", "p99")}


def inserted(bench: Bench, seconds: int) -> float:
    """Inserts a second, each with a commit of its own."""
    counts = [0] * WRITERS
    with floor.plain_table(bench) as url:
        end = time.monotonic() + seconds

        def insert(writer: int) -> None:
            with contextlib.closing(floor.connect(url)) as connection, connection.cursor() as cursor:
                while time.monotonic() < end:
                    cursor.execute(floor.INSERT, (new_job_id(),))
                    counts[writer] += 1

        threads = [threading.Thread(target=insert, args=(writer,)) for writer in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sum(counts) / seconds
