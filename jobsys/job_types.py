"""A job type is one declaration in one place: a payload model and a function.

The door (API, CLI, admin form), the worker, the docs and the contract tests all derive from what stands in the registry here.
Importing a module of job types needs no broker and no database, and calling the function runs it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pydantic
from pydantic_core import to_jsonable_python

from jobsys.errors import InvalidSubmission, JobStopped, SettingsError, UnknownJobType
from jobsys.settings import seconds

PRIORITIES = {"high": -10, "default": 0, "low": 10}
"""The named priorities and their numbers in the table; lower comes first. `medium` is read as `default`."""

MAX_ERRORS = 50
"""How many wrong fields of one payload are named."""

F = TypeVar("F", bound=Callable[..., Any])


class Payload(pydantic.BaseModel):
    """What a job needs: a pydantic model. Unknown fields are refused, and so is a string where a number belongs."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)

    def to_store(self, given: str) -> str:
        """The JSON text that is kept of the payload: as it was given. A type for which something would be lost in PostgreSQL's jsonb, which
        sorts keys, says it in a field of its own here."""
        return given


class Job:
    """What a job function sees of its own job.

    As it stands it works without any database, for calling a job function in a test or a shell: `log` and `progress` collect
    in `lines` and `fraction`, `complete_in` in `result`. In a worker the same methods write to the job's record.
    """

    request_id: str | None = None
    """The id of the request that led to the job, also by way of other jobs, where there was one."""

    def __init__(self, id: str = "00000000-0000-7000-8000-000000000000", *, type: str = "", attempt: int = 1) -> None:
        self.id = id
        self.type = type
        self.attempt = attempt
        self.lines: list[str] = []
        self.fraction: float | None = None
        self.stop_reason: str | None = None
        self.result: Any = None

    @property
    def stopping(self) -> bool:
        """Whether the job was asked to stop: cancelled, over its time limit, or its worker is shutting down."""
        return self.stop_reason is not None

    def log(self, line: str) -> None:
        """Add a line to the job's timeline."""
        self.lines.append(str(line))

    def progress(self, fraction: float, message: str = "") -> None:
        """Say how far the job is: `fraction` from 0 to 1, and a few words. Raises ValueError outside that range."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"progress must lie between 0 and 1, not at {fraction}")
        self.fraction = float(fraction)

    def complete_in(self, connection: Any, result: Any = None) -> None:
        """Complete the job in a transaction of yours: what you wrote there and the completion commit together, or not at all.

        `connection` is psycopg2's, to the database of the jobs, inside a transaction; call it last, then commit, then return. Raises
        JobStopped, which ends the transaction, when the job is no longer this attempt's: then somebody else runs it. Where the
        transaction doesn't commit the attempt has failed, whatever the function returns.
        """
        self.result = result

    def checkpoint(self) -> None:
        """A place where the job may end early: raises JobStopped when it has to stop, else returns at once."""
        if self.stop_reason is not None:
            raise JobStopped(self.stop_reason)


@dataclass(frozen=True)
class JobType:
    """One kind of job: its name, what it needs, what it does, and how it is to be run."""

    name: str
    function: Callable[..., Any]
    payload: type[Payload]
    queue: str = "default"
    priority: str = "default"
    max_retries: int | None = None
    """None: the setting MAX_RETRIES."""
    time_limit: float = 600.0
    """Seconds one attempt may run."""
    max_share: float = 1.0
    """The share of a process's threads that may run this type at once; at least one may."""
    trip_after: int = 0
    """0: never held back."""
    aliases: tuple[str, ...] = ()
    example: dict[str, Any] = field(default_factory=dict)
    """A payload that validates; shown wherever the type is documented, and run by the contract tests."""

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or self.name).splitlines()[0]

    def check(self, payload: Any, loc: tuple[str | int, ...] = ("payload",)) -> str:
        """The payload as JSON text, validated. Raises InvalidSubmission naming each wrong field below `loc`."""
        text = encode(payload, loc)
        try:
            return self.payload.model_validate_json(text).to_store(text)
        except pydantic.ValidationError as error:
            errors = error.errors()[:MAX_ERRORS]
            raise InvalidSubmission([{"loc": [*loc, *each["loc"]], "msg": _plain(each["msg"])} for each in errors]) from None

    def run(self, payload: str | bytes, job: Job) -> Any:
        """Run the function on a payload given as JSON text. Raises pydantic.ValidationError before the function starts."""
        return self.function(self.payload.model_validate_json(payload), job)


class Registry:
    """The job types by name. Names and aliases are looked up whatever their case."""

    def __init__(self) -> None:
        self.types: dict[str, JobType] = {}
        self._names: dict[str, str] = {}

    def add(self, job_type: JobType) -> None:
        """Register a type. Registering the same function again (a module reload) replaces it; a taken name is an error."""
        names = (job_type.name, *job_type.aliases)
        for name in names:
            owner = self._names.get(name.lower())
            if owner is not None and _origin(self.types[owner]) != _origin(job_type):
                raise ValueError(f'the name "{name}" of {_origin(job_type)} is taken by job type {owner} in {_origin(self.types[owner])}')
        self._names.update({name.lower(): job_type.name for name in names})
        self.types[job_type.name] = job_type

    def find(self, name: str) -> JobType:
        """The type of this name or alias. Raises UnknownJobType, which names the known ones."""
        try:
            return self.types[self._names[str(name).lower()]]
        except KeyError:
            raise UnknownJobType(str(name), list(self.types)) from None

    @property
    def names(self) -> set[str]:
        """Every name and alias, in lower case."""
        return set(self._names)

    def load(self, modules: Iterable[str] = ()) -> Registry:
        """Import the job types that ship, every module of `jobsys.jobs`, then `modules`, each of which declares its own with `@job`."""
        shipped = importlib.import_module("jobsys.jobs")
        for module in (*(f"jobsys.jobs.{each.name}" for each in pkgutil.iter_modules(shipped.__path__)), *modules):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise
                raise SettingsError(f'JOB_MODULES: there is no module "{module}" in the current directory or on the Python path') from None
        return self


registry = Registry()
"""Where `@job` registers. One per process, as modules are."""


def job(
    name: str,
    *,
    queue: str = "default",
    priority: str = "default",
    max_retries: int | None = None,
    time_limit: str | float = "10m",
    max_share: float = 1.0,
    trip_after: int = 0,
    aliases: Iterable[str] = (),
    example: dict[str, Any] | None = None,
) -> Callable[[F], F]:
    """Declare a job type: `def f(payload: SomePayload, job: Job)`; what it returns is the job's result and must be JSON.

    `time_limit` is for one attempt, in seconds or as `500ms`, `5s`, `2m`. `priority` is the one a job gets when its submitter
    names none. An exception is retried up to `max_retries` times with growing pauses; GiveUp is final. `max_share` is the share of a worker
    process's threads that this type may take, for a type that depends on something that may hang. `trip_after` is for one that depends on
    something that may be away: when so many different jobs in a row failed the same way, a process holds the type back, and tries one
    job of it now and then until one succeeds, or gives up. The decorated function stays an ordinary function.

    Raises TypeError or ValueError when the declaration can't work.
    """

    def declare(function: F) -> F:
        job_type = JobType(
            name=name,
            function=function,
            payload=_payload_model(name, function),
            queue=queue,
            priority=priority,
            max_retries=max_retries,
            time_limit=seconds(time_limit),
            max_share=max_share,
            trip_after=trip_after,
            aliases=tuple(aliases),
            example=example or {},
        )
        _check_declaration(job_type)
        try:
            job_type.check(job_type.example, loc=("example",))
        except InvalidSubmission as error:
            if example is not None:
                raise ValueError(f"the example of job type {name} does not validate: {error}") from None
        registry.add(job_type)
        return function

    return declare


def priority_number(value: Any, loc: tuple[str | int, ...] = ("priority",)) -> int:
    """The table's number for `high`, `default`, `medium`, `low` in any case. Raises InvalidSubmission for anything else."""
    name = value.lower() if isinstance(value, str) else None
    number = PRIORITIES.get("default" if name == "medium" else name) if name else None
    if number is None:
        raise InvalidSubmission.of([*loc], f'priority "{value}" is not one of {", ".join(PRIORITIES)}')
    return number


def priority_name(number: int) -> str:
    """The name of a priority, or its number as text when a plain Dramatiq actor chose one without a name."""
    for name, value in PRIORITIES.items():
        if value == number:
            return name
    return str(number)


def encode(value: Any, loc: tuple[str | int, ...] = ()) -> str:
    """`value` as JSON text that PostgreSQL's jsonb can hold.

    Raises InvalidSubmission naming `loc` for what it can't: NUL characters, lone surrogates, NaN, infinities, and types JSON
    has no word for.
    """
    try:
        text = _encoder.encode(value)
        text.encode()
    except UnicodeEncodeError:
        raise InvalidSubmission.of([*loc], "contains a lone surrogate, which is no text") from None
    except RecursionError:
        raise InvalidSubmission.of([*loc], "is nested too deeply") from None
    except (TypeError, ValueError, pydantic.ValidationError) as error:
        raise InvalidSubmission.of([*loc], f"can't be written as JSON: {error}") from None
    if "\\u0000" in text.replace("\\\\", ""):
        raise InvalidSubmission.of([*loc], "contains a NUL character, which PostgreSQL can't store")
    return text


def _jsonable(value: Any) -> Any:
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return to_jsonable_python(value)


def _check_declaration(job_type: JobType) -> None:
    if job_type.priority not in PRIORITIES:
        raise ValueError(f'priority "{job_type.priority}" of job type {job_type.name} is not one of {", ".join(PRIORITIES)}')
    for word in (job_type.name, job_type.queue, *job_type.aliases):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9._-]{0,99}", word):
            raise ValueError(f'"{word}" of job type {job_type.name} is not a letter followed by up to 99 letters, digits, ".", "_" or "-"')
    if job_type.max_retries is not None and job_type.max_retries < 0:
        raise ValueError(f"max_retries of job type {job_type.name} must be 0 or more, not {job_type.max_retries}")
    if job_type.time_limit <= 0:
        raise ValueError(f"time_limit of job type {job_type.name} must be longer than nothing")
    if not 0 < job_type.max_share <= 1:
        raise ValueError(f"max_share of job type {job_type.name} must be above 0 and no more than 1, not {job_type.max_share}")
    if job_type.trip_after < 0:
        raise ValueError(f"trip_after of job type {job_type.name} must be 0 or more, not {job_type.trip_after}")


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_jsonable)


def _payload_model(name: str, function: Callable[..., Any]) -> type[Payload]:
    parameters = list(inspect.signature(function).parameters)
    try:
        hint = typing.get_type_hints(function).get(parameters[0]) if len(parameters) == 2 else None
    except NameError as error:
        raise TypeError(f"job type {name}: a type that {function.__name__} names is not known where its module is: {error}") from None
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"job type {name}: {function.__name__} must be an ordinary function, not an async one")
    if not (isinstance(hint, type) and issubclass(hint, Payload)):
        raise TypeError(f"job type {name}: {function.__name__} must be written as def {function.__name__}(payload: SomePayload, job: Job)")
    return hint


def _origin(job_type: JobType) -> str:
    return f"{job_type.function.__module__}.{job_type.function.__qualname__}"


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ")
