"""What Prometheus gets: the same from every web server, of every process, and never at the jobs' expense."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import webtest
import yaml
from conftest import CHECKOUT, NO_DATABASE, Running, environment, eventually, execute, samples, scrape
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from jobsys import db
from jobsys.app import create_app
from jobsys.errors import DatabaseUnavailable
from jobsys.measurements import METRICS, Measurements, Recorder
from jobsys.settings import Settings
from jobsys.system import JobSystem, Submission

MONITORING = CHECKOUT / "jobsys" / "monitoring"
TEXT = {"Accept": "text/plain;version=0.0.4"}
OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0"}


def recorder_of(system: JobSystem) -> Recorder:
    """A recorder that reports when it is told to."""
    return Recorder(Measurements(), kind="worker", every=1, database=system.database, pools=[system.database])


def get(web: Running, path: str, method: str = "GET") -> int:
    """The status of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(web.url + path, method=method), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_what_workers_and_web_servers_measured_comes_from_any_web_server(
    start_web: Callable[..., Running], start_worker: Callable[..., Running], system: JobSystem, database_url: str
) -> None:
    # The workers' clock is wrong: waits are the database's. One job has been due for ten minutes.
    start_worker(WORKER_PROCESSES=2, JOB_MODULES="jobsys.chaos.jobs", JOBSYS_CHAOS_CLOCK="86400")
    here, there = start_web(WEB_PROCESSES=1), start_web(WEB_PROCESSES=1)
    statement = "insert into jobs (type, run_at) values ('TEST_JOB', clock_timestamp() - interval '10 minutes') returning id::text"
    [(late,)] = execute(database_url, statement)
    ids = [late, *system.submit_many([Submission("TEST_JOB", {"failTimes": int(number < 3)}) for number in range(20)])]
    long = system.submit("TEST_JOB", {"sleepMs": 60_000})
    assert all(system.wait(id, 20).status == "COMPLETED" for id in ids)
    eventually(lambda: system.job(long.id).status == "PROCESSING")
    system.cancel(long.id)
    for id in ids[:5]:
        assert get(here, f"/jobs/{id}") == 200
    assert (get(here, "/none/such"), get(here, "/jobs", "BREW"), get(here, f"/jobs/{late}?wait=1")) == (404, 405, 200)

    def everything() -> dict[str, float]:
        found, same = (
            {name: value for name, value in samples(scrape(web.url)).items() if not name.startswith("jobsys_http")} for web in (here, there)
        )
        assert found == same
        of_type = 'queue="default",type="TEST_JOB"'
        assert found[f"jobsys_job_wait_seconds_count{{{of_type}}}"] == 25
        assert found[f'jobsys_job_wait_seconds_bucket{{{of_type},le="300.0"}}'] == 24
        assert 600 < found[f"jobsys_job_wait_seconds_sum{{{of_type}}}"] < 1000
        ran = {outcome: found[f'jobsys_job_run_seconds_count{{outcome="{outcome}",{of_type}}}'] for outcome in ("completed", "failed")}
        assert ran == {"completed": 21, "failed": 3}
        assert found[f'jobsys_job_run_seconds_count{{outcome="interrupted",{of_type}}}'] == 1
        assert found["jobsys_claim_seconds_count"] >= 1 and found["jobsys_settle_seconds_count"] >= 1
        assert found['jobsys_workers{state="alive"}'] == 2 and found["jobsys_worker_threads"] == 8
        assert found['jobsys_pool_size{pool="jobsys worker",process="worker"}'] == 8
        assert found['jobsys_pool_size{pool="jobsys",process="web"}'] == 16
        return found

    eventually(everything)

    def requests() -> None:
        found = samples(scrape(there.url))
        assert found['jobsys_http_requests_total{method="GET",route="/jobs/{job_id}",status="200"}'] == 5
        assert found['jobsys_http_requests_total{method="GET",route="/jobs/{job_id}?wait",status="200"}'] == 1
        assert found['jobsys_http_requests_total{method="GET",route="none",status="404"}'] == 1
        assert found['jobsys_http_requests_total{method="other",route="/jobs",status="405"}'] == 1
        assert found['jobsys_http_request_seconds_count{method="GET",route="/jobs/{job_id}"}'] == 5

    eventually(lambda: [requests()])


def test_what_a_process_counted_outlives_it_and_its_pools_do_not(
    start_worker: Callable[..., Running], system: JobSystem, api: webtest.TestApp
) -> None:
    worker = start_worker()
    job = system.submit("TEST_JOB")
    assert system.wait(job.id, 20).status == "COMPLETED"
    counted, pool = 'jobsys_job_run_seconds_count{outcome="completed",queue="default",type="TEST_JOB"}', 'process="worker"'
    eventually(lambda: samples(api.get("/metrics", headers=TEXT).text).get(counted) == 1)
    assert pool in api.get("/metrics", headers=TEXT).text
    supervisor = psutil.Process(worker.pid)
    for process in [supervisor, *supervisor.children()]:
        process.kill()
    eventually(lambda: pool not in api.get("/metrics", headers=TEXT).text)
    assert samples(api.get("/metrics", headers=TEXT).text)[counted] == 1


def test_a_process_that_ends_reports_first(
    start_worker: Callable[..., Running], start_web: Callable[..., Running], system: JobSystem
) -> None:
    slow = {"WORKER_HEARTBEAT": "1h", "WORKER_LOST_AFTER": "2h"}
    worker, web = start_worker(**slow), start_web(**slow)
    assert system.wait(system.submit("TEST_JOB").id, 20).status == "COMPLETED"
    assert worker.stop() == 0 and web.stop() == 0
    counted = execute(str(system.settings.database_url), "select metric, labels->>'route' from measurements where metric !~ 'claim|settle'")
    assert sorted(counted) == [("http_request_seconds", "/health/live"), ("job_run_seconds", None), ("job_wait_seconds", None)]
    assert execute(str(system.settings.database_url), "select * from process_pools") == []


def test_a_lost_worker_is_counted_once_its_jobs_are_back(system: JobSystem, api: webtest.TestApp, database_url: str) -> None:
    columns = "id, host, pid, version, queues, types, threads, heartbeat, lost_after, session_pid, session_start"
    values = "gen_random_uuid(), 'h', 1, '', '{default}', '{TEST_JOB}', 8, '1m', '1h', 1, now()"
    [(id,)] = execute(database_url, f"insert into workers ({columns}) values ({values}) returning id::text")
    running = "insert into jobs (type, status, worker, started_at) values ('TEST_JOB', 'PROCESSING', %s, now())"
    execute(database_url, running, id)
    counted = []
    for change in ("select 1", "update jobs set status = 'PENDING', worker = null", "select 1"):
        execute(database_url, change)
        system.database.run("forget_worker", id=id)
        counted.append(samples(api.get("/metrics", headers=TEXT).text)["jobsys_workers_lost_total"])
    assert counted == [0, 1, 1]


def test_processes_that_add_to_the_same_numbers_at_once_lose_none_and_wait_in_no_circle(system: JobSystem) -> None:
    labels = [(f"TYPE_{number}", "default") for number in range(50)]

    def count(recorder: Recorder, order: list[tuple[str, str]]) -> None:
        for _ in range(20):
            for each in order:
                recorder.measurements.observe("job_wait_seconds", each, 0.25)
            with contextlib.suppress(DatabaseUnavailable):  # others were long at it: with the next one
                recorder.report()
        recorder.leave()

    threads = [threading.Thread(target=count, args=(recorder_of(system), labels[:: 1 if n % 2 else -1])) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bucket = METRICS["job_wait_seconds"].bounds.index(0.25)
    found = execute(str(system.settings.database_url), "select buckets[%s], sum, cardinality(buckets) from measurements", bucket + 1)
    assert found == [(120, 30.0, len(METRICS["job_wait_seconds"].bounds) + 1)] * 50


def test_the_last_report_waits_for_those_who_are_at_it(system: JobSystem, database_url: str) -> None:
    recorder = recorder_of(system)
    recorder.measurements.observe("claim_seconds", (), 0.004)
    with psycopg2.connect(database_url) as holder:
        holder.cursor().execute("lock table measurements in exclusive mode")
        leaving = threading.Thread(target=recorder.leave)
        leaving.start()
        time.sleep(0.4)
    holder.close()
    leaving.join()
    assert execute(database_url, "select sum from measurements") == [(0.004,)]


def test_what_is_measured_while_the_database_is_away_is_kept(system: JobSystem) -> None:
    recorder = recorder_of(system)
    recorder.measurements.observe("claim_seconds", (), 0.004)
    with pytest.raises(DatabaseUnavailable):
        recorder.report(db.Database("postgresql://127.0.0.1:1/none"))
    recorder.measurements.observe("claim_seconds", (), 99.0)
    recorder.report()
    recorder.report()
    [(buckets, total)] = execute(str(system.settings.database_url), "select buckets, sum from measurements")
    assert Counter(buckets) == {0: len(buckets) - 2, 1: 2} and buckets[2] == buckets[-1] == 1 and total == 99.004


def test_a_lock_on_what_is_measured_holds_up_no_job(start_worker: Callable[..., Running], system: JobSystem, database_url: str) -> None:
    start_worker()
    eventually(lambda: execute(database_url, "select 1 from process_pools"), timeout=20)
    with contextlib.closing(psycopg2.connect(database_url)) as holder:
        holder.cursor().execute("lock table measurements in access exclusive mode")
        assert system.wait(system.submit("TEST_JOB").id, 20).status == "COMPLETED"
        eventually(lambda: execute(database_url, "select 1 from pg_locks where not granted"))
        for _ in range(3):
            assert system.wait(system.submit("TEST_JOB", delay=0.3).id, 20).status == "COMPLETED"
    eventually(
        lambda: execute(database_url, "select 1 from measurements where metric = 'job_run_seconds' and sum >= 0 and buckets <> '{}'")
    )


def test_a_thread_that_waits_for_a_connection_is_measured(system: JobSystem) -> None:
    pool = db.Database(str(system.settings.database_url), size=1, wait=0.05)
    with pool.connection(), pytest.raises(DatabaseUnavailable), pool.connection():
        pass
    assert len(pool.waits) == 1 and pool.waits[0] >= 0.05
    assert (pool.size, pool.in_use, pool.idle) == (1, 0, 1)
    pool.close()


def test_jobs_that_nobody_is_there_to_make_pending_count_as_waiting(api: webtest.TestApp, database_url: str) -> None:
    overdue = "insert into jobs (type, queue, status, run_at) values ('TEST_JOB', %s, %s, clock_timestamp() - %s * interval '1 minute')"
    for queue, status, minutes in (
        ("a", "SCHEDULED", 5),
        ("b", "PENDING", 1),
        ("b", "PENDING", 2),
        ("c", "SCHEDULED", -5),
        ("c", "PENDING", -5),
    ):
        execute(database_url, overdue, queue, status, minutes)
    found = samples(api.get("/metrics", headers=TEXT).text)
    waits = [found[f'jobsys_queue_wait_seconds{{queue="{queue}"}}'] for queue in "abc"]
    assert [int(wait) // 60 for wait in waits] == [5, 2, 0] and waits[2] == 0


def test_without_workers_the_web_server_sums_the_counts(api: webtest.TestApp, database_url: str) -> None:
    for _ in range(5):
        api.post_json("/jobs", {})
    eventually(lambda: execute(database_url, "select count(*) from tally_log") == [(0,)])
    assert samples(api.get("/metrics", headers=TEXT).text)["jobsys_jobs_created_total"] == 5


def test_a_scrape_does_not_look_at_the_jobs(api: webtest.TestApp, system: JobSystem, database_url: str) -> None:
    execute(
        database_url,
        """
        insert into jobs (type, queue, status, run_at)
        select 'TYPE_' || n % 200, 'queue ' || n % 5, 'PENDING', now() - n * interval '1 ms' from generate_series(1, 20000) as n
        """,
    )
    execute(database_url, "vacuum analyze jobs")

    def rows_read() -> int:
        """By all sessions: each reports what it read when it ends, at the latest."""
        sessions = "select 1 from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
        eventually(lambda: len(execute(database_url, sessions)) == 1)
        statement = "select seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_user_tables where relname = 'jobs'"
        return int(execute(database_url, statement)[0][0])

    before = rows_read()
    found = samples(api.get("/metrics", headers=TEXT).text)
    system.close()
    assert found['jobsys_queue_jobs{queue="queue 1",status="PENDING"}'] == 4000
    assert rows_read() - before < 50


def test_a_scrape_is_refused_in_time_when_the_database_is_away_or_stuck(api: webtest.TestApp, system: JobSystem, database_url: str) -> None:
    with db.Database(database_url).connect() as connection:
        connection.autocommit = False
        connection.cursor().execute("lock table measurements in access exclusive mode")
        began = time.monotonic()
        refused = api.get("/metrics", headers=TEXT, status=503)
        assert time.monotonic() - began < 5 and int(refused.headers["Retry-After"]) > 0
        connection.rollback()
    away = JobSystem(NO_DATABASE)
    webtest.TestApp(create_app(system=away)).get("/metrics", headers=TEXT, status=503)
    away.close()


# The exposition, and what is made for it


@pytest.fixture
def busy(api: webtest.TestApp, system: JobSystem, database_url: str) -> webtest.TestApp:
    """An API that has something to tell of everything."""
    recorder = recorder_of(system)
    for name, metric in METRICS.items():
        for seconds in (0.0, 0.3, 1e9):
            recorder.measurements.observe(name, tuple(f'a "{label}"\\' for label in metric.labels), seconds)
    recorder.report()
    api.post_json("/jobs", {})
    system.pause("ingestion")
    columns = "id, host, pid, version, queues, types, threads, heartbeat, lost_after, session_pid, session_start, held_back"
    held_back = "gen_random_uuid(), 'h', 1, '', '{default}', '{TEST_JOB}', 8, '1m', '1h', 1, now(), '{TEST_JOB}'"
    execute(database_url, f"insert into workers ({columns}) values ({held_back})")
    return api


@pytest.mark.parametrize(("accept", "parse"), [(TEXT, parse_text), (OPENMETRICS, parse_openmetrics)])
def test_the_exposition_follows_the_conventions(
    busy: webtest.TestApp, accept: dict[str, str], parse: Callable[[str], Iterator[Any]]
) -> None:
    families = list(parse(busy.get("/metrics", headers=accept).text))
    assert {family.type for family in families} == {"counter", "gauge", "histogram"}
    for family in families:
        assert re.fullmatch(r"jobsys_[a-z_]+", family.name) and family.documentation.endswith("."), family.name
        assert not re.search(r"milli|micro|_ms|_count$|_sum$|_bucket$|_total$|_info$", family.name)
        assert family.type != "histogram" or family.name.endswith("_seconds")
        assert family.samples, f"nothing is told of {family.name}"
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
        series = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
        assert len(set(series)) == len(series)
    waits = next(family for family in families if family.name == "jobsys_job_wait_seconds")
    assert {sample.labels["type"] for sample in waits.samples} == {'a "type"\\'}
    assert [sample.value for sample in waits.samples if sample.name.endswith("_bucket")][-2:] == [2, 3]


def test_promtool_is_content(busy: webtest.TestApp, promtool: str) -> None:
    checked = subprocess.run([promtool, "check", "metrics"], input=busy.get("/metrics", headers=TEXT).text, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def expressions() -> list[str]:
    """What the alert rules, the panels and the variables of the dashboard ask."""
    rules = [rule["expr"] for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return rules + panels + [each["query"]["query"] for each in dashboard["templating"]["list"]]


def test_rules_and_dashboard_ask_for_nothing_that_is_not_there(busy: webtest.TestApp) -> None:
    there: dict[str, set[str]] = {"up": {"job"}}
    for family in parse_text(busy.get("/metrics", headers=TEXT).text):
        for sample in family.samples:
            there.setdefault(sample.name, set()).update(sample.labels)
    used = set()
    for expression in expressions():
        names = set(re.findall(r"\b(?:jobsys_\w+|up)\b", expression))
        assert names and names <= there.keys(), expression
        for name, selector in re.findall(r"\b(\w+)\{(.*?)\}", expression):
            assert set(re.findall(r"(\w+)\s*=~?", selector)) <= there[name], expression
        grouped = {label.strip() for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in labels.split(",")}
        assert grouped <= set().union(*(there[name] for name in names)), expression
        used |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert used >= {f"jobsys_{name}" for name in METRICS}


def test_promtool_reads_every_expression(promtool: str, tmp_path: Path) -> None:
    readable = [re.sub(r"\$__rate_interval", "5m", each) for each in expressions() if not each.startswith("label_values")]
    rules = [{"record": f"rule:{number}", "expr": each} for number, each in enumerate(readable)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))
    checked = subprocess.run([promtool, "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    [source] = dashboard["__inputs"]
    assert (source["name"], source["type"], source["pluginId"]) == ("DS_PROMETHEUS", "datasource", "prometheus")
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and dashboard["id"] is None
    kinds = {each["id"] for each in dashboard["__requires"] if each["type"] == "panel"}
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["type"] in kinds and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
            for asked in (panel, *panel["targets"]):
                assert asked["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for variable in re.findall(r"\$(?!__)(\w+)", " ".join(expressions())):
        assert variable in {each["name"] for each in dashboard["templating"]["list"]}


@pytest.mark.parametrize(("what", "file"), [("alerts", "alerts.yml"), ("dashboard", "dashboard.json"), ("scrape", "scrape.yml")])
def test_the_command_line_prints_the_files(what: str, file: str, settings: Settings) -> None:
    command = [sys.executable, "-m", "jobsys", "monitoring", what]
    printed = subprocess.run(command, env=environment(settings), capture_output=True, text=True, check=True).stdout
    assert printed == (MONITORING / file).read_text()


def test_the_scrape_configuration_is_valid(promtool: str, tmp_path: Path) -> None:
    (tmp_path / "jobsys-alerts.yml").write_bytes((MONITORING / "alerts.yml").read_bytes())
    (tmp_path / "prometheus.yml").write_bytes((MONITORING / "scrape.yml").read_bytes())
    checked = subprocess.run([promtool, "check", "config", "prometheus.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
