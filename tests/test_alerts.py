"""Each alert of jobsys/monitoring fires when what it warns of really happens, no other does, and none on a system that is well.

What happens is real: processes, jobs, PostgreSQL. Prometheus' own tool evaluates the rules on what was scraped meanwhile; only time is
moved: scrapes taken a moment apart are replayed as if a minute lay between them, and a job that shall have waited for long says so in
its row.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import yaml
from conftest import CHECKOUT, Running, eventually, execute, samples, scrape

from jobsys.system import JobSystem

ALERTS = CHECKOUT / "jobsys" / "monitoring" / "alerts.yml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


class Prometheus:
    """Scrapes one web server, and evaluates the rules on what it got."""

    def __init__(self, promtool: str, directory: Path, url: str) -> None:
        self.promtool = promtool
        self.directory = directory
        self.url = url
        self.scrapes: list[dict[str, float]] = []

    def scrape(self, times: int = 1) -> None:
        """Scrape so many times, and note whether that worked as Prometheus does."""
        for _ in range(times):
            try:
                self.scrapes.append({**samples(scrape(self.url)), 'up{job="jobsys"}': 1.0})
            except OSError:
                self.scrapes.append({'up{job="jobsys"}': 0.0})

    def fired(self, rules: Path = ALERTS) -> set[str]:
        """The alerts that have fired by the last scrape, when a minute lies between each and the next."""
        names = sorted({series for each in self.scrapes for series in each})
        series = [{"series": name, "values": " ".join(str(each.get(name, "_")) for each in self.scrapes)} for name in names]
        asked = {
            "expr": 'count by (alertname) (max_over_time(ALERTS{alertstate="firing"}[1d]))',
            "eval_time": f"{len(self.scrapes) - 1}m",
            "exp_samples": [{"labels": '{alertname="what fires is in the answer"}', "value": 1}],
        }
        test = {"interval": "1m", "input_series": series, "promql_expr_test": [asked]}
        file = self.directory / "scrapes.json"  # JSON is YAML
        file.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}))
        run = subprocess.run([self.promtool, "test", "rules", str(file)], capture_output=True, text=True)
        got = re.search(r"^\s*got:(.*)$", run.stdout + run.stderr, re.MULTILINE)
        assert got, run.stdout + run.stderr
        return set(re.findall(r'alertname=\\?"(\w+)\\?"', got[1]))


@pytest.fixture
def prometheus(promtool: str, tmp_path: Path) -> Callable[[Running], Prometheus]:
    """`prometheus(web)`: one that has not scraped yet."""
    return lambda web: Prometheus(promtool, tmp_path, web.url)


def test_the_rules_are_valid_and_each_says_what_to_do(promtool: str) -> None:
    checked = subprocess.run([promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert all(len(rule["annotations"][part]) > 10 for part in ("summary", "description", "runbook")), rule["alert"]


def test_each_alert_is_provoked_here() -> None:
    named = set(re.findall(r'"(Jobsys\w+)"', Path(__file__).read_text()))
    assert named == {rule["alert"] for rule in RULES}


def test_alerts_on_jobs_and_queues_fire_when_what_they_warn_of_happens(
    prometheus: Callable[[Running], Prometheus],
    start_web: Callable[..., Running],
    start_worker: Callable[..., Running],
    system: JobSystem,
    database_url: str,
) -> None:
    web = start_web()
    start_worker()

    def ended(jobs: int) -> bool:
        return sum(system.counts()[status] for status in ("COMPLETED", "FAILED", "DEAD")) == jobs

    def measured(outcome: str, attempts: int) -> bool:
        series = f'jobsys_job_run_seconds_count{{outcome="{outcome}",queue="default",type="TEST_JOB"}}'
        return samples(scrape(web.url)).get(series) == attempts

    def overdue(minutes: int, *, type: str = "NOBODY_KNOWS", queue: str = "default") -> None:
        statement = "insert into jobs (type, queue, run_at) values (%s, %s, clock_timestamp() - %s * interval '1 minute')"
        execute(database_url, statement, type, queue, minutes)

    def fire(what_happens: Callable[[], Any]) -> set[str]:
        watching = prometheus(web)
        watching.scrape(2)
        what_happens()
        watching.scrape(12)
        execute(database_url, "delete from jobs where status = 'PENDING'")
        return watching.fired()

    def all_is_well() -> None:
        for number in range(20):
            system.submit("TEST_JOB", {"failTimes": int(number == 0)})
        eventually(lambda: ended(20) and measured("completed", 20) and measured("failed", 1))

    assert fire(all_is_well) == set()

    def attempts_fail() -> None:
        for _ in range(20):
            system.submit("TEST_JOB", {"giveUp": True})
        eventually(lambda: ended(40) and measured("failed", 21))

    assert fire(attempts_fail) == {"JobsysAttemptsFail"}

    def a_job_can_not_be_run() -> None:
        execute(database_url, """insert into jobs (type, payload) values ('TEST_JOB', '{"sleepMs": "long"}')""")
        eventually(lambda: ended(41))

    assert fire(a_job_can_not_be_run) == {"JobsysDeadLetters"}
    assert fire(lambda: overdue(4)) == set()
    assert fire(lambda: overdue(10)) == {"JobsysJobsLate"}
    assert fire(lambda: overdue(10, queue="ingestion")) == {"JobsysQueueStuck"}

    system.pause("default")
    assert fire(lambda: overdue(10)) == set()
    assert fire(lambda: overdue(40, type="TEST_JOB")) == {"JobsysQueuePaused"}


def test_alerts_fire_when_nobody_works_and_when_the_database_is_away(
    prometheus: Callable[[Running], Prometheus], start_web: Callable[..., Running], system: JobSystem, database_url: str, server: str
) -> None:
    web = start_web()
    watching = prometheus(web)
    execute(
        database_url, "insert into jobs (type, run_at, status) values ('TEST_JOB', clock_timestamp() - interval '2 minutes', 'SCHEDULED')"
    )
    watching.scrape(5)
    assert watching.fired() == {"JobsysNoWorkers"}
    name = database_url.rpartition("/")[2].partition("?")[0]
    system.close()
    execute(server, f'alter database "{name}" allow_connections false')
    try:
        execute(server, "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", name)
        eventually(lambda: not _answers(web))
        watching = prometheus(web)
        watching.scrape(8)
        assert watching.fired() == {"JobsysDown"}
    finally:
        execute(server, f'alter database "{name}" allow_connections true')


def _answers(web: Running) -> bool:
    try:
        return bool(scrape(web.url))
    except OSError:
        return False


def test_alerts_fire_when_workers_die_and_when_nobody_is_left_to_notice(
    prometheus: Callable[[Running], Prometheus],
    start_web: Callable[..., Running],
    start_worker: Callable[..., Running],
    system: JobSystem,
    ledger: Path,
) -> None:
    web = start_web(JOB_MODULES="example_types", PYTHONPATH=f"{CHECKOUT}:{CHECKOUT / 'tests'}")
    worker = start_worker(JOB_MODULES="example_types", PYTHONPATH=f"{CHECKOUT}:{CHECKOUT / 'tests'}")
    eventually(lambda: samples(scrape(web.url))['jobsys_workers{state="alive"}'] == 1, timeout=20)
    watching = prometheus(web)
    watching.scrape(2)
    execute(
        str(system.settings.database_url), "insert into jobs (type, payload) values ('KILLER', %s)", json.dumps({"ledger": str(ledger)})
    )
    eventually(lambda: samples(scrape(web.url))["jobsys_workers_lost_total"] == 3, timeout=30)
    eventually(lambda: system.counts()["DEAD"] == 1)
    watching.scrape(3)
    assert watching.fired() == {"JobsysWorkersDie", "JobsysDeadLetters"}
    eventually(lambda: samples(scrape(web.url))['jobsys_workers{state="alive"}'] == 1, timeout=20)
    watching = prometheus(web)
    supervisor = psutil.Process(worker.pid)
    for process in [supervisor, *supervisor.children(recursive=True)]:
        process.kill()
    eventually(lambda: samples(scrape(web.url))['jobsys_workers{state="silent"}'] == 1)
    watching.scrape(5)
    assert watching.fired() == {"JobsysHeartsSilent"}


def test_an_alert_fires_while_a_transaction_stays_open(
    prometheus: Callable[[Running], Prometheus], start_web: Callable[..., Running], database_url: str, tmp_path: Path
) -> None:
    # Nobody can make a transaction older than it is: here two tenths of a second stand for the hour.
    sooner = tmp_path / "alerts.yml"
    sooner.write_text(re.sub(r"(jobsys_oldest_transaction_seconds\) > )3600", r"\g<1>0.2", ALERTS.read_text()))
    web = start_web()
    watching = prometheus(web)
    watching.scrape(8)
    assert watching.fired(sooner) == set()
    with psycopg2.connect(database_url) as connection:
        connection.cursor().execute("create table mine ()")
        eventually(lambda: samples(scrape(web.url))["jobsys_oldest_transaction_seconds"] > 0.2)
        watching.scrape(8)
        assert watching.fired(sooner) == {"JobsysOldTransaction"}
        connection.rollback()
    connection.close()
