"""When a process runs its jobs one at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from jobsys.concurrency import PAUSE, TRUST, WINDOW, Concurrency
from jobsys.system import JobSystem


class Machine:
    """A clock, and what the process used of its processors until then."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.used = 0.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.used


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr("jobsys.concurrency.time", machine)
    return machine


def runs(machine: Machine, concurrency: Concurrency, *processors: float, waiting: bool = True) -> list[bool]:
    """Whether jobs run one at a time after each of these windows, in which the process used so many processors."""
    decided = []
    for used in processors:
        machine.now += WINDOW
        machine.used += used * WINDOW
        concurrency.judge(machine.now, waiting=waiting)
        decided.append(concurrency.one_at_a_time)
    return decided


def computing(machine: Machine) -> Concurrency:
    """What a process knows that has just begun to run one job at a time."""
    concurrency = Concurrency()
    while runs(machine, concurrency, 0.95) == [False]:
        pass
    return concurrency


def windows(seconds: float) -> int:
    return round(seconds / WINDOW)


def test_jobs_that_keep_the_interpreter_busy_run_one_at_a_time_and_now_and_then_side_by_side_to_see_whether_they_still_do(
    machine: Machine,
) -> None:
    decided = runs(machine, computing(machine), *[0.95] * (windows(2 * TRUST) + 10))
    apart = [number for number, one_at_a_time in enumerate(decided) if not one_at_a_time]
    assert len(apart) == 2 and apart[1] - apart[0] == pytest.approx(windows(TRUST), abs=2)


def test_jobs_that_wait_run_side_by_side(machine: Machine) -> None:
    assert not any(runs(machine, Concurrency(), *[0.7] * 100))


def test_a_burst_that_computes_is_no_reason_to_try(machine: Machine) -> None:
    assert not any(runs(machine, Concurrency(), *[0.95, 0.95, 0.1, 0.1] * 50))


def test_where_one_at_a_time_gets_less_done_it_is_tried_more_and_more_rarely(machine: Machine) -> None:
    concurrency = Concurrency()
    tried_at = []
    while len(tried_at) < 9:
        if runs(machine, concurrency, 0.95) == [True]:
            tried_at.append(machine.now)
            assert runs(machine, concurrency, *[0.3] * 4)[-1] is False
    between = [later - earlier for earlier, later in pairwise(tried_at)]
    shortest, longest = PAUSE
    assert between == pytest.approx([min(shortest * 2**n, longest) for n in range(8)], abs=5 * WINDOW)


def test_a_moment_in_which_others_have_the_processors_changes_nothing(machine: Machine) -> None:
    assert all(runs(machine, computing(machine), 0.95, 0.95, 0.6, 0.95, 0.95, 0.6, 0.95))


def test_what_uses_several_processors_runs_side_by_side(machine: Machine) -> None:
    concurrency = Concurrency()
    assert not any(runs(machine, concurrency, *[2.0] * 10, *[0.95] * 10))


def test_what_would_use_several_processors_is_found_out(machine: Machine) -> None:
    concurrency = computing(machine)
    while runs(machine, concurrency, 0.95) == [True]:
        pass
    assert not any(runs(machine, concurrency, *[2.0] * windows(TRUST)))


def test_while_no_job_waits_for_a_thread_nothing_is_tried_and_nothing_has_failed(machine: Machine) -> None:
    concurrency = Concurrency()
    assert not any(runs(machine, concurrency, *[0.95] * 10, waiting=False))
    assert all(runs(machine, concurrency, *[0.95] * 5))
    assert not any(runs(machine, concurrency, *[0.1] * 20, waiting=False))
    assert runs(machine, concurrency, *[0.95] * 10) == [False] * 6 + [True] * 4


@pytest.mark.parametrize("threads", [8, 1])
def test_a_process_says_once_that_it_runs_its_jobs_one_at_a_time_unless_it_could_not_do_otherwise(
    system: JobSystem, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    said: list[str] = []
    monkeypatch.setattr("jobsys.heart.log.info", lambda event, **values: said.append(event))
    presence = system.broker.attend(threads=threads)
    presence.work._concurrency.one_at_a_time = True
    for _ in range(2):
        presence._heart._mind_the_interpreter()
    assert len([event for event in said if "one at a time" in event]) == (1 if threads > 1 else 0)
