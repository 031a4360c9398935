"""No-op jobs finished per second, from a backlog, history kept; the floor is one bare loop that claims 100 and finishes 100."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from statistics import median

import psutil

from jobsys.system import JobSystem
from tests.benchmarks import floor, peers
from tests.benchmarks.harness import THREADS, Bench, alternate, drain_rate, execute, fill, vacuum, wait_until
from tests.benchmarks.peers import Peer
from tests.benchmarks.result import Result

UNIT = "jobs/s"
COUNT_NOTHING = "create or replace function after_jobs_written() returns trigger language plpgsql as 'begin return null; end'"
UNFINISHED = "select exists (select from jobs where status = 'PENDING') or exists (select from jobs where status = 'PROCESSING')"
SESSIONS = "select pid from pg_stat_activity where datname = current_database() and application_name like 'jobsys %'"


def measure(bench: Bench) -> Result:
    """Rates by the database's clock, from the first start to the last end. A small backlog is to a slow peer's advantage. Details have the
    share that is left of the rate without counters, and the CPU that a job costs."""
    jobs = bench.sized(100_000)
    others = peers.available("pgqueuer", "procrastinate", "chancy", "dramatiq_pg", "graphile_worker", "pg_boss")
    contenders = {"jobsys": partial(ours, bench, jobs), "floor": partial(bare, bench, jobs)}
    backlogs = {peer.name: min(jobs, bench.sized(peer.backlog)) for peer in others}
    contenders |= {peer.name: partial(theirs, bench, peer, backlogs[peer.name]) for peer in others}
    tuning = {peer.name: peer.tuning for peer in others}
    slow = [name for name, backlog in backlogs.items() if backlog < jobs]
    runs = alternate(contenders, bench.runs, slow=slow)
    counting = alternate({"with": partial(ours, bench, jobs), "without": partial(ours, bench, jobs, counted=False)}, bench.runs)
    share = median(counted / free for counted, free in zip(*counting.values(), strict=True))
    details = {"share_with_counters": share, "cpu_of_a_job": cpu_of_a_job(bench, jobs), "tuning": tuning}
    return Result.of_runs(UNIT, runs, backlog={"jobsys": jobs, **backlogs}, threads=THREADS, **details)


def ours(bench: Bench, jobs: int, *, counted: bool = True) -> float:
    """Through `jobsys worker`; on demand without any counters and notifications."""
    with bench.system() as system:
        if not counted:
            execute(str(system.settings.database_url), COUNT_NOTHING)
        fill(system, jobs)
        vacuum(system)
        with bench.workers(system):
            _wait_until_drained(system)
        return drain_rate(system)


def cpu_of_a_job(bench: Bench, jobs: int) -> dict[str, float]:
    """In microseconds: of the worker processes, and of PostgreSQL's sessions with them, where the server is one of this machine."""
    with bench.system() as system, bench.workers(system) as pid:
        fill(system, jobs // 5)
        _wait_until_drained(system)
        before = _cpu(system, pid)
        fill(system, jobs)
        _wait_until_drained(system)
        after = _cpu(system, pid)
    return {name: (after[name] - before[name]) / jobs * 1e6 for name in after}


def _wait_until_drained(system: JobSystem) -> None:
    wait_until(lambda: not execute(str(system.settings.database_url), UNFINISHED)[0][0], "the backlog is drained", timeout=600)


def _cpu(system: JobSystem, pid: int) -> dict[str, float]:
    sessions = {session for (session,) in execute(str(system.settings.database_url), SESSIONS)}
    servers = [process for process in psutil.process_iter(["name"]) if process.pid in sessions and process.info["name"] == "postgres"]
    return {"workers": _seconds(psutil.Process(pid).children()), "postgresql": _seconds(servers)}


def _seconds(processes: Iterable[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


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
