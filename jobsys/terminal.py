"""How jobs look: tables, colours and a progress bar for a person at a terminal, plain lines in a pipe, JSON when asked for.

What users sent is printed with its control characters escaped, so that a job can't repaint the terminal of whoever looks at it.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from jobsys.api import wire
from jobsys.errors import JobsysError
from jobsys.job_types import JobType, priority_name
from jobsys.logs import printable

if TYPE_CHECKING:
    from jobsys.doctor import Finding
    from jobsys.system import Event, Failure, JobRecord, JobSystem, QueueState, WorkerState

Show = Callable[["JobRecord", str], None]
COLOURS = {
    "PENDING": "yellow",
    "SCHEDULED": "blue",
    "PROCESSING": "cyan",
    "COMPLETED": "green",
    "FAILED": "red",
    "DEAD": "magenta",
    "CANCELLED": "bright_black",
}
LEVELS = {"ok": ("green", "✓"), "warning": ("yellow", "!"), "problem": ("red", "✗")}


MANY = 5
"""So many findings of one check are told at a terminal."""


def print_accepted(job: JobRecord, *, as_json: bool) -> None:
    """The job's id, with a few words around it for a person."""
    if as_json:
        return _print_json(wire.job(job))
    if not sys.stdout.isatty():
        return click.echo(job.id)
    due = f", due {wire.timestamp(job.run_at)}" if job.status == "SCHEDULED" else ""
    before = " (submitted before with this key)" if job.replayed else ""
    click.echo(f"{job.type} {click.style(job.id, bold=True)} is {_status(job)}{due}{before}")


def follow(system: JobSystem, job: JobRecord) -> JobRecord:
    """Show what the job does until it is finished; as it is then. What is shown goes to standard error."""
    begun, alone = time.monotonic(), False
    try:
        with _progress_bar(job) if sys.stderr.isatty() else _progress_lines(job) as show:
            while not job.finished:
                show(job, "no worker is running; start one with: jobsys worker" if alone else "")
                job = system.wait(job.id, timeout=0.25)
                alone = job.status == "PENDING" and time.monotonic() - begun > 2 and not system.health()["workers"]
            show(job, "")
    except (KeyboardInterrupt, JobsysError):
        click.echo(f"stopped waiting; the job goes on: jobsys job {job.id}", err=True)
        raise
    return job


def print_outcome(job: JobRecord, *, as_json: bool) -> None:
    """The result of a finished job; or on standard error, why there is none."""
    if as_json:
        _print_json(wire.job(job))
    elif job.status == "COMPLETED":
        _print_json(job.result)
    else:
        why = f": {printable(_error(job))}" if job.error else ""
        click.echo(f"jobsys: {job.type} {job.id} is {job.status} after {_count(job.attempt, 'attempt')}{why}", err=True)


def print_jobs(jobs: Sequence[JobRecord], *, more: bool, as_json: bool) -> None:
    """A table; in a pipe, a line each."""
    if as_json:
        return _print_json([wire.job(job) for job in jobs])
    if not sys.stdout.isatty():
        for job in jobs:
            row = (
                job.id,
                job.type,
                job.status,
                priority_name(job.priority),
                job.queue,
                job.attempt,
                wire.timestamp(job.created_at),
                _error(job),
            )
            click.echo("\t".join(printable(cell) for cell in row))
        return
    rows = [
        (
            job.id,
            job.type,
            (job.status, COLOURS.get(job.status)),
            priority_name(job.priority),
            _attempts(job),
            _age(job.created_at),
            _note(job),
        )
        for job in jobs
    ]
    _print_table(("id", "type", "status", "priority", "attempt", "age", ""), rows, nothing="no jobs")
    if more:
        click.echo("there are more; see --limit and the filters in jobsys jobs --help", err=True)


def print_job(job: JobRecord, events: Sequence[Event], failures: Sequence[Failure], *, as_json: bool) -> None:
    """All there is about one job."""
    if as_json:
        return _print_json({**wire.job(job), "events": [wire.event(event) for event in events]})
    stopping = " (asked to stop)" if job.stop_requested and not job.finished else ""
    click.echo(f"{click.style(printable(job.type), bold=True)} {job.id} {_status(job)}{stopping}")
    facts = {
        "queue": f"{job.queue}, priority {priority_name(job.priority)}",
        "attempt": _attempts(job),
        "progress": _progress(job),
        "created": wire.timestamp(job.created_at),
        "due": wire.timestamp(job.run_at),
        "started": wire.timestamp(job.started_at),
        "finished": wire.timestamp(job.finished_at),
        "worker": job.worker,
        "group": job.group_id,
        "key": job.idempotency_key,
    }
    for name, value in facts.items():
        if value:
            click.echo(f"  {name:<9} {printable(value)}")
    _print_block("payload", _pretty(job.arguments))
    if job.status == "COMPLETED":
        _print_block("result", _pretty(job.result))
    if job.error:
        _print_block("error", _error(job))
    _print_block("timeline", "\n".join(_event_line(event) for event in events))
    if failures and failures[-1].traceback:
        _print_block(f"traceback of attempt {failures[-1].attempt}", failures[-1].traceback)


def print_types(types: Iterable[JobType], *, max_retries: int, as_json: bool) -> None:
    """What each job type does and needs, with an example that can be copied."""
    if as_json:
        return _print_json([_type_object(each, max_retries) for each in types])
    for number, each in enumerate(types):
        retries = _count(max_retries if each.max_retries is None else each.max_retries, "retry", "retries")
        also = f"  (also {', '.join(each.aliases)})" if each.aliases else ""
        click.echo(("\n" if number else "") + f"{click.style(each.name, bold=True)}{also}\n  {each.summary}")
        click.echo(f"  queue {each.queue}, priority {each.priority}, {retries}, {each.time_limit:g} s per attempt")
        fields = list(_fields(each))
        width = max((len(name) for name, _, _ in fields), default=0)
        for name, words, description in fields:
            says = f"  {click.style(description, fg='bright_black')}" if description else ""
            click.echo(f"    {name:<{width}}  {words}{says}")
        click.secho(f"  {example(each)}", fg="bright_black")


def example(job_type: JobType) -> str:
    """The command line that submits the type's example."""
    words = [name + "=" + (value if isinstance(value, str) else json.dumps(value)) for name, value in job_type.example.items()]
    return shlex.join(["jobsys", "submit", job_type.name, *words])


def print_queues(queues: Sequence[QueueState], *, as_json: bool) -> None:
    """Each queue with what waits and runs in it, its limits and its workers."""
    headings = ("queue", "pending", "scheduled", "running", "paused", "rate", "max running", "oldest due", "workers")
    rows = [
        (
            queue.name,
            *(queue.counts.get(status, 0) for status in ("PENDING", "SCHEDULED", "PROCESSING")),
            "paused" if queue.paused else "",
            f"{queue.rate[0]}/{queue.rate[1]:g}s" if queue.rate else "",
            queue.max_running or "",
            _age(queue.oldest_due) if queue.oldest_due else "",
            queue.workers,
        )
        for queue in queues
    ]
    _print_rows(headings, rows, as_json=as_json, nothing="no queues yet")


def queue_in_words(name: str, state: QueueState | None) -> str:
    """`queue mail: not paused, 10 starts per 60 s, at most 2 running, 2 workers`."""
    if state is None:
        return f"there is no queue {name}: it has no jobs, no limits and no workers"
    words = ["paused" if state.paused else "not paused"]
    words.append(f"{state.rate[0]:,} starts per {state.rate[1]:g} s" if state.rate else "any rate")
    words.append(f"at most {state.max_running:,} running" if state.max_running else "any number running")
    words.append(f"{state.workers} workers" if state.workers != 1 else "1 worker")
    stranger = "; it has no jobs either: is the name right?" if not state.workers and not any(state.counts.values()) else ""
    return f"queue {name}: {', '.join(words)}{stranger}"


def print_workers(workers: Sequence[WorkerState], *, as_json: bool) -> None:
    """Each worker process: where it runs, what it serves, when it was last heard of."""
    headings = ("worker", "host", "pid", "state", "running", "threads", "started", "heard of", "queues")
    rows = [
        (
            worker.id,
            worker.host,
            worker.pid,
            "alive" if worker.alive else "silent",
            worker.running,
            worker.threads,
            _age(worker.started_at),
            _age(worker.heartbeat_at),
            ", ".join(worker.queues),
        )
        for worker in workers
    ]
    _print_rows(headings, rows, as_json=as_json, nothing="no workers; start one with: jobsys worker")


def print_findings(findings: Sequence[Finding], *, as_json: bool) -> None:
    """What the doctor found, the worst last, where the eye is when the command has ended; each remedy on a line of its own, for copying."""
    if as_json:
        return _print_json([finding._asdict() for finding in findings])
    if not sys.stdout.isatty():
        for finding in findings:
            click.echo("\t".join(printable(cell) for cell in (finding.level, finding.check, finding.finding, finding.remedy)))
        return
    margin = max(len(finding.check) for finding in findings) + 4
    width = max(40, shutil.get_terminal_size().columns - margin)
    told: Counter[tuple[str, str]] = Counter()
    alike = Counter((finding.check, finding.level) for finding in findings)
    for finding in sorted(findings, key=lambda finding: list(LEVELS).index(finding.level)):
        kind = (finding.check, finding.level)
        told[kind] += 1
        if told[kind] == MANY + 1:
            click.echo(f"{'':{margin}}… and {alike[kind] - MANY} more; jobsys doctor --json tells them all")
        if told[kind] > MANY:
            continue
        colour, mark = LEVELS[finding.level]
        lines = textwrap.wrap(printable(finding.finding), width, break_on_hyphens=False)
        click.echo(
            f"{click.style(mark, fg=colour)} {click.style(f'{finding.check:<{margin - 2}}', bold=finding.level != 'ok' or None)}{lines[0]}"
        )
        for line in lines[1:]:
            click.echo(f"{'':{margin}}{line}")
        if finding.remedy:
            click.echo(f"{'':{margin - 2}}{click.style('→ ' + printable(finding.remedy), fg='cyan')}")
    levels = [finding.level for finding in findings]
    numbers = [_count(levels.count(level), level) for level in ("problem", "warning") if level in levels]
    click.secho(", ".join(numbers) or "all is well", bold=True, fg=LEVELS[max(levels, key=list(LEVELS).index)][0])


@contextmanager
def _progress_bar(job: JobRecord) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    click.echo(f"{job.type} {job.id}", err=True)
    words = TextColumn("{task.description}", markup=False)
    bar = BarColumn(complete_style="cyan", finished_style="green", pulse_style="cyan")
    with Progress(SpinnerColumn(), words, bar, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(job.status, total=None)

        def show(job: JobRecord, note: str) -> None:
            fraction = 1.0 if job.status == "COMPLETED" else (job.progress or {}).get("fraction")
            description = f"{job.status} {note or _progress(job)}".rstrip()
            progress.update(task, description=printable(description), total=None if fraction is None else 1.0, completed=fraction or 0)

        yield show


@contextmanager
def _progress_lines(job: JobRecord) -> Iterator[Show]:
    last = ""

    def show(job: JobRecord, note: str) -> None:
        nonlocal last
        line = printable(" ".join(filter(None, (job.type, job.id, job.status, note or _progress(job)))))
        if line != last:
            click.echo(line, err=True)
        last = line

    yield show


def _print_rows(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, as_json: bool, nothing: str) -> None:
    if as_json:
        _print_json([dict(zip(headings, row, strict=True)) for row in rows])
    elif sys.stdout.isatty():
        _print_table(headings, rows, nothing=nothing)
    else:
        for row in rows:
            click.echo("\t".join(printable(cell) for cell in row))


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, nothing: str) -> None:
    """A cell is a value, or (value, colour). Only the last column is cut where it is narrow: an id is for copying."""
    if not rows:
        return click.echo(nothing, err=True)
    cells = [[(printable(cell[0]), cell[1]) if isinstance(cell, tuple) else (printable(cell), None) for cell in row] for row in rows]
    widths = [max(len(heading), *(len(row[column][0]) for row in cells)) for column, heading in enumerate(headings)]
    widths[-1] = min(widths[-1], max(20, shutil.get_terminal_size().columns - sum(widths[:-1]) - 2 * len(widths[:-1])))
    click.secho("  ".join(f"{heading:<{width}}" for heading, width in zip(headings, widths, strict=True)).rstrip(), bold=True)
    for row in cells:
        fitted = [(_fit(text, width), colour) for (text, colour), width in zip(row, widths, strict=True)]
        click.echo("  ".join(click.style(text, fg=colour) if colour else text for text, colour in fitted).rstrip())


def _fit(text: str, width: int) -> str:
    return f"{text:<{width}}" if len(text) <= width else text[: width - 1] + "…"


def _print_block(title: str, text: str) -> None:
    click.secho(title, bold=True)
    for line in text.rstrip().split("\n"):
        click.echo(f"  {printable(line)}")


def _print_json(value: Any) -> None:
    click.echo(_pretty(value))


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _status(job: JobRecord) -> str:
    return click.style(job.status, fg=COLOURS.get(job.status))


def _attempts(job: JobRecord) -> str:
    return f"{job.attempt} of {job.max_attempts}" if job.max_attempts else str(job.attempt)


def _progress(job: JobRecord) -> str:
    if not job.progress:
        return ""
    return f"{job.progress['fraction']:.0%} {job.progress.get('message') or ''}".strip()


def _error(job: JobRecord) -> str:
    return f"{job.error['type']}: {job.error['message']}" if job.error else ""


def _note(job: JobRecord) -> str:
    if job.status == "PROCESSING":
        return "asked to stop" if job.stop_requested else _progress(job)
    return "" if job.status == "COMPLETED" else _error(job)


def _event_line(event: Event) -> str:
    attempt = f"attempt {event.attempt}" if event.attempt else ""
    by = f"by {event.by}" if event.by else ""
    seconds = (event.detail or {}).get("duration")
    took = f"after {seconds:.3f} s" if isinstance(seconds, (int, float)) else ""
    return "  ".join(filter(None, (f"{wire.timestamp(event.at)}  {event.kind:<14}", attempt, by, took, event.message))).rstrip()


def _age(moment: datetime) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = (datetime.now(timezone.utc) - moment).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _type_object(job_type: JobType, max_retries: int) -> dict[str, Any]:
    return {
        "name": job_type.name,
        "aliases": list(job_type.aliases),
        "summary": job_type.summary,
        "queue": job_type.queue,
        "priority": job_type.priority,
        "maxRetries": max_retries if job_type.max_retries is None else job_type.max_retries,
        "timeLimit": job_type.time_limit,
        "payload": job_type.payload.model_json_schema(),
        "example": job_type.example,
    }


def _fields(job_type: JobType) -> Iterator[tuple[str, str, str]]:
    """Each field of the payload: its name, its type in words, its description."""
    schema = job_type.payload.model_json_schema()
    for name, field in schema.get("properties", {}).items():
        required = ", required" if name in schema.get("required", []) else ""
        yield name, _type_words(field, schema.get("$defs", {})) + required, field.get("description", "")


def _type_words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _type_words(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "enum" in schema or "const" in schema:
        return " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            words = [_type_words(each, definitions) for each in schema[choice] if each.get("type") != "null"]
            return " | ".join(dict.fromkeys(words))
    if schema.get("type") == "array":
        return f"[{_type_words(schema.get('items', {}), definitions)}, …]"
    return str(schema.get("format") or schema.get("type") or "anything")
