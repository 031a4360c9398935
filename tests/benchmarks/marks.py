"""The file that marked jobs write to, read by whoever measures."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.job_types import MARKS


class Marks:
    """When each marked job began, by its number; in seconds of this machine's clock."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "marks"
        self.file.touch()
        self.file.chmod(0o666)
        self.times: dict[int, float] = {}
        self._read = 0

    @property
    def environment(self) -> dict[str, str]:
        """What a worker needs to write here."""
        return {MARKS: str(self.file)}

    def refresh(self) -> dict[int, float]:
        """All that is written by now."""
        with self.file.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode().splitlines():
            number, at = line.split()
            self.times.setdefault(int(number), float(at))
        return self.times

    def wait(self, number: int, timeout: float = 60.0) -> float:
        """When the job of this number began, soon after it has. (The job itself says when; who looks all the time takes CPU from it.)"""
        deadline = time.monotonic() + timeout
        while number not in self.refresh():
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} did not begin within {timeout:g} s")
            time.sleep(0.01)
        return self.times[number]

    def waits(self, submit: Callable[[int], object], numbers: range, pauses: tuple[float, float]) -> list[float]:
        """From the call of `submit` to the beginning of the job, in ms: one job at a time, after a pause of so many seconds (from, to)."""
        waits = []
        for number in numbers:
            time.sleep(random.uniform(*pauses))
            before = time.time()
            submit(number)
            waits.append((self.wait(number) - before) * 1000)
        return waits

    def wait_for(self, count: int, timeout: float = 120.0) -> dict[int, float]:
        """All marks, as soon as there are so many."""
        deadline = time.monotonic() + timeout
        while len(self.refresh()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.times)} of {count} jobs began within {timeout:g} s")
            time.sleep(0.05)
        return self.times
