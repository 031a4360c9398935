"""The HTTP API: Falcon resources over one JobSystem, a module per family. `add_to` registers every route of the contract.

Falcon routes, `body` reads JSON strictly, `wire` and `filters` translate words, `problem` makes every error one shape, `envelope`
gives every exchange its id and headers, `access` guards every route, `cors` lets other sites' pages in. What stands in `@describe` above
a responder is what `/openapi.json` says of it.
"""

from __future__ import annotations

import falcon

from jobsys.api import problem
from jobsys.api.access import Access
from jobsys.api.admin import AdminJob, AdminJobs, AdminQueue
from jobsys.api.description import Description
from jobsys.api.envelope import Router
from jobsys.api.ingestion import Ingestion
from jobsys.api.jobs import Job, Jobs
from jobsys.api.login import Login
from jobsys.api.metrics import Metrics
from jobsys.api.operations import Health
from jobsys.system import JobSystem


def add_to(app: falcon.App, router: Router, system: JobSystem, access: Access) -> None:
    """Register the API on `app`, whose router is `router`. Routes that older clients know by another path are the same resources."""
    problem.add_to(app)
    jobs, job = Jobs(system), Job(system)
    for prefix in ("", "/api"):
        app.add_route(f"{prefix}/jobs", jobs)
        app.add_route(f"{prefix}/jobs/bulk", jobs, suffix="bulk")
        app.add_route(f"{prefix}/jobs/{{job_id}}", job)
        app.add_route(f"{prefix}/jobs/{{job_id}}/retry", job, suffix="retry")
    app.add_route("/jobs/{job_id}/cancel", job, suffix="cancel")
    app.add_route("/jobs/{job_id}/events", job, suffix="events")
    app.add_route("/jobs/{job_id}/artifact", job, suffix="artifact")

    app.add_route("/api/login", Login(access))

    ingestion = Ingestion(system)
    app.add_route("/api/ingest", ingestion)
    app.add_route("/api/status/{ingestion_id}", ingestion, suffix="status")

    admin_jobs, admin_job, admin_queue = AdminJobs(system), AdminJob(system), AdminQueue(system)
    app.add_route("/admin/jobs", admin_jobs)
    app.add_route("/admin/failed", admin_jobs, suffix="failed")
    app.add_route("/admin/dead", admin_jobs, suffix="dead")
    app.add_route("/admin/jobs/{job_id}/artifact", job, suffix="artifact")
    for verb in ("retry", "dlq", "cancel"):
        app.add_route(f"/admin/jobs/{verb}", admin_jobs, suffix=verb)
        app.add_route(f"/admin/jobs/{{job_id}}/{verb}", admin_job, suffix=verb)
    for verb in ("pause", "resume"):
        app.add_route(f"/admin/queues/{{name}}/{verb}", admin_queue, suffix=verb)

    health = Health(system)
    app.add_route("/health", health)
    app.add_route("/health/live", health, suffix="live")
    app.add_route("/metrics", Metrics(system))

    description = Description(system, router, access)
    app.add_route("/openapi.json", description)
    app.add_route("/docs", description, suffix="page")
    app.add_route("/docs/{file}", description, suffix="file")
