"""The operator's pages, asked the way a browser asks: over the real app on a real PostgreSQL, and once in a real Chromium."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg2
import pytest
from bs4 import BeautifulSoup
from conftest import Running, eventually, execute
from psycopg2.extras import Json
from webtest import TestApp

from admin_ui import wording
from admin_ui.forms import Tokens
from jobsys import verbs
from jobsys.app import create_app
from jobsys.settings import Settings
from jobsys.system import STATUSES, JobSystem

CANARY = """"'><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}${7*7}</pre></textarea><a href="javascript:alert(3)">"""
FINISHED = ("COMPLETED", "FAILED", "DEAD", "CANCELLED")
BUTTONS = {
    "SCHEDULED": ["Dead-letter", "Cancel"],
    "PENDING": ["Dead-letter", "Cancel"],
    "PROCESSING": ["Cancel"],
    "COMPLETED": [],
    "FAILED": ["Retry", "Dead-letter"],
    "DEAD": ["Retry"],
    "CANCELLED": ["Retry"],
}


@pytest.fixture
def web(system: JobSystem) -> TestApp:
    """The whole app, asked without a network."""
    return TestApp(create_app(system=system))


@pytest.fixture
def add_job(database_url: str) -> Callable[..., str]:
    """`add_job("FAILED", type=…, error=…)` puts a job of that status into the table and answers its id."""

    def add(status: str, **columns: Any) -> str:
        now = datetime.now(timezone.utc)
        ran = status == "PROCESSING" or status in FINISHED
        row: dict[str, Any] = {"status": status, "type": "TEST_JOB", "attempt": 1 if ran else 0}
        if ran:
            row |= {"worker": str(uuid4()), "started_at": now - timedelta(seconds=9)}
        if status in FINISHED:
            row |= {"finished_at": now - timedelta(seconds=5)}
        if status == "SCHEDULED":
            row |= {"run_at": now + timedelta(hours=1)}
        if status in ("FAILED", "DEAD"):
            row |= {"error": {"type": "OSError", "message": "disk full", "attempt": 1, "at": now.isoformat()}}
        row |= columns
        values = [Json(value) if isinstance(value, (dict, list)) else value for value in row.values()]
        places = ", ".join(["%s"] * len(row))
        return str(execute(database_url, f"insert into jobs ({', '.join(row)}) values ({places}) returning id", *values)[0][0])

    return add


@pytest.fixture
def add_worker(database_url: str) -> Callable[..., str]:
    """`add_worker(queues=[…], types=[…])` makes a worker known; `silent` is for how many seconds it has said nothing."""

    def add(queues: list[str], types: list[str], silent: float = 0, host: str = "worker-1", id: str | None = None) -> str:
        statement = """
            insert into workers (id, host, pid, version, queues, types, threads, heartbeat_at,
                heartbeat, lost_after, session_pid, session_start)
            values (%s, %s, 4711, '1', %s, %s, 8, clock_timestamp() - %s * interval '1 s', '10 min', '10 min', 0, now())
            returning id
        """
        return str(execute(database_url, statement, id or str(uuid4()), host, queues, types, silent)[0][0])

    return add


def text(response: Any) -> str:
    """What a reader sees of a page, in one line."""
    return " ".join(response.html.body.get_text(" ").split())


def count(response: Any, status: str) -> str:
    return str(response.html.select_one(f"#count-{status.lower()}").text)


def status_of(system: JobSystem, job_id: str) -> str:
    return system.job(job_id).status


# What the pages answer


def test_a_fresh_installation_shows_a_line_that_really_submits_the_first_job(web: TestApp, system: JobSystem) -> None:
    page = web.get("/admin/ui")
    command = shlex.split(page.html.select_one("pre.command").text)
    assert command[0] == "curl" and command[2:4] == ["-H", "Content-Type: application/json"]
    path = command[1].removeprefix("http://localhost:80").removeprefix("http://localhost")
    web.post(path, command[5], content_type="application/json", status=202)
    assert sum(system.counts().values()) == 1
    assert "curl" not in text(web.get("/admin/ui"))


def test_a_strange_host_does_not_get_into_the_line_for_the_shell(settings: Settings) -> None:
    system = JobSystem(Settings(_env_file=None, database_url=settings.database_url, allow_insecure=True))
    page = TestApp(create_app(system=system)).get("/admin/ui", headers={"Host": "$(reboot)"})
    assert "reboot" not in page.text
    system.close()


def test_the_overview_counts_the_jobs_of_every_status(web: TestApp, add_job: Callable[..., str]) -> None:
    for number, status in enumerate(STATUSES, start=1):
        for _ in range(number):
            add_job(status)
    page = web.get("/admin/ui")
    assert {status: count(page, status) for status in STATUSES} == {status: str(number) for number, status in enumerate(STATUSES, start=1)}
    assert page.html.h1.text == "5 jobs failed, 6 are dead"


def test_large_numbers_have_separators() -> None:
    assert wording.number(1234567) == "1,234,567"


def test_the_overview_says_what_broke_and_why(web: TestApp, add_job: Callable[..., str]) -> None:
    job_id = add_job("FAILED", type="EMAIL_SEND", error={"type": "SMTPServerDisconnected", "message": "closed\nby peer", "attempt": 1})
    line = web.get("/admin/ui").html.find(id=f"job-{job_id}")
    assert "EMAIL_SEND" in line.text and line.select_one(".error").text == "SMTPServerDisconnected: closed"
    assert [button.text for button in line.find_all("button")] == ["Retry", "Dead-letter"]


def test_the_dashboard_is_the_overview(web: TestApp) -> None:
    answer = web.get("/dashboard", status=302)
    assert answer.headers["Location"].endswith("/admin/ui")


def test_a_queue_that_is_paused_while_jobs_wait_is_the_first_thing_said(
    web: TestApp, add_job: Callable[..., str], system: JobSystem
) -> None:
    add_job("PENDING", queue="ingestion")
    system.pause("ingestion")
    assert "Queue ingestion is paused. 1 job due, the oldest for" in web.get("/admin/ui").html.select_one(".notices").text


def test_jobs_that_nobody_serves_are_said_to_wait_for_a_worker(
    web: TestApp, add_job: Callable[..., str], add_worker: Callable[..., str]
) -> None:
    add_job("PENDING", queue="images")
    assert "No worker is alive, and 1 job waits." in text(web.get("/admin/ui"))
    add_worker(["default"], ["TEST_JOB"])
    assert "No live worker serves queue images." in text(web.get("/admin/ui"))
    add_worker(["images"], ["TEST_JOB"])
    assert web.get("/admin/ui").html.select_one(".notices") is None


def test_a_type_that_no_worker_knows_and_one_that_is_held_back_are_named(
    web: TestApp, add_job: Callable[..., str], add_worker: Callable[..., str], database_url: str
) -> None:
    add_worker(["default"], ["EMAIL_SEND"])
    unknown, mail = add_job("PENDING", type="THUMBNAIL"), add_job("PENDING", type="EMAIL_SEND")
    execute(database_url, "update jobs set run_at = now() - interval '1 hour'")
    assert "No live worker knows the type THUMBNAIL. 1 job of it due in queue default." in text(web.get("/admin/ui"))
    execute(database_url, "delete from jobs where id = %s", unknown)
    assert "More workers or threads would help" in text(web.get("/admin/ui"))
    execute(database_url, "update workers set held_back = '{EMAIL_SEND}'")
    assert "EMAIL_SEND is held back. Its last jobs all failed the same way." in text(web.get("/admin/ui"))
    assert "EMAIL_SEND is held back." in text(web.get(f"/admin/ui/jobs/{mail}"))


def test_what_an_operator_ends_later_ran_no_longer_for_it(web: TestApp, add_job: Callable[..., str], database_url: str) -> None:
    job_id = add_job("DEAD", attempt=1)
    execute(database_url, "update jobs set started_at = now() - interval '1 hour', finished_at = now()")
    failure = "id, claim, attempt, started_at, started_at + interval '2 s', gen_random_uuid(), 'E', 'm', '', ''"
    execute(database_url, f"insert into failures select {failure} from jobs")
    assert "Ran for 2 s" in text(web.get(f"/admin/ui/jobs/{job_id}"))


def test_a_silent_worker_with_running_jobs_is_named(web: TestApp, add_job: Callable[..., str], add_worker: Callable[..., str]) -> None:
    add_job("PROCESSING", worker=add_worker(["default"], ["TEST_JOB"], silent=3600, host="lost-1"))
    assert "Worker lost-1:4711 is silent. Last heard 1 h ago; 1 running job of it will go back" in text(web.get("/admin/ui"))


@pytest.mark.parametrize(
    ("queue", "job_type", "said"),
    [
        ("idle", "TEST_JOB", "No live worker serves queue idle"),
        ("paused", "TEST_JOB", "Queue paused is paused: resume it"),
        ("default", "THUMBNAIL", "No live worker knows the type THUMBNAIL"),
        ("ingestion", "TEST_JOB", "paced at 1 per 5 s"),
        ("narrow", "TEST_JOB", "runs 1 at a time, and 1 are running"),
        ("default", "TEST_JOB", "It runs as soon as a thread is free; 1 job due in queue default"),
    ],
)
def test_the_page_of_a_waiting_job_says_why_it_waits(
    web: TestApp, system: JobSystem, add_job: Callable[..., str], add_worker: Callable[..., str], queue: str, job_type: str, said: str
) -> None:
    add_worker(["default", "paused", "ingestion", "narrow"], ["TEST_JOB"])
    system.pause("paused")
    system.limit("ingestion", rate=(1, 5.0))
    system.limit("narrow", max_running=1)
    if queue == "narrow":
        add_job("PROCESSING", queue="narrow")
    assert said in text(web.get(f"/admin/ui/jobs/{add_job('PENDING', queue=queue, type=job_type)}"))


def test_the_page_of_a_job_shows_everything_about_it(
    web: TestApp, system: JobSystem, add_job: Callable[..., str], database_url: str
) -> None:
    job_id = add_job(
        "FAILED", payload={"to": "ada@example.org"}, idempotency_key="invoice-7", result={"sent": 1}, max_attempts=4, attempt=4
    )
    execute(database_url, "insert into events (job_id, kind, attempt, message) values (%s, 'log', 1, 'connected')", job_id)
    execute(
        database_url,
        "insert into failures (job_id, claim, attempt, started_at, worker, type, message, traceback, fingerprint) "
        "values (%s, 4, 4, now(), %s, 'OSError', 'disk full', 'Traceback: line 88', 'f')",
        job_id,
        str(uuid4()),
    )
    page = text(web.get(f"/admin/ui/jobs/{job_id}"))
    for shown in (
        job_id,
        "ada@example.org",
        "invoice-7",
        '"sent": 1',
        "disk full",
        "Traceback: line 88",
        "connected",
        "4 of 4",
        "no retry is left",
    ):
        assert shown in page


def test_times_are_relative_with_the_exact_one_at_hand(web: TestApp, add_job: Callable[..., str]) -> None:
    at = datetime.now(timezone.utc) - timedelta(minutes=3)
    job_id = add_job("FAILED", created_at=at, started_at=at, finished_at=at)
    time = web.get("/admin/ui").html.find(id=f"job-{job_id}").time
    assert time.text == "3 min ago"
    assert time["title"] == f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03} UTC"


@pytest.mark.parametrize("status", STATUSES)
def test_a_job_has_the_buttons_its_status_allows(web: TestApp, add_job: Callable[..., str], status: str) -> None:
    page = web.get(f"/admin/ui/jobs/{add_job(status)}")
    assert [button.text for button in page.html.select(".reason button")] == BUTTONS[status]


def test_the_list_can_be_narrowed(web: TestApp, add_job: Callable[..., str]) -> None:
    wanted = add_job("FAILED", type="EMAIL_SEND", queue="mail", payload={"to": "ada@example.org"})
    for columns in ({"type": "TEST_JOB", "queue": "mail"}, {"type": "EMAIL_SEND", "queue": "default"}):
        add_job("FAILED", **columns)
    add_job("DEAD", type="EMAIL_SEND", queue="mail")
    for query in ("status=failed&type=EMAIL_SEND&queue=mail", "q=ada@example", f"q={wanted}"):
        page = web.get(f"/admin/ui/jobs?{query}")
        assert [line["id"] for line in page.html.select("tbody tr")] == [f"job-{wanted}"]
    assert "No job matches" in text(web.get("/admin/ui/jobs?type=NOPE"))


def test_paging_shows_every_job_once_and_newest_first(web: TestApp, add_job: Callable[..., str]) -> None:
    jobs = sorted((add_job("CANCELLED") for _ in range(120)), reverse=True)
    seen: list[str] = []
    page = web.get("/admin/ui/jobs?status=CANCELLED")
    for _ in range(2):
        seen += [line["id"] for line in page.html.select("tbody tr")]
        page = page.click("Older")
    seen += [line["id"] for line in page.html.select("tbody tr")]
    assert seen == [f"job-{job_id}" for job_id in jobs]
    assert page.html.find("a", string="Older") is None
    assert page.click("Newest").html.select_one("tbody tr")["id"] == f"job-{jobs[0]}"


# The buttons


def test_a_failed_job_is_retried_by_the_button_on_the_overview(web: TestApp, system: JobSystem, add_job: Callable[..., str]) -> None:
    job_id = add_job("FAILED")
    page = web.get("/admin/ui")
    form = next(form for form in page.forms.values() if form.action.endswith(f"{job_id}/retry"))
    answer = form.submit(status=303)
    assert answer.headers["Location"].endswith(f"/admin/ui?done=retry&of={job_id}")
    after = answer.follow()
    assert "It waits for a worker again" in text(after)
    assert (count(after, "FAILED"), count(after, "PENDING")) == ("0", "1")
    assert ("retried", "admin") in [(event.kind, event.by) for event in system.events(job_id)]


@pytest.mark.parametrize(
    ("status", "button", "then"),
    [
        ("DEAD", "Retry", "PENDING"),
        ("CANCELLED", "Retry", "PENDING"),
        ("FAILED", "Dead-letter", "DEAD"),
        ("PENDING", "Cancel", "CANCELLED"),
        ("SCHEDULED", "Dead-letter", "DEAD"),
    ],
)
def test_the_buttons_on_the_page_of_a_job_work(
    web: TestApp, system: JobSystem, add_job: Callable[..., str], status: str, button: str, then: str
) -> None:
    job_id = add_job(status)
    page = web.get(f"/admin/ui/jobs/{job_id}")
    after = page.forms[_form_of(page, button)].submit(status=303).follow()
    assert after.request.path == f"/admin/ui/jobs/{job_id}"
    assert after.html.h1.text.split() == [then.capitalize(), "TEST_JOB"]
    assert status_of(system, job_id) == then


def test_cancelling_a_running_job_says_that_it_was_asked(web: TestApp, add_job: Callable[..., str]) -> None:
    page = web.get(f"/admin/ui/jobs/{add_job('PROCESSING')}")
    after = page.forms[_form_of(page, "Cancel")].submit().follow()
    assert "It runs, was asked to stop" in text(after)
    assert after.html.select(".reason button") == []


def test_a_button_in_the_list_leads_back_to_the_same_list(web: TestApp, add_job: Callable[..., str]) -> None:
    add_job("FAILED", queue="mail")
    page = web.get("/admin/ui/jobs?status=FAILED&queue=mail")
    location = page.forms[_form_of(page, "Retry")].submit().headers["Location"]
    assert "/admin/ui/jobs?status=FAILED&queue=mail&done=retry&of=" in location


def test_all_that_match_are_retried_after_their_number_was_confirmed(web: TestApp, system: JobSystem, add_job: Callable[..., str]) -> None:
    matching = [add_job("FAILED", type="EMAIL_SEND") for _ in range(3)]
    other = add_job("FAILED", type="CSV_EXPORT")
    asked = web.get("/admin/ui/jobs?status=FAILED&type=EMAIL_SEND").click("Retry all")
    assert asked.html.h1.text == "Retry 3 jobs?" and "EMAIL_SEND" in text(asked) and "Failed" in text(asked)
    assert all(status_of(system, id) == "FAILED" for id in matching), "a link changes nothing"
    later = add_job("FAILED", type="EMAIL_SEND", finished_at=datetime.now(timezone.utc) + timedelta(seconds=9))
    page = asked.forms["confirm"].submit().follow()
    assert "3 jobs retried." in text(page) and page.request.params["type"] == "EMAIL_SEND"
    assert [status_of(system, id) for id in (*matching, other, later)] == ["PENDING"] * 3 + ["FAILED"] * 2
    assert [event.by for event in system.events(matching[0]) if event.kind == "retried"] == ["admin"]


def test_cancelling_all_says_how_many_are_only_asked_to_stop(web: TestApp, system: JobSystem, add_job: Callable[..., str]) -> None:
    for status in ("PENDING", "SCHEDULED", "PROCESSING", "PROCESSING", "FAILED"):
        add_job(status)
    page = web.get("/admin/ui/jobs?queue=default").click("Cancel all").forms["confirm"].submit().follow()
    assert "2 jobs cancelled. 2 run and were asked to stop." in text(page)
    assert system.counts()["CANCELLED"] == 2 and system.counts()["FAILED"] == 1


def test_where_no_job_can_be_picked_nothing_is_offered_for_picked_ones(web: TestApp, add_job: Callable[..., str]) -> None:
    add_job("COMPLETED")
    assert "Completed" in text(web.get("/admin/ui/jobs")) and not web.get("/admin/ui/jobs").html.select("#picked")
    add_job("FAILED")
    assert web.get("/admin/ui/jobs").html.select("#picked")


def test_picked_jobs_are_changed_and_no_others(web: TestApp, system: JobSystem, add_job: Callable[..., str]) -> None:
    failed = [add_job("FAILED") for _ in range(4)]
    add_job("COMPLETED")
    page = web.get("/admin/ui/jobs")
    boxes = {box["value"]: box for box in page.html.select("input[type=checkbox]")}
    assert set(boxes) == set(failed) and {box["form"] for box in boxes.values()} == {page.html.select_one("form.acts")["id"]}
    form = page.html.select_one("form#picked")
    fields = [(field["name"], field["value"]) for field in form.select("input")]
    action = next(button["formaction"] for button in form.select("button") if button.text == "Dead-letter")
    page = web.post(action, [*fields, ("id", failed[0]), ("id", failed[1]), ("id", failed[3])]).follow()
    assert "3 jobs dead-lettered." in text(page)
    assert [status_of(system, id) for id in failed] == ["DEAD", "DEAD", "FAILED", "DEAD"]
    page = web.post(action, [*fields, ("id", failed[0]), ("id", failed[2])]).follow()
    assert "1 job dead-lettered. 1 could not be" in text(page)
    assert "No job was selected." in text(web.post(action, fields).follow())


def test_more_than_can_be_done_at_once_are_done_step_by_step(
    web: TestApp, system: JobSystem, add_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        add_job("FAILED")
    monkeypatch.setattr(verbs, "MOST", 3)
    asked = web.get("/admin/ui/jobs?status=FAILED").click("Retry all")
    assert asked.html.h1.text == "Retry more than 3 jobs?"
    asked = asked.forms["confirm"].submit().follow()
    assert "3 jobs retried. There are more: go on below." in text(asked) and asked.html.h1.text == "Retry 2 jobs?"
    assert "2 jobs retried." in text(asked.forms["confirm"].submit().follow()) and system.counts()["PENDING"] == 5


def test_nothing_is_done_to_all_without_a_filter_a_token_and_a_confirmation(
    web: TestApp, system: JobSystem, add_job: Callable[..., str], settings: Settings
) -> None:
    add_job("FAILED")
    assert "Retry all" not in text(web.get("/admin/ui/jobs"))
    assert "Retry all" not in text(web.get("/admin/ui/jobs?status=COMPLETED"))
    web.get("/admin/ui/many/retry", status=400)
    web.get("/admin/ui/many/retry?status=COMPLETED", status=400)
    web.get("/admin/ui/many/explode?status=FAILED", status=404)
    assert web.get("/admin/ui/many/retry?type=NOPE").html.h1.text == "No job to retry"
    token = Tokens(settings).make("admin")
    moment = datetime.now(timezone.utc).isoformat()
    web.post("/admin/ui/many/retry", {"status": "FAILED", "as_of": moment}, status=403)
    for fields in ({"as_of": moment}, {"status": "FAILED", "as_of": "soon"}, {"as_of": moment, "limit": "5"}, {"as_of": moment, "q": " "}):
        web.post("/admin/ui/many/retry", {"csrf": token, **fields}, status=400)
    web.post("/admin/ui/many/retry", {"csrf": token, "status": "FAILED"}, status=303)
    assert system.counts()["FAILED"] == 1


def test_a_queue_is_paused_and_resumed_by_its_button(web: TestApp, system: JobSystem, add_job: Callable[..., str]) -> None:
    add_job("PENDING", queue="mail")
    page = web.get("/admin/ui")
    page = page.forms[_form_of(page, "Pause")].submit(status=303).follow()
    assert "Queue mail is paused." in text(page)
    assert [queue.paused for queue in system.queues()] == [True]
    page = page.forms[_form_of(page, "Resume")].submit(status=303).follow()
    assert [queue.paused for queue in system.queues()] == [False]


@pytest.mark.parametrize(
    "back", ["//evil.example", "https://evil.example", "/\\evil.example", "jobs?next=//evil.example", "jobs//evil.example"]
)
def test_a_button_leads_nowhere_else(web: TestApp, add_job: Callable[..., str], settings: Settings, back: str) -> None:
    token = Tokens(settings).make("admin")
    answer = web.post(f"/admin/ui/jobs/{add_job('FAILED')}/retry", {"csrf": token, "back": back}, status=303)
    location = answer.headers["Location"].removeprefix("http://localhost:80").removeprefix("http://localhost")
    assert location.startswith(("/admin/ui?done=retry&", "/admin/ui/jobs?done=retry&"))
    assert "evil" not in location


# Forged requests


@pytest.mark.parametrize("token", [None, "", "0" * 64, "é", "of another user", "of yesterday", "in the address"])
def test_a_button_without_todays_token_of_this_user_does_nothing(
    web: TestApp, system: JobSystem, settings: Settings, add_job: Callable[..., str], token: str | None
) -> None:
    job_id, tokens = add_job("FAILED"), Tokens(settings)
    known = {
        "of another user": tokens.make("mallory"),
        "of yesterday": tokens.make("admin", datetime.now(timezone.utc) - timedelta(days=1, hours=1)),
    }
    query = f"?csrf={tokens.make('admin')}" if token == "in the address" else ""
    fields = {} if token is None else {"csrf": known.get(token, token)}
    answer = web.post(f"/admin/ui/jobs/{job_id}/retry{query}", fields, status=403)
    assert answer.content_type == "text/html" and "Nothing was changed" in text(answer)
    assert status_of(system, job_id) == "FAILED"


def test_a_token_that_is_not_in_a_form_does_not_count(web: TestApp, settings: Settings, add_job: Callable[..., str]) -> None:
    path, token = f"/admin/ui/jobs/{add_job('FAILED')}/retry", Tokens(settings).make("admin")
    web.post(path, f"csrf={token}", content_type="text/plain", status=403)
    web.post(path, json.dumps({"csrf": token}), content_type="application/json", status=403)


def test_a_page_left_open_over_midnight_still_works_for_an_hour(settings: Settings) -> None:
    tokens = Tokens(settings)
    token = tokens.make("admin", datetime(2026, 3, 1, 23, 50, tzinfo=timezone.utc))
    assert tokens.fits(token, "admin", datetime(2026, 3, 2, 0, 59, tzinfo=timezone.utc))
    assert not tokens.fits(token, "admin", datetime(2026, 3, 2, 1, 1, tzinfo=timezone.utc))


def test_tokens_are_the_same_in_every_process_and_change_with_the_password(settings: Settings) -> None:
    def token(**values: Any) -> str:
        given = {"database_url": settings.database_url, "admin_user": "ada", "admin_pass": "correct horse"} | values
        return Tokens(Settings(_env_file=None, **given)).make("ada")

    assert token() == token()
    assert len({token(), token(admin_pass="battery staple"), token(database_url="postgresql://elsewhere/db")}) == 3


def test_reading_never_changes_anything(web: TestApp, system: JobSystem, add_job: Callable[..., str]) -> None:
    job_id = add_job("FAILED")
    for path in (f"/admin/ui/jobs/{job_id}/retry", f"/admin/ui/jobs/{job_id}/dead-letter", "/admin/ui/queues/default/pause"):
        web.get(path, status=303)
    assert status_of(system, job_id) == "FAILED"
    assert not any(queue.paused for queue in system.queues())


# Hostile data


def test_nothing_a_job_carries_becomes_part_of_a_page(
    web: TestApp, system: JobSystem, add_job: Callable[..., str], add_worker: Callable[..., str], database_url: str
) -> None:
    """The canary stands in every field of a job of every status, in its worker, its queue, and in the address."""
    worker, group = str(uuid4()), str(uuid4())
    add_worker([CANARY], [CANARY], host=CANARY, id=worker)
    error = {"type": CANARY, "message": CANARY, "attempt": CANARY, "at": CANARY}
    jobs = [
        add_job(
            status,
            type=CANARY,
            queue=CANARY,
            payload={CANARY: CANARY, "list": [CANARY, {CANARY: [CANARY]}]},
            options={CANARY: CANARY},
            result={CANARY: CANARY},
            error=error,
            progress={"fraction": 0.5, "message": CANARY},
            group_id=group,
            idempotency_key=f"{status} {CANARY}",
            **({"worker": worker} if status == "PROCESSING" or status in FINISHED else {}),
        )
        for status in STATUSES
    ]
    for job_id in jobs:
        execute(database_url, "insert into events (job_id, kind, attempt, by, message) values (%s, %s, 1, %s, %s)", job_id, *[CANARY] * 3)
        execute(
            database_url,
            "insert into failures (job_id, claim, attempt, started_at, worker, type, message, traceback, fingerprint) "
            "values (%s, 1, 1, now(), %s, %s, %s, %s, 'f')",
            job_id,
            worker,
            *[CANARY] * 3,
        )
    system.limit(CANARY, max_running=1)
    asked = [
        web.get("/admin/ui"),
        web.get("/admin/ui", {"done": "pause", "of": CANARY}),
        web.get("/admin/ui", {"done": "retry", "of": CANARY}),
        web.get("/admin/ui/jobs"),
        web.get("/admin/ui/jobs", {"type": CANARY, "queue": CANARY, "q": CANARY}),
        web.get("/admin/ui/jobs", {"status": CANARY}, status=400),
        web.get("/admin/ui/jobs", {"cursor": CANARY}, status=400),
        web.get("/admin/ui/jobs/%3Cscript%3E", status=404),
        *[web.get(f"/admin/ui/jobs/{job_id}") for job_id in jobs],
    ]
    system.pause(CANARY)
    asked += [web.get("/admin/ui"), web.get(f"/admin/ui/jobs/{jobs[1]}"), web.get("/admin/ui", headers={"HX-Request": "true"})]
    for page in asked:
        _assert_only_our_own(page)
    for job_id in jobs:
        shown = web.get(f"/admin/ui/jobs/{job_id}").html
        assert CANARY in shown.h1.text
        assert json.dumps(CANARY) in shown.select_one("#payload ~ pre").text
        assert CANARY in shown.select_one("ol.timeline").text


def _assert_only_our_own(page: Any) -> None:
    """Every node that could run, load or lead somewhere is one of ours, and there is no inline script or style."""
    dom = BeautifulSoup(page.text, "html.parser")
    assert {script.get("src", "inline").partition("?")[0].rpartition("/")[2] for script in dom.find_all("script")} <= {
        "htmx.min.js",
        "live.js",
    }
    assert all(script.text == "" for script in dom.find_all("script"))
    assert {image["src"].partition("?")[0] for image in dom.find_all("img")} <= {"/admin/ui/static/favicon.svg"}
    assert not dom.find_all(["style", "iframe", "object", "embed", "base", "textarea"])
    for node in dom.find_all(True):
        for name, value in node.attrs.items():
            assert not name.startswith("on") and name != "style", f"{name} in {node}"
            if name in ("href", "src", "action", "hx-get"):
                assert value == "" or value.startswith("/admin/ui"), f"{name}={value}"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "unsafe" not in page.headers["Content-Security-Policy"]


def test_secrets_in_a_payload_are_masked(web: TestApp, add_job: Callable[..., str]) -> None:
    secrets = {
        "password": "s3cret-1",
        "smtp": {"Api_Key": "s3cret-2", "X-Auth-Token": "s3cret-3"},
        "headers": [{"Authorization": "s3cret-4"}],
    }
    error = {"type": "OSError", "message": "postgresql://ada:s3cret-5@db/x refused: Bearer s3cret-6abc", "attempt": 1}
    job_id = add_job(
        "FAILED", payload={**secrets, "client_secret": ["s3cret-7"], "to": "ada"}, result=secrets, options=secrets, error=error
    )
    for page in (web.get(f"/admin/ui/jobs/{job_id}"), web.get("/admin/ui"), web.get("/admin/ui/jobs")):
        assert "s3cret" not in page.text
    assert '"to": "ada"' in text(web.get(f"/admin/ui/jobs/{job_id}"))


def test_a_payload_of_any_size_makes_a_page_of_ordinary_size(web: TestApp, add_job: Callable[..., str]) -> None:
    rows = [{"number": number, "text": "x" * 50} for number in range(50_000)]
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    for payload in ({"data": rows}, {"text": "x" * 2_000_000}, {"deep": deep}, {"k" * 100_000: 1}):
        assert len(web.get(f"/admin/ui/jobs/{add_job('FAILED', payload=payload)}").text) < 60_000


def test_every_form_that_changes_something_carries_the_token(web: TestApp, system: JobSystem, add_job: Callable[..., str]) -> None:
    jobs = [add_job(status) for status in STATUSES]
    system.pause("default")
    for path in ("/admin/ui", "/admin/ui/jobs", *(f"/admin/ui/jobs/{job_id}" for job_id in jobs)):
        for form in web.get(path).html.find_all("form", method="post"):
            assert len(form.find("input", attrs={"name": "csrf"})["value"]) == 64


# When something is wrong


def test_a_job_that_is_not_there_is_a_page(web: TestApp) -> None:
    for job_id in (str(uuid4()), "nonsense", "%00", "%F0%9F%92%A5"):
        page = web.get(f"/admin/ui/jobs/{job_id}", status=404)
        assert page.content_type == "text/html" and page.html.h1.text == "There is no such job"


def test_an_address_that_is_none_is_a_page(web: TestApp, settings: Settings) -> None:
    assert web.get("/admin/ui/nonsense/x/y/z", status=404).html.h1.text == "There is no such page"
    token = {"csrf": Tokens(settings).make("admin")}
    for path in ("/admin/ui/queues/nonsense/pause", f"/admin/ui/jobs/{uuid4()}/explode"):
        assert web.post(path, token, status=404).html.h1.text == "There is no such page"


def test_a_button_that_came_too_late_is_a_page_that_leads_to_the_job(web: TestApp, add_job: Callable[..., str]) -> None:
    job_id = add_job("FAILED")
    page = web.get(f"/admin/ui/jobs/{job_id}")
    form = page.forms[_form_of(page, "Retry")]
    form.submit(status=303)
    answer = form.submit(status=409)
    assert answer.content_type == "text/html" and "The job is PENDING now" in text(answer)
    assert answer.html.find("a", string="Look at the job")["href"] == f"/admin/ui/jobs/{job_id}"


@pytest.mark.parametrize("query", ["status=NONSENSE", "cursor=nonsense", "status=%00x", "cursor=%F0%9F%92%A5"])
def test_a_filter_that_is_none_is_a_page(web: TestApp, query: str) -> None:
    page = web.get(f"/admin/ui/jobs?{query}", status=400)
    assert page.content_type == "text/html" and page.html.h1.text == "That can't be looked up"


def test_while_the_database_is_away_the_pages_say_so_and_try_again() -> None:
    system = JobSystem(Settings(_env_file=None, database_url="postgresql://nobody@127.0.0.1:1/none"))
    web = TestApp(create_app(system=system))
    for path in ("/admin/ui", "/admin/ui/jobs?status=FAILED", f"/admin/ui/jobs/{uuid4()}"):
        page = web.get(path, status=503)
        assert page.content_type == "text/html" and page.html.h1.text == "The database is away"
        assert page.headers["Retry-After"] == "5"
        assert page.html.find("meta", attrs={"http-equiv": "refresh"})["content"] == f"5;url={path}"
    token = Tokens(system.settings).make("admin")
    page = web.post(f"/admin/ui/jobs/{uuid4()}/retry", {"csrf": token}, status=503)
    assert "probably not done" in text(page)
    assert page.html.find("meta", attrs={"http-equiv": "refresh"}) is None
    system.close()


# Keeping up to date


def test_the_pages_refresh_with_and_without_javascript(web: TestApp, add_job: Callable[..., str]) -> None:
    job_id = add_job("PENDING")
    for path in ("/admin/ui", f"/admin/ui/jobs/{job_id}"):
        page = web.get(path)
        assert page.html.find(id="live")["hx-get"] == path
        assert page.html.find("noscript").meta["content"] == f"5;url={path}"
        partial = web.get(path, headers={"HX-Request": "true"})
        assert partial.text.startswith("<title>") and "<html" not in partial.text
        assert partial.html.find(id="live") is not None
        assert partial.headers["Vary"] == "HX-Request"


def test_what_cannot_change_is_not_asked_again(web: TestApp, add_job: Callable[..., str]) -> None:
    for path in (f"/admin/ui/jobs/{add_job('COMPLETED')}", "/admin/ui/jobs?q=text"):
        page = web.get(path)
        assert not page.html.find(id="live").has_attr("hx-get") and page.html.find("noscript") is None


def test_static_files_may_be_kept_and_pages_may_not(web: TestApp) -> None:
    page = web.get("/admin/ui")
    assert page.headers["Cache-Control"] == "no-store"
    for node, kind in (("link[rel=stylesheet]", "text/css"), ("script", "text/javascript"), ("link[rel=icon]", "image/svg+xml")):
        found = page.html.select_one(node)
        answer = web.get(found.get("href") or found.get("src"))
        assert answer.content_type == kind and "immutable" in answer.headers["Cache-Control"]
    for name in ("nonsense", "..%2fviews.py", "%2e%2e/views.py"):
        web.get(f"/admin/ui/static/{name}", status=404)


def test_pages_read_few_rows_however_many_jobs_there_are(settings: Settings, database_url: str, add_job: Callable[..., str]) -> None:
    execute(
        database_url,
        """
        insert into jobs (type, queue, status, attempt, started_at, finished_at, worker)
        select 'TEST_JOB', 'default', 'COMPLETED', 1, now(), now(), gen_random_uuid() from generate_series(1, 100000)
        """,
    )
    for _ in range(100):
        add_job("FAILED")
        add_job("PENDING")
    execute(database_url, "vacuum analyze jobs")

    def rows_read() -> int:
        statement = "select seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_user_tables where relname = 'jobs'"
        return int(execute(database_url, statement)[0][0])

    def nobody_else() -> bool:
        """Sessions report what they read when they end, at the latest."""
        others = "select pid from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
        return len(execute(database_url, others)) == 1

    with psycopg2.connect(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("select id from jobs order by id offset 50000 limit 1")
        middle = cursor.fetchall()[0][0]
    connection.close()
    failed = add_job("FAILED")
    for path in ("", "/jobs", "/jobs?status=FAILED", "/jobs?type=TEST_JOB&queue=default", f"/jobs?cursor={middle}", f"/jobs/{failed}"):
        eventually(nobody_else)
        before = rows_read()
        system = JobSystem(settings)
        page = TestApp(create_app(system=system)).get(f"/admin/ui{path}")
        system.close()
        eventually(nobody_else)
        assert rows_read() - before < 500, path
        assert page.status_code == 200
        if path != f"/jobs/{failed}":
            assert count(page, "COMPLETED") == "100,000"


# In words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "just now"),
        (12, "12 s ago"),
        (-12, "in 12 s"),
        (59.8, "1 min ago"),
        (179, "3 min ago"),
        (3599, "1 h ago"),
        (-7200, "in 2 h"),
        (86_400, "1 d ago"),
        (5 * 86_400, "5 d ago"),
        (100 * 86_400, "2025-09-23"),
    ],
)
def test_distances_in_time_are_said_in_one_unit(seconds: float, said: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert wording.ago(now - timedelta(seconds=seconds), now) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0421, "42 ms"), (1.24, "1.2 s"), (5, "5 s"), (61, "1 min"), (7500, "2 h 5 min"), (7200, "2 h"), (180_000, "2 d")],
)
def test_durations_are_said_in_at_most_two_units(seconds: float, said: str) -> None:
    assert wording.span(seconds) == said


# In a browser


@pytest.mark.browser
def test_in_a_browser_long_names_fit_a_phone(browser: Any, start_web: Callable[..., Running], add_job: Callable[..., str]) -> None:
    web, id = start_web(), add_job("FAILED", type="A_TYPE_" * 12, queue="a-queue-" * 12)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False})
    for path in ("", "/jobs", f"/jobs/{id}", "/many/retry?status=FAILED"):
        browser.get(f"{web.url}/admin/ui{path}")
        assert browser.execute_script("const {scrollWidth, clientWidth} = document.documentElement; return scrollWidth === clientWidth"), (
            path
        )
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_in_a_browser_retry_works_and_the_page_keeps_up_by_itself(
    browser: Any, start_web: Callable[..., Running], add_job: Callable[..., str], database_url: str
) -> None:
    web = start_web()
    job_id = add_job("FAILED")

    def shown(status: str) -> str:
        return str(browser.execute_script("return document.getElementById(arguments[0]).textContent", f"count-{status}"))

    browser.get(f"{web.url}/admin/ui")
    assert (shown("failed"), shown("pending")) == ("1", "0")
    browser.find_element("css selector", f"#job-{job_id} button.retry").click()
    eventually(lambda: "It waits for a worker again" in browser.page_source)
    assert (shown("failed"), shown("pending")) == ("0", "1")
    assert browser.current_url == f"{web.url}/admin/ui"

    browser.execute_script("window.sameDocument = true; document.querySelector('.updated a').focus()")
    second = add_job("FAILED", type=CANARY, error={"type": CANARY, "message": CANARY, "attempt": 1})
    eventually(lambda: shown("failed") == "1", timeout=15)
    assert browser.find_element("id", f"job-{second}").text.startswith("Failed")
    assert browser.title == "1 job failed · jobsys"
    assert browser.execute_script("return window.sameDocument && document.activeElement.textContent") == "Reload"
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_in_a_browser_a_page_that_falls_behind_keeps_what_it_has_and_says_so(
    browser: Any, server: str, start_web: Callable[..., Running], add_job: Callable[..., str], database_url: str
) -> None:
    web = start_web()
    add_job("FAILED")
    browser.get(f"{web.url}/admin/ui")
    stale = browser.find_element("id", "stale")

    def look_again_and_see(said: str) -> None:
        browser.execute_script("document.dispatchEvent(new Event('visibilitychange'))")
        eventually(lambda: said in stale.text if said else not stale.is_displayed(), timeout=15)
        assert browser.execute_script("return document.getElementById('count-failed').textContent") == "1"

    name = urlsplit(database_url).path[1:]
    execute(server, f'alter database "{name}" allow_connections false')
    execute(server, "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", name)
    look_again_and_see("the database is away")
    execute(server, f'alter database "{name}" allow_connections true')
    look_again_and_see("")
    web.stop()
    look_again_and_see("the server can't be reached")


def _form_of(page: Any, button: str) -> int:
    """The number of the first form with only this button, for webtest."""
    forms = (form.find_all("button") for form in page.html.find_all("form"))
    return next(number for number, buttons in enumerate(forms) if [each.text for each in buttons] == [button])
