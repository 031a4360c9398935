"""What every exchange gets, errors and 404s included: an id, the same headers, one line in the log."""

from __future__ import annotations

import time
from typing import Any

import falcon
from falcon.routing import CompiledRouter

from jobsys import logs, trail
from jobsys.ids import new_request_id
from jobsys.measurements import Recorder
from jobsys.openapi import Parameter

log = logs.get("jobsys.http")

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not "no-referrer": with it browsers send "Origin: null" with the forms of our own pages, and those are refused then.
    "Referrer-Policy": "same-origin",
}
"""What every answer has, the server's own included."""
UNLESS_SET = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
"""What every answer has that doesn't say otherwise."""
REQUEST_ID = Parameter(
    "X-Request-ID",
    {"type": "string"},
    "The request's id, by which the log knows it. The caller's own is taken when it is 1 to 128 letters, digits and `_.:/+=@-`.",
    where="header",
)


class Envelope:
    """The middleware around everything else. `req.context.id` is the request's id from here on."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Give the request its id: the caller's, when it is a sane one."""
        context = req.context
        context.began = time.perf_counter()
        context.postponed = context.held = False
        context.user = None
        wish = req.get_header("X-Request-ID")
        context.id = wish if wish and trail.is_request_id(wish) else new_request_id()
        trail.enter_request(context.id)

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, succeeded: bool) -> None:
        """Add the headers and log the line. What a responder set itself stands."""
        if not hasattr(req.context, "id"):  # Falcon refuses some methods before any middleware
            self.process_request(req, resp)
        resp.set_header("X-Request-ID", req.context.id)
        for name, value in HEADERS.items():
            resp.set_header(name, value)
        for name, value in UNLESS_SET.items():
            if resp.get_header(name) is None:
                resp.set_header(name, value)
        if req.scheme == "https":
            resp.set_header("Strict-Transport-Security", "max-age=31536000")
        if req.context.postponed or req.context.held:
            req.context.at_end = self._end
        else:
            self._end(req, resp.status_code)
        trail.leave_request()

    def _end(self, req: falcon.Request, status: int) -> None:
        seconds = time.perf_counter() - req.context.began
        self._measure(req, status, seconds)
        milliseconds = round(seconds * 1000, 1)
        log.info("request", method=req.method, path=req.path, status=status, ms=milliseconds, request_id=req.context.id)

    def _measure(self, req: falcon.Request, status: int, seconds: float) -> None:
        """Count the request by its route's template, of which there are only so many, and never by its path."""
        route = req.uri_template or "none"
        if "wait" in req.params or req.context.postponed:
            route += "?wait"  # which takes as long as its client likes
        method = req.method if req.method in METHODS else "other"
        self._recorder.measurements.observe("http_request_seconds", (route, method, str(status)), seconds)
        self._recorder.start()


class Router(CompiledRouter):
    """Falcon's router, for which HEAD is possible wherever GET is, and an unheard-of method is 405 like any other that isn't.

    `responders` are those of every route, by its template and by method, HEAD left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.responders: dict[str, dict[str, Any]] = {}

    def add_route(self, uri_template: str, resource: object, **kwargs: Any) -> None:
        """Falcon's, and note it."""
        super().add_route(uri_template, resource, **kwargs)
        found = super().map_http_methods(resource, suffix=kwargs.get("suffix"))
        self.responders[uri_template] = {method: responder for method, responder in found.items() if method != "HEAD"}

    def find(self, uri: str, req: Any = None) -> Any:
        """Falcon's, but `//jobs` is not `/jobs`: a proxy's rules for a path must not be evaded by writing it otherwise."""
        return None if uri.startswith("//") else super().find(uri, req)

    def map_http_methods(self, resource: object, **kwargs: Any) -> dict[str, Any]:
        """The responders of `resource` by method."""
        methods = _Methods(super().map_http_methods(resource, **kwargs))
        if "GET" in methods:
            methods.setdefault("HEAD", methods["GET"])
        return methods


class _Methods(dict[str, Any]):
    def __missing__(self, method: str) -> Any:
        return self["CONNECT"]  # which nothing here takes
