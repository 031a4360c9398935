"""The worker process put together, and the supervisor above it.

`jobsys worker` keeps WORKER_PROCESSES processes running. It does so itself because Dramatiq's launcher ends every sibling when one dies,
and so one poisonous job could stop the service. `dramatiq jobsys.worker:broker` works too, for whoever prefers it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq

from jobsys import db, logs, tracing
from jobsys.errors import DatabaseUnavailable, SettingsError
from jobsys.jobs import settings as job_settings
from jobsys.presence import Presence
from jobsys.settings import Settings
from jobsys.system import JobSystem

REPLACED = 75
"""Exit status of a process that asks to be replaced (EX_TEMPFAIL)."""
SIGN_OF_LIFE = 1.0
"""How often, in seconds, a worker process tells its supervisor that its threads get on."""
PATIENCE = 5.0
"""Seconds that a process may be silent beyond WORKER_LOST_AFTER; by then others have its jobs."""
TICK = 0.1
"""How soon, in seconds, the supervisor hears a signal, and a process sees what its jobs did to it…"""
IDLE_TICK = 0.5
"""…and how soon when none ran as it looked last."""
LONGEST_PAUSE = 30.0
HEALTHY_AFTER = 30.0
"""Seconds a process must have lived for its end not to make the pause before its successor longer."""
log = logs.get("jobsys.worker")


def main(settings: Settings) -> int:
    """Run the workers until SIGTERM or SIGINT; a second one hurries. 0 when everything ended in good order."""
    logs.configure(settings, process="worker")
    # What is wrong with the settings or the modules of job types is said here, once, and not by every process.
    system = JobSystem(settings)
    declared = system.broker.get_declared_queues()
    if unknown := set(settings.worker_queues) - declared:
        raise SettingsError(f'WORKER_QUEUES: no job type has the queue "{min(unknown)}"; there are {", ".join(sorted(declared))}')
    system.close()
    return Supervisor(settings).run()


class Supervisor:
    """Starts worker processes, restarts those that die with a growing pause, and ends them when it ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._children = [Child(number) for number in range(settings.worker_processes)]
        self._signals = 0

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        log.info("starting workers", processes=len(self._children), threads=self._settings.worker_threads)
        forwarded = 0
        hard_end = float("inf")
        longest_silence = self._settings.worker_lost_after + PATIENCE
        while True:
            for child in self._children:
                if child.reap() and self._signals == 0:
                    self._mourn(child)
                if self._signals == 0 and child.process is None and time.monotonic() >= child.start_at:
                    child.start()
                if child.process is not None and child.silence() > longest_silence:
                    log.error("a worker process is stuck and is killed", pid=child.pid)
                    child.kill()
            if self._signals > forwarded:
                forwarded = self._signals
                hard_end = time.monotonic() + (self._settings.shutdown_grace if forwarded == 1 else 0) + 10
                for child in self._children:
                    child.send(signal.SIGTERM)
            if self._signals and all(child.process is None for child in self._children):
                log.info("all workers have ended")
                return 0
            if time.monotonic() > hard_end:
                log.error("workers did not end in time and are killed")
                for child in self._children:
                    child.send(signal.SIGKILL)
                return 1
            time.sleep(TICK)

    def _on_signal(self, *_: Any) -> None:
        self._signals += 1  # no lock may be taken here, by an Event, say: this thread may just have it

    def _mourn(self, child: Child) -> None:
        log.warning(
            "a worker process ended and will be replaced", pid=child.pid, status=_reading(child.status), pause=round(child.pause, 1)
        )
        if child.status not in (0, REPLACED):
            try:
                self._report_death(child)
            except Exception as error:
                log.warning("its death could not be reported; others will notice its silence", pid=child.pid, error=str(error))

    def _report_death(self, child: Child) -> None:
        # It must not wait for long, on a lock of a process that is stuck, say: which only this one can end.
        database = db.Database(db.url_of(self._settings), wait=2, name="jobsys supervisor", patience=2)
        for _ in range(5):
            if database.run("report_death", host=socket.gethostname(), pid=child.pid):
                break
            time.sleep(0.1)  # its session may take a moment to end
        database.close()


class Child:
    """One place in the row of worker processes, and the process that has it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.status = 0
        self.pause = 0.0
        self.start_at = 0.0
        self._started_at = 0.0
        self._line: socket.socket | None = None
        self._spoke = False
        self._silent = 0.0
        self._listened_at = 0.0

    def start(self) -> None:
        """Start the process, in a session of its own so that a terminal's Ctrl-C reaches only the supervisor.

        A line leads to it: when this process is killed, its end closes, and the child sees that; when the child's threads don't get on, it
        says nothing any more."""
        if self._line is not None:
            self._line.close()
        self._line, theirs = socket.socketpair()
        self._line.setblocking(False)
        with theirs:
            command = [sys.executable, "-m", "jobsys.worker", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        self.pid = self.process.pid
        self._spoke = False
        self._started_at = self._listened_at = time.monotonic()

    def silence(self) -> float:
        """For how many seconds the process has said nothing any more. While this one is stopped itself, no time passes for the other; nor
        while the other one is, by a debugger, say."""
        now = time.monotonic()
        self._silent += 0.0 if _is_stopped(self.pid) else min(now - self._listened_at, SIGN_OF_LIFE)
        self._listened_at = now
        with contextlib.suppress(OSError):
            if self._line is not None and self._line.recv(4096):
                self._spoke, self._silent = True, 0.0
        return self._silent if self._spoke else 0.0

    def kill(self) -> None:
        """End a process that can't do so by itself. SIGQUIT first: it then tells on standard error what its threads are at."""
        self.send(signal.SIGQUIT)
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        self.send(signal.SIGKILL)

    def reap(self) -> bool:
        """Whether the process has ended since last asked; then also when its successor may start."""
        if self.process is None or self.process.poll() is None:
            return False
        self.status = self.process.returncode
        self.process = None
        now = time.monotonic()
        if self.status == REPLACED or now - self._started_at > HEALTHY_AFTER:
            self.pause = 0.0
        else:
            self.pause = min(max(0.5, self.pause * 2), LONGEST_PAUSE)
        self.start_at = now + self.pause
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, if there is one."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def run_process(settings: Settings, *, lifeline: int | None = None) -> int:
    """One worker process, until it is told to stop; its exit status."""
    logs.configure(settings, process="worker")
    if sys.stderr is not None:
        # Where a job crashes the process, and, when it is stuck, where: both without the interpreter's help.
        faulthandler.enable(all_threads=False)
        faulthandler.register(signal.SIGQUIT, chain=True)
    os.register_at_fork(after_in_child=_forget_signals)
    ends: list[str] = []
    told = threading.Lock()
    told.acquire()

    def end(reason: str) -> None:
        ends.append(reason)
        with contextlib.suppress(RuntimeError):  # a bare lock, because a signal may come anywhere: see Supervisor
            told.release()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end("signal"))
    if lifeline is not None:
        threading.Thread(target=_watch, args=(lifeline, end), daemon=True).start()
    system = JobSystem(settings, pool_size=settings.worker_threads + 2)
    while not ends and not _prepared(system):
        time.sleep(10 * TICK)
    system.database.close()  # idle until a job submits another
    job_settings()  # read before a job can change the directory that .env is in
    worker = dramatiq.Worker(
        system.broker,
        queues=set(settings.worker_queues),
        worker_threads=settings.worker_threads,
        worker_timeout=int(settings.poll_interval * 1000),
    )
    system.broker.emit_after("process_boot")
    # What was made until now stays: the collector needn't look at it again. And jobs come by the hundred: not after every 700 objects.
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    unfit = _check(worker)
    worker.start()
    presence = system.broker.attend(threads=settings.worker_threads)
    while not ends and not presence.must_end.is_set():
        told.acquire(timeout=TICK if presence.running else IDLE_TICK)
        if reason := unfit():
            log.error("this process is not fit to go on, and will be replaced", reason=reason)
            presence.must_end.set()
    reasons = len(ends)
    presence.stop_claiming()
    deadline = time.monotonic() + settings.shutdown_grace
    # A second signal hurries; a job that can't be stopped is written off already and is not waited for.
    while _unfinished(presence) and time.monotonic() < deadline and len(ends) <= max(1, reasons):
        time.sleep(0.02)
        presence.stop_claiming()
    worker.stop(timeout=0 if presence.unfinished else 2000)
    system.close()
    tracing.close()
    log.info("worker has ended", reason=ends[0] if ends else "it has to be replaced")
    return 0 if ends else REPLACED


def _check(worker: dramatiq.Worker) -> Callable[[], str | None]:
    """What tells whether the process is still as it is now, whatever its jobs did: None, or what is wrong."""
    descriptor = os.pipe()[0]
    opened, recursion_limit = os.fstat(descriptor), sys.getrecursionlimit()
    look_at = time.monotonic()  # at the threads, which takes ten times as long as all else

    def check() -> str | None:
        nonlocal look_at
        if sys.getrecursionlimit() < recursion_limit:
            sys.setrecursionlimit(recursion_limit)
        try:
            if not os.path.samestat(opened, os.fstat(descriptor)):
                raise OSError
        except OSError:
            return "somebody closed its file descriptors"
        if time.monotonic() >= look_at:
            look_at = time.monotonic() + SIGN_OF_LIFE
            for thread in [*worker.workers, *worker.consumers.values(), *worker.broker.presence.threads_it_needs]:
                if not thread.is_alive():
                    return f"its thread {thread.name} has ended"
        return None

    return check


def _is_stopped(pid: int) -> bool:
    """Whether somebody stopped that process, as far as Linux tells."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat", "rb") as stat:
        return stat.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def _forget_signals() -> None:
    """In the child of a fork: it ends when it is told to, like any process, and is no worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _unfinished(presence: Presence) -> bool:
    """Whether a job runs, is just about to, or has ended and that is not written."""
    started = 0 if presence.must_end.is_set() else presence.work.unfinished_tasks
    return bool(presence.unfinished or started or len(presence.settlements))


def _prepared(system: JobSystem) -> bool:
    """Whether the database is there, with its tables; if so the ingestion queue has its pace."""
    try:
        limit_ingestion(system)
    except DatabaseUnavailable as error:
        log.warning("waiting for the database", error=str(error))
        return False
    return True


def limit_ingestion(system: JobSystem) -> None:
    """Give the ingestion queue the pace of INGEST_RATE. The setting is the truth at every start of a worker that serves it."""
    count, period = system.settings.ingest_rate
    queue = system.types.find("INGEST_BATCH").queue
    if not system.settings.worker_queues or queue in system.settings.worker_queues:
        system.limit(queue, rate=(count, period) if count else None)
    else:
        system.database.run("limited_queues")


def _watch(lifeline: int, end: Callable[[str], None]) -> None:
    """Give the supervisor signs of life until its end of the line closes, which happens when it dies."""
    with contextlib.suppress(OSError), socket.socket(fileno=lifeline) as line:
        line.settimeout(SIGN_OF_LIFE)
        while True:
            with contextlib.suppress(TimeoutError):
                line.send(b".")
                line.recv(1)
                break
    end("the supervisor is gone")


def _reading(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else str(status)


def __getattr__(name: str) -> object:
    if name == "broker":
        settings = Settings()
        broker = JobSystem(settings, pool_size=settings.worker_threads + 2).broker
        dramatiq.set_broker(broker)
        return broker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    status = run_process(Settings(), lifeline=int(sys.argv[1]) if len(sys.argv) > 1 else None)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    # Threads that ignore everything must not keep the process.
    os._exit(status)
