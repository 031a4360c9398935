"""Jobs at an even pace for long, half an hour in full: do the sizes of tables and indexes, and the latency, level off?"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from statistics import median

from jobsys import db
from jobsys.chores import FIRST_ID
from jobsys.system import JobSystem
from tests.benchmarks.harness import Bench, execute, tell
from tests.benchmarks.latency import load
from tests.benchmarks.marks import Marks
from tests.benchmarks.result import Result, percentiles

UNIT = "times what it was"
RATE = 500
"""Jobs a second."""
WINDOWS = 12
"""So many times it is measured; history is kept for two windows' time, so that it, too, can level off."""
SIZES = """
    select relname, pg_relation_size(oid) from pg_class
    where relnamespace = current_schema()::regnamespace and relkind in ('r', 'i') and pg_relation_size(oid) > 0
"""


def measure(bench: Bench) -> Result:
    """The latency of the last quarter over that of the quarter before it, when everything has been in use for a while; details have that
    of every window, and every relation that grew meanwhile by more than a tenth, in bytes."""
    seconds = bench.sized(240, quick=24, full=1_800)
    window = seconds / WINDOWS
    waits: list[list[float]] = []
    sizes: list[dict[str, int]] = []
    with contextlib.ExitStack() as stack:
        system, marks = stack.enter_context(bench.system()), stack.enter_context(bench.marks())
        stack.enter_context(bench.workers(system, marks=marks))
        stack.enter_context(load(system, RATE))
        stack.enter_context(pruning(system, 2 * window))
        start = time.monotonic()
        for number in range(1, WINDOWS + 1):
            waits.append(_waits_until(start + number * window, system, marks))
            sizes.append(dict(execute(str(system.settings.database_url), SIZES)))
            tell(f"  {number * window:,.0f} s: p50 {median(waits[-1]):.1f} ms, {sum(sizes[-1].values()) / 1e6:.1f} MB")
        counts = system.counts()
    medians = [median(some) for some in waits]
    before, last = slice(WINDOWS // 2, WINDOWS * 3 // 4), slice(WINDOWS * 3 // 4, None)
    largest = [{name: max(some.get(name, 0) for some in sizes[part]) for name in sizes[-1]} for part in (before, last)]
    return Result(
        UNIT,
        median(medians[last]) / median(medians[before]),
        details={
            "seconds": seconds,
            "jobs_per_second": RATE,
            "waiting_at_the_end": counts["PENDING"],
            "p50": medians,
            "p99": [percentiles(some, 99)["p99"] for some in waits],
            "megabytes": [sum(some.values()) / 1e6 for some in sizes],
            "grew": {name: [largest[0][name], size] for name, size in largest[1].items() if size > largest[0][name] * 1.1},
        },
    )


def _waits_until(deadline: float, system: JobSystem, marks: Marks) -> list[float]:
    def submit(number: int) -> None:
        system.submit("MARK", {"number": number})

    waits: list[float] = []
    while time.monotonic() < deadline or not waits:
        number = len(marks.times)
        waits += marks.waits(submit, range(number, number + 1), (0.05, 0.25))
    return waits


@contextlib.contextmanager
def pruning(system: JobSystem, seconds: float) -> Iterator[None]:
    """What workers do with jobs that ended RETENTION_DAYS ago, with those that ended so many seconds ago."""
    ended = threading.Event()

    def prune() -> None:
        with contextlib.closing(db.Database(str(system.settings.database_url)).connect()) as connection:
            one_page = partial(db.run, connection, "prune", days=seconds / 86_400)
            while not ended.wait(seconds / 20):
                after, seen = FIRST_ID, 1000
                while seen == 1000:
                    after, seen, _ = one_page(after=after)[0]

    thread = threading.Thread(target=prune, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
