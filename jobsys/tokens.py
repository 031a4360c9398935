"""Bearer tokens: JWTs that say who calls, what for and until when, signed with JWT_SECRET; and their revocation. Nothing here knows HTTP.

A token is checked without the database, except for the list of those revoked, which each process keeps and reads anew in the background
while it is asked. No token lives longer than LONGEST_LIFE, so that the list can forget.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Iterable
from typing import Any, NamedTuple

import jwt

from jobsys import logs
from jobsys.db import Database
from jobsys.errors import DatabaseUnavailable, InvalidToken, SettingsError
from jobsys.settings import Settings

SCOPES = ("jobs:read", "jobs:write", "admin")
"""What a token can be good for. `admin` includes the other two."""
LONGEST_LIFE = 366 * 86400.0
LEEWAY = 30.0
"""Seconds by which the clocks of two machines may differ."""
SHORTEST_SECRET = 32
REMEMBERED = 1_000
"""Tokens that a process need not verify again: that costs more than the rest of the door."""
HOW_TO_MAKE_A_SECRET = "make one with `openssl rand -base64 48`"

REFRESH = 2.0
"""Age in seconds from which the list of revocations is read anew…"""
TOO_OLD = 4.0
"""…and from which a request waits for that, up to PATIENCE. Together they are the promise that a revocation counts within 5 s."""
PATIENCE = 1.0

_NAME = "jobsys"
_ALGORITHM = "HS256"
_REQUIRED = ["exp", "iat", "nbf", "iss", "aud", "sub", "jti"]
log = logs.get(__name__)


class Claims(NamedTuple):
    """What a token says, once it is believed. Times are seconds since 1970."""

    sub: str
    scopes: frozenset[str]
    jti: str
    issued_at: float
    expires_at: float

    def allow(self, scope: str) -> bool:
        """Whether they are good for `scope`."""
        return scope in self.scopes or "admin" in self.scopes


class Tokens:
    """Issues and reads the tokens of one installation. Raises SettingsError when the secrets are none."""

    def __init__(self, settings: Settings) -> None:
        if not settings.jwt_secret:
            raise SettingsError(f"JWT_SECRET is not set, and without it there are no tokens: {HOW_TO_MAKE_A_SECRET}")
        self._keys = [_key("JWT_SECRET", settings.jwt_secret)]
        if settings.jwt_secret_previous:
            self._keys.append(_key("JWT_SECRET_PREVIOUS", settings.jwt_secret_previous))
        self._believed: dict[str, Claims] = {}

    def issue(self, sub: str, scopes: Iterable[str], seconds: float) -> tuple[str, Claims]:
        """A new token, good from now on for so many seconds. Raises ValueError when it could not be read back."""
        now = round(time.time(), 3)
        claims = Claims(sub, frozenset(scopes), str(uuid.uuid4()), now, math.ceil(now + seconds))
        if not _is_name(sub):
            raise ValueError("the subject must be 1 to 200 printable characters")
        if not claims.scopes or not claims.scopes.issubset(SCOPES):
            raise ValueError(f"a scope is one of {', '.join(SCOPES)}")
        if not 1 <= seconds <= LONGEST_LIFE - 1:
            raise ValueError("a token lives from 1 second to 365 days")
        payload = {
            "iss": _NAME,
            "aud": _NAME,
            "sub": sub,
            "jti": claims.jti,
            "scope": " ".join(scope for scope in SCOPES if scope in claims.scopes),
            # With its fraction: what is issued right after all tokens of the subject were revoked counts.
            "iat": claims.issued_at,
            "nbf": int(now),
            "exp": claims.expires_at,
        }
        return jwt.encode(payload, self._keys[0], algorithm=_ALGORITHM), claims

    def read(self, token: str) -> Claims:
        """What the token says. Raises InvalidToken unless it was signed with one of our keys, is meant for us, and is good now."""
        claims = self._believed.get(token)
        # Of what was believed once, only one thing can change.
        if claims is None or claims.expires_at <= time.time() - LEEWAY:
            if len(self._believed) >= REMEMBERED:
                self._believed.clear()
            claims = self._believed[token] = self._verified(token)
        return claims

    def _verified(self, token: str) -> Claims:
        for key in self._keys:
            try:
                return _believed(
                    jwt.decode(
                        token, key, algorithms=[_ALGORITHM], audience=_NAME, issuer=_NAME, leeway=LEEWAY, options={"require": _REQUIRED}
                    )
                )
            except jwt.InvalidSignatureError:
                continue
            except InvalidToken:
                raise
            except jwt.ExpiredSignatureError:
                raise InvalidToken("the token has expired") from None
            except jwt.ImmatureSignatureError:
                raise InvalidToken("the token is not good yet") from None
            except (jwt.InvalidAudienceError, jwt.InvalidIssuerError):
                raise InvalidToken("the token is from or for another system") from None
            except jwt.MissingRequiredClaimError as error:
                raise InvalidToken(f"the token lacks the claim {error.claim}") from None
            except Exception:  # whatever a stranger's bytes do to the parser: they are no token
                raise InvalidToken("this is no token of this system") from None
        raise InvalidToken("the token was not signed with this system's key")


class Revocations:
    """Which tokens were revoked, as this process knows it. Safe for threads; opens no connection before it is asked."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._jtis: frozenset[str] = frozenset()
        self._subs: dict[str, float] = {}
        self._read_at = self._tried_at = -math.inf
        self._lock = threading.Lock()
        self._reading: threading.Thread | None = None
        self._failed = False

    def cover(self, claims: Claims) -> bool:
        """Whether the token was revoked.

        While the database is away, what was known counts on. Raises DatabaseUnavailable as long as nothing ever was known.
        """
        if time.monotonic() - self._read_at > REFRESH:
            self._refresh()
        return claims.jti in self._jtis or claims.issued_at <= self._subs.get(claims.sub, -math.inf)

    def _refresh(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._tried_at > REFRESH and not (self._reading is not None and self._reading.is_alive()):
                reading = threading.Thread(target=self._read, name="jobsys revocations", daemon=True)
                reading.start()
                self._reading, self._tried_at = reading, now
            reading_now = self._reading
        never = self._read_at == -math.inf
        # Once it has failed nobody waits again: the database is away, and each request will find that out for itself.
        if reading_now is not None and (never or (now - self._read_at > TOO_OLD and not self._failed)):
            reading_now.join(4 * PATIENCE if never else PATIENCE)
        if self._read_at == -math.inf:
            raise DatabaseUnavailable("which tokens were revoked can't be read")

    def _read(self) -> None:
        asked_at = time.monotonic()
        try:
            rows = self._database.run("revocations")
        except Exception as error:
            self._failed = True
            log.warning("revocations can't be read; those known still count", error=str(error))
            return
        self._jtis = frozenset(value for kind, value, _ in rows if kind == "jti")
        self._subs = {value: at for kind, value, at in rows if kind == "sub"}
        self._read_at, self._failed = asked_at, False


def revoke(database: Database, *, jti: str | None = None, sub: str | None = None) -> None:
    """Revoke the token with this `jti`, or every token of `sub` issued until now. Raises DatabaseUnavailable."""
    for kind, value in (("jti", jti), ("sub", sub)):
        if value is not None:
            database.run("revoke", kind=kind, value=value)


def _key(variable: str, secret: str) -> bytes:
    key = secret.encode("utf-8", "surrogateescape")
    if len(key) < SHORTEST_SECRET:
        raise SettingsError(f"{variable} has {len(key)} bytes, and at least {SHORTEST_SECRET} are needed: {HOW_TO_MAKE_A_SECRET}")
    try:
        jwt.encode({}, key, algorithm=_ALGORITHM)
    except jwt.PyJWTError:  # it looks like a public key
        raise SettingsError(f"{variable} must be random characters, not a key file: {HOW_TO_MAKE_A_SECRET}") from None
    return key


def _believed(payload: dict[str, Any]) -> Claims:
    """The claims of a token whose signature and times are right. PyJWT takes more for a time or a name than we do."""
    for name in ("exp", "iat", "nbf"):
        if isinstance(payload[name], bool) or not isinstance(payload[name], (int, float)) or not math.isfinite(payload[name]):
            raise InvalidToken(f"the token's {name} is not a number")
    if payload["exp"] - payload["iat"] > LONGEST_LIFE:
        raise InvalidToken("the token is good for longer than 366 days, which none is")
    for name in ("sub", "jti"):
        if not _is_name(payload[name]):
            raise InvalidToken(f"the token's {name} is not 1 to 200 printable characters")
    scope = payload.get("scope", "")
    if not isinstance(scope, str):
        raise InvalidToken("the token's scope is not a text with spaces between the scopes")
    return Claims(payload["sub"], frozenset(scope.split(" ")), payload["jti"], float(payload["iat"]), float(payload["exp"]))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable()
