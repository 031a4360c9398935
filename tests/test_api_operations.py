"""Health and metrics: what they say is what the database knows."""

from __future__ import annotations

import time
from collections.abc import Callable

import webtest
from conftest import Running, eventually
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

PROMETHEUS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"


def test_health_tells_of_the_process_the_database_and_the_workers(api: webtest.TestApp) -> None:
    health = api.get("/health", status=200).json
    assert health["memory"]["rss"] > 10_000_000 and health["uptime"] >= 0
    assert {name: health[name] for name in ("status", "database", "broker", "workers")} == {
        "status": "ok",
        "database": True,
        "broker": True,
        "workers": 0,
    }


def test_due_jobs_that_nobody_serves_do_not_make_the_web_server_ill(api: webtest.TestApp, start_worker: Callable[..., Running]) -> None:
    api.post_json("/jobs", {})
    health = api.get("/health", status=200).json
    assert (health["status"], health["broker"]) == ("ok", False)
    start_worker(WORKER_PROCESSES=2)
    eventually(lambda: (health := api.get("/health").json)["broker"] and health["workers"] == 2, timeout=20)


def test_without_a_database_health_is_red_and_liveness_is_not(away: webtest.TestApp) -> None:
    began = time.monotonic()
    health = away.get("/health", status=503)
    assert time.monotonic() - began < 5.5
    assert int(health.headers["Retry-After"]) > 0
    assert (health.json["status"], health.json["database"], health.json["broker"]) == ("unavailable", False, False)
    assert away.get("/health/live", status=200).json["status"] == "ok"


def test_metrics_count_what_happened_since_the_database_was_made(api: webtest.TestApp) -> None:
    ids = [api.post_json("/jobs", {}).json["jobId"] for _ in range(4)]
    api.post_json("/jobs", {"delay": 60})
    api.post(f"/admin/jobs/{ids[0]}/dlq")
    api.post(f"/jobs/{ids[1]}/cancel")
    api.delete(f"/jobs/{ids[1]}")
    answer = api.get("/metrics", status=200)
    assert answer.content_type == "application/json"
    assert answer.json == {
        "jobs_created": 5,
        "jobs_pending": 2,
        "jobs_scheduled": 1,
        "jobs_processing": 0,
        "jobs_success": 0,
        "jobs_failed": 0,
        "jobs_retried": 0,
        "jobs_dlq": 1,
        "jobs_cancelled": 1,
    }


def test_metrics_speak_the_language_that_is_preferred(api: webtest.TestApp) -> None:
    for accept, content_type in (
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("nonsense", "application/json"),
        ("text/plain", "text/plain"),
        ("text/plain;version=0.0.4, */*;q=0.1", "text/plain"),
        ("application/openmetrics-text", "application/openmetrics-text"),
        (PROMETHEUS, "application/openmetrics-text"),
    ):
        answer = api.get("/metrics", headers={"Accept": accept}, status=200)
        assert (answer.content_type, answer.headers["Vary"]) == (content_type, "Accept")


def test_prometheus_reads_the_same_numbers(api: webtest.TestApp) -> None:
    api.post_json("/jobs", {})
    api.post_json("/jobs", {"delay": 60})
    for accept, parse in (("text/plain", parse_text), (PROMETHEUS, parse_openmetrics)):
        text = api.get("/metrics", headers={"Accept": accept}).text
        samples = {(sample.name, *sorted(sample.labels.items())): sample.value for family in parse(text) for sample in family.samples}
        assert samples[("jobsys_jobs_created_total",)] == 2
        assert samples[("jobsys_jobs_success_total",)] == 0
        assert samples[("jobsys_jobs", ("status", "SCHEDULED"))] == 1
        assert samples[("jobsys_queue_jobs", ("queue", "default"), ("status", "PENDING"))] == 1
        assert samples[("jobsys_queue_paused", ("queue", "default"))] == 0
        assert samples[("jobsys_queue_wait_seconds", ("queue", "default"))] >= 0
