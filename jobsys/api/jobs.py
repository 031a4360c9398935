"""The jobs: submit one, look for some, follow one, and change what becomes of it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import IO, Annotated, Any

import falcon
from pydantic import Field
from typing_extensions import TypedDict

from jobsys import tracing, trail
from jobsys.api import body, event_stream, filters, items, problem, waiting, wire
from jobsys.api.problem import VARY, Problem
from jobsys.api.waiting import Exchange, Waits
from jobsys.errors import InvalidSubmission
from jobsys.openapi import IDEMPOTENCY_KEY, SUBMISSION, Answer, Parameter, Submissions, describe
from jobsys.submissions import Submitted
from jobsys.system import JobRecord, JobSystem, Submission

MOST_JOBS = 10_000
"""How many jobs may be submitted at once."""
ERRORS_NAMED = 50

_NEXT = {
    name: {"job_id": "$response.body#/jobId"}
    for name in ("getJob", "removeJob", "cancelJob", "retryJob", "listEvents", "adminRetryJob", "adminBuryJob", "adminCancelJob")
}
KEY = Parameter(
    "Idempotency-Key",
    IDEMPOTENCY_KEY,
    "The same key and the same body again answer the first job, and make no other. The same key with another body is 422.",
    where="header",
)
LAST_EVENT_ID = Parameter(
    "Last-Event-ID", {"type": "string"}, "The id of the event of a stream that was received last: it goes on behind that.", where="header"
)
STREAM = {
    "type": "string",
    "description": "Server-sent events, each with an id and an entry of the timeline as `data`; the last one is called `end`, and has "
    "`jobId` and `status`. A stream lasts a few minutes at most: who comes back with `Last-Event-ID` reads on.",
}
DISPOSITION = Parameter("Content-Disposition", {"type": "string"}, "The name offered for the file.")
LOCATION = Parameter("Location", {"type": "string", "format": "uri-reference"}, "Where the job is.")
REPLAYED = Parameter(
    "Idempotency-Replayed", {"type": "string", "const": "true"}, "Only there when this is a job that the key had made before."
)


class Accepted(TypedDict):
    """A job was taken, and is durable."""

    message: str
    jobId: wire.Id
    status: wire.Status


class AllAccepted(TypedDict):
    """All jobs were taken, and are durable. Their ids are in the order given."""

    message: str
    jobIds: list[wire.Id]
    count: wire.Count
    replayed: Annotated[int, Field(ge=0, description="How many of them keys had made before.")]


class Removing(TypedDict):
    """A running job was asked to stop."""

    message: str
    jobId: wire.Id


class Timeline(TypedDict):
    """What happened to a job, oldest first."""

    jobId: wire.Id
    events: list[wire.JobEvent]


JOB = Answer("The job as it is after that.", wire.JobObject, links=_NEXT)
"""What every verb answers."""


class Jobs:
    """`/jobs`: submit a job, list jobs; `/jobs/bulk`: submit many."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    @describe(
        "submitJob",
        {202: Answer("The job is accepted.", Accepted, headers=(LOCATION, REPLAYED), links=_NEXT)},
        body=SUBMISSION,
        parameters=[KEY],
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Submit a job; it is durable before the answer is sent."""
        document = body.read_object(req, self._system.settings.max_body)
        id, status = "", "PENDING"
        try:
            described = self._system.describe(Submission(**wire.submission(document, key=req.get_header("Idempotency-Key"))))
            id = described.id
            if not self._goes_with_others(req, described, document):
                job = self._system.submit_described(described)
                id, status = job.id, job.status
                if job.replayed:
                    resp.set_header("Idempotency-Replayed", "true")
        except InvalidSubmission as error:
            raise wire.in_words_of(document, error) from None
        trail.note(job_id=id)
        resp.status = falcon.HTTP_202
        resp.location = f"/jobs/{id}"
        accepted: Accepted = {"message": "Job accepted!", "jobId": id, "status": status}
        resp.media = accepted

    @describe(
        "submitJobs",
        {202: Answer("All of them are accepted.", AllAccepted, headers=(REPLAYED,))},
        body=Submissions(MOST_JOBS),
        parameters=[KEY],
    )
    def on_post_bulk(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Submit many jobs in one transaction, all or none; they are durable before the answer is sent."""
        jobs = self._described(req)
        ids = self._system.submit_many(jobs, idempotency_key=req.get_header("Idempotency-Key"))
        replayed = sum(id != job.id for id, job in zip(ids, jobs, strict=True))
        resp.status = falcon.HTTP_202
        if replayed == len(ids):
            resp.set_header("Idempotency-Replayed", "true")
        resp.media = AllAccepted(message="Jobs accepted!", jobIds=ids, count=len(ids), replayed=replayed)

    @describe("listJobs", {200: Answer("A page of jobs.", filters.JobPage)}, parameters=filters.ANY_STATUS)
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List jobs, newest first, a page at a time."""
        resp.media = filters.page(self._system, req)

    def _goes_with_others(self, req: falcon.Request, job: Submitted, document: dict[str, Any]) -> bool:
        """Whether the job is committed together with those of other requests. Then what is answered now is sent once it is, and no thread
        waits for that."""
        exchange: Exchange | None = req.env.get("jobsys.exchange")
        if exchange is None or not job.plain or tracing.active is not None:  # (the span of a request is its thread's)
            return False
        answer = HeldAnswer(req, exchange, job.id, dict.fromkeys(document))  # what stands in it, as Python has it, is 25 times the body
        if not exchange.hold(answer.end):
            return False
        try:
            req.context.held = self._system.submit_with_others(job, answer.told)
        finally:
            if not req.context.held:
                exchange.unhold()
        return bool(req.context.held)

    def _described(self, req: falcon.Request) -> list[Submitted]:
        """The jobs in the body, checked one by one as they arrive. Raises InvalidSubmission with what is wrong with any of them."""
        jobs: list[Submitted] = []
        errors: list[dict[str, Any]] = []
        for number, item in enumerate(items.read(req, self._system.settings.max_body)):
            if number == MOST_JOBS:
                raise InvalidSubmission.of([], f"the body has more than {MOST_JOBS} jobs: send them in several")
            try:
                jobs.append(self._one_described(item))
            except InvalidSubmission as error:
                errors += ({"loc": [number, *each["loc"]], "msg": each["msg"]} for each in error.errors)
                jobs.clear()
                if len(errors) >= ERRORS_NAMED:
                    break
        if errors:
            raise InvalidSubmission(errors[:ERRORS_NAMED])
        if not jobs:
            raise InvalidSubmission.of([], f"the body has no jobs: send 1 to {MOST_JOBS}")
        return jobs

    def _one_described(self, item: dict[str, Any] | InvalidSubmission) -> Submitted:
        if isinstance(item, InvalidSubmission):
            raise item
        try:
            return self._system.describe(Submission(**wire.submission(item)))
        except InvalidSubmission as error:
            raise wire.in_words_of(item, error) from None


class HeldAnswer:
    """The 202 for a job that is still to be committed."""

    _error: Exception | None = None

    def __init__(self, req: falcon.Request, exchange: Exchange, job_id: str, fields: dict[str, Any]) -> None:
        self._req, self._exchange, self._job_id, self._fields = req, exchange, job_id, fields

    def told(self, error: Exception | None) -> None:
        """The job is committed; or why it is not."""
        self._error = error
        self._exchange.release()

    def end(self) -> None:
        """It is sent now; or what is to be said instead."""
        status = 202
        trail.enter_request(self._req.context.id)
        trail.note(job_id=self._job_id)
        try:
            if (error := self._error) is not None:
                told = wire.in_words_of(self._fields, error) if isinstance(error, InvalidSubmission) else error
                answer, status, headers = problem.answer(self._req, told)
                self._exchange.answer(answer, falcon.code_to_http_status(status), [("Location", None), *headers])
            self._req.context.at_end(self._req, status)
        finally:
            trail.leave_request()


class Job:
    """`/jobs/{job_id}` and what hangs below it."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system
        self._waits = Waits(system)

    @describe("getJob", {200: Answer("The job.", wire.JobObject, links=_NEXT)}, parameters=[filters.WAIT])
    def on_get(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Answer the job as it is. With `?wait=` as soon as it is finished, or as it is then."""
        resp.media = wire.job(waiting.for_job(self._waits, req, resp, job_id, filters.wait(req)))

    @describe(
        "removeJob",
        {204: Answer("The job is gone."), 202: Answer("The job runs; it is gone once it has stopped.", Removing)},
    )
    def on_delete(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Cancel what is unfinished and remove the record."""
        if self._system.remove(job_id, by=req.context.user or "api"):
            resp.status = falcon.HTTP_204
        else:
            resp.status = falcon.HTTP_202
            removing: Removing = {"message": "The job runs and was asked to stop; it is removed when it has stopped.", "jobId": job_id}
            resp.media = removing

    @describe("cancelJob", {202: JOB}, errors=[409])
    def on_post_cancel(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Cancel a waiting job at once; ask a running one to stop."""
        accept(resp, self._system.cancel(job_id, by=req.context.user or "api"))

    @describe("retryJob", {202: JOB}, errors=[409])
    def on_post_retry(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Run a failed, dead or cancelled job again from the first attempt."""
        accept(resp, self._system.retry(job_id, by=req.context.user or "api"))

    @describe(
        "listEvents",
        {
            200: Answer("The timeline.", Timeline, also={event_stream.CONTENT_TYPE: STREAM}, headers=(VARY,)),
            204: Answer("All of the stream was told.", headers=(VARY,)),
        },
        parameters=[LAST_EVENT_ID],
    )
    def on_get_events(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Answer the job's timeline, oldest first. As a stream that goes on to its end, to an Accept that prefers text/event-stream."""
        resp.append_header("Vary", "Accept")
        if event_stream.is_wanted(req):
            event_stream.answer(self._waits, req, resp, job_id)
            return
        timeline: Timeline = {"jobId": job_id, "events": [wire.event(entry) for entry in self._system.events(job_id)]}
        resp.media = timeline

    @describe(
        "getArtifact",
        {200: Answer("The file.", {"type": "string"}, media_type="text/csv; charset=utf-8", headers=(DISPOSITION,))},
    )
    def on_get_artifact(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Send the CSV file that the job made."""
        job = self._system.job(job_id)
        file = _open_artifact(self._system.settings.output_dir, job)
        resp.content_type = "text/csv; charset=utf-8"
        resp.downloadable_as = _download_name(job)
        resp.set_stream(file, os.fstat(file.fileno()).st_size)


def accept(resp: falcon.Response, job: JobRecord) -> None:
    """Answer 202 with the job as it is after what was asked."""
    resp.status = falcon.HTTP_202
    resp.media = wire.job(job)


def _open_artifact(directory: Path, job: JobRecord) -> IO[bytes]:
    """The file named for the job, and no other: never through a link, never what a payload or a result names."""
    try:
        file = os.fdopen(os.open(directory / f"{job.id}.csv", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError:
        raise Problem(404, "this job has made no file") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Problem(404, "this job has made no file")
    return file


def _download_name(job: JobRecord) -> str:
    wish: Any = job.payload.get("filename") if isinstance(job.payload, dict) else None
    return wish if isinstance(wish, str) and re.fullmatch(r"\w[\w .-]{0,99}", wish) else f"{job.id}.csv"
