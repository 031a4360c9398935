"""Why isn't this running? The answers in sentences, from what JobSystem says of jobs, queues and workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from admin_ui.wording import ago, number, plural, span

if TYPE_CHECKING:
    from jobsys.system import JobRecord, QueueState, WorkerState

BEHIND_AFTER = 60.0
"""Seconds the oldest due job of a served queue may wait before the overview speaks of it."""

COMMAND = "jobsys worker"
HELD_BACK = "Its last jobs all failed the same way. Workers try one now and then until one succeeds; the others wait, and lose no attempt."
DEPLOY = "Deploy it there, or name its module in JOB_MODULES."
SERVE_IT = "Start one whose JOB_MODULES have its job types."


@dataclass(frozen=True)
class Notice:
    """One sentence at the top of a page. `tone`: `bad` or `warn`; `resume`: the queue whose resume button belongs to it."""

    tone: str
    title: str
    text: str = ""
    command: str = ""
    resume: str = ""


def notices(queues: Sequence[QueueState], workers: Sequence[WorkerState], now: datetime) -> list[Notice]:
    """Why jobs that are due don't run, the worst first; [] when nothing stands in their way."""
    waiting = [queue for queue in queues if _due(queue)]
    served = any(worker.alive for worker in workers)
    found = [] if served or not waiting else [_nobody_works(waiting)]
    for queue in waiting:
        backlog = _backlog(queue, now)
        if queue.paused:
            found.append(Notice("warn", f"Queue {queue.name} is paused.", backlog, resume=queue.name))
        elif served and not queue.workers:
            found.append(Notice("bad", f"No live worker serves queue {queue.name}.", f"{backlog} {SERVE_IT}"))
        elif unknown := _unknown_types(queue, workers):
            for name in unknown:
                waits = f"{plural(queue.due[name], 'job')} of it due in queue {queue.name}."
                found.append(Notice("bad", f"No live worker knows the type {name}.", f"{waits} {DEPLOY}"))
        elif served and not pace(queue) and _age(queue, now) > BEHIND_AFTER:
            found.append(Notice("warn", f"Queue {queue.name} is behind.", f"{backlog} More workers or threads would help."))
    for type in sorted({type for worker in workers if worker.alive for type in worker.held_back}):
        found.append(Notice("warn", f"{type} is held back.", HELD_BACK))
    for worker in workers:
        if not worker.alive and worker.running:
            lost = f"Last heard {ago(worker.heartbeat_at, now)}; {plural(worker.running, 'running job')} of it will go back to the queue."
            found.append(Notice("warn", f"Worker {worker.host}:{worker.pid} is silent.", lost))
    return sorted(found, key=lambda notice: notice.tone != "bad")


def headline(counts: dict[str, int], found: Sequence[Notice]) -> str:
    """The overview in one sentence."""
    failed, dead = counts["FAILED"], counts["DEAD"]
    dying = f"{'is' if dead == 1 else 'are'} dead"
    if failed:
        return f"{plural(failed, 'job')} failed" + (f", {number(dead)} {dying}" if dead else "")
    if dead:
        return f"{plural(dead, 'job')} {dying}"
    if any(notice.tone == "bad" for notice in found):
        return "Jobs wait, and nobody serves them"
    if counts["PROCESSING"] or counts["PENDING"]:
        return f"{plural(counts['PROCESSING'], 'job')} at work, {number(counts['PENDING'])} waiting"
    return "All quiet" if any(counts.values()) else "No job yet"


def pace(queue: QueueState) -> str:
    """The limits of a queue in words, and how long its backlog takes at that pace; "" without limits."""
    words = []
    if queue.rate:
        starts, period = queue.rate
        words.append(f"{number(starts)} per {span(period)}")
        if _due(queue) > starts:
            words.append(f"backlog takes {span(_due(queue) / starts * period)}")
    if queue.max_running:
        words.append(f"{number(queue.max_running)} at a time")
    return ", ".join(words)


def reason(job: JobRecord, queues: Sequence[QueueState], workers: Sequence[WorkerState], now: datetime) -> str:
    """One or two sentences on why the job is where it is, and what becomes of it."""
    waiting = {"SCHEDULED": _why_scheduled, "PENDING": _why_pending}.get(job.status)
    if waiting is not None:
        return waiting(job, next((queue for queue in queues if queue.name == job.queue), None), workers, now)
    if job.status == "PROCESSING":
        return _why_processing(job, workers, now)
    end = f" {ago(job.finished_at, now)}" if job.finished_at else ""
    if job.status == "COMPLETED":
        took = f", in {span((job.finished_at - job.started_at).total_seconds())}" if job.finished_at and job.started_at else ""
        return f"Done{end}{took}."
    if job.status == "FAILED":
        used_up = job.max_attempts is not None and job.attempt >= job.max_attempts
        why = ", and no retry is left" if used_up else " with an error that is final"
        return f"{_attempt(job)} failed{end}{why}. Retry runs it again with the same payload, counting attempts from 0."
    if job.status == "DEAD":
        return f"Dead-lettered{end}: it won't run again unless you retry it."
    return f"Cancelled{end}. Retry runs it after all."


def _why_scheduled(job: JobRecord, queue: QueueState | None, workers: Sequence[WorkerState], now: datetime) -> str:
    due = ago(job.run_at, now)
    if job.run_at <= now:
        text = f"Due {due}; a worker will pick it up."
    elif job.attempt:
        text = f"{_attempt(job)} failed; the next one is due {due}."
    else:
        text = f"Due {due}."
    return " ".join([text, *_obstacle(job, queue, workers)])


def _why_pending(job: JobRecord, queue: QueueState | None, workers: Sequence[WorkerState], now: datetime) -> str:
    waited = f"Due {ago(job.run_at, now)}."
    obstacle = _obstacle(job, queue, workers)
    if obstacle or queue is None:
        return " ".join([waited, *obstacle])
    running, due = queue.counts.get("PROCESSING", 0), _due(queue)
    if queue.max_running and running >= queue.max_running:
        return f"{waited} Queue {queue.name} runs {number(queue.max_running)} at a time, and {number(running)} are running."
    if queue.rate:
        return f"{waited} Queue {queue.name} is paced at {pace(queue)}."
    return f"{waited} It runs as soon as a thread is free; {plural(due, 'job')} due in queue {queue.name}."


def _why_processing(job: JobRecord, workers: Sequence[WorkerState], now: datetime) -> str:
    since = f" for {span((now - job.started_at).total_seconds())}" if job.started_at else ""
    text = f"{_attempt(job)} has been running{since}."
    worker = next((each for each in workers if each.id == job.worker), None)
    if job.stop_requested:
        text += " It was asked to stop and ends at its next checkpoint."
    if worker is not None and not worker.alive:
        text += f" Its worker was last heard {ago(worker.heartbeat_at, now)}; when it counts as lost, the job goes back to the queue."
    return text


def _obstacle(job: JobRecord, queue: QueueState | None, workers: Sequence[WorkerState]) -> list[str]:
    """What keeps any worker from taking this job, at most one sentence."""
    serving = [worker for worker in workers if worker.alive and job.queue in worker.queues]
    if queue is not None and queue.paused:
        return [f"Queue {job.queue} is paused: resume it and the job can start."]
    if not any(worker.alive for worker in workers):
        return [f"No worker is alive; start one: {COMMAND}"]
    if not serving:
        return [f"No live worker serves queue {job.queue}. {SERVE_IT}"]
    if all(worker.types and job.type not in worker.types for worker in serving):
        return [f"No live worker knows the type {job.type}. {DEPLOY}"]
    if all(job.type in worker.held_back for worker in serving):
        return [f"{job.type} is held back. {HELD_BACK}"]
    return []


def _unknown_types(queue: QueueState, workers: Sequence[WorkerState]) -> list[str]:
    """The types of due jobs that no worker of the queue has."""
    serving = [worker for worker in workers if worker.alive and queue.name in worker.queues]
    known = {name for worker in serving for name in worker.types}
    return sorted(queue.due.keys() - known) if known else []


def _attempt(job: JobRecord) -> str:
    return f"Attempt {number(job.attempt)}" + (f" of {number(job.max_attempts)}" if job.max_attempts is not None else "")


def _due(queue: QueueState) -> int:
    return queue.counts.get("PENDING", 0)


def _age(queue: QueueState, now: datetime) -> float:
    return (now - queue.oldest_due).total_seconds() if queue.oldest_due else 0.0


def _backlog(queue: QueueState, now: datetime) -> str:
    return f"{plural(_due(queue), 'job')} due" + (f", the oldest for {span(_age(queue, now))}." if queue.oldest_due else ".")


def _nobody_works(waiting: Sequence[QueueState]) -> Notice:
    total = sum(_due(queue) for queue in waiting)
    title = f"No worker is alive, and {plural(total, 'job')} {'waits' if total == 1 else 'wait'}."
    return Notice("bad", title, f"Queues: {', '.join(queue.name for queue in waiting)}. Start a worker:", command=COMMAND)
