"""What a query string asks for. Anything misspelt, repeated or out of range is a 400: silence would answer another question."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import falcon
from typing_extensions import TypedDict

from jobsys.api import wire
from jobsys.api.problem import Problem
from jobsys.errors import InvalidSubmission
from jobsys.job_types import priority_name, priority_number
from jobsys.openapi import NO_NUL, PRIORITY, Parameter, Schema, any_case
from jobsys.system import JobSystem, Page

LARGEST_PAGE = 500
LONGEST_WAIT = 30.0
"""Seconds."""


class JobPage(TypedDict):
    """Some jobs, newest first, and the cursor that continues the list; null at its end."""

    jobs: list[wire.JobObject]
    nextCursor: wire.Id | None


def page(system: JobSystem, req: falcon.Request, status: str | None = None) -> JobPage:
    """The page of the job list that `req` asks for, as JSON; with `status` given, of that status and no other."""
    asked = parameters(req, [name for name in _FILTERS if not (status and name == "status")])
    wanted: dict[str, Any] = {"status": status} if status else {}
    errors = []
    for name, text in asked.items():
        try:
            wanted[_FILTERS[name].argument] = _FILTERS[name].convert(text)
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
    known = [name for name in _FILTERS if name not in ("limit", "cursor")]
    wanted: dict[str, Any] = {}
    errors = []
    for name, value in document.items():
        try:
            if name not in known:
                raise ValueError(f"is not a filter here; known are {', '.join(known)}")
            if name == "status" and isinstance(value, list) and all(isinstance(each, str) for each in value):
                value = ",".join(value)
            if not isinstance(value, str) or not value:
                raise ValueError("must be a text, and not an empty one")
            wanted[_FILTERS[name].argument] = _FILTERS[name].convert(value)
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


class _Filter(NamedTuple):
    argument: str
    convert: Callable[[str], Any]
    schema: Schema
    text: str


_STATUS = "|".join(wire.STATUS_NAMES)
_STATUSES: Schema = {"type": "string", "pattern": f"^(?i:({_STATUS})(,({_STATUS}))*)$", "examples": ["PENDING", "FAILED,DEAD"]}
_TEXT: Schema = {"type": "string", "pattern": NO_NUL, "minLength": 1}
_TIME: Schema = {"type": "string", "format": "date-time"}
_LIMIT: Schema = {"type": "integer", "minimum": 1, "maximum": LARGEST_PAGE, "default": 50}
_CURSOR: Schema = {"type": "string", "pattern": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"}
_FILTERS = {
    "status": _Filter("status", _statuses, _STATUSES, "Only jobs of this status, or of these, separated by commas."),
    "type": _Filter("type", str, _TEXT, "Only jobs of this type."),
    "priority": _Filter("priority", _priority, PRIORITY, "Only jobs of this priority."),
    "queue": _Filter("queue", str, _TEXT, "Only jobs of this queue."),
    "groupId": _Filter("group_id", str, _TEXT, "Only jobs of this group, such as the batches of an ingestion."),
    "q": _Filter("q", str, _TEXT, "Only jobs with this text in type, payload or error, or with this id."),
    "createdAfter": _Filter("created_after", wire.moment, _TIME, "Only jobs created at this time or later."),
    "createdBefore": _Filter("created_before", wire.moment, _TIME, "Only jobs created before this time."),
    "limit": _Filter("limit", _limit, _LIMIT, "So many at most."),
    "cursor": _Filter("cursor", str, _CURSOR, "The nextCursor of the page before."),
}
# In a query string, what is empty is as if it weren't there.
_EMPTY: Schema = {"type": "string", "maxLength": 0}
ANY_STATUS = tuple(Parameter(name, {"anyOf": [each.schema, _EMPTY]}, each.text) for name, each in _FILTERS.items())
"""The parameters of a list of jobs…"""
ONE_STATUS = tuple(each for each in ANY_STATUS if each.name != "status")
"""…and those of a list of jobs that are all of one status."""
WAIT = Parameter(
    "wait",
    {"anyOf": [{"type": "number", "minimum": 0, "maximum": LONGEST_WAIT}, _EMPTY]},
    "Answer as soon as the job is finished, at the latest after so many seconds.",
)


def in_body(statuses: Collection[str]) -> Schema:
    """The shape of the same words in a body, for what can be done to jobs of these statuses only."""
    words = [name for name in wire.STATUS_NAMES if wire.status(name) in statuses]
    some = {"type": "string", "pattern": f"^(?i:({'|'.join(words)})(,({'|'.join(words)}))*)$"}
    many = {"type": "array", "items": {"type": "string", "pattern": any_case(*words)}, "minItems": 1}
    shapes = {name: each.schema for name, each in _FILTERS.items() if name not in ("limit", "cursor")} | {"status": {"anyOf": [some, many]}}
    described = {name: {**shape, "description": _FILTERS[name].text} for name, shape in shapes.items()}
    return {"type": "object", "properties": described, "minProperties": 1, "additionalProperties": False}
