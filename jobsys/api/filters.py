"""What a query string asks for. Anything misspelt, repeated or out of range is a 400: silence would answer another question."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

import falcon

from jobsys.api import wire
from jobsys.api.problem import Problem
from jobsys.errors import InvalidSubmission
from jobsys.job_types import priority_name, priority_number
from jobsys.system import JobSystem, Page

LARGEST_PAGE = 500
LONGEST_WAIT = 30.0
"""Seconds."""


def page(system: JobSystem, req: falcon.Request, status: str | None = None) -> dict[str, Any]:
    """The page of the job list that `req` asks for, as JSON; with `status` given, of that status and no other."""
    asked = parameters(req, (*_FILTERS, *(() if status else ("status",))))
    wanted: dict[str, Any] = {"status": status} if status else {}
    errors = []
    for name, text in asked.items():
        argument, convert = _FILTERS.get(name) or ("status", _statuses)
        try:
            wanted[argument] = convert(text)
        except ValueError as error:
            errors.append({"loc": [name], "msg": str(error)})
    if errors:
        raise _refused(errors)
    try:
        found: Page = system.jobs(**wanted)
    except InvalidSubmission as error:
        raise _refused(error.errors) from None
    return {"jobs": [wire.job(record) for record in found.jobs], "nextCursor": found.next_cursor}


def chosen(document: dict[str, Any]) -> dict[str, Any]:
    """The filters of `JobSystem.act_on_many` from the same words in a body; `status` may be a list. Raises InvalidSubmission."""
    known = ("status", *(name for name in _FILTERS if name not in ("limit", "cursor")))
    wanted: dict[str, Any] = {}
    errors = []
    for name, value in document.items():
        argument, convert = _FILTERS.get(name) or ("status", _statuses)
        try:
            if name not in known:
                raise ValueError(f"is not a filter here; known are {', '.join(known)}")
            if name == "status" and isinstance(value, list) and all(isinstance(each, str) for each in value):
                value = ",".join(value)
            if not isinstance(value, str) or not value:
                raise ValueError("must be a text, and not an empty one")
            wanted[argument] = convert(value)
        except ValueError as error:
            errors.append({"loc": ["filter", name], "msg": str(error)})
    if errors:
        raise InvalidSubmission(errors)
    return wanted


def wait(req: falcon.Request) -> float:
    """The seconds that `?wait=` asks to wait, 0 without it."""
    text = parameters(req, ("wait",)).get("wait", "0")
    if not re.fullmatch(r"\d+(\.\d+)?([eE][+-]?\d+)?", text, re.ASCII) or float(text) > LONGEST_WAIT:
        raise _refused([{"loc": ["wait"], "msg": f"must be a number of seconds from 0 to {LONGEST_WAIT:g}"}])
    return float(text)


def parameters(req: falcon.Request, known: Collection[str]) -> dict[str, str]:
    """The parameters of the query string, without empty ones. Raises Problem (400) for unknown, repeated and unstorable ones."""
    given: dict[str, str] = {}
    errors = []
    for name, value in req.params.items():
        if name not in known:
            errors.append({"loc": [name], "msg": f"is not a parameter here; known are {', '.join(known)}"})
        elif not isinstance(value, str):
            errors.append({"loc": [name], "msg": "may be given only once"})
        elif "\0" in value:
            errors.append({"loc": [name], "msg": "contains a NUL character"})
        elif value:
            given[name] = value
    if errors:
        raise _refused(errors)
    return given


def _refused(errors: list[dict[str, Any]]) -> Problem:
    return Problem(400, str(InvalidSubmission(errors)), errors=errors)


def _statuses(text: str) -> list[str]:
    return [wire.status(name.strip()) for name in text.split(",")]


def _priority(text: str) -> str:
    try:
        return priority_name(priority_number(text))
    except InvalidSubmission as error:
        raise ValueError(error.errors[0]["msg"]) from None


def _limit(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,2}", text, re.ASCII) or int(text) > LARGEST_PAGE:
        raise ValueError(f"must be a whole number from 1 to {LARGEST_PAGE}")
    return int(text)


_FILTERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "type": ("type", str),
    "priority": ("priority", _priority),
    "queue": ("queue", str),
    "groupId": ("group_id", str),
    "q": ("q", str),
    "createdAfter": ("created_after", wire.moment),
    "createdBefore": ("created_before", wire.moment),
    "limit": ("limit", _limit),
    "cursor": ("cursor", str),
}
