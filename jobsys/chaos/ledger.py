"""Compares three accounts of the same jobs: what the client was told, what the jobs wrote into a file, and what the database says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ENDS = ("COMPLETED", "FAILED", "DEAD", "CANCELLED")


class Submitted(NamedTuple):
    """What the client knows of a submission: `id` is None when it never heard whether the job was accepted."""

    number: int
    id: str | None
    fail_times: int = 0


class Row(NamedTuple):
    """What the database says of a job in the end."""

    id: str
    number: int
    status: str
    attempt: int
    crashes: int


class Run(NamedTuple):
    """One run of a job: from `began` until `ended` (of time.monotonic; None: its process died under it), and how: end, fail or stop."""

    id: str
    attempt: int
    pid: int
    began: float
    ended: float | None
    how: str | None


@dataclass
class Verdict:
    """What is wrong, as sentences; and how many extra runs there were, which is no fault as long as events explain them."""

    accepted: int = 0
    finished: int = 0
    runs: int = 0
    extra_runs: int = 0
    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def read(ledger: Path) -> list[Run]:
    """The runs that jobs wrote down, by job in the order they began."""
    open_runs: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    runs = []
    for line in ledger.read_text().splitlines() if ledger.exists() else []:
        what, _, id, attempt, pid, at = line.split()
        key = (id, int(pid))
        if what == "start":
            open_runs[key].append((int(attempt), float(at)))
        else:
            number, began = open_runs[key].pop()
            runs.append(Run(id, number, int(pid), began, float(at), what))
    for (id, process), left in open_runs.items():
        runs += [Run(id, number, process, began, None, None) for number, began in left]
    return sorted(runs, key=lambda run: (run.id, run.began))


def compare(
    submitted: Iterable[Submitted], rows: Iterable[Row], runs: Iterable[Run], *, events: int, overlaps: int = 0, forgotten: int = 0
) -> Verdict:
    """Hold the accounts against each other. `events` is how often a worker died, froze or was cut off: each may cost a job one extra
    run. `overlaps` is how many of them leave a process running that was declared lost: then one run may begin while another goes on.
    `forgotten` is how often PostgreSQL crashed: each time it may have forgotten a claim, and with it that the attempt was counted."""
    verdict = Verdict()
    known = {row.id: row for row in rows}
    by_number: dict[int, Submitted] = {each.number: each for each in submitted}
    by_job: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_job[run.id].append(run)
        verdict.runs += 1
    for each in by_number.values():
        if each.id is not None:
            verdict.accepted += 1
            if each.id not in known:
                verdict.wrong["lost"].append(f"job {each.id} was accepted, and is not there")
    seen: dict[int, str] = {}
    for row in known.values():
        promised = by_number.get(row.number)
        if promised is None or (promised.id is not None and promised.id != row.id) or row.number in seen:
            verdict.wrong["phantom"].append(f"job {row.id} (number {row.number}) is there, and was not submitted, or is there twice")
        seen[row.number] = row.id
        if row.status not in ENDS:
            verdict.wrong["stuck"].append(f"job {row.id} is still {row.status} at attempt {row.attempt}")
            continue
        verdict.finished += 1
        _judge(row, by_job.pop(row.id, []), promised.fail_times if promised else 0, events, overlaps, forgotten, verdict)
    for id in by_job.keys() - known.keys():
        verdict.wrong["phantom"].append(f"job {id} ran, and is not there")
    return verdict


def _judge(row: Row, runs: list[Run], fail_times: int, events: int, overlaps: int, forgotten: int, verdict: Verdict) -> None:
    ended = [run for run in runs if run.how == "end"]
    stopped = sum(run.how == "stop" for run in runs)
    if ended and row.status != "COMPLETED":
        verdict.wrong["unrecorded"].append(f"job {row.id} ran to its end, and is {row.status}")
    if row.status == "COMPLETED" and not ended:
        verdict.wrong["unearned"].append(f"job {row.id} is COMPLETED, and never ran to its end")
    if len(runs) - stopped > row.attempt + forgotten:
        verdict.wrong["undercounted"].append(f"job {row.id} began {len(runs) - stopped} attempts, and {row.attempt} are counted")
    extra = len(runs) - stopped - 1 - min(fail_times, len(runs) - 1) if runs else 0
    verdict.extra_runs += max(0, extra)
    if extra > events:
        verdict.wrong["repeated"].append(f"job {row.id} ran {extra} times too often, after {events} events")
    side_by_side = sum(earlier.ended is not None and later.began < earlier.ended for earlier, later in pairwise(runs))
    if side_by_side > overlaps:
        verdict.wrong["overlapping"].append(f"job {row.id} ran twice at the same time")
