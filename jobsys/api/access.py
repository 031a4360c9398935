"""Who may do what: whether the doors may stand open at all, and who gets through the one of `/admin`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

import falcon

from jobsys.api.problem import Problem
from jobsys.errors import SettingsError
from jobsys.settings import LOOPBACK, Settings

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_CHALLENGE = 'Basic realm="jobsys", charset="UTF-8"'


def check(settings: Settings, host: str | None = None) -> None:
    """Raise SettingsError where serving on `host` (settings.host unless given) would let in whoever asks."""
    host = settings.host if host is None else host
    if settings.jwt_secret:
        raise SettingsError("JWT_SECRET is set, but this version knows no bearer tokens and would leave the API open: unset it")
    if settings.admin_credentials is None and (settings.admin_user or settings.admin_pass):
        raise SettingsError("ADMIN_USER and ADMIN_PASS belong together: set both, or neither")
    if not _is_loopback(host) and not settings.allow_insecure:
        raise SettingsError(
            f"HOST {host} can be reached from other machines and the API has no password: listen on 127.0.0.1, behind a proxy that "
            "asks for one, or set ALLOW_INSECURE=1 to open it to everyone"
        )


class AdminDoor:
    """The middleware before everything below `/admin`. `req.context.user` is who came through."""

    def __init__(self, settings: Settings) -> None:
        credentials = settings.admin_credentials
        self._user = credentials[0] if credentials else "admin"
        self._expected = [_digest(text) for text in credentials] if credentials else None
        self._local_only = credentials is None and not settings.allow_insecure

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Let the request pass, or raise Problem: 401 without credentials, 403 when another site sent it."""
        # Falcon's router ignores leading slashes, so //admin/jobs is /admin/jobs.
        if req.path.lstrip("/").partition("/")[0] != "admin":
            return
        if self._expected is not None and not self._knows(req.get_header("Authorization")):
            raise Problem(401, "this needs the admin's name and password", headers={"WWW-Authenticate": _CHALLENGE})
        if self._local_only and not _is_loopback(_host_of(f"//{req.get_header('Host') or 'localhost'}")):
            # A web page elsewhere can have its own name lead to this machine; without credentials only the name tells.
            raise Problem(403, "without ADMIN_USER and ADMIN_PASS this is for this machine only, by the name localhost or 127.0.0.1")
        if req.method not in _SAFE_METHODS and _comes_from_elsewhere(req):
            raise Problem(403, "a page of another site sent this; it was not carried out")
        req.context.user = self._user

    def _knows(self, authorization: str | None) -> bool:
        scheme, _, encoded = (authorization or "").partition(" ")
        try:
            user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        given = (_digest(user), _digest(password))
        same = [hmac.compare_digest(*pair) for pair in zip(given, self._expected or (), strict=True)]
        return all(same) and bool(colon) and scheme.lower() == "basic"


def _digest(text: str | bytes) -> bytes:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).digest()


def _comes_from_elsewhere(req: falcon.Request) -> bool:
    """Whether a browser says that another site's page made this request. What is no browser says nothing, and may."""
    if site := req.get_header("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    origin = req.get_header("Origin")
    return origin is not None and origin.partition("://")[2] != req.get_header("Host")


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK
