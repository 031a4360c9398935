"""What can go wrong, as one tree. Raised where it is known, translated once per edge (API, admin UI, CLI).

    JobsysError
    ├── SettingsError           the environment does not make a configuration
    ├── InvalidSubmission       the job can't be accepted as it was described (`errors` names each field)
    │   ├── UnknownJobType      no job type of that name is registered
    │   ├── IdempotencyConflict the key was used before, for another job
    │   └── BulkConflict        the key was used before, for many other jobs
    ├── JobNotFound             no job has this id
    ├── WrongState              the job's status forbids what was asked (`status` names it)
    ├── InvalidToken            a bearer token counts for nothing
    ├── TooManyTries            wrong passwords came too often (`seconds` until the next may be tried)
    └── DatabaseUnavailable     PostgreSQL can't be reached, or did not answer in time
        ├── NotMigrated         it answers, and has no tables of jobsys, or older ones
        ├── LockTimeout         somebody's lock was waited for in vain
        └── TooManySearches     it has enough to do with others

Three more belong to job functions and are not JobsysErrors:

    NotCommitted (Exception)    why an attempt failed that called complete_in and did not commit
    GiveUp (Exception)          raised by a job: final, no retry
    JobStopped (BaseException)  raised into a job that was cancelled, ran too long, or must yield to a shutdown
"""

from __future__ import annotations

from typing import Any

MOST_NAMED = 50
"""How many wrong fields are named: no answer is larger than what it answers."""


class JobsysError(Exception):
    """The root of everything jobsys raises on purpose."""


class SettingsError(JobsysError):
    """The environment does not make a configuration; the text names the variable and what would be right."""


class InvalidSubmission(JobsysError):
    """A job can't be accepted as described. `errors` is a list of `{"loc": [...], "msg": "..."}`, the first MOST_NAMED of them."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        self.errors = errors[:MOST_NAMED]
        super().__init__("; ".join(_sentence(error) for error in self.errors))

    @classmethod
    def of(cls, loc: list[str | int], msg: str) -> InvalidSubmission:
        """The common case: one field is wrong."""
        return cls([{"loc": loc, "msg": msg}])


class UnknownJobType(InvalidSubmission):
    """No job type of that name is registered; the text names the known ones."""

    def __init__(self, name: str, known: list[str], loc: list[str | int] | None = None) -> None:
        super().__init__([{"loc": loc or ["type"], "msg": f'job type "{name}" is not one of {", ".join(sorted(known))}'}])


class IdempotencyConflict(InvalidSubmission):
    """The idempotency key was used before, for a job with another type, payload, priority or number of retries."""

    def __init__(self, key: str) -> None:
        super().__init__([{"loc": ["idempotencyKey"], "msg": f'idempotency key "{key}" was already used for a different job'}])


class BulkConflict(InvalidSubmission):
    """The idempotency key was used before, for many jobs that were not the same ones, or of which some have been removed."""

    def __init__(self, key: str) -> None:
        text = f'idempotency key "{key}" was already used for more, fewer or other jobs, or some of its jobs have been removed since'
        super().__init__([{"loc": [], "msg": text}])


class JobNotFound(JobsysError):
    """No job has this id (or what was given is no UUID)."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f'there is no job "{job_id}"')


class WrongState(JobsysError):
    """The job's status forbids what was asked; `status` is the one it has."""

    def __init__(self, verb: str, status: str, allowed: tuple[str, ...]) -> None:
        self.status = status
        super().__init__(f"a job that is {status} can't be {verb}; only {', '.join(allowed)} can")


class InvalidToken(JobsysError):
    """A bearer token counts for nothing. The text says why, in words of ours only."""


class TooManyTries(JobsysError):
    """Wrong passwords came too often; the next may be tried in `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__("too many wrong passwords lately from this address or for this user")


class DatabaseUnavailable(JobsysError):
    """PostgreSQL can't be reached or did not answer in time. Whoever asked may try again."""


class NotMigrated(DatabaseUnavailable):
    """The database answers, and has no tables of jobsys, or older ones; the text says what to do."""

    def __init__(self) -> None:
        super().__init__("the database has no tables of jobsys, or older ones: run `jobsys migrate`")


class LockTimeout(DatabaseUnavailable):
    """Somebody else held a lock for longer than the statement waits for one. It has done nothing."""


class TooManySearches(DatabaseUnavailable):
    """As many searches as may look through the jobs at the same time do so."""

    def __init__(self) -> None:
        super().__init__("too many searches at the same time; try again soon, or name a status, type or queue")


class NotCommitted(Exception):
    """The job returned, but the transaction in which it called complete_in was not committed: what it did there has not happened."""


class GiveUp(Exception):
    """Raise it in a job whose failure is final: the job becomes FAILED at once, whatever retries it has left."""


class JobStopped(BaseException):
    """Raised inside a job's function when the job has to stop. `reason`: "cancelled", "time limit", "shutdown" or "lost".

    A BaseException, so that a job's own `except Exception` doesn't swallow it. Let it pass: jobsys records what it means.
    """

    def __init__(self, reason: str = "cancelled") -> None:
        self.reason = reason
        super().__init__(f"the job was stopped: {reason}")


_SPEAKS_FOR_ITSELF = ("job type ", "priority ", "status ", "idempotency key ")


def _sentence(error: dict[str, Any]) -> str:
    loc, said = error["loc"], str(error["msg"])
    item = f"item {loc[0]}: " if loc and isinstance(loc[0], int) else ""  # of many
    where = "" if said.startswith(_SPEAKS_FOR_ITSELF) else ".".join(str(part) for part in (loc[1:] if item else loc))
    return f"{item}{where}: {said}" if where else item + said
