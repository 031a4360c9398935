"""The operator's verbs as JSON. Who may use them is the affair of `access`."""

from __future__ import annotations

import falcon

from jobsys.api import filters
from jobsys.api.jobs import accept
from jobsys.api.problem import Problem
from jobsys.system import JobSystem


class AdminJobs:
    """`/admin/jobs`, `/admin/failed`, `/admin/dead`: the same list."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List jobs."""
        resp.media = filters.page(self._system, req)

    def on_get_failed(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List the jobs that failed for good."""
        resp.media = filters.page(self._system, req, status="FAILED")

    def on_get_dead(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List the dead letters."""
        resp.media = filters.page(self._system, req, status="DEAD")


class AdminJob:
    """`/admin/jobs/{job_id}/…`: what an operator does to one job."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    def on_post_retry(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Run the job again from the first attempt."""
        accept(resp, self._system.retry(job_id, by=req.context.user))

    def on_post_dlq(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Make the job a dead letter."""
        accept(resp, self._system.bury(job_id, by=req.context.user))

    def on_post_cancel(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """Cancel the job, or ask it to stop when it runs."""
        accept(resp, self._system.cancel(job_id, by=req.context.user))


class AdminQueue:
    """`/admin/queues/{name}/…`: let a queue rest, let it run."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system

    def on_post_pause(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """Start no more jobs of this queue; those that run go on."""
        self._check(name)
        self._system.pause(name, by=req.context.user)
        resp.media = {"queue": name, "paused": True}

    def on_post_resume(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """Start jobs of this queue again."""
        self._check(name)
        self._system.resume(name, by=req.context.user)
        resp.media = {"queue": name, "paused": False}

    def _check(self, name: str) -> None:
        if name not in [queue.name for queue in self._system.queues()]:
            raise Problem(404, "there is no queue of this name")
