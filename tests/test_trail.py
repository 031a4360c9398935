"""What a request leaves behind: its id on every line about it and its jobs, in their records, and in the mails they send."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT, Mailbox, Running, eventually, execute

from jobsys import Job, trail
from jobsys.attempts import AttemptLog
from jobsys.errors import InvalidSubmission
from jobsys.job_types import registry
from jobsys.outcomes import Outcome, finish
from jobsys.running import RunningJob
from jobsys.settings import Settings

MAIL = {"to": "ada@example.test", "subject": "Hello", "body": "It works."}
TYPES = {"JOB_MODULES": "trail_types", "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'tests'}"}


def post(url: str, document: Any, **headers: str) -> tuple[dict[str, Any], str]:
    """What a POST answers, and the request's id."""
    request = urllib.request.Request(url, json.dumps(document).encode(), {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(response.read()), response.headers["X-Request-ID"]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_id_leads_from_the_request_through_every_attempt_to_the_mail(
    start_web: Callable[..., Running], start_worker: Callable[..., Running], system: Any, mail: Mailbox, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    web = start_web(LOG_FILE=log, **TYPES)
    start_worker(LOG_FILE=log, SMTP_HOST="127.0.0.1", SMTP_PORT=mail.port, **TYPES)
    answer, request_id = post(f"{web.url}/jobs", {"type": "LEADER"}, **{"X-Request-ID": "order-7/a"})
    assert request_id == "order-7/a"
    eventually(lambda: mail.messages and len([each for each in lines(log) if each["event"] == "attempt succeeded"]) == 4, timeout=20)

    (message,) = mail.messages
    assert message["X-Request-ID"] == "order-7/a" and message["X-Job-Id"] != answer["jobId"]
    of_it = [each for each in lines(log) if each.get("request_id") == "order-7/a"]
    about = [(each["event"], each.get("attempt"), each.get("type")) for each in of_it if each.get("job_id") == answer["jobId"]]
    assert about == [
        ("request", None, None),
        ("at work", None, None),
        ("attempt failed", 1, "LEADER"),
        ("at work", None, None),
        ("attempt succeeded", 2, "LEADER"),
    ]
    others = {each["job_id"]: each["type"] for each in of_it if each["event"] == "attempt succeeded" and each["job_id"] != answer["jobId"]}
    assert sorted(others.values()) == ["EMAIL_SEND", "follow", "follow"]
    assert {each["job_id"] for each in of_it if each["event"] == "following"} == {id for id, type in others.items() if type == "follow"}
    assert all(system.job(job_id).request_id == "order-7/a" for job_id in [answer["jobId"], *others])
    assert all(each["seconds"] >= 0 for each in of_it if each["event"].startswith("attempt"))

    with urllib.request.urlopen(f"{web.url}/jobs/{answer['jobId']}", timeout=10) as response:
        assert json.loads(response.read())["requestId"] == "order-7/a"
    with urllib.request.urlopen(f"{web.url}/jobs/{answer['jobId']}/events", timeout=10) as response:
        assert json.loads(response.read())["events"][0]["requestId"] == "order-7/a"
    with urllib.request.urlopen(f"{web.url}/admin/ui/jobs/{answer['jobId']}", timeout=10) as response:
        assert "order-7/a" in response.read().decode()


def test_requests_of_one_thread_do_not_mix(start_web: Callable[..., Running], system: Any, tmp_path: Path) -> None:
    web = start_web(LOG_FILE=tmp_path / "log", WEB_PROCESSES=1, WEB_THREADS=1)
    answers = [post(f"{web.url}/jobs", {}) for _ in range(3)]
    ingested, ingest_id = post(f"{web.url}/api/ingest", {"ids": [1, 2, 3, 4]})
    assert len({request_id for _, request_id in answers}) == 3
    assert [system.job(answer["jobId"]).request_id for answer, _ in answers] == [request_id for _, request_id in answers]
    batches = system.group(ingested["data"]["ingestion_id"])
    assert [job.request_id for job in batches] == [ingest_id] * 2
    logged = [(each["request_id"], each.get("job_id")) for each in lines(tmp_path / "log") if each.get("path") in ("/jobs", "/api/ingest")]
    assert logged == [*((request_id, answer["jobId"]) for answer, request_id in answers), (ingest_id, None)]


def test_a_program_may_give_an_id_of_its_own_or_none(system: Any) -> None:
    given = system.submit("TEST_JOB", request_id="nightly:1")
    assert given.request_id == system.job(given.id).request_id == "nightly:1"
    assert system.job(system.submit("TEST_JOB").id).options == {}
    for wrong in ("", "a b", "a\r\nBcc: eve@example.test", "é", "x" * 129, 7):
        with pytest.raises(InvalidSubmission, match="requestId: must be 1 to 128 letters"):
            system.submit("TEST_JOB", request_id=wrong)


def test_what_somebody_wrote_into_the_table_reaches_no_mail(
    settings: Settings, system: Any, start_worker: Callable[..., Running], mail: Mailbox
) -> None:
    start_worker(SMTP_HOST="127.0.0.1", SMTP_PORT=mail.port)
    for evil in ("x\r\nBcc: eve@example.test", ["a"], {"b": 1}, None):
        execute(
            str(settings.database_url),
            "insert into jobs (type, payload, options) values ('EMAIL_SEND', %s, %s)",
            json.dumps(MAIL),
            json.dumps({"request_id": evil}),
        )
    eventually(lambda: len(mail.messages) == 4)
    assert all(message["X-Request-ID"] is None and message["Bcc"] is None for message in mail.messages)
    assert all(job.request_id is None and job.status == "COMPLETED" for job in eventually(lambda: ended(system)))


def ended(system: Any) -> list[Any]:
    jobs: list[Any] = system.jobs().jobs
    return jobs if all(job.finished for job in jobs) else []


def running(**values: Any) -> RunningJob:
    options = json.dumps(values)
    row = ("01a2057e-02b3-7000-8e7e-b3f3ad405f07", "TEST_JOB", 0, "{}", options, 1, 1, 4, "2026-01-01 00:00:00", 0, 0, "default", 0.0)
    job = RunningJob(row, worker="", job_type=registry.load().types["TEST_JOB"], max_crashes=3)
    job.began_at = 0.0
    return job


def test_a_job_with_an_id_is_as_plain_as_one_without_and_keeps_it_for_the_next_attempt() -> None:
    only = running(request_id="a")
    assert only.plain and only.lasting_options() == {"request_id": "a"}
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    job = running(request_id="a", traceparent=parent, tracestate="x\r\ny")
    assert job.plain and job.job.request_id == "a"
    assert job.lasting_options() == {"request_id": "a", "traceparent": parent}
    assert not running(request_id="a", on_success="x").plain


def test_beyond_so_many_a_second_successes_are_counted_and_failures_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    attempts = AttemptLog(3)
    for _ in range(10):
        attempts.add(finish(running(request_id="r")))
    failed = {"type": "E", "message": "m", "delay": 1.0}
    attempts.add(Outcome("retry", running(request_id="r"), failed))
    attempts.sum_up()
    said = [record.message if isinstance(record.msg, str) else record.msg["event"] for record in caplog.records]
    assert said == ["attempt succeeded"] * 3 + ["attempt failed"]
    attempts._until = 0.0
    attempts.sum_up()
    assert caplog.records[-1].msg["event"] == "more attempts succeeded" and caplog.records[-1].msg["attempts"] == 7  # type: ignore[index]


def test_an_attempt_that_never_began_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    job = running()
    job.began_at = None
    AttemptLog(3).add(Outcome("release", job, {}))
    assert not caplog.records


def test_outside_of_any_request_there_is_nothing_to_carry() -> None:
    trail.note(job_id="x")
    assert trail.request_id() is None and trail.options() == {} and trail.values() == {}
    assert Job().request_id is None
