"""What `jobsys chaos` breaks. Each is a function that breaks something for some seconds, mends it, and says how often a worker died, froze
or was cut off for longer than WORKER_LOST_AFTER: so often may a job run once more."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil
import psycopg2

from jobsys.chaos import CLOCK
from jobsys.chaos.stage import LOST_AFTER, Stage, wait_until

Act = Callable[["Stage", float], int]


class Fault(NamedTuple):
    """`safe`: it touches nothing but processes and connections of its own. `overlaps`: a worker that was declared lost may still run.
    `forgets`: PostgreSQL may forget the claims of its last moments, which don't wait for the disk. `times`: so many times as long as asked
    for."""

    name: str
    run: Act
    safe: bool
    overlaps: bool
    forgets: bool
    times: float

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.run.__doc__ or "").splitlines()[0]


FAULTS: dict[str, Fault] = {}


def fault(*, safe: bool = True, overlaps: bool = False, forgets: bool = False, times: float = 1) -> Callable[[Act], Act]:
    """Register a fault under its function's name."""

    def register(function: Act) -> Act:
        name = function.__name__.replace("_", "-")
        FAULTS[name] = Fault(name, function, safe, overlaps, forgets, times)
        return function

    return register


@fault()
def worker_killed(stage: Stage, seconds: float) -> int:
    """Worker processes are killed, one after the other."""
    events = 0
    for _ in _moments(stage, seconds, 0.3, 1.2):
        if workers := stage.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                stage.random.choice(workers).kill()
                events += 1
    return events


@fault()
def supervisor_killed(stage: Stage, seconds: float) -> int:
    """The supervisor is killed; its processes notice and end, and another is started."""
    events = 0
    for _ in _moments(stage, seconds, 0.5, 2):
        stage.kill_supervisor()
        events += 1
    return events


@fault()
def everything_killed(stage: Stage, seconds: float) -> int:
    """The supervisor and all its processes are killed at once, as when the machine fails."""
    events = 0
    for _ in _moments(stage, seconds, 1, 3):
        for process in [*filter(None, [stage.supervisor]), *stage.workers()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        stage.kill_supervisor()
        events += 1
    return events


@fault()
def workers_replaced(stage: Stage, seconds: float) -> int:
    """The workers are told to end, and others are started, as at every release."""
    for _ in _moments(stage, seconds, 0.5, 2):
        stage.stop_workers()
        stage.start_workers()
    return 0


@fault()
def clock_moved(stage: Stage, seconds: float) -> int:
    """The workers' clock is ten minutes ahead, and then right again."""
    stage.stop_workers()
    stage.start_workers(**{CLOCK: "600"})
    time.sleep(seconds)
    stage.stop_workers()
    stage.start_workers()
    return 0


@fault(overlaps=True)
def worker_frozen(stage: Stage, seconds: float) -> int:
    """A worker process stands still for longer than WORKER_LOST_AFTER, and goes on."""
    events = 0
    for _ in _moments(stage, seconds, 0.2, 1):
        if workers := stage.workers():
            frozen = stage.random.choice(workers)
            with contextlib.suppress(psutil.NoSuchProcess):
                frozen.suspend()
                time.sleep(LOST_AFTER + 1.5)
                frozen.resume()
                events += 1
    return events


@fault()
def connections_cut(stage: Stage, seconds: float) -> int:
    """Every connection to the database is cut, again and again."""
    for _ in _moments(stage, seconds, 0.2, 1):
        stage.proxy.cut()
    return 0


@fault()
def connections_refused(stage: Stage, seconds: float) -> int:
    """The database can't be reached, for less than WORKER_LOST_AFTER."""
    for _ in _moments(stage, seconds, 1, 2):
        stage.proxy.refuses = True
        stage.proxy.cut()
        time.sleep(LOST_AFTER / 3)
        stage.proxy.refuses = False
    return 0


@fault()
def connections_slow(stage: Stage, seconds: float) -> int:
    """Each piece of data takes 20 ms longer, either way."""
    stage.proxy.delay = 0.02
    time.sleep(seconds)
    stage.proxy.delay = 0.0
    return 0


@fault(overlaps=True)
def black_hole(stage: Stage, seconds: float) -> int:
    """Nothing comes through to the database, and nobody is told, for longer than WORKER_LOST_AFTER."""
    stage.proxy.swallows = True
    time.sleep(max(seconds, LOST_AFTER + 2))
    stage.proxy.swallows = False
    return 1


@fault()
def cut_at_commit(stage: Stage, seconds: float) -> int:
    """Connections are cut when the database has heard what to commit, and its answer is lost."""
    stage.proxy.cuts_commits = lambda: stage.random.random() < 0.1
    time.sleep(seconds)
    stage.proxy.cuts_commits = lambda: False
    return 0


@fault()
def listener_lost(stage: Stage, seconds: float) -> int:
    """Only the connections that listen for notifications are cut."""
    for _ in _moments(stage, seconds, 0.2, 0.6):
        stage.proxy.cut(lambda link: link.listens)
    return 0


@fault()
def no_notifications(stage: Stage, seconds: float) -> int:
    """No notification arrives, as behind a transaction pooler."""
    stage.proxy.mutes_notifications = True
    time.sleep(seconds)
    stage.proxy.mutes_notifications = False
    return 0


@fault()
def snapshot_held(stage: Stage, seconds: float) -> int:
    """A transaction is left open, so that no dead row can be vacuumed."""
    with contextlib.closing(psycopg2.connect(stage.url)) as connection:
        connection.set_session(isolation_level="REPEATABLE READ")
        connection.cursor().execute("select count(*) from workers")
        time.sleep(seconds)
    return 0


@fault(safe=False)
def backends_terminated(stage: Stage, seconds: float) -> int:
    """Sessions of jobsys are terminated in the server, one every 200 ms."""
    statement = """
        select pg_terminate_backend(pid) from pg_stat_activity
        where starts_with(application_name, 'jobsys ') and pid <> pg_backend_pid() order by random() limit 1
    """
    for _ in _moments(stage, seconds, 0.2, 0.2):
        with contextlib.closing(psycopg2.connect(stage.url)) as connection:
            connection.cursor().execute(statement)
    return 0


@fault(safe=False)
def connections_used_up(stage: Stage, seconds: float) -> int:
    """Somebody takes every connection the server has, while ours are cut now and then."""
    taken = []
    try:
        with contextlib.suppress(psycopg2.OperationalError):
            while True:
                taken.append(psycopg2.connect(stage.url))
        stage.proxy.cut()
        time.sleep(min(seconds, LOST_AFTER * 0.6))
    finally:
        for connection in taken:
            connection.close()
    return 0


@fault(safe=False)
def database_restarted(stage: Stage, seconds: float) -> int:
    """PostgreSQL shuts down in good order and starts again."""
    return _restarted(stage, signal.SIGINT)


@fault(safe=False, overlaps=True, forgets=True)
def database_stopped_at_once(stage: Stage, seconds: float) -> int:
    """PostgreSQL stops without a checkpoint, and recovers."""
    return _restarted(stage, signal.SIGQUIT)


@fault(safe=False, overlaps=True, forgets=True)
def database_killed(stage: Stage, seconds: float) -> int:
    """PostgreSQL and all its processes are killed, and it recovers."""
    return _restarted(stage, signal.SIGKILL)


@fault(safe=False, overlaps=True, forgets=True)
def database_disk_full(stage: Stage, seconds: float) -> int:
    """The disk under PostgreSQL is full for a while."""
    assert stage.server is not None
    filler = stage.server.data_dir / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    time.sleep(seconds)
    filler.unlink()
    if not wait_until(lambda: stage.query("select 1"), 10):
        stage.server.start()
    return 1


@fault(overlaps=True, forgets=True, times=30)
def mixed(stage: Stage, seconds: float) -> int:
    """All of the above, a few seconds each, in a random order."""
    others = [each for each in possible(stage) if each.run is not mixed]
    events, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        events += stage.random.choice(others).run(stage, stage.random.uniform(1, 4))
        time.sleep(stage.random.uniform(0, 1))
    return events


def possible(stage: Stage) -> list[Fault]:
    """What can be broken on this stage."""
    impossible = {name for name, fault in FAULTS.items() if not fault.safe and stage.server is None}
    if stage.server is not None and not stage.server.data_dir.is_mount():
        impossible.add("database-disk-full")
    return [fault for name, fault in FAULTS.items() if name not in impossible]


def _restarted(stage: Stage, how: signal.Signals) -> int:
    assert stage.server is not None and stage.server._process is not None
    postmaster = psutil.Process(stage.server._process.pid)
    family = [postmaster, *postmaster.children(recursive=True)] if how == signal.SIGKILL else [postmaster]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(how)
    stage.server._process.wait(30)
    time.sleep(stage.random.uniform(0, 1))
    stage.server.start()
    wait_until(lambda: stage.query("select 1"), 20)
    # A claim that was committed less than 0.6 s before a crash may be forgotten, and an outage may outlast WORKER_LOST_AFTER.
    return 1


def _moments(stage: Stage, seconds: float, shortest: float, longest: float) -> Iterator[None]:
    """Some moments in the next so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(stage.random.uniform(shortest, longest))
        yield
