"""Job types that misbehave on purpose, and plain Dramatiq actors. The tests' workers load this module through JOB_MODULES."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import dramatiq
import psycopg2

from jobsys import GiveUp, Job, Payload, job


class Ledger(Payload):
    """Where to write what happened: a file outside the database, appended to by every run."""

    ledger: str
    seconds: float = 0.0
    label: str = ""


def note(payload: Ledger, job: Job, what: str) -> None:
    with Path(payload.ledger).open("a") as ledger:
        ledger.write(f"{what} {payload.label or job.id} {job.attempt} {os.getpid()} {time.time():.6f}\n")


@job("LEDGER", time_limit="60s")
def ledger(payload: Ledger, job: Job) -> str:
    """Write start and end into a file, and work in small steps between them."""
    note(payload, job, "start")
    until = time.monotonic() + payload.seconds
    while time.monotonic() < until:
        job.checkpoint()
        time.sleep(0.01)
    note(payload, job, "end")
    return payload.label


@job("DEAF", time_limit="60s")
def deaf(payload: Ledger, job: Job) -> None:
    """Compute without ever asking whether to stop."""
    note(payload, job, "start")
    until = time.monotonic() + payload.seconds
    while time.monotonic() < until:
        sum(range(1000))
    note(payload, job, "end")


@job("STONE", time_limit="60s")
def stone(payload: Ledger, job: Job) -> None:
    """Block in one C call, which no exception reaches."""
    note(payload, job, "start")
    time.sleep(payload.seconds)
    note(payload, job, "end")


@job("SHORT_OF_TIME", time_limit="300ms", max_retries=0)
def short_of_time(payload: Ledger, job: Job) -> None:
    """Run longer than the time limit."""
    note(payload, job, "start")
    while True:
        job.checkpoint()
        time.sleep(0.01)


@job("KILLER")
def killer(payload: Ledger, job: Job) -> None:
    """Kill the process that runs it."""
    note(payload, job, "start")
    os.kill(os.getpid(), signal.SIGKILL)


@job("HOPELESS", max_retries=5)
def hopeless(payload: Ledger, job: Job) -> None:
    """Fail for good."""
    note(payload, job, "start")
    raise GiveUp("there is no point")


@job("HANGING", max_share=0.5)
def hanging(payload: Ledger, job: Job) -> None:
    """Depend on something that hangs."""
    ledger(payload, job)


class Elsewhere(Ledger):
    """Something that is away while a file is there."""

    away: str = ""


@job("DEPENDENT", trip_after=3, max_retries=2)
def dependent(payload: Elsewhere, job: Job) -> None:
    """Depend on something that may be away."""
    note(payload, job, "start")
    if Path(payload.away).exists():
        raise ConnectionRefusedError("it is away")
    note(payload, job, "end")


class Vicious(Payload):
    how: str


@job("VICIOUS", max_retries=0)
def vicious(payload: Vicious, job: Job) -> object:
    """End in ways that are hard to record."""
    if payload.how == "nul":
        raise RuntimeError("before\x00after")
    if payload.how == "surrogate":
        raise RuntimeError("lone \ud800")
    if payload.how == "huge":
        raise RuntimeError("x" * 10_000_000)
    if payload.how == "mute":
        raise Mute
    if payload.how == "exit":
        raise SystemExit(3)
    if payload.how == "set":
        return {1, 2}
    if payload.how == "nan":
        return float("nan")
    if payload.how == "nul result":
        return "a\x00b"
    return payload.how


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@dramatiq.actor(queue_name="plain", store_results=True)
def add(a: int, b: int) -> int:
    return a + b


@dramatiq.actor(queue_name="plain", max_retries=1, min_backoff=10, max_backoff=20)
def write_line(path: str, line: str, fail: bool = False) -> None:
    with Path(path).open("a") as file:
        file.write(line + "\n")
    if fail:
        raise RuntimeError("told to")


@dramatiq.actor(queue_name="plain")
def record_success(message: dict[str, Any], result: object) -> None:
    with Path(message["args"][0]).open("a") as file:
        file.write(f"success {result}\n")


@dramatiq.actor(queue_name="plain")
def record_failure(message: dict[str, Any], error: dict[str, str]) -> None:
    with Path(message["args"][0]).open("a") as file:
        file.write(f"failure {error['type']}\n")


@dramatiq.actor(queue_name="plain", max_retries=3)
def again_soon(path: str) -> str:
    with Path(path).open("a") as file:
        file.write("try\n")
    if Path(path).read_text().count("try") < 3:
        raise dramatiq.Retry("not yet", delay=50)
    return "third time"


class Transfer(Ledger):
    """What to write in the job's own transaction, and how to leave it."""

    url: str = ""
    how: str = "commit"


@job("TRANSFER", max_retries=1)
def transfer(payload: Transfer, job: Job) -> str:
    """Write a row and complete, both in one transaction."""
    connection = psycopg2.connect(payload.url)
    connection.autocommit = payload.how == "autocommit"
    note(payload, job, "start")
    cursor = connection.cursor()
    cursor.execute("insert into transfers values (%s, %s)", (job.id, job.attempt))
    job.complete_in(connection, {"attempt": job.attempt})
    note(payload, job, "completed")
    until = time.monotonic() + payload.seconds
    if payload.how == "linger":
        threading.Timer(payload.seconds, connection.close).start()
        return "too early"
    while time.monotonic() < until:
        time.sleep(0.01)
    if payload.how == "twice":
        job.complete_in(connection)
    if payload.how == "die before":
        os.kill(os.getpid(), signal.SIGKILL)
    if payload.how == "raise before":
        raise RuntimeError("before the commit")
    if payload.how != "roll back":
        connection.commit()
    if payload.how == "die after":
        os.kill(os.getpid(), signal.SIGKILL)
    if payload.how == "raise after":
        raise RuntimeError("after the commit")
    connection.close()
    return "not this"
