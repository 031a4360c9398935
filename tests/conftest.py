"""What tests stand on: a real PostgreSQL with a clone of the migrated database for each test, and the real processes.

The server is the one of DATABASE_URL or TEST_DATABASE_URL, or else our own from the wheel, in a temporary directory. Worker and web
server are started as the Procfile starts them, and no test may leave a process behind.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import default as modern
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg2
import pytest

from jobsys.local import MailCatcher, Postgres
from jobsys.settings import Settings

CHECKOUT = Path(__file__).parent.parent
NO_DATABASE = Settings(_env_file=None, database_url="postgresql://127.0.0.1:1/none")
T = TypeVar("T")


SLOW = (
    *("test_worker.py", "test_abuse.py", "test_failed_statements.py", "test_schemathesis.py", "test_dev.py", "test_chaos.py"),
    *("test_migrations.py", "test_deployment.py", "test_smoke.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


def eventually(predicate: Callable[[], T], timeout: float = 10.0, interval: float = 0.05) -> T:
    """The first true thing `predicate` returns; fails when there is none within `timeout` seconds. It may assert, and miss keys."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            value = predicate()
            if value:
                return value
            complaint = f"still {value!r} after {timeout:g} s"
        except (AssertionError, LookupError) as error:
            complaint = repr(error)
        if time.monotonic() > deadline:
            raise AssertionError(complaint)
        time.sleep(interval)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A TCP port of 127.0.0.1 that refuses connections until the test ends: nobody else gets it meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def environment(settings: Settings, **overrides: Any) -> dict[str, str]:
    """This process's environment with `settings` in it and no other setting; `overrides` in capitals win."""
    names = {name.upper() for name in Settings.model_fields}
    inherited = {name: value for name, value in os.environ.items() if name.upper() not in names}
    given = {name.upper(): value for name, value in settings.model_dump().items()}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    added = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(CHECKOUT), "PATH": path}
    return inherited | added | {name: _text(value) for name, value in (given | overrides).items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, tuple):
        return f"{value[0]}/{value[1]:f}s" if value[0] else "0"
    if isinstance(value, list):
        return ",".join(str(each) for each in value)
    return f"{value:f}" if isinstance(value, float) else str(value)


@dataclass
class Running:
    """A started process, in a session of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        """What it has written so far, both streams."""
        return self.log.read_text(errors="replace")

    @property
    def family(self) -> list[psutil.Process]:
        """The living processes of its session: itself and whatever it started, orphans included."""
        return [each for each in psutil.process_iter() if _session(each.pid) == self.pid and is_alive(each)]

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 20.0) -> int:
        """Its exit status. Fails when it hasn't ended after `timeout` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {self.pid} still runs after {timeout:g} s; it said:\n{self.output}") from None

    def stop(self, timeout: float = 20.0) -> int:
        """SIGTERM, and its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)


class Launcher:
    """Starts processes for one test, and holds the test to leaving none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[Running] = []

    def start(self, name: str, command: list[str], env: dict[str, str], url: str = "") -> Running:
        log = self.directory / f"{name}-{len(self.started)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=env, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self.started.append(Running(process, log, url))
        return self.started[-1]

    def close(self) -> None:
        complaints = []
        for running in self.started:
            if running.process.poll() is None:
                running.signal(signal.SIGTERM)
        for running in self.started:
            try:
                running.wait()
                eventually(lambda family=running: not family.family)  # type: ignore[misc]
            except AssertionError as error:
                left = [f"{each.pid} {' '.join(each.cmdline())}" for each in running.family]
                complaints.append(f"{error}\nleft behind: {left}\n{running.log.name} says:\n{running.output}")
                for each in running.family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                running.process.wait()
        assert not complaints, "\n".join(complaints)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def is_alive(process: psutil.Process) -> bool:
    """Whether it is more than an exit status that nobody has asked for yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a database `postgres` whose user may create databases."""
    given = os.environ.get("TEST_DATABASE_URL") or os.environ.get("DATABASE_URL")
    if given:
        yield given
        return
    postgres = Postgres(tmp_path_factory.mktemp("server"), durable=False)
    postgres.start()
    yield at_database(postgres.url, "postgres")
    postgres.stop()


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a migrated, empty database."""
    from jobsys import migrations

    name = f"jobsys_test_{secrets.token_hex(4)}_template"
    execute(server, f'create database "{name}"')
    migrations.migrate(at_database(server, name))
    yield name
    execute(server, f'drop database "{name}" with (force)')


_numbers = itertools.count(1)


@pytest.fixture
def database_url(server: str, template: str) -> Iterator[str]:
    """A migrated, empty database of the test's own."""
    name = template.replace("template", str(next(_numbers)))
    execute(server, f'create database "{name}" template "{template}"')
    yield at_database(server, name)
    execute(server, f'drop database "{name}" with (force)')


def execute(url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run one statement on a connection of its own, committed; returns its rows."""
    with contextlib.closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


def at_database(url: str, name: str) -> str:
    """The address of the database `name` on the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Settings of an installation in a hurry: on this test's database, with files below `tmp_path`."""
    return Settings(
        _env_file=None,
        database_url=database_url,
        data_dir=tmp_path / "var",
        output_dir=tmp_path / "output",
        port=free_port(),
        worker_processes=1,
        worker_threads=4,
        retry_min_backoff="50ms",
        retry_max_backoff="500ms",
        worker_heartbeat="200ms",
        worker_lost_after="2s",
        poll_interval="200ms",
        shutdown_grace="5s",
        rate_limit="0",  # tests ask more often than clients may; those of the limit set their own
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Where jobs of example_types.py write what happened."""
    return tmp_path / "ledger"


@pytest.fixture
def system(settings: Settings) -> Iterator[Any]:
    """A JobSystem on `settings`."""
    from jobsys.system import JobSystem

    system = JobSystem(settings)
    yield system
    system.close()


@pytest.fixture
def api(system: Any) -> Any:
    """The application, for webtest."""
    import webtest

    from jobsys.app import create_app

    return webtest.TestApp(create_app(system=system))


@pytest.fixture(scope="module")
def away() -> Any:
    """The application while its database is away: what it answers, it answers without one."""
    import webtest

    from jobsys.app import create_app
    from jobsys.system import JobSystem

    return webtest.TestApp(create_app(system=JobSystem(NO_DATABASE)))


@pytest.fixture(scope="module", autouse=True)
def systems() -> Iterator[list[Any]]:
    """Every JobSystem that is made in this process, until it is closed: at the end of its test, or of the file if it is a fixture's of it.

    None goes on reporting to its database from a thread: while libpq connects, it reads the environment, and pytest writes there whenever a
    test begins or ends, which in C is a crash waiting to happen.
    """
    from jobsys.system import JobSystem

    made: list[JobSystem] = []
    make = JobSystem.__init__

    def noted(system: JobSystem, *given: Any, **named: Any) -> None:
        make(system, *given, **named)
        made.append(system)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobSystem, "__init__", noted)
        yield made
    _close(made)


@pytest.fixture(autouse=True)
def systems_of_a_test(systems: list[Any]) -> Iterator[None]:
    """Those that a test made are closed."""
    before = len(systems)
    yield
    _close(systems[before:])
    del systems[before:]


def _close(systems: list[Any]) -> None:
    for system in systems:
        system.close()


@pytest.fixture
def launcher(tmp_path: Path, database_url: str) -> Iterator[Launcher]:
    """Starts any process; at the end all have to stop at SIGTERM and leave no orphan."""
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.close()


@pytest.fixture
def start_worker(launcher: Launcher, settings: Settings) -> Callable[..., Running]:
    """`start_worker(WORKER_PROCESSES=2, …)`: the real `jobsys worker`, with `settings` and these in its environment."""

    def start(**env: Any) -> Running:
        return launcher.start("worker", [sys.executable, "-m", "jobsys", "worker"], environment(settings, **env))

    return start


@pytest.fixture
def worker(start_worker: Callable[..., Running]) -> Running:
    """One running `jobsys worker`."""
    return start_worker()


@pytest.fixture
def start_web(launcher: Launcher, settings: Settings) -> Callable[..., Running]:
    """`start_web(WEB_THREADS=2, …)`: the real web server on a port of its own, answering at `.url`."""

    def start(**env: Any) -> Running:
        port = free_port()
        command = [sys.executable, "-m", "gunicorn", "jobsys.app:create_app()", "--config", "python:jobsys.gunicorn_conf"]
        web = launcher.start("web", command, environment(settings, **{"PORT": port} | env), f"http://127.0.0.1:{port}")

        def answers() -> bool:
            if web.process.poll() is not None:
                pytest.fail(f"the web server ended: {web.output}")
            return responds(port, "/health/live")

        eventually(answers, timeout=20)
        return web

    return start


def responds(port: int, path: str) -> bool:
    """Whether a GET of `path` on this machine's `port` is answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status == 200
    return False


class Mailbox:
    """Where caught mail arrives: `mail.port` to send to, `mail.messages` to read."""

    def __init__(self, catcher: MailCatcher) -> None:
        self.catcher = catcher
        self.port = catcher.port

    @property
    def messages(self) -> list[EmailMessage]:
        """The mails so far, in the order of arrival."""
        files = sorted((self.catcher.directory / "new").iterdir(), key=lambda file: file.stat().st_mtime_ns)
        return [BytesParser(policy=modern).parsebytes(file.read_bytes()) for file in files]  # type: ignore[misc]


@pytest.fixture
def mail(tmp_path: Path) -> Iterator[Mailbox]:
    """A real SMTP server for the test; point SMTP_HOST=127.0.0.1 and SMTP_PORT=mail.port at it."""
    catcher = MailCatcher(tmp_path / "mail", 0)
    catcher.start()
    yield Mailbox(catcher)
    catcher.stop()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Chromium. Tests in need of it are skipped on a machine without it, but never in CI."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    reason = "there is no Chromium on this machine (apt-get install chromium), and this test looks at a page in a real browser"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def promtool() -> str:
    """The path of Prometheus' own tool. Tests in need of it are skipped on a machine without it, but never in CI."""
    if path := shutil.which("promtool"):
        return path
    reason = "there is no promtool on this machine (apt-get install prometheus), and this test asks Prometheus itself"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def scrape(url: str, path: str = "/metrics") -> str:
    """The Prometheus exposition of the web server at `url`, as text. Raises OSError when it is not answered with 200."""
    request = urllib.request.Request(url + path, headers={"Accept": "text/plain;version=0.0.4"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[str, float]:
    """The samples of an exposition by name and labels, as they are written there."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {series: float(value) for series, _, value in lines}


@pytest.fixture
def browser(chromium: str, tmp_path: Path) -> Iterator[Any]:
    """Chromium, driven by its own driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser, and it is not installed")
    driver = shutil.which("chromedriver")
    if driver is None:
        reason = "there is no chromedriver on this machine (apt-get install chromium-driver), and it drives the browser"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    for argument in [*quiet.split(), f"user-data-dir={tmp_path / 'chromium'}"]:
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()
