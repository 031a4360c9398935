"""A PostgreSQL of its own with durable commits, a fresh database per run, and worker processes as the Procfile starts them."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from jobsys import db, migrations
from jobsys.local import Postgres, dies_with_us
from jobsys.settings import Settings
from jobsys.system import JobSystem
from tests.benchmarks.marks import Marks

CHECKOUT = Path(__file__).parent.parent.parent
JOB_TYPES = "tests.benchmarks.job_types"
PROCESSES, THREADS = 2, 8
QUICK, USUAL, FULL = "quick", "usual", "full"
_numbers = itertools.count(1)


class Bench:
    """Where measurements are made, and how large they are. `BENCH_DATABASE_URL` names a server to use instead of our own."""

    def __init__(self, server: str, size: str, log: Path | None = None) -> None:
        self.server = server
        self.size = size
        self.log = log
        """What PostgreSQL logs, where the server is our own."""

    def sized(self, usual: int, *, quick: int | None = None, full: int | None = None) -> int:
        """How many, in a run of this size. A quick one is for trying the suite out: its numbers say little."""
        return {QUICK: usual // 20 if quick is None else quick, USUAL: usual, FULL: full or usual}[self.size]

    @property
    def runs(self) -> int:
        """How often the same is measured."""
        return 1 if self.size == QUICK else 3

    @property
    def few_runs(self) -> int:
        """The same for what takes long, or is a median of many already."""
        return min(self.runs, 3 if self.size == FULL else 2)

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a fresh and empty database."""
        name = f"jobsys_bench_{os.getpid()}_{next(_numbers)}"
        execute(self.server, f"create database {name}")
        try:
            yield urlunsplit(urlsplit(self.server)._replace(path=f"/{name}"))
        finally:
            execute(self.server, f"drop database {name} with (force)")

    @contextlib.contextmanager
    def system(self) -> Iterator[JobSystem]:
        """jobsys on a fresh, migrated database."""
        with self.database() as url:
            migrations.migrate(url)
            system = JobSystem(Settings(_env_file=None, database_url=url, job_modules=[JOB_TYPES]))
            try:
                yield system
            finally:
                system.close()

    @contextlib.contextmanager
    def marks(self) -> Iterator[Marks]:
        """A file for marked jobs to write to."""
        with tempfile.TemporaryDirectory(prefix="jobsys-marks-") as directory:
            Path(directory).chmod(0o755)
            yield Marks(Path(directory))

    @contextlib.contextmanager
    def workers(
        self, system: JobSystem, *, processes: int = PROCESSES, threads: int = THREADS, marks: Marks | None = None
    ) -> Iterator[int]:
        """`jobsys worker`, until the block ends; the number of its process."""
        env = environment(system, WORKER_PROCESSES=str(processes), WORKER_THREADS=str(threads))
        with program([sys.executable, "-m", "jobsys", "worker"], env | (marks.environment if marks else {})) as process:
            wait_until(lambda: _registered(system) == processes, f"{processes} workers are there", process=process)
            yield process.pid


@contextlib.contextmanager
def program(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A running program; it is told to end when the block ends, and its output goes to stderr."""
    process = subprocess.Popen([*dies_with_us("TERM"), *command], env=env, cwd=tempfile.gettempdir(), stdout=sys.stderr)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(system: JobSystem, **env: str) -> dict[str, str]:
    """What our programs are started with."""
    url = str(system.settings.database_url)
    ours = {"DATABASE_URL": url, "JOB_MODULES": JOB_TYPES, "LOG_LEVEL": "WARNING", "PYTHONPATH": str(CHECKOUT)}
    return os.environ | ours | env


@contextlib.contextmanager
def bench(size: str = USUAL) -> Iterator[Bench]:
    """The place to measure in, for the time of the block."""
    if given := os.environ.get("BENCH_DATABASE_URL"):
        yield Bench(given, size)
        return
    with tempfile.TemporaryDirectory(prefix="jobsys-bench-") as directory:
        postgres = Postgres(Path(directory) / "data", durable=True)
        postgres.start()
        try:
            yield Bench(urlunsplit(urlsplit(postgres.url)._replace(path="/postgres")), size, postgres.log)
        finally:
            postgres.stop()


def fill(system: JobSystem, jobs: int, *, type: str = "NOOP", payload: str = "{}") -> None:
    """So many jobs by one statement: all of them become visible at once."""
    insert = """
        insert into jobs (type, queue, priority, max_attempts, payload)
        select %s, 'default', 0, 4, %s::jsonb from generate_series(1, %s)
    """
    execute(str(system.settings.database_url), insert, (type, payload, jobs))


def vacuum(system: JobSystem) -> None:
    """Let every run begin with a table in order."""
    execute(str(system.settings.database_url), "vacuum analyze jobs")


def wait_for_completed(system: JobSystem, jobs: int, timeout: float = 600.0) -> None:
    """Return when so many jobs are finished."""
    wait_until(lambda: system.counts()["COMPLETED"] >= jobs, f"{jobs} jobs are finished", timeout=timeout)


def drain_rate(system: JobSystem, type: str = "NOOP") -> float:
    """Jobs per second by the database's clock, from the first start to the last end."""
    rate = "select count(*) / extract(epoch from max(finished_at) - min(started_at)) from jobs where status = 'COMPLETED' and type = %s"
    return float(execute(str(system.settings.database_url), rate, (type,))[0][0])


def wait_until(true: Callable[[], bool], what: str, *, timeout: float = 60.0, process: subprocess.Popen[bytes] | None = None) -> None:
    """Return when it is true. Raises TimeoutError with what was waited for, RuntimeError when the process has ended meanwhile."""
    deadline = time.monotonic() + timeout
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s until {what}")
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"a process ended with {process.returncode} before {what}")
        time.sleep(0.2)


def execute(url: str, statement: str, parameters: tuple[Any, ...] | None = None) -> list[tuple[Any, ...]]:
    """One statement on a connection of its own; the rows it returns."""
    with contextlib.closing(db.Database(url).connect()) as connection, connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def alternate(contenders: Mapping[str, Callable[[], float]], runs: int, *, slow: Collection[str] = ()) -> dict[str, list[float]]:
    """Each contender's values, run in turns; the slow ones' of two runs at most. A peer that fails is named on stderr and left out; jobsys
    and the floor may not fail."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(1, runs + 1):
        for name in [name for name in values if run <= 2 or name not in slow]:
            try:
                values[name].append(contenders[name]())
                tell(f"  run {run}: {name} {values[name][-1]:,.2f}")
            except Exception as error:
                if name in ("jobsys", "floor"):
                    raise
                tell(f"  {name} is left out: {type(error).__name__}: {error}")
                del values[name]
    return values


def tell(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def machine(server: str) -> str:
    """What the numbers were measured on."""
    asked = "select current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit')"
    version, fsync, commit = execute(server, asked)[0]
    software = f"Python {platform.python_version()}, PostgreSQL {version.split()[0]} (fsync {fsync}, synchronous_commit {commit})"
    if node := shutil.which("node"):
        software += f", Node.js {subprocess.run([node, '--version'], capture_output=True, text=True).stdout.strip()}"
    return f"{os.cpu_count()} cores, {software}"


def versions(*distributions: str) -> dict[str, str]:
    """The installed versions of those that are installed."""
    found = {}
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _registered(system: JobSystem) -> int:
    return int(execute(str(system.settings.database_url), "select count(*) from workers")[0][0])
