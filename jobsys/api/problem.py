"""Every error is one shape on the wire, application/problem+json (RFC 9457), and this is where exceptions become it."""

from __future__ import annotations

import json
import math
from typing import Any

import falcon

from jobsys import logs
from jobsys.errors import DatabaseUnavailable, InvalidSubmission, JobNotFound, NotMigrated, TooManyTries, WrongState

log = logs.get(__name__)

RETRY_AFTER = 5
"""Seconds after which a client that met a missing database may ask again."""

_INGESTION = ("/api/ingest", "/api/status/")
_DETAILS = {404: "there is nothing at this path", 405: "this path does not take this method; the header Allow names those it takes"}


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
    raise Problem(503, str(error) if isinstance(error, NotMigrated) else away, headers={"Retry-After": str(RETRY_AFTER)})


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
