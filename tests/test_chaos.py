"""`jobsys chaos`: that it sees each kind of wrong, and a quick part of what it breaks. `bin/chaos` is the long part."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import CHECKOUT, Launcher, environment, eventually, execute, is_alive
from mutants import MUTANTS, Mutant, broken

from jobsys.chaos.faults import FAULTS
from jobsys.chaos.ledger import Row, Run, Submitted, Verdict, compare, read
from jobsys.settings import Settings
from jobsys.system import JobSystem

JOB = "01a2057e-02b3-7000-8e7e-b3f3ad405f07"
OTHER = "01a2057e-02b3-7000-8e7e-b3f3ad405f08"
Jobsys = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def jobsys(settings: Settings, tmp_path: Path) -> Jobsys:
    """`jobsys("chaos", …)`: the command, on this test's database."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobsys", *arguments]
        return subprocess.run(command, env=environment(settings), cwd=tmp_path, capture_output=True, text=True, timeout=200)

    return run


def verdict(
    row: Row | None = None,
    *runs: Run,
    submitted: Submitted | None = None,
    events: int = 0,
    overlaps: int = 0,
) -> Verdict:
    rows = [] if row is None else [row]
    return compare([submitted or Submitted(1, JOB)], rows, runs, events=events, overlaps=overlaps)


def ran(attempt: int = 1, began: float = 1.0, ended: float | None = 2.0, how: str | None = "end", id: str = JOB) -> Run:
    return Run(id, attempt, 4711, began, ended, how)


COMPLETED = Row(JOB, 1, "COMPLETED", 1, 0)


def test_a_job_that_ran_once_and_completed_is_as_promised() -> None:
    found = verdict(COMPLETED, ran())
    assert not found.wrong and (found.accepted, found.finished, found.runs, found.extra_runs) == (1, 1, 1, 0)


def test_a_submission_without_an_answer_may_have_made_a_job_or_none() -> None:
    unanswered = Submitted(1, None)
    assert not verdict(COMPLETED, ran(), submitted=unanswered).wrong and not verdict(submitted=unanswered).wrong


def test_a_failure_that_was_ordered_and_a_run_that_was_interrupted_are_no_extra_runs() -> None:
    ordered = verdict(Row(JOB, 1, "COMPLETED", 2, 0), ran(how="fail"), ran(2, 3, 4), submitted=Submitted(1, JOB, 1))
    interrupted = verdict(COMPLETED, ran(how="stop"), ran(1, 3, 4))
    assert not ordered.wrong and not interrupted.wrong and ordered.extra_runs == interrupted.extra_runs == 0


def test_an_event_explains_one_extra_run() -> None:
    found = verdict(Row(JOB, 1, "COMPLETED", 2, 1), ran(ended=None, how=None), ran(2, 3, 4), events=1)
    assert not found.wrong and found.extra_runs == 1


def test_a_crash_of_the_database_explains_one_attempt_that_is_not_counted() -> None:
    runs = [ran(ended=None, how=None), ran(1, 3, 4)]
    assert not compare([Submitted(1, JOB)], [COMPLETED], runs, events=1, forgotten=1).wrong
    assert "undercounted" in compare([Submitted(1, JOB)], [COMPLETED], [*runs, ran(1, 5, 6)], events=2, forgotten=1).wrong


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("lost", verdict()),
        ("phantom", verdict(COMPLETED, ran(), submitted=Submitted(2, None))),
        ("phantom", verdict(COMPLETED, ran(), submitted=Submitted(1, OTHER))),
        ("phantom", verdict(COMPLETED, ran(), ran(id=OTHER))),
        ("phantom", compare([Submitted(1, None)], [COMPLETED, Row(OTHER, 1, "COMPLETED", 1, 0)], [ran(), ran(id=OTHER)], events=0)),
        ("stuck", verdict(Row(JOB, 1, "PROCESSING", 1, 0), ran(ended=None, how=None))),
        ("unrecorded", verdict(Row(JOB, 1, "FAILED", 1, 0), ran())),
        ("unearned", verdict(COMPLETED, ran(how="fail"))),
        ("unearned", verdict(COMPLETED)),
        ("undercounted", verdict(COMPLETED, ran(ended=None, how=None), ran(1, 3, 4), events=1)),
        ("repeated", verdict(Row(JOB, 1, "COMPLETED", 2, 1), ran(), ran(2, 3, 4))),
        ("overlapping", verdict(Row(JOB, 1, "COMPLETED", 2, 1), ran(ended=5), ran(2, 3, 4), events=1)),
    ],
)
def test_each_broken_promise_is_seen(kind: str, found: Verdict) -> None:
    assert kind in found.wrong


def test_the_ledger_is_read_as_runs(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    assert read(ledger) == []
    ledger.write_text(f"start 1 {JOB} 1 4711 1.0\nstart 1 {JOB} 2 4712 3.0\nend 1 {JOB} 2 4712 4.0\n")
    assert read(ledger) == [ran(ended=None, how=None), Run(JOB, 2, 4712, 3.0, 4.0, "end")]


@pytest.mark.parametrize("fault", ["worker-killed", "cut-at-commit", "no-notifications"])
def test_what_is_safe_breaks_only_its_own_and_leaves_nothing_behind(jobsys: Jobsys, database_url: str, fault: str) -> None:
    execute(database_url, "insert into jobs (type, queue) values ('TEST_JOB', 'default')")
    execute(database_url, "insert into queues (name, rate_count, rate_period) values ('ingestion', 7, '1 minute')")
    execute(database_url, "insert into job_types values ('TEST_JOB', 'default', 0, 99)")
    old = "'016f5e66-e800-7000-8000-000000000000', 'TEST_JOB', 'COMPLETED', '2020-01-01', '2020-01-01'"
    execute(database_url, f"insert into jobs (id, type, status, created_at, finished_at) values ({old})")
    done = jobsys("chaos", "--seconds", "3", "--json", fault)
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = json.loads(done.stdout)["results"]
    assert result["accepted"] > 100 and result["wrong"] == {}
    assert execute(database_url, "select type, status::text from jobs order by id") == [("TEST_JOB", "COMPLETED"), ("TEST_JOB", "PENDING")]
    assert execute(database_url, "select count(*) from workers") == [(0,)]
    assert execute(database_url, "select name, rate_count from queues") == [("ingestion", 7)]
    assert execute(database_url, "select name, max_attempts from job_types") == [("TEST_JOB", 99)]
    counted = "select distinct queue from (select queue from tallies union all select queue from tally_log) as counted"
    assert execute(database_url, counted) == [("default",)]
    assert execute(database_url, "select labels from measurements where labels ? 'queue'") == []


def test_a_database_of_its_own_is_killed_and_no_job_is_lost(jobsys: Jobsys) -> None:
    done = jobsys("chaos", "--own-server", "--seconds", "1", "database-killed")
    assert done.returncode == 0 and "none lost, none stuck, each with one end" in done.stdout, done.stdout + done.stderr


def test_what_can_be_broken_is_listed_and_a_slip_is_answered_with_it(jobsys: Jobsys) -> None:
    listed = {line.split()[0] for line in jobsys("chaos", "--own-server", "--list").stdout.splitlines()}
    assert listed == set(FAULTS)
    slip = jobsys("chaos", "worker-kiled")
    assert slip.returncode == 1 and 'fault "worker-kiled" is not one of worker-killed, ' in slip.stderr
    unsafe = jobsys("chaos", "database-killed")
    assert unsafe.returncode == 1 and "with --own-server only" in unsafe.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_the_mutants_break_is_still_there(mutant: Mutant) -> None:
    assert broken(mutant, (CHECKOUT / mutant.file).read_text(encoding="utf-8"))


def test_a_chaos_that_is_told_to_end_leaves_no_process(settings: Settings, launcher: Launcher) -> None:
    chaos = launcher.start("chaos", [sys.executable, "-m", "jobsys", "chaos", "no-notifications"], environment(settings))
    system = JobSystem(settings)
    eventually(lambda: len(system.workers()) == 2, 40)
    children = psutil.Process(chaos.pid).children(recursive=True)
    chaos.stop(40)
    eventually(lambda: not any(is_alive(child) for child in children), 20)
    assert system.workers() == []
    system.close()
