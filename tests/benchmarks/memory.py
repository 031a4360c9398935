"""How much the memory of worker processes grows while they drain, after a warm-up; the largest growth of any."""

from __future__ import annotations

import psutil

from tests.benchmarks.harness import Bench, fill, tell, wait_for_completed
from tests.benchmarks.posts import post, web
from tests.benchmarks.result import Result

UNIT = "MB"
CHUNK = 50_000


def measure(bench: Bench) -> Result:
    """Resident memory before and after, in MB; details have the web processes' growth over many posts."""
    warm_up, jobs = bench.sized(20_000), bench.sized(200_000, full=1_000_000)
    with bench.system() as system, bench.workers(system) as pid:
        fill(system, warm_up)
        wait_for_completed(system, warm_up)
        before = resident(pid)
        for done in range(0, jobs, CHUNK):
            fill(system, min(CHUNK, jobs - done))
            wait_for_completed(system, warm_up + min(done + CHUNK, jobs))
        workers = growth(before, resident(pid))
    tell(f"  workers: {workers}")
    details = {"jobs": jobs, "workers": workers, "web": of_the_web(bench)}
    return Result(UNIT, max(workers), details=details)


def of_the_web(bench: Bench) -> dict[str, object]:
    """The growth of each web process, in MB, over so many posts."""
    wanted, posted = bench.sized(50_000, full=1_000_000), 0.0
    with bench.system() as system, web(system) as (port, pid):
        post(port, 3)
        before = resident(pid)
        while posted < wanted:
            posted += post(port, 5)["requests"]
        grown = growth(before, resident(pid))
    tell(f"  web processes, over {posted:,.0f} posts: {grown}")
    return {"posts": posted, "growth": grown}


def resident(pid: int) -> dict[int, float]:
    """The resident memory of each child of this process, in MB."""
    return {child.pid: child.memory_info().rss / 1e6 for child in psutil.Process(pid).children()}


def growth(before: dict[int, float], after: dict[int, float]) -> list[float]:
    """By how much each grew. Raises RuntimeError when they are not the same processes."""
    if before.keys() != after.keys():
        raise RuntimeError("a process was replaced meanwhile")
    return [after[pid] - before[pid] for pid in before]
