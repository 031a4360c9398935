"""From the call of `submit` to the first line of the job's function, on an idle system: one job at a time, with pauses."""

from __future__ import annotations

import random
import time

from tests.benchmarks.harness import Bench

JOBS = 400


def measure(bench: Bench) -> list[tuple[str, float, str]]:
    """Rows of the table: name, value, unit."""
    waits = []
    with bench.system() as system, bench.workers(system):
        system.wait(system.submit("WHEN").id, 30)
        for _ in range(JOBS):
            time.sleep(random.uniform(0.005, 0.05))
            before = time.time()
            waits.append((system.wait(system.submit("WHEN").id, 30).result - before) * 1000)
    waits.sort()
    return [(f"submit to start, idle, p{share}", waits[int(len(waits) * share / 100)], "ms") for share in (50, 95, 99)]
