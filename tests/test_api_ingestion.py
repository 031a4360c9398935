"""Ingestion over HTTP: batches in the order given, and a status that is nothing but what their jobs say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import webtest
from conftest import Running, eventually, execute

from jobsys.system import JobSystem

ABSENT = "01a20560-59f6-7000-9635-42139b8250d8"


def ingest(api: webtest.TestApp, ids: list[int], **body: Any) -> str:
    return str(api.post_json("/api/ingest", {"ids": ids, **body}, status=201).json["data"]["ingestion_id"])


def status(api: webtest.TestApp, ingestion_id: str) -> dict[str, Any]:
    answer = api.get(f"/api/status/{ingestion_id}", status=200).json
    assert answer["success"] is True
    return dict(answer["data"])


def test_ids_become_batches_in_the_order_given(api: webtest.TestApp) -> None:
    created = api.post_json("/api/ingest", {"ids": [5, 1, 4, 2, 3, 5, 7], "priority": "HIGH"}, status=201).json
    ingestion_id = created["data"]["ingestion_id"]
    assert created == {
        "success": True,
        "message": "Ingestion created successfully",
        "data": {"ingestion_id": ingestion_id, "total_batches": 3, "total_ids": 7},
    }
    data = status(api, ingestion_id)
    batches = data.pop("batches")
    assert data == {
        "ingestion_id": ingestion_id,
        "overall_status": "yet_to_start",
        "total_batches": 3,
        "status_counts": {"yet_to_start": 3, "triggered": 0, "completed": 0},
    }
    assert [(batch["batch_id"], batch["ids"]) for batch in batches] == [("batch-1", [5, 1, 4]), ("batch-2", [2, 3, 5]), ("batch-3", [7])]
    assert {(batch["status"], batch["priority"]) for batch in batches} == {("yet_to_start", "HIGH")}
    assert all(batch["created_at"] == batch["updated_at"] and batch["created_at"].endswith("Z") for batch in batches)


def test_the_priority_is_medium_unless_given(api: webtest.TestApp) -> None:
    for given, shown in (({}, "MEDIUM"), ({"priority": "LOW"}, "LOW"), ({"priority": "medium"}, "MEDIUM")):
        assert status(api, ingest(api, [1], **given))["batches"][0]["priority"] == shown


def test_an_ingestion_runs_to_its_end(api: webtest.TestApp, start_worker: Callable[..., Running]) -> None:
    ingestion_id = ingest(api, [1, 2, 3, 4])
    start_worker(INGEST_RATE="0")
    data = eventually(lambda: (now := status(api, ingestion_id))["overall_status"] == "completed" and now, timeout=20)
    assert data["status_counts"] == {"yet_to_start": 0, "triggered": 0, "completed": 2}
    assert all(batch["updated_at"] > batch["created_at"] for batch in data["batches"])


def test_the_whole_is_what_its_batches_are(api: webtest.TestApp, system: JobSystem, database_url: str) -> None:
    for states, overall, counts in (
        (["PENDING", "PROCESSING"], "triggered", {"yet_to_start": 1, "triggered": 1, "completed": 0}),
        (["PENDING", "COMPLETED"], "triggered", {"yet_to_start": 1, "triggered": 0, "completed": 1}),
        (["COMPLETED", "COMPLETED"], "completed", {"yet_to_start": 0, "triggered": 0, "completed": 2}),
        (["FAILED", "COMPLETED"], "failed", {"yet_to_start": 0, "triggered": 0, "completed": 1, "failed": 1}),
        (["FAILED", "PENDING"], "triggered", {"yet_to_start": 1, "triggered": 0, "completed": 0, "failed": 1}),
        (["DEAD", "CANCELLED"], "failed", {"yet_to_start": 0, "triggered": 0, "completed": 0, "failed": 2}),
    ):
        ingestion_id = ingest(api, [1, 2, 3, 4])
        for job, state in zip(system.group(ingestion_id), states, strict=True):
            become(database_url, job.id, state)
        data = status(api, ingestion_id)
        assert (data["overall_status"], data["status_counts"]) == (overall, counts)


def test_a_batch_that_waits_for_another_attempt_has_been_triggered(api: webtest.TestApp, system: JobSystem, database_url: str) -> None:
    ingestion_id = ingest(api, [1])
    execute(database_url, "update jobs set attempt = 1, status = 'SCHEDULED' where group_id = %s", ingestion_id)
    assert status(api, ingestion_id)["overall_status"] == "triggered"


def become(database_url: str, job_id: str, state: str) -> None:
    """Put a job into a state no worker was there to bring it to."""
    ended = state in ("COMPLETED", "FAILED", "DEAD", "CANCELLED")
    execute(
        database_url,
        """
        update jobs
        set status = %s, attempt = %s, worker = %s, started_at = %s::timestamptz, finished_at = %s::timestamptz
        where id = %s
        """,
        state,
        int(state not in ("PENDING", "CANCELLED")),
        ABSENT if state == "PROCESSING" else None,
        None if state == "PENDING" else "now",
        "now" if ended else None,
        job_id,
    )


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["ids"]),
        ({"ids": []}, ["ids"]),
        ({"ids": "1,2"}, ["ids"]),
        ({"ids": {"1": 1}}, ["ids"]),
        ({"ids": [1] * 100_001}, ["ids"]),
        ({"ids": [1, 0]}, ["ids", 1]),
        ({"ids": [10**9 + 8]}, ["ids", 0]),
        ({"ids": [1, "2"]}, ["ids", 1]),
        ({"ids": [True]}, ["ids", 0]),
        ({"ids": [1.0]}, ["ids", 0]),
        ({"ids": [None]}, ["ids", 0]),
        ({"ids": [1], "priority": "default"}, ["priority"]),
        ({"ids": [1], "priority": "URGENT"}, ["priority"]),
        ({"ids": [1], "priority": 1}, ["priority"]),
        ({"ids": [1], "extra": 1}, ["extra"]),
    ],
)
def test_what_is_wrong_with_an_ingestion_is_named(away: webtest.TestApp, body: dict[str, Any], place: list[Any]) -> None:
    problem = away.post_json("/api/ingest", body, status=422)
    assert problem.content_type == "application/problem+json"
    assert place in [each["loc"] for each in problem.json["errors"]]
    assert problem.json["success"] is False and problem.json["message"]


@pytest.mark.parametrize(("raw", "code"), [(b"{", 400), (b"[]", 400), (b'{"ids":[' + b"1," * 1_500_000 + b"1]}", 413)])
def test_a_bad_body_is_answered_in_the_words_of_ingestion(away: webtest.TestApp, raw: bytes, code: int) -> None:
    problem = away.post("/api/ingest", raw, {"Content-Type": "application/json"}, status=code).json
    assert problem["success"] is False and problem["message"] == problem["detail"]
    assert away.get("/api/ingest", status=405).json["success"] is False


def test_a_hundred_thousand_of_the_longest_ids_are_taken_at_once(api: webtest.TestApp) -> None:
    created = api.post_json("/api/ingest", {"ids": [10**9 + 7] * 100_000}, status=201).json["data"]
    assert (created["total_batches"], created["total_ids"]) == (33_334, 100_000)
    data = status(api, created["ingestion_id"])
    assert data["status_counts"]["yet_to_start"] == 33_334
    assert data["batches"][-1] == data["batches"][-1] | {"batch_id": "batch-33334", "ids": [10**9 + 7]}


def test_an_ingestion_that_is_none_is_not_found(api: webtest.TestApp, system: JobSystem) -> None:
    system.submit("TEST_JOB", group_id=ABSENT)
    for ingestion_id in (ABSENT, "nope", "01a20560-59f6-7000-9635-42139b8250d9", "%00"):
        problem = api.get(f"/api/status/{ingestion_id}", status=404).json
        assert problem["success"] is False and problem["message"]
