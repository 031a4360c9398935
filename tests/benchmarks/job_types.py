"""The jobs that are measured. Where a job began is told by a line in a file, in the same way for us and for every peer."""

from __future__ import annotations

import os
import time

from jobsys import Job, Payload, job

MARKS = "BENCH_MARKS"
"""Environment variable with the name of the file the jobs write to."""


def mark(number: int) -> None:
    """Say that the job of this number has begun, by this machine's clock."""
    line = f"{number} {time.time()}\n".encode()
    file = os.open(os.environ[MARKS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)


def spin(rounds: int) -> int:
    """Work of Python's own."""
    total = 0
    for number in range(rounds):
        total += number & 7
    return total


class Nothing(Payload):
    pass


class Number(Payload):
    number: int


class Sleep(Payload):
    seconds: float


class Rounds(Payload):
    rounds: int


@job("NOOP")
def noop(payload: Nothing, job: Job) -> None:
    """Do nothing."""


@job("MARK")
def marked(payload: Number, job: Job) -> None:
    """Say when it began."""
    mark(payload.number)


@job("SLEEP")
def sleeping(payload: Sleep, job: Job) -> None:
    """Wait."""
    time.sleep(payload.seconds)


@job("SPIN")
def spinning(payload: Rounds, job: Job) -> None:
    """Compute."""
    spin(payload.rounds)
