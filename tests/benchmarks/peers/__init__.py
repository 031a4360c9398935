"""Other job servers, each tuned as its own documentation and benchmark say, in two processes like ours.

A module a peer: its `PEER` says how to install, submit and look. Its `main`, or a script in `node`, is one worker process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import metadata

from tests.benchmarks.harness import CHECKOUT, PROCESSES, Bench, execute, program, tell, wait_until
from tests.benchmarks.marks import Marks


class Client:
    """Submits jobs, each committed when the call returns."""

    def submit(self, number: int | None = None, *, urgent: bool = False) -> None:
        """One job: a no-op, or with a number one that marks its beginning."""
        raise NotImplementedError

    def submit_each(self, jobs: int) -> None:
        """So many no-ops, one by one."""
        for _ in range(jobs):
            self.submit()

    def submit_many(self, jobs: int) -> None:
        """So many no-ops, as the peer does that fastest."""
        self.submit_each(jobs)

    def submit_due(self, jobs: int, delay: timedelta) -> float:
        """Marked jobs with the numbers from 0, all due in the same instant; which that is, in seconds of the clock."""
        raise NotImplementedError


class Peer:
    """One peer. `backlog` is what it drains, and `bulk` what it takes in, in some seconds."""

    distribution: str
    backlog: int
    bulk = 100_000
    tuning: str
    unfinished: str
    """A query: is anything left to do?"""
    waiting: str
    """A query: how many jobs wait?"""
    span: str
    """A query: seconds from the first start to the last end."""

    @property
    def name(self) -> str:
        """Its name and version."""
        return f"{self.distribution} {metadata.version(self.distribution)}"

    def install(self, url: str) -> None:
        """Make its tables in an empty database."""
        raise NotImplementedError

    def client(self, url: str) -> contextlib.AbstractContextManager[Client]:
        """Somebody who submits."""
        raise NotImplementedError

    def command(self, url: str) -> list[str]:
        """One worker process."""
        return [sys.executable, "-m", __name__, type(self).__module__, url]

    @contextlib.contextmanager
    def workers(self, url: str, marks: Marks | None = None) -> Iterator[None]:
        """Two worker processes, until the block ends."""
        env = os.environ | {"PYTHONPATH": str(CHECKOUT)} | (marks.environment if marks else {})
        with contextlib.ExitStack() as stack:
            for _ in range(PROCESSES):
                stack.enter_context(program(self.command(url), env))
            yield

    def wait_until_drained(self, url: str, timeout: float = 120.0) -> None:
        """Return when nothing is left to do."""
        wait_until(lambda: not execute(url, self.unfinished)[0][0], f"{self.name} had finished every job", timeout=timeout)

    def posted(self, bench: Bench, seconds: int) -> dict[str, float]:
        """What came of posting to its web server for so long: see posts.py."""
        raise NotImplementedError

    def rate(self, url: str, jobs: int) -> float:
        """Jobs per second, from the first start to the last end."""
        return jobs / float(execute(url, self.span)[0][0])


def submitted(bench: Bench, peer: Peer, jobs: int, submit: Callable[[Client, int], None]) -> float:
    """No-ops a second that a client of the peer's submits, on a fresh database and after a first one."""
    with bench.database() as url:
        peer.install(url)
        with peer.client(url) as client:
            client.submit()
            start = time.perf_counter()
            submit(client, jobs)
            return jobs / (time.perf_counter() - start)


def available(*names: str) -> list[Peer]:
    """Those peers that are installed; who is not is named on stderr."""
    found = []
    for name in names:
        try:
            found.append(importlib.import_module(f"{__name__}.{name}").PEER)
        except Exception as error:
            tell(f"  {name} is left out: {type(error).__name__}: {error}")
    return found
