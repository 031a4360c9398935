"""The words of the wire: jobs as JSON objects, and the one place where the vocabularies of older clients are translated.

An older client says `{"name": "sendEmail", "data": {"recipient": …}}`, `SUCCESS`, `MEDIUM`; inside it is always `EMAIL_SEND`,
`payload`, `to`, `COMPLETED`, `default`.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Annotated, Any, cast, overload

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from jobsys.errors import InvalidSubmission
from jobsys.job_types import priority_name, priority_number
from jobsys.system import STATUSES, Event, JobRecord

_STATUS_SYNONYMS = {"NEW": "PENDING", "QUEUED": "PENDING", "ACTIVE": "PROCESSING", "RUNNING": "PROCESSING", "SUCCESS": "COMPLETED"}
STATUS_NAMES = (*STATUSES, *_STATUS_SYNONYMS)
"""What `status` understands."""
_FIELD_SYNONYMS = {"name": "type", "data": "payload"}
OLDER_WORDS = {"EMAIL_SEND": {"to": "recipient"}}
"""By job type, how older clients call fields of its payload."""
_EMAIL_NAMES = ("sendemail", "email_send", "email")
_RFC_3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)", re.ASCII)

Id = Annotated[str, Field(json_schema_extra={"format": "uuid"})]
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Status = Annotated[str, Field(json_schema_extra={"enum": [*STATUSES]})]
Count = Annotated[int, Field(ge=0)]


class JobError(TypedDict):
    """The last failed attempt."""

    type: str
    message: str
    attempt: Count
    at: Timestamp


class JobProgress(TypedDict):
    """How far a job says it is."""

    fraction: Annotated[float, Field(ge=0, le=1)]
    message: str


class JobObject(TypedDict):
    """A job as it stands. `jobId` is `id`; `startedAt`, `worker` and `progress` are those of the last attempt."""

    id: Id
    jobId: Id
    type: str
    queue: str
    priority: Annotated[str, Field(description="high, default or low; a number where a Dramatiq actor chose another.")]
    payload: dict[str, Any]
    status: Status
    attempts: Count
    maxAttempts: Count | None
    progress: JobProgress | None
    result: Annotated[Any, Field(description="What the job returned.")]
    error: JobError | None
    createdAt: Timestamp
    runAt: Timestamp
    startedAt: Timestamp | None
    finishedAt: Timestamp | None
    worker: str | None
    groupId: Id | None
    idempotencyKey: str | None
    requestId: Annotated[str | None, Field(description="The id of the request that submitted it.")]


class JobEvent(TypedDict):
    """An entry of a job's timeline; what an attempt left behind stands beside the rest."""

    at: Timestamp
    kind: Annotated[str, Field(description="created, due, started, log, progress, failed, retried, finished…")]
    attempt: Count | None
    by: str | None
    message: str | None
    type: NotRequired[str]
    traceback: NotRequired[str]
    worker: NotRequired[str | None]
    duration: NotRequired[Annotated[float, Field(description="Seconds.")]]


def job(record: JobRecord) -> JobObject:
    """The job object."""
    return {
        "id": record.id,
        "jobId": record.id,
        "type": record.type,
        "queue": record.queue,
        "priority": priority_name(record.priority),
        "payload": record.arguments,
        "status": record.status,
        "attempts": record.attempt,
        "maxAttempts": record.max_attempts,
        "progress": cast(Any, record.progress),
        "result": record.result,
        "error": cast(Any, record.error and {**record.error, "at": timestamp(moment(record.error["at"]))}),
        "createdAt": timestamp(record.created_at),
        "runAt": timestamp(record.run_at),
        "startedAt": timestamp(record.started_at),
        "finishedAt": timestamp(record.finished_at),
        "worker": record.worker,
        "groupId": record.group_id,
        "idempotencyKey": record.idempotency_key,
        "requestId": record.request_id,
    }


def event(entry: Event) -> JobEvent:
    """One entry of a job's timeline; what an attempt left behind (type, traceback, worker, duration) stands beside the rest."""
    return {
        **cast(Any, entry.detail or {}),
        "at": timestamp(entry.at),
        "kind": entry.kind,
        "attempt": entry.attempt,
        "by": entry.by,
        "message": entry.message,
    }


@overload
def timestamp(moment: datetime) -> str: ...
@overload
def timestamp(moment: datetime | None) -> str | None: ...
def timestamp(moment: datetime | None) -> str | None:
    """RFC 3339 in UTC with milliseconds and `Z`."""
    if moment is None:
        return None
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(text: str) -> datetime:
    """The time that an RFC 3339 text names. Raises ValueError when it names none, or not its offset from UTC."""
    match = _RFC_3339.fullmatch(text)
    if match is None:
        raise ValueError("must be a time such as 2030-01-31T12:00:00Z")
    date, time, fraction, zone = match.groups()
    try:
        local = datetime.fromisoformat(f"{date}T{time}.{(fraction or '0')[:6]:0<6}{'+00:00' if zone in 'Zz' else zone}")
        return local.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise ValueError("is no time that exists, or lies beyond the year 9999") from None


def status(name: str) -> str:
    """The status that `name` means, whatever its case. Raises ValueError when it means none."""
    known = _STATUS_SYNONYMS.get(name.upper(), name.upper())
    if known not in STATUSES:
        raise ValueError(f'status "{name[:50]}" is not one of {", ".join(STATUSES)}')
    return known


def submission(body: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    """The arguments of `JobSystem.submit` from the body of a submission, in either vocabulary.

    `key` is the header Idempotency-Key. Raises InvalidSubmission naming each field that is unknown or of a wrong kind, in the
    words of `body`.
    """
    errors: list[dict[str, Any]] = []
    given: dict[str, Any] = {}
    for name, value in body.items():
        field = _FIELD_SYNONYMS.get(name, name)
        try:
            if field not in _FIELDS:
                raise ValueError(f"is not a field of a job; known are {', '.join(_FIELDS)}")
            if field in given:
                raise ValueError(f"says the same as {field}")
            given[field] = _FIELDS[field](value)
        except ValueError as error:
            errors.append({"loc": [name], "msg": str(error)})
    if key is not None and given.setdefault("idempotencyKey", key) != key:
        errors.append({"loc": ["idempotencyKey"], "msg": "differs from the header Idempotency-Key"})
    if errors:
        raise InvalidSubmission(errors)
    _translate_email(given)
    return {_ARGUMENTS.get(field, field): value for field, value in given.items()} | {"type": given.get("type", "TEST_JOB")}


def in_words_of(body: dict[str, Any], error: InvalidSubmission) -> InvalidSubmission:
    """`error` with each place named as the client that sent `body` named it."""
    names = {field: name for name, field in _FIELD_SYNONYMS.items() if name in body}
    old_email = "recipient" in _dict(body.get("data", body.get("payload")))

    def old(loc: list[Any]) -> list[Any]:
        if old_email and loc[:2] == ["payload", "to"]:
            loc = ["payload", "recipient", *loc[2:]]
        return [names.get(loc[0], loc[0]), *loc[1:]] if loc else loc

    return InvalidSubmission([{**each, "loc": old(each["loc"])} for each in error.errors])


def _translate_email(given: dict[str, Any]) -> None:
    payload = given.get("payload", {})
    if "recipient" in payload and "to" not in payload and given.get("type", "").lower() in _EMAIL_NAMES:
        given["payload"] = {"to" if name == "recipient" else name: value for name, value in payload.items()}


def _text(longest: int) -> Any:
    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise ValueError(f"must be a text of at most {longest} characters")
        return value

    return check


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return value


def _priority(value: Any) -> str:
    try:
        return priority_name(priority_number(value))
    except InvalidSubmission as error:
        raise ValueError(error.errors[0]["msg"]) from None


def _moment(value: Any) -> datetime:
    return moment(_text(50)(value))


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError("must be a number of seconds, 0 or more")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("must be a whole number, 0 or more")
    return value


_FIELDS: dict[str, Any] = {
    "type": _text(200),
    "priority": _priority,
    "payload": _object,
    "runAt": _moment,
    "delay": _seconds,
    "maxRetries": _count,
    "idempotencyKey": _text(255),
}
_ARGUMENTS = {"runAt": "run_at", "maxRetries": "max_retries", "idempotencyKey": "idempotency_key"}
