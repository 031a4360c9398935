"""The users of ADMIN_USER and VIEWER_USER: whether a name and a password are right, and how often one may be wrong.

Five passwords a minute may be wrong from one address, five for one name, and thirty in all, counted in the database over all
processes. A try is counted before it is looked at, and given back when it was right: however many come at once, no sixth is looked at.
Names that nobody has are treated as those that somebody has.

Whoever floods a name with wrong passwords must not keep its owner out. So an address from which a user came in within the last 30
days is held only to the five of its own. Where nobody came in from before, and where the flood comes from, its owner waits as everyone.

What was right is remembered in memory, as a keyed digest and for one address: hashing with argon2 costs 50 ms, and a page asks for five
files. Once a name was refused at an address, that memory doesn't help it there until the wait is over, and is no second way to guess.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import time
from collections import OrderedDict
from datetime import datetime
from typing import NamedTuple, TypeVar

import argon2

from jobsys import db, logs
from jobsys.errors import SettingsError, TooManyTries
from jobsys.settings import Settings

PER_ADDRESS, PER_NAME, IN_ALL = 5, 5, 30
"""Wrong passwords a minute."""
REMEMBERED = 1_000
HOW_TO_HASH = "python -c 'import argon2, getpass; print(argon2.PasswordHasher().hash(getpass.getpass()))'"
K = TypeVar("K")
V = TypeVar("V")
log = logs.get(__name__)


class User(NamedTuple):
    """Somebody with a password. Who may not act may only look."""

    name: str
    may_act: bool


class Passwords:
    """The users of one installation; one for each process. Raises SettingsError when the settings make no sense of them."""

    def __init__(self, settings: Settings, database: db.Database) -> None:
        self._users = users(settings)
        self._database = database
        self._hasher = argon2.PasswordHasher()
        self._key = os.urandom(32)
        self._right: OrderedDict[bytes, User] = OrderedDict()
        self._refused: OrderedDict[str, float] = OrderedDict()

    @property
    def users(self) -> list[User]:
        """Who there is."""
        return [user for user, _ in self._users]

    def verify(self, name: bytes, password: bytes, address: str) -> User | None:
        """Who this is; None when it is nobody, which takes as long whatever was wrong. `address` names what one client can choose its
        addresses from, so of IPv6 the /64.

        Raises TooManyTries, and DatabaseUnavailable when there is no counting.
        """
        place = address.encode()
        pair = _hashed(b"pair", place, name)
        wait = self._refused.get(pair, 0.0) - time.monotonic()
        if wait > 0:
            raise TooManyTries(wait)
        memory = hashlib.blake2b(pair.encode() + password, key=self._key).digest()
        if user := self._right.get(memory):
            return user
        try:
            keys, counted_at = self._take_turn(place, name, pair)
        except TooManyTries as error:
            _keep(self._refused, pair, time.monotonic() + error.seconds)
            raise
        user = self._match(name, password)
        if user is None:
            log.warning("wrong user name or password", address=address)
            return None
        self._database.run("login_succeeded", key=pair, keys=keys, counted_at=counted_at)
        _keep(self._right, memory, user)
        return user

    def _take_turn(self, place: bytes, name: bytes, pair: str) -> tuple[list[str], datetime]:
        """Count one try before it is looked at: the keys under which, and when."""
        limits = {_hashed(b"address", place): PER_ADDRESS}
        if not self._database.run("came_in_before", key=pair)[0][0]:
            limits |= {_hashed(b"name", name): PER_NAME, _hashed(b"all"): IN_ALL}
        keys = sorted(limits)
        asked = {"keys": keys, "limits": [limits[key] for key in keys]}
        _wait(self._database.run("login_wait", **asked))  # first without leaving anything behind
        with self._database.transaction() as connection:
            db.run(connection, "lock_logins", keys=keys)
            _wait(db.run(connection, "login_wait", **asked))
            return keys, db.run(connection, "count_login", keys=keys)[0][0]

    def _match(self, name: bytes, password: bytes) -> User | None:
        """Always all names, and all passwords: the time it takes tells nothing."""
        found = None
        for user, secret in self._users:
            right_name = hmac.compare_digest(_digest(name), _digest(user.name.encode()))
            right_password = self._fits(secret, password)
            if right_name and right_password:
                found = user
        return found

    def _fits(self, secret: str, password: bytes) -> bool:
        if not is_hash(secret):
            return hmac.compare_digest(_digest(password), _digest(secret.encode()))
        try:
            return self._hasher.verify(secret, password)
        except argon2.exceptions.VerificationError:
            return False


def users(settings: Settings) -> list[tuple[User, str]]:
    """The users and their passwords or hashes. Raises SettingsError when one is half a user, or could never come in."""
    if settings.admin_credentials is None and (settings.admin_user or settings.admin_pass):
        raise SettingsError("ADMIN_USER and ADMIN_PASS belong together: set both, or neither")
    if settings.viewer_credentials is None and (settings.viewer_user or settings.viewer_pass):
        raise SettingsError("VIEWER_USER and VIEWER_PASS belong together: set both, or neither")
    found = []
    for role, credentials in (("ADMIN", settings.admin_credentials), ("VIEWER", settings.viewer_credentials)):
        if credentials is None:
            continue
        name, secret = credentials
        if ":" in name or not name.isprintable() or len(name) > 200:
            raise SettingsError(f"{role}_USER must be at most 200 printable characters without a colon")
        if is_hash(secret):
            try:
                argon2.extract_parameters(secret)
                argon2.PasswordHasher().verify(secret, b"")
            except argon2.exceptions.VerifyMismatchError:
                pass
            except (argon2.exceptions.InvalidHashError, argon2.exceptions.VerificationError):
                raise SettingsError(f"{role}_PASS looks like an argon2 hash, and is none: make one with {HOW_TO_HASH}") from None
            else:
                raise SettingsError(f"{role}_PASS is the hash of an empty password: make one with {HOW_TO_HASH}")
        found.append((User(name, may_act=role == "ADMIN"), secret))
    if len({user.name for user, _ in found}) < len(found):
        raise SettingsError("VIEWER_USER must be another name than ADMIN_USER")
    return found


def is_hash(secret: str) -> bool:
    """Whether it stands for a password without being it."""
    return secret.startswith("$argon2")


def _wait(rows: list[db.Row]) -> None:
    if (seconds := rows[0][0]) is not None:
        raise TooManyTries(max(seconds, 0.0))


def _keep(memory: OrderedDict[K, V], key: K, value: V) -> None:
    memory[key] = value
    with contextlib.suppress(KeyError):  # another thread was at it
        while len(memory) > REMEMBERED:
            memory.popitem(last=False)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _hashed(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(_digest(part) for part in parts)).hexdigest()[:32]
