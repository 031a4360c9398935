"""Jobs that take their time, 20 ms each: the share of what sixteen threads could do at the very best."""

from __future__ import annotations

import multiprocessing
import time
from functools import partial
from statistics import median
from typing import Any

from tests.benchmarks.harness import PROCESSES, Bench, alternate, drain_rate, fill, wait_for_completed
from tests.benchmarks.job_types import spin
from tests.benchmarks.result import Result

UNIT = "share"
THREADS = 8
SLEEP = 0.02
SPIN = 0.001
"""Seconds of Python's work in a job of the other kind."""
CALIBRATION = 4.0
"""Seconds in which it is found out how much that is."""


def measure(bench: Bench) -> Result:
    """The median of the shares; details have jobs of 1 ms of Python's work, as a share of what two bare processes do: with as many threads,
    and with one in each process."""
    ideal = PROCESSES * THREADS / SLEEP
    sleeping = partial(drain, bench, "SLEEP", f'{{"seconds": {SLEEP}}}', bench.sized(8_000))
    rates = alternate({"jobsys": sleeping}, bench.runs)
    shares = [rate / ideal for rate in rates["jobsys"]]
    return Result.of_runs(UNIT, {"jobsys": shares}, ideal=ideal, rate=median(rates["jobsys"]), python_work=of_python_work(bench))


def of_python_work(bench: Bench) -> dict[str, Any]:
    """Rates in jobs a second, and their shares."""
    rounds, jobs = calibrated(), bench.sized(20_000)
    spinning = partial(drain, bench, "SPIN", f'{{"rounds": {rounds}}}', jobs)
    contenders = {
        "threads": spinning,
        "one_thread": partial(spinning, threads=1),
        "ideal": partial(bare, rounds, jobs // PROCESSES),
    }
    rates = {name: median(values) for name, values in alternate(contenders, bench.runs).items()}
    ideal = rates["ideal"]
    return {"share": rates["threads"] / ideal, "share_with_one_thread": rates["one_thread"] / ideal, "rates": rates}


def drain(bench: Bench, type: str, payload: str, jobs: int, threads: int = THREADS) -> float:
    """The rate of one drain."""
    with bench.system() as system, bench.workers(system, threads=threads):
        fill(system, jobs, type=type, payload=payload)
        wait_for_completed(system, jobs)
        return drain_rate(system, type)


def calibrated() -> int:
    """How many rounds take that long at the machine's best: what runs beside it may slow a processor by half for a second or two."""
    rounds, until = 1_000, time.perf_counter() + CALIBRATION
    fastest = float("inf")
    while time.perf_counter() < until:
        fastest = min(fastest, _time(rounds) / rounds)
        rounds = max(1_000, int(5 * SPIN / fastest))
    return int(SPIN / fastest)


def bare(rounds: int, times: int) -> float:
    """What processes that do nothing else do in a second."""
    spawn = multiprocessing.get_context("spawn")
    ready, answers = spawn.Barrier(PROCESSES), spawn.Queue()
    processes = [spawn.Process(target=_spin, args=(rounds, times, ready, answers)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    rate = sum(times / answers.get() for _ in processes)
    for process in processes:
        process.join()
    return float(rate)


def _spin(rounds: int, times: int, ready: Any, answers: Any) -> None:
    ready.wait()
    start = time.perf_counter()
    for _ in range(times):
        spin(rounds)
    answers.put(time.perf_counter() - start)


def _time(rounds: int) -> float:
    start = time.perf_counter()
    spin(rounds)
    return time.perf_counter() - start
