"""The operator's verbs as JSON. Who may use them is the affair of `access`."""

from __future__ import annotations

from typing import Annotated, Any

import falcon
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from jobsys.api import body, filters, wire
from jobsys.api.jobs import JOB, accept
from jobsys.api.problem import Problem
from jobsys.errors import InvalidSubmission, WrongState
from jobsys.openapi import NO_NUL, Answer, Schema, describe
from jobsys.system import JobSystem
from jobsys.verbs import VERBS

MOST_IDS = 10_000
REASONS_NAMED = 100

_AS_OF = {
    "type": "string",
    "format": "date-time",
    "description": "What came to its status after this time is left alone; now unless given.",
}
PAGE = Answer("A page of jobs.", filters.JobPage)


class QueuePaused(TypedDict):
    """Whether a queue rests."""

    queue: str
    paused: bool


class Reason(TypedDict):
    """Why nothing was done to a job."""

    id: str
    msg: str


class Acted(TypedDict):
    """To how many jobs it was done. With `more` others match: the same request again goes on, best with the same `asOf`."""

    count: wire.Count
    stopping: NotRequired[Annotated[int, Field(ge=0, description="How many run, and were asked to stop (cancel).")]]
    skipped: NotRequired[Annotated[int, Field(ge=0, description="How many of the ids were left alone.")]]
    reasons: NotRequired[Annotated[list[Reason], Field(description=f"Why, of the first {REASONS_NAMED}.")]]
    more: bool
    asOf: wire.Timestamp


ACTED = Answer("What became of it.", Acted)


def _choice(verb: str) -> Schema:
    """Which jobs an operator means: the body of this verb for many."""
    ways = {
        "ids": {"type": "array", "items": {"type": "string", "pattern": NO_NUL}, "minItems": 1, "maxItems": MOST_IDS},
        "filter": filters.in_body(VERBS[verb].allowed),
        "all": {"const": True, "description": "Every job that it can be done to."},
    }
    return {
        "oneOf": [
            {"type": "object", "properties": {name: way, "asOf": _AS_OF}, "required": [name], "additionalProperties": False}
            for name, way in ways.items()
        ]
    }


class AdminJobs:
    """`/admin/jobs`, `/admin/failed`, `/admin/dead`: the same list; `/admin/jobs/retry`, `/dlq`, `/cancel`: one verb for many."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    @describe("adminListJobs", {200: PAGE}, parameters=filters.ANY_STATUS)
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List jobs."""
        resp.media = filters.page(self._system, req)

    @describe("adminListFailed", {200: PAGE}, parameters=filters.ONE_STATUS)
    def on_get_failed(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List the jobs that failed for good."""
        resp.media = filters.page(self._system, req, status="FAILED")

    @describe("adminListDead", {200: PAGE}, parameters=filters.ONE_STATUS)
    def on_get_dead(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List the dead letters."""
        resp.media = filters.page(self._system, req, status="DEAD")

    @describe("adminRetryJobs", {200: ACTED}, body=_choice("retry"))
    def on_post_retry(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Run many jobs again from the first attempt."""
        resp.media = self._act("retry", req)

    @describe("adminBuryJobs", {200: ACTED}, body=_choice("bury"))
    def on_post_dlq(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Make many jobs dead letters."""
        resp.media = self._act("bury", req)

    @describe("adminCancelJobs", {200: ACTED}, body=_choice("cancel"))
    def on_post_cancel(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Cancel many jobs, and ask those that run to stop."""
        resp.media = self._act("cancel", req)

    def _act(self, verb: str, req: falcon.Request) -> Acted:
        if req.params:  # whoever filters there means to be heard
            raise Problem(400, 'the filter belongs into the body: {"filter": {"status": …, "type": …}}')
        document = body.read_object(req, self._system.settings.max_body)
        chosen = _chosen(document)
        try:
            outcome = self._system.act_on_many(verb, by=req.context.user, **chosen)
        except InvalidSubmission as error:
            raise InvalidSubmission([{**each, "loc": ["filter", *each["loc"]]} for each in error.errors]) from None
        answer: Acted = {"count": outcome.done, "more": outcome.more, "asOf": wire.timestamp(outcome.as_of)}
        if verb == "cancel":
            answer["stopping"] = outcome.stopping
        if "ids" in document:
            answer["skipped"] = len(outcome.left)
            answer["reasons"] = [_reason(verb, *each) for each in list(outcome.left.items())[:REASONS_NAMED]]
        return answer


def _chosen(document: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `act_on_many` from a body. That all jobs are meant must be said: a filter that got lost doesn't say it."""
    errors = [
        {"loc": [name], "msg": "is not known here; known are ids, filter, all, asOf"}
        for name in document
        if name not in ("ids", "filter", "all", "asOf")
    ]
    chosen: dict[str, Any] = {}
    if len({"ids", "filter", "all"} & set(document)) != 1:
        errors.append({"loc": [], "msg": 'say which jobs: {"ids": […]}, {"filter": {"status": …, "type": …}} or {"all": true}'})
    elif "ids" in document:
        ids = chosen["ids"] = document["ids"]
        if not isinstance(ids, list) or not 1 <= len(ids) <= MOST_IDS or not all(isinstance(id, str) for id in ids):
            errors.append({"loc": ["ids"], "msg": f"must be a list of 1 to {MOST_IDS} ids"})
    elif "filter" in document:
        if isinstance(document["filter"], dict) and document["filter"]:
            chosen = filters.chosen(document["filter"])
        else:
            errors.append({"loc": ["filter"], "msg": 'must be an object that names something; for every job say {"all": true}'})
    elif document["all"] is not True:
        errors.append({"loc": ["all"], "msg": "must be true, or left out"})
    try:
        if "asOf" in document:
            chosen["as_of"] = wire.moment(str(document["asOf"]))
    except ValueError as error:
        errors.append({"loc": ["asOf"], "msg": str(error)})
    if errors:
        raise InvalidSubmission(errors)
    return chosen


def _reason(name: str, id: str, status: str | None) -> Reason:
    """Why nothing was done to a job that was asked for."""
    verb = VERBS[name]
    if status is None:
        why = "there is no job with this id"
    elif status not in verb.allowed:
        why = str(WrongState(verb.done, status, verb.allowed))
    elif status == "PROCESSING":
        why = "it runs, and was asked to stop before"
    else:
        why = "it changed, or somebody else had it locked; ask again"
    return {"id": id, "msg": why}


class AdminJob:
    """`/admin/jobs/{job_id}/…`: what an operator does to one job."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    @describe("adminRetryJob", {202: JOB}, errors=[409])
    def on_post_retry(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Run the job again from the first attempt."""
        accept(resp, self._system.retry(job_id, by=req.context.user))

    @describe("adminBuryJob", {202: JOB}, errors=[409])
    def on_post_dlq(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Make the job a dead letter."""
        accept(resp, self._system.bury(job_id, by=req.context.user))

    @describe("adminCancelJob", {202: JOB}, errors=[409])
    def on_post_cancel(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Cancel the job, or ask it to stop when it runs."""
        accept(resp, self._system.cancel(job_id, by=req.context.user))


class AdminQueue:
    """`/admin/queues/{name}/…`: let a queue rest, let it run."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    @describe("adminPauseQueue", {200: Answer("The queue rests.", QueuePaused)})
    def on_post_pause(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """Start no more jobs of this queue; those that run go on."""
        self._check(name)
        self._system.pause(name, by=req.context.user)
        resp.media = QueuePaused(queue=name, paused=True)

    @describe("adminResumeQueue", {200: Answer("The queue runs.", QueuePaused)})
    def on_post_resume(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """Start jobs of this queue again."""
        self._check(name)
        self._system.resume(name, by=req.context.user)
        resp.media = QueuePaused(queue=name, paused=False)

    def _check(self, name: str) -> None:
        if name not in [queue.name for queue in self._system.queues()]:
            raise Problem(404, "there is no queue of this name")
