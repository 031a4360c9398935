"""No-op jobs finished per second, from a backlog, history kept; the floor is one bare loop that claims 100 and finishes 100."""

from __future__ import annotations

from functools import partial

from tests.benchmarks import floor, peers
from tests.benchmarks.harness import THREADS, Bench, alternate, drain_rate, execute, fill, vacuum, wait_for_completed
from tests.benchmarks.peers import Peer
from tests.benchmarks.result import Result

UNIT = "jobs/s"


def measure(bench: Bench) -> Result:
    """Rates by the database's clock, from the first start to the last end. A small backlog is to a slow peer's advantage."""
    jobs = bench.sized(100_000)
    others = peers.available("pgqueuer", "procrastinate", "chancy", "dramatiq_pg")
    contenders = {"jobsys": partial(ours, bench, jobs), "floor": partial(bare, bench, jobs)}
    backlogs = {peer.name: min(jobs, bench.sized(peer.backlog)) for peer in others}
    contenders |= {peer.name: partial(theirs, bench, peer, backlogs[peer.name]) for peer in others}
    tuning = {peer.name: peer.tuning for peer in others}
    slow = [name for name, backlog in backlogs.items() if backlog < jobs]
    runs = alternate(contenders, bench.runs, slow=slow)
    return Result.of_runs(UNIT, runs, backlog={"jobsys": jobs, **backlogs}, threads=THREADS, tuning=tuning)


def ours(bench: Bench, jobs: int) -> float:
    """Through `jobsys worker`."""
    with bench.system() as system:
        fill(system, jobs)
        vacuum(system)
        with bench.workers(system):
            wait_for_completed(system, jobs)
        return drain_rate(system)


def bare(bench: Bench, jobs: int) -> float:
    """Through a loop of two statements."""
    with floor.plain_table(bench) as url:
        execute(
            url,
            "insert into plain (type, queue, priority, max_attempts) select 'NOOP', 'default', 0, 4 from generate_series(1, %s)",
            (jobs,),
        )
        execute(url, "vacuum analyze plain")
        floor.claim_and_finish(url, 100)
        rate = "select count(*) / extract(epoch from max(finished_at) - min(started_at)) from plain where status = 'COMPLETED'"
        return float(execute(url, rate)[0][0])


def theirs(bench: Bench, peer: Peer, jobs: int) -> float:
    """Through a peer's workers."""
    with bench.database() as url:
        peer.install(url)
        with peer.client(url) as client:
            client.submit_many(jobs)
        execute(url, "vacuum analyze")
        with peer.workers(url):
            peer.wait_until_drained(url)
        return peer.rate(url, jobs)
