"""What a page shows of a job: its line in a list, its facts, its timeline, and the buttons its status allows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from admin_ui import wording
from admin_ui.addresses import address
from jobsys import verbs
from jobsys.job_types import priority_name

if TYPE_CHECKING:
    from jobsys.system import Event, Failure, JobRecord

QUIET_EVENTS = ("log", "progress")
GONE = "…\u2060"
"""Stands before the end of an id; no line breaks between the two."""


@dataclass(frozen=True)
class Verb:
    """What an operator can ask of a job: the button's word, its name in `jobsys.verbs`, and what is said when it is done."""

    label: str
    name: str
    done: str
    done_to_many: str


VERBS = {
    "retry": Verb("Retry", "retry", "It waits for a worker again, with its attempts counted from 0.", "retried."),
    "dead-letter": Verb("Dead-letter", "bury", "It is dead-lettered and won't run unless it is retried.", "dead-lettered."),
    "cancel": Verb("Cancel", "cancel", "It is cancelled. Retry runs it after all.", "cancelled."),
}


def verbs_for(status: str) -> list[tuple[str, str]]:
    """(verb, label) of what can be asked of a job of this status; of one of any status where none is given."""
    return [(name, verb.label) for name, verb in VERBS.items() if not status or status in verbs.VERBS[verb.name].allowed]


def buttons(job: JobRecord) -> list[tuple[str, str]]:
    """(verb, label) of what can be asked of the job now."""
    return [] if job.stop_requested else verbs_for(job.status)


def line(job: JobRecord) -> dict[str, Any]:
    """A job in a list. An unfinished one has its buttons on its own page only, out of a slip's way."""
    word, at = {
        "SCHEDULED": ("due", job.run_at),
        "PENDING": ("due", job.run_at),
        "PROCESSING": ("started", job.started_at),
    }.get(job.status, ("", job.finished_at))
    return {
        "job": job,
        "word": word,
        "at": at or job.created_at,
        "error": wording.first_line(error_text(job)) if job.status != "COMPLETED" else "",
        "buttons": buttons(job) if job.finished else [],
        "pick": bool(buttons(job)),
    }


def error_text(job: JobRecord) -> str:
    """`SMTPServerDisconnected: Connection unexpectedly closed`; "" without an error."""
    return f"{job.error.get('type') or 'Error'}: {job.error.get('message') or ''}" if job.error else ""


def facts(job: JobRecord, failures: list[Failure], names: dict[str, str], now: datetime) -> list[tuple[str, Any, str | None]]:
    """(name, a text or a time, a link or None) of whatever is known. `names` are those of the workers, by id."""
    limit = "" if job.max_attempts is None else f" of {wording.number(job.max_attempts)}"
    # The job may have been ended, or made to wait, long after its attempt.
    ended = next((failure.at for failure in failures if failure.started_at == job.started_at), job.finished_at or now)
    ran = (ended - job.started_at).total_seconds() if job.started_at else None
    known = [
        ("Type", job.type, address("jobs", type=job.type)),
        ("Queue", job.queue, address("jobs", queue=job.queue)),
        ("Priority", priority_name(job.priority), None),
        ("Attempts", wording.number(job.attempt) + limit, None),
        ("Created", job.created_at, None),
        ("Due", job.run_at, None),
        ("Started", job.started_at, None),
        ("Finished", job.finished_at, None),
        ("Ran for", None if ran is None else wording.span(ran), None),
        ("Worker", names.get(job.worker, f"{job.worker}, which is gone") if job.worker else None, None),
        ("Group", job.group_id, address("jobs", group=job.group_id)),
        ("Idempotency key", job.idempotency_key, None),
        ("Request", job.request_id, None),
    ]
    return [fact for fact in known if fact[1] is not None]


def moment(event: Event, names: dict[str, str], now: datetime) -> dict[str, Any]:
    """An event as a line of the timeline. Tracebacks stand with the failed attempts, not here."""
    detail, quiet = event.detail or {}, event.kind in QUIET_EVENTS
    worker, duration = detail.get("worker"), detail.get("duration")
    about = [
        f"attempt {wording.number(event.attempt)}" if event.attempt and not quiet else "",
        f"by {event.by}" if event.by else "",
        f"on {names.get(worker, GONE + worker[-12:])}" if worker else "",
        f"after {wording.span(duration)}" if duration is not None else "",
    ]
    return {
        "at": event.at,
        "clock": wording.clock(event.at, now),
        "kind": event.kind,
        "text": wording.clipped(": ".join(part for part in (detail.get("type"), event.message) if part), 1_000),
        "about": " · ".join(part for part in about if part),
        "tone": "quiet" if quiet else "bad" if event.kind in ("failed", "buried", "worker lost") else "",
    }
