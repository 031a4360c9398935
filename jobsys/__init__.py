"""jobsys: a job server on the PostgreSQL you already run.

Start reading at sql/schema.sql, the story of the whole system; then system.py, what everything above talks to; broker.py, how a job
reaches a worker and how its end is written; job_types.py and jobs/, what a job is.
"""

import importlib
from typing import TYPE_CHECKING

from jobsys.errors import GiveUp, JobStopped

if TYPE_CHECKING:
    from jobsys.job_types import Job, Payload, job
    from jobsys.system import JobSystem

__version__ = "0.1.0"

__all__ = ["GiveUp", "Job", "JobStopped", "JobSystem", "Payload", "__version__", "job"]

_HOMES = {"Job": "jobsys.job_types", "JobSystem": "jobsys.system", "Payload": "jobsys.job_types", "job": "jobsys.job_types"}


def __getattr__(name: str) -> object:
    # Loaded when asked for: modules of job types need no broker and no database, and `jobsys --help` needs nothing at all.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
