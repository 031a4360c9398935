"""A PostgreSQL of its own with durable commits, a fresh database per measurement, and worker processes as the Procfile starts them."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from jobsys import db
from jobsys.local import Postgres
from jobsys.settings import Settings
from jobsys.system import JobSystem

CHECKOUT = Path(__file__).parent.parent.parent
PROCESSES, THREADS = 2, 4
_numbers = itertools.count(1)


class Bench:
    """Where measurements are made. `BENCH_DATABASE_URL` names a server to use instead of our own."""

    def __init__(self, server: str) -> None:
        self.server = server

    @contextlib.contextmanager
    def system(self) -> Iterator[JobSystem]:
        """jobsys on a fresh, migrated database."""
        name = f"jobsys_bench_{os.getpid()}_{next(_numbers)}"
        maintenance = db.Database(self.server)
        with contextlib.closing(maintenance.connect()) as connection:
            connection.cursor().execute(f"create database {name}")
        url = urlunsplit(urlsplit(self.server)._replace(path=f"/{name}"))
        db.migrate(url)
        system = JobSystem(Settings(_env_file=None, database_url=url, job_modules=["tests.benchmarks.noop"]))
        try:
            yield system
        finally:
            system.close()
            with contextlib.closing(maintenance.connect()) as connection:
                connection.cursor().execute(f"drop database {name} with (force)")

    @contextlib.contextmanager
    def workers(self, system: JobSystem) -> Iterator[None]:
        """`jobsys worker` with two processes, until the block ends."""
        env = os.environ | {
            "DATABASE_URL": str(system.settings.database_url),
            "JOB_MODULES": "tests.benchmarks.noop",
            "WORKER_PROCESSES": str(PROCESSES),
            "WORKER_THREADS": str(THREADS),
            "LOG_LEVEL": "WARNING",
            "PYTHONPATH": str(CHECKOUT),
        }
        process = subprocess.Popen([sys.executable, "-m", "jobsys", "worker"], env=env, cwd=tempfile.gettempdir())
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """The place to measure in, for the time of the block."""
    if given := os.environ.get("BENCH_DATABASE_URL"):
        yield Bench(given)
        return
    with tempfile.TemporaryDirectory(prefix="jobsys-bench-") as directory:
        postgres = Postgres(Path(directory) / "data", durable=True)
        postgres.start()
        try:
            yield Bench(urlunsplit(urlsplit(postgres.url)._replace(path="/postgres")))
        finally:
            postgres.stop()


def machine(server: str) -> str:
    """What the numbers were measured on."""
    with contextlib.closing(db.Database(server).connect()) as connection, connection.cursor() as cursor:
        cursor.execute("select current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit')")
        version, fsync, commit = cursor.fetchone()
    software = f"Python {platform.python_version()}, PostgreSQL {version.split()[0]}"
    return f"{os.cpu_count()} cores, {software} (fsync {fsync}, synchronous_commit {commit})"
