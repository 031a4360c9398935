"""What a request leaves in the jobs it leads to, and these in theirs: its id, and the trace it belongs to.

Both are kept in the job's row, among its options, and every line logged in the course of a request or an attempt carries the id.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

_SANE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_CARRIED = {
    "request_id": _SANE_ID,
    "traceparent": re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    "tracestate": re.compile(r"[ -~]{1,512}"),
}
_NOTHING_ELSE = re.compile(r'\{"request_id": "([\w.:/+=@-]{1,128})"\}', re.ASCII)
_request: ContextVar[dict[str, Any] | None] = ContextVar("jobsys_request", default=None)


class _Here(threading.local):
    job: Any = None


_here = _Here()
add_trace: Callable[[dict[str, Any], tuple[str, str, str] | None], None] | None = None
"""What adds the trace at hand to the options of a job; tracing.py puts it here when traces are wanted."""


def is_request_id(value: object) -> bool:
    """Whether `value` can be the id of a request: up to 128 letters, digits and `_.:/+=@-`, with which nothing can be forged."""
    return isinstance(value, str) and _SANE_ID.fullmatch(value) is not None


def enter_request(request_id: str) -> None:
    """This thread serves a request from here on."""
    _request.set({"request_id": request_id})


def leave_request() -> None:
    """It serves it no longer."""
    _request.set(None)


def note(**values: Any) -> None:
    """Have these on the lines logged in the course of this request from here on."""
    if (request := _request.get()) is not None:
        request.update(values)


def enter_attempt(job: Any) -> None:
    """This thread runs or ends an attempt at `job`, a RunningJob, from here on; None: no longer."""
    _here.job = job


def attempt() -> Any:
    """The RunningJob whose attempt this thread runs or ends, or None."""
    return _here.job


def request_id() -> str | None:
    """The id of the request in whose course this thread acts, be it serving it or running a job that goes back to it."""
    request = _request.get()
    if request is not None:
        return str(request["request_id"])
    return None if _here.job is None else _here.job.carried.get("request_id")


def options(given: str | None = None, *, job: tuple[str, str, str] | None = None) -> dict[str, Any]:
    """The options to submit a job with: the id of the request, `given` or the one at hand, and the trace, where there are such. `job` is
    its (id, type, queue) unless it is one of many."""
    found = given or request_id()
    carried: dict[str, Any] = {} if found is None else {"request_id": found}
    if add_trace is not None:
        add_trace(carried, job)
    return carried


def only_id(options: str) -> str | None:
    """The id, where the options of a job, as PostgreSQL writes JSON, are nothing else: much cheaper than reading them."""
    match = _NOTHING_ELSE.fullmatch(options)
    return None if match is None else match[1]


def taken_from(options: dict[str, Any]) -> dict[str, Any]:
    """What is carried, taken out of the options of a job. Anybody may have written these: what can't be one is none."""
    carried = {name: options.pop(name) for name in _CARRIED if name in options}
    return {name: value for name, value in carried.items() if isinstance(value, str) and _CARRIED[name].fullmatch(value)}


def ids(carried: dict[str, Any]) -> dict[str, str]:
    """What log lines say of it."""
    found = {"request_id": carried["request_id"]} if "request_id" in carried else {}
    return found | {"trace_id": carried["traceparent"][3:35]} if "traceparent" in carried else found


def values() -> dict[str, Any]:
    """What a line logged by this thread carries."""
    job = _here.job
    if job is not None:
        return {"job_id": job.message_id, **ids(job.carried)}
    return _request.get() or {}
