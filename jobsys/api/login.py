"""A name and a password become a token, for an hour."""

from __future__ import annotations

from typing import Annotated, Any

import falcon
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from jobsys.api import body
from jobsys.api.access import Access
from jobsys.api.problem import CHALLENGE, RETRY_LATER, Problem, told
from jobsys.errors import InvalidSubmission
from jobsys.openapi import NO_NUL, Answer, describe

EXPIRES_IN = 3600
"""Seconds."""
LIMIT = 16_384
LONGEST = 1_000
"""Characters of a name or a password."""


_Text = Annotated[str, Field(min_length=1, max_length=LONGEST, pattern=NO_NUL)]


class Credentials(TypedDict):
    """Who asks for a token."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    username: _Text
    password: _Text


class Token(TypedDict):
    """What to send as `Authorization: Bearer …`, and for how many seconds."""

    token: str
    tokenType: Annotated[str, Field(json_schema_extra={"const": "Bearer"})]
    expiresIn: int


class Login:
    """`/api/login`, for the users of ADMIN_USER (scope admin) and VIEWER_USER (scope jobs:read)."""

    def __init__(self, access: Access) -> None:
        self._access = access

    @describe(
        "login",
        {
            200: Answer("The token.", Token),
            401: told("The user name or the password is wrong.", CHALLENGE),
            409: told("There are no tokens on this server, or no users."),
            429: told("Too many passwords were wrong.", RETRY_LATER),
        },
        body=Credentials,
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Issue a token. The wrong name and the wrong password are told apart by nothing."""
        name, password = _credentials(body.read_object(req, LIMIT))
        if self._access.tokens is None:
            raise Problem(409, "there are no tokens here: set JWT_SECRET, or call the API without one")
        if not self._access.passwords.users:
            raise Problem(409, "there are no users here: set ADMIN_USER and ADMIN_PASS, or make a token with `jobsys token`")
        user = self._access.verify(req, name.encode(), password.encode())
        if user is None:
            raise Problem(401, "wrong user name or password", headers={"WWW-Authenticate": 'Bearer realm="jobsys"'})
        token, _ = self._access.tokens.issue(user.name, ["admin" if user.may_act else "jobs:read"], EXPIRES_IN)
        resp.media = Token(token=token, tokenType="Bearer", expiresIn=EXPIRES_IN)


def _credentials(document: dict[str, Any]) -> tuple[str, str]:
    fields = ("username", "password")
    errors = [{"loc": [key], "msg": "is not a field of a login"} for key in document if key not in fields]
    for field in fields:
        if not isinstance(document.get(field), str) or not 1 <= len(document[field]) <= LONGEST:
            errors.append({"loc": [field], "msg": f"must be a text of 1 to {LONGEST} characters"})
    if errors:
        raise InvalidSubmission(errors)
    return document["username"], document["password"]
