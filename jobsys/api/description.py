"""This API described: for programs as OpenAPI 3.1, and for people as a page that needs no network."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import falcon

from jobsys.api.access import Access
from jobsys.api.envelope import REQUEST_ID, Router
from jobsys.api.problem import Problem, answers
from jobsys.api.rate_limit import HEADERS, counts
from jobsys.api.wire import OLDER_WORDS
from jobsys.openapi import Answer, Door, Parameter, Routes, describe, document
from jobsys.system import JobSystem

_FOLDER = Path(__file__).resolve().parent / "docs"
_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_NAMES = sorted(path.name for path in _FOLDER.iterdir() if path.suffix in _KINDS)

TEXT = """\
Jobs are submitted as JSON, are durable before the answer is sent, and can be followed to their end. Times are RFC 3339; those in answers
are in UTC, with milliseconds and `Z`. Job ids are UUIDs.

Every error is `application/problem+json` (RFC 9457), whose `detail` says what was wrong. An id that is no UUID is as unknown as one that
is gone: 404. A method that a path does not take is 405, and the header `Allow` names those it takes; `HEAD` is taken wherever `GET` is, and
answers the same headers.

Each operation says below what opens it; where it says nothing, nothing is asked for. Of the scopes of a token, `jobs:read` is good for what
changes nothing, `jobs:write` for the rest, and `admin` for everything, also below `/admin`. {door}

No text may contain U+0000, no number may need more than 64 bits, and a whole number is written as one: 1, not 1.0. A body larger than
{mebibytes:g} MiB (twice that with ids to ingest, 16 MiB with many jobs, 16 KiB with a password) is 413. Fields may be added to answers.

The pages for operators, in HTML, are at [/admin/ui](/admin/ui).
"""

_UUID = {"type": "string", "format": "uuid"}
PLACES = {
    "job_id": Parameter("job_id", _UUID, "The id of a job.", where="path"),
    "ingestion_id": Parameter("ingestion_id", _UUID, "The id of an ingestion.", where="path"),
    "name": Parameter("name", {"type": "string", "minLength": 1, "examples": ["ingestion"]}, "The name of a queue.", where="path"),
    "file": Parameter("file", {"type": "string", "enum": _NAMES}, "The name of a file.", where="path"),
}
"""What stands in the paths."""
PAGES = ("/admin/ui", "/dashboard")
"""Paths that are for people, and are not described."""

# Swagger UI has pictures within its styles.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_Tagged = tuple[bytes, str]
"""Bytes, and the ETag that names them."""
_TEXT = {"type": "string"}
_ETAG = Parameter("ETag", {"type": "string"}, "Names this state of it, for If-None-Match.")
_IF_NONE_MATCH = Parameter("If-None-Match", {"type": "string"}, "The ETag of what is already there.", where="header")


class Description:
    """`/openapi.json`, and `/docs` which shows it."""

    def __init__(self, system: JobSystem, router: Router, access: Access) -> None:
        self._system, self._router, self._access = system, router, access

    @describe(
        "getOpenApi",
        {200: Answer("The document.", {"type": "object"}, headers=(_ETAG,)), 304: Answer("It has not changed.", headers=(_ETAG,))},
        parameters=[_IF_NONE_MATCH],
        database=False,
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer this document."""
        _send(req, resp, self._document, "application/json")

    @describe("getDocs", {200: Answer("The page.", _TEXT, media_type="text/html; charset=utf-8")}, database=False)
    def on_get_page(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer the page that shows this document."""
        resp.content_type = "text/html; charset=utf-8"
        resp.set_header("Content-Security-Policy", _POLICY)
        resp.data = (_FOLDER / "index.html").read_bytes()

    @describe(
        "getDocsFile",
        {
            200: Answer("The file.", _TEXT, _KINDS[".js"], also=dict.fromkeys(_KINDS.values(), _TEXT), headers=(_ETAG,)),
            304: Answer("It has not changed.", headers=(_ETAG,)),
        },
        parameters=[_IF_NONE_MATCH],
        database=False,
    )
    def on_get_file(self, req: falcon.Request, resp: falcon.Response, file: str) -> None:
        """Answer a script or a style of that page."""
        if file not in _NAMES:
            raise Problem(404, "there is no such file")
        _send(req, resp, _file(file), _KINDS[Path(file).suffix])

    def make(self) -> dict[str, Any]:
        """The document about every route there is by now but PAGES."""
        paths = {path: responders for path, responders in self._router.responders.items() if not path.startswith(PAGES)}
        routes = Routes(paths, PLACES, self._door, self._access.schemes, answers, headers=(REQUEST_ID,), older_words=OLDER_WORDS)
        return document(routes, self._system.types, TEXT.format(door=self._doors_told(), mebibytes=self._system.settings.max_body / 2**20))

    def _door(self, method: str, path: str) -> Door:
        security, errors = self._access.describe(method, path)
        if self._system.settings.rate_limit[0] and counts(path):
            return Door(security, frozenset(errors | {429}), HEADERS)
        return Door(security, frozenset(errors), ())

    def _doors_told(self) -> str:
        told = []
        if "bearer" not in self._access.schemes:
            told.append("This server takes jobs without credentials.")
        if not self._access.schemes:
            told.append("Neither does it ask for any below /admin.")
        elif "basic" not in self._access.schemes:
            told.append("Nobody has a password here.")
        requests, seconds = self._system.settings.rate_limit
        if requests:
            told.append(f"Each client may make {requests} requests in {seconds:g} seconds.")
        return " ".join(told)

    @functools.cached_property
    def _document(self) -> _Tagged:
        return _tagged(json.dumps(self.make(), separators=(",", ":")).encode())


@functools.cache
def _file(name: str) -> _Tagged:
    return _tagged((_FOLDER / name).read_bytes())


def _tagged(data: bytes) -> _Tagged:
    return data, hashlib.sha256(data).hexdigest()[:32]


def _send(req: falcon.Request, resp: falcon.Response, tagged: _Tagged, content_type: str) -> None:
    data, resp.etag = tagged
    resp.cache_control = ["no-cache"]  # it may be kept, but asked for each time
    if req.if_none_match and (tagged[1] in req.if_none_match or "*" in req.if_none_match):
        resp.status = falcon.HTTP_304
    else:
        resp.data, resp.content_type = data, content_type
