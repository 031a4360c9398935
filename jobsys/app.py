"""The web process put together. `create_app` is the one place that knows who gets what."""

from __future__ import annotations

import json
from typing import Any

import falcon
import falcon.media

import admin_ui
from jobsys import api, logs, tracing
from jobsys.api.access import Access, check
from jobsys.api.cors import Cors
from jobsys.api.envelope import Envelope, Router
from jobsys.api.rate_limit import RateLimit
from jobsys.settings import Settings
from jobsys.system import JobSystem


def create_app(settings: Settings | None = None, system: JobSystem | None = None) -> falcon.App:
    """The WSGI application: the API, the admin's pages, and what stands before both.

    Raises SettingsError when the settings would leave a door open that should not be.
    """
    settings = settings or (system.settings if system else Settings())
    check(settings)
    if system is None:
        logs.configure(settings, process="web")
        system = JobSystem(settings)
    access = Access(settings, system.database)
    middleware: Any = [
        Envelope(system.recorder),
        *([tracing.RequestSpans()] if tracing.active else []),
        Cors(settings),
        access,
        RateLimit(settings, system.database.url),
    ]
    router = Router()
    app = falcon.App(middleware=middleware, router=router)
    app.req_options.strip_url_path_trailing_slash = True
    # Falcon's own makes an encoder for each answer.
    app.resp_options.media_handlers[falcon.MEDIA_JSON] = falcon.media.JSONHandler(dumps=json.JSONEncoder(ensure_ascii=False).encode)
    api.add_to(app, router, system, access)
    admin_ui.add_to(app, system)
    return app
