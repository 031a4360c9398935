"""Who may do what: whether the doors may stand open at all, and who gets through which.

Every path needs a scope, and what `needed` doesn't name needs one, too: a new route is closed until somebody opens it here. A Bearer
token says who calls and what for. Below /admin a name and a password will do as well. Where there are no credentials at all, only this
machine may call, and by its own name.
"""

from __future__ import annotations

import base64
import binascii
import re
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import falcon

from jobsys.api.clients import address
from jobsys.api.problem import Problem
from jobsys.db import Database
from jobsys.errors import InvalidToken, SettingsError
from jobsys.passwords import Passwords, users
from jobsys.settings import Settings, is_loopback
from jobsys.tokens import SCOPES, Revocations, Tokens

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OPEN = ("health", "docs")
"""The first part of the paths that nobody is asked at…"""
OPEN_PATHS = ("/api/login", "/openapi.json")
"""…and whole paths."""
_BASIC = 'Basic realm="jobsys", charset="UTF-8"'
_BEARER = 'Bearer realm="jobsys"'
_TOKEN = re.compile(r"[\w.~+/-]+=*", re.ASCII)


def check(settings: Settings, host: str | None = None) -> None:
    """Raise SettingsError where serving on `host` (settings.host unless given) would let in whoever asks."""
    host = settings.host if host is None else host
    users(settings)
    if settings.jwt_secret:
        Tokens(settings)
        return
    if settings.jwt_secret_previous:
        raise SettingsError("JWT_SECRET_PREVIOUS is set without JWT_SECRET, and the API would be open: set both, or neither")
    if settings.viewer_credentials and not settings.admin_credentials:
        raise SettingsError("VIEWER_USER is set without ADMIN_USER, and nobody could act: set ADMIN_USER and ADMIN_PASS, too")
    if not is_loopback(host) and not settings.allow_insecure:
        raise SettingsError(
            f"HOST {host} can be reached from other machines and the API asks for no token: set JWT_SECRET, or listen on 127.0.0.1, behind "
            "a proxy that asks for a password, or set ALLOW_INSECURE=1 to open it to everyone"
        )


def needed(method: str, path: str, *, metrics_public: bool = False) -> str | None:
    """The scope that a request needs: `jobs:read`, `jobs:write`, `admin`; None for what is open to all."""
    first = path[1:].partition("/")[0]
    if first in OPEN or path in OPEN_PATHS or (metrics_public and path == "/metrics"):
        return None
    if first in ("admin", "dashboard"):
        return "admin"
    return "jobs:read" if method in SAFE_METHODS else "jobs:write"


class Access:
    """The middleware before every route. `req.context.user` is who came through, or None where nobody is asked; who has not
    `req.context.may_act` may only look."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self.passwords = Passwords(settings, database)
        self.tokens = Tokens(settings) if settings.jwt_secret else None
        self._revocations = Revocations(database)
        self._metrics_public = settings.metrics_public
        self._anywhere = settings.allow_insecure
        self._origins = frozenset(settings.cors_origins)

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Let the request pass, or raise Problem: 401 without credentials, 403 with too weak ones or when another site sent it."""
        req.context.may_act = True
        scope = needed(req.method, req.path, metrics_public=self._metrics_public)
        if scope is None:
            return
        for_passwords = self._takes_passwords(scope)
        if self.tokens is None and not for_passwords:
            self._check_host(req.get_header("Host"))
            req.context.user = "admin" if scope == "admin" else None
        elif self._take_credentials(req, scope, for_passwords):
            return  # a browser sends a token only where a script of ours, or of CORS_ORIGINS, says so
        if req.method not in SAFE_METHODS and _comes_from_elsewhere(req, frozenset() if scope == "admin" else self._origins):
            raise Problem(403, "a page of another site sent this; it was not carried out")

    def process_resource(self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]) -> None:
        """Stop who may only look before any responder that does more. A resource may have its own way to say it."""
        if req.context.may_act or req.method in SAFE_METHODS:
            return
        refuse = getattr(resource, "refuse", None)
        if refuse is None:
            raise Problem(403, f"{req.context.user} may look at everything and change nothing")
        refuse(req, resp)
        resp.complete = True

    def describe(self, method: str, path: str) -> tuple[list[dict[str, list[str]]], set[int]]:
        """What opens the door to a request, as OpenAPI says it: one of these; nothing where it stands open. And what it may be refused
        with."""
        scope = needed(method, path, metrics_public=self._metrics_public)
        if scope is None:
            return [], set()
        ways: list[dict[str, list[str]]] = [{"basic": []}] if self._takes_passwords(scope) else []
        errors = {401, 403, 429, 503} if ways else {403}
        if self.tokens is not None:
            ways.append({"bearer": [scope]})
            errors |= {400, 401, 503}
        return ways, errors

    @property
    def schemes(self) -> dict[str, Any]:
        """The meaning of the names in what `describe` says."""
        schemes: dict[str, Any] = {}
        if self._takes_passwords("admin"):
            about = "A user's name and password. Wrong ones are counted; who has had too many is 429. VIEWER_USER may only look."
            schemes["basic"] = {"type": "http", "scheme": "basic", "description": about}
        if self.tokens is not None:
            about = f"A token of `POST /api/login` or `jobsys token`. Scopes: {', '.join(SCOPES)}; admin is good for all."
            schemes["bearer"] = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": about}
        return schemes

    def verify(self, req: falcon.Request, name: bytes, password: bytes) -> Any:
        """Whose name and password these are; None when nobody's. Raises TooManyTries."""
        return self.passwords.verify(name, password, address(req, self._settings))

    def _takes_passwords(self, scope: str) -> bool:
        return scope == "admin" and bool(self.passwords.users)

    def _take_credentials(self, req: falcon.Request, scope: str, for_passwords: bool) -> bool:
        """Whether it was a token that opened the door. Raises Problem when it stays shut."""
        scheme, _, credentials = (req.get_header("Authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and credentials.strip() and self.tokens is not None:
            self._take_token(req, self.tokens, scope, credentials.strip())
            return True
        if not (scheme.lower() == "basic" and for_passwords):
            raise self._unauthorized(for_passwords)
        if not self._take_password(req, credentials.strip()):
            raise self._unauthorized(for_passwords, "wrong user name or password")
        return False

    def _take_token(self, req: falcon.Request, tokens: Tokens, scope: str, token: str) -> None:
        if not _TOKEN.fullmatch(token):
            raise _refusal(400, "invalid_request", "the header Authorization must be one Bearer token, once")
        try:
            claims = tokens.read(token)
        except InvalidToken as error:
            raise _refusal(401, "invalid_token", str(error)) from None
        if not claims.allow(scope):
            raise _refusal(403, "insufficient_scope", f"this needs a token of scope {scope}", scope=scope)
        if self._revocations.cover(claims):
            raise _refusal(401, "invalid_token", "the token was revoked")
        req.context.user = claims.sub

    def _take_password(self, req: falcon.Request, encoded: str) -> bool:
        try:
            name, colon, password = base64.b64decode(encoded, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        user = self.verify(req, name, password) if colon else None
        if user is None:
            return False
        req.context.user, req.context.may_act = user.name, user.may_act
        return True

    def _unauthorized(self, for_passwords: bool, detail: str | None = None) -> Problem:
        ways = []
        if for_passwords:
            ways.append("a user name and password (HTTP Basic)")
        if self.tokens is not None:
            ways.append("a token (Authorization: Bearer …) from POST /api/login or `jobsys token`")
        challenges = [_BASIC] * for_passwords + [_BEARER] * (self.tokens is not None)
        return Problem(401, detail or f"this needs {', or '.join(ways)}", headers={"WWW-Authenticate": ", ".join(challenges)})

    def _check_host(self, host: str | None) -> None:
        # A web page elsewhere can have its own name lead to this machine; without credentials only the name tells.
        if not self._anywhere and host is not None and not _names_this_machine(host):
            raise Problem(
                403,
                "without credentials this answers to the names localhost and 127.0.0.1 only: set JWT_SECRET (and ADMIN_USER and ADMIN_PASS "
                "for /admin), or ALLOW_INSECURE=1 behind a proxy that passes another name on",
            )


def _refusal(status: int, code: str, detail: str, **more: str) -> Problem:
    """An error as RFC 6750 wants it. Nothing that came with the request gets into the header."""
    details = {"error": code, "error_description": detail, **more}
    challenge = ", ".join([_BEARER, *(f'{name}="{value}"' for name, value in details.items())])
    return Problem(status, detail, headers={"WWW-Authenticate": challenge})


def _comes_from_elsewhere(req: falcon.Request, trusted: frozenset[str]) -> bool:
    """Whether a browser says that another site's page made this request. What is no browser says nothing, and may."""
    origin = req.get_header("Origin")
    if origin is not None and origin in trusted:
        return False
    if site := req.get_header("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    page = origin if origin is not None else req.get_header("Referer")
    return page is not None and _without_usual_port(page.partition("://")[2].partition("/")[0]) != _without_usual_port(
        req.get_header("Host") or ""
    )


def _without_usual_port(host: str) -> str:
    return host.removesuffix(":80").removesuffix(":443")


@lru_cache(100)
def _names_this_machine(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
