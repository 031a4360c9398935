"""The smoke test: one job of each type that ships, sent over HTTP to a running system, and a look at what came of it.

Without a URL it starts a system of its own with `jobsys dev`, on free ports and in a temporary directory, and stops it again.
It knows nothing but the HTTP contract, and never takes longer than `PATIENCE` for any one thing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from jobsys.settings import Settings
from jobsys.tokens import Tokens

PATIENCE = 60.0
"""Seconds until something counts as not happening. The first start makes a database, and gets twice as long."""

ROWS = [{"name": 'Ann, "the" first', "note": "two\nlines"}, {"name": "Žofie", "amount": -3.5}, {"name": "=1+1"}]
CELLS = [["name", "note", "amount"], ['Ann, "the" first', "two\nlines", ""], ["Žofie", "", "-3.5"], ["'=1+1", "", ""]]


class Failed(Exception):
    """A check did not turn out as it should; the text says how."""


def smoke(url: str | None, settings: Settings, *, mail_to: str) -> int:
    """Run all checks, print a line for each; 0 when all is well, else 1."""
    begun = time.monotonic()
    if url is not None:
        passed = _check(Client(url, token=_token(settings)), settings.data_dir / "mail" / "new", mail_to, pace=None)
    else:
        with tempfile.TemporaryDirectory(prefix="jobsys-smoke-") as directory:
            passed = _check_own(Path(directory), settings, mail_to)
    failed = passed.count(False)
    verdict = f"{failed} of {len(passed)} checks failed" if failed else f"all {len(passed)} checks passed"
    click.secho(f"{verdict} in {time.monotonic() - begun:.1f} s", bold=True, fg="red" if failed else "green")
    return 1 if failed else 0


class Client:
    """Speaks HTTP with one system."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise click.UsageError(f'"{url}" is not a URL such as http://127.0.0.1:3000')
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        local = parts.hostname in ("127.0.0.1", "::1", "localhost")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def call(self, method: str, path: str, body: Any = None, *, timeout: float = 15.0) -> bytes:
        """The body of a 2xx answer. Raises Failed for any other, and when there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers, method=method)
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise Failed(f"{method} {path} was answered with {error.code}: {said}") from None
        except (OSError, urllib.error.URLError) as error:
            raise Failed(f"{method} {self.url}{path} was not answered: {getattr(error, 'reason', error)}") from None

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """The same, as JSON."""
        content = self.call(method, path, body, timeout=45.0)
        try:
            return json.loads(content)
        except ValueError:
            raise Failed(f"{method} {path} was answered with something that is not JSON: {content[:100]!r}") from None

    def finished(self, type: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Submit a job and wait for it. Raises Failed unless it is COMPLETED."""
        job_id = self.json("POST", "/jobs", {"type": type, "payload": payload})["jobId"]
        deadline = time.monotonic() + PATIENCE
        while True:
            job: dict[str, Any] = self.json("GET", f"/jobs/{job_id}?wait=10")
            if job["status"] == "COMPLETED":
                return job
            if job["status"] in ("FAILED", "DEAD", "CANCELLED") or time.monotonic() > deadline:
                why = f": {job['error']['type']}: {job['error']['message']}" if job["error"] else ""
                raise Failed(f"job {job_id} is {job['status']}{why}")


def _token(settings: Settings) -> str | None:
    return Tokens(settings).issue("smoke", ["jobs:read", "jobs:write"], 900)[0] if settings.jwt_secret else None


def _check_own(directory: Path, settings: Settings, mail_to: str) -> list[bool]:
    passed: list[bool] = []
    with _started(directory, settings) as (process, url):
        if _ran(passed, "jobsys dev starts", lambda: _wait_until_up(process, url)):
            passed += _check(
                Client(url), directory / "mail" / "new", mail_to, pace=settings.ingest_rate[1] / max(settings.ingest_rate[0], 1)
            )
            process.send_signal(signal.SIGTERM)
            _ran(passed, "jobsys dev stops", lambda: _ended(process))
    if not all(passed):
        click.echo(f"jobsys dev said, at the end:\n{(directory / 'log').read_text(errors='replace')[-3000:]}", err=True)
    return passed


def _check(client: Client, mail: Path, mail_to: str, *, pace: float | None) -> list[bool]:
    """All checks on a running system. `pace` is how many seconds must lie between two starts of batches, None when it isn't known."""
    passed: list[bool] = []
    if not _ran(passed, f"{client.url} is healthy", lambda: _health(client)):
        return passed
    ingestion: list[str] = []
    _ran(passed, "ingestion is accepted", lambda: _start_ingestion(client, ingestion))
    _ran(passed, "TEST_JOB", lambda: _echo(client))
    _ran(passed, "EMAIL_SEND", lambda: _email(client, mail, mail_to, must_see=pace is not None))
    _ran(passed, "CSV_EXPORT", lambda: _csv(client))
    if ingestion:
        _ran(passed, "INGEST_BATCH", lambda: _follow_ingestion(client, ingestion[0], pace))
    return passed


def _ran(passed: list[bool], name: str, check: Callable[[], str]) -> bool:
    begun = time.monotonic()
    try:
        said, tick = check(), click.style("✓", fg="green")
    except (Failed, KeyError, TypeError, ValueError) as error:
        said, tick = str(error) if isinstance(error, Failed) else f"an answer that is not as agreed: {error!r}", click.style("✗", fg="red")
        passed.append(False)
    else:
        passed.append(True)
    click.echo(f"{tick} {name}: {said} ({time.monotonic() - begun:.1f} s)")
    return passed[-1]


def _health(client: Client) -> str:
    health = client.json("GET", "/health")
    if not health["workers"]:
        raise Failed("no worker is running")
    return f"{health['workers']} worker process{'es' if health['workers'] > 1 else ''}"


def _echo(client: Client) -> str:
    payload = {"sleepMs": 20, "progressSteps": 2, "note": secrets.token_hex(8)}
    result = client.finished("TEST_JOB", payload)["result"]
    if result != payload:
        raise Failed(f"{payload} came back as {result}")
    return "echoed its payload"


def _email(client: Client, directory: Path, mail_to: str, *, must_see: bool) -> str:
    subject = f"jobsys smoke {secrets.token_hex(8)}"
    job = client.finished("EMAIL_SEND", {"to": mail_to, "subject": subject, "body": "It arrived."})
    for file in sorted(directory.glob("*")):
        if subject.encode() in file.read_bytes():
            return f"the mail is in {directory}"
    if must_see:
        raise Failed(f"no mail has arrived in {directory}")
    return f"accepted by the mail server for {', '.join(job['result']['accepted'])}"


def _csv(client: Client) -> str:
    job = client.finished("CSV_EXPORT", {"data": ROWS})
    content = client.call("GET", f"/jobs/{job['id']}/artifact")
    if hashlib.sha256(content).hexdigest() != job["result"]["sha256"]:
        raise Failed("the file that was downloaded is not the one that was written")
    cells = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    if cells != CELLS:
        raise Failed(f"the file holds {cells}")
    return f"{len(cells) - 1} rows downloaded, as they were sent"


def _start_ingestion(client: Client, ingestion: list[str]) -> str:
    data = client.json("POST", "/api/ingest", {"ids": [1, 2, 3, 4, 5, 6, 7], "priority": "HIGH"})["data"]
    ingestion.append(data["ingestion_id"])
    return f"{data['total_ids']} ids in {data['total_batches']} batches"


def _follow_ingestion(client: Client, ingestion: str, pace: float | None) -> str:
    deadline = time.monotonic() + PATIENCE
    while True:
        data = client.json("GET", f"/api/status/{ingestion}")["data"]
        if data["overall_status"] == "completed":
            break
        if data["overall_status"] == "failed" or time.monotonic() > deadline:
            raise Failed(f"after {PATIENCE:g} s it is {data['overall_status']}: {data['status_counts']}")
        time.sleep(0.2)
    ids = [each for batch in data["batches"] for each in batch["ids"]]
    if ids != [1, 2, 3, 4, 5, 6, 7]:
        raise Failed(f"the batches hold {ids}")
    gaps = _gaps(client, ingestion)
    if pace is not None and any(gap < pace - 0.05 for gap in gaps):
        raise Failed(f"batches started {gaps} s apart, but INGEST_RATE asks for {pace:g} s")
    started = f", started {' and '.join(f'{gap:.1f}' for gap in gaps)} s apart" if gaps else ""
    return f"{data['total_batches']} batches completed{started}"


def _gaps(client: Client, ingestion: str) -> list[float]:
    jobs = client.json("GET", f"/jobs?groupId={ingestion}")["jobs"]
    starts = sorted(datetime.fromisoformat(job["startedAt"].replace("Z", "+00:00")) for job in jobs)
    return [round((later - earlier).total_seconds(), 3) for earlier, later in pairwise(starts)]


@contextmanager
def _started(directory: Path, settings: Settings) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`jobsys dev` with nothing but defaults and INGEST_RATE, everything it keeps below `directory`."""
    web, mail = _free_ports(2)
    inherited = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    count, period = settings.ingest_rate
    chosen = {
        "PORT": str(web),
        "SMTP_PORT": str(mail),
        "DATA_DIR": str(directory),
        "OUTPUT_DIR": str(directory / "output"),
        "INGEST_RATE": f"{count}/{period:f}s" if count else "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "jobsys", "dev"]
    with (directory / "log").open("wb") as log:
        # in the temporary directory, so that no .env is read
        process = subprocess.Popen(command, env=inherited | chosen, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process, f"http://127.0.0.1:{web}"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_up(process: subprocess.Popen[bytes], url: str) -> str:
    client, deadline = Client(url), time.monotonic() + 2 * PATIENCE
    while True:
        if process.poll() is not None:
            raise Failed(f"it ended with exit status {process.returncode}")
        try:
            if client.json("GET", "/health")["workers"]:
                return url
        except Failed:
            pass
        if time.monotonic() > deadline:
            raise Failed(f"{url}/health showed no running worker within {2 * PATIENCE:g} s")
        time.sleep(0.1)


def _ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise Failed(f"it still runs {PATIENCE:g} s after SIGTERM") from None
    if code != 0:
        raise Failed(f"it ended with exit status {code}")
    return "exit status 0"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
