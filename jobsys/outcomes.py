"""How an attempt can end, and what is kept of its failure.

An outcome names one statement of sql/queue.sql and this job's parameters for it; settlements.py writes it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from hashlib import sha256
from typing import Any, NamedTuple

from jobsys.errors import GiveUp
from jobsys.job_types import encode
from jobsys.running import RunningJob
from jobsys.secrecy import mask

LONGEST_STACK = 30
"""Frames kept of a traceback, the innermost."""
_ABOVE_A_JOB = ("dramatiq/worker.py", "dramatiq/actor.py", "jobsys/broker.py", "jobsys/interrupt.py", "jobsys/straight.py")


class Outcome(NamedTuple):
    """How one attempt ended: the name of the statement that writes it, and that statement's parameters for this job. `final`: it failed by
    its own fault, and would again."""

    statement: str
    job: RunningJob
    parameters: dict[str, Any]
    final: bool = False


class Failed(NamedTuple):
    """What is kept of an exception, as text PostgreSQL can hold, without secrets."""

    type: str
    message: str
    traceback: str
    fingerprint: str


def finish(job: RunningJob) -> Outcome:
    """COMPLETED, with what the function returned."""
    return Outcome("finish", job, {"result": None if job.result == "null" else job.result})


def retry(job: RunningJob, delay: float) -> Outcome:
    """The attempt failed; another follows in `delay` seconds."""
    return Outcome("retry", job, {**_failure(job), "worker": job.worker, "delay": delay})


def bury(job: RunningJob) -> Outcome:
    """FAILED, the end of a job that won't be tried again by itself; or DEAD, when it could not be run at all."""
    # A type this worker doesn't have never reaches a middleware, and leaves no exception.
    dead = job.dead or job._exception is None
    return Outcome("bury", job, {**_failure(job), "status": "DEAD" if dead else "FAILED"}, dead or isinstance(job._exception, GiveUp))


def release(job: RunningJob) -> Outcome:
    """Back to the queue as the same attempt."""
    return Outcome("release", job, {})


def cancel(job: RunningJob) -> Outcome:
    """CANCELLED: it was asked to stop, and did."""
    return Outcome("cancel_running", job, {})


def unstorable(job: RunningJob, error: BaseException) -> Outcome:
    """FAILED, because the outcome the attempt had can't be stored, or not even be made."""
    failed = Failed(_name_of(error), f"the outcome of this attempt can't be stored: {_message_of(error).strip()}", "", "outcome")
    return Outcome("bury", job, {"status": "FAILED", "options": encode(job.carried), **failed._asdict()})


def described(error: BaseException) -> Failed:
    """What is kept of an exception, however odd it is."""
    return Failed(_name_of(error), _message_of(error), _traceback_of(error), _fingerprint(error))


def plain_text(text: str, limit: int = 20_000) -> str:
    """`text` as PostgreSQL can store it: NUL and lone surrogates become U+FFFD, and what is beyond `limit` characters is cut out of the
    middle."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}\n… {len(text) - limit} characters left out …\n{text[-limit // 2 :]}"
    return text.replace("\x00", "\ufffd").encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _failure(job: RunningJob) -> dict[str, Any]:
    error = job._exception
    if error is None:
        failed = Failed("ActorNotFound", f"this worker has no job type {job.actor_name}", "", "ActorNotFound")
    else:
        failed = described(error)
    return {"options": encode(job.lasting_options()), **failed._asdict()}


def _told(tell: Callable[[], str], otherwise: str) -> str:
    """What `tell` says of an exception. The exception's own code may run in there, and whatever that raises must not end this thread."""
    try:
        return tell()
    except BaseException:
        return otherwise


def _name_of(error: BaseException) -> str:
    return _told(lambda: plain_text(type(error).__name__, 200), "Exception")


def _message_of(error: BaseException) -> str:
    try:
        return mask(plain_text(str(error), 5_000))
    except BaseException as broken:
        return f"(its text can't be had: str() raised {_name_of(broken)})"


def _traceback_of(error: BaseException) -> str:
    """The traceback with its causes, without the frames that lead from a worker's thread to the job's function."""

    def tell() -> str:
        told = traceback.TracebackException.from_exception(error)
        part: traceback.TracebackException | None = told
        while part is not None:
            part.stack[:] = [frame for frame in part.stack if not frame.filename.endswith(_ABOVE_A_JOB)][-LONGEST_STACK:]
            part = part.__cause__ or part.__context__
        return mask(plain_text("".join(told.format())))

    return _told(tell, f"{_name_of(error)} (its traceback can't be had)")


def _fingerprint(error: BaseException) -> str:
    def place() -> str:
        last = traceback.extract_tb(error.__traceback__)[-1:]
        return f"{last[0].filename}:{last[0].name}" if last else ""

    return sha256(f"{_name_of(error)} {_told(place, '')}".encode("utf-8", "replace")).hexdigest()[:16]
