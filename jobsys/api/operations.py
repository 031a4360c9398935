"""Is it well: for whoever routes requests here, and whoever restarts the process."""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import Any

import falcon
from typing_extensions import TypedDict

from jobsys.api.problem import RETRY_AFTER, RETRY_LATER
from jobsys.openapi import Answer, describe
from jobsys.system import JobSystem


class Memory(TypedDict):
    """Bytes."""

    rss: int


class Liveness(TypedDict):
    """This process, and for how many seconds it has been running."""

    status: str
    uptime: float
    memory: Memory


class HealthState(Liveness):
    """Whether jobs can be taken in, and whether somebody does them."""

    database: bool
    broker: bool
    workers: int


class Health:
    """`/health` for whoever routes requests here, `/health/live` for whoever restarts the process."""

    def __init__(self, system: JobSystem) -> None:
        self._system = system
        self._started = time.monotonic()

    @describe(
        "getHealth",
        {
            200: Answer("Jobs can be taken in.", HealthState),
            503: Answer("Jobs can't be taken in.", HealthState, headers=(RETRY_LATER,)),
        },
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 while jobs can be taken in, else 503."""
        health = self._system.health()
        if not health["database"]:
            resp.status = falcon.HTTP_503
            resp.set_header("Retry-After", str(RETRY_AFTER))
        resp.media = {"status": "ok" if health["database"] else "unavailable", **health, **self._process()}

    @describe("getLiveness", {200: Answer("The process answers.", Liveness)}, database=False)
    def on_get_live(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 while the process answers at all, whatever the database does."""
        resp.media = {"status": "ok", **self._process()}

    def _process(self) -> dict[str, Any]:
        return {"uptime": round(time.monotonic() - self._started, 1), "memory": {"rss": _resident_bytes()}}


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
