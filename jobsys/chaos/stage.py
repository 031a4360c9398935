"""What is broken, and watched: worker processes that serve the chaos queue only, and a stream of jobs for them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from jobsys import db
from jobsys.chaos import LEDGERS, QUEUE
from jobsys.chaos.ledger import ENDS, Row, Run, Submitted, read
from jobsys.chaos.proxy import Proxy
from jobsys.errors import DatabaseUnavailable
from jobsys.ids import new_job_id
from jobsys.local import Postgres, dies_with_us
from jobsys.settings import Settings
from jobsys.system import JobSystem

PROCESSES = 2
CONNECTIONS = 5 * PROCESSES + 2
"""What they may have open at most, as the README says; and two of the submitter's."""
LOST_AFTER = 5.0
HURRY = {
    "WORKER_PROCESSES": f"{PROCESSES}",
    "WORKER_THREADS": "4",
    "WORKER_HEARTBEAT": "2s",
    "WORKER_LOST_AFTER": f"{LOST_AFTER}s",
    "POLL_INTERVAL": "200ms",
    "SHUTDOWN_GRACE": "2s",
    "RETRY_MIN_BACKOFF": "100ms",
    "RETRY_MAX_BACKOFF": "1s",
    "RETENTION_DAYS": "0",
    "LOG_LEVEL": "WARNING",
}
"""Settings of the worker processes: waits are short, and they remove nobody's old jobs. The others are the installation's."""
JOBS_PER_SECOND = 80
FACTS = """
    select
        (
            select count(*) from pg_locks join pg_database on pg_database.oid = database
            where locktype = 'advisory' and datname = current_database()
        ),
        (
            select count(*) from pg_stat_activity
            where datname = current_database() and starts_with(application_name, 'jobsys ') and starts_with(state, 'idle in transaction')
                and state_change < clock_timestamp() - interval '3 seconds'
        )
"""
MARK = "JOBSYS_CHAOS"
"""The variable by which processes of a stage are known, children of dead supervisors included."""


class Stage:
    """Worker processes behind a proxy, and what they need. `server`: the PostgreSQL, where it may be broken, too."""

    def __init__(self, settings: Settings, directory: Path, *, seed: int, server: Postgres | None = None) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.url = db.url_of(settings)
        self.proxy = Proxy(self.url)
        self.log = directory / "workers.log"
        self._directory = directory
        self._mark = new_job_id()
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ,
            **HURRY,
            "DATABASE_URL": self.proxy.url,
            "JOB_MODULES": "jobsys.chaos.jobs",
            "WORKER_QUEUES": QUEUE,
            "LOG_FILE": str(directory / "workers.jsonl"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
            LEDGERS: str(directory),
            MARK: self._mark,
        }
        own_settings = Settings(_env_file=None, database_url=self.url, job_modules=["jobsys.chaos.jobs"])
        self.direct = JobSystem(own_settings, pool_size=2)
        through = own_settings.model_copy(update={"database_url": self.proxy.url})
        self.through_proxy = JobSystem(through, pool_size=2)
        self.through_proxy.database.wait = 1.0

    def start_workers(self, **environment: str) -> None:
        """Start a supervisor with its processes; returns when they are known to the database."""
        with self.log.open("ab") as log:
            self._supervisor = subprocess.Popen(
                [*dies_with_us("TERM"), sys.executable, "-m", "jobsys", "worker"],
                env=self._environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if not wait_until(lambda: len(self.workers()) == PROCESSES and self._serving() >= PROCESSES, 30):
            raise RuntimeError(f"the worker processes did not start; see {self.log}")

    @property
    def supervisor(self) -> psutil.Process | None:
        """The supervisor, while it lives."""
        running = self._supervisor is not None and self._supervisor.poll() is None
        return psutil.Process(self._supervisor.pid) if running and self._supervisor is not None else None

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live, those of dead supervisors included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                    found.append(process)
        supervisor = self._supervisor.pid if self._supervisor is not None else None
        return [process for process in found if process.pid != supervisor]

    def stop_workers(self) -> None:
        """SIGTERM, and wait for the end."""
        if (supervisor := self.supervisor) is not None and self._supervisor is not None:
            supervisor.send_signal(signal.SIGTERM)
            self._supervisor.wait(30)

    def kill_supervisor(self) -> None:
        """SIGKILL, and start another when the processes of the old one have ended."""
        if (supervisor := self.supervisor) is not None:
            supervisor.kill()
        if self._supervisor is not None:
            self._supervisor.wait()
        wait_until(lambda: not self.workers(), 15)
        self.start_workers()

    def load(self) -> Load:
        """Begin a stream of jobs."""
        return Load(self)

    def facts(self) -> dict[str, int]:
        """What has to be the same after a fault as before: connections, threads, processes, locks, open transactions."""
        workers = self.workers()
        threads = 0
        for process in workers:
            with contextlib.suppress(psutil.Error):
                threads = max(threads, process.num_threads())
        [(locks, idle)] = self.query(FACTS)
        return {
            "connections": len(self.proxy),
            "threads": threads,
            "processes": len(workers),
            "advisory locks": locks,
            "open transactions": idle,
        }

    def query(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of a statement on a connection that leads not through the proxy."""
        with self.direct.database.connection() as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        """End the processes, and whatever is left of them."""
        if (supervisor := self.supervisor) is not None:
            supervisor.send_signal(signal.SIGTERM)
            with contextlib.suppress(psutil.TimeoutExpired):
                supervisor.wait(15)
        for process in [*self.workers(), *filter(None, [self.supervisor])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._supervisor is not None:
            self._supervisor.wait()
        self._forget()
        self.proxy.close()
        self.direct.close()
        self.through_proxy.close()

    def _forget(self) -> None:
        """Leave no trace in the installation's lists and numbers."""
        self.query("delete from job_types where queue = %(queue)s", queue=QUEUE)
        if not self.query("select 1 from jobs where queue = %(queue)s and status = 'PENDING' limit 1", queue=QUEUE):
            self.query("delete from tally_log where queue = %(queue)s", queue=QUEUE)
            self.query("delete from tallies where queue = %(queue)s", queue=QUEUE)
            self.query("delete from measurements where labels->>'queue' = %(queue)s", queue=QUEUE)

    def _serving(self) -> int:
        try:
            return sum(worker.alive and worker.queues == [QUEUE] for worker in self.direct.workers())
        except DatabaseUnavailable:
            return 0


class Load(threading.Thread):
    """Submits jobs at an even pace, half of them through the proxy, and remembers what it was told."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(name="chaos load", daemon=True)
        self.group = new_job_id()
        self.ledger = stage._directory / f"ledger-{self.group}"
        self.submitted: list[Submitted] = []
        self._stage = stage
        self._random = random.Random(stage.random.random())
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        began, number = time.monotonic(), 0
        while not self._stopped.is_set():
            number += 1
            self._submit(number)
            behind = time.monotonic() - began - number / JOBS_PER_SECOND
            if behind < 0:
                self._stopped.wait(-behind)
            else:
                began += behind  # an outage is not caught up on

    def stop(self) -> None:
        """Submit no more."""
        self._stopped.set()
        self.join()

    def completed(self) -> int:
        """How many jobs of the chaos queue have ended so far, whoever submitted them."""
        counts = self._stage.direct.database.run("counts")
        return sum(entered for queue, _, status, entered, _ in counts if queue == QUEUE and status in ENDS)

    def rate(self, seconds: float) -> float:
        """Ends per second, from now on for so long."""
        before, began = self.completed(), time.monotonic()
        time.sleep(seconds)
        return (self.completed() - before) / (time.monotonic() - began)

    def unfinished(self) -> int:
        """How many jobs of this stream have not ended."""
        statement = "select count(*) from jobs where group_id = %(group)s and finished_at is null"
        return int(self._stage.query(statement, group=self.group)[0][0])

    def rows(self) -> list[Row]:
        """The jobs of this stream as the database has them."""
        statement = "select id::text, (payload->>'number')::integer, status::text, attempt, crashes from jobs where group_id = %(group)s"
        return [Row(*row) for row in self._stage.query(statement, group=self.group)]

    def runs(self) -> list[Run]:
        """The runs they wrote down."""
        return read(self.ledger)

    def remove(self) -> None:
        """Leave no job of this stream behind."""
        page = "select id from jobs where group_id = %(group)s limit 1000"
        while self._stage.query(f"delete from jobs where id = any(array({page})) returning 1", group=self.group):
            pass
        self.ledger.unlink(missing_ok=True)

    def _submit(self, number: int) -> None:
        system = self._stage.direct if number % 2 else self._stage.through_proxy
        fail_times = 1 if self._random.random() < 0.05 else 0
        payload = {"number": number, "ledger": self.ledger.name, "seconds": self._random.uniform(0, 0.03), "fail_times": fail_times}
        try:
            job = system.submit("CHAOS_STEP", payload, group_id=self.group)
            self.submitted.append(Submitted(number, job.id, fail_times))
        except DatabaseUnavailable:
            self.submitted.append(Submitted(number, None, fail_times))


def wait_until(predicate: Callable[[], Any], timeout: float) -> bool:
    """Whether it came true within so many seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(DatabaseUnavailable):
            if predicate():
                return True
        time.sleep(0.1)
    return False
