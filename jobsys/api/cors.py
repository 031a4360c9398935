"""Which other sites' pages may call this API: those of CORS_ORIGINS, with a token of their own: browsers send no passwords along."""

from __future__ import annotations

import falcon

from jobsys.settings import Settings

METHODS = "GET, HEAD, POST, DELETE"
HEADERS = "Authorization, Content-Type, Idempotency-Key, X-Request-ID"
EXPOSED = "Location, Idempotency-Replayed, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, Retry-After, X-Request-ID"
MAX_AGE = "600"
"""Seconds a browser may go by the answer without asking again."""


class Cors:
    """The middleware before the doors: a browser asks for leave without any credentials."""

    def __init__(self, settings: Settings) -> None:
        self._origins = frozenset(settings.cors_origins)

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer a preflight of a page that may."""
        if req.method != "OPTIONS" or req.get_header("Origin") not in self._origins or not req.get_header("Access-Control-Request-Method"):
            return
        resp.status = falcon.HTTP_204
        resp.set_header("Access-Control-Allow-Methods", METHODS)
        resp.set_header("Access-Control-Allow-Headers", HEADERS)
        resp.set_header("Access-Control-Max-Age", MAX_AGE)
        resp.complete = True

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, succeeded: bool) -> None:
        """Say to a browser whether the page may read the answer, errors included."""
        if not self._origins:
            return
        resp.append_header("Vary", "Origin")
        origin = req.get_header("Origin")
        if origin in self._origins:
            resp.set_header("Access-Control-Allow-Origin", origin)
            resp.set_header("Access-Control-Expose-Headers", EXPOSED)
