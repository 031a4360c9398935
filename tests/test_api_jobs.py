"""The jobs over HTTP, as api.md promises them to clients old and new."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import webtest
from conftest import Running, eventually, execute

from jobsys.app import create_app
from jobsys.job_types import registry
from jobsys.settings import Settings
from jobsys.system import JobSystem

UUID_7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
ABSENT = "01a20560-59f6-7000-9635-42139b8250d8"
MAIL = {"to": "ada@example.test", "subject": "Hello", "body": "It works."}


def submit(api: webtest.TestApp, **body: Any) -> str:
    return str(api.post_json("/jobs", body, status=202).json["jobId"])


def errors(response: webtest.TestResponse) -> dict[str, str]:
    """What a problem says, by place."""
    assert response.content_type == "application/problem+json"
    assert response.json["status"] == response.status_int
    assert response.json["title"] and response.json["type"] and response.json["detail"]
    return {".".join(map(str, each["loc"])): each["msg"] for each in response.json["errors"]}


def test_a_submitted_job_is_accepted_and_can_be_fetched(api: webtest.TestApp) -> None:
    body = {"type": "EMAIL_SEND", "priority": "high", "payload": MAIL}
    accepted = api.post_json("/jobs", body, status=202)
    job_id = accepted.json["jobId"]
    assert accepted.json == {"message": "Job accepted!", "jobId": job_id, "status": "PENDING"}
    assert UUID_7.fullmatch(job_id)
    assert accepted.headers["Location"].endswith(f"/jobs/{job_id}")

    job = api.get(f"/jobs/{job_id}", status=200).json
    assert TIME.fullmatch(job.pop("createdAt")) and TIME.fullmatch(job.pop("runAt"))
    assert job == {
        "id": job_id,
        "jobId": job_id,
        "type": "EMAIL_SEND",
        "queue": "default",
        "priority": "high",
        "payload": MAIL,
        "status": "PENDING",
        "attempts": 0,
        "maxAttempts": 4,
        "progress": None,
        "result": None,
        "error": None,
        "startedAt": None,
        "finishedAt": None,
        "worker": None,
        "groupId": None,
        "idempotencyKey": None,
        "requestId": accepted.headers["X-Request-ID"],
    }


def test_an_empty_object_makes_a_test_job(api: webtest.TestApp) -> None:
    job = api.get(f"/jobs/{submit(api)}").json
    assert (job["type"], job["payload"], job["priority"]) == ("TEST_JOB", {}, "default")


def test_a_priority_is_known_by_every_name_it_has(api: webtest.TestApp) -> None:
    for names, meant in ((("high", "HIGH", "High"), "high"), (("default", "MEDIUM", "medium"), "default"), (("low", "LOW"), "low")):
        ids = {submit(api, priority=name) for name in names}
        assert {api.get(f"/jobs/{job_id}").json["priority"] for job_id in ids} == {meant}
        for name in names:
            assert {job["id"] for job in api.get("/jobs", {"priority": name}).json["jobs"]} == ids


def test_a_job_can_be_delayed_by_seconds_or_until_a_time(api: webtest.TestApp) -> None:
    delayed = api.get(f"/jobs/{submit(api, delay=90)}").json
    assert delayed["status"] == "SCHEDULED" and delayed["runAt"] > delayed["createdAt"]
    assert api.get(f"/jobs/{submit(api, runAt='2040-02-29T13:00:00.5+01:00')}").json["runAt"] == "2040-02-29T12:00:00.500Z"
    assert api.get(f"/jobs/{submit(api, runAt='2020-01-01T00:00:00Z')}").json["status"] == "PENDING"


def test_the_number_of_retries_can_be_chosen(api: webtest.TestApp) -> None:
    assert api.get(f"/jobs/{submit(api, maxRetries=0)}").json["maxAttempts"] == 1


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"type": "NOPE"}, "type"),
        ({"type": ""}, "type"),
        ({"type": None}, "type"),
        ({"type": 5}, "type"),
        ({"type": "x" * 300}, "type"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 1}, "priority"),
        ({"payload": []}, "payload"),
        ({"payload": "{}"}, "payload"),
        ({"payload": {"sleepMs": "5"}}, "payload.sleepMs"),
        ({"payload": {"sleepMs": True}}, "payload.sleepMs"),
        ({"payload": {"sleepMs": -1}}, "payload.sleepMs"),
        ({"type": "EMAIL_SEND", "payload": {"to": "nobody", "subject": "x"}}, "payload.to"),
        ({"type": "EMAIL_SEND", "payload": {**MAIL, "subject": "a\nBcc: eve@example.test"}}, "payload.subject"),
        ({"type": "EMAIL_SEND", "payload": {**MAIL, "attachment": "/etc/passwd"}}, "payload.attachment"),
        ({"delay": -1}, "delay"),
        ({"delay": "5"}, "delay"),
        ({"delay": True}, "delay"),
        ({"delay": 1e300}, "delay"),
        ({"delay": 1, "runAt": "2040-01-01T00:00:00Z"}, "delay"),
        ({"runAt": "tomorrow"}, "runAt"),
        ({"runAt": 1700000000}, "runAt"),
        ({"runAt": "2040-01-01T00:00:00"}, "runAt"),
        ({"runAt": "2026-02-30T00:00:00Z"}, "runAt"),
        ({"runAt": "0000-01-01T00:00:00Z"}, "runAt"),
        ({"runAt": "10000-01-01T00:00:00Z"}, "runAt"),
        ({"runAt": "9999-12-31T23:59:59-01:00"}, "runAt"),
        ({"runAt": "\uff12\uff10\uff14\uff10-01-01T00:00:00Z"}, "runAt"),
        ({"maxRetries": -1}, "maxRetries"),
        ({"maxRetries": 1.0}, "maxRetries"),
        ({"maxRetries": True}, "maxRetries"),
        ({"maxRetries": 10**9}, "maxRetries"),
        ({"idempotencyKey": ""}, "idempotencyKey"),
        ({"idempotencyKey": "a\nb"}, "idempotencyKey"),
        ({"idempotencyKey": "a\u009bb"}, "idempotencyKey"),
        ({"idempotencyKey": "x" * 256}, "idempotencyKey"),
        ({"tpye": "TEST_JOB"}, "tpye"),
        ({"type": "TEST_JOB", "name": "TEST_JOB"}, "name"),
        ({"name": "sendEmail", "data": {"recipient": "nobody", "subject": "x"}}, "data.recipient"),
    ],
)
def test_what_is_wrong_with_a_submission_is_named_without_a_look_at_the_database(
    away: webtest.TestApp, body: dict[str, Any], place: str
) -> None:
    assert place in errors(away.post_json("/jobs", body, status=422))


def test_an_unknown_type_is_answered_with_the_known_ones(away: webtest.TestApp) -> None:
    message = errors(away.post_json("/jobs", {"type": "__class__"}, status=422))["type"]
    assert all(name in message for name in ("EMAIL_SEND", "CSV_EXPORT", "TEST_JOB", "INGEST_BATCH"))


def test_older_clients_are_understood(api: webtest.TestApp) -> None:
    body = {"name": "sendEmail", "data": {"recipient": "ada@example.test", "subject": "Hello"}}
    accepted = api.post_json("/api/jobs", body, status=202).json
    job = api.get(f"/api/jobs/{accepted['jobId']}").json
    assert (job["type"], job["payload"]) == ("EMAIL_SEND", {"to": "ada@example.test", "subject": "Hello"})
    assert [each["id"] for each in api.get("/api/jobs").json["jobs"]] == [job["id"]]
    api.post(f"/jobs/{job['id']}/cancel", status=202)
    assert api.post(f"/api/jobs/{job['id']}/retry", status=202).json["status"] == "PENDING"


def test_an_older_client_may_call_the_type_of_a_mail_by_any_of_its_names(api: webtest.TestApp) -> None:
    mail = registry.types["EMAIL_SEND"]
    for name in (mail.name, *mail.aliases, "SENDEMAIL"):
        job_id = submit(api, name=name, data={"recipient": "ada@example.test", "subject": "Hello"})
        assert api.get(f"/jobs/{job_id}").json["payload"] == {"to": "ada@example.test", "subject": "Hello"}


def test_the_same_idempotency_key_and_body_answer_the_first_job(api: webtest.TestApp) -> None:
    key = {"Idempotency-Key": "order 17"}
    first = api.post_json("/jobs", {"payload": {"n": 1}}, headers=key, status=202)
    again = api.post_json("/jobs", {"payload": {"n": 1}}, headers=key, status=202)
    in_body = api.post_json("/jobs", {"payload": {"n": 1}, "idempotencyKey": "order 17"}, status=202)
    assert first.json["jobId"] == again.json["jobId"] == in_body.json["jobId"]
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == in_body.headers["Idempotency-Replayed"] == "true"
    assert "idempotencyKey" in errors(api.post_json("/jobs", {"payload": {"n": 2}}, headers=key, status=422))
    assert "idempotencyKey" in errors(api.post_json("/jobs", {"idempotencyKey": "other"}, headers=key, status=422))
    assert api.get("/metrics").json["jobs_created"] == 1


def test_an_id_that_is_none_is_as_unknown_as_one_that_is_gone(api: webtest.TestApp) -> None:
    answers = set()
    for job_id in (
        ABSENT,
        "nope",
        "0",
        "-1",
        str(2**63),
        f"{{{ABSENT}}}",
        f"urn:uuid:{ABSENT}",
        ABSENT.replace("-", ""),
        "%00",
        "%FF",
        "a%0Ab",
    ):
        for method, path in (
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/cancel"),
            ("POST", "/retry"),
            ("GET", "/events"),
            ("GET", "/artifact"),
        ):
            response = api.request(f"/jobs/{job_id}{path}", method=method, status=404)
            answers.add((response.content_type, response.body))
    assert [content_type for content_type, _ in answers] == ["application/problem+json"]


def test_the_list_is_newest_first_and_pages_by_cursor(api: webtest.TestApp) -> None:
    ids = [submit(api, payload={"n": n}) for n in range(5)]
    seen, cursor, pages = [], "", 0
    while cursor is not None:
        page = api.get("/jobs", {"limit": "2", "cursor": cursor}).json
        seen += [job["id"] for job in page["jobs"]]
        cursor, pages = page["nextCursor"], pages + 1
    assert (seen, pages) == (ids[::-1], 3)


def test_the_list_can_be_narrowed(api: webtest.TestApp) -> None:
    mail = submit(api, type="EMAIL_SEND", payload=MAIL)
    late = submit(api, delay=60, priority="low", payload={"note": "100% _sure_"})
    gone = submit(api)
    api.post(f"/jobs/{gone}/cancel")
    created = api.get(f"/jobs/{late}").json["createdAt"]

    def found(**filters: str) -> list[str]:
        return [job["id"] for job in api.get("/jobs", filters, status=200).json["jobs"]]

    assert found(status="pending") == found(status="NEW") == found(status="queued") == [mail]
    assert found(status="SCHEDULED,cancelled") == [gone, late]
    assert found(type="sendEmail") == found(type="EMAIL_SEND") == [mail]
    assert found(type="NO_SUCH_TYPE") == found(groupId=ABSENT) == found(groupId="nope") == []
    assert found(queue="default", priority="LOW") == [late]
    assert found(q="ada@example") == [mail]
    assert found(q="100% _sure_") == found(q=late) == [late]
    assert found(q="100% -sure-") == []
    assert found(createdBefore=created) == [mail]
    assert found(createdAfter="2999-01-01T00:00:00Z") == []
    assert found(status="", type="", q="") == [gone, late, mail]


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("colour=red", "colour"),
        ("status=' or 1=1--", "status"),
        ("status=PENDING&status=DEAD", "status"),
        ("priority=urgent", "priority"),
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=501", "limit"),
        ("limit=1e9", "limit"),
        ("limit=1_0", "limit"),
        ("limit=%D9%A1", "limit"),
        ("limit=abc", "limit"),
        ("cursor=abc", "cursor"),
        ("cursor=1;drop table jobs", "cursor"),
        ("createdAfter=yesterday", "createdAfter"),
        ("createdBefore=2026-02-30T00:00:00Z", "createdBefore"),
        ("createdAfter=0001-01-01T00:00:00%2B14:00", "createdAfter"),
        ("q=%00", "q"),
        ("type=a%00b", "type"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(away: webtest.TestApp, query: str, place: str) -> None:
    assert place in errors(away.get(f"/jobs?{query}", status=400))


def test_a_search_for_nothing_but_wildcards_is_harmless(api: webtest.TestApp) -> None:
    submit(api)
    assert api.get("/jobs", {"q": "%" * 2000}, status=200).json["jobs"] == []


def test_waiting_ends_when_its_time_is_up(api: webtest.TestApp) -> None:
    job_id = submit(api)
    began = time.monotonic()
    assert api.get(f"/jobs/{job_id}?wait=0.3").json["status"] == "PENDING"
    assert 0.3 <= time.monotonic() - began < 2


def test_waiting_ends_when_the_job_does(api: webtest.TestApp) -> None:
    job_id = submit(api)
    canceller = threading.Timer(0.3, api.post, [f"/jobs/{job_id}/cancel"])
    canceller.start()
    began = time.monotonic()
    assert api.get(f"/jobs/{job_id}?wait=20").json["status"] == "CANCELLED"
    assert time.monotonic() - began < 5
    canceller.join()


@pytest.mark.parametrize("wait", ["-1", "31", "abc", "1e2", "1e999", "nan", "inf", "0x5", "1_0", "%D9%A1", "."])
def test_only_a_sensible_time_can_be_waited(away: webtest.TestApp, wait: str) -> None:
    assert "wait" in errors(away.get(f"/jobs/{ABSENT}?wait={wait}", status=400))


@pytest.mark.parametrize("wait", ["0", "0.0001220703125", "1e-05", "5E-324", "00.1"])
def test_a_time_to_wait_is_any_number_as_programs_write_them(api: webtest.TestApp, wait: str) -> None:
    assert api.get(f"/jobs/{submit(api)}?wait={wait}").json["status"] == "PENDING"


def test_those_who_wait_leave_threads_for_those_who_do_not(settings: Settings, system: JobSystem) -> None:
    few = settings.model_copy(update={"web_threads": 2})
    api = webtest.TestApp(create_app(few, JobSystem(few)))
    job_id = submit(api)
    waiting = threading.Thread(target=lambda: api.get(f"/jobs/{job_id}?wait=2"))
    waiting.start()
    time.sleep(0.3)
    began = time.monotonic()
    assert api.get(f"/jobs/{job_id}?wait=20").json["status"] == "PENDING"
    assert time.monotonic() - began < 1
    waiting.join()


def test_a_waiting_job_is_cancelled_at_once_and_can_be_retried(api: webtest.TestApp) -> None:
    job_id = submit(api)
    refused = api.post(f"/jobs/{job_id}/retry", status=409).json
    assert "PENDING" in refused["detail"]
    assert api.post(f"/jobs/{job_id}/cancel", status=202).json["status"] == "CANCELLED"
    assert "CANCELLED" in api.post(f"/jobs/{job_id}/cancel", status=409).json["detail"]
    retried = api.post(f"/jobs/{job_id}/retry", status=202).json
    assert (retried["jobId"], retried["status"], retried["attempts"]) == (job_id, "PENDING", 0)


def test_a_removed_job_is_gone(api: webtest.TestApp) -> None:
    job_id = submit(api)
    response = api.delete(f"/jobs/{job_id}", status=204)
    assert response.body == b""
    api.get(f"/jobs/{job_id}", status=404)
    api.delete(f"/jobs/{job_id}", status=404)
    assert api.get("/metrics").json["jobs_created"] == 1


def test_the_life_of_jobs_can_be_followed_to_their_end(api: webtest.TestApp, start_worker: Callable[..., Running]) -> None:
    start_worker()
    done = submit(api, payload={"progressSteps": 2, "hello": "world"})
    failed = submit(api, payload={"failTimes": 5, "failWith": "told so"}, maxRetries=1)
    running = submit(api, payload={"sleepMs": 60_000})

    job = api.get(f"/jobs/{done}?wait=20").json
    assert (job["status"], job["attempts"]) == ("COMPLETED", 1)
    assert job["result"]["hello"] == "world" and job["worker"] and TIME.fullmatch(job["startedAt"]) and TIME.fullmatch(job["finishedAt"])

    job = api.get(f"/jobs/{failed}?wait=20").json
    assert (job["status"], job["attempts"], job["maxAttempts"]) == ("FAILED", 2, 2)
    assert job["error"]["message"] == "told so" and job["error"]["attempt"] == 2 and TIME.fullmatch(job["error"]["at"])
    api.post(f"/jobs/{failed}/retry", status=202)
    api.get(f"/jobs/{failed}?wait=20")
    events = api.get(f"/jobs/{failed}/events").json["events"]
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "created" and kinds.count("failed") == 4 and {"started", "retried", "finished"} <= set(kinds)
    assert all(TIME.fullmatch(event["at"]) for event in events)
    failure = next(event for event in events if event["kind"] == "failed")
    assert (failure["attempt"], failure["message"]) == (1, "told so")
    assert failure["type"] and "Traceback" in failure["traceback"] and failure["worker"] and failure["duration"] >= 0
    assert next(event for event in events if event["kind"] == "retried")["by"] == "api"

    eventually(lambda: api.get(f"/jobs/{running}").json["status"] == "PROCESSING")
    assert api.delete(f"/jobs/{running}", status=202).json["jobId"] == running
    eventually(lambda: api.get(f"/jobs/{running}", status="*").status_int == 404)


def test_the_file_of_an_export_is_offered_for_download(
    api: webtest.TestApp, settings: Settings, start_worker: Callable[..., Running]
) -> None:
    rows = [{"id": 1, "name": "Ada"}, {"id": 2, "rank": "Rear Admiral"}]
    named = submit(api, type="CSV_EXPORT", payload={"data": rows, "filename": "people.csv"})
    api.get(f"/jobs/{named}/artifact", status=404)
    start_worker()
    plain = submit(api, type="CSV_EXPORT", payload={"data": rows})
    for job_id in (named, plain):
        assert api.get(f"/jobs/{job_id}?wait=20").json["status"] == "COMPLETED"

    file = api.get(f"/jobs/{named}/artifact", status=200)
    assert file.body == b"id,name,rank\r\n1,Ada,\r\n2,,Rear Admiral\r\n"
    assert (file.content_type, file.charset.lower(), file.headers["X-Content-Type-Options"]) == ("text/csv", "utf-8", "nosniff")
    assert file.headers["Content-Disposition"] == 'attachment; filename="people.csv"'
    assert api.get(f"/jobs/{plain}/artifact").headers["Content-Disposition"] == f'attachment; filename="{plain}.csv"'
    head = api.head(f"/jobs/{named}/artifact", status=200)
    assert (head.headers["Content-Length"], head.body) == (str(len(file.body)), b"")


def test_nothing_but_a_jobs_own_file_is_ever_sent(api: webtest.TestApp, settings: Settings, database_url: str) -> None:
    secret = settings.output_dir.parent / "secret.csv"
    secret.write_text("secret")
    settings.output_dir.mkdir()
    linked, named, folder = submit(api), submit(api, payload={"filename": "../secret.csv"}), submit(api)
    (settings.output_dir / f"{linked}.csv").symlink_to(secret)
    (settings.output_dir / f"{folder}.csv").mkdir()
    execute(database_url, "update jobs set result = %s::jsonb", f'{{"file": "{secret}"}}')
    for job_id in (linked, named, folder):
        api.get(f"/jobs/{job_id}/artifact", status=404)
