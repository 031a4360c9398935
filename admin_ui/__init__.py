"""The operator's pages: what broke, why isn't this running, can I replay it? Rendered by the server, usable without JavaScript.

`add_to` puts them on a Falcon app. Who may see them is the app's affair: something in front of it guards all of /admin and
sets `req.context.user` and `req.context.may_act`, and calls `refuse` where somebody who may only look asks for more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from admin_ui.views import AdminUI

if TYPE_CHECKING:
    import falcon

    from jobsys.system import JobSystem


def add_to(app: falcon.App, system: JobSystem) -> None:
    """Register the pages below /admin/ui and the redirect from /dashboard."""
    ui = AdminUI(system, Path(__file__).resolve().parent)
    app.add_route("/dashboard", ui, suffix="dashboard")
    app.add_route("/admin/ui", ui, suffix="overview")
    app.add_route("/admin/ui/jobs", ui, suffix="jobs")
    app.add_route("/admin/ui/jobs/{job_id}", ui, suffix="job")
    app.add_route("/admin/ui/jobs/{job_id}/{verb}", ui, suffix="job_verb")
    app.add_route("/admin/ui/many/{verb}", ui, suffix="many")
    app.add_route("/admin/ui/queues/{queue}/{verb}", ui, suffix="queue_verb")
    app.add_route("/admin/ui/static/{name}", ui, suffix="static")
    app.add_sink(ui.no_such_page, "/admin/ui/")
