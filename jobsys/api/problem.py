"""Every error is one shape on the wire, application/problem+json (RFC 9457), and this is where exceptions become it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

import falcon
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from jobsys import logs
from jobsys.errors import DatabaseUnavailable, InvalidSubmission, JobNotFound, NotMigrated, TooManySearches, TooManyTries, WrongState
from jobsys.openapi import Answer, Parameter

log = logs.get(__name__)

RETRY_AFTER = 5
"""Seconds after which a client that met a missing database may ask again."""

_INGESTION = ("/api/ingest", "/api/status/")
_DETAILS = {404: "there is nothing at this path", 405: "this path does not take this method; the header Allow names those it takes"}
VARY = Parameter("Vary", {"type": "string"}, "What the answer depends on.")
RETRY_LATER = Parameter("Retry-After", {"type": "integer", "minimum": 0}, "Seconds after which it is worth another try.")


class FieldError(TypedDict):
    """What is wrong, and where: the way to it through the body, or the name of a parameter."""

    loc: list[str | int]
    msg: str


class ProblemDetails(TypedDict):
    """An error, as in RFC 9457. `errors` names what of the request is wrong."""

    type: str
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    errors: NotRequired[list[FieldError]]


class IngestionProblem(ProblemDetails):
    """An error of the routes of ingestions; `message` is `detail`."""

    success: Annotated[bool, Field(json_schema_extra={"const": False})]
    message: str


def told(text: str, *headers: Parameter) -> Answer:
    """The description of an error that means something of its own on one route."""
    return Answer(text, ProblemDetails, media_type="application/problem+json", headers=headers)


def answers(path: str) -> Mapping[int, Answer]:
    """What every error is on the routes at `path`, by status."""
    shape = IngestionProblem if path.startswith(_INGESTION) else ProblemDetails
    return {
        status: Answer(text, shape, media_type="application/problem+json", headers=_ERROR_HEADERS.get(status, ()))
        for status, text in _MEANINGS.items()
    }


CHALLENGE = Parameter(
    "WWW-Authenticate", {"type": "string"}, "What is asked for; with a Bearer token also what is wrong with it (RFC 6750)."
)
_ERROR_HEADERS = {400: (CHALLENGE,), 401: (CHALLENGE,), 403: (CHALLENGE,), 429: (RETRY_LATER,), 503: (RETRY_LATER,)}
_MEANINGS = {
    400: "What was sent is no JSON, a parameter makes no sense, or the header Authorization is none.",
    401: "No credentials, or wrong ones.",
    403: "Right credentials that don't allow it, a browser's request from another site, or one by a name that is not this machine's.",
    404: "There is nothing of this id or name.",
    408: "The body did not arrive in time.",
    409: "The job's status forbids it; `detail` names the status.",
    413: "The body is too large.",
    414: "The path with its parameters is longer than 4094 bytes.",
    415: "The body is not of a type that is taken here.",
    422: "The content can't be accepted; `errors` names each place.",
    429: "Too many requests, or too many wrong passwords.",
    431: "A header is longer than 8190 bytes, or there are more than 100.",
    500: "A defect of the server; its log knows more by the request's id.",
    503: "The database is away; nothing was done.",
}


class Problem(falcon.HTTPError):
    """An error answer. `errors` lists what is wrong with the request, each as `{"loc": [...], "msg": "..."}`."""

    def __init__(
        self, status: int, detail: str, *, errors: list[dict[str, Any]] | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, description=detail, headers=headers)
        self.errors = errors


def add_to(app: falcon.App) -> None:
    """Make every error of `app` a problem: ours, Falcon's, and those nobody thought of."""
    app.set_error_serializer(_write)
    app.add_error_handler(Exception, _unforeseen)
    for kind, handle in _HANDLERS.items():
        app.add_error_handler(kind, handle)


def answer(req: falcon.Request, error: Exception) -> tuple[bytes, int, list[tuple[str, str]]]:
    """What `error` is to the client, for whoever answers when Falcon no longer does: body, status and headers."""
    handle = next((_HANDLERS[kind] for kind in type(error).__mro__ if kind in _HANDLERS), _unforeseen)
    resp = falcon.Response()
    try:
        handle(req, resp, error, {})
    except Problem as found:
        _write(req, resp, found)
        headers = {"Content-Type": str(resp.content_type), **dict(found.headers or {})}
        return resp.data or b"", found.status_code, list(headers.items())
    raise AssertionError(f"{handle} raises a Problem")


def _write(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    title = falcon.code_to_http_status(error.status)[4:]
    detail = error.description or _DETAILS.get(error.status_code, title)
    document = {"type": "about:blank", "title": title, "status": error.status_code, "detail": detail}
    if errors := getattr(error, "errors", None):
        document["errors"] = errors
    if req.path.startswith(_INGESTION):
        document |= {"success": False, "message": detail}
    resp.content_type = "application/problem+json"
    resp.data = json.dumps(document).encode()


def _not_found(_req: falcon.Request, _resp: falcon.Response, error: JobNotFound, _params: dict[str, Any]) -> None:
    raise Problem(404, "there is no job with this id")


def _wrong_state(_req: falcon.Request, _resp: falcon.Response, error: WrongState, _params: dict[str, Any]) -> None:
    raise Problem(409, str(error))


def _invalid(_req: falcon.Request, _resp: falcon.Response, error: InvalidSubmission, _params: dict[str, Any]) -> None:
    raise Problem(422, str(error), errors=error.errors)


def _too_many(_req: falcon.Request, _resp: falcon.Response, error: TooManyTries, _params: dict[str, Any]) -> None:
    seconds = max(1, math.ceil(error.seconds))
    raise Problem(429, f"{error}: try again in {seconds} s", headers={"Retry-After": str(seconds)})


def _unavailable(_req: falcon.Request, _resp: falcon.Response, error: DatabaseUnavailable, _params: dict[str, Any]) -> None:
    log.warning("database unavailable", error=str(error))
    away = "the database is away, or did not answer in time; try again soon, with an Idempotency-Key where a job may not be made twice"
    raise Problem(503, str(error) if isinstance(error, (NotMigrated, TooManySearches)) else away, headers={"Retry-After": str(RETRY_AFTER)})


def _unforeseen(req: falcon.Request, _resp: falcon.Response, error: Exception, _params: dict[str, Any]) -> None:
    log.error("request failed", method=req.method, path=req.path, request_id=req.context.id, exc_info=error)
    raise Problem(500, f"something went wrong in the server; its log has this as request {req.context.id}")


_HANDLERS: dict[type[Exception], Any] = {
    JobNotFound: _not_found,
    WrongState: _wrong_state,
    InvalidSubmission: _invalid,
    TooManyTries: _too_many,
    DatabaseUnavailable: _unavailable,
}
