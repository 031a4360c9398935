"""Ingestion: a list of ids becomes a group of batches, each a job of its own; its status is what the jobs of the group say.

Nothing is stored beside the jobs. The vocabulary (`ingestion_id`, `yet_to_start`, `triggered`) is that of these two routes only.
"""

from __future__ import annotations

import uuid
from collections import Counter
from typing import Annotated, Any

import falcon
from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from jobsys.api import body, wire
from jobsys.api.problem import Problem
from jobsys.errors import InvalidSubmission
from jobsys.job_types import priority_name
from jobsys.openapi import Answer, any_case, describe
from jobsys.system import JobRecord, JobSystem, Submission

BATCH = "INGEST_BATCH"
MOST_IDS = 100_000
LARGEST_ID = 10**9 + 7

_BODY_LIMITS = 2  # 100,000 ids of ten digits are more than the usual limit
_PRIORITIES = ("HIGH", "MEDIUM", "LOW")
_ERRORS_NAMED = 20


class IngestionRequest(TypedDict):
    """The ids to take in, in this order."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    ids: Annotated[list[Annotated[int, Field(ge=1, le=LARGEST_ID)]], Field(min_length=1, max_length=MOST_IDS)]
    priority: NotRequired[
        Annotated[str, Field(pattern=any_case(*_PRIORITIES), examples=[*_PRIORITIES], description="MEDIUM unless given.")]
    ]


class IngestionMade(TypedDict):
    ingestion_id: wire.Id
    total_batches: wire.Count
    total_ids: wire.Count


class IngestionCreated(TypedDict):
    """All ids were taken, as batches that are each a job."""

    success: Annotated[bool, Field(json_schema_extra={"const": True})]
    message: str
    data: IngestionMade


BatchStatus = Annotated[str, Field(json_schema_extra={"enum": ["yet_to_start", "triggered", "completed", "failed"]})]


class IngestionBatch(TypedDict):
    batch_id: str
    status: BatchStatus
    priority: str
    ids: list[int]
    created_at: wire.Timestamp
    updated_at: wire.Timestamp


class IngestionState(TypedDict):
    ingestion_id: wire.Id
    overall_status: BatchStatus
    total_batches: wire.Count
    status_counts: Annotated[
        dict[str, wire.Count], Field(description="How many batches are in which status; failed only where there are any.")
    ]
    batches: list[IngestionBatch]


class IngestionStatus(TypedDict):
    """How far an ingestion is, batch by batch."""

    success: Annotated[bool, Field(json_schema_extra={"const": True})]
    data: IngestionState


_STATUS_LINK = {"getIngestion": {"ingestion_id": "$response.body#/data/ingestion_id"}}


class Ingestion:
    """`/api/ingest` and `/api/status/{ingestion_id}`."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    @describe(
        "createIngestion",
        {201: Answer("The ingestion is created.", IngestionCreated, links=_STATUS_LINK)},
        body=IngestionRequest,
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Take the ids in: all of them, in one transaction, or none."""
        ids, priority = _checked(body.read_object(req, limit=_BODY_LIMITS * self._system.settings.max_body))
        size = self._system.settings.ingest_batch_size
        ingestion_id = str(uuid.uuid4())
        batches = [
            Submission(type=BATCH, payload={"ids": ids[start : start + size]}, priority=priority, group_id=ingestion_id)
            for start in range(0, len(ids), size)
        ]
        self._system.submit_many(batches)
        resp.status = falcon.HTTP_201
        created: IngestionCreated = {
            "success": True,
            "message": "Ingestion created successfully",
            "data": {"ingestion_id": ingestion_id, "total_batches": len(batches), "total_ids": len(ids)},
        }
        resp.media = created

    @describe("getIngestion", {200: Answer("Its state.", IngestionStatus, links=_STATUS_LINK)})
    def on_get_status(self, req: falcon.Request, resp: falcon.Response, ingestion_id: str) -> None:
        """Say how far an ingestion is, batch by batch."""
        jobs = self._system.group(ingestion_id)
        if not jobs or jobs[0].type != BATCH:
            raise Problem(404, "there is no ingestion with this id")
        batches = [_batch(number, job) for number, job in enumerate(jobs, start=1)]
        counts = Counter(batch["status"] for batch in batches)
        named = ("yet_to_start", "triggered", "completed", *(["failed"] if counts["failed"] else []))
        status: IngestionStatus = {
            "success": True,
            "data": {
                "ingestion_id": str(jobs[0].group_id),
                "overall_status": _overall(counts),
                "total_batches": len(batches),
                "status_counts": {name: counts[name] for name in named},
                "batches": batches,
            },
        }
        resp.media = status


def _checked(document: dict[str, Any]) -> tuple[list[int], str]:
    unknown = [name for name in document if name not in ("ids", "priority")]
    errors: list[dict[str, Any]] = [{"loc": [name], "msg": "is not a field of an ingestion; known are ids, priority"} for name in unknown]
    ids = document.get("ids")
    if not isinstance(ids, list) or not 1 <= len(ids) <= MOST_IDS:
        errors.append({"loc": ["ids"], "msg": f"must be a list of 1 to {MOST_IDS} ids"})
        ids = []
    wrong = [index for index, each in enumerate(ids) if type(each) is not int or not 1 <= each <= LARGEST_ID]
    errors += [{"loc": ["ids", index], "msg": f"must be a whole number from 1 to {LARGEST_ID}"} for index in wrong[:_ERRORS_NAMED]]
    priority = document.get("priority", "MEDIUM")
    if not isinstance(priority, str) or priority.upper() not in _PRIORITIES:
        errors.append({"loc": ["priority"], "msg": f"must be one of {', '.join(_PRIORITIES)}"})
    if errors:
        raise InvalidSubmission(errors)
    return ids, priority


def _batch(number: int, job: JobRecord) -> IngestionBatch:
    return {
        "batch_id": f"batch-{number}",
        "status": _status(job),
        "priority": {"default": "MEDIUM"}.get(name := priority_name(job.priority), name.upper()),
        "ids": job.payload["ids"],
        "created_at": wire.timestamp(job.created_at),
        "updated_at": wire.timestamp(job.finished_at or job.started_at or job.created_at),
    }


def _status(job: JobRecord) -> str:
    """A batch that waits for its next attempt has been triggered; one that was cancelled will never be completed, so it failed."""
    if job.status in ("FAILED", "DEAD", "CANCELLED"):
        return "failed"
    if job.status == "COMPLETED":
        return "completed"
    return "triggered" if job.status == "PROCESSING" or job.attempt else "yet_to_start"


def _overall(counts: Counter[str]) -> str:
    present = {name for name, count in counts.items() if count}
    if len(present) == 1:
        return present.pop()
    return "failed" if present == {"completed", "failed"} else "triggered"
