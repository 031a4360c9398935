"""`jobsys dev`: everything up on this machine, by the Procfile's lines, and everything down again on Ctrl-C or SIGTERM.

What is started first stops last: PostgreSQL, the mail catcher, web, workers. A tool like honcho stops all at once and kills after
seconds; here running jobs get their SHUTDOWN_GRACE while the database is still there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2

from jobsys import db
from jobsys.api.access import check
from jobsys.local import LocalError, MailCatcher, Postgres, dies_with_us
from jobsys.secrecy import mask
from jobsys.settings import Settings

HEALTHY_WITHIN = 30.0
_COLOURS = {"release": "35", "web": "36", "worker": "33"}


def dev(settings: Settings) -> int:
    """Start everything, say where it is, and stay. 0 after Ctrl-C or SIGTERM; 1 when something ended by itself.

    Raises LocalError, before anything is left running, when something on this machine is in the way.
    """
    stop = StopRequest()
    try:
        with contextlib.ExitStack() as up:
            try:
                return _up(settings, stop, up)
            finally:
                stop.expected = True
    except AskedToStop:
        return 0
    except OSError as error:
        raise LocalError(f"{error.filename or 'starting'}: {error.strerror}") from error


def procfile() -> dict[str, str]:
    """The commands of the Procfile by name: `release`, `web`, `worker`."""
    lines = Path(__file__).with_name("Procfile").read_text().splitlines()
    return {name: command.strip() for name, _, command in (line.partition(":") for line in lines) if command}


def _up(settings: Settings, stop: StopRequest, up: contextlib.ExitStack) -> int:
    check(settings)
    killed = up.enter_context(_alone_in(settings.data_dir))
    _check_directory("OUTPUT_DIR", settings.output_dir)
    _check_port(settings, patience=10.0 if killed else 0.0)

    added = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]), "PYTHONUNBUFFERED": "1"}
    places = {"Files": str(settings.output_dir)}
    postgres = None
    if settings.database_url is None:
        postgres = Postgres(settings.data_dir)
        up.callback(postgres.stop)
        added["DATABASE_URL"] = places["Database"] = postgres.start()
    else:
        _check_database(db.url_of(settings))
    if settings.smtp_host is None:
        catcher = _catch_mail(settings)
        up.callback(catcher.stop)
        added |= {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(catcher.port)}
        places["Mail"] = f"{catcher.directory / 'new'} (SMTP server: 127.0.0.1:{catcher.port})"

    commands = procfile()
    processes = Processes(stop, os.environ | added)
    processes.start("release", commands["release"])
    up.callback(processes.stop, "release", 5.0)
    if processes.wait("release") != 0:
        processes.say("the database could not be migrated; the reason stands above")
        return 1
    processes.start("web", commands["web"])
    up.callback(processes.stop, "web", 10.0)
    processes.start("worker", commands["worker"])
    up.callback(processes.stop, "worker", settings.shutdown_grace + 5.0)
    return _stay(settings, processes, postgres, places)


def _stay(settings: Settings, processes: Processes, postgres: Postgres | None, places: dict[str, str]) -> int:
    announced, patient_until = False, time.monotonic() + HEALTHY_WITHIN
    while True:
        for name in ("web", "worker"):
            if (status := processes.status(name)) is not None:
                processes.say(f"{name} ended by itself, {_in_words(status)}: stopping everything")
                return 1
        if postgres is not None and not postgres.running:
            processes.say(f"PostgreSQL ended by itself, see {postgres.log}: stopping everything")
            return 1
        if not announced and _healthy(settings):
            processes.say(_welcome(settings, places), prefix=False)
            announced = True
        elif not announced and time.monotonic() > patient_until:
            processes.say(f"{_address(settings)}/health is not well yet; the lines above may say why")
            patient_until += HEALTHY_WITHIN
        time.sleep(0.1)


class AskedToStop(BaseException):
    """Ctrl-C, SIGTERM, or the terminal was closed."""


class StopRequest:
    """The first signal to stop is raised where the main thread is; those that come while everything stops are counted, and hurry it."""

    def __init__(self) -> None:
        self.expected = False
        self.times = 0
        closed = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]  # under nohup it stays ignored
        for number in (signal.SIGINT, signal.SIGTERM, *closed):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.times += 1
        if not self.expected:
            self.expected = True
            raise AskedToStop


class Processes:
    """The children, each in a session of its own so that a terminal's Ctrl-C reaches only us, their lines printed behind their names."""

    def __init__(self, stop: StopRequest, environment: dict[str, str]) -> None:
        self._stop = stop
        self._colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._environment = environment | ({"FORCE_COLOR": "1"} if self._colours else {})
        self._running: dict[str, tuple[subprocess.Popen[bytes], threading.Thread]] = {}
        self._prefix = dies_with_us("TERM")
        self._printing = threading.Lock()

    def start(self, name: str, command: str) -> None:
        """Start a line of the Procfile, by a shell that makes way for it: its process is the one that gets our signals."""
        process = subprocess.Popen(
            [*self._prefix, "sh", "-c", f"exec {command}"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        reader = threading.Thread(target=self._relay, args=(name, process), name=f"output of {name}", daemon=True)
        self._running[name] = process, reader
        reader.start()

    def status(self, name: str) -> int | None:
        """How it ended, as `Popen.returncode`; None while it runs."""
        return self._running[name][0].poll()

    def wait(self, name: str) -> int:
        """Wait for its end, and until all it said is printed; its `Popen.returncode`."""
        process, reader = self._running[name]
        status = process.wait()
        reader.join(timeout=5)
        del self._running[name]
        return status

    def stop(self, name: str, grace: float) -> None:
        """SIGTERM, and SIGKILL to it and all it started after `grace` seconds, or when hurried. Nothing of it is left then."""
        if name not in self._running:
            return
        process, reader = self._running.pop(name)
        times = self._stop.times  # before it is said: whoever reads it may be quick
        if process.poll() is None:
            self.say(f"stopping {name} (at most {grace:g} s; Ctrl-C again hurries)")
        for patience in (grace, 5.0):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                self._await_end(process, patience, times)
                times = self._stop.times
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=5)

    def say(self, text: str, prefix: bool = True) -> None:
        """Print lines of our own."""
        self._print("dev" if prefix else "", text, "1")

    def _await_end(self, process: subprocess.Popen[bytes], patience: float, times: int) -> None:
        deadline = time.monotonic() + patience
        while process.poll() is None and time.monotonic() < deadline and self._stop.times == times:
            time.sleep(0.05)

    def _relay(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._print(name, line.decode(errors="replace").rstrip("\r\n"), _COLOURS[name])

    def _print(self, name: str, text: str, colour: str) -> None:
        prefix = f"{name:<7} | " if name else ""
        if self._colours:
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        # where the terminal has gone, the processes still have to be read, or they would block
        with self._printing, contextlib.suppress(OSError, ValueError):
            sys.stdout.write("".join(f"{prefix}{line}\n" for line in text.split("\n")))
            sys.stdout.flush()


@contextlib.contextmanager
def _alone_in(data_dir: Path) -> Iterator[bool]:
    """Keeps a second `jobsys dev` out of DATA_DIR. Yields whether the one before was killed."""
    _check_directory("DATA_DIR", data_dir)
    with (data_dir / "lock").open("a+") as lock:
        lock.seek(0)
        before = lock.read().strip()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LocalError(
                f"{data_dir} is in use by another bin/dev (process {before}): "
                "stop that one, or give this one a DATA_DIR and a PORT of its own"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        try:
            yield before != ""
        finally:
            lock.truncate(0)


def _check_directory(name: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise LocalError(f"{name} {path} can't be written ({error.strerror}): set {name} to a directory of yours") from None


def _check_port(settings: Settings, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(0.2)  # what a killed bin/dev had started may be about to end
            elif error.errno == errno.EADDRINUSE:
                raise LocalError(f"port {settings.port} is in use: stop what listens there, or set PORT to another one") from None
            else:
                raise LocalError(f"can't listen on {settings.host}, port {settings.port} ({error.strerror}): set HOST and PORT") from None


def _check_database(url: str) -> None:
    try:
        psycopg2.connect(url, connect_timeout=5).close()
    except psycopg2.OperationalError as error:
        reason = mask(" ".join(str(error).split()))
        raise LocalError(
            f"DATABASE_URL leads to no PostgreSQL that answers ({reason}): "
            "start it, correct DATABASE_URL, or unset it to have one started here"
        ) from None
    except psycopg2.ProgrammingError:
        raise LocalError("DATABASE_URL is not an address like postgresql://user:password@host:5432/name: correct it or unset it") from None


def _catch_mail(settings: Settings) -> MailCatcher:
    """On SMTP_PORT; when that was not set and its default is taken, on a free port."""
    chosen = "smtp_port" in settings.model_fields_set
    for port in (settings.smtp_port, 0):
        catcher = MailCatcher(settings.data_dir / "mail", port)
        try:
            catcher.start()
            return catcher
        except OSError as error:
            if chosen or port == 0:
                raise LocalError(
                    f"the mail catcher can't listen on port {port} ({error.strerror}): "
                    "set SMTP_PORT to a free port, or SMTP_HOST to a mail server of yours"
                ) from None
    raise AssertionError("unreachable")


def _healthy(settings: Settings) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=2)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def _address(settings: Settings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def _welcome(settings: Settings, places: dict[str, str]) -> str:
    address = _address(settings)
    shown = {"API": f"{address}/jobs", "Admin": f"{address}/admin/ui", "Health": f"{address}/health"} | places
    job = '{"type": "EMAIL_SEND", "payload": {"to": "you@example.org", "subject": "Hello", "body": "It works."}}'
    lines = [f"  {name:<9} {place}" for name, place in shown.items()]
    curl = f"curl -s {address}/jobs -H 'Content-Type: application/json' -d {shlex.quote(job)}"
    return "\n".join(["", "jobsys is up. Ctrl-C stops it.", "", *lines, "", "Try it:", f"  {curl}", ""])


def _in_words(status: int) -> str:
    return f"with exit status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
