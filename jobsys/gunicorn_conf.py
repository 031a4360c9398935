"""gunicorn's configuration, from our settings: `gunicorn --config python:jobsys.gunicorn_conf 'jobsys.app:create_app()'`."""

from __future__ import annotations

import math
import resource
import sys
from typing import Any

from jobsys import logs, tracing
from jobsys.api.access import check
from jobsys.app import create_app
from jobsys.errors import SettingsError
from jobsys.gunicorn_worker import LOADS, PatientWorker
from jobsys.settings import Settings

try:
    _settings = Settings()
    check(_settings)
    logs.configure(_settings, process="web")
except SettingsError as error:
    sys.exit(f"jobsys: {error}")

bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
workers = _settings.web_processes
threads = _settings.web_threads
worker_class = PatientWorker
worker_connections = 2000  # half of them may wait for jobs
keepalive = 65  # longer than a proxy in front keeps its connections, so that it is never answered with a reset
graceful_timeout = math.ceil(_settings.shutdown_grace) or 1
control_socket_disable = True
forwarder_headers = ""  # nobody's SCRIPT_NAME moves the paths, not even a neighbour's: a proxy's rules for them must hold
logger_class = logs.gunicorn_logger_class()
accesslog = None  # the application's own line says more
proc_name = "jobsys web"


_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
_needed = worker_connections + 200  # for the database, files and pipes
if _soft != resource.RLIM_INFINITY and _soft < _needed:
    _soft = _needed if _hard == resource.RLIM_INFINITY else min(_needed, _hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_soft, _hard))
    worker_connections = _soft - 200


def on_starting(server: Any) -> None:
    """End with one sentence, in the one process there is by now, when the workers would be of no use.

    The command line may name other addresses than the settings do; and whatever else the application refuses, it refuses here
    already. Its modules are then loaded once for all workers.
    """
    try:
        for address in server.cfg.address:
            if isinstance(address, tuple):
                check(_settings, host=address[0])
        create_app(_settings)
    except SettingsError as error:
        sys.exit(f"jobsys: {error}")


def worker_exit(server: Any, worker: Any) -> None:
    """Send the last spans."""
    tracing.close()


def child_exit(server: Any, worker: Any) -> None:
    """Nobody leaves anything to a process that has ended, however it did."""
    LOADS.leave(worker.age)
